# mypy: disable-error-code="no-untyped-def"
# (the arguments of Triton functions are values of the kernel language, which have no Python type)
"""What the Triton kernels of this package share.

The kernels run on both vendors: no inline assembly, no CUDA-only feature; AMD's own launch options
are passed on HIP only, because Triton's CUDA backend refuses options that it does not know. Each
operator is a `torch.library.custom_op` that mutates nothing, so that torch.compile sees one opaque
call with known shapes; the launch happens inside, with the real strides.

Inputs are bfloat16, float16 or float32; sums, softmax and norms are float32. Products of float32
are full float32 ("ieee"), never TF32.
"""

from __future__ import annotations

from functools import cache

import torch
import triton
import triton.language as tl
from torch import Tensor

# A lower bound for logits that stays finite: the difference of two of them is 0, not NaN.
LOWEST = tl.constexpr(-1.0e30)
LOG2_E = 1.4426950408889634


@triton.jit
def load_rows(base, index, stride, live, width: tl.constexpr, block: tl.constexpr):
    """Rows `index` [R] of a matrix of `width` columns -> [R, block].

    Zero where `live` [R] is false and beyond `width`.
    """
    columns = tl.arange(0, block)
    keep = live[:, None]
    if width != block:
        keep = keep & (columns < width)[None, :]
    return tl.load(base + index[:, None] * stride + columns[None, :], mask=keep, other=0.0)


@triton.jit
def neighbours_on_one_die(place, count, dies: tl.constexpr):
    """Block number `place` of `count` -> its work, so that each die gets consecutive pieces.

    MI300X and MI350 deal blocks to their 8 dies in turn, and each die has an L2 of its own; AMD's
    workload tuning guide, "XCD": blocks that read the same belong on one die. A permutation.
    """
    die, turn = place % dies, place // dies
    more = count % dies  # so many dies get one piece more
    return die * (count // dies) + tl.minimum(die, more) + turn


@triton.jit
def gelu_tanh(x):
    """GELU in its tanh approximation, x float32: 0.5 (1 + tanh u) is the logistic of 2u."""
    inner = 1.5957691216057308 * x * (1.0 + 0.044715 * x * x)
    return x / (1.0 + tl.exp(-inner))


@triton.jit
def arrived_last(counter, others: tl.constexpr):
    """Count this block in; true for the last of 1 + `others`, which also resets the counter.

    The barrier puts every thread's stores before the atomic, whose release and acquire order them
    before what the last block reads.
    """
    tl.debug_barrier()
    last = tl.atomic_add(counter, 1, sem="acq_rel", scope="gpu") == others
    if last:
        tl.store(counter, 0)
    return last


@triton.jit
def prefetch_rows(base, row, stride, begin, span: tl.constexpr, size: tl.constexpr):
    """Ask for columns [begin, begin + span) of the rows in L2, `size` bytes an instruction.

    For what no earlier kernel of the stream writes (weights), or only to have it near: nothing is
    read here, so nothing stale can be. 128 bytes is the line prefetch, more the bulk one (sm90).
    """
    width: tl.constexpr = size * 8 // base.dtype.element_ty.primitive_bitwidth
    column = begin + tl.arange(0, span // width) * width
    place = (base + row[:, None] * stride + column[None, :]).to(tl.int64)
    if size == 128:
        tl.inline_asm_elementwise(
            "prefetch.global.L2 [$1]; mov.b32 $0, 0;", "=r,l", [place], dtype=tl.int32,
            is_pure=False, pack=1,
        )  # fmt: skip
    else:
        tl.inline_asm_elementwise(
            "cp.async.bulk.prefetch.L2.global [$1], $2; mov.b32 $0, 0;", "=r,l,r", [place, size],
            dtype=tl.int32, is_pure=False, pack=1,
        )  # fmt: skip


@triton.jit
def follow(dependent: tl.constexpr):
    """Wait for the kernels before this one, and let the next one start its blocks.

    Programmatic dependent launch (sm90; CUDA programming guide): with `dependent` the launch does
    not wait for its predecessor, so what comes before this line runs beside it, and must touch
    nothing that it writes. 1 lets the successor in after the wait, 2 before. Every block passes
    here before it reads or writes anything of others, so that waiting for a predecessor is waiting
    for all before it.
    """
    if dependent == 2:
        tl.inline_asm_elementwise(
            "griddepcontrol.launch_dependents; // $0", "=r", [], dtype=tl.int32, is_pure=False,
            pack=1,
        )  # fmt: skip
    if dependent:
        tl.inline_asm_elementwise(
            "griddepcontrol.wait; // $0", "=r", [], dtype=tl.int32, is_pure=False, pack=1
        )
    if dependent == 1:
        tl.inline_asm_elementwise(
            "griddepcontrol.launch_dependents; // $0", "=r", [], dtype=tl.int32, is_pure=False,
            pack=1,
        )  # fmt: skip


def can_follow(name: str) -> bool:
    """Whether the architecture has programmatic dependent launch: NVIDIA from sm90 on."""
    return name.startswith("sm") and int(name.removeprefix("sm")) >= 90


def arch(tensor: Tensor) -> str:
    """Key of the launch tables: sm90, gfx942, ...; cpu for the interpreter."""
    return _arch(tensor.device.index or 0) if tensor.is_cuda else "cpu"


def units(tensor: Tensor) -> int:
    """Compute units or multiprocessors of its GPU: 304 on MI300X, 256 on MI350, 132 on H100."""
    return _units(tensor.device.index or 0) if tensor.is_cuda else 1


@cache
def _units(index: int) -> int:
    return int(torch.cuda.get_device_properties(index).multi_processor_count)


@cache
def _arch(index: int) -> str:
    properties = torch.cuda.get_device_properties(index)
    if torch.version.hip is not None:
        return str(properties.gcnArchName).split(":")[0]
    return f"sm{properties.major}{properties.minor}"


COUNTERS = 4096


@cache
def _counters(device: torch.device) -> Tensor:
    return torch.zeros(COUNTERS, dtype=torch.int32, device=device)


def counters(device: torch.device, needed: int) -> Tensor:
    """Zeros [COUNTERS] int32 that kernels use with `arrived_last` and leave at zero.

    One set per device serves all launches, because kernels of one stream follow one another.
    Launches on several streams at the same time must use the two-kernel form instead.
    """
    if needed > COUNTERS:
        raise ValueError(f"{needed} counters are needed, there are {COUNTERS}")
    return _counters(device)


def unit_stride(tensor: Tensor) -> Tensor:
    """The tensor itself if its last axis is contiguous, else a copy."""
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()


def as_rows(tensor: Tensor) -> Tensor:
    """[..., W] -> [rows, W] with a contiguous last axis; copies only if it must."""
    return unit_stride(tensor.reshape(-1, tensor.shape[-1]))


def padded(width: int) -> int:
    """The next power of two, at least 16: the least that a matrix instruction takes."""
    return max(16, int(triton.next_power_of_2(width)))


def elementwise_warps(block: int) -> int:
    """Warps for a row of `block` elements: 8 elements a thread up to eight warps."""
    lanes = 32 if torch.version.hip is None else 64
    return max(1, min(8, block // (8 * lanes)))
