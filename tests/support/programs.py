"""How the compiler is asked for a program that a test looks into."""

import os
import platform
import subprocess
import sys

# The tests' other programs are compiled as is fastest (conftest.py): without fused loops, and with scatters
# taken apart before the program can be read.
AS_USERS = {"xla_cpu_use_fusion_emitters": True}

# What a process takes from its environment: every instruction that the machine has. Products and sums are
# fused then, and loops optimised. The tests' own settings (conftest.py) come before what is given.
FLAGS_OF_USERS = " ".join(
    [
        "--xla_backend_optimization_level=3",
        "--xla_cpu_use_fusion_emitters=true",
        "--xla_cpu_max_isa=AVX512" if platform.machine() in ("x86_64", "AMD64") else "",
    ]
)


def run_as_users(file, selected):
    """Runs tests of a file in a process of their own, compiled as users compile; for a test to call."""
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-n0",
        "-p",
        "no:cacheprovider",
        str(file),
        "-k",
        selected,
    ]
    command += ["-m", "slow or not slow"]
    done = subprocess.run(
        command, env=os.environ | {"XLA_FLAGS": FLAGS_OF_USERS}, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
