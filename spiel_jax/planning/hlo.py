"""What a program needs and does where it is compiled for: memory, collectives between devices, arithmetic."""

import math
import re
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jax

COLLECTIVES = (
    "all-gather",
    "all-reduce",
    "reduce-scatter",
    "all-to-all",
    "ragged-all-to-all",
    "collective-permute",
    "collective-broadcast",
)
"""Operations of HLO that exchange data between devices."""


@dataclass(frozen=True)
class Collective:
    """One exchange of a program.

    Attributes:
        kind: One of ``COLLECTIVES``.
        shape: What it gives, as HLO writes it, without layouts.
        source: The operation it comes from, with its scopes.
        count: How often it is done in one run of the program.
        bytes: Of one of them, on one device: the larger of what goes in and what comes out.
    """

    kind: str
    shape: str
    source: str
    count: int
    bytes: int


@dataclass(frozen=True)
class Program:
    """A compiled program. Sizes are bytes on one device.

    Attributes:
        seconds: That it took to compile.
        arguments: What it is given.
        allocated: Arguments, results that do not take their place, and temporaries together.
        code: Of the program itself.
        largest: The largest temporaries, (bytes, shapes of what lies there in turn); empty where the compiler
            does not report them.
        flops: Of its matrix products, on all devices.
        collectives: Between devices.
        refusal: What the compiler said where it found no way to fit the program into the memory; then
            ``allocated`` is the least that it found, and but for ``flops`` nothing else is known.
    """

    seconds: float
    arguments: int
    allocated: int
    code: int = 0
    largest: Sequence[tuple[int, str]] = ()
    flops: int = 0
    collectives: Sequence[Collective] = ()
    refusal: str | None = None


def compile_program(traced: Any, options: Mapping[str, Any]) -> Program:
    """Compiles for the devices on which the arguments lie; these need not be here.

    Args:
        traced: ``jax.jit(function).trace(...)``.
        options: For the compiler.
    """
    began = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        report = {"xla_dump_to": folder, "xla_dump_hlo_as_text": True}
        try:
            compiled = traced.lower().compile(compiler_options={**options, **report})
        except jax.errors.JaxRuntimeError as error:
            least = _refused(str(error))
            if least is None:
                raise
            seconds = time.perf_counter() - began
            flops = product_flops(traced.jaxpr)
            return Program(seconds, 0, least, flops=flops, refusal=str(error).strip())
        seconds = time.perf_counter() - began
        reported = reported_memory(Path(folder))
    memory = compiled.memory_analysis()
    results = memory.output_size_in_bytes - memory.alias_size_in_bytes
    summed = memory.argument_size_in_bytes + results + memory.temp_size_in_bytes
    allocated, largest = reported or (summed, [])
    return Program(
        seconds,
        memory.argument_size_in_bytes,
        allocated,
        memory.generated_code_size_in_bytes,
        largest,
        product_flops(traced.jaxpr),
        collectives(compiled.as_text()),
    )


def _refused(message: str) -> int | None:
    """Bytes that the TPU compiler needs, from its complaint that they are too many; None if it is another."""
    found = re.search(r"\(([\d.]+)([KMGT])\) exceeds available HBM", message)
    found = found or re.search(r"Used ([\d.]+)([KMGT]) of [\d.]+[KMGT] hbm", message)
    return found and int(float(found[1]) * 2 ** (10 * ("KMGT".index(found[2]) + 1)))


@dataclass(frozen=True)
class _Instruction:
    name: str
    shape: str
    operation: str
    operands: tuple[str, ...]
    text: str  # what follows the operands: attributes, metadata

    def called(self, attribute: str) -> list[str]:
        """Names of the computations in an attribute such as ``body=%name`` or ``calls={%a, %b}``."""
        found = re.search(rf"\b{attribute}=(\{{[^}}]*\}}|%?[\w.\-]+)", self.text)
        return re.findall(r"[\w.\-]+", found[1]) if found else []


@dataclass
class _Computation:
    instructions: list[_Instruction] = field(default_factory=list)

    def named(self, name: str) -> _Instruction | None:
        return next((one for one in self.instructions if one.name == name), None)


def shape_bytes(shape: str) -> int:
    """Bytes of an array or a tuple of arrays as HLO writes them; padding of the layout is left out.

    >>> shape_bytes("(bf16[2,3]{1,0:T(8,128)(2,1)}, pred[])")
    13
    """
    bits = 0
    for kind, sizes in re.findall(r"\b([a-z]\w*)\[([\d,]*)\]", shape):
        width = 8 if kind == "pred" else int(next(iter(re.findall(r"\d+", kind)), 0))
        bits += width * math.prod(int(size) for size in sizes.split(",") if size)
    return bits // 8


def _closing(text: str, start: int) -> int:
    """Index of the bracket that closes the one at ``start``."""
    depth = 0
    for index in range(start, len(text)):
        depth += {"(": 1, ")": -1}.get(text[index], 0)
        if depth == 0:
            return index
    raise ValueError(f"unbalanced brackets in {text[:80]!r}")


def _instruction(line: str) -> _Instruction | None:
    head = re.match(r"\s+(?:ROOT )?%?([\w.\-]+) = ", line)
    if head is None:
        return None
    start = head.end()
    end = _closing(line, start) + 1 if line[start] == "(" else line.index(" ", start)
    operation = re.match(r"\s*([\w\-]+)\(", line[end:])
    if operation is None:
        return None
    opening = end + operation.end() - 1
    closing = _closing(line, opening)
    operands = tuple(re.findall(r"%([\w.\-]+)", line[opening:closing]))
    return _Instruction(head[1], line[start:end], operation[1], operands, line[opening:])


def _computations(text: str) -> tuple[dict[str, _Computation], str]:
    """The computations of a module by name, and the name of the entry."""
    found: dict[str, _Computation] = {}
    entry, current = "", _Computation()
    for line in text.splitlines():
        head = re.match(r"(ENTRY )?%?([\w.\-]+) .*\{$", line)
        if head and not line.startswith("HloModule"):
            current = found[head[2]] = _Computation()
            entry = head[2] if head[1] else entry
        elif (instruction := _instruction(line)) is not None:
            current.instructions.append(instruction)
    return found, entry


def _trip_count(loop: _Instruction, computations: dict[str, _Computation]) -> int:
    """How often a loop's body runs; 1 where nothing says so, as of a loop that ends on what it computes."""
    known = re.search(r'known_trip_count":\{"n":"(\d+)"', loop.text)
    if known:
        return int(known[1])
    # TPU programs say it in the condition only: "number < constant", the number counting from 0
    instructions = list(computations[loop.called("condition")[0]].instructions)
    last = instructions[-1]
    if last.operation == "fusion":
        inner = computations[last.called("calls")[0]].instructions
        instructions += inner
        last = inner[-1]
    constants = [
        int(value[1])
        for one in instructions
        if one.operation == "constant" and (value := re.match(r"\((\d+)\)", one.text))
    ]
    counts = last.operation == "compare" and "direction=LT" in last.text and len(constants) == 1
    return constants[0] if counts else 1


def collectives(text: str) -> list[Collective]:
    """The collectives of one run of a program, those inside loops as often as the loop runs.

    Of a conditional the branch with most bytes is counted. A collective that the TPU compiler spreads over
    several fusions, so that it goes on beside other work, is one.

    Args:
        text: The compiled module, ``compiled.as_text()``.
    """
    computations, entry = _computations(text)

    def walk(name: str, times: int, seen: set[str]) -> Iterator[Collective]:
        computation = computations[name]
        for one in computation.instructions:
            kind = one.operation.removesuffix("-start")
            if kind in COLLECTIVES:
                channel = re.search(r"channel_id=(\d+)", one.text)
                if channel and channel[1] in seen:
                    continue
                if channel:
                    seen.add(channel[1])
                yield _collective(one, kind, computation, times)
            elif one.operation == "while":
                body = one.called("body")[0]
                yield from walk(body, times * _trip_count(one, computations), set())
            elif one.operation == "conditional":
                names = one.called("branch_computations")
                names += one.called("true_computation") + one.called("false_computation")
                branches = [list(walk(branch, times, set())) for branch in names]
                yield from max(branches, key=total_bytes, default=[])
            elif kind in ("fusion", "call", "async"):  # asynchronous ones too
                for called in one.called("calls") or one.called("to_apply"):
                    yield from walk(called, times, seen)

    return list(walk(entry, 1, set()))


def _collective(one: _Instruction, kind: str, computation: _Computation, times: int) -> Collective:
    sources = [computation.named(operand) for operand in one.operands]
    taken = sum(shape_bytes(source.shape) for source in sources if source is not None)
    given = shape_bytes(one.shape)
    if one.operation.endswith("-start") and given > taken:
        given -= taken  # the operands are among what the start of an exchange gives
    name = re.search(r'op_name="([^"]*)"', one.text)
    shape = re.sub(r"\{[^{}]*\}|/\*.*?\*/", "", one.shape)
    return Collective(kind, shape, name[1] if name else one.name, times, max(taken, given))


def total_bytes(collectives: Sequence[Collective]) -> int:
    """Bytes of these collectives together, on one device."""
    return sum(one.count * one.bytes for one in collectives)


def reported_memory(folder: Path) -> tuple[int, list[tuple[int, str]]] | None:
    """What a compiler's own report says of the device's memory; None if there is no report.

    ``memory_analysis`` is not enough on a TPU: its peak counts on-chip memory too, and its temporaries are up
    to 40% more than what is allocated, which is also what the compiler holds against the capacity.

    Args:
        folder: Given to the compiler as ``xla_dump_to``.

    Returns:
        Bytes of arguments, results and temporaries together; and the largest temporaries, (bytes, shapes of
        what lies there in turn).
    """
    found = None
    for file in folder.glob("*memory-usage-report.txt"):
        text = file.read_text()
        head = re.search(r"\(color=0\)\nTotal bytes: (\d+)", text)
        if head is None or (found is not None and int(head[1]) <= found[0]):
            continue
        # the temporaries share an allocation, and so a section; arguments and results have one each
        sections = text[head.end() :].partition("\nMemory Space")[0].split("\n\n")
        row = r"^ *\S+\(.*?\); *([\d.]+)(\w+); *\d+; *\d+; (.*)$"
        rows = max((re.findall(row, section, re.MULTILINE) for section in sections), key=len)
        unit = {"B": 1, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30}
        found = int(head[1]), [(int(float(size) * unit[u]), shapes) for size, u, shapes in rows]
    return found


def product_flops(jaxpr: Any) -> int:
    """Floating-point operations of a traced program's matrix products, on all devices together.

    A compiler's own count takes the body of a loop once. Here a loop that ends on what it computes counts
    once, others as often as they run, and of a conditional the branch that computes most. Products that are
    done again for the backward pass are counted again.

    Args:
        jaxpr: Such as ``jax.jit(f).trace(...).jaxpr``.
    """
    total = 0
    for equation in getattr(jaxpr, "jaxpr", jaxpr).eqns:
        parameters = equation.params
        if equation.primitive.name == "dot_general":
            (contracted, _), _ = parameters["dimension_numbers"]
            summed = math.prod(equation.invars[0].aval.shape[axis] for axis in contracted)
            total += 2 * summed * math.prod(equation.outvars[0].aval.shape)
            continue
        inner = [
            product_flops(value)
            for parameter in parameters.values()
            for value in (parameter if isinstance(parameter, tuple | list) else [parameter])
            if hasattr(value, "eqns") or hasattr(value, "jaxpr")
        ]
        if equation.primitive.name == "cond":
            total += max(inner, default=0)
            continue
        times = parameters["length"] if equation.primitive.name == "scan" else 1
        if equation.primitive.name == "shard_map":
            times = parameters["mesh"].size  # inside, shapes are those of one device
        total += times * sum(inner)
    return total
