"""Storage that fails: one line says so, nothing hangs, and the run can be continued."""

import errno
import os
import random

import pytest
from support.faulty_runs import assert_same_end, end_of, uninterrupted

ERRORS = int(os.environ.get("SPIEL_JAX_STORAGE_ERRORS", "16"))
CODES = (errno.ENOSPC, errno.EIO, errno.EACCES, errno.EDQUOT, errno.EROFS)


@pytest.mark.slow
@pytest.mark.parametrize("method", ["spiel_ag", "lora"])
def test_a_storage_error_is_a_line_and_the_run_goes_on_afterwards(method, tmp_path, llama_folder):
    command, calls, expected = uninterrupted(method, tmp_path, llama_folder, every=2)
    ended = 0
    for number in range(ERRORS // 2):
        draw = random.Random(f"{method} {number}")
        workdir = tmp_path / f"run {number}"
        if number % 3 == 2:
            fault = f"size:{2 ** draw.randrange(6, 17)}"
        else:
            fault = f"error:{draw.randrange(1, calls)}:{draw.choice(CODES)}"
        failed = command.run(workdir, fault)
        assert failed.returncode in (0, 1), (fault, failed.stderr[-3000:])
        assert "Traceback" not in failed.stderr, (fault, failed.stderr[-5000:])
        ended += failed.returncode
        if failed.returncode:
            (line,) = (line for line in failed.stderr.splitlines() if line.startswith("error: "))
            assert str(workdir) in line, fault
            again = command.run(workdir)
            assert again.returncode == 0, (fault, again.stderr[-3000:])
        recorded = "cannot be written" not in failed.stderr
        assert_same_end(end_of(workdir), expected, metrics=recorded)
    assert ended > ERRORS / 8  # or the faults hit nothing
