"""What a plan found out, for people and as JSON."""

import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, replace
from typing import Any

import jax
from tqdm import tqdm

from spiel_jax.config import Config, ConfigError, check_config, flatten, micro_batch_size
from spiel_jax.distributed.mesh import make_mesh
from spiel_jax.models.io.loading import model_shape
from spiel_jax.planning.hlo import Program, total_bytes
from spiel_jax.planning.run import PlannedRun, prepare
from spiel_jax.planning.search import Trial, as_flags, needed, search
from spiel_jax.planning.topology import GIB, Hardware, open_topology
from spiel_jax.training.metrics import table

_PARTS = ("weights", "deltas", "optimizer", "batch", "temporaries", "programs", "peak")


def summary(
    run: PlannedRun, hardware: Hardware, programs: Mapping[str, Program], trials: Sequence[Trial]
) -> dict[str, Any]:
    """All that was found out, JSON-like.

    Sizes are bytes on one device. ``memory`` of a kind of step: ``weights``, ``deltas`` (indices, values and
    pretrained entries; or adapters), ``optimizer`` (statistics of the growth too) and ``batch`` lie there all
    the time, ``temporaries`` while the step runs; ``programs`` are those of all kinds of step that were
    compiled; ``peak`` is the sum. ``collectives_by_kind``: of each collective what goes in or what comes
    out on one of them, whichever is more. ``train_with``: what to set for a run as it was planned, or as it
    is proposed.
    """
    held, code = run.held(), sum(program.code for program in programs.values())
    resident = sum(held.values())
    tokens = run.config.batch_size * run.config.data.sequence_length
    kinds = {}
    for kind, program in programs.items():
        allocated = needed(resident, program)
        collectives = sorted(program.collectives, key=lambda one: -one.count * one.bytes)
        by_kind = {
            kind: [one for one in collectives if one.kind == kind]
            for kind in {one.kind for one in collectives}
        }
        sizes = (*held.values(), max(allocated - resident, 0), code, allocated + code)
        kinds[kind] = {
            "compile_seconds": round(program.seconds, 1),
            "memory": dict(zip(_PARTS, sizes, strict=True)),
            "largest_temporaries": [
                {"bytes": size, "shapes": shapes} for size, shapes in program.largest[:8]
            ],
            "flops_per_token": program.flops / tokens,
            "collectives_by_kind": {
                kind: {"count": sum(one.count for one in some), "bytes": total_bytes(some)}
                for kind, some in sorted(by_kind.items())
            },
            "collectives": [asdict(one) for one in collectives],
            "refusal": program.refusal,
        }
    heaviest = max(kinds, key=lambda kind: kinds[kind]["memory"]["peak"])
    peak = kinds[heaviest]["memory"]["peak"]
    # what the compiler refused does not fit, whatever it is that it needs
    fits = peak <= hardware.usable and not any(program.refusal for program in programs.values())
    settings = {f"mesh.{axis}": size for axis, size in run.mesh.shape.items()}
    settings["micro_batch_size"] = run.config.micro_batch_size
    proposal = trials[-1].changes if trials and trials[-1].fits else None
    return {
        "topology": hardware.name,
        "chip": hardware.chip,
        "devices": run.mesh.size,
        "mesh": dict(run.mesh.shape),
        "usable": hardware.usable,
        "assumption": hardware.assumption,
        "config": flatten(run.config),
        "tokens_per_step": tokens,
        "flops_are": "of matrix products, counted in the traced step, those done again counted again",
        "steps": kinds,
        "not_compiled": [kind for kind in run.kinds if kind not in kinds],
        "heaviest": heaviest,
        "peak": peak,
        "fits": fits,
        "trials": [asdict(trial) for trial in trials],
        "proposal": proposal,
        "train_with": as_flags(settings | (proposal or {})) if fits or proposal else None,
        "jax": jax.__version__,
    }


def show(found: Mapping[str, Any]) -> str:
    """What a person wants to see of a ``summary``."""
    config, steps = found["config"], found["steps"]
    rows, shards = config["micro_batch_size"], found["mesh"]["data"] * found["mesh"]["fsdp"]
    unit, name = (GIB, "GiB") if found["peak"] >= GIB else (2**20, "MiB")

    def line(name: str, numbers: Iterable[str]) -> tuple[str, str]:
        return name, "  ".join(
            f"{text:>{max(len(kind), 9)}}" for kind, text in zip(steps, numbers, strict=True)
        )

    def sizes(name: str, get: Callable[[dict], int]) -> tuple[str, str]:
        return line(f"  {name}", [f"{get(step) / unit:.2f}" for step in steps.values()])

    def given_out(step: dict, kind: str) -> str:
        if step["refusal"]:
            return "?"
        return f"{step['collectives_by_kind'].get(kind, {'bytes': 0})['bytes'] / unit:.2f}"

    exchanged = sorted({kind for step in steps.values() for kind in step["collectives_by_kind"]})
    lines = [
        ("mesh", ", ".join(f"{axis}={size}" for axis, size in found["mesh"].items())),
        ("blocks", ", ".join(f"{axis}={config[f'targets.grid.{axis}']}" for axis in ("fsdp", "tensor"))),
        ("batch", f"{config['batch_size']} sequences of {config['data.sequence_length']} tokens"),
        ("micro-batch", f"{rows} sequences, {rows // shards} on each device"),
        ("remat", config["model.remat"]),
        line(f"{name} on each device", steps),
        *[sizes(key, lambda step, key=key: step["memory"][key]) for key in _PARTS],
        (f"{name} exchanged a step", ""),
        *[line(f"  {kind}", [given_out(step, kind) for step in steps.values()]) for kind in exchanged],
        line("GFLOP a token", [f"{step['flops_per_token'] / 1e9:.4g}" for step in steps.values()]),
        line("seconds to compile", [f"{step['compile_seconds']:.0f}" for step in steps.values()]),
        ("usable", f"{found['usable'] / unit:.2f} {name} ({found['assumption']})"),
        ("verdict", f"{'fits' if found['fits'] else 'does not fit'}: {found['heaviest']} needs most"),
    ]
    refused = [kind for kind, step in steps.items() if step["refusal"]]
    if refused:
        lines.append(("", f"refused by the compiler, which needs at least that: {', '.join(refused)}"))
    if found["not_compiled"]:
        lines.append(("", f"not looked at: {', '.join(found['not_compiled'])}"))
    for trial in found["trials"]:
        verdict = "fits" if trial["fits"] else "too much"
        about = "" if trial["compiled"] else "at least "
        size = f"{about}{trial['needed'] / unit:.2f} {name}"
        lines.append((f"  {verdict}", f"{size} with {as_flags(trial['changes'])}"))
    if found["train_with"]:
        lines.append(("train with", found["train_with"]))
    model = config["model.preset"] or config["model.source"]
    title = f"{config['method']} on {model}, {found['devices']} x {found['chip']} ({found['topology']})"
    return table(lines, title)


def plan(
    config: Config,
    topology: str,
    *,
    mesh: Mapping[str, int] | None = None,
    kinds: Sequence[str] = (),
    memory: float | None = None,
    trials: int = 6,
    progress: bool = True,
) -> dict[str, Any]:
    """Compiles what a run would do, and looks for a setting that fits where it does not.

    Args:
        config: See ``default_config``.
        topology: See ``open_topology``.
        mesh: Sizes of mesh axes in the place of those of the config.
        kinds: Kinds of step to compile; default: all that the run has.
        memory: Usable GiB of each device in the place of what is known of it.
        trials: Other settings to compile at most; 0: do not look for one.
        progress: Whether to show progress bars.

    Returns:
        See ``summary``.

    Raises:
        SpielError: If a value is not allowed; see ``open_topology`` and ``prepare`` too.
    """
    check_config(config)
    config = config.copy_and_resolve_references()
    if unknown := (mesh or {}).keys() - config.mesh.keys():
        raise ConfigError(f"mesh axis {min(unknown)!r}: expected some of {', '.join(config.mesh)}")
    config.mesh.update(mesh or {})
    hardware = open_topology(topology)
    if memory is not None:
        hardware = replace(hardware, usable=int(memory * GIB), assumption="as asked for")
    model = model_shape(config.model.source, config.model.preset)
    devices = make_mesh(config.mesh, hardware.devices)
    hosts = {device.process_index for device in hardware.devices}
    if idle := hosts - {device.process_index for device in devices.devices.flat}:
        raise ConfigError(
            f"a mesh of {devices.size} devices leaves {len(idle)} of the {len(hosts)} hosts of {topology} "
            f"without one: use all {len(hardware.devices)} devices, or a smaller topology"
        )
    run = prepare(config, model, devices)
    if unknown := [kind for kind in kinds if kind not in run.kinds]:
        raise ConfigError(f"no step of this run is {unknown[0]!r}: it has {', '.join(run.kinds)}")
    if run.config.micro_batch_size != micro_batch_size(config):
        tqdm.write(
            f"config.micro_batch_size = {micro_batch_size(config)} cannot be spread over this mesh: planned "
            f"with {run.config.micro_batch_size}",
            sys.stderr,
        )
    programs = {}
    with tqdm(kinds or list(run.kinds), desc="compiling", unit="program", disable=not progress) as bar:
        for kind in bar:
            bar.set_postfix_str(kind)
            programs[kind] = run.compiled(kind, hardware)
    found = summary(run, hardware, programs, [])
    if found["fits"] or trials < 1:
        return found
    by_need = sorted(programs, key=lambda kind: -found["steps"][kind]["memory"]["peak"])
    tried = search(run, model, hardware, by_need, found["steps"][by_need[0]]["memory"], trials, progress)
    return summary(run, hardware, programs, tried)
