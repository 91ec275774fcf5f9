"""What is here runs on a GPU or a TPU: ``JAX_PLATFORMS=cuda python -m pytest -n0 -m gpu tests/device``.

On a CPU it can be selected by hand in the same way. The tests are plain functions, without pytest, so that
``experiments.bench.device`` can run them where pytest is not installed.
"""

from pathlib import Path

import pytest

from device.reference import use_cpu_too

use_cpu_too()


@pytest.hookimpl(tryfirst=True)  # before those that are not wanted are taken out
def pytest_collection_modifyitems(items):
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.gpu)
            item.add_marker(pytest.mark.tpu)
