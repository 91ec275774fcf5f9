"""Where a run's numbers go: JSON lines, TensorBoard, a progress bar and a summary table."""

import json
import resource
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any

import jax
from tqdm import tqdm

from spiel_jax.training.records import JsonLines, TensorBoard, Watched

METRICS = "metrics.jsonl"
TIMING = "timing.jsonl"
SAMPLES = "samples.jsonl"


class Recorder:
    """Writes a run's metrics.

    ``metrics.jsonl`` holds what the seed determines, one JSON object per line with its "step", so that two
    runs can be compared byte by byte; ``timing.jsonl`` holds what depends on the machine. Both go to
    TensorBoard too. One that cannot be written is told of once, and the others go on.

    Args:
        directory: The run's folder; None: write and show nothing, as another process does.
        start: Steps done already; lines of later steps, of a run that was interrupted, are cut off.
        total: Steps of the run, for the progress bar.
        progress: Whether to show the bar.
        samples: Whether replies are recorded too, in ``samples.jsonl``.
    """

    def __init__(
        self, directory: Path | None, start: int, total: int, progress: bool = True, samples: bool = False
    ):
        self._files: dict[str, Watched] = {}
        if directory is not None:
            if not start:
                with suppress(OSError):
                    (directory / SAMPLES).unlink(missing_ok=True)  # of another run
            for name in (METRICS, TIMING, *([SAMPLES] if samples else [])):
                self._files[name] = Watched(name, partial(JsonLines, directory / name, start))
            board = directory / "tensorboard"
            self._files[board.name] = Watched(board.name, partial(TensorBoard, board, start))
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
        self._show(self._bar.close)
        for file in self._files.values():
            file.close()

    @property
    def failed(self) -> bool:
        """Whether something could not be written."""
        return any(file.failed for file in self._files.values())

    def write(self, step: int, numbers: Mapping[str, float | str], file: str = METRICS) -> None:
        """Records numbers of a step, or texts; a number that is not finite is written as a string."""
        for record in (file, "tensorboard") if self._files else ():
            self._files[record].write(step, numbers)

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
        speed = {"seconds_per_step": seconds / steps, "tokens_per_second": tokens / seconds}
        self.write(step, speed | peak_memory(), TIMING)
        self._shown |= {
            "loss": f"{numbers['loss']:.3f}",
            "lr": f"{numbers['learning_rate']:.1e}",
            "tok/s": f"{tokens / seconds:.0f}",
        }
        if numbers.get("replaced"):
            self._shown["replaced"] = f"{numbers['replaced']:.1%}"
        self._bar.set_postfix(self._shown, refresh=False)
        self._show(lambda: self._bar.update(step - self._bar.n))

    def evaluation(self, step: int, loss: float) -> None:
        """Records a held-out loss."""
        self.write(step, {"heldout_loss": loss})
        self._shown["heldout"] = f"{loss:.3f}"
        self._show(lambda: self._bar.set_postfix(self._shown))

    def restart_clock(self) -> None:
        """Leaves the time since the last step out of the next one's."""
        self._last = time.perf_counter()

    def say(self, text: str) -> None:
        """Prints a line above the progress bar."""
        if self._files:
            self._show(lambda: tqdm.write(text))

    def _show(self, action: Callable[[], Any]) -> None:
        with suppress(OSError):  # nobody looks any more
            action()


def peak_memory() -> dict[str, float]:
    """The most memory held so far, in GiB: by this process, and on its first device where that tells."""
    found = {"peak_host_gib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20}
    told = jax.local_devices()[0].memory_stats() or {}
    if "peak_bytes_in_use" in told:
        found["peak_device_gib"] = told["peak_bytes_in_use"] / 2**30
    return found


def record_replies(directory: Path, step: int, replies: Mapping[int, Mapping[str, str]]) -> None:
    """Adds what the model replied to prompts to ``samples.jsonl``.

    Args:
        directory: The run's folder.
        step: Steps done; lines of later ones are taken out.
        replies: Step, 0 for the base model, to prompt to reply.
    """
    file = Watched(SAMPLES, partial(JsonLines, directory / SAMPLES, step))
    for of, texts in replies.items():
        file.write(of, texts)
    file.close()


def read_metrics(directory: str | Path) -> list[dict[str, Any]]:
    """The lines of a run's ``metrics.jsonl``."""
    return [json.loads(line) for line in (Path(directory) / METRICS).read_text().splitlines()]


def table(rows: Sequence[tuple[str, str]], title: str) -> str:
    """Two aligned columns under a title."""
    width = max(len(name) for name, _ in rows)
    lines = [title, "-" * max(len(title), width + 2 + max(len(value) for _, value in rows))]
    return "\n".join(lines + [f"{name:<{width}}  {value}" for name, value in rows])
