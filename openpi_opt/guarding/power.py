"""How much the guard sees: mutations of the policy at hand, in multiples of the tolerance.

A guard is worth what it catches with these weights and this workload. Every mutation of
`guarding.mutations` goes through what a candidate goes through:

- `form`: the structure in float32, on the cases, and where that shows less than `FORM_ENOUGH` with
  the second weights (`weights.provoke`);
- `own`: the candidate's own precision, on the cases; of a mutation that the form shows anyway, on
  the first `FEW` of them.

The guard catches a mutation by the larger of the two. Cases are asked in order until one shows
enough, so a multiple is what the guard sees at least. On top of FP8 the form is that of float32, in
which its operands are not rounded.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from filelock import FileLock
from pydantic import BaseModel, ConfigDict
from torch import Tensor

from openpi_opt import runtime
from openpi_opt.config import Config
from openpi_opt.guarding import structure
from openpi_opt.guarding.mutations import Mutation, catalogue, on_inputs
from openpi_opt.guarding.question import Question, ask, power_path
from openpi_opt.knobs import BY_NAME
from openpi_opt.measure import guard
from openpi_opt.measure.clock import upload
from openpi_opt.pi0 import weights
from openpi_opt.pi0.config import MODELS
from openpi_opt.pi0.inputs import Inputs
from openpi_opt.pi0.policy import Pi0Policy
from openpi_opt.pi0.workload import make_inputs
from openpi_opt.result import GuardPower, write_atomic

Kind = Literal["float32", "bfloat16", "float16", "fp8"]
KINDS: tuple[Kind, ...] = ("float32", "bfloat16", "float16", "fp8")

# Gets a check, a mutation, and how many times its tolerance the check sees it.
Keep = Callable[[str, str, float], None]

# What a mutation must show: in float32, and in anything coarser.
FORM_ENOUGH, OWN_ENOUGH = 50.0, 1.5
FEW = 2
# Caught by the least in the models at hand, the weakest first: what is asked where time is short.
WEAKEST = (
    *("eps of 1e-3", "first key dropped in prefill", "step skipped where little changed"),
    *("erf GELU", "mask of -10", "keys padded to 8 in denoise", "first key dropped in denoise"),
    *("int8 keys and values", "vision reused for a nearly equal frame", "integrated in bfloat16"),
    *("one action dimension +5%", "last key dropped in vision", "logits soft-capped at 50"),
    *("state sees the actions", "int8 weights in vision", "keys padded to 64 in prefill"),
)
INFINITE = 1e9  # a multiple where the actions are not finite, or have another shape
_PREVIOUS_SEED = 5_000_011


class Caught(BaseModel):
    """One mutation in one precision; `own` is None in float32, where it is the form."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str
    kind: Kind
    form: float
    own: float | None

    @property
    def multiple(self) -> float:
        """How many times its tolerance the guard sees it."""
        return max(self.form, self.own or 0.0)

    @property
    def enough(self) -> bool:
        """Whether that is what is asked of the precision."""
        return self.multiple >= (FORM_ENOUGH if self.kind == "float32" else OWN_ENOUGH)


class Power(BaseModel):
    """What the guard sees with one model, its weights and a workload."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    key: str
    model: str
    seconds: float
    plain_rel_l2: dict[Kind, float]
    """distance of the plain policy from float32, by precision"""
    honest: dict[str, float]
    """share of the tolerance that the unchanged policy takes, by precision and check"""
    rows: list[Caught]
    kinds: dict[str, GuardPower]
    """what trials of a precision say of it"""

    def smallest(self, kind: Kind | None = None) -> Caught:
        """The mutation that is caught by the least multiple."""
        rows = [row for row in self.rows if kind is None or row.kind == kind]
        return min(rows, key=lambda row: row.multiple)

    def missed(self) -> list[Caught]:
        """What this guard cannot see."""
        return [row for row in self.rows if row.multiple < 1.0]


def stored(folder: Path, key: str) -> Power | None:
    """What was measured for the reference of this key, or None."""
    path = power_path(folder, key)
    if not path.exists():
        return None
    return Power.model_validate_json(path.read_text(encoding="utf-8"))


def _said(rows: Sequence[Caught], kind: Kind, known: int) -> GuardPower:
    mine = [row for row in rows if row.kind == kind]
    least = min(mine, key=lambda row: row.multiple)
    missed = tuple(row.name for row in mine if row.multiple < 1.0)
    return GuardPower(
        smallest=least.multiple,
        mutation=least.name,
        missed=missed,
        asked=len(mine),
        known=known,
    )


def measure_some(cfg: Config, arch: str, folder: Path, seconds: float) -> GuardPower:
    """What the structure shows of as many mutations as fit into `seconds`, at least one.

    Those that are caught by the least come first, and those that the store knows are not asked
    again: after some studies all are known.
    """
    ends = time.monotonic() + seconds
    meter = Meter(cfg, arch, folder)
    asked, names = meter.asked("float32"), meter.names()
    with FileLock(f"{power_path(folder, asked.key)}.lock"):
        found = stored(folder, asked.key)
        rows = [] if found is None else found.rows
        seen = {row.name for row in rows if row.kind == "float32"}
        left = sorted(set(names) - seen, key=lambda name: (_weakness(name), names.index(name)))
        if left:
            form = meter.form(asked, left, ends)
            new = [Caught(name=n, kind="float32", form=m, own=None) for n, m in form.items()]
            rows = [*rows, *new]
            found = found or Power(
                key=asked.key,
                model=cfg.model.name,
                seconds=0.0,
                plain_rel_l2={},
                honest={},
                rows=[],
                kinds={},
            )
            kinds = {**found.kinds, "float32": _said(rows, "float32", len(names))}
            found = found.model_copy(update={"rows": rows, "kinds": kinds})
            write_atomic(power_path(folder, asked.key), found.model_dump_json(indent=1))
    assert found is not None
    return found.kinds["float32"]


def _weakness(name: str) -> int:
    return WEAKEST.index(name) if name in WEAKEST else len(WEAKEST)


def measure_once(cfg: Config, arch: str, folder: Path, key: str) -> None:
    """Measure the power in the precision of `cfg`, unless the store has it for this reference."""
    with FileLock(f"{power_path(folder, key)}.lock"):
        dtype: Kind = cfg.knobs["precision"].dtype  # type: ignore[attr-defined]
        found = stored(folder, key)
        known = [] if found is None else list(found.plain_rel_l2)
        if dtype not in known:
            Meter(cfg, arch, folder).measure([*known, dtype])
    gc.collect()


@dataclass(frozen=True)
class _Check:
    """One check of the guard: inputs, what is right and admitted on each, and what is enough.

    With `moved` distances are relative to how far the policy moved from the noise.
    """

    name: str
    inputs: Sequence[Inputs]
    actions: Sequence[Tensor]
    limits: Sequence[float]
    enough: float
    moved: bool = False


class Meter:
    """Measures one context; policies are built one after the other, each freed before the next.

    `few`: inputs that the own precision is asked of a mutation which the form shows anyway.
    """

    def __init__(self, cfg: Config, arch: str, folder: Path, few: int = FEW) -> None:
        self.few = few
        self.cfg = cfg.baseline()
        self.arch = arch
        self.folder = folder
        self.device = runtime.torch_device(cfg)
        self.honest: dict[str, float] = {}
        self.keep: Keep = lambda check, mutation, multiple: None

    def measure(
        self,
        kinds: Sequence[Kind],
        tell: Callable[[str], None] = lambda text: None,
        keep: Keep | None = None,
    ) -> Power:
        """All mutations in all `kinds`, at least one; `keep` gets each multiple as it comes."""
        self.keep = keep or self.keep
        started = time.monotonic()
        tell("float32: structure")
        exact = self.asked("float32")
        names = self.names()
        form = self.form(exact, names)
        rows: list[Caught] = []
        plain: dict[Kind, float] = {}
        for kind in kinds:
            own: dict[str, float] = {}
            plain[kind] = exact.reference.plain_rel_l2
            if kind != "float32":
                tell(f"{kind}: own precision")
                plain[kind], own = self.own(kind, form)
            rows += [
                Caught(name=name, kind=kind, form=multiple, own=own.get(name))
                for name, multiple in form.items()
            ]
        found = Power(
            key=exact.key,
            model=self.cfg.model.name,
            seconds=round(time.monotonic() - started, 1),
            plain_rel_l2=plain,
            honest=self.honest,
            rows=rows,
            kinds={name: _said(rows, name, len(names)) for name in plain},
        )
        write_atomic(power_path(self.folder, found.key), found.model_dump_json(indent=1))
        return found

    def config(self, kind: Kind) -> Config:
        """The plain configuration of a precision."""
        precision = {"dtype": "bfloat16" if kind == "fp8" else kind}
        knobs = dict(self.cfg.knobs)
        knobs["precision"] = BY_NAME["precision"].options_type.model_validate(precision)
        if kind == "fp8":
            knobs["blas"] = BY_NAME["blas"].options_type.model_validate({"backend": "fp8"})
        return self.cfg.model_copy(update={"knobs": knobs})

    def asked(self, kind: Kind) -> Question:
        """What the guard asks in a precision."""
        cfg = self.config(kind)
        return ask(self._build(cfg), cfg, self.arch, self.folder)

    def _build(self, cfg: Config) -> Pi0Policy:
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
        return runtime.build_policy(cfg, self.device)

    def form(
        self, asked: Question, names: Sequence[str], ends: float | None = None
    ) -> dict[str, float]:
        """Mutations in float32, also with the second weights where the first show little.

        At the time `ends` of the monotonic clock no further one is begun.
        """
        cfg = self.config("float32")
        inputs = [case.inputs for case in asked.cases]
        limits = [asked.reference.tolerance(cfg.guard, i) for i in range(len(inputs))]
        check = _Check("float32", inputs, asked.reference.actions, limits, FORM_ENOUGH)
        found = self._all(check, self._build(cfg), dict.fromkeys(names, len(inputs)), ends)
        few = structure.provoking(asked.cases)
        weak = {n: len(few) for n, multiple in found.items() if multiple < FORM_ENOUGH}
        if weak:
            actions = structure.provoked_reference(cfg, self.device, few, self.folder)
            limits = [cfg.guard.floor] * len(few)
            check = _Check("float32, second weights", few, actions, limits, FORM_ENOUGH, moved=True)
            more = self._all(check, structure.provoked_policy(cfg, self.device), weak)
            found |= {name: max(found[name], multiple) for name, multiple in more.items()}
        return found

    def own(
        self, kind: Kind, form: dict[str, float] | None = None
    ) -> tuple[float, dict[str, float]]:
        """The plain policy's distance in a precision, and each mutation in that precision.

        Without the `form`'s multiples every mutation is asked for few inputs only.
        """
        asked, cfg = self.asked(kind), self.config(kind)
        if cfg.lossy():
            asked = asked.knowing(asked.structure())
        policy = runtime.apply_knobs(self._build(cfg), cfg).policy
        inputs = [case.inputs for case in asked.cases]
        limits = [asked.reference.tolerance(cfg.guard, i, cfg.lossy()) for i in range(len(inputs))]
        form = form or dict.fromkeys(self.names(), INFINITE)
        count = {n: self.few if m >= FORM_ENOUGH else len(inputs) for n, m in form.items()}
        check = _Check(kind, inputs, asked.reference.actions, limits, OWN_ENOUGH)
        return asked.reference.plain_rel_l2, self._all(check, policy, count)

    def names(self) -> list[str]:
        """All mutations that this model and workload have."""
        policy = weights.build(MODELS[self.cfg.model.name], "meta", self.cfg.workload.steps)
        return [mutation.name for mutation in catalogue(policy, runtime.workload_of(self.cfg))]

    def _all(
        self,
        check: _Check,
        policy: Pi0Policy,
        count: dict[str, int],
        ends: float | None = None,
    ) -> dict[str, float]:
        """Multiples of the mutations in `count`, each by the first so many inputs."""
        workload = runtime.workload_of(self.cfg)
        seed = self.cfg.workload.seed + _PREVIOUS_SEED
        previous = make_inputs(workload, policy.config, seed, self.device)

        def multiple(mutation: Mutation, few: int, enough: float) -> float:
            """The largest one, over inputs in order until one shows enough, then the first again.

            As in the guard, which asks that twice.
            """
            call, largest = mutation.candidate(policy, previous), 0.0
            for index in [*range(few), 0]:
                given = upload(check.inputs[index], self.device)
                start = check.inputs[index].noise if check.moved else None
                far = guard.distance(call(given), check.actions[index], start).rel_l2
                largest = max(largest, INFINITE if far is None else far / check.limits[index])
                if largest >= enough:
                    break
            self.keep(check.name, mutation.name, largest)
            return largest

        with torch.no_grad():
            if ends is None:
                unchanged = Mutation("unchanged", on_inputs(lambda inputs: inputs))
                self.honest[check.name] = multiple(unchanged, len(check.inputs), INFINITE)
            mutations = {mutation.name: mutation for mutation in catalogue(policy, workload)}
            found: dict[str, float] = {}
            for name, few in count.items():
                if found and ends is not None and time.monotonic() > ends:
                    break
                if few:
                    found[name] = multiple(mutations[name], few, check.enough)
            return found
