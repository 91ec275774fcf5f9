"""Where the time of a step goes: a trace of it, summed by the scopes that the library names."""

import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

NAMED = (
    # the innermost first: a gather of gradients is inside the backward pass of the layers
    "gather_gradient",
    "weight_gradient",
    "propose",
    "low_rank",
    "head_loss",
    "observe",
    "inner_optimizer",
    "reselection",
    "optimizer",
    "merge",
)
FORWARD, BACKWARD, AGAIN = "layers", "transpose(jvp(layers))", "layers, again"
OTHER = "other"


def scope_of(name: str) -> str:
    """The scope of an operation by its name in the program.

    >>> scope_of("jit(step)/transpose(jvp(layers))/while/body/weight_gradient/dot_general")
    'weight_gradient'
    """
    parts = re.split(r"[/()]", name)
    for scope in NAMED:
        if scope in parts:
            return scope
    if "layers" not in parts:
        return OTHER
    if "rematted_computation" in name or "rematted_computation" in parts:
        return AGAIN
    return BACKWARD if "transpose" in parts else FORWARD


def operation_names(program: str) -> dict[str, str]:
    """Instruction of a compiled module (``compiled.as_text()``) to the name it has from the traced program.

    A fusion without a name has that of the last named instruction in it.
    """
    names: dict[str, str] = {}
    last_of: dict[str, str] = {}  # computation to the last name in it
    calls: dict[str, str] = {}
    computation = ""
    for line in program.splitlines():
        if head := re.match(r"(?:ENTRY )?%?([\w.\-]+) .*\{$", line):
            computation = head[1]
        elif instruction := re.match(r"\s+(?:ROOT )?%?([\w.\-]+) = ", line):
            if name := re.search(r'op_name="([^"]*)"', line):
                names[instruction[1]] = last_of[computation] = name[1]
            elif called := re.search(r"\b(?:calls|to_apply)=%?([\w.\-]+)", line):
                calls[instruction[1]] = called[1]
    return {**{one: last_of[inner] for one, inner in calls.items() if inner in last_of}, **names}


def self_times(events: Iterable[tuple[float, float, str]]) -> dict[str, float]:
    """Nanoseconds of each operation on one line of a trace, without those of the operations inside it.

    Args:
        events: (start, duration, operation), in any order; one may lie inside another.

    >>> dict(self_times([(0, 10, "while"), (1, 4, "dot"), (6, 2, "dot")]))
    {'while': 4, 'dot': 6}
    """
    times: dict[str, float] = defaultdict(float)
    open_events: list[tuple[float, str]] = []  # end, operation
    for start, duration, name in sorted(events, key=lambda event: (event[0], -event[1])):
        while open_events and open_events[-1][0] <= start:
            open_events.pop()
        times[name] += duration
        if open_events:
            end, outer = open_events[-1]
            times[outer] -= min(duration, end - start)
        open_events.append((start + duration, name))
    return times


def read_trace(folder: Path) -> dict[str, float]:
    """Nanoseconds of each operation on the devices, from a trace that ``jax.profiler`` wrote.

    Raises:
        ValueError: If no operation of a program is in it.
    """
    from jax.profiler import ProfileData

    times: dict[str, float] = defaultdict(float)
    for file in folder.rglob("*.xplane.pb"):
        for plane in ProfileData.from_file(str(file)).planes:
            device = plane.name.startswith("/device:")  # a CPU's operations are among the host's events
            lines = list(plane.lines)
            # where there is a line of operations, the others show the same time again
            lines = [line for line in lines if device and line.name == "XLA Ops"] or lines
            for line in lines:
                events = []
                for event in line.events:
                    operation = next((value for key, value in event.stats if key == "hlo_op"), None)
                    if operation is None and device:
                        operation = event.name  # of a kernel that nothing else is known of
                    if operation is not None:
                        events.append((event.start_ns, event.duration_ns, str(operation)))
                for operation, time in self_times(events).items():
                    times[operation] += time
    if not times:
        raise ValueError("no operation of a program is in the trace")
    return times


def shares(times: Mapping[str, float], names: Mapping[str, str]) -> dict[str, Any]:
    """Share of the time by scope, and what could not be told.

    Args:
        times: Operation to its time.
        names: From ``operation_names``.

    Returns:
        ``scopes``: scope to share, largest first; ``unknown``: of ``other`` the share that the program does
        not name; ``largest_unknown``: the names of most of that, with their shares.
    """
    total = sum(times.values())
    by_scope: dict[str, float] = defaultdict(float)
    unknown: dict[str, float] = defaultdict(float)
    for operation, time in times.items():
        name = names.get(operation) or names.get(operation.lstrip("%").split(" ")[0])
        by_scope[OTHER if name is None else scope_of(name)] += time
        if name is None:
            unknown[operation] += time

    def largest(times: Mapping[str, float], count: int | None = None) -> dict[str, float]:
        ordered = sorted(times.items(), key=lambda item: -item[1])
        return {name[:120]: time / total for name, time in ordered[:count]}

    return {
        "scopes": largest(by_scope),
        "unknown": sum(unknown.values()) / total,
        "largest_unknown": largest(unknown, 12),
    }


def traced_shares(run: Callable[[], object], program: str, folder: Path) -> dict[str, Any]:
    """``shares`` of what runs.

    Args:
        run: Runs the program some times, and waits for it.
        program: Its text.
        folder: Where the trace is written.

    Raises:
        ValueError: If no operation of a program is in the trace.
    """
    import jax

    with jax.profiler.trace(str(folder)):
        run()
    return shares(read_trace(folder), operation_names(program))
