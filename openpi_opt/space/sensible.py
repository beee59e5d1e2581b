"""Which combinations are worth a process: what every knob admits, and lossy ones when asked."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from openpi_opt.config import Config
from openpi_opt.errors import UserError
from openpi_opt.knobs import KNOBS
from openpi_opt.knobs.base import AnyKnob
from openpi_opt.machine import Machine


@dataclass(frozen=True, order=True)
class LeftOut:
    """Why a combination is not started. `invalid` also stands for what no schema admits."""

    kind: Literal["unavailable", "invalid", "lossy"]
    reason: str


class NotSensibleError(UserError):
    """A combination of a named space that is passed over."""

    def __init__(self, left_out: LeftOut):
        super().__init__(f"{left_out.kind}: {left_out.reason}")
        self.left_out = left_out


def left_out(cfg: Config, machine: Machine, allow_lossy: bool) -> LeftOut | None:
    """The first knob's reason why `cfg`, resolved, is not started, or None."""
    reasons = (knob_leaves_out(knob, cfg, machine, allow_lossy) for knob in KNOBS)
    return next((reason for reason in reasons if reason is not None), None)


def knob_leaves_out(
    knob: AnyKnob, cfg: Config, machine: Machine, allow_lossy: bool
) -> LeftOut | None:
    """One knob's reason."""
    refusal = knob.check(cfg, machine)
    if refusal is not None:
        return LeftOut(refusal.outcome, refusal.reason)
    if not allow_lossy and knob.lossy(cfg):
        return LeftOut(
            "lossy",
            f"{knob.name}={knob.label(knob.of(cfg))} is lossy and could not win; "
            "objective.allow_lossy=true admits it",
        )
    return None
