"""The guard: are a candidate's actions those of the policy?

The reference is the same weights and inputs in float32, plain and eager, with the general masks
and without TF32. A candidate may be `guard.factor` times as far away from it as the plain eager
policy in its precision, and under `guard.cap`. The first input is asked again at the end: an answer
that depends on the call before is wrong.

Letters: B batch, H horizon, A action dim.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from openpi_opt.config import Guard
from openpi_opt.pi0.inputs import Inputs
from openpi_opt.result import GuardReport

Call = Callable[[Inputs], Tensor]


@dataclass(frozen=True)
class Distance:
    """How far actions [B, H, A] are from the reference; None where they are not finite."""

    rel_l2: float | None
    max_abs: float | None
    cosine: float | None


@dataclass(frozen=True)
class Reference:
    """Reference actions per input, and those of the plain policy in the candidate's precision.

    The first `ordinary` inputs (all, where it is None) decide the least tolerance. `timed` are the
    reference actions of contents that only timed calls get. `lossy` are the distances of a lossy
    candidate's emulation, by input.
    """

    actions: list[Tensor]
    plain: list[Tensor]
    timed: list[Tensor] = field(default_factory=list)
    names: list[str] = field(default_factory=list)
    ordinary: int | None = None
    lossy: list[float] = field(default_factory=list)

    def plain_distance(self, index: int) -> float:
        """Distance of the plain policy on one input; 0 in float32.

        Raises ValueError: the plain policy's actions are not finite.
        """
        found = distance(self.plain[index], self.actions[index]).rel_l2
        if found is None:
            raise ValueError("the plain eager policy itself returns NaN or infinity")
        return found

    @property
    def plain_rel_l2(self) -> float:
        """The largest distance of the plain policy over the ordinary inputs; 0 in float32."""
        return max(self.plain_distance(index) for index in range(self._ordinary))

    @property
    def _ordinary(self) -> int:
        return len(self.actions) if self.ordinary is None else self.ordinary

    def tolerance(self, guard: Guard, index: int = 0, lossy: bool = False) -> float:
        """What is admitted on one input, by its own plain distance or the ordinary ones' if larger.

        Rounding moves the actions more on some inputs than on others. Of a lossy candidate the
        emulation's distance counts, where it is known.
        """
        if lossy:
            emulated = max(
                [*self.lossy[: self._ordinary], *self.lossy[index : index + 1]], default=1
            )
            return max(guard.floor, min(guard.factor * emulated, guard.lossy_cap))
        return tolerance(guard, max(self.plain_rel_l2, self.plain_distance(index)))

    def only(self, indices: Sequence[int]) -> Reference:
        """The same for some of the inputs, all ordinary ones among them."""
        return Reference(
            [self.actions[i] for i in indices],
            [self.plain[i] for i in indices],
            self.timed,
            [self.names[i] for i in indices] if self.names else [],
            self.ordinary,
            [self.lossy[i] for i in indices] if self.lossy else [],
        )


def distance(actual: Tensor, reference: Tensor, start: Tensor | None = None) -> Distance:
    """Relative L2, largest absolute and angular distance, in float64 on the host.

    The relative distance is the largest over the batch: one wrong robot among 64 is wrong. With
    `start`, the noise, it is relative to how far the policy moved from there.
    """
    a, r = actual.detach().cpu().double(), reference.double()
    if a.shape != r.shape or not bool(torch.isfinite(a).all()):
        return Distance(None, None, None)
    moved = r if start is None else r - start.cpu().double()
    difference, a, r, moved = (t.flatten(1) for t in (a - r, a, r, moved))
    relative = difference.norm(dim=1) / moved.norm(dim=1)
    cosine = torch.nn.functional.cosine_similarity(a, r, dim=1)
    return Distance(
        rel_l2=float(relative.max()),
        max_abs=float(difference.abs().max()),
        cosine=float(cosine.min()),
    )


def tolerance(guard: Guard, plain_rel_l2: float) -> float:
    """Largest admitted relative L2 distance of a lossless candidate."""
    return min(max(guard.factor * plain_rel_l2, guard.floor), guard.cap)


def check(
    call: Call,
    inputs: Sequence[Inputs],
    reference: Reference,
    guard: Guard,
    lossy: bool = False,
    upload: Callable[[Inputs], Inputs] = lambda inputs: inputs,
) -> GuardReport:
    """Run `call` over all inputs, the first one twice, and compare with the reference.

    Each call gets `upload(inputs[i])`; with a copy in fresh memory that is freed after it, the next
    input may lie at the same address.
    """
    order = [*range(len(inputs)), 0]
    found, held, touched = [], [], None
    for i in order:
        given = upload(inputs[i])
        actions = call(given)
        held.append((actions, actions.clone()))
        found.append(distance(actions, reference.actions[i]))
        for name, now, was in zip(Inputs._fields, given, inputs[i], strict=True):
            if touched is None and not torch.equal(now.cpu(), was.cpu()):
                touched = f"the call changes its inputs ({name})"
    if any(not torch.equal(now.nan_to_num(), before.nan_to_num()) for now, before in held):
        touched = touched or "the result of a call was overwritten by a later call"
    limits = [reference.tolerance(guard, i, lossy) for i in order]

    def share(place: int) -> float:
        rel_l2 = found[place].rel_l2
        return float("inf") if rel_l2 is None else rel_l2 / limits[place]

    worst = max(range(len(order)), key=share)
    return GuardReport(
        passed=touched is None and share(worst) <= 1.0,
        rel_l2=found[worst].rel_l2,
        max_abs=found[worst].max_abs,
        cosine=found[worst].cosine,
        plain_rel_l2=reference.plain_rel_l2,
        tolerance=limits[worst],
        inputs=len(inputs),
        case=reference.names[order[worst]] if reference.names else None,
        problem=touched,
    )


def explain(report: GuardReport) -> str:
    """One line for a configuration that failed."""
    where = f" ({report.case})" if report.case else ""
    if report.structure is not None and not report.structure.passed:
        return f"wrong structure: {report.structure.problem}"
    if report.timed is not None and report.timed.problem is not None:
        return f"wrong while timed: {report.timed.problem}"
    if report.problem is not None:
        return f"wrong: {report.problem}"
    if report.rel_l2 is None:
        return f"wrong actions: NaN, infinity or a wrong shape{where}"
    return (
        f"wrong actions: {report.rel_l2:.2%} from the float32 reference{where}; admitted are "
        f"{report.tolerance:.2%} (plain eager in this precision: {report.plain_rel_l2:.2%})"
    )
