"""What each stage of an inference takes, as a function of the options that touch it.

For each stage (vision, prefill, denoise, and the time in which no kernel runs) the logarithm of its
milliseconds is a sum of effects, one for each option that is not at its default: Bayesian linear
regression. The scale of the effects is learned for each key, so that a capture that saves 100 ms
and a tile that saves 10 us are both told from noise (automatic relevance determination: MacKay,
Neural Computation 4, 1992). Whether a trial fails is a regression of the same kind on 0 and 1, and
the seconds that a trial takes are one more.

`draw` samples all effects from their posterior: the point that is fastest under one draw is worth
a trial (Thompson sampling: Russo and others, arXiv 1707.02038). `mean` takes the posterior means.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
Term = tuple[tuple[str, str], ...]  # an option, or two that hold together
Features = Mapping[str, str]  # options that are not at their default: key -> text
# Prior of an effect on a logarithm before anything is known, and of what the effects leave over.
_PRIOR, _NOISE = 0.15, 0.05
# Mean and scale of the prior where the default is a table of measured values.
_TUNED = 0.02, 0.03
_LEAST_NOISE = 0.002  # fresh processes of one configuration differ by 0.3%
_ROUNDS = 6  # of learning the scales; they hardly move afterwards
_WEIGHT = 2.0  # pseudo-observations behind each prior scale
_FAILURE_PRIOR = 0.3
# A pair of options gets an effect of its own when this many trials have both, their rest is so many
# standard errors off, and there are so many trials for each such pair.
_LEAST_TOGETHER, _SURE, _TRIALS_A_PAIR = 3, 3.0, 10


@dataclass(frozen=True)
class Seen:
    """A trial as the model learns from it.

    `parts` are milliseconds of the stages and of no stage, empty where they are not known; `total`
    is the whole call, None for a trial that failed; `seconds` is what the trial took; `bad` is one
    that cannot be the answer: it failed, or is above a limit.
    """

    features: Features
    total: float | None = None
    parts: Mapping[str, float] = field(default_factory=dict)
    seconds: float | None = None
    bad: bool = False


class Effects:
    """Posterior of the effects on one quantity."""

    def __init__(
        self,
        prior: float,
        noise: float,
        is_read: Callable[[str], bool],
        is_tuned: Callable[[str], bool] = lambda key: False,
    ):
        self._prior, self._noise, self._is_read, self._is_tuned = prior, noise, is_read, is_tuned
        self._terms: list[Term] = []
        self._scales: dict[str, float] = {}
        self._centre = 0.0
        self._mean: Array = np.zeros(1)
        self._spread: Array = np.eye(1) * 1e-2

    def fit(self, rows: Sequence[Features], values: Sequence[float]) -> None:
        """Learn from values; none at all leaves the prior."""
        if not rows:
            return
        pairs = sorted({pair for row in rows for pair in row.items() if self._is_read(pair[0])})
        singles: list[Term] = [(pair,) for pair in pairs]
        x = _table(rows, singles)
        y = np.asarray(values, dtype=float)
        self._centre = float(np.median(y))
        self._terms = singles
        self._learn(x, y - self._centre)
        joint = self._joint(x, y - self._centre - x @ self._mean)
        if joint:
            self._terms = [*singles, *joint]
            self._learn(_table(rows, self._terms), y - self._centre)

    def _joint(self, x: Array, left: Array) -> list[Term]:
        """Pairs of options whose trials lie off the sum of their effects by more than chance."""
        ones = x[:, 1:]
        both, sums = ones.T @ ones, ones.T @ (left[:, None] * ones)
        sigma = float(np.std(left)) + 1e-9
        scores = np.abs(sums) / (sigma * np.sqrt(np.maximum(both, 1.0)))
        scores[(both < _LEAST_TOGETHER) | np.tri(len(both), dtype=bool)] = 0.0
        order = np.argsort(scores, axis=None)[::-1][: len(left) // _TRIALS_A_PAIR]
        found = [np.unravel_index(place, scores.shape) for place in order]
        return [(self._terms[i][0], self._terms[j][0]) for i, j in found if scores[i, j] > _SURE]

    def _learn(self, x: Array, y: Array) -> None:
        keys = ["&".join(key for key, _ in term) for term in self._terms]
        names = sorted(set(keys))
        of = np.asarray([names.index(key) for key in keys], dtype=int)
        variance = np.full(len(names), self._prior**2)
        counts = np.bincount(of, minlength=len(names)) if keys else np.zeros(0)
        noise = self._noise**2
        gram, moment = x.T @ x, x.T @ y
        for _ in range(_ROUNDS):
            # The intercept is not shrunk: it is the default's time, which the keys do not explain.
            precision = np.concatenate(([1e-2], 1.0 / variance[of]))
            self._spread = np.linalg.inv(gram / noise + np.diag(precision))
            self._mean = self._spread @ moment / noise
            if not keys:
                break
            squares = self._mean[1:] ** 2 + np.diag(self._spread)[1:]
            sums = np.bincount(of, squares, minlength=len(names))
            variance = (_WEIGHT * self._prior**2 + sums) / (_WEIGHT + counts)
            left = float(np.sum((y - x @ self._mean) ** 2) + np.sum(gram * self._spread))
            noise = (_WEIGHT * self._noise**2 + left) / (_WEIGHT + len(y))
            noise = max(noise, _LEAST_NOISE**2)
        self._scales = {name: float(v) ** 0.5 for name, v in zip(names, variance, strict=True)}

    def mean(self) -> Drawn:
        """The posterior means; of what was never seen, nothing."""
        return self._drawn(self._mean, None)

    def draw(self, rng: np.random.Generator) -> Drawn:
        """One sample; what was never seen is sampled from its prior."""
        root = np.linalg.cholesky(self._spread + 1e-12 * np.eye(len(self._mean)))
        return self._drawn(self._mean + root @ rng.standard_normal(len(self._mean)), rng)

    def _drawn(self, effects: Array, rng: np.random.Generator | None) -> Drawn:
        known = {term: float(e) for term, e in zip(self._terms, effects[1:], strict=True)}
        scales = {} if rng is None else self._scales
        base = self._centre + float(effects[0])

        def unseen(key: str) -> tuple[float, float]:
            if not self._is_read(key):
                return 0.0, 0.0
            if self._is_tuned(key):
                return _TUNED
            # Values never tried are no bolder than those of the same key that were.
            return 0.0, min(self._prior, scales.get(key, self._prior))

        return Drawn(base, known, unseen, rng)


def _table(rows: Sequence[Features], terms: Sequence[Term]) -> Array:
    """One row for each trial: 1, then 1 for each term that holds and 0 for the others."""
    x = np.zeros((len(rows), len(terms) + 1))
    x[:, 0] = 1.0
    for n, row in enumerate(rows):
        items = set(row.items())
        x[n, 1:] = [items.issuperset(term) for term in terms]
    return x


class Drawn:
    """One set of effects: a function of features. `prior` gives mean and scale of unseen ones."""

    def __init__(
        self,
        base: float,
        effects: Mapping[Term, float],
        prior: Callable[[str], tuple[float, float]],
        rng: np.random.Generator | None,
    ):
        self._base, self._prior, self._rng = base, prior, rng
        self._singles = {term[0]: effect for term, effect in effects.items() if len(term) == 1}
        self._joint = {term: effect for term, effect in effects.items() if len(term) > 1}

    def __call__(self, features: Features) -> float:
        """The quantity, a logarithm for times."""
        total = self._base
        for pair in features.items():
            effect = self._singles.get(pair)
            total += self._unseen(pair) if effect is None else effect
        for term, effect in self._joint.items():
            if all(features.get(key) == text for key, text in term):
                total += effect
        return total

    def _unseen(self, pair: tuple[str, str]) -> float:
        """The prior mean, or one sample of the prior."""
        mean, scale = self._prior(pair[0])
        effect = mean if self._rng is None else float(self._rng.normal(mean, scale))
        self._singles[pair] = effect
        return effect


@dataclass
class Guess:
    """One draw of all quantities, or their means."""

    parts: dict[str, Drawn]
    fails: Drawn
    seconds: Drawn
    patience: float  # how little the seconds of a trial count

    def milliseconds(self, features: Features) -> float:
        """Of the whole call."""
        return float(sum(np.exp(min(part(features), 30.0)) for part in self.parts.values()))

    def cost(self, features: Features) -> float:
        """What is minimised: log milliseconds, more where trials are long or likely fail."""
        likely = min(max(self.fails(features), 0.0), 0.98)
        time = float(np.log(self.milliseconds(features)))
        return time - float(np.log1p(-likely)) + self.patience * self.seconds(features)


class StageModel:
    """All quantities of a study. `touches(key)` names the stages that an option can change.

    `is_tuned(key)`: its default is a table of measured values.
    """

    def __init__(
        self,
        touches: Callable[[str], Iterable[str]],
        is_tuned: Callable[[str], bool] = lambda key: False,
    ):
        self._touches, self._is_tuned = touches, is_tuned
        self._parts: dict[str, Effects] = {}
        self._fails = Effects(_FAILURE_PRIOR, 0.2, lambda key: True)
        self._seconds = Effects(0.5, 0.3, lambda key: True)

    def fit(self, trials: Sequence[Seen]) -> None:
        """Learn from all trials, those that failed included.

        Where only the whole call is known, it is shared out as the trials with stages have it.
        """
        timed = [trial for trial in trials if trial.total is not None]
        names = list(dict.fromkeys(name for trial in timed for name in trial.parts)) or ["call"]
        self._parts = {name: self._fit_part(name, timed, names) for name in names}
        self._fails.fit([t.features for t in trials], [float(t.bad) for t in trials])
        lasted = [(t.features, t.seconds) for t in trials if t.seconds]
        self._seconds.fit([f for f, _ in lasted], [float(np.log(s)) for _, s in lasted])

    def _fit_part(self, name: str, timed: Sequence[Seen], names: Sequence[str]) -> Effects:
        effects = Effects(
            *(_PRIOR, _NOISE, lambda key: name in ("call", *self._touches(key)), self._is_tuned)
        )
        shares = [t.parts.get(name, 0.0) / t.total for t in timed if t.parts and t.total]
        share = float(np.mean(shares)) if shares else 1.0
        values = [t.parts.get(name, 0.0) if t.parts else share * (t.total or 0.0) for t in timed]
        effects.fit([t.features for t in timed], [float(np.log(max(v, 1e-3))) for v in values])
        return effects

    def draw(self, rng: np.random.Generator, patience: float = 0.0) -> Guess:
        """One sample of everything."""
        parts = {name: effects.draw(rng) for name, effects in self._parts.items()}
        return Guess(parts, self._fails.draw(rng), self._seconds.mean(), patience)

    def mean(self, patience: float = 0.0) -> Guess:
        """The best guess of everything."""
        parts = {name: effects.mean() for name, effects in self._parts.items()}
        return Guess(parts, self._fails.mean(), self._seconds.mean(), patience)
