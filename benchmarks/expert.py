"""Tune the kernels of the action expert where they run: in the chain of one denoising step.

    python -m benchmarks.expert --out expert.json [--rows 10] [--seconds 240]

A kernel that starts beside its predecessor and fetches its weights early makes others faster or
slower, so times of single kernels do not add up. Here the 18 fused layers of the full model are
captured as one graph, with their own weights (620 MB, far more than any cache), and one launch
parameter is changed at a time, in the table of the kernels: what makes the whole chain faster
stays. A variant whose result differs is never taken. The last lines are the entries to paste.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import multiprocessing
import os
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import torch
import triton
from torch import Tensor

from benchmarks.kernels import PEAK_GB_S, REFUSED, relative_error
from openpi_opt.kernels import triton_decode, triton_skinny_gemm
from openpi_opt.kernels.triton_common import arch, padded
from openpi_opt.pi0 import weights
from openpi_opt.pi0.config import PI0, PI0_MINI
from openpi_opt.pi0.gemma import Attending, KeysValues, rope_at
from openpi_opt.pi0.ops import Segment, Visibility, eager_attention
from openpi_opt.pi0.policy import Pi0Policy
from openpi_opt.pi0.precision import cast
from openpi_opt.surgery.expert import fuse_expert_layers
from openpi_opt.surgery.folded import fold_norms
from openpi_opt.surgery.fused import fuse_gate_up, fuse_qkv

STORED = 789
STEPS = 3
Table = dict[Any, Any]
Key = tuple[str, Any]  # which table, and the key in it


def expert() -> Pi0Policy:
    """A policy whose expert is the full one and all else is small, fused, bfloat16."""
    language = dataclasses.replace(PI0_MINI.language, depth=PI0.expert.depth, heads=8, head_dim=256)
    policy = weights.build(
        dataclasses.replace(PI0_MINI, language=language, expert=PI0.expert), "cuda"
    )
    weights.init_random(policy, seed=0)
    fold_norms(policy)
    cast(policy, torch.bfloat16)
    fuse_qkv(policy)
    fuse_gate_up(policy)
    fuse_expert_layers(policy)
    return policy


class Chain:
    """`STEPS` passes over the fused layers; `rows` actions see all stored keys."""

    def __init__(self, rows: int) -> None:
        self.policy = expert()
        generator = torch.Generator("cuda").manual_seed(0)

        def randn(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator, device="cuda").bfloat16()

        self.x = randn(1, rows, PI0.expert.width)
        self.past = [
            KeysValues(randn(1, STORED, 1, 256), randn(1, STORED, 1, 256))
            for _ in range(PI0.expert.depth)
        ]
        positions = torch.arange(STORED, STORED + rows, device="cuda")[None]
        rope = rope_at(positions, self.policy.frequencies, torch.bfloat16)
        self.how = Attending(rope, Visibility(None, (Segment(0, rows, None),)), eager_attention)

    def step(self) -> Tensor:
        """One pass -> [1, rows, W]."""
        with torch.no_grad():
            out: Tensor = self.policy.expert(self.x, self.how, self.past)[0]
        return out

    def microseconds(self) -> float:
        """Median of one pass in a captured graph."""

        def steps() -> None:
            for _ in range(STEPS):
                self.step()

        ms: float = triton.testing.do_bench_cudagraph(steps, rep=20, return_mode="median")
        return ms * 1000 / STEPS


def entries(rows: int) -> dict[str, Key]:
    """The five launches of a layer: name -> their place in the tables."""
    name, m = arch(torch.empty(1, device="cuda")), padded(rows)
    return {
        "qkv": ("gemm", (name, m, 2560, 1024, "normed")),
        "attention": ("decode", (name, rows * 8 <= 128)),
        "out": ("gemm", (name, m, 1024, 2048, "plain")),
        "gate_up": ("gemm", (name, m, 4096, 1024, "gated")),
        "down": ("gemm", (name, m, 1024, 4096, "plain")),
    }


TABLES: dict[str, Table] = {"gemm": triton_skinny_gemm.TABLE, "decode": triton_decode.TABLE}
SHAPES = {"qkv": (2560, 1024), "out": (1024, 2048), "gate_up": (4096, 1024), "down": (1024, 4096)}


def start(rows: int) -> None:
    """Write what applies today into the tables, so that every entry can be varied."""
    for name, (table, key) in entries(rows).items():
        if key in TABLES[table]:
            continue
        if name == "attention":
            q = torch.empty(1, rows, 8, 256, dtype=torch.bfloat16, device="cuda")
            TABLES[table][key] = triton_decode.default_launch(q, 1)
        else:
            n, k = SHAPES[name]
            x = torch.empty(rows, k, dtype=torch.bfloat16, device="cuda")
            TABLES[table][key] = triton_skinny_gemm.default_launch(x, n, k, key[-1])


PREFETCH = [(0, 0), (1, 0), (1, 128), (1, 512), (1, 1024), (2, 0), (2, 512)]


def variants(name: str, launch: Any) -> Iterator[Any]:
    """Launches that differ from `launch` in one choice."""
    if name == "attention":
        axes = {"block_m": (16, 32, 64), "block_n": (16, 32, 64, 128), "num_warps": (2, 4, 8),
                "fused": (0, 1), "dependent": (0, 1, 2)}  # fmt: skip
    else:
        axes = {"block_n": (16, 32, 64), "block_k": (64, 128, 256, 512),
                "num_warps": (2, 4, 8), "num_stages": (2, 3, 4, 5)}  # fmt: skip
        if name in ("out", "down"):
            axes["split_k"] = (1, 2, 4, 8)
        for dependent, prefetch in PREFETCH:
            yield launch._replace(dependent=dependent, prefetch=prefetch)
    for axis, values in axes.items():
        for value in values:
            yield launch._replace(**{axis: value})
    if name in ("qkv", "gate_up"):
        for block_n, block_k in ((16, 512), (16, 256), (64, 64), (64, 128)):
            yield launch._replace(block_n=block_n, block_k=block_k)


def compile_ahead(rows: int, work: list[tuple[str, Any]]) -> None:
    """Run in a worker: fill Triton's cache on disk with variants of single launches."""
    start(rows)
    chain = Chain(rows)
    chain.policy.expert.layers = chain.policy.expert.layers[:1]
    for name, launch in work:
        table, key = entries(rows)[name]
        before = TABLES[table][key]
        TABLES[table][key] = launch
        try:
            chain.step()
        except REFUSED:
            continue
        finally:
            TABLES[table][key] = before


def compile_all(rows: int) -> None:
    """Compile the first round's variants in parallel."""
    work = [
        (name, launch)
        for name, (table, key) in entries(rows).items()
        for launch in set(variants(name, TABLES[table][key]))
    ]
    workers = max(1, min(12, (os.cpu_count() or 2) - 2))
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, mp_context=context) as pool:
        for future in [pool.submit(compile_ahead, rows, work[i::workers]) for i in range(workers)]:
            future.result()


def tune(rows: int, deadline: float, say: Callable[[str], None]) -> dict[str, Any]:
    """Coordinate descent until nothing helps or the deadline."""
    start(rows)
    chain = Chain(rows)
    places = entries(rows)
    expected = chain.step()
    best = chain.microseconds()
    record: list[dict[str, Any]] = [{"us": best, "what": "start"}]
    say(f"{rows} rows, start: {best:.1f} us a step, {best / 18:.2f} a layer")

    def attempt(changes: dict[str, Any], what: str) -> bool:
        nonlocal best
        before = {name: TABLES[places[name][0]][places[name][1]] for name in changes}
        if before == changes or time.monotonic() > deadline:
            return False
        for name, launch in changes.items():
            TABLES[places[name][0]][places[name][1]] = launch
        taken = False
        try:
            error = relative_error(chain.step(), expected)
            us = chain.microseconds()
            taken = us < best * 0.998 and error < 2e-2
            record.append({"us": us, "what": what, "error": error, "taken": taken})
        except REFUSED as failure:
            record.append({"what": what, "failed": f"{type(failure).__name__}"})
        if taken:
            best = us
            say(f"{best:9.1f}  {what}")
        else:
            for name, launch in before.items():
                TABLES[places[name][0]][places[name][1]] = launch
        return taken

    def now(name: str) -> Any:
        return TABLES[places[name][0]][places[name][1]]

    for dependent, prefetch in PREFETCH:
        changes = {
            name: now(name)._replace(dependent=dependent)
            if name == "attention"
            else now(name)._replace(dependent=dependent, prefetch=prefetch)
            for name in places
        }
        what = f"dependent={dependent} prefetch={prefetch}"
        attempt(changes, f"all: {what}")
        say(f"   ({record[-1].get('us', 0):.1f} with {what})")
    improved = True
    while improved and time.monotonic() < deadline:
        improved = False
        for name in places:
            for launch in variants(name, now(name)):
                changed = {k: v for k, v in launch._asdict().items() if v != getattr(now(name), k)}
                # The base moves on when one is taken: apply the difference, not the old base.
                if changed and attempt({name: now(name)._replace(**changed)}, f"{name}: {changed}"):
                    improved = True
    moved = sum(p.numel() * 2 for p in chain.policy.expert.layers.parameters()) / 1e9
    rate = moved / best * 1e6
    say(
        f"{rows} rows, best: {best:.1f} us a step, {best / 18:.2f} a layer; weights at "
        f"{rate:.0f} GB/s ({rate / PEAK_GB_S:.2f} of copy)"
    )
    return {"rows": rows, "us": best, "tried": record,
            "best": {name: str(now(name)) for name in places},
            "entries": [f"{places[name][1]}: {now(name)}," for name in places]}  # fmt: skip


def main() -> None:
    """Tune for each number of rows, print, write JSON."""
    parser = argparse.ArgumentParser(description="Tune the action expert's chain of kernels.")
    parser.add_argument("--out", type=Path, required=True, help="JSON file of all measurements")
    parser.add_argument("--rows", default="10", help="comma-separated numbers of rows")
    parser.add_argument("--seconds", type=float, default=240, help="time for each")
    options = parser.parse_args()
    report = {"device": torch.cuda.get_device_name(), "torch": torch.__version__, "results": []}
    for rows in (int(word) for word in options.rows.split(",")):
        start(rows)
        began = time.monotonic()
        compile_all(rows)
        print(f"compiled ahead in {time.monotonic() - began:.0f} s", flush=True)
        result = tune(rows, time.monotonic() + options.seconds, partial(print, flush=True))
        report["results"].append(result)
        options.out.write_text(json.dumps(report, indent=1))
        print("\n".join(result["entries"]), flush=True)


if __name__ == "__main__":
    main()
