import shutil
from pathlib import Path

import pytest
from support.hf_folders import save


@pytest.fixture(scope="session")
def single(tmp_path_factory):
    folder = tmp_path_factory.mktemp("single")
    save(folder)
    return folder


@pytest.fixture(scope="session")
def sharded(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sharded")
    save(folder, shard_size="30KB")
    return folder


@pytest.fixture
def single_copy(single, tmp_path):
    return Path(shutil.copytree(single, tmp_path / "model"))


@pytest.fixture
def sharded_copy(sharded, tmp_path):
    return Path(shutil.copytree(sharded, tmp_path / "model"))
