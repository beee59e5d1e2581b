"""False alarms of the guard: honest configurations at random, asked all that a trial is asked.

    python -m benchmarks.guard --runs 200 --out honest.json

Each run draws weights, workload, precision and knobs, builds the policy, and goes through the
structure, its own precision and timed calls. Whatever ends as wrong is a false alarm. The exit code
is 1 if there is one.
"""

from __future__ import annotations

import argparse
import gc
import json
import random
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from openpi_opt import cli, runtime
from openpi_opt.config import MIN_ITERATIONS, MIN_WARMUP, Config
from openpi_opt.errors import RefusedError
from openpi_opt.guarding import question
from openpi_opt.knobs import BY_NAME, KNOBS
from openpi_opt.machine import Machine, probe
from openpi_opt.measure import clock, guard

COMPILED = 0.04  # of the runs: Inductor takes longer than all the rest
ATTENTION = ("eager", "sdpa", "flash", "math", "efficient", "cudnn", "triton")


def drawn(dice: random.Random, model: str, platform: str) -> dict[str, Any]:
    """A configuration at random; what this machine refuses is drawn again by the caller."""
    cameras = [dice.random() < 0.7 for _ in range(dice.choice([1, 2, 3]))]
    cameras[dice.randrange(len(cameras))] = True
    slots = dice.choice([4, 6, 12, 28])
    families = {"pi0": ["pi0", "pi05"], "pi0_mini": ["pi0_mini", "pi05_mini"]}
    raw: dict[str, Any] = {
        "model": {"name": dice.choice(families.get(model, [model]))},
        "platform": {"device": platform},
        "weights": {"seed": dice.randrange(1000)},
        "workload": {
            "active_cameras": cameras,
            "prompt_slots": slots,
            "prompt_tokens": dice.randint(1, slots),
            "horizon": dice.choice([3, 5, 10]),
            "steps": dice.choice([1, 2, 4]),
            "batch_size": dice.choice([1, 1, 1, 2, 3]),
            "seed": dice.randrange(1000),
        },
        "precision": {"dtype": dice.choice(["bfloat16", "bfloat16", "float32", "float16"])},
        "attention": {stage: dice.choice(ATTENTION) for stage in ("vision", "prefill", "denoise")},
        "vision": {
            "cameras": dice.choice(["batched", "separate"]),
            "skip_masked": dice.random() < 0.5,
        },
    }
    for knob in ("simplify", "fusion"):
        fields = BY_NAME[knob].options_type.model_fields
        raw[knob] = {name: dice.random() < 0.5 for name in fields}
    if dice.random() < 0.25:
        raw["blas"] = {"backend": "fp8"}
    if dice.random() < 0.3:
        raw["elementwise"] = {"backend": "triton"}
    if dice.random() < 0.3:
        raw["gemm"] = {"backend": "triton_skinny"}
    if dice.random() < COMPILED:
        raw["compile"] = {"mode": "default"}
    if dice.random() < 0.5:
        raw["graph"] = {"mode": "manual"}
    return raw


def honest(dice: random.Random, model: str, platform: str, machine: Machine) -> Config:
    """A configuration that no knob refuses."""
    while True:
        cfg = Config.parse(drawn(dice, model, platform)).resolved(machine)
        if all(knob.check(cfg, machine) is None for knob in KNOBS):
            return cfg


def run(cfg: Config, arch: str, folder: Path) -> tuple[str, dict[str, Any]]:
    """ok, wrong or refused, with what the guard said."""
    torch._dynamo.reset()
    gc.collect()
    device = runtime.torch_device(cfg)
    try:
        asked = question.ask(runtime.build_policy(cfg, device), cfg, arch, folder)
        seen = asked.structure()
        if not seen.passed:
            return "wrong", asked.wrong_structure(seen).model_dump()
        prepared = runtime.apply_knobs(runtime.build_policy(cfg, device), cfg)
        report = asked.check(prepared.call, prepared.policy.layout, seen)
    except RefusedError as refusal:
        return "refused", {"reason": refusal.reason}
    if report.passed:
        witness = asked.witness()
        witness.begin(MIN_ITERATIONS, compared=True)
        timing = clock.time_calls(
            prepared.call, witness, MIN_WARMUP, MIN_ITERATIONS, asked.cfg.device
        )
        watched = asked.judge(witness, prepared.call, timing.wall_samples_ms)
        report = report.model_copy(update={"timed": watched, "passed": watched.passed})
    found = report.model_dump()
    if not report.passed:
        found["reason"] = guard.explain(report)
    return ("ok" if report.passed else "wrong"), found


def main(argv: Sequence[str] | None = None) -> int:
    """Run, print each false alarm and how near to its tolerance the honest ones came."""
    options = _parser().parse_args(argv)
    machine, started = probe(), time.monotonic()
    dice = random.Random(options.seed)
    rows: list[dict[str, Any]] = []
    platform = options.platform if options.platform != "auto" else machine.usable_device()
    gpus = machine.gpus_for(platform)
    arch = gpus[0].arch if gpus else machine.cpu
    while sum(row["outcome"] != "refused" for row in rows) < options.runs:
        cfg = honest(dice, options.model, platform, machine)
        with tempfile.TemporaryDirectory() as folder:
            outcome, report = run(cfg, arch, Path(folder))
        rows.append({"outcome": outcome, "labels": cfg.labels(), "report": report,
                     "workload": cfg.workload.model_dump(mode="json"),
                     "model": cfg.model.name, "weights": cfg.weights.seed})  # fmt: skip
        if outcome == "wrong":
            print("false alarm:", report.get("reason") or report["structure"]["problem"], rows[-1])
        seconds = round(time.monotonic() - started, 1)
        document = {"arch": arch, "torch": torch.__version__, "seconds": seconds, "runs": rows}
        options.out.write_text(json.dumps(document, indent=1), encoding="utf-8")
    print(summary(rows))
    return 1 if any(row["outcome"] == "wrong" for row in rows) else 0


def summary(rows: list[dict[str, Any]]) -> str:
    """Counts, and the largest shares of a tolerance among those that passed."""
    passed = [row["report"] for row in rows if row["outcome"] == "ok"]
    wrong = sum(row["outcome"] == "wrong" for row in rows)
    own = max((r["rel_l2"] / r["tolerance"] for r in passed), default=0.0)
    form = max((r["structure"]["rel_l2"] / r["structure"]["tolerance"] for r in passed), default=0)
    large = max((r["structure"]["large_logits_rel_l2"] for r in passed), default=0.0)
    timed = max((r["timed"]["rel_l2"] / r["timed"]["tolerance"] for r in passed), default=0.0)
    return (
        f"{len(passed)} ok, {wrong} false alarms. Largest shares of the tolerance: own precision "
        f"{own:.0%}, float32 form {form:.0%} (second weights {large:.1e}), timed calls {timed:.0%}"
    )


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.guard",
        description="Honest configurations drawn at random: how often the guard refuses one.",
    )
    parser.add_argument("--model", choices=("pi0_mini", "pi0"), default="pi0_mini")
    parser.add_argument("--platform", choices=("auto", "cpu", "cuda", "rocm"), default="auto")
    parser.add_argument("--runs", type=cli.at_least(1), default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, required=True, help="JSON file of all reports")
    return parser


if __name__ == "__main__":
    cli.run(main)
