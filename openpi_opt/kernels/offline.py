"""Compiling the Triton kernels for GPUs that are absent, and what they then need of one.

The public functions run on CPU tensors while Triton's launch is replaced by taking note: what is
noted is what would have been launched on that architecture, with its launch parameters. Triton
compiles it without the GPU, without ROCm and without CUDA, but checks no limits; registers, shared
memory and what follows for occupancy are read from the result here.

Occupancy, AMD: ROCm's workload tuning guide for MI300X, "Triton kernel performance optimization".
Occupancy, NVIDIA: the CUDA C++ programming guide's table of compute capabilities.
"""

from __future__ import annotations

import json
import math
import re
import subprocess
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any, Literal
from unittest import mock

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction

_TYPES = {
    torch.bfloat16: "*bf16",
    torch.float16: "*fp16",
    torch.float32: "*fp32",
    torch.int32: "*i32",
    torch.int64: "*i64",
    torch.uint8: "*u8",
    torch.bool: "*i1",
}


@dataclass(frozen=True)
class Arch:
    """Limits of one compute unit (AMD) or multiprocessor (NVIDIA) that decide the occupancy.

    `waves` and `blocks` are the most at a time. `shared_bytes` is what it has, `shared_block_bytes`
    what one workgroup may take of it, `shared_reserved_bytes` what the system takes per workgroup.
    AMD's registers are per lane and SIMD, NVIDIA's per multiprocessor. `units` is how many of them
    the GPU has.
    """

    name: str
    target: GPUTarget
    vendor: Literal["amd", "nvidia"]
    registers: int
    waves: int
    shared_bytes: int
    shared_block_bytes: int
    shared_reserved_bytes: int = 0
    blocks: int = 32
    units: int = 132


_KIB = 1024


def _nvidia(number: int, warps: int, shared_kib: int, blocks: int = 32, units: int = 132) -> Arch:
    """Of a compute capability; a block may take all shared memory but 1 KiB, which is reserved."""
    return Arch(
        f"sm{number}", GPUTarget("cuda", number, 32), "nvidia", 65536, warps, shared_kib * _KIB,
        (shared_kib - 1) * _KIB, _KIB, blocks, units,
    )  # fmt: skip


def _amd(name: str, lds_kib: int, units: int) -> Arch:
    target, size = GPUTarget("hip", name, 64), lds_kib * _KIB
    return Arch(name, target, "amd", 512, 8, size, size, units=units)


_ALL = (
    _amd("gfx942", 64, 304),  # MI300X
    _amd("gfx950", 160, 256),  # MI350, MI355X
    _nvidia(80, 64, 164, units=108),  # A100
    _nvidia(89, 48, 100, 24, units=142),  # L4, L40, Ada RTX
    _nvidia(90, 64, 228),  # H100, H200
    _nvidia(100, 64, 228, units=148),  # B200
    _nvidia(120, 48, 100, 24, units=188),  # RTX 50, RTX PRO
)
ARCHS = {arch.name: arch for arch in _ALL}

_SIMDS = 4  # of a compute unit
_AMD_GRANULE = 8  # registers of a lane are given out in eights
_NVIDIA_GRANULE = 256  # registers of a warp
_NVIDIA_WARPS_TOGETHER = 4  # a block's warps are spread over the four partitions


@dataclass(frozen=True)
class Occupancy:
    """Waves (AMD: per SIMD; NVIDIA: warps per multiprocessor), of the most, and what limits it."""

    waves: float
    most: int
    limit: str


@dataclass(frozen=True)
class Resources:
    """What one compiled kernel takes.

    `registers` per thread; on AMD vector registers, accumulators included. `spilled` registers went
    to memory, `scratch_bytes` of it per thread. `fits`: a workgroup's shared memory (LDS) is
    within the limit; if not, the launch fails.
    """

    registers: int
    spilled: int
    scratch_bytes: int
    shared_bytes: int
    warps: int
    fits: bool
    occupancy: Occupancy


@dataclass(frozen=True)
class Variant:
    """A kernel as one call would launch it: types, compile-time values, alignment, options."""

    kernel: JITFunction
    signature: Mapping[str, str]
    constants: Mapping[str, Any]
    attributes: Mapping[tuple[int, ...], Any]
    options: Mapping[str, Any]
    blocks: int
    """of the grid; no part of what is compiled"""

    @property
    def name(self) -> str:
        """Module and name of the Triton function: `decode._split`."""
        module = self.kernel.fn.__module__.rpartition(".")[2].removeprefix("triton_")
        return f"{module}.{self.kernel.__name__}"

    @property
    def key(self) -> str:
        """Equal for equal compilations."""
        parts = (self.signature, self.constants, sorted(self.attributes), self.options)
        return f"{self.name} {json.dumps(parts, sort_keys=True, default=str)}"

    def compile(self, arch: Arch) -> Any:
        """Triton's compiled kernel, with `asm` and `metadata`."""
        source = ASTSource(
            self.kernel, dict(self.signature), dict(self.constants), dict(self.attributes)
        )
        return triton.compile(source, target=arch.target, options=dict(self.options))


@contextmanager
def noted_launches(arch: Arch, modules: Iterable[ModuleType]) -> Iterator[list[Variant]]:
    """Within, a launch of `modules` only adds what `arch` would have run to the list."""
    noted: list[Variant] = []

    def launch(kernel: JITFunction, *args: Any, **kwargs: Any) -> None:
        grid = kwargs.pop("grid")
        kwargs.pop("warmup")
        noted.append(_variant(kernel, args, kwargs, math.prod(grid)))

    with ExitStack() as stack:
        hip = "7.0" if arch.vendor == "amd" else None
        stack.enter_context(mock.patch.object(torch.version, "hip", hip))
        stack.enter_context(mock.patch.object(JITFunction, "run", launch))
        for module in modules:
            for name, value in (("arch", arch.name), ("units", arch.units)):
                if hasattr(module, name):
                    stack.enter_context(mock.patch.object(module, name, return_value=value))
        yield noted


def variants(
    call: Callable[[], object], arch: Arch, modules: Iterable[ModuleType]
) -> list[Variant]:
    """What `call` would launch on `arch`, each compilation once, in the order of the launches."""
    with noted_launches(arch, modules) as noted:
        call()
    return list({variant.key: variant for variant in noted}.values())


def resources(compiled: Any, arch: Arch) -> Resources:
    """What a compiled kernel takes of a GPU of `arch`."""
    shared, warps = int(compiled.metadata.shared), int(compiled.metadata.num_warps)
    if arch.vendor == "amd":
        text = compiled.asm["amdgcn"]
        registers = _number("vgpr_count", text)
        spilled, scratch = (
            _number("vgpr_spill_count", text),
            _number("private_segment_fixed_size", text),
        )
        occupancy = amd_occupancy(registers, shared, warps, arch)
    else:
        usage = _cubin_usage(compiled.asm["cubin"])
        registers, scratch = usage["REG"], usage["STACK"] + usage["LOCAL"]
        spilled = scratch // 4
        occupancy = nvidia_occupancy(registers, shared, warps, arch)
    fits = shared <= arch.shared_block_bytes
    return Resources(registers, spilled, scratch, shared, warps, fits, occupancy)


def amd_occupancy(registers: int, shared_bytes: int, warps: int, arch: Arch) -> Occupancy:
    """Waves per SIMD by the guide: min(floor(by_registers * 4 / warps), by_lds) * warps / 4.

    by_registers are the waves whose registers fit into a SIMD's 512 (in steps of 8, at most 8
    waves), by_lds the workgroups whose LDS fits into a compute unit's.
    """
    granted = max(-(-registers // _AMD_GRANULE) * _AMD_GRANULE, _AMD_GRANULE)
    by_registers = min(arch.registers // granted, arch.waves) * _SIMDS // warps
    by_shared = arch.shared_bytes // shared_bytes if shared_bytes else by_registers
    groups = min(by_registers, by_shared)
    limit = "LDS" if by_shared < by_registers else "registers"
    waves = groups * warps / _SIMDS
    if waves == arch.waves:
        limit = "none"
    return Occupancy(waves, arch.waves, limit)


def nvidia_occupancy(registers: int, shared_bytes: int, warps: int, arch: Arch) -> Occupancy:
    """Warps per multiprocessor: the blocks whose registers, shared memory and warps fit."""
    of_a_warp = -(-max(registers, 1) * 32 // _NVIDIA_GRANULE) * _NVIDIA_GRANULE
    fitting = arch.registers // of_a_warp // _NVIDIA_WARPS_TOGETHER * _NVIDIA_WARPS_TOGETHER
    bounds = {
        "registers": fitting // warps,
        "shared memory": arch.shared_bytes // (shared_bytes + arch.shared_reserved_bytes),
        "blocks": arch.blocks,
        "none": arch.waves // warps,
    }
    blocks = min(bounds.values())
    # With a tie for the most that there can be, nothing limits.
    limit = "none" if bounds["none"] == blocks else min(bounds, key=lambda name: bounds[name])
    return Occupancy(float(blocks * warps), arch.waves, limit)


def _variant(
    kernel: JITFunction, args: tuple[Any, ...], kwargs: Mapping[str, Any], blocks: int
) -> Variant:
    """As Triton specialises a launch: constants, ones and multiples of 16 are compiled in."""
    names = [parameter.name for parameter in kernel.params]
    values = dict(zip(names, args, strict=False)) | {k: v for k, v in kwargs.items() if k in names}
    options = {k: v for k, v in kwargs.items() if k not in names}
    signature: dict[str, str] = {}
    constants: dict[str, Any] = {}
    attributes: dict[tuple[int, ...], Any] = {}
    for index, parameter in enumerate(kernel.params):
        value = values[parameter.name]
        kind = _kind(value, parameter.is_constexpr)
        signature[parameter.name] = kind
        if kind == "constexpr":
            constants[parameter.name] = value
        elif isinstance(value, Tensor) or (kind == "i32" and value % 16 == 0):
            attributes[(index,)] = [["tt.divisibility", 16]]
    return Variant(kernel, signature, constants, attributes, options, blocks)


def _kind(value: Any, constexpr: bool) -> str:
    if constexpr or value is None or (type(value) is int and value == 1):
        return "constexpr"
    if isinstance(value, Tensor):
        return _TYPES[value.dtype]
    return "fp32" if isinstance(value, float) else "i32"


def _number(field: str, text: str) -> int:
    found = re.search(rf"\.{field}:\s*(\d+)", text)
    if not found:
        raise ValueError(f"the compiler's output has no {field}")
    return int(found[1])


def _cubin_usage(cubin: bytes) -> dict[str, int]:
    """`REG`, `STACK` and `LOCAL` of a cubin, by the cuobjdump that Triton brings."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "kernel.cubin"
        file.write_bytes(cubin)
        command = [triton.knobs.nvidia.cuobjdump.path, "--dump-resource-usage", str(file)]
        text = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    found = {name: int(value) for name, value in re.findall(r"\b([A-Z]+):(\d+)", text)}
    if not {"REG", "STACK", "LOCAL"} <= set(found):
        raise ValueError(f"cuobjdump does not say what the kernel takes: {text!r}")
    return found
