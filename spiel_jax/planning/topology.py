"""Hardware to compile for without having it: its devices, their memory, and the compilers that it takes."""

import contextlib
import importlib.metadata
import importlib.util
import os
import re
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jax
from jax.experimental import topologies

from spiel_jax.errors import SpielError

GIB = 2**30

EXAMPLES = (
    "v5e:2x2, 2x4, 4x4, 4x8, 8x8, 8x16, 16x16; v5p:2x2x1, 2x2x2, 2x2x4, 2x4x4, 4x4x4; "
    "v6e:2x2, 2x4, 4x4, 4x8, 8x8; h100:8; a100:8, a100_40gb:8; cpu:8"
)
"""Names of topologies, for messages. Any slice that the TPU compiler knows and any number of GPUs will do."""


class TopologyError(SpielError):
    """There is no such hardware, or the compiler does not know it."""


class MissingCompilerError(SpielError, ImportError):
    """The packages with the compiler are not installed; the message says which to install."""


@dataclass(frozen=True)
class Hardware:
    """Devices to compile for.

    Attributes:
        name: Of the topology, such as "v5e:4x4".
        chip: Of one device, such as "TPU v5e".
        usable: Bytes of a device's memory that a program can have.
        assumption: Why so many.
        devices: For a mesh; nothing can be placed on those that are not here.
        options: For ``Lowered.compile``.
    """

    name: str
    chip: str
    usable: int
    assumption: str
    devices: Sequence[Any]
    options: dict[str, Any] = field(default_factory=dict)


_TPUS = {"v5e": ("TPU v5e", 15.75, 16), "v5p": ("TPU v5p", 95.74, 96), "v6e": ("TPU v6e", 31.25, 32)}
"""Chip, GiB that the compiler lets a program have, GiB of memory."""


@dataclass(frozen=True)
class _GPU:
    """What the compiler asks of a GPU; from NVIDIA's data sheets and CUDA's table of compute capabilities."""

    name: str
    memory: int  # bytes
    capability: tuple[int, int]
    cores: int  # streaming multiprocessors
    units: int  # float32 units of a core
    bandwidth: int  # bytes per second
    cache: int  # level 2, bytes
    clock: float  # GHz
    shared: int  # KiB of shared memory of a core; a block can have one less

    def description(self) -> str:
        """In the text format of the compiler's target description."""
        major, minor = self.capability
        return f"""
            gpu_device_info {{
              threads_per_warp: 32 threads_per_block_limit: 1024 threads_per_core_limit: 2048
              block_dim_limit_x: {2**31 - 1} block_dim_limit_y: {2**16 - 1} block_dim_limit_z: {2**16 - 1}
              registers_per_core_limit: {2**16} registers_per_block_limit: {2**16}
              shared_memory_per_block: {48 * 2**10} shared_memory_per_core: {self.shared * 2**10}
              shared_memory_per_block_optin: {(self.shared - 1) * 2**10}
              core_count: {self.cores} fpus_per_core: {self.units} clock_rate_ghz: {self.clock}
              memory_bandwidth: {self.bandwidth} l2_cache_size: {self.cache} device_memory_size: {self.memory}
              cuda_compute_capability {{ major: {major} minor: {minor} }}
            }}
            platform_name: "CUDA"
            dnn_version_info {{ major: 9 minor: 8 }}
            runtime_version {{ major: 12 minor: 8 }}
            device_description_str: "{self.name}"
        """


_MIB = 2**20
_GPUS = {
    "h100": _GPU(
        "NVIDIA H100 80GB", 81_000 * _MIB, (9, 0), 132, 128, 3_350 * 10**9, 50 * _MIB, 1.98, shared=228
    ),
    "a100": _GPU(
        "NVIDIA A100 80GB", 81_100 * _MIB, (8, 0), 108, 64, 2_039 * 10**9, 40 * _MIB, 1.41, shared=164
    ),
    "a100_40gb": _GPU(
        "NVIDIA A100 40GB", 40_300 * _MIB, (8, 0), 108, 64, 1_555 * 10**9, 40 * _MIB, 1.41, shared=164
    ),
}
_GPU_SHARE = 0.9
_GPUS_PER_HOST = 8


def open_topology(name: str) -> Hardware:
    """The hardware of that name, to be called before JAX looks for devices of its own.

    Args:
        name: Kind of device and their number or arrangement, such as "v5e:4x4", "h100:8" or "cpu:8".

    Raises:
        TopologyError: If the name is unknown, or the arrangement is not one of the kind.
        MissingCompilerError: If the packages with the compiler are not installed.
    """
    kind, _, layout = name.partition(":")
    if kind in _TPUS and re.fullmatch(r"\d+(x\d+)+", layout):
        return _tpu(name)
    if kind in (*_GPUS, "cpu") and re.fullmatch(r"[1-9]\d*", layout):
        return _cpu(name, int(layout)) if kind == "cpu" else _gpu(name, _GPUS[kind], int(layout))
    raise TopologyError(f"unknown topology {name!r}: expected one such as {EXAMPLES}")


def _tpu(name: str) -> Hardware:
    if importlib.util.find_spec("libtpu") is None:
        wanted = [one.partition(";")[0] for one in importlib.metadata.requires("jax") or ()]
        libtpu = next((one for one in wanted if one.startswith("libtpu")), "libtpu")
        raise MissingCompilerError(
            f'compiling for a TPU takes its compiler: pip install --no-deps "{libtpu.strip()}"'
        )
    # libtpu looks for the machine that it is on, and there may be others that compile
    told = {"SKIP_MDS_QUERY": "1", "ACCELERATOR_TYPE": "v5litepod-8", "WORKER_HOSTNAMES": "localhost"}
    for variable, value in {**told, "WORKER_ID": "0"}.items():
        os.environ.setdefault(f"TPU_{variable}", value)
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
    try:
        devices = topologies.get_topology_desc(name, "tpu").devices
    except jax.errors.JaxRuntimeError as error:
        raise TopologyError(f"no topology {name!r}: {error}; there are {EXAMPLES}") from error
    chip, usable, memory = _TPUS[name.partition(":")[0]]
    assumption = f"of {memory} GiB, what its compiler lets a program have"
    return Hardware(name, chip, int(usable * GIB), assumption, devices)


def _gpu(name: str, gpu: _GPU, count: int) -> Hardware:
    compiler = _cuda_folder()
    plugin = importlib.util.find_spec("jax_plugins") and importlib.util.find_spec("jax_plugins.xla_cuda12")
    if plugin is None or compiler is None:
        version = jax.__version__
        raise MissingCompilerError(
            "compiling for a GPU takes JAX's plugin and NVIDIA's assembler: pip install --no-deps "
            f'"jax-cuda12-plugin=={version}" "jax-cuda12-pjrt=={version}" nvidia-cuda-nvcc-cu12'
        )
    hosts, rest = divmod(count, _GPUS_PER_HOST)
    if hosts and rest:
        raise TopologyError(
            f"{name}: expected up to {_GPUS_PER_HOST} GPUs, of one host, or a multiple of that"
        )
    layout = f"1x{hosts}x{_GPUS_PER_HOST}" if hosts else f"1x1x{count}"
    devices = topologies.get_topology_desc(
        gpu.name, "cuda", target_config=gpu.description(), topology=layout
    ).devices
    assumption = (
        f"{_GPU_SHARE:.0%} of {gpu.memory / GIB:.1f} GiB, with XLA_PYTHON_CLIENT_MEM_FRACTION={_GPU_SHARE}; "
        "JAX's default is 0.75"
    )
    # no GPU to time alternatives on
    options = {"xla_gpu_autotune_level": 0, "xla_gpu_cuda_data_dir": str(compiler)}
    return Hardware(name, gpu.name, int(_GPU_SHARE * gpu.memory), assumption, devices, options)


def _cuda_folder() -> Path | None:
    """Where NVIDIA's assembler is: that of the package, or one that is installed."""
    package = importlib.util.find_spec("nvidia")
    folders = [Path(place) / "cuda_nvcc" for place in (package and package.submodule_search_locations) or ()]
    if (assembler := shutil.which("ptxas")) is not None:
        folders.append(Path(assembler).parent.parent)
    return next((folder for folder in folders if (folder / "bin" / "ptxas").exists()), None)


def _cpu(name: str, count: int) -> Hardware:
    with contextlib.suppress(RuntimeError):  # JAX has looked already: perhaps there are enough
        jax.config.update("jax_num_cpu_devices", count)
    devices = jax.devices("cpu")[:count]
    if len(devices) < count:
        raise TopologyError(f"{name}: JAX has started with {len(devices)} CPU devices already")
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    assumption = f"{memory / GIB:.1f} GiB of this machine, shared by {count}"
    return Hardware(name, "CPU", memory // count, assumption, devices)
