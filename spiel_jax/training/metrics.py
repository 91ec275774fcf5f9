"""Where a run's numbers go: JSON lines, TensorBoard, a progress bar and a summary table."""

import json
import math
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

from tensorboardX import SummaryWriter
from tqdm import tqdm

METRICS = "metrics.jsonl"
TIMING = "timing.jsonl"


class Recorder:
    """Writes a run's metrics.

    ``metrics.jsonl`` holds what the seed determines, one JSON object per line with its "step", so that two
    runs can be compared byte by byte; ``timing.jsonl`` holds what depends on the machine. Both go to
    TensorBoard too.

    Args:
        directory: The run's folder; None: write and show nothing, as another process does.
        start: Steps done already; lines of later steps, of a run that was interrupted, are cut off.
        total: Steps of the run, for the progress bar.
        progress: Whether to show the bar.
    """

    def __init__(self, directory: Path | None, start: int, total: int, progress: bool = True):
        self._files, self._board = {}, None
        if directory is not None:
            self._files = {name: _open_after(directory / name, start) for name in (METRICS, TIMING)}
            self._board = SummaryWriter(str(directory / "tensorboard"), purge_step=start or None)
        self._bar = tqdm(
            total=total,
            initial=start,
            unit="step",
            desc="training",
            dynamic_ncols=True,
            disable=directory is None or not progress,
        )
        self._last = time.perf_counter()
        self._shown: dict[str, str] = {}

    def __enter__(self) -> "Recorder":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.close()
        if self._board is not None:
            self._board.close()
        for file in self._files.values():
            file.close()

    def write(self, step: int, numbers: Mapping[str, float], file: str = METRICS) -> None:
        """Records numbers of a step; a number that is not finite is written as a string."""
        if self._board is None:
            return
        for name, number in numbers.items():
            if math.isfinite(number):
                self._board.add_scalar(name, number, step)
        line = {k: v if math.isfinite(v) else str(v) for k, v in numbers.items()}
        self._files[file].write(json.dumps({"step": step, **line}) + "\n")
        self._files[file].flush()

    def step(self, step: int, numbers: Mapping[str, float], steps: int, tokens: int) -> None:
        """Records a training step and moves the bar.

        Args:
            step: Its number.
            numbers: Its metrics.
            steps: Steps since the last call.
            tokens: Tokens processed in these.
        """
        now = time.perf_counter()
        seconds, self._last = now - self._last, now
        self.write(step, numbers)
        self.write(step, {"seconds_per_step": seconds / steps, "tokens_per_second": tokens / seconds}, TIMING)
        self._shown |= {
            "loss": f"{numbers['loss']:.3f}",
            "lr": f"{numbers['learning_rate']:.1e}",
            "tok/s": f"{tokens / seconds:.0f}",
        }
        if numbers.get("replaced"):
            self._shown["replaced"] = f"{numbers['replaced']:.1%}"
        self._bar.set_postfix(self._shown, refresh=False)
        self._bar.update(step - self._bar.n)

    def evaluation(self, step: int, loss: float) -> None:
        """Records a held-out loss."""
        self.write(step, {"heldout_loss": loss})
        self._shown["heldout"] = f"{loss:.3f}"
        self._bar.set_postfix(self._shown)

    def restart_clock(self) -> None:
        """Leaves the time since the last step out of the next one's."""
        self._last = time.perf_counter()

    def say(self, text: str) -> None:
        """Prints a line above the progress bar."""
        if self._board is not None:
            tqdm.write(text)


def _open_after(path: Path, step: int) -> Any:
    """Opens a file of JSON lines for appending, without the lines of steps after ``step``; 0: empty."""
    kept = []
    if step and path.exists():
        for line in path.read_text().splitlines():
            try:
                if json.loads(line)["step"] <= step:
                    kept.append(line)
            except (json.JSONDecodeError, KeyError, TypeError):
                continue  # the last line of a killed run may be cut
    path.write_text("".join(line + "\n" for line in kept))
    return path.open("a")


def read_metrics(directory: str | Path) -> list[dict[str, Any]]:
    """The lines of a run's ``metrics.jsonl``."""
    return [json.loads(line) for line in (Path(directory) / METRICS).read_text().splitlines()]


def table(rows: Sequence[tuple[str, str]], title: str) -> str:
    """Two aligned columns under a title."""
    width = max(len(name) for name, _ in rows)
    lines = [title, "-" * max(len(title), width + 2 + max(len(value) for _, value in rows))]
    return "\n".join(lines + [f"{name:<{width}}  {value}" for name, value in rows])
