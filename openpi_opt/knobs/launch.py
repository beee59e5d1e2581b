"""Launch parameters of the own Triton kernels as options: what a search may choose from.

The fields are those of `openpi_opt.kernels.launch.Launch` that a kernel reads; null takes the
kernel's table. What cannot fit a processor is refused before a process is started.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

from openpi_opt.knobs.base import Options

# The products of a fused layer of the action expert, and the features that each sums over in the
# full models (pi0, pi05): `openpi_opt.surgery.expert.LINEARS`.
LINEARS = {"qkv": 1024, "out": 2048, "gate_up": 1024, "down": 4096}
# These have a norm or GELU(gate) * up around them and need the whole sum in one block.
_UNSPLIT = ("qkv", "gate_up")
# KiB of shared memory that a block can have: NVIDIA's CUDA programming guide (compute
# capabilities), AMD's CDNA 3 and CDNA 4 guides.
_SHARED_KIB = {"sm80": 163, "sm86": 99, "sm89": 99, "sm90": 227, "sm100": 227, "sm120": 99}
_SHARED_KIB |= {"gfx942": 64, "gfx950": 160}
_REGISTERS = 200  # of 255 a thread, for the sums alone


class LinearLaunch(Options):
    """Launch parameters of one product of a fused expert layer.

    `block_n` features a block, `block_k` inputs a tile, `split_k` blocks that share a sum, `fused`
    1: the last of them adds the parts, 0: a second kernel does. `prefetch` bytes an instruction
    asks for ahead, `dependent` 1: starts beside the kernel before (NVIDIA from sm90 on).
    `waves_per_eu` and `matrix_instr_nonkdim` are AMD's.
    """

    block_n: Literal[16, 32, 64, 128] | None = None
    block_k: Literal[32, 64, 128, 256, 512, 1024] | None = None
    split_k: Literal[1, 2, 4, 8, 16] | None = None
    num_warps: Literal[1, 2, 4, 8] | None = None
    num_stages: Literal[1, 2, 3, 4, 5, 6] | None = None
    fused: Literal[0, 1] | None = None
    prefetch: Literal[0, 128, 256, 512] | None = None
    dependent: Literal[0, 1] | None = None
    waves_per_eu: Literal[0, 1, 2, 3, 4] | None = None
    matrix_instr_nonkdim: Literal[0, 16, 32] | None = None

    def given(self) -> dict[str, int]:
        """The parameters that are not left to the table."""
        return {name: value for name, value in self.model_dump().items() if value is not None}

    def canonical(self, name: str, device: str) -> LinearLaunch:
        """Without what the product `name` does not read on `device`."""
        idle = {"split_k", "fused"} if name in _UNSPLIT or self.split_k == 1 else set()
        idle -= {"split_k"} if name not in _UNSPLIT else set()
        if device != "cuda":
            idle |= {"prefetch", "dependent"}
        if device != "rocm":
            idle |= {"waves_per_eu", "matrix_instr_nonkdim"}
        return self.model_copy(update=dict.fromkeys(idle))

    def problem(self, name: str, rows: int, arch: str) -> str | None:
        """Why the product `name` of so many rows cannot have these parameters, or None.

        What is left to the table counts as the least there is.
        """
        parts = 2 if name == "gate_up" else 1
        padded = next(size for size in (16, 32, 64) if rows <= size)
        block_n, block_k = self.block_n or 16, self.block_k or 32
        stages, warps = self.num_stages or 1, self.num_warps or 8
        shared = (block_n * parts + padded) * block_k * 2 * stages / 1024
        limit = _SHARED_KIB.get(arch)
        if limit is not None and shared > limit:
            return f"needs {shared:.0f} KiB of shared memory, and {arch} has {limit} a block"
        if block_n * parts * padded / (32 * warps) > _REGISTERS:
            return (
                f"holds more than {_REGISTERS} sums a thread; use more warps or a smaller block_n"
            )
        if block_k * (self.split_k or 1) > LINEARS[name]:
            return f"splits {LINEARS[name]} inputs below its tiles; lower block_k or split_k"
        return None


def linears_problem(launches: Mapping[str, LinearLaunch], rows: int, arch: str) -> str | None:
    """The first of the products that cannot have its launch parameters, with the reason."""
    for name, launch in launches.items():
        found = launch.problem(name, rows, arch) if launch.given() else None
        if found is not None:
            return f"gemm.launch_{name} {found}"
    return None
