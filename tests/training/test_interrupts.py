"""Signals end a command: the first in order, the second at once."""

import os
import signal
import subprocess
import sys
import time

import pytest

from spiel_jax.training import interrupts


@pytest.fixture
def signals(monkeypatch):
    """Puts back what a command, which ends, does not."""
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGALRM)}
    monkeypatch.setattr(interrupts.threading, "Thread", _NoThread)
    yield
    signal.set_wakeup_fd(-1)
    for number, handler in before.items():
        signal.signal(number, handler)


class _NoThread:
    def __init__(self, target, args, daemon):
        assert daemon

    def start(self):
        pass


@pytest.mark.usefixtures("signals")
@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_the_first_ends_in_one_line(number, status, capsys):
    with pytest.raises(SystemExit) as ended, interrupts.ended_by_signals():
        signal.raise_signal(number)
    assert ended.value.code == status
    assert capsys.readouterr().err == f"interrupted by {signal.Signals(number).name}\n"


@pytest.mark.usefixtures("signals")
def test_without_one_nothing_happens(capsys):
    with interrupts.ended_by_signals():
        pass
    assert capsys.readouterr().err == ""


class _Interrupting:
    def __del__(self):
        signal.raise_signal(signal.SIGTERM)


@pytest.mark.usefixtures("signals")
def test_one_that_comes_in_a_finaliser_ends_it_too(capsys):
    """No exception leaves a finaliser."""

    def wait():
        del [_Interrupting()][0]
        time.sleep(60)

    with pytest.raises(SystemExit) as ended, interrupts.ended_by_signals():
        wait()
    assert ended.value.code == 143
    assert capsys.readouterr().err == "interrupted by SIGTERM\n"


def test_the_second_ends_at_once(monkeypatch, capfd):
    """Read as they come: what Python does in the meantime is not asked."""

    class Ended(BaseException):
        pass

    def end(status):
        raise Ended(status)

    monkeypatch.setattr(interrupts.os, "_exit", end)
    heard, told = os.pipe()
    os.write(told, bytes([signal.SIGCHLD, signal.SIGINT, signal.SIGCHLD, signal.SIGTERM]))
    with pytest.raises(Ended, match="143"):
        interrupts._end_on_second(heard)
    assert capfd.readouterr().err == "ended at once by a second signal, SIGTERM\n"
    for end in (heard, told):
        os.close(end)


BUSY = """
import hashlib, signal
from spiel_jax.training.interrupts import ended_by_signals
with ended_by_signals():
    print("ready", flush=True)
    hashlib.pbkdf2_hmac("sha256", b"", b"", 10**9)  # minutes, in which Python handles no signal
"""


@pytest.mark.slow
def test_also_where_python_handles_none():
    program = [sys.executable, "-c", BUSY]
    with subprocess.Popen(program, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as running:
        assert running.stdout.readline() == "ready\n"
        running.send_signal(signal.SIGINT)
        with pytest.raises(subprocess.TimeoutExpired):
            running.wait(1)
        running.send_signal(signal.SIGINT)
        assert running.wait(5) == 130
        assert running.stderr.read() == "ended at once by a second signal, SIGINT\n"
