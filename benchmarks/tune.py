"""Tune the kernels of the action expert where they run: in the chain of one denoising step.

    python -m benchmarks.tune --out tune.json [--rows 11,51,pi05:50] [--seconds 100] [--flash]

A kernel that starts beside its predecessor and fetches its weights early makes others faster or
slower, so times of single kernels do not add up. Here the 18 fused layers of the full model are
captured as one graph, with their own weights (620 MB, far more than any cache), and one launch
parameter is changed at a time, in the table of the kernels: what makes the whole chain faster
stays. A variant whose result differs is never taken. `--flash` tunes the attention of the prefix
and of vision, which stand alone. The last lines are the entries to paste; `benchmarks.contenders`
takes the file as `tables=tune.json`.
"""

from __future__ import annotations

import argparse
import ctypes
import dataclasses
import itertools
import json
import math
import multiprocessing
import os
import signal
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, wait
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import triton
from torch import Tensor

from openpi_opt.kernels import triton_attention, triton_decode, triton_skinny_gemm
from openpi_opt.kernels.launch import FLASH, Launch
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
_PR_SET_PDEATHSIG = 1  # linux/prctl.h
SHAPES = {"qkv": (2560, 1024), "out": (1024, 2048), "gate_up": (4096, 1024), "down": (1024, 4096)}
KINDS = {"qkv": "normed", "out": "plain", "gate_up": "gated", "down": "plain"}
TABLES: dict[str, dict[Any, Any]] = {
    "gemm": triton_skinny_gemm.TABLE,
    "decode": triton_decode.TABLE,
    "flash": triton_attention.TABLE,
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

    def __init__(self, work: Workload, depth: int = PI0.expert.depth) -> None:
        self.work = work
        self.policy = _policy(work, depth)
        generator = torch.Generator("cuda").manual_seed(0)

        def randn(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator, device="cuda").bfloat16()

        rows, stored = work.rows, work.stored
        self.x = randn(1, rows, PI0.expert.width)
        self.past = [
            KeysValues(randn(1, stored, 1, 256), randn(1, stored, 1, 256)) for _ in range(depth)
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


def _policy(work: Workload, depth: int) -> Pi0Policy:
    """A policy whose expert is the full one and all else is small, fused, bfloat16."""
    language = dataclasses.replace(PI0_MINI.language, depth=depth, heads=8, head_dim=256)
    expert = dataclasses.replace(PI0.expert, depth=depth)
    family = "pi05" if work.adaptive else "pi0"
    config = dataclasses.replace(PI0_MINI, language=language, expert=expert, family=family)
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
        found[key] = ("gemm", (name, m, *shape, KINDS[key]))
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


def variants(name: str, launch: Launch, work: Workload) -> Iterator[Launch]:
    """Launches that differ from `launch` in one choice, or in the tile."""
    if name == "attention":
        axes = {"num_stages": (1, 2), "fused": (0, 1), "dependent": (0, 1, 2)}
        rows, keys = 8 * work.rows, work.stored + work.rows
        for m, n, blocks, warps in itertools.product((16, 32, 64), (32, 64), (1, 2, 4), (4, 8)):
            splits = math.ceil(keys / (n * blocks))
            if 40 <= math.ceil(rows / m) * splits <= 270:
                tile = {"block_m": m, "block_n": n, "blocks": blocks, "num_warps": warps}
                yield changed(launch, tile)
                if splits <= 8:
                    yield changed(launch, {**tile, "fused": 1})
    else:
        axes = {"block_n": (16, 32, 64, 128), "block_k": (64, 128, 256, 512),
                "num_warps": (2, 4, 8), "num_stages": (2, 3, 4, 5, 6)}  # fmt: skip
        if KINDS[name] == "plain":
            axes["split_k"] = (1, 2, 4, 8)
        for dependent, prefetch in PREFETCH:
            yield changed(launch, {"dependent": dependent, "prefetch": prefetch})
        for n, k in ((16, 512), (16, 256), (32, 64), (64, 64), (64, 128), (128, 64)):
            for stages in (3, 5):
                yield changed(launch, {"block_n": n, "block_k": k, "num_stages": stages})
    for axis, values in axes.items():
        for value in values:
            yield changed(launch, {axis: value})


def changed(launch: Launch, values: dict[str, int]) -> Launch:
    """`launch` with these values."""
    return dataclasses.replace(launch, **values)


_CHAINS: dict[Workload, Chain] = {}


def _start_worker() -> None:
    """In a worker: end with the tuner, however that ends, and keep no pipe of its output open."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    nowhere = os.open(os.devnull, os.O_WRONLY)
    for descriptor in (1, 2):
        os.dup2(nowhere, descriptor)


def _ready() -> None:
    """In a worker: nothing, once it has started."""


def _one_layer(work: Workload) -> Chain:
    """In a worker: a chain of one layer, to compile launches with."""
    if work not in _CHAINS:
        start(work)
        chain = Chain(work, depth=1)
        _CHAINS[work] = chain
    return _CHAINS[work]


def _compile(work: Workload, changes: dict[str, Launch]) -> None:
    """In a worker: fill Triton's cache on disk with these launches."""
    chain, places = _one_layer(work), entries(work)
    before = {name: TABLES[places[name][0]][places[name][1]] for name in changes}
    for name, launch in changes.items():
        TABLES[places[name][0]][places[name][1]] = launch
    try:
        chain.step()
    except REFUSED:
        return
    finally:
        for name, launch in before.items():
            TABLES[places[name][0]][places[name][1]] = launch


class Tuning:
    """Coordinate descent over the launches of one chain, until a deadline."""

    def __init__(self, work: Workload, pool: ProcessPoolExecutor, say: Callable[[str], None]):
        self.pool, self.deadline = pool, math.inf
        start(work)
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

    def take_best(self, choices: list[dict[str, Launch]], jobs: Sequence[Future[None]]) -> None:
        """Try each once its job is done, keep the fastest if it gains more than 0.2%."""
        times: list[float] = []
        for choice, job in zip(choices, jobs, strict=True):
            wait([job], timeout=max(0.0, self.deadline - time.monotonic()))
            if time.monotonic() < self.deadline:
                times.append(self.tried(choice, str(choice)))
        if not times or min(times) > self.best * 0.998:
            return
        self.best = min(times)
        chosen = choices[times.index(self.best)]
        for name, launch in chosen.items():
            self.put(name, launch)
        self.say(f"{self.best:9.1f}  {chosen}")

    def compile(self, choices: Iterable[dict[str, Launch]]) -> list[Future[None]]:
        """Start compiling launches in parallel; measuring one then takes a fifth of a second.

        What else stands in the tables goes along: a product reads as many sums of squares as the
        one before has blocks.
        """
        now = {name: self.now(name) for name in self.places}
        return [self.pool.submit(_compile, self.chain.work, now | choice) for choice in choices]

    def run(self, seconds: float) -> None:
        """All launches beside their predecessors first, then each parameter of each launch."""
        self.deadline = time.monotonic() + seconds
        choices = [
            {
                name: changed(
                    self.now(name),
                    {"dependent": d} if name == "attention" else {"dependent": d, "prefetch": p},
                )
                for name in self.places
            }
            for d, p in PREFETCH
        ]
        self.take_best(choices, self.compile(choices))
        before = math.inf
        while self.best < before and time.monotonic() < self.deadline:
            before = self.best
            for name in ("attention", *SHAPES):
                found = dict.fromkeys(variants(name, self.now(name), self.chain.work))
                choices = [{name: launch} for launch in found]
                self.take_best(choices, self.compile(choices))


def _workers() -> int:
    return max(1, min(14, (os.cpu_count() or 2) - 2))


Entry = tuple[str, Any, Launch]
"""Which table, the key in it, and what to put there."""


def tune(
    work: Workload, seconds: float, pool: ProcessPoolExecutor, say: Callable[[str], None]
) -> dict[str, Any]:
    """Tune a chain, report."""
    tuning = Tuning(work, pool, say)
    say(f"{work}: start {tuning.best / 18:.2f} us a layer")
    tuning.run(seconds)
    say(f"{work}: {tuning.best:.1f} us a step, {tuning.best / 18:.2f} a layer")
    found = [(*tuning.places[name], tuning.now(name)) for name in tuning.places]
    return {"work": dataclasses.asdict(work), "us": tuning.best, "tried": tuning.record,
            "entries": _written(found)}  # fmt: skip


FLASHES = {256: ((1, 816, 8, 256), (1, 816, 1, 256)), 72: ((3, 256, 16, 72), (3, 256, 16, 72))}
CALLS = 9


def _flash(width: int, launch: Launch) -> Callable[[], Tensor]:
    """`CALLS` calls under `launch`, each with keys of its own, as in the layers."""
    q, k = (
        torch.randn(CALLS, *shape, device="cuda", dtype=torch.bfloat16) for shape in FLASHES[width]
    )
    values = {name: getattr(launch, name) for name in FLASH}
    attend = triton_attention.attention({n: v for n, v in values.items() if v})
    visibility = Visibility(None, (Segment(0, q.shape[2], None),))

    def calls() -> Tensor:
        return torch.stack(
            [attend(a, b, b, visibility, width**-0.5) for a, b in zip(q, k, strict=True)]
        )

    return calls


def _compile_flash(width: int, launch: Launch) -> None:
    try:
        _flash(width, launch)()
    except REFUSED:
        return


def tune_flash(
    width: int, seconds: float, pool: ProcessPoolExecutor, say: Callable[[str], None]
) -> dict[str, Any]:
    """The attention of this head width alone: every tile, the fastest that computes the same."""
    deadline = time.monotonic() + seconds
    name = arch(torch.empty(1, device="cuda"))
    probe = torch.empty(1, 1, 1, width, dtype=torch.bfloat16, device="cuda")
    now = triton_attention.default_launch(probe)
    choices = [now] + [
        changed(now, {"block_m": m, "block_n": n, "num_warps": warps, "num_stages": stages})
        for m, n, warps, stages in itertools.product((64, 128), (32, 64, 128), (4, 8), (2, 3, 4))
    ]
    jobs = [pool.submit(_compile_flash, width, launch) for launch in choices]
    torch.manual_seed(0)
    expected = _flash(width, now)().double()
    record, best = [], (math.inf, now)
    for launch, job in zip(choices, jobs, strict=True):
        if time.monotonic() > deadline:
            break
        wait([job], timeout=20)
        torch.manual_seed(0)
        calls = _flash(width, launch)
        try:
            error = float((calls().double() - expected).norm() / expected.norm())
            ms = triton.testing.do_bench_cudagraph(calls, rep=20, return_mode="median")
        except REFUSED as failure:
            record.append({"what": str(launch), "failed": type(failure).__name__})
            continue
        us = ms * 1000 / CALLS
        record.append({"what": str(launch), "us": us, "error": error})
        if error < 1e-2 and us < best[0]:
            best = us, launch
    say(f"flash {width}: {record[0].get('us')} -> {best[0]:.2f} us  {best[1]}")
    found = [("flash", (name, width), best[1])]
    return {"work": f"flash {width}", "tried": record, "entries": _written(found)}


def _written(entries: Iterable[Entry]) -> list[Any]:
    return [[table, list(key), dataclasses.asdict(launch)] for table, key, launch in entries]


def read(path: Path) -> None:
    """Put the entries of a file that this benchmark wrote into the tables."""
    for result in json.loads(path.read_text())["results"]:
        for table, key, launch in result["entries"]:
            TABLES[table][tuple(key)] = Launch(**launch)


def main() -> None:
    """Tune for each workload, print, write JSON."""
    parser = argparse.ArgumentParser(description="Tune the own kernels where they run.")
    parser.add_argument("--out", type=Path, required=True, help="JSON file of all measurements")
    parser.add_argument("--rows", default="11", help="comma-separated: rows, pi05:rows; or none")
    parser.add_argument("--seconds", default="100", help="time for each, comma-separated")
    parser.add_argument("--flash", type=float, default=0, metavar="SECONDS",
                        help="time for each of both other attentions")  # fmt: skip
    options = parser.parse_args()
    pool = ProcessPoolExecutor(
        _workers(), multiprocessing.get_context("spawn"), initializer=_start_worker
    )
    for _ in range(_workers()):
        pool.submit(_ready)  # the workers import while the first chain is built
    report: dict[str, Any] = {"device": torch.cuda.get_device_name(), "torch": torch.__version__}
    report["results"] = []
    say = partial(print, flush=True)
    works = [Workload.parse(text) for text in options.rows.split(",") if text != "none"]
    seconds = [float(text) for text in options.seconds.split(",")]
    jobs: list[Callable[[], dict[str, Any]]] = [
        partial(tune, work, seconds[min(index, len(seconds) - 1)], pool, say)
        for index, work in enumerate(works)
    ]
    if options.flash:
        jobs += [partial(tune_flash, width, options.flash, pool, say) for width in FLASHES]
    for job in jobs:
        result = job()
        report["results"].append(result)
        options.out.write_text(json.dumps(report, indent=1))
        for table, key, launch in result["entries"]:
            say(f"{table} {tuple(key)}: {Launch(**launch)},")
    os._exit(0)  # workers may still compile what nobody waits for


if __name__ == "__main__":
    main()
