"""Configurations between the baseline and a target, a set of knobs at a time.

A configuration is named by the set of knobs that it has from the target; the others are at the
baseline. Some sets cannot run (a knob needs another) or compute the same as a smaller set (a knob
without effect alone): such a knob is taken together with what it needs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from itertools import combinations

from openpi_opt.config import Config
from openpi_opt.confirm.judge import differing

Knobs = frozenset[str]
Refuse = Callable[[Config], str | None]
# A knob that needs more than two others is taken together with all that are left.
_MOST_TOGETHER = 3
NO_EFFECT = "has no effect here"


@dataclass(frozen=True)
class Moves:
    """What can be done next: sets of knobs, and why some cannot be taken alone."""

    sets: list[Knobs]
    refused: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Target:
    """A configuration to be built up or taken apart. `refuse` tells why one cannot run here."""

    config: Config
    refuse: Refuse

    @property
    def knobs(self) -> list[str]:
        """The knobs that differ from the baseline, in the order of the registry."""
        return differing(self.config)

    def having(self, names: Iterable[str]) -> Config:
        """The baseline with these knobs as the target has them."""
        plain, names = self.config.baseline(), set(names)
        mixed = {
            name: (self.config if name in names else plain).knobs[name] for name in plain.knobs
        }
        return self.config.model_copy(update={"knobs": mixed})

    def additions(self, have: Knobs) -> Moves:
        """The smallest sets of missing knobs that can be added to `have` and change something."""
        missing = [name for name in self.knobs if name not in have]
        return self._moves(missing, have, lambda names: have | names)

    def removals(self) -> Moves:
        """The smallest sets of knobs that can be taken away and change something."""
        every = frozenset(self.knobs)
        return self._moves(self.knobs, every, lambda names: every - names)

    def label(self, names: Knobs) -> str:
        """The knobs with the target's options, joined."""
        labels = self.config.labels()
        return " + ".join(f"{name}={labels[name]}" for name in self.knobs if name in names)

    def _moves(self, names: list[str], have: Knobs, to: Callable[[Knobs], Knobs]) -> Moves:
        here = self.having(have).hash()
        found: dict[Knobs, None] = {}
        refused: dict[str, str] = {}
        for name in names:
            for group in _growing(name, names):
                cfg = self.having(to(group))
                reason = NO_EFFECT if cfg.hash() == here else self.refuse(cfg)
                if reason is None:
                    found.setdefault(group)
                    break
                if len(group) == 1:
                    refused[name] = reason
        return Moves(list(found), refused)


def _growing(name: str, names: list[str]) -> Iterator[Knobs]:
    """Sets with `name` in it: alone, with one other, with two, with all."""
    others = [other for other in names if other != name]
    for count in range(min(_MOST_TOGETHER, len(names))):
        for group in combinations(others, count):
            yield frozenset((name, *group))
    if len(names) > _MOST_TOGETHER:
        yield frozenset(names)
