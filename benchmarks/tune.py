"""Tune the kernels of the action expert where they run: in the chain of one denoising step.

    python -m benchmarks.tune --out tune.json [--rows 11,51,pi05:50] [--seconds 100]

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
import math
import multiprocessing
import os
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor, wait
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import triton
from torch import Tensor

from openpi_opt.kernels import triton_decode, triton_skinny_gemm
from openpi_opt.kernels.launch import Launch
from openpi_opt.kernels.triton_common import arch, padded
from openpi_opt.pi0 import weights
from openpi_opt.pi0.config import PI0, PI0_MINI
from openpi_opt.pi0.gemma import Attending, KeysValues, Rope, rope_at
from openpi_opt.pi0.ops import Segment, Visibility, eager_attention
from openpi_opt.pi0.policy import Pi0Policy
from openpi_opt.pi0.precision import cast
from openpi_opt.surgery.expert import FusedAdaptiveTower, fuse_expert_layers
from openpi_opt.surgery.folded import fold_norms
from openpi_opt.surgery.fused import fuse_gate_up, fuse_qkv
from openpi_opt.surgery.lean import lean

# What a launch may be refused with; everything else is an error of the benchmark.
REFUSED = (triton.runtime.errors.OutOfResources, triton.compiler.errors.CompilationError,
           RuntimeError, ValueError)  # fmt: skip
STEPS = 3
SHAPES = {"qkv": (2560, 1024), "out": (1024, 2048), "gate_up": (4096, 1024), "down": (1024, 4096)}
KINDS = {"qkv": "normed", "out": "plain", "gate_up": "gated", "down": "plain"}
TABLES: dict[str, dict[Any, Any]] = {
    "gemm": triton_skinny_gemm.TABLE,
    "decode": triton_decode.TABLE,
}
PREFETCH = [(0, 0), (1, 0), (1, 128), (1, 512), (1, 1024), (2, 0), (2, 512)]


@dataclass(frozen=True)
class Workload:
    """Rows of a step, and of which model."""

    rows: int
    adaptive: bool

    @classmethod
    def parse(cls, text: str) -> Workload:
        """`51`, or `pi05:50`."""
        model, _, rows = text.rpartition(":")
        if model not in ("", "pi05"):
            raise SystemExit(f"{text}: {model} is not pi05")
        return cls(int(rows), model == "pi05")

    @property
    def stored(self) -> int:
        """Keys before the call: three cameras and a prompt."""
        return 828 if self.adaptive else 788


class Chain:
    """`STEPS` passes over the fused layers of the full expert; pi0's first row is the state."""

    def __init__(self, work: Workload) -> None:
        self.work = work
        self.policy = _policy(work)
        generator = torch.Generator("cuda").manual_seed(0)

        def randn(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator, device="cuda").bfloat16()

        rows, stored = work.rows, work.stored
        self.x = randn(1, rows, PI0.expert.width)
        self.past = [
            KeysValues(randn(1, stored, 1, 256), randn(1, stored, 1, 256))
            for _ in range(PI0.expert.depth)
        ]
        positions = torch.arange(stored, stored + rows, device="cuda")[None]
        rope = rope_at(positions, self.policy.frequencies, torch.bfloat16)
        segments = (Segment(0, rows, None),)
        if not work.adaptive:
            segments = (Segment(0, 1, stored + 1), Segment(1, rows, None))
        self.how = Attending(Rope(*rope), Visibility(None, segments), eager_attention)

    def step(self) -> Tensor:
        """One pass -> [1, rows, W]."""
        expert = self.policy.expert
        with torch.no_grad():
            if isinstance(expert, FusedAdaptiveTower):
                row = self.policy.time_table[1]
                return expert.layered(self.x, self.how, self.past, row)
            out: Tensor = expert(self.x, self.how, self.past)[0]
        return out

    def microseconds(self) -> float:
        """Median of one pass in a captured graph."""

        def steps() -> None:
            for _ in range(STEPS):
                self.step()

        ms: float = triton.testing.do_bench_cudagraph(steps, rep=20, return_mode="median")
        return ms * 1000 / STEPS


def _policy(work: Workload) -> Pi0Policy:
    """A policy whose expert is the full one and all else is small, fused, bfloat16."""
    language = dataclasses.replace(PI0_MINI.language, depth=PI0.expert.depth, heads=8, head_dim=256)
    family = "pi05" if work.adaptive else "pi0"
    config = dataclasses.replace(PI0_MINI, language=language, expert=PI0.expert, family=family)
    policy = weights.build(config, "cuda", steps=2)
    weights.init_random(policy, seed=0)
    fold_norms(policy)
    if work.adaptive:
        lean(policy, time_mlp=True)
    cast(policy, torch.bfloat16)
    fuse_qkv(policy)
    fuse_gate_up(policy)
    fuse_expert_layers(policy)
    policy.fill_buffers()
    return policy


def entries(work: Workload) -> dict[str, tuple[str, Any]]:
    """The five launches of a layer: name -> which table, and the key in it."""
    name, m = arch(torch.empty(1, device="cuda")), padded(work.rows)
    found: dict[str, tuple[str, Any]] = {}
    for key, shape in SHAPES.items():
        gain = ", gain" if work.adaptive and KINDS[key] != "plain" else ""
        kind = KINDS[key] + gain
        found[key] = ("gemm", (name, m, *shape, kind))
    found["attention"] = ("decode", (name, m))
    return found


def start(work: Workload) -> None:
    """Write what applies today into the tables, so that every entry can be varied."""
    for name, (table, key) in entries(work).items():
        if key in TABLES[table]:
            continue
        if name == "attention":
            q = torch.empty(1, work.rows, 8, 256, dtype=torch.bfloat16, device="cuda")
            TABLES[table][key] = triton_decode.default_launch(q, 1)
        else:
            n, k = SHAPES[name]
            x = torch.empty(work.rows, k, dtype=torch.bfloat16, device="cuda")
            TABLES[table][key] = triton_skinny_gemm.default_launch(x, n, k, key[4])


def variants(name: str, launch: Any) -> Iterator[Any]:
    """Launches that differ from `launch` in one choice, or in the tile."""
    if name == "attention":
        axes = {"block_m": (16, 32, 64, 128), "block_n": (16, 32, 64, 128), "blocks": (1, 2, 3, 4),
                "num_warps": (2, 4, 8), "num_stages": (1, 2), "fused": (0, 1),
                "dependent": (0, 1, 2)}  # fmt: skip
    else:
        axes = {"block_n": (16, 32, 64, 128), "block_k": (64, 128, 256, 512),
                "num_warps": (2, 4, 8), "num_stages": (2, 3, 4, 5, 6)}  # fmt: skip
        if KINDS[name] == "plain":
            axes["split_k"] = (1, 2, 4, 8)
        for dependent, prefetch in PREFETCH:
            yield dataclasses.replace(launch, dependent=dependent, prefetch=prefetch)
        for n, k in ((16, 512), (16, 256), (32, 64), (64, 64), (64, 128), (128, 64)):
            for stages in (3, 5):
                yield dataclasses.replace(launch, block_n=n, block_k=k, num_stages=stages)
    for axis, values in axes.items():
        for value in values:
            yield changed(launch, {axis: value})


def changed(launch: Any, values: dict[str, int]) -> Any:
    """`launch` with these values."""
    return dataclasses.replace(launch, **values)


_WORKER: dict[str, Any] = {}


def _start_worker(work: Workload) -> None:
    """In a worker: one layer, to compile launches with."""
    start(work)
    chain = Chain(work)
    chain.policy.expert.layers = chain.policy.expert.layers[:1]
    chain.past = chain.past[:1]
    if isinstance(chain.policy.expert, FusedAdaptiveTower):
        row = chain.policy.time_table
        per = (row.shape[1] - 2 * PI0.expert.width) // PI0.expert.depth
        chain.policy.time_table = torch.cat((row[:, :per], row[:, -2 * PI0.expert.width :]), 1)
    _WORKER.update(chain=chain, places=entries(work))


def _compile(name: str, launch: Launch) -> None:
    """In a worker: fill Triton's cache on disk with one launch."""
    table, key = _WORKER["places"][name]
    before = TABLES[table][key]
    TABLES[table][key] = launch
    try:
        _WORKER["chain"].step()
    except REFUSED:
        return
    finally:
        TABLES[table][key] = before


class Tuning:
    """Coordinate descent over the launches of one chain, until a deadline."""

    def __init__(
        self, work: Workload, seconds: float, pool: ProcessPoolExecutor, say: Callable[[str], None]
    ) -> None:
        self.pool, self.deadline = pool, time.monotonic() + seconds
        self.chain, self.places = Chain(work), entries(work)
        self.say = say
        self.expected = self.chain.step().double()
        self.best = self.chain.microseconds()
        self.record: list[dict[str, Any]] = [{"us": self.best, "what": "start"}]

    def now(self, name: str) -> Any:
        """What is in the table."""
        table, key = self.places[name]
        return TABLES[table][key]

    def put(self, name: str, launch: Any) -> None:
        """Write into the table."""
        table, key = self.places[name]
        TABLES[table][key] = launch

    def tried(self, changes: dict[str, Launch], what: str) -> float:
        """Microseconds of a pass with these launches; infinite where they fail or compute else."""
        before = {name: self.now(name) for name in changes}
        for name, launch in changes.items():
            self.put(name, launch)
        found: dict[str, Any] = {"what": what}
        try:
            out = self.chain.step().double()
            found["error"] = float((out - self.expected).norm() / self.expected.norm())
            found["us"] = self.chain.microseconds()
        except REFUSED as failure:
            found["failed"] = type(failure).__name__
        for name, launch in before.items():
            self.put(name, launch)
        self.record.append(found)
        right = "us" in found and found["error"] < 2e-2
        return float(found["us"]) if right else math.inf

    def take_best(self, choices: list[dict[str, Launch]]) -> bool:
        """Try all, keep the fastest if it gains more than 0.2%."""
        self.compile([job for choice in choices for job in choice.items()])
        times: list[float] = []
        for choice in choices:
            if time.monotonic() < self.deadline:
                times.append(self.tried(choice, str(choice)))
        if not times or min(times) > self.best * 0.998:
            return False
        self.best = min(times)
        chosen = choices[times.index(self.best)]
        for name, launch in chosen.items():
            self.put(name, launch)
        self.say(f"{self.best:9.1f}  {chosen}")
        return True

    def compile(self, jobs: list[tuple[str, Launch]]) -> None:
        """Compile launches in parallel; measuring one then takes a fifth of a second."""
        wait([self.pool.submit(_compile, *job) for job in set(jobs)])

    def run(self) -> None:
        """All launches beside their predecessors first, then each parameter of each launch."""
        beside = [
            {
                name: changed(
                    self.now(name),
                    {"dependent": d} if name == "attention" else {"dependent": d, "prefetch": p},
                )
                for name in self.places
            }
            for d, p in PREFETCH
        ]
        improved = self.take_best(beside) or True
        while improved and time.monotonic() < self.deadline:
            improved = False
            for name in ("attention", *SHAPES):
                launches = dict.fromkeys(variants(name, self.now(name)))
                improved |= self.take_best([{name: launch} for launch in launches])


def tune(work: Workload, seconds: float, say: Callable[[str], None]) -> dict[str, Any]:
    """Tune a chain, report."""
    start(work)
    workers = max(1, min(13, (os.cpu_count() or 2) - 2))
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, context, _start_worker, (work,)) as pool:
        tuning = Tuning(work, seconds, pool, say)
        say(f"{work}: start {tuning.best / 18:.2f} us a layer")
        tuning.run()
    say(f"{work}: {tuning.best:.1f} us a step, {tuning.best / 18:.2f} a layer")
    return {"work": dataclasses.asdict(work), "us": tuning.best, "tried": tuning.record,
            "entries": [f"{tuning.places[name][1]}: {tuning.now(name)},"
                        for name in tuning.places]}  # fmt: skip


def main() -> None:
    """Tune for each workload, print, write JSON."""
    parser = argparse.ArgumentParser(description="Tune the action expert's chain of kernels.")
    parser.add_argument("--out", type=Path, required=True, help="JSON file of all measurements")
    parser.add_argument("--rows", default="11", help="comma-separated: rows, pi05:rows")
    parser.add_argument("--seconds", type=float, default=100, help="time for each")
    options = parser.parse_args()
    report: dict[str, Any] = {"device": torch.cuda.get_device_name(), "torch": torch.__version__}
    report["results"] = []
    for text in options.rows.split(","):
        result = tune(Workload.parse(text), options.seconds, partial(print, flush=True))
        report["results"].append(result)
        options.out.write_text(json.dumps(report, indent=1))
        print("\n".join(result["entries"]), flush=True)


if __name__ == "__main__":
    main()
