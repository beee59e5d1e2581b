"""Kernel sequences like those of a Pi0 inference, and the traces that recorders make of them.

A `Scene` knows the stage of each kernel. It is written as torch.profiler writes an uncaptured call
(markers, launches, kernels), as it writes a replay (one launch, no markers), and as rocprof's
kernels look after conversion (nothing but kernels).
"""

from __future__ import annotations

import gzip
import json
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

Event = dict[str, Any]
Kernel = tuple[str, str, float]  # stage, name, microseconds

HOST = {"ph": "X", "pid": 100, "tid": 100}
GAP_US = 2.0


def vision_layer() -> list[tuple[str, float]]:
    return [
        ("triton_per_fused_add_native_layer_norm_3", 4.0),
        ("Cijk_Alik_Bljk_BBS_BH_MT96x128x64", 17.0),
        ("attn_fwd", 23.0),
        ("Cijk_Alik_Bljk_BBS_BH_MT64x64x64", 12.0),
        ("triton_red_fused_add_native_layer_norm_4", 4.0),
        ("Cijk_Alik_Bljk_BBS_BH_MT128x128x64", 19.0),
        ("triton_poi_fused_gelu_5", 5.0),
        ("Cijk_Alik_Bljk_BBS_BH_MT64x64x128", 30.0),
    ]


def gemma_layer(tile: str, slow: float = 1.0) -> list[tuple[str, float]]:
    return [
        ("triton_red_fused_add_mean_mul_pow_rsqrt_0", 4.0),
        (f"Cijk_Alik_Bljk_BBS_BH_{tile}x64", 8.0 * slow),
        ("triton_poi_fused_add_cat_mul_neg_slice_1", 4.0),
        ("triton_poi_fused_cat_transpose_2", 4.0),
        (f"FmhaFwdKernel_{tile}", 7.0 * slow),
        (f"Cijk_Alik_Bljk_BBS_BH_{tile}x128", 7.0 * slow),
        ("triton_per_fused_add_mean_mul_pow_rsqrt_3", 4.0),
        (f"Cijk_Alik_Bljk_BBS_BH_{tile}x256", 9.0 * slow),
        (f"triton_poi_fused_gelu_mul_4_{tile}", 4.0 * slow),
        (f"Cijk_Alik_Bljk_BBS_BH_{tile}x512", 10.0 * slow),
        (f"triton_poi_fused_add_{tile}", 4.0),
    ]


def eager_layer(tile: str, slow: float = 1.0) -> list[tuple[str, float]]:
    """Plain PyTorch: attention written out, each norm a handful of kernels."""
    add = "void at::native::vectorized_elementwise_kernel<4, at::native::CUDAFunctor_add<float>>"
    mean = "void at::native::reduce_kernel<512, 1, at::native::ReduceOp<float, MeanOps>>"
    soft = "void (anonymous namespace)::softmax_warp_forward<float, float, 10>"
    copy = "void at::native::elementwise_kernel<128, 4, direct_copy_kernel_cuda>"
    norm = [(add, 2.0), (mean, 3.0), (add, 2.0), (add, 2.0), (copy, 2.0)]
    gemm = [(f"nvjet_tst_{tile}_{i}", 8.0 * slow) for i in range(9)]
    rope = [(add, 2.0), (add, 2.0), (copy, 2.0)] * 2
    return [
        *norm, *gemm[:3], *rope, gemm[3], (add, 2.0), (soft, 3.0), gemm[4], (copy, 2.0), gemm[5],
        (add, 2.0), *norm, gemm[6], ("void gelu_kernel", 3.0), gemm[7], (add, 2.0), gemm[8],
        (add, 2.0),
    ]  # fmt: skip


def fused_layer() -> list[tuple[str, float]]:
    return [
        ("_skinny_linear_kernel_gemm", 6.0),
        ("_rotary_kernel", 2.0),
        ("_decode_attention_kernel", 6.0),
        ("_skinny_linear_kernel_gemm", 5.0),
        ("_skinny_gelu_mul_kernel_gemm", 6.0),
        ("_skinny_linear_kernel_gemm", 6.0),
        ("_reduce_kernel_fill", 2.0),
    ]


@dataclass
class Scene:
    """Kernels in order; `marks` are (stage, first kernel, behind the last kernel)."""

    kernels: list[Kernel] = field(default_factory=list)
    marks: list[tuple[str, int, int]] = field(default_factory=list)
    begins: list[int] = field(default_factory=list)

    def add(self, stage: str, kernels: Iterable[tuple[str, float]]) -> None:
        begin = len(self.kernels)
        self.kernels += [(stage, name, us) for name, us in kernels]
        self.marks.append((stage, begin, len(self.kernels)))

    def launches(self) -> Counter[str]:
        return Counter(stage for stage, _, _ in self.kernels)

    def ms(self) -> dict[str, float]:
        total: dict[str, float] = {}
        for stage, _, us in self.kernels:
            total[stage] = total.get(stage, 0.0) + us / 1e3
        return total

    def repeated(self, times: int) -> Scene:
        """Several inferences, the device resting between them."""
        many = Scene()
        for _ in range(times):
            offset = len(many.kernels)
            many.begins.append(offset)
            many.kernels += self.kernels
            many.marks += [(s, b + offset, e + offset) for s, b, e in self.marks]
        return many

    def first(self, count: int) -> Scene:
        return Scene(self.kernels[:count])


def scene(
    *,
    cameras: int = 1,
    kind: str = "compiled",
    steps: int = 10,
    state_once: bool = False,
    short_last: bool = False,
    odd_first: bool = False,
    every_third: int = 0,
) -> Scene:
    """One inference: `cameras` passes of 27 layers, 18 of prefill, `steps` of 18 layers.

    Of the first `every_third` layers of each step but the first, every third has a kernel more, as
    in a trace of Pi0.5.
    """
    made = Scene()
    prefill, expert = {
        "compiled": (gemma_layer("MT256x256"), gemma_layer("MT16x16")),
        "eager": (eager_layer("256x128", 5.0), eager_layer("64x8")),
        "same_kernels": (eager_layer("64x8", 8.0), eager_layer("64x8")),
        "fused": (gemma_layer("MT256x256"), fused_layer()),
    }[kind]
    patches = [("triton_poi_fused_cat_convolution_0", 4.0), ("Im2d2Col_v2", 28.0)]
    layer = vision_layer()
    first = [*layer[:5], ("triton_poi_fused_cat_6", 3.0), *layer[5:]] if odd_first else layer
    tower = [*first, *layer * 26, layer[0], ("Cijk_Alik_Bljk_BBS_BH_MT64x96x64", 14.0)]
    made.add("vision", [*patches, *tower] * cameras)
    masks = [("triton_poi_fused_cat_embedding_mul_7", 4.0), ("triton_red_fused_cumsum_8", 4.0)]
    last = prefill[:6] if short_last else prefill
    made.add("prefill", [*masks, *prefill * 17, *last])
    into = [("Cijk_Ailk_S_MT16x16x64", 5.0), ("triton_poi_fused_addmm_silu_9", 4.0)]
    if state_once:
        made.add("prefill", [("Cijk_Ailk_S_MT16x16x64", 5.0), *expert * 18])
    out = [("triton_poi_fused_mul_slice_10", 4.0), ("Cijk_S_MT32x16x64", 9.0)]
    thirds = every_third // 3
    odd = [*expert * 2, *expert, ("triton_poi_fused_mul_11", 3.0)]
    for step in range(steps):
        parts = odd * (thirds if step else 0)
        plain = 18 - (3 * thirds if step else 0)
        made.add("denoise", [*into, *parts, *expert * plain, *out])
    return made


def timed(made: Scene) -> list[tuple[float, Kernel]]:
    """The kernels with their start: `GAP_US` apart, 500 us between inferences."""
    at, listed = 1000.0, []
    for i, kernel in enumerate(made.kernels):
        at += 500.0 if i and i in made.begins else 0.0
        listed.append((round(at, 3), kernel))
        at += kernel[2] + GAP_US
    return listed


def rocprof(made: Scene, category: str = "gpu") -> list[Event]:
    suffix = ".kd" if category == "gpu" else ""
    return [
        {"ph": "X", "cat": category, "name": name + suffix, "pid": 0, "tid": 0, "ts": at, "dur": us}
        for at, (_, name, us) in timed(made)
    ]


def device(i: int, at: float, name: str, us: float, correlation: int) -> Event:
    args = {"device": 0, "stream": 7, "correlation": correlation, "External id": i}
    return {
        "ph": "X", "cat": "kernel", "pid": 0, "tid": 7, "name": name, "ts": at, "dur": us,
        "args": args,
    }  # fmt: skip


def runtime(name: str, at: float, correlation: int) -> Event:
    args = {"correlation": correlation}
    return {**HOST, "cat": "cuda_runtime", "name": name, "ts": at, "dur": 0.5, "args": args}


def uncaptured(made: Scene) -> list[Event]:
    """The host launches kernel i at i + 1 us, long before the device has it, inside its marker."""
    events: list[Event] = [{"ph": "M", "name": "process_name", "pid": 100, "args": {"name": "py"}}]
    for stage, begin, end in made.marks:
        events.append({
            **HOST, "cat": "user_annotation", "name": f"openpi_opt::{stage}",
            "ts": begin + 0.75, "dur": end - begin - 0.25,
        })  # fmt: skip
    for i, (at, (_, name, us)) in enumerate(timed(made)):
        events.append(runtime("hipLaunchKernel", i + 1.0, i))
        events.append(device(i, at + len(made.kernels), name, us, i))
    return events


def replay(made: Scene) -> list[Event]:
    launch = runtime("hipGraphLaunch", 1.0, 5)
    return [launch, *(device(0, at, name, us, 5) for at, (_, name, us) in timed(made))]


def write(path: Path, events: Iterable[Event], bare: bool = False) -> Path:
    """Write a trace: packed if the name ends in .gz, a list without anything around if `bare`."""
    listed = list(events)
    document = listed if bare else {"schemaVersion": 1, "traceEvents": listed, "traceName": "t"}
    text = json.dumps(document).encode()
    path.write_bytes(gzip.compress(text) if path.suffix == ".gz" else text)
    return path
