"""All that the guard asks for one configuration: cases, timed contents, reference, verdicts."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from pydantic import BaseModel
from torch import Tensor

from openpi_opt import runtime
from openpi_opt.config import Config
from openpi_opt.guarding import reference, structure
from openpi_opt.guarding.cases import OTHER_MASKS, TIMED, Case, cases, timed_inputs
from openpi_opt.guarding.witness import Witness
from openpi_opt.measure import guard
from openpi_opt.measure.clock import upload
from openpi_opt.pi0.inputs import Inputs, Layout
from openpi_opt.pi0.policy import Pi0Policy
from openpi_opt.result import GuardPower, GuardReport, StructureReport

Call = Callable[[Inputs], Tensor]


class GuardPowers(BaseModel):
    """The part of `guarding.power`'s record that trials read: by precision, or fp8."""

    kinds: dict[str, GuardPower]


def power_path(folder: Path, key: str) -> Path:
    """Where the power of the guard with the reference of this key is kept."""
    return folder / f"power-{key}.json"


# An honest float16 run came to 88% of such a case's tolerance; wrong masks are off by 30% and more.
MASKED = 1.5


@dataclass(frozen=True)
class Question:
    """What is asked for a configuration on a device, with the answers of the plain policy."""

    cfg: Config
    device: torch.device
    vocabulary: int
    cases: list[Case]
    timed: list[Inputs]
    reference: guard.Reference
    key: str
    folder: Path
    seen: StructureReport | None = None

    def knowing(self, seen: StructureReport) -> Question:
        """The same, with what is known of the candidate's structure."""
        lossy = [seen.emulated.get(case.name, 1.0) for case in self.cases] if seen.emulated else []
        return replace(self, seen=seen, reference=replace(self.reference, lossy=lossy))

    @property
    def observations(self) -> list[Inputs]:
        """The ordinary inputs, on the host."""
        return [case.inputs for case in self.cases if case.ordinary]

    @property
    def own_tolerance(self) -> float:
        """What is admitted in the candidate's precision on ordinary inputs, were it lossless."""
        return guard.tolerance(self.cfg.guard, self.reference.plain_rel_l2)

    def known_structure(self, foreign: bool = False) -> StructureReport | None:
        """What the store says of the candidate's structure; see `structure.stored`."""
        return structure.stored(self.cfg, self.key, self.folder, foreign)

    def structure(self) -> StructureReport:
        """The candidate's structure in float32; see `guarding.structure`.

        No other policy should be in memory: this builds its own, one after the other.
        """
        return structure.obtain(
            self.cfg, self.device, self.cases, self.reference, self.key, self.folder
        )

    def check(self, call: Call, layout: Layout | None, ordinary: bool = False) -> GuardReport:
        """The candidate at its own precision, on the cases that a policy of `layout` admits.

        With `ordinary` the others are left for `judge`.
        """
        return self._check(call, layout, lambda item: upload(item, self.device), ordinary)

    def _check(
        self,
        call: Call,
        layout: Layout | None,
        place: Callable[[Inputs], Inputs],
        ordinary: bool = False,
    ) -> GuardReport:
        asked = [c.ordinary if ordinary else c.admitted(layout) for c in self.cases]
        chosen = [i for i, wanted in enumerate(asked) if wanted]
        found = guard.check(
            call,
            [self.cases[i].inputs for i in chosen],
            self.reference.only(chosen),
            self.cfg.guard,
            self.cfg.lossy(),
            place,
        )
        return found.model_copy(update={"structure": self.seen, "power": self.power()})

    def power(self) -> GuardPower | None:
        """What was measured of this guard in the candidate's precision, else of the structure."""
        kinds = self._powers()
        # The structure is asked in float32, whatever the candidate's own precision.
        return kinds.get("fp8" if self.cfg.lossy() else self._dtype) or kinds.get("float32")

    def power_is_known(self) -> bool:
        """Whether all mistakes were asked in the precision of the candidate's operands."""
        found = self._powers().get(self._dtype)
        return found is not None and found.asked == found.known

    @property
    def _dtype(self) -> str:
        return self.cfg.knobs["precision"].dtype  # type: ignore[attr-defined]

    def _powers(self) -> dict[str, GuardPower]:
        path = power_path(self.folder, self.key)
        if not path.exists():
            return {}
        return GuardPowers.model_validate_json(path.read_text(encoding="utf-8")).kinds

    def wrong_structure(self) -> GuardReport:
        """The report of a candidate whose structure is wrong: nothing else of it was looked at."""
        seen = self.seen
        assert seen is not None
        return GuardReport(
            passed=False,
            rel_l2=seen.rel_l2,
            max_abs=None,
            cosine=None,
            plain_rel_l2=self.reference.plain_rel_l2,
            tolerance=seen.tolerance,
            inputs=len(self.cases),
            case=seen.case,
            structure=seen,
        )

    def witness(self, layout: Layout | None) -> Witness:
        """A feed of the timed calls of a policy of `layout`; see `guarding.witness`.

        A policy without declared layout reads any masks, one with an exact layout none.
        """
        reads = layout is None or layout.flexible
        others = OTHER_MASKS if reads else 0
        cameras = layout.cameras if layout else (True,) * self.timed[0].image_mask.shape[1]
        known = self.timed[: TIMED + others]
        return Witness(self.observations, known, self.device, self.vocabulary, others, cameras)

    def judge(
        self,
        witness: Witness,
        call: Call,
        layout: Layout | None,
        wall_ms: Sequence[float],
        again: int = 0,
    ) -> GuardReport:
        """The last word on a candidate: its timed calls, which took `wall_ms`, and all cases.

        The cases are asked after the timing and all in the same memory: a policy that began to
        remember meanwhile, or that knows its inputs by their address, is wrong there. `again` timed
        calls at least are made once more.
        """
        admitted = self._timed_tolerances(layout), self.own_tolerance, self.cfg.guard.floor
        timed = witness.verdict(call, self.reference.timed, *admitted, wall_ms, again)
        memory = upload(self.observations[0], self.device)

        def overwrite(inputs: Inputs) -> Inputs:
            for new, old in zip(inputs, memory, strict=True):
                old.copy_(new)
            return memory

        found = self._check(call, layout, overwrite)
        problem = timed.problem or witness.overwritten()
        timed = timed.model_copy(update={"passed": problem is None, "problem": problem})
        return found.model_copy(update={"timed": timed, "passed": timed.passed and found.passed})

    def _timed_tolerances(self, layout: Layout | None) -> list[float]:
        """What is admitted for each content of `timed`.

        With the workload's masks that of the ordinary cases, with other masks `MASKED` times that
        of such cases, up to the cap: a row of one token and no camera rounds differently.
        """
        lossy = self.cfg.lossy()
        plain = self.reference.tolerance(self.cfg.guard, lossy=lossy)
        masked = [
            self.reference.tolerance(self.cfg.guard, i, lossy)
            for i, case in enumerate(self.cases)
            if case.name.startswith("other masks") and case.admitted(layout)
        ]
        cap = self.cfg.guard.lossy_cap if lossy else self.cfg.guard.cap
        most = max(masked, default=plain)
        return [plain] * TIMED + [max(most, min(MASKED * most, cap))] * OTHER_MASKS


def ask(policy: Pi0Policy, cfg: Config, arch: str, folder: Path) -> Question:
    """The question for `cfg`; `policy` is plain and float32, and may be cast (`reference.obtain`).

    Raises:
        RefusedError: the plain policy overflows in this precision.
        UserError: `guard.observations` does not fit.
    """
    workload, seed = runtime.workload_of(cfg), cfg.workload.seed
    asked = cases(workload, policy.config, seed, cfg.guard.inputs, cfg.guard.observations)
    timed = timed_inputs(workload, policy.config, seed)
    folder.mkdir(parents=True, exist_ok=True)
    return Question(
        cfg=cfg,
        device=policy.device,
        vocabulary=policy.config.vocab_size,
        cases=asked,
        timed=timed,
        reference=reference.obtain(policy, asked, timed, cfg, arch, folder),
        key=reference.key(cfg, arch, folder),
        folder=folder,
    )
