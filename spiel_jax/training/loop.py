"""The loop of a run over its steps: phases, metrics, evaluations and checkpoints when they are due."""

import math
import signal
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np

from spiel_jax.config import Config, micro_batch_size
from spiel_jax.methods.method import Method, Metrics, TrainState, compiled_evaluation, compiled_step
from spiel_jax.training.metrics import Recorder
from spiel_jax.training.nonfinite import NonFiniteError, step_lost, values_lost
from spiel_jax.training.profiler import Profile
from spiel_jax.training.watching import Watch


def heldout_loss(
    evaluate: Callable[..., tuple[jax.Array, jax.Array]], state: TrainState, batches: list[Any]
) -> float:
    """Mean loss over the supervised tokens of the held-out batches, which are on the devices."""
    sums = [evaluate(state, batch) for batch in batches]  # dispatched without waiting for each other
    losses, tokens = np.sum(np.array(jax.device_get(sums), np.float64), axis=0)
    return float(losses / tokens)


@dataclass
class Loop:
    """The loop over steps. Metrics are read one step late, so that the device never waits for the host."""

    config: Config
    method: Method
    rate: Callable[[int], Any]
    place: Callable[[Any], Any]  # this process's rows of a batch [..., B, S] to the devices
    tokens: Sequence[int]  # of each step, in the rows of all processes
    heldout: list[dict]
    recorder: Recorder
    save: Callable[[int, TrainState, float | None, bool], None]  # held-out loss; whether no step follows
    profile: Profile
    watch: Watch
    best: float | None = None  # lowest held-out loss that is saved; None: lower ones need not be

    def __post_init__(self):
        self.heldout_losses: list[tuple[int, float]] = []
        self.skipped = 0
        self.seconds = 0.0
        self._step: Any = None
        self._evaluate = compiled_evaluation(self.method)
        self._unread: list[tuple[int, Metrics]] = []  # step, metrics
        self._in_a_row = 0  # steps that were skipped
        self._others_asked = False  # to stop, where there are several processes

    def run(
        self,
        state: TrainState,
        batches: Any,
        start: int,
        total: int,
        stop_asked: Callable[[], bool],
    ) -> tuple[TrainState, int]:
        """Steps from ``start`` to ``total``, or until asked to stop: the state and the step reached."""
        config = self.config
        began = time.perf_counter()
        if start == 0:
            self._evaluate_now(0, state)
        groups = config.batch_size // micro_batch_size(config)
        step = start
        shardings = jax.tree.map(lambda x: x.sharding, state)
        self._step = compiled_step(self.method, shardings)
        for step in range(start + 1, total + 1):
            batch = next(batches)
            grouped = {name: array.reshape(groups, -1, array.shape[-1]) for name, array in batch.items()}
            phase, reselect = self.method.step_kind(step)
            with self.profile.step(step):
                state, metrics = self._step(state, self.place(grouped), phase=phase, reselect=reselect)
            self._unread.append((step, metrics))
            stopping = stop_asked() or self._is_to_stop()
            last = stopping or step == total
            self.profile.end(step, state, last=last)
            saving = last or _due(step, config.checkpoint_every)
            evaluating = step == total or _due(step, config.eval_every)
            watching = evaluating or _due(step, config.eval_tasks.every)
            if saving or watching:
                self._read(keep=0)
            elif _due(step, config.log_every):
                self._read(keep=1)
            loss = self._evaluate_now(step, state) if evaluating else None
            if watching:
                self.watch(step, state, self.recorder, step == total)
            if loss is not None and self.best is not None and loss < self.best:
                self.best, saving = loss, True
            if saving:
                self.save(step, state, loss, last)
            if saving or watching:
                self.recorder.restart_clock()
            if stopping:
                break
        self.seconds = time.perf_counter() - began
        return state, step

    def _is_to_stop(self) -> bool:
        """Whether numbers of the run could not be written, and the config says to stop then."""
        lost = self.config.on_record_failure == "stop" and self.recorder.failed
        if jax.process_count() == 1:
            return lost
        if lost and not self._others_asked:  # once: a second signal means it. All agree on the step
            self._others_asked = True
            signal.raise_signal(signal.SIGTERM)
        return False

    def _evaluate_now(self, step: int, state: TrainState) -> float | None:
        """The held-out loss, recorded; None if there is none, or it is not finite."""
        if not self.heldout:
            return None
        loss = heldout_loss(self._evaluate, state, [self.place(batch) for batch in self.heldout])
        self.heldout_losses.append((step, loss))
        self.recorder.evaluation(step, loss)
        return loss if math.isfinite(loss) else None

    def _read(self, keep: int) -> None:
        """Records the metrics of all steps but the last ``keep``."""
        count = len(self._unread) - keep
        if count < 1:
            return
        read, self._unread = self._unread[:count], self._unread[count:]
        for position, (step, metrics) in enumerate(read):
            found = jax.device_get(metrics)
            since = found.pop("since", {})
            numbers = {name: float(value) for name, value in found.items()}
            numbers |= {f"since/{first}": float(share) for first, share in since.items() if share}
            finite, whole = bool(numbers.pop("finite")), bool(numbers.pop("values_finite", True))
            numbers["learning_rate"] = float(self.rate(step - 1))
            if position == len(read) - 1:
                tokens = sum(self.tokens[done - 1] for done, _ in read)
                self.recorder.step(step, numbers, len(read), int(tokens))
            else:
                self.recorder.write(step, numbers)
            if finite and whole:
                self._in_a_row = 0
                continue
            if finite:
                raise NonFiniteError(f"step {step}: {values_lost(self.config)}")
            what = f"step {step}: loss {numbers['loss']}, gradient norm {numbers['grad_norm']}"
            self._in_a_row += 1
            if self.config.on_nonfinite == "stop" or self._in_a_row > self.config.skip_limit:
                raise NonFiniteError(f"{what}. {step_lost(self.config, self._in_a_row)}")
            self.skipped += 1
            self.recorder.say(f"{what}: skipped")


def _due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0
