"""What a user can mend is told from bugs by one base class."""

import importlib
import pkgutil
import sys
import types

import pytest

import spiel_jax
from spiel_jax.errors import MissingExtra, NotFoundError, SpielError, extra


def test_every_exception_of_the_library_is_one_that_a_user_can_mend():
    for module in pkgutil.walk_packages(spiel_jax.__path__, "spiel_jax."):
        importlib.import_module(module.name)
    found = {
        thing
        for name, module in list(sys.modules.items())
        if name.startswith("spiel_jax.")
        for thing in vars(module).values()
        if isinstance(thing, type) and issubclass(thing, Exception) and "spiel_jax" in thing.__module__
    }
    assert {"ConfigError", "DataError", "ProcessError", "TopologyError"} <= {one.__name__ for one in found}
    assert [one for one in found if not issubclass(one, SpielError)] == []


@pytest.mark.parametrize("kind", [SpielError, NotFoundError, MissingExtra])
def test_the_message_is_what_was_given(kind):
    assert str(kind("no such thing: expected another")) == "no such thing: expected another"


class TestExtra:
    def test_what_is_installed(self):
        assert extra("json.decoder", "report") is sys.modules["json.decoder"]

    @pytest.mark.parametrize("module", ["spiel_absent", "spiel_absent.part"])
    def test_what_is_not(self, module):
        message = r'spiel_absent, which is not installed: pip install "spiel_jax\[report\]"'
        with pytest.raises(MissingExtra, match=message) as error:
            extra(module, "report")
        assert isinstance(error.value, ImportError)

    def test_what_is_installed_and_broken(self, tmp_path, monkeypatch):
        (tmp_path / "spiel_broken.py").write_text("import spiel_absent\n")
        monkeypatch.syspath_prepend(tmp_path)
        with pytest.raises(ModuleNotFoundError, match="spiel_absent") as error:
            extra("spiel_broken", "report")
        assert not isinstance(error.value, SpielError)

    def test_a_part_that_an_installed_package_lacks(self):
        assert isinstance(extra("json", "report"), types.ModuleType)
        with pytest.raises(ModuleNotFoundError) as error:
            extra("json.absent", "report")
        assert not isinstance(error.value, SpielError)
