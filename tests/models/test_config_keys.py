import pytest

from spiel_jax.errors import SpielError
from spiel_jax.models.config_keys import Keys, one_of, shown

WRONG = ("8", True, None, [], {}, 1.5, float("nan"), float("inf"), 10**400, -1, 2**31)


@pytest.mark.parametrize("value", WRONG)
def test_integers(value):
    with pytest.raises(
        SpielError, match="lacks 'a'" if value is None else "a must be an integer from 1 to 214"
    ):
        Keys({"a": value}).integer("a")


@pytest.mark.parametrize("value", [v for v in WRONG if v not in (1.5, 2**31)])
def test_numbers(value):
    with pytest.raises(SpielError, match="lacks 'a'" if value is None else "a must be a finite number of at"):
        Keys({"a": value}).number("a")


@pytest.mark.parametrize("value", [v for v in WRONG if v is not True])
def test_flags(value):
    with pytest.raises(SpielError, match="lacks 'a'" if value is None else "a must be true or false"):
        Keys({"a": value}).flag("a")


@pytest.mark.parametrize("value", WRONG)
def test_choices_lists_and_objects(value):
    keys = Keys({"a": value})
    with pytest.raises(SpielError, match=r"unknown a .*: expected one of x, y"):
        keys.choice("a", ("x", "y"))
    if value != []:
        with pytest.raises(SpielError, match=r"lacks 'a'|a must be a list"):
            keys.items("a")
    if value not in (None, {}):
        with pytest.raises(SpielError, match="a must be an object"):
            keys.mapping("a")


def test_what_fits():
    keys = Keys({"i": 3, "f": 1e-6, "t": True, "c": "x", "l": [1], "o": {"i": 4}})
    assert (keys.integer("i"), keys.number("f"), keys.flag("t")) == (3, 1e-6, True)
    assert (keys.choice("c", ("x",)), keys.items("l"), keys.mapping("o").integer("i")) == ("x", [1], 4)
    assert type(keys.number("i")) is float


def test_null_is_as_absent():
    keys = Keys({"a": None})
    assert (keys.integer("a", 7), keys.number("b", 0.5), keys.flag("a", True)) == (7, 0.5, True)
    assert (keys.choice("a", ("x",), "x"), keys.items("b", None), keys.mapping("b").values) == ("x", None, {})


def test_values_in_messages_are_short():
    assert len(shown("x" * 10**6)) <= 80
    assert len(shown([["y" * 1000] * 1000] * 1000)) < 1000
    with pytest.raises(SpielError) as error:
        one_of("kind", "x" * 10**6, ("a",))
    assert len(str(error.value)) < 200
