"""What the guard admits and what it catches, on one device, as two tables.

    python -m benchmarks.guard --model pi0_mini --platform cpu --out guard.json

Honest: how far each exact variant is from the float32 reference, as a share of the tolerance of
its precision. Mutations: how many times the tolerance each mistake of `benchmarks.mutations` moves
the actions. Both go through `openpi_opt.measure.guard`, with the workload that has everything to
get wrong. Exit code 1 when a variant fails or a mutation stays below its margin.
"""

from __future__ import annotations

import argparse
import gc
import json
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
import yaml
from rich import box
from rich.console import Console
from rich.table import Table

from benchmarks.mutations import WORKLOAD, Mutation, catalogue
from openpi_opt import cli, runtime
from openpi_opt.config import Config
from openpi_opt.errors import RefusedError
from openpi_opt.knobs import BY_NAME, KNOBS
from openpi_opt.machine import Machine, probe
from openpi_opt.measure import guard
from openpi_opt.paths import conf_dir
from openpi_opt.pi0.config import MODELS
from openpi_opt.pi0.inputs import Inputs
from openpi_opt.pi0.policy import Pi0Policy
from openpi_opt.pi0.workload import Workload, make_inputs
from openpi_opt.track.fingerprint import fingerprint

PRECISIONS = ("float32", "bfloat16", "float16")
MUTATED = ("float32", "bfloat16")
# Least multiple of the tolerance; in 16 bits subtle mistakes have a smaller one.
MARGIN = {"float32": 100.0, "bfloat16": 3.0}
SUBTLE_MARGIN = {"float32": 100.0, "bfloat16": 1.5}
# Knobs whose options are tried one by one; `precision` spans the columns.
HONEST_KNOBS = ("simplify", "fusion", "vision", "attention", "elementwise", "gemm", "blas", "graph")
PREVIOUS_SEED = 1000

Cells = dict[str, dict[str, str]]  # row -> precision -> text


@dataclass(frozen=True)
class Honest:
    """One variant in one precision; `outcome` is ok, wrong, or why it did not run."""

    name: str
    precision: str
    outcome: str
    lossy: bool = False
    rel_l2: float | None = None
    tolerance: float | None = None


@dataclass(frozen=True)
class Caught:
    """One mutation in one precision; `rel_l2` is None for what is not finite."""

    name: str
    precision: str
    subtle: bool
    rel_l2: float | None
    tolerance: float
    margin: float | None
    """least multiple of the tolerance; None where none is asked for"""

    @property
    def multiple(self) -> float:
        """How many tolerances away; infinite where the actions are not finite."""
        return float("inf") if self.rel_l2 is None else self.rel_l2 / self.tolerance

    @property
    def missed(self) -> bool:
        """Whether it stays below its margin."""
        return self.margin is not None and self.multiple < self.margin


@dataclass
class Report:
    """All that was found, as it goes to the file."""

    model: str
    seed: int
    inputs: int
    fingerprint: dict[str, Any]
    torch: str = torch.__version__
    plain: dict[str, float] = field(default_factory=dict)
    """distance of the plain eager policy from float32, for each precision"""
    honest: list[Honest] = field(default_factory=list)
    mutations: list[Caught] = field(default_factory=list)
    seconds: float = 0.0


class Bench:
    """The policies of one model on one device, and their references."""

    def __init__(
        self,
        model: str,
        platform: str,
        seed: int,
        inputs: int,
        machine: Machine,
        workload: Workload = WORKLOAD,
    ):
        self.machine = machine
        self.raw: dict[str, Any] = {
            "model": {"name": model},
            "platform": {"device": platform},
            "weights": {"seed": seed},
            "workload": {**asdict(workload), "seed": seed},
            "guard": {"inputs": inputs},
        }
        self.device = runtime.torch_device(self.config("float32"))
        gpus = machine.gpus_for(self.config("float32").device)
        self.arch = gpus[0].arch if gpus else machine.cpu
        self.inputs: list[Inputs] = []
        self.references: dict[str, guard.Reference] = {}

    def config(self, precision: str, **knobs: Any) -> Config:
        """The configuration of a variant, resolved for this machine."""
        raw = {**self.raw, "precision": {"dtype": precision}, **knobs}
        return Config.parse(raw).resolved(self.machine)

    def build(self) -> Pi0Policy:
        """A fresh float32 policy; what the policy before held is freed first."""
        if self.device.type != "cpu":  # the host has room for two, and it takes half a second
            gc.collect()
        return runtime.build_policy(self.config("float32"), self.device)

    def plain(self, precision: str, folder: Path) -> Pi0Policy:
        """The plain policy in a precision, after computing the references of that precision."""
        cfg, policy = self.config(precision), self.build()
        if not self.inputs:
            seeds = range(cfg.workload.seed, cfg.workload.seed + cfg.guard.inputs)
            workload = runtime.workload_of(cfg)
            self.inputs = [make_inputs(workload, policy.config, s, self.device) for s in seeds]
        self.references[precision] = guard.obtain(policy, self.inputs, cfg, self.arch, folder)
        return policy

    def honest(self, name: str, precision: str, knobs: dict[str, Any]) -> Honest:
        """Apply the knobs of a variant and ask the guard."""
        cfg = self.config(precision, **knobs)
        for knob in KNOBS:
            refusal = knob.check(cfg, self.machine)
            if refusal is not None:
                return Honest(name, precision, f"{refusal.outcome}: {refusal.reason}")
        try:
            call = runtime.apply_knobs(self.build(), cfg).call
            call(self.inputs[0])  # as a trial: warm, and captured where that is asked for
            reference = self.references[precision]
            found = guard.check(call, self.inputs, reference, cfg.guard, cfg.lossy())
        except RefusedError as refusal:
            return Honest(name, precision, f"{refusal.outcome}: {refusal.reason}")
        outcome = "ok" if found.passed else "wrong"
        return Honest(name, precision, outcome, cfg.lossy(), found.rel_l2, found.tolerance)

    def mutated(self, policy: Pi0Policy, precision: str) -> Iterator[Caught]:
        """Every mutation of the plain policy, which is left as it was."""
        cfg = self.config(precision)
        BY_NAME["precision"].configure(cfg)
        workload = runtime.workload_of(cfg)
        seed = self.raw["workload"]["seed"] + PREVIOUS_SEED
        previous = make_inputs(workload, policy.config, seed, self.device)
        for mutation in catalogue(policy, workload):
            call = mutation.candidate(policy, previous)
            with torch.no_grad():
                found = guard.check(call, self.inputs, self.references[precision], cfg.guard)
            margin = margin_of(mutation, precision)
            yield Caught(
                mutation.name, precision, mutation.subtle, found.rel_l2, found.tolerance, margin
            )


def margin_of(mutation: Mutation, precision: str) -> float | None:
    """The least multiple of the tolerance by which a mutation must be caught."""
    if mutation.float32_only and precision != "float32":
        return None
    return (SUBTLE_MARGIN if mutation.subtle else MARGIN)[precision]


def variants(platform: str) -> dict[str, dict[str, Any]]:
    """Every option of the knobs, every exact switch alone, and all of them together.

    Choices of a BLAS library and of aiter's products are left out: they are process-wide.
    """
    found: dict[str, dict[str, Any]] = {"plain": {}}
    for knob in HONEST_KNOBS:
        default = BY_NAME[knob].options_type()
        for file in sorted((conf_dir() / knob).glob("*.yaml")):
            raw = yaml.safe_load(file.read_text(encoding="utf-8"))
            options = BY_NAME[knob].options_type(**raw)
            if options == default or (knob == "blas" and raw["backend"] != "fp8"):
                continue
            found[f"{knob}={file.stem}"] = {knob: raw}
    for knob in ("simplify", "fusion"):
        for name, value in BY_NAME[knob].options_type().model_dump().items():
            if value is False and name != "expert_layer":
                found[f"{knob}.{name}"] = {knob: {name: True}}
    exact = dict.fromkeys(BY_NAME["simplify"].options_type.model_fields, True)
    fused = {"qkv": True, "gate_up": True, "vision_qkv": True}
    stages = ("vision", "prefill", "denoise")
    together: dict[str, Any] = {
        "simplify": exact,
        "fusion": fused,
        "vision": {"skip_masked": True},
        "attention": dict.fromkeys(stages, "sdpa"),
    }
    found["all exact, sdpa"] = together
    if platform != "cpu":
        found["all exact, own kernels"] = {
            **together,
            "fusion": {**fused, "expert_layer": True},
            "attention": dict.fromkeys(stages, "triton"),
            "elementwise": {"backend": "triton"},
            "gemm": {"backend": "triton_skinny"},
            "graph": {"mode": "manual"},
        }
    return found


def honest_table(report: Report) -> Table:
    """Rows are variants, columns precisions: distance, and share of the tolerance."""
    cells: Cells = {}
    for row in report.honest:
        if row.rel_l2 is None or row.tolerance is None:
            text = row.outcome.partition(":")[0]
        else:
            share = row.rel_l2 / row.tolerance
            words = [f"{row.rel_l2:.2e} ({share:.0%})"]
            text = " ".join([*(["lossy"] if row.lossy else []), *words])
        cells.setdefault(row.name, {})[row.precision] = (
            text if row.outcome != "wrong" else f"WRONG {text}"
        )
    ran = {
        name: found
        for name, found in cells.items()
        if any("(" in text or "wrong" in text for text in found.values())
    }
    return _by_precision("variant", ran)


def mutation_table(report: Report) -> Table:
    """Rows are mutations, columns precisions: multiples of the tolerance."""
    cells: Cells = {}
    for row in report.mutations:
        text = "not finite" if row.rel_l2 is None else f"{row.multiple:,.1f} x"
        text = f"BELOW {row.margin:g} x: {text}" if row.missed else text
        cells.setdefault(row.name + (" (s)" if row.subtle else ""), {})[row.precision] = (
            text if row.margin is not None else f"({text})"
        )
    return _by_precision("mutation", cells)


def _by_precision(what: str, cells: Cells) -> Table:
    precisions = [p for p in PRECISIONS if any(p in found for found in cells.values())]
    table = Table(box=box.MARKDOWN)
    for column in (what, *precisions):
        table.add_column(column, no_wrap=True, justify="left" if column == what else "right")
    for name, found in cells.items():
        table.add_row(name, *(found.get(precision, "") for precision in precisions))
    return table


def main(argv: Sequence[str] | None = None) -> int:
    """Run both, print the tables, write JSON after each precision."""
    options = _parser().parse_args(argv)
    precisions = options.precisions.split(",")
    started, machine = time.monotonic(), probe()
    bench = Bench(options.model, options.platform, options.seed, options.inputs, machine)
    platform = bench.config("float32").platform
    found = fingerprint(machine, platform)
    report = Report(options.model, options.seed, options.inputs, found)

    def save() -> None:
        report.seconds = round(time.monotonic() - started, 1)
        options.out.write_text(json.dumps(asdict(report), indent=1), encoding="utf-8")

    with tempfile.TemporaryDirectory() as folder:
        for precision in precisions:
            policy = bench.plain(precision, Path(folder))
            report.plain[precision] = bench.references[precision].plain_rel_l2
            if precision in MUTATED:
                report.mutations += bench.mutated(policy, precision)
            del policy
            save()
    for precision in precisions:
        for name, knobs in variants(bench.config("float32").device).items():
            report.honest.append(bench.honest(name, precision, knobs))
        save()
    console = Console(width=None if sys.stdout.isatty() else 120)
    where = found["gpu"]["name"] if found["gpu"] else f"CPU ({found['cpu']})"
    console.print(f"{options.model} on {where}, torch {report.torch}, {report.seconds:.0f} s")
    distances = ", ".join(f"{name} {value:.3%}" for name, value in report.plain.items())
    console.print(f"plain eager policy, distance from float32: {distances}\n")
    console.print("Honest variants: distance (share of the tolerance)", honest_table(report), "")
    console.print("Mutations: multiples of the tolerance", mutation_table(report))
    wrong = [f"{row.name} in {row.precision}" for row in report.honest if row.outcome == "wrong"]
    missed = [f"{row.name} in {row.precision}" for row in report.mutations if row.missed]
    for words, names in (("honest but refused", wrong), ("below its margin", missed)):
        if names:
            console.print(f"{words}: {', '.join(names)}")
    return 1 if wrong or missed else 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.guard",
        description="Distances of honest variants and of mutations, as the guard sees them.",
    )
    parser.add_argument("--model", choices=tuple(MODELS), default="pi0_mini")
    parser.add_argument("--platform", choices=("auto", "cpu", "cuda", "rocm"), default="auto")
    parser.add_argument("--out", type=Path, required=True, help="JSON file of all distances")
    parser.add_argument("--seed", type=int, default=0, help="of weights and inputs")
    parser.add_argument("--inputs", type=int, default=3, help="inputs of the guard")
    parser.add_argument("--precisions", default=",".join(PRECISIONS), help="comma-separated")
    return parser


if __name__ == "__main__":
    cli.run(main)
