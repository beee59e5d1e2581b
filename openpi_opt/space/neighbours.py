"""The last part of a search: the neighbours of the best point, and what of it can be left out.

A neighbour differs from the best in one key, is admitted by every knob, and is another
configuration. When all of them are measured and none is faster, the best is so at least locally.
Then the keys that cost nothing where they are at their default are left out together, and if that
is slower, half of them, and so on: the simplest configuration within noise.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from openpi_opt.errors import UserError
from openpi_opt.space.features import features, is_slow, is_tuned, quick_values
from openpi_opt.space.optimizer import Optimizer
from openpi_opt.space.points import Points
from openpi_opt.space.space import Space

# The share of a budget after which neighbours come first.
BEGINS = 0.7
# What fresh processes of one configuration may differ by, relative: twice their spread of 0.3%.
NOISE = 0.006

Params = dict[str, str]


@dataclass(frozen=True)
class Neighbour:
    """A point one key away. `plain`: that key is at its default there; `slow`: compiles long.

    `settled`: at its best value by declaration, which was left for a shorter trial.
    """

    params: Params
    key: str
    config_hash: str
    plain: bool
    slow: bool = False
    settled: bool = False


@dataclass
class Neighbours:
    """The neighbours of the best point so far. `share()` is the used part of the budget.

    `hurried`: those that compile for minutes are left out.
    """

    optimizer: Optimizer
    space: Space
    points: Points
    share: Callable[[], float]
    hurried: bool = False
    _centre: Params | None = None
    _around: list[Neighbour] = field(default_factory=list)
    _asked: set[str] = field(default_factory=set)

    def next(self, known: set[str]) -> Params | None:
        """The most promising neighbour that is not among the `known` hashes; None for none."""
        if self.share() < BEGINS or not self._look():
            return None
        done = known | self._asked
        left = [n for n in self._around if n.config_hash not in done]
        left = [n for n in left if not (self.hurried and n.slow)]
        if left:
            cost = self.optimizer.cost()
            first = [n for n in left if n.settled] or left
            chosen = first[0] if cost is None else min(first, key=lambda n: cost(n.params))
            self._asked.add(chosen.config_hash)
            return chosen.params
        return self._simpler(known)

    def text(self, tried: set[str]) -> str | None:
        """What is known of the neighbours of the best; None while there is no best."""
        if not self._look() or not self._around:
            return None
        count = sum(n.config_hash in tried for n in self._around)
        left = len(self._around) - count
        what = f"{count} of {len(self._around)} neighbours measured, none faster beyond noise"
        return f"locally best: {what}" if not left else f"best so far: {what}; {left} left"

    def simplest(self) -> tuple[Params, float] | None:
        """The point with the fewest options that is within noise of the best, and its latency.

        None where that is the best itself.
        """
        best = self.optimizer.best()
        if best is None:
            return None
        found = [(len(self._features(p)), ms, p) for p, ms in self.optimizer.within(1 + NOISE)]
        count, latency, params = min(found, key=lambda entry: entry[:2])
        return (params, latency) if count < len(self._features(best[0])) else None

    def _look(self) -> bool:
        """Find the neighbours of the best; False while there is none."""
        best = self.optimizer.best()
        if best is None:
            return False
        if best[0] != self._centre:
            self._centre, self._around = best[0], self._find(best[0])
        return True

    def _find(self, centre: Params) -> list[Neighbour]:
        own = self._hash(centre)
        found: dict[str, Neighbour] = {}
        for key, dimension in self.space.dimensions.items():
            if dimension.count() is None:
                continue
            for text in dimension.values:
                params = {**centre, key: text}
                config_hash = self._hash(params) if text != centre[key] else own
                if config_hash is not None and config_hash not in (own, *found):
                    plain = text == dimension.values[0]
                    slow = is_slow(self._features(params))
                    settled = plain and is_tuned(key) and key in quick_values()
                    found[config_hash] = Neighbour(params, key, config_hash, plain, slow, settled)
        return list(found.values())

    def _simpler(self, known: set[str]) -> Params | None:
        """The best without the keys that cost nothing, unless that is known."""
        assert self._centre is not None
        best = self.optimizer.best()
        assert best is not None
        values = [(self.optimizer.value(n.params), n) for n in self._around if n.plain]
        harmless = [
            n
            for value, n in sorted(values, key=lambda entry: entry[0] or 0.0)
            if value is not None and value <= (1 + NOISE) * best[1]
        ]
        while len(harmless) > 1:
            params = {**self._centre, **{n.key: n.params[n.key] for n in harmless}}
            config_hash = self._hash(params)
            if config_hash is not None and config_hash not in known | self._asked:
                self._asked.add(config_hash)
                return params
            value = self.optimizer.value(params)
            if value is not None and value <= (1 + NOISE) * best[1]:
                return None
            harmless = harmless[: len(harmless) // 2]
        return None

    def _hash(self, params: Params) -> str | None:
        try:
            return self.points.config(params).hash()
        except UserError:
            return None

    def _features(self, params: Params) -> dict[str, str]:
        return features(self.points.config(params), self.space, params)
