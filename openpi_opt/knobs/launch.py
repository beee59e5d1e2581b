"""Launch parameters of the own Triton kernels as options: what a search may choose from.

The fields are those of `openpi_opt.kernels.launch.Launch` that a kernel reads; null takes the
kernel's table. What cannot fit a processor is refused before a process is started: shared memory
by formulas that were read off compiled kernels (`openpi_opt.kernels.offline`, Triton 3.6, gfx942
and sm90), in which what is left to the table counts as the least there is.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from openpi_opt.knobs.base import Configuration, Options

if TYPE_CHECKING:
    from openpi_opt.machine import Machine

# The products of a fused layer of the action expert, and the features that each sums over in the
# full models (pi0, pi05): `openpi_opt.surgery.expert.LINEARS`.
LINEARS = {"qkv": 1024, "out": 2048, "gate_up": 1024, "down": 4096}
# These have a norm or GELU(gate) * up around them and need the whole sum in one block.
_UNSPLIT = ("qkv", "gate_up")
# Columns of a head as the attention of the full models holds them (`triton_attention.tiles`).
_HEAD = {"vision": 80, "prefill": 256, "denoise": 256}
# KiB of shared memory that a block can have: NVIDIA's CUDA programming guide (compute
# capabilities), AMD's CDNA 3 and CDNA 4 guides.
_SHARED_KIB = {"sm80": 163, "sm86": 99, "sm89": 99, "sm90": 227, "sm100": 227, "sm120": 99}
_SHARED_KIB |= {"gfx942": 64, "gfx950": 160}
_REGISTERS = 200  # of 255 a thread, for the sums alone
_BYTES = 2  # of a number, unless something else is said


class LinearLaunch(Options):
    """Launch parameters of one product of a fused expert layer.

    `block_n` features a block, `block_k` inputs a tile, `split_k` blocks that share a sum, `fused`
    1: the last of them adds the parts, 0: a second kernel does. `prefetch` bytes an instruction
    asks for ahead, `dependent` 1 or 2: starts beside the kernel before (NVIDIA from sm90 on).
    `waves_per_eu` and `matrix_instr_nonkdim` are AMD's.
    """

    block_n: Literal[16, 32, 64, 128] | None = None
    block_k: Literal[32, 64, 128, 256, 512, 1024] | None = None
    split_k: Literal[1, 2, 4, 8, 16] | None = None
    num_warps: Literal[1, 2, 4, 8] | None = None
    num_stages: Literal[1, 2, 3, 4, 5, 6] | None = None
    fused: Literal[0, 1] | None = None
    prefetch: Literal[0, 128, 256, 512] | None = None
    dependent: Literal[0, 1, 2] | None = None
    waves_per_eu: Literal[0, 1, 2, 3, 4] | None = None
    matrix_instr_nonkdim: Literal[0, 16, 32] | None = None

    def canonical(self, name: str, device: str) -> LinearLaunch:
        """Without what the product `name` does not read on `device`."""
        idle = {"fused"} if self.split_k == 1 else set()
        if name in _UNSPLIT:
            idle = {"split_k", "fused"}
        if device != "cuda":
            idle |= {"prefetch", "dependent"}
        if device != "rocm":
            idle |= {"waves_per_eu", "matrix_instr_nonkdim"}
        return self.model_copy(update=dict.fromkeys(idle))

    def problem(self, name: str, rows: int, arch: str) -> str | None:
        """Why the product `name` of so many rows cannot have these parameters, or None."""
        parts = 2 if name == "gate_up" else 1
        padded = next(size for size in (16, 32, 64) if rows <= size)
        block_n, block_k = self.block_n or 16, self.block_k or 32
        stages, warps = self.num_stages or 1, self.num_warps or 8
        # The tile in use stays in shared memory only where an instruction reads it there (wgmma).
        whole = padded == 64 and (self.num_warps or 0) >= 4 and arch == "sm90"
        tiles = max(stages if whole else stages - 1, 1)
        shared = (block_n * parts + padded) * block_k * _BYTES * tiles
        if (problem := _too_large(shared, arch)) is not None:
            return problem
        if block_n * parts * padded / (_lanes(arch) * warps) > _REGISTERS:
            return (
                f"holds more than {_REGISTERS} sums a thread; use more warps or a smaller block_n"
            )
        if block_k * (self.split_k or 1) > LINEARS[name]:
            return f"splits {LINEARS[name]} inputs below its tiles; lower block_k or split_k"
        return None


class AttentionLaunch(Options):
    """Launch parameters of the own attention kernel of a stage.

    `block_m` (token, head) pairs and `block_n` keys a tile. `blocks` (tiles of keys that one block
    sums) and `fused` (1: the last block adds the splits, 0: a second kernel does) belong to the
    kernel of the denoising steps; `waves_per_eu`, `matrix_instr_nonkdim` and `dies` to AMD. `dies`,
    of the other stages: 8, blocks of one head run on one die of an MI300 and find its keys in that
    die's L2; 1, as the hardware deals them.
    """

    block_m: Literal[16, 32, 64, 128, 256] | None = None
    block_n: Literal[16, 32, 64, 128, 256] | None = None
    blocks: Literal[1, 2, 3, 4, 6, 8, 16] | None = None
    num_warps: Literal[1, 2, 4, 8, 16] | None = None
    num_stages: Literal[1, 2, 3, 4, 5, 6] | None = None
    fused: Literal[0, 1] | None = None
    dies: Literal[1, 8] | None = None
    waves_per_eu: Literal[0, 1, 2, 3, 4, 8] | None = None
    matrix_instr_nonkdim: Literal[0, 4, 16, 32] | None = None

    def canonical(self, stage: str, device: str) -> AttentionLaunch:
        """Without what the kernel of `stage` on `device` does not read."""
        idle = {"dies"} if stage == "denoise" else {"blocks", "fused"}
        if stage == "denoise" and self.blocks == 1:  # nothing to fetch ahead
            idle.add("num_stages")
        if device != "rocm":
            idle |= {"dies", "waves_per_eu", "matrix_instr_nonkdim"}
        return self.model_copy(update=dict.fromkeys(idle))

    def problem(self, stage: str, arch: str, size: int = _BYTES) -> str | None:
        """Why the kernel of `stage` cannot have these parameters for numbers of `size` bytes."""
        width, stages = _HEAD[stage], self.num_stages or 1
        block_m, block_n = self.block_m or 16, self.block_n or 16
        keys = block_n * width * size  # a tile of keys, or of values
        ahead = stages > 1 and (stage != "denoise" or (self.blocks or 1) > 1)
        if arch.startswith("gfx"):
            tiles = 1 if not ahead else stages - 0.5 if stage == "denoise" else 2 * stages - 2
            shared = keys * tiles
        elif stage == "denoise":
            shared = keys * (2 * stages - 1 if ahead else 2)
        else:
            shared = keys * (2 * stages if ahead else 1) + block_m * width * size
        if (problem := _too_large(shared, arch)) is not None:
            return problem
        sums = block_m * (width + block_n) / (_lanes(arch) * (self.num_warps or 8))
        if stage != "denoise" and sums > _REGISTERS:
            return f"holds {sums:.0f} sums a thread; use more warps or smaller blocks"
        return None


def arch_of(cfg: Configuration, machine: Machine) -> str:
    """The architecture that `cfg` runs on; empty where there is no such GPU."""
    device = cfg.platform.device
    if device == "auto" or not machine.gpus_for(device):
        return ""
    return machine.gpu(device, cfg.platform.gpu).arch


def _too_large(shared: float, arch: str) -> str | None:
    limit = _SHARED_KIB.get(arch)
    if limit is None or shared <= limit * 1024:
        return None
    return f"needs {shared / 1024:.0f} KiB of shared memory, and {arch} has {limit} a block"


def _lanes(arch: str) -> int:
    return 64 if arch.startswith("gfx9") else 32
