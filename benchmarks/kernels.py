"""Sweep the launch parameters of the Triton kernels on one GPU, beside what torch does.

    python -m benchmarks.kernels --out kernels.json [--seconds 170] [--only decode,skinny]

Each call is timed in a captured graph that walks over several sets of tensors, more than 100 MB in
all, so that weights come from device memory as they do in the model. A parameter set whose result
is wrong is never the best one. The last lines are the tables' entries for this GPU, to paste.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import random
import time
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ProcessPoolExecutor, wait
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
import triton
from torch import Tensor

from openpi_opt.kernels import (
    triton_activation,
    triton_attention,
    triton_decode,
    triton_norm,
    triton_rotary,
    triton_skinny_gemm,
)
from openpi_opt.kernels.triton_common import arch, encoded, padded
from openpi_opt.pi0 import ops

PEAK_GB_S = 3000.0  # copy rate of an H100, bytes read and written
ROTATED_BYTES = 120e6
MAX_SETS = 150
TOLERANCE = 1e-2
EPS = 1e-6
SHARED_BYTES = 220_000

# What a launch may be refused with; everything else is an error of the benchmark.
REFUSED = (
    triton.runtime.errors.OutOfResources,
    triton.runtime.errors.PTXASError,
    triton.CompilationError,
)

Tensors = tuple[Tensor, ...]
Run = Callable[..., Any]


@dataclass
class Case:
    """One kernel at one shape: how to run it with parameters, its rival, its reference."""

    name: str
    make: Callable[[int], Tensors]
    """seed -> the arguments of one set"""
    ours: Callable[[Mapping[str, int]], Run]
    rival: Run
    expected: Run
    bytes_moved: int
    launches: list[dict[str, int]] = field(default_factory=lambda: [{}])
    entry: str | None = None
    """format of the table entry, filled with the best parameters"""
    hot: bool = False
    """whether the tensors may stay in the cache between calls"""


def randn(*shape: int, seed: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """Normal numbers from a seed, on the GPU."""
    generator = torch.Generator("cuda").manual_seed(seed)
    return torch.randn(*shape, generator=generator, device="cuda").to(dtype)


def microseconds(run: Run, sets: list[Tensors]) -> float:
    """Median time of one call within a captured graph over all sets."""

    def once() -> None:
        for arguments in sets:
            run(*arguments)

    with torch.no_grad():
        ms: float = triton.testing.do_bench_cudagraph(once, rep=6, return_mode="median")
    return ms * 1000 / len(sets)


def relative_error(actual: Any, expected: Any) -> float:
    """The largest relative L2 error of the results."""
    pairs = (
        [(actual, expected)]
        if isinstance(actual, Tensor)
        else list(zip(actual, expected, strict=True))
    )
    errors = [(a.double() - e.double()).norm() / e.double().norm() for a, e in pairs]
    return max(float(error) for error in errors)


def weight_sets(case: Case) -> list[Tensors]:
    """So many sets of arguments that their tensors do not stay in the cache."""
    first = case.make(0)
    size = sum(t.numel() * t.element_size() for t in first)
    # Activations come from the cache in the model, so they do here.
    count = 4 if case.hot else max(2, min(MAX_SETS, int(ROTATED_BYTES / size) + 1))
    return [first, *(case.make(seed) for seed in range(1, count))]


def measure(case: Case, deadline: float) -> dict[str, Any]:
    """Time the rival, then launches until the deadline; the first is always tried."""
    sets = weight_sets(case)
    expected = case.expected(*sets[0])
    rival_us = microseconds(case.rival, sets)
    tried: list[dict[str, Any]] = []
    for launch in case.launches:
        if tried and time.monotonic() > deadline:
            break
        tried.append({"launch": launch, **_attempt(case.ours(launch), sets, expected)})
    good = [t for t in tried if t.get("error", 1.0) < TOLERANCE]
    best = min(good, key=lambda t: t["us"]) if good else None
    torch.cuda.empty_cache()
    return {
        "name": case.name, "rival_us": rival_us, "best": best,
        "tried": tried, "possible": len(case.launches), "bytes": case.bytes_moved,
        "sets": len(sets),
    }  # fmt: skip


def _attempt(run: Run, sets: list[Tensors], expected: Any) -> dict[str, Any]:
    try:
        error = relative_error(run(*sets[0]), expected)
    except REFUSED as failure:
        return {"failed": f"{type(failure).__name__}: {failure}"[:200]}
    return {"us": microseconds(run, sets), "error": error}


def compile_ahead(work: list[tuple[int, int]]) -> int:
    """Run in a worker: fill Triton's cache on disk with (case, launch) pairs; -> how many."""
    everything, done = cases(), 0
    for index, number in work:
        case = everything[index]
        try:
            case.ours(case.launches[number])(*case.make(0))
            done += 1
        except REFUSED:  # the sweep meets it again and reports it
            continue
    return done


def compile_all(chosen: list[int], seconds: float) -> str:
    """Compile in parallel; measuring alone then takes a quarter of a second a launch."""
    started, everything = time.monotonic(), cases()
    work = [(i, n) for i in chosen for n in range(len(everything[i].launches))]
    workers = max(1, min(12, (os.cpu_count() or 2) - 2, len(work)))
    parts = [work[i :: 4 * workers] for i in range(4 * workers)]
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(workers, mp_context=context)
    futures = [pool.submit(compile_ahead, part) for part in parts if part]
    finished = wait(futures, timeout=seconds).done
    pool.shutdown(wait=True, cancel_futures=True)
    failed = [f for f in finished if not f.cancelled() and f.exception() is not None]
    took = time.monotonic() - started
    return f"compiled ahead: {len(work)} launches, {workers} workers, {took:.0f} s, " + (
        f"{len(failed)} parts failed: {failed[0].exception()}" if failed else "no part failed"
    )


def grid(**axes: Iterable[int]) -> list[dict[str, int]]:
    """Every combination of the axes' values."""
    return [dict(zip(axes, values, strict=True)) for values in product(*axes.values())]


def skinny_launches(
    n: int, k: int, gated: bool, whole: bool, rows: int, most: int
) -> list[dict[str, int]]:
    """Parameter sets that give 60 to 700 blocks, fit shared memory and leave work to pipeline.

    A seeded sample of `most` of them, since all would be a hundred a shape.
    """
    splits = (1,) if gated or whole else (1, 2, 4, 8, 16)
    found = []
    axes = grid(block_n=(16, 32, 64, 128), block_k=(64, 128, 256, 512), split_k=splits)
    for entry, (warps, stages) in product(axes, ((4, 3), (4, 5), (2, 4), (8, 4))):
        tile = (entry["block_n"] * (2 if gated else 1) + padded(rows)) * entry["block_k"] * 2
        blocks = n // entry["block_n"] * entry["split_k"]
        steps = k // entry["split_k"] // entry["block_k"]
        flight = tile * min(stages - 1, steps)
        if not (60 <= blocks <= 700 and steps >= 1 and stages <= steps + 2):
            continue
        if flight >= 12_000 and tile * (stages - 1) <= SHARED_BYTES and tile >= warps * 2048:
            found.append({**entry, "num_warps": warps, "num_stages": stages})
    return sample(found, most)


def sample(found: list[dict[str, int]], most: int) -> list[dict[str, int]]:
    """`most` of them, the same ones each time, in a random order."""
    return random.Random(0).sample(found, min(most, len(found)))


def skinny(rows: int, n: int, k: int, most: int, normed: bool = False) -> Case:
    """A linear layer; the rival is cuBLAS, with `normed` after a norm."""

    def make(seed: int) -> Tensors:
        return randn(1, rows, k, seed=seed), randn(n, k, seed=seed + 1) * k**-0.5

    def ours(launch: Mapping[str, int]) -> Run:
        code = encoded(triton_skinny_gemm.Launch, launch)
        eps = EPS if normed else None
        return lambda x, w: triton_skinny_gemm.skinny_linear(x, w, None, None, None, eps, code)

    def rival(x: Tensor, w: Tensor) -> Tensor:
        return F.linear(F.rms_norm(x, (k,), eps=EPS) if normed else x, w)

    launches = [{}, *skinny_launches(n, k, False, normed, rows, most)]
    kind = "normed" if normed else "plain"
    entry = f'("{{arch}}", {padded(rows)}, {n}, {k}, "{kind}"): Launch({{launch}}),'
    return Case(
        f"skinny {rows}x{k}->{n} {kind}", make, ours, rival,
        lambda x, w: rival(x.double(), w.double()), 2 * (n * k + rows * (n + k)), launches,
        entry,
    )  # fmt: skip


def gated(rows: int, most: int, n: int = 4096, k: int = 1024) -> Case:
    """Norm, gate and up, GELU and product; the rival is the product of cuBLAS alone."""

    def make(seed: int) -> Tensors:
        return randn(1, rows, k, seed=seed), randn(2 * n, k, seed=seed + 1) * k**-0.5

    def ours(launch: Mapping[str, int]) -> Run:
        code = encoded(triton_skinny_gemm.Launch, launch)
        return lambda x, w: triton_skinny_gemm.skinny_gelu_mul(x, w, None, EPS, code)

    def rival(x: Tensor, w: Tensor) -> Tensor:
        return F.linear(x, w)  # the product alone, without norm and gate

    def expected(x: Tensor, w: Tensor) -> Tensor:
        wide = F.rms_norm(x.double(), (k,), eps=EPS)
        gate, up = (wide @ w.double().T).chunk(2, -1)
        return F.gelu(gate, approximate="tanh") * up

    launches = [{}, *skinny_launches(n, k, True, True, rows, most)]
    entry = f'("{{arch}}", {padded(rows)}, {n}, {k}, "gated"): Launch({{launch}}),'
    moved = 2 * (2 * n * k + rows * (n + k))
    return Case(f"norm, gate, up, gelu {rows}x{k}->{n}", make, ours, rival, expected, moved,
                launches, entry)  # fmt: skip


def down_and_norm(rows: int, k: int) -> Case:
    """A linear layer, residual and norm; the rival is the product of cuBLAS alone."""
    n = 1024

    def make(seed: int) -> Tensors:
        x, w = randn(1, rows, k, seed=seed), randn(n, k, seed=seed + 1) * k**-0.5
        return x, w, randn(1, rows, n, seed=seed + 2)

    def ours(launch: Mapping[str, int]) -> Run:
        code = encoded(triton_skinny_gemm.Launch, launch)
        return lambda x, w, r: triton_skinny_gemm.skinny_linear_add_rms_norm(
            x, w, r, None, EPS, code
        )

    def both(x: Tensor, w: Tensor, r: Tensor) -> tuple[Tensor, Tensor]:
        total = F.linear(x, w) + r
        return total, F.rms_norm(total, (n,), eps=EPS)

    return Case(
        f"skinny, add, norm {rows}x{k}->{n}", make, ours, lambda x, w, r: F.linear(x, w),
        lambda *tensors: both(*(t.double() for t in tensors)), 2 * (n * k + rows * (3 * n + k)),
        [{}, *skinny_launches(n, k, False, False, rows, 12)],
    )  # fmt: skip


def decode(horizon: int, cached: bool, most: int) -> Case:
    """The suffix's attention; the rival is two calls of SDPA."""
    tokens, past = horizon + 1, 788

    def make(seed: int) -> Tensors:
        q, kv = randn(1, tokens, 8, 256, seed=seed), randn(2, 1, past + tokens, 1, 256, seed=seed)
        return q, kv[0], kv[1]

    def ours(launch: Mapping[str, int]) -> Run:
        code = encoded(triton_decode.Launch, launch)
        if not cached:
            return lambda q, k, v: triton_decode.decode_attention(
                q, k, v, 1, past + 1, past + tokens, None, 0.0625, code
            )
        table = randn(2, 1, tokens, 128, seed=7)
        return lambda q, k, v: triton_decode.decode_attention_rotary(
            q, k[:, :past], v[:, :past], k[:, past:], v[:, past:], table[0], table[1], 1, past + 1,
            None, 0.0625, code,
        )  # fmt: skip

    def rival(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """What the knob's sdpa does: one call for each segment."""
        rows = q.view(1, 1, tokens * 8, 256)
        keys, values = k.transpose(1, 2), v.transpose(1, 2)
        attend = F.scaled_dot_product_attention
        first = attend(rows[:, :, :8], keys[:, :, : past + 1], values[:, :, : past + 1])
        return torch.cat((first, attend(rows[:, :, 8:], keys, values)), 2).view(q.shape)

    launches = grid(block_m=(16, 32, 64), block_n=(32, 64, 128), blocks=(1, 2),
                    num_warps=(4, 8), fused=(0, 1))  # fmt: skip
    chosen = [
        e for e in launches
        if e["block_n"] * e["blocks"] <= 128 and e["block_m"] * e["block_n"] <= 4096
    ]  # fmt: skip
    entry = f'("{{arch}}", {tokens * 8 <= 128}): Launch({{launch}}),'
    return Case(
        f"decode attention {tokens}{', cached' if cached else ''}", make, ours, rival,
        lambda *t: rival(*(x.double() for x in t)), 2 * 2 * 256 * (past + tokens * 9),
        [{}, *sample(chosen, most)], None if cached else entry,
    )  # fmt: skip


def flash(name: str, shape: tuple[int, int, int, int, int]) -> Case:
    """Attention without a mask."""
    batch, tokens, heads, kv_heads, width = shape

    def make(seed: int) -> Tensors:
        kv = randn(2, batch, tokens, kv_heads, width, seed=seed)
        return randn(batch, tokens, heads, width, seed=seed), kv[0], kv[1]

    def ours(launch: Mapping[str, int]) -> Run:
        code = encoded(triton_attention.Launch, launch)
        scale = width**-0.5
        return lambda q, k, v: triton_attention.flash_attention(
            q, k, v, 0, tokens, tokens, None, scale, code
        )

    def rival(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if kv_heads == 1:
            q = q.reshape(batch, tokens * heads, 1, width)
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))
        out = F.scaled_dot_product_attention(q, k, v)
        return out.transpose(1, 2).reshape(batch, tokens, heads, width)

    launches = [
        e for e in grid(
            block_m=(64, 128), block_n=(32, 64, 128), num_warps=(4, 8), num_stages=(2, 3)
        )
        if (e["block_m"] + e["block_n"] * e["num_stages"] * 2) * padded(width) * 2 <= 260_000
    ]  # fmt: skip
    moved = 2 * batch * tokens * width * 2 * (heads + kv_heads)
    entry = f'("{{arch}}", {width}): Launch({{launch}}),'
    return Case(name, make, ours, rival, lambda *t: rival(*(x.double() for x in t)), moved,
                [{}, *sample(launches, 16)], entry)  # fmt: skip


def elementwise() -> list[Case]:
    """No parameters to sweep; the rival is torch.compile of the plain operation."""

    def compiled(run: Run) -> Run:
        return torch.compile(run, dynamic=False)

    def case(name: str, shapes: list[tuple[int, ...]], mine: Run, plain: Run, moved: int) -> Case:
        def make(seed: int) -> Tensors:
            return tuple(randn(*shape, seed=seed + i) for i, shape in enumerate(shapes))

        return Case(name, make, lambda launch: mine, compiled(plain),
                    lambda *t: plain(*(x.double() for x in t)), moved, hot=True)  # fmt: skip

    def add_norm_plain(x: Tensor, r: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
        return triton_norm.add_rms_norm_reference(x, r, w, EPS)

    def rotated(q: Tensor, k: Tensor, c: Tensor, s: Tensor) -> tuple[Tensor, Tensor]:
        return ops.rotary(q, c, s), ops.rotary(k, c, s)

    cases = []
    for rows, width in ((11, 1024), (788, 2048)):
        x, one = (1, rows, width), (width,)
        cases.append(
            case(f"add, rms_norm {rows}x{width}", [x, x, one],
                 lambda x, r, w: triton_norm.add_rms_norm(x, r, w, EPS), add_norm_plain,
                 8 * rows * width)
        )  # fmt: skip
        gate_up = (1, rows, 8 * width)
        cases.append(
            case(f"gelu_mul {rows}x{4 * width}", [gate_up], triton_activation.gelu_mul_fused,
                 lambda x: ops.gelu_mul(*x.chunk(2, -1)), 24 * rows * width)
        )  # fmt: skip
        table = (1, rows, 128)
        cases.append(
            case(f"rotary q, k {rows}", [(1, rows, 8, 256), (1, rows, 1, 256), table, table],
                 triton_rotary.rotary_qk, rotated, 2 * rows * 256 * 19)
        )  # fmt: skip
    cases.append(
        case("layer_norm 768x1152", [(3, 256, 1152), (1152,), (1152,)],
             lambda x, w, b: triton_norm.layer_norm(x, w, b, EPS),
             lambda x, w, b: ops.layer_norm(x, w, b, EPS), 4 * 768 * 1152)
    )  # fmt: skip
    cases.append(
        case("gelu 768x4304", [(3, 256, 4304)], triton_activation.gelu, ops.gelu, 4 * 768 * 4304)
    )
    return cases


def cases() -> list[Case]:
    """The shapes of full Pi0: (N, K) of the fused and of the single projections of the expert."""
    return [
        decode(10, False, 28), decode(10, True, 10), decode(50, False, 14),
        skinny(11, 2560, 1024, 28), skinny(11, 1024, 2048, 28), skinny(11, 1024, 4096, 28),
        gated(11, 24), skinny(11, 2560, 1024, 16, normed=True), skinny(11, 8192, 1024, 16),
        down_and_norm(11, 2048), down_and_norm(11, 4096),
        flash("flash attention prefill", (1, 788, 8, 1, 256)),
        flash("flash attention vision", (3, 256, 16, 16, 72)),
        *elementwise(),
        skinny(11, 2048, 1024, 12), skinny(11, 256, 1024, 6), skinny(11, 4096, 1024, 12),
        skinny(51, 2560, 1024, 10), skinny(51, 1024, 2048, 10), skinny(51, 1024, 4096, 10),
        gated(51, 10),
    ]  # fmt: skip


def row(result: Mapping[str, Any]) -> str:
    """One line of the printed table."""
    best = result["best"]
    tried = f"{len(result['tried'])}/{result['possible']}"
    if best is None:
        return f"{result['name']:<34} none right of {tried}: {result['tried'][0]}"
    rate = result["bytes"] / best["us"] / 1e3
    first = result["tried"][0].get("us", float("nan"))
    words = " ".join(f"{name}={value}" for name, value in best["launch"].items()) or "table"
    times = f"{best['us']:7.2f} {first:7.2f} {result['rival_us']:7.2f}"
    return (
        f"{result['name']:<34} {times} {rate:6.0f} "
        f"{rate / PEAK_GB_S:5.2f} {best['error']:8.1e} {tried:>7}  {words}"
    )


def table_entry(case: Case, result: Mapping[str, Any], name: str) -> str | None:
    """The best parameters as a line of the kernel's TABLE; None where the default won."""
    if case.entry is None or result["best"] is None or not result["best"]["launch"]:
        return None
    launch = ", ".join(f"{key}={value}" for key, value in result["best"]["launch"].items())
    us = f"  # {result['best']['us']:.1f} us, torch {result['rival_us']:.1f}"
    return case.entry.format(arch=name, launch=launch) + us


def main() -> None:
    """Sweep, print, and write JSON after each kernel."""
    parser = argparse.ArgumentParser(description="Sweep the Triton kernels' launch parameters.")
    parser.add_argument("--out", type=Path, required=True, help="JSON file of all measurements")
    parser.add_argument("--seconds", type=float, default=170, help="time for the whole sweep")
    parser.add_argument("--only", default="", help="comma-separated parts of names")
    options = parser.parse_args()
    wanted = [word for word in options.only.split(",") if word]
    everything = cases()
    picked = [i for i, c in enumerate(everything) if not wanted or any(w in c.name for w in wanted)]
    chosen = [everything[i] for i in picked]
    end = time.monotonic() + options.seconds
    print(compile_all(picked, options.seconds / 2), flush=True)
    name, results, entries = arch(torch.empty(1, device="cuda")), [], []
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, triton {triton.__version__}")
    print(f"{'':<34} {'best us':>7} {'default':>7} {'torch':>7} {'GB/s':>6} {'of 3T':>5} error")
    for index, case in enumerate(chosen):
        weights = [len(c.launches) ** 0.5 for c in chosen[index:]]
        share = (end - time.monotonic()) * weights[0] / sum(weights)
        result = measure(case, time.monotonic() + share)
        results.append(result)
        entries.append(table_entry(case, result, name))
        print(row(result), flush=True)
        report = {"device": torch.cuda.get_device_name(), "arch": name, "results": results}
        options.out.write_text(json.dumps(report, indent=1))
    print("\n".join(["", "# for TABLE in each kernel's module", *filter(None, entries)]))


if __name__ == "__main__":
    main()
