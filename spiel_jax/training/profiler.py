"""A trace of a few steps, for XProf, TensorBoard or Perfetto."""

from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax


@dataclass(frozen=True)
class Profile:
    """Traces some steps of a run: its first ones are left out, since they compile.

    Attributes:
        folder: Where the trace goes; ``perfetto_trace.json.gz`` in it opens in ui.perfetto.dev.
        first: Number of the first step that is traced.
        count: How many are; 0 for none.
    """

    folder: Path
    first: int
    count: int

    def step(self, number: int) -> AbstractContextManager:
        """Marks a step in the trace; begins the trace with the first."""
        if self.count and number == self.first:
            options = jax.profiler.ProfileOptions()
            options.python_tracer_level = 0  # what the host runs is one call a step
            jax.profiler.start_trace(str(self.folder), create_perfetto_trace=True, profiler_options=options)
        return jax.profiler.StepTraceAnnotation("train", step_num=number)

    def end(self, number: int, state: Any, *, last: bool) -> None:
        """Ends the trace with its last step, or that of the run, once its results are there."""
        final = self.first + self.count - 1
        if self.first <= number <= final and (number == final or last):
            jax.block_until_ready(state)
            jax.profiler.stop_trace()
