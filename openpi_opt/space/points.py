"""From points of a search space to configurations: which are worth a process, and a first check."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

from openpi_opt.config import Config
from openpi_opt.errors import UserError
from openpi_opt.knobs import KNOBS
from openpi_opt.machine import Machine
from openpi_opt.space.space import Space

Compose = Callable[[Sequence[str]], Config]
# A dimension with more values than this is checked at its ends and in the middle.
_CHECKED_VALUES = 64
# A search looks at thousands of points for each that it proposes.
_MOST_KEPT = 20_000


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
    for knob in KNOBS:
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


class Points:
    """Composes every point once. In a space that is `sensible_only`, points that a knob refuses do
    not count. Lossy ones count only with `allow_lossy`."""

    def __init__(self, space: Space, compose: Compose, machine: Machine, allow_lossy: bool = False):
        self._space = space
        self._compose = compose
        self._machine = machine
        self._allow_lossy = allow_lossy
        self._made: dict[tuple[str, ...], Config | UserError] = {}

    def config(self, params: dict[str, str]) -> Config:
        """The configuration of a point, with `auto` resolved. Raises UserError: its values have no
        configuration, for instance because they contradict each other; NotSensibleError where only
        a knob says so."""
        cfg = self._composed(params)
        if self._space.sensible_only:
            reason = left_out(cfg, self._machine, self._allow_lossy)
            if reason is not None:
                raise NotSensibleError(reason)
        return cfg

    def _composed(self, params: dict[str, str]) -> Config:
        key = tuple(params.values())
        if key not in self._made:
            if len(self._made) >= _MOST_KEPT:
                self._made.clear()
            try:
                composed = self._compose(self._space.overrides(params))
                self._made[key] = composed.resolved(self._machine)
            except UserError as error:
                self._made[key] = error
        made = self._made[key]
        if isinstance(made, UserError):
            raise made
        return made

    def check(self) -> list[Config]:
        """Compose every value of every key once, before anything runs; the first point is first.

        A value counts as wrong when it fails both with the first and with the last values of the
        other keys: two values may well contradict each other and each be right with others.

        Raises UserError: of the first wrong value.
        """
        values = {key: _checked(d.values) for key, d in self._space.dimensions.items()}
        first = {key: texts[0] for key, texts in values.items()}
        last = {key: texts[-1] for key, texts in values.items()}
        changes = [{key: text} for key, texts in values.items() for text in texts] or [{}]
        passed: list[Config] = []
        for change in changes:
            try:
                passed.append(self._composed({**first, **change}))
            except UserError as error:
                try:
                    passed.append(self._composed({**last, **change}))
                except UserError:
                    raise error from None
        return passed


def _checked(texts: Sequence[str]) -> Sequence[str]:
    if len(texts) <= _CHECKED_VALUES:
        return texts
    return [texts[0], texts[len(texts) // 2], texts[-1]]
