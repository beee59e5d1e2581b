"""What the guard refuses and what it sees, over many configurations; each result as it comes.

    python -m benchmarks.guard honest --runs 200 --out honest.jsonl
    python -m benchmarks.guard rounding --runs 60 --out rounding.jsonl
    python -m benchmarks.guard margins --seeds 0 1 2 3 --out margins.jsonl
    python -m benchmarks.guard own fp8 model=pi0 platform=cuda --out own.jsonl
    python -m benchmarks.guard cost preset=h100 --out cost.jsonl

`honest` draws weights, workload, precision and knobs at random, builds the policy, and asks all
that a trial is asked: structure, own precision, timed calls. Whatever ends as wrong is a false
alarm. `rounding` says how far honest configurations in FP8 are from float32, and how far their
emulation is, on each of some inputs. `margins` measures by how many times its tolerance each
mutation is caught, with both small models, one row and three, and four seeds of weights and inputs;
`own` asks each mutation in one precision by itself, with a model and workload as for a sweep.
`cost` runs one configuration three times as a trial and says what share of it the guard took, at
first and with the structure known. The exit code is 1 after a false alarm, or where a mutation is
caught by less than is asked of it.
"""

from __future__ import annotations

import argparse
import gc
import itertools
import json
import random
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from openpi_opt import cli, runtime
from openpi_opt.config import Config
from openpi_opt.errors import RefusedError
from openpi_opt.guarding import power, question, reference, structure
from openpi_opt.guarding.cases import TIMED
from openpi_opt.knobs import BY_NAME, KNOBS
from openpi_opt.machine import probe
from openpi_opt.measure import clock, guard
from openpi_opt.pi0.config import MODELS
from openpi_opt.pi0.workload import make_inputs
from openpi_opt.result import GuardReport
from openpi_opt.space.compose import compose

# Of the honest runs. Few are compiled: Inductor takes longer than all the rest.
SHARES = {"flexible": 0.5, "compiled": 0.04, "lossy": 0.25}
SCOPES = ("stage", "call", "layer")
INPUTS = 24  # that the rounding of FP8 is looked at on
CALLS = TIMED + 8  # that are timed: those with a reference, and some that may be made again
KINDS: tuple[power.Kind, ...] = ("float32", "bfloat16", "fp8")
ATTENTION = ("eager", "sdpa", "flash", "math", "efficient", "cudnn", "triton")


def drawn(
    dice: random.Random, model: str, platform: str, shares: Mapping[str, float] = SHARES
) -> dict[str, Any]:
    """A configuration at random; what this machine refuses is drawn again by the caller.

    `shares` says how many are in a flexible layout, compiled, and in FP8.
    """
    cameras = [dice.random() < 0.7 for _ in range(dice.choice([1, 1, 2, 3]))]
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
            "layout": "flexible" if dice.random() < shares["flexible"] else "exact",
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
    if dice.random() < 0.3:
        raw["elementwise"] = {"backend": "triton"}
    if dice.random() < 0.3:
        raw["gemm"] = {"backend": "triton_skinny"}
    if dice.random() < shares["lossy"]:
        raw |= {"blas": {"backend": "fp8"}, "precision": {"dtype": "bfloat16"}, "gemm": {}}
        raw["fusion"]["vision_mlp"] = False
    if dice.random() < shares["compiled"]:
        raw["compile"] = {"mode": "default", "scope": dice.choice(SCOPES)}
    if dice.random() < 0.5:
        raw["graph"] = {"mode": "manual"}
    return raw


def honest(
    options: argparse.Namespace, shares: Mapping[str, float]
) -> Iterator[tuple[Config, str]]:
    """Configurations that no knob refuses, with the name of the device's kind."""
    machine, dice = probe(), random.Random(options.seed)
    platform = options.platform if options.platform != "auto" else machine.usable_device()
    gpus = machine.gpus_for(platform)
    while True:
        cfg = Config.parse(drawn(dice, options.model, platform, shares)).resolved(machine)
        if all(knob.check(cfg, machine) is None for knob in KNOBS):
            yield cfg, gpus[0].arch if gpus else machine.cpu


def run(cfg: Config, arch: str, folder: Path) -> tuple[str, dict[str, Any]]:
    """ok, wrong or refused, with what the guard said."""
    torch._dynamo.reset()
    gc.collect()
    device = runtime.torch_device(cfg)
    try:
        asked = question.ask(runtime.build_policy(cfg, device), cfg, arch, folder)
        seen = asked.structure()
        asked = asked.knowing(seen)
        if not seen.passed:
            return "wrong", asked.wrong_structure().model_dump()
        prepared = runtime.apply_knobs(runtime.build_policy(cfg, device), cfg)
        report = asked.check(prepared.call, prepared.policy.layout, ordinary=True)
    except RefusedError as refusal:
        return "refused", {"reason": refusal.reason}
    if report.passed:
        witness = asked.witness(prepared.policy.layout)
        witness.begin(prepared.call)
        timing = witness.time(prepared.call, CALLS, cfg.device, compared=True)
        wall_ms = timing.wall_samples_ms
        report = asked.judge(witness, prepared.call, prepared.policy.layout, wall_ms)
    return ("ok" if report.passed else "wrong"), report.model_dump()


def main(argv: Sequence[str] | None = None) -> int:
    """Run, write a line for each result as it comes, print what is not as it must be."""
    options = _parser().parse_args(argv)
    found: bool = options.run(options)
    return 0 if found else 1


def run_honest(options: argparse.Namespace) -> bool:
    """Whether `options.runs` honest configurations pass."""
    rows: list[dict[str, Any]] = []
    for cfg, arch in honest(options, {name: getattr(options, name) for name in SHARES}):
        with tempfile.TemporaryDirectory() as folder:
            outcome, report = run(cfg, arch, Path(folder))
        rows.append({"outcome": outcome, "labels": cfg.labels(), "report": report,
                     "workload": cfg.workload.model_dump(mode="json"),
                     "model": cfg.model.name, "weights": cfg.weights.seed})  # fmt: skip
        _add(options.out, rows[-1])
        if outcome == "wrong":
            said = guard.explain(GuardReport.model_validate(report))
            print("false alarm:", said, rows[-1], flush=True)
        if sum(row["outcome"] != "refused" for row in rows) == options.runs:
            break
    print(summary(rows))
    return all(row["outcome"] != "wrong" for row in rows)


def run_rounding(options: argparse.Namespace) -> bool:
    """Write how far honest policies in FP8 and their emulations are from float32, for inputs."""
    drawing = honest(options, {"flexible": 0.0, "compiled": 0.0, "lossy": 1.0})
    for cfg, _ in itertools.islice(drawing, options.runs):
        device, workload = runtime.torch_device(cfg), runtime.workload_of(cfg)
        seeds = range(cfg.workload.seed, cfg.workload.seed + INPUTS)
        config = MODELS[cfg.model.name]
        inputs = [make_inputs(workload, config, seed, "cpu") for seed in seeds]
        exact = reference.plain_actions(runtime.build_policy(cfg, device), inputs)
        judge = structure.Judge(torch.bfloat16, emulating=True)
        form = structure.float32_form(cfg)
        calls = {
            "policy": runtime.apply_knobs(runtime.build_policy(cfg, device), cfg).call,
            "emulation": structure.apply(runtime.build_policy(cfg, device), cfg, form, judge).call,
        }
        far = {
            name: [
                guard.distance(call(clock.upload(item, device)), actions).rel_l2
                for item, actions in zip(inputs, exact, strict=True)
            ]
            for name, call in calls.items()
        }
        place = {"model": cfg.model.name, "weights": cfg.weights.seed}
        labels, shape = cfg.labels(), cfg.workload.model_dump(mode="json")
        _add(options.out, {**place, "labels": labels, "workload": shape, **far})
        gc.collect()
    return True


def run_margins(options: argparse.Namespace) -> bool:
    """Whether every mutation shows what is asked of it, in every context."""
    machine, weak = probe(), 0
    for seed in options.seeds:
        for model in options.models:
            for batch in options.batches:
                cfg = Config.parse(context(model, batch, seed)).resolved(machine)
                place = {"model": model, "batch": batch, "seed": seed}

                def keep(check: str, mutation: str, multiple: float) -> None:
                    row = {"check": check, "mutation": mutation, "multiple": multiple}
                    _add(options.out, {**place, **row})  # noqa: B023  called before the next one

                with tempfile.TemporaryDirectory() as folder:
                    meter = power.Meter(cfg, machine.cpu, Path(folder), few=1)
                    found = meter.measure(KINDS, keep=keep)
                few = [row for row in found.rows if not row.enough]
                weak += len(few)
                least = ", ".join(
                    f"{kind} {found.smallest(kind).multiple:.1f} ({found.smallest(kind).name})"
                    for kind in KINDS
                )
                print(f"{model}, batch {batch}, seed {seed}: {found.seconds:.0f} s; least {least}")
                for row in few:
                    print(f"  only {row.multiple:.2f} times in {row.kind}: {row.name}", flush=True)
    return weak == 0


def run_own(options: argparse.Namespace) -> bool:
    """Whether the unchanged policy passes in one precision; writes each mutation as it comes."""
    cfg, machine = compose(list(options.overrides)).resolved(probe()), probe()
    gpus = machine.gpus_for(cfg.device)

    def keep(check: str, mutation: str, multiple: float) -> None:
        _add(options.out, {"check": check, "mutation": mutation, "multiple": multiple})

    with tempfile.TemporaryDirectory() as folder:
        meter = power.Meter(cfg, gpus[0].arch if gpus else machine.cpu, Path(folder), few=1)
        meter.keep = keep
        plain, found = meter.own(options.kind)
    share = meter.honest[options.kind]
    few = sum(multiple < 1.0 for multiple in found.values())
    print(f"{cfg.model.name} in {options.kind}: unchanged {share:.0%} of its tolerance; {few} of "
          f"{len(found)} mutations are left to the structure; plain eager {plain:.2%}")  # fmt: skip
    return share <= 1.0


def run_cost(options: argparse.Namespace) -> bool:
    """Whether both trials are ok."""
    cfg = compose(list(options.overrides)).resolved(probe())
    right = True
    with tempfile.TemporaryDirectory() as name:
        config, result = Path(name) / "config.json", Path(name) / "result.json"
        config.write_text(json.dumps(cfg.dump()), encoding="utf-8")
        command = [sys.executable, "-m", "openpi_opt.trial", "--config", str(config)]
        command += ["--result", str(result), "--references", str(Path(name) / "references")]
        for which in ("first", "again", "again"):
            subprocess.run(command, check=True, stderr=subprocess.DEVNULL)
            document = json.loads(result.read_text(encoding="utf-8"))
            spent = document["phase_seconds"]
            total = sum(spent.values())
            guards = {name: spent.get(name, 0.0) for name in ("reference", "guard")}
            print(
                f"{which}: {document['outcome']}, {total:.1f} s, of which "
                + ", ".join(f"{k} {v:.2f} s ({v / total:.1%})" for k, v in guards.items())
                + held(document),
                flush=True,
            )
            _add(options.out, {"which": which, "overrides": options.overrides, **document})
            right = right and document["outcome"] == "ok"
    return right


def held(document: dict[str, Any]) -> str:
    """What the guard kept of the timed calls, in words; nothing where there were none."""
    timed = document.get("guard", {}).get("timed")
    if timed is None:
        return ""
    return (
        f"; of {timed['calls']} timed calls, {timed['other_masks']} with other masks, it held "
        f"{timed['held_mib']:.2f} MiB on the device, and {timed['inputs_mib']:.1f} MiB of inputs "
        "on the host"
    )


def context(model: str, batch: int, seed: int) -> dict[str, Any]:
    """A small workload in which every mutation is one: masked camera, padding, several steps."""
    return {
        "model": {"name": model},
        "platform": {"device": "cpu"},
        "weights": {"seed": seed},
        "workload": {
            "active_cameras": [True, False],
            "prompt_slots": 8,
            "prompt_tokens": 5,
            "horizon": 4,
            "steps": 4,
            "batch_size": batch,
            "seed": seed,
        },
    }


def _add(file: Path, row: dict[str, Any]) -> None:
    with file.open("a", encoding="utf-8") as stream:
        stream.write(json.dumps(row) + "\n")


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
        description="False alarms and margins of the guard, over many configurations.",
    )
    verbs = parser.add_subparsers(required=True)
    runs = verbs.add_parser("honest", help="how often an honest configuration is refused")
    for name, share in SHARES.items():
        runs.add_argument(f"--{name}", type=float, default=share, help="share of the runs")
    runs.set_defaults(run=run_honest)
    rounding = verbs.add_parser("rounding", help="how far honest ones in FP8 are from float32")
    rounding.set_defaults(run=run_rounding)
    for each in (runs, rounding):
        each.add_argument("--model", choices=("pi0_mini", "pi0"), default="pi0_mini")
        each.add_argument("--platform", choices=("auto", "cpu", "cuda", "rocm"), default="auto")
        each.add_argument("--runs", type=cli.at_least(1), default=200)
        each.add_argument("--seed", type=int, default=0)
    margins = verbs.add_parser("margins", help="how many times its tolerance a mistake is caught")
    margins.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3])
    margins.add_argument("--models", nargs="+", default=["pi0_mini", "pi05_mini"])
    margins.add_argument("--batches", type=int, nargs="+", default=[1, 3])
    margins.set_defaults(run=run_margins)
    cost = verbs.add_parser("cost", help="the share of a trial that the guard takes")
    cost.add_argument("overrides", nargs="*", help="as for sweep")
    cost.set_defaults(run=run_cost)
    own = verbs.add_parser("own", help="what one precision shows of each mistake by itself")
    own.add_argument("kind", choices=KINDS[1:])
    own.add_argument("overrides", nargs="*", help="as for sweep")
    own.set_defaults(run=run_own)
    for each in (runs, rounding, margins, own, cost):
        each.add_argument("--out", type=Path, required=True, help="a JSON line for each result")
    return parser


if __name__ == "__main__":
    cli.run(main)
