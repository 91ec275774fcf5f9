"""Files that a run's numbers go to, written so that no failure of theirs stops or delays the run."""

import json
import logging
import math
import os
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol

_log = logging.getLogger(__name__)


class Record(Protocol):
    """A file of numbers by step. Its methods raise ``OSError`` where it cannot be written."""

    def write(self, step: int, numbers: Mapping[str, float | str]) -> None:
        """Adds the numbers of a step."""
        ...

    def close(self) -> None:
        """Writes what is still unwritten, and closes it."""
        ...


class Watched:
    """A record whose first failure is told, once, and which keeps quiet from then on.

    Args:
        name: For messages.
        opened: Opens the record.

    Attributes:
        failed: Whether it could not be opened, written or closed.

    >>> def refuse():
    ...     raise OSError("the disk is full")
    >>> record = Watched("metrics.jsonl", refuse)
    >>> record.write(1, {"loss": 2.0})
    >>> record.failed
    True
    """

    def __init__(self, name: str, opened: Callable[[], Record]):
        self._name, self.failed = name, False
        self._record: Record | None = self._tried(opened)

    def write(self, step: int, numbers: Mapping[str, float | str]) -> None:
        """See ``Record``; raises nothing."""
        if (record := self._record) is not None:
            self._tried(lambda: record.write(step, numbers))

    def close(self) -> None:
        """See ``Record``; raises nothing."""
        if (record := self._record) is not None:
            self._tried(record.close)

    def _tried(self, action: Callable[[], Any]) -> Any:
        try:
            return action()
        except Exception as error:  # of the file system, of a library: the run is worth more
            if not self.failed:
                _log.error(
                    "%s cannot be written: %s: %s. The run goes on", self._name, type(error).__name__, error
                )
            self.failed = True
            return None


class JsonLines:
    """One JSON object a line, with its "step"; a number that is not finite is written as a string.

    What could not be written is kept, and written before the next line: if room is made, nothing is missing.

    Args:
        path: The file.
        start: Lines of later steps are taken out first, of a run that was interrupted; 0: all of them.
    """

    def __init__(self, path: Path, start: int):
        whole = _lines_until(path, start)
        if not path.exists() or path.read_bytes() != whole:
            beside = path.with_name(path.name + ".tmp")
            with beside.open("wb") as file:
                file.write(whole)
                os.fsync(file.fileno())
            beside.replace(path)  # so that a kill in between leaves all lines or these
        self._file = path.open("r+b", buffering=0)
        self._size, self._unwritten = len(whole), b""

    def write(self, step: int, numbers: Mapping[str, float | str]) -> None:
        """See ``Record``."""
        line = {
            name: value if isinstance(value, str) or math.isfinite(value) else str(value)
            for name, value in numbers.items()
        }
        self._unwritten += json.dumps({"step": step, **line}).encode() + b"\n"
        self._file.seek(self._size)  # over what an earlier try may have left there
        while self._unwritten:
            count = self._file.write(self._unwritten)
            self._size, self._unwritten = self._size + count, self._unwritten[count:]

    def close(self) -> None:
        """See ``Record``."""
        with self._file:
            self._file.truncate(self._size)
            os.fsync(self._file.fileno())
        if self._unwritten:
            raise OSError("its last lines are lost")


def _lines_until(path: Path, step: int) -> bytes:
    """The lines of a file of JSON lines up to those of a step."""
    kept = b""
    if step and path.exists():
        for line in path.read_bytes().splitlines(keepends=True):
            try:
                if line.endswith(b"\n") and json.loads(line)["step"] <= step:
                    kept += line
            except (ValueError, KeyError, TypeError):
                continue  # the last line of a killed run may be cut
    return kept


class TensorBoard:
    """An event file that TensorBoard shows.

    Written at once: a thread for it that dies would block whoever hands it more than its queue takes.

    Args:
        folder: Of the event files of the run.
        start: What earlier files hold of later steps is not shown; 0: of none.
    """

    def __init__(self, folder: Path, start: int):
        from tensorboardX import summary
        from tensorboardX.event_file_writer import EventsWriter
        from tensorboardX.proto import event_pb2

        folder.mkdir(parents=True, exist_ok=True)
        self._scalar: Any = summary.scalar
        self._text: Any = summary.text
        self._events: Any = event_pb2
        self._writer = EventsWriter(str(folder / "events"), f".{time.time_ns()}")  # a file of its own
        if start:
            session = self._events.SessionLog(status=self._events.SessionLog.START)
            self._add(step=start + 1, session_log=session)
        self._flushed = time.monotonic()

    def write(self, step: int, numbers: Mapping[str, float | str]) -> None:
        """See ``Record``; numbers that are not finite are left out."""
        for name, number in numbers.items():
            if isinstance(number, str):
                self._add(step=step, summary=self._text(name, number))
            elif math.isfinite(number):
                self._add(step=step, summary=self._scalar(name, number))
        if time.monotonic() > self._flushed + 10:  # seconds that a viewer may lag behind
            self._writer.flush()
            self._flushed = time.monotonic()

    def _add(self, **what: Any) -> None:
        self._writer.write_event(self._events.Event(wall_time=time.time(), **what))

    def close(self) -> None:
        """See ``Record``."""
        self._writer.close()
