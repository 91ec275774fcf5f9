import os
import time

import pytest

from spiel_jax.evaluation.sandbox import Limits, all_pass, passes

LIMITS = Limits(seconds=2, memory=1 << 28, file_size=1 << 16)

HOSTILE = {
    "endless loop": "while True: pass",
    "sleeps": "import time; time.sleep(100)",
    "swallows what stops it": "while True:\n  try:\n    while True: pass\n  except BaseException: pass",
    "memory": "x = bytearray(1 << 30)",
    "memory, bit by bit": "x = []\nwhile True: x.append(bytearray(1 << 20))",
    "fork": "import os; os.fork()",
    "fork bomb": "import os\nwhile True:\n  os.fork()",
    "starts a program": "import subprocess; subprocess.run(['true'], check=True)",
    "starts a program otherwise": "import _posixsubprocess",
    "shell": "import os; assert os.system('true') == 0",
    "spawn": "import os; os.posix_spawn('/bin/true', ['true'], {})",
    "multiprocessing": "import multiprocessing as m; p = m.Process(target=print); p.start(); p.join()",
    "threads without end": "import threading as t\nwhile 1: t.Thread(target=t.Event().wait).start()",
    "reads the system's files": "open('/etc/passwd').read()",
    "reads the parent's files": "import os; open(f'/proc/{os.getppid()}/environ', 'rb').read()",
    "reads what its parent has open": "import os; os.listdir(f'/proc/{os.getppid()}/fd')",
    "reads by a link": "import os; os.symlink('/etc/passwd', 'x'); open('x').read()",
    "lists folders": "import os; os.listdir('/')",
    "writes into a folder above": "open('../outside', 'w').write('x')",
    "writes by its descriptor": "import os; os.open('/tmp/spiel-outside', os.O_CREAT | os.O_WRONLY)",
    "deletes": "import os; os.remove(OUTSIDE)",
    "deletes trees": "import shutil; shutil.rmtree(os.path.dirname(OUTSIDE))",
    "moves": "import os; os.rename(OUTSIDE, 'mine')",
    "kills its parent": "import os, signal; os.kill(os.getppid(), signal.SIGTERM)",
    "kills its group": "import os, signal; os.killpg(0, signal.SIGKILL)",
    "large file": "open('x', 'wb').write(bytes(1 << 20))",
    "network": "import socket; socket.create_connection(('127.0.0.1', 9), 1)",
    "network otherwise": "import urllib.request as u; u.urlopen('http://127.0.0.1:9', timeout=1)",
    "foreign functions": "import ctypes; ctypes.CDLL(None).system(b'true')",
    "leaves as if all were well": "import os; os._exit(0)",
    "leaves politely": "raise SystemExit(0)",
    "raises its limits": "import resource as r; r.setrlimit(r.RLIMIT_AS, (-1, -1))",
    "no program": "this is no Python",
    "null character": "x = '\0'\0",
}


@pytest.mark.slow
@pytest.mark.parametrize("program", HOSTILE.values(), ids=HOSTILE)
def test_hostile(program, tmp_path, monkeypatch):
    outside = tmp_path / "folder" / "file"
    outside.parent.mkdir()
    outside.write_text("precious")
    began = time.monotonic()
    assert not passes(f"OUTSIDE = {str(outside)!r}\n{program}", LIMITS)
    assert time.monotonic() - began < 3 * LIMITS.seconds + 4
    assert outside.read_text() == "precious"
    assert not os.path.exists("/tmp/spiel-outside")


def test_some_of_them_by_default(tmp_path):
    some = ("fork", "starts a program", "reads the system's files", "writes into a folder above", "network")
    assert all_pass([HOSTILE[name] for name in some], LIMITS) == [False] * len(some)


def test_what_programs_need_is_there():
    program = (
        "import math, re, collections, itertools, hashlib, random, functools, heapq, string, copy, typing\n"
        "open('mine', 'w').write('x' * 99)\n"
        "import os\n"
        "assert os.listdir() == ['mine'] and dict(os.environ) == {} or list(os.environ) == ['LC_CTYPE']\n"
        "assert open('mine').read() == 'x' * 99\n"
        "os.rename('mine', 'other'); os.remove('other')\n"
        "print('said to nobody')\n"
        "assert hashlib.md5(b'x').hexdigest()[:4] == '9dd4'\n"
    )
    assert passes(program)


def test_wrong_answers():
    check = "\ndef check(f):\n    assert f(2, 3) == 5\ncheck(add)"
    right, wrong = "def add(a, b):\n    return a + b", "def add(a, b):\n    return a * b"
    assert all_pass([right + check, wrong + check]) == [True, False]
