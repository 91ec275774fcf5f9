import json
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

import spiel_jax
from spiel_jax.training import lock
from spiel_jax.training.lock import LOCK, InUse, locked

HOLD = f"""
import sys, time, types
from pathlib import Path
package = sys.modules["spiel_jax"] = types.ModuleType("spiel_jax")  # whose own imports take seconds
package.__path__ = [{str(Path(spiel_jax.__file__).parent)!r}]
from spiel_jax.training.lock import locked
with locked(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(60)
"""


@pytest.fixture
def other(tmp_path):
    """Another process that holds the folder."""
    process = subprocess.Popen([sys.executable, "-c", HOLD, tmp_path], stdout=subprocess.PIPE, text=True)
    with process:
        assert process.stdout.readline() == "held\n"
        yield process
        process.kill()


def test_a_second_process_is_refused_until_the_first_is_killed(tmp_path, other):
    told = rf"is in use: process {other.pid} on this host trains in it.*choose another --workdir"
    with pytest.raises(InUse, match=told), locked(tmp_path):
        pass
    other.send_signal(signal.SIGKILL)
    os.waitid(os.P_PID, other.pid, os.WEXITED | os.WNOWAIT)  # dead, and not yet waited for by its parent
    with locked(tmp_path):
        assert json.loads((tmp_path / LOCK).read_text())["pid"] == os.getpid()
    assert not (tmp_path / LOCK).exists()


def test_is_let_go_after_an_error_and_is_not_taken_twice(tmp_path):
    def fail():
        with locked(tmp_path):
            with pytest.raises(InUse, match=f"process {os.getpid()} on this host"), locked(tmp_path):
                pass
            raise RuntimeError("mine")

    with pytest.raises(RuntimeError, match="mine"):
        fail()
    with locked(tmp_path):
        pass


def left(folder, **holder):
    (folder / LOCK).write_text(json.dumps(lock._this_process() | holder))


def test_another_host_is_not_known_to_have_ended(tmp_path):
    left(tmp_path, host="elsewhere")
    told = rf"on the host 'elsewhere' holds it.*If it does not, remove {tmp_path / LOCK}"
    with pytest.raises(InUse, match=told), locked(tmp_path):
        pass
    assert (tmp_path / LOCK).exists()


def test_a_process_that_is_gone_or_another_of_its_number_does_not_hold_it(tmp_path):
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    for holder in ({"pid": ended.pid}, {"began": "1"}):
        left(tmp_path, **holder)
        with locked(tmp_path):
            pass


@pytest.mark.parametrize("text", ["", "{", "[]", '{"host": 1}', '{"host": "x", "pid": -1}', "\0"])
def test_what_says_nothing_is_taken_over(tmp_path, text):
    (tmp_path / LOCK).write_text(text)
    with locked(tmp_path):
        assert json.loads((tmp_path / LOCK).read_text())["host"] == socket.gethostname()


def test_without_locks_of_the_system_a_live_process_decides(tmp_path, monkeypatch, other):
    def none(*_):
        raise OSError("no locks available")

    monkeypatch.setattr(lock.fcntl, "flock", none)
    with pytest.raises(InUse, match=f"process {other.pid}"), locked(tmp_path):
        pass
    other.kill()
    other.wait()
    with locked(tmp_path):
        pass


def test_a_folder_that_is_removed_meanwhile_is_no_error(tmp_path):
    (folder := tmp_path / "run").mkdir()
    with locked(folder):
        (folder / LOCK).unlink()
        folder.rmdir()
