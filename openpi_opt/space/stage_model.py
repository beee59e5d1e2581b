"""What each stage of an inference takes, as a function of the options that touch it.

For each stage (vision, prefill, denoise, and the time in which no kernel runs) the logarithm of its
milliseconds is a sum of effects, one for each option that is not at its default, and a deviation
that points with nearly the same options share: Bayesian linear regression on a Gaussian process
over the number of options that differ (universal kriging: Rasmussen and Williams, Gaussian
Processes for Machine Learning, 2.7). So the time of a known point is nearly what was measured, and
that of its neighbours differs by the effects. The scale of the effects is learned for each key, so
that a capture that saves 100 ms and a tile that saves 10 us are both told from noise (automatic
relevance determination: MacKay, Neural Computation 4, 1992). Whether a trial fails is a regression
of the same kind on 0 and 1, and the seconds that a trial takes are one more.

`draw` samples all effects from their posterior: the point that is fastest under one draw is worth
a trial (Thompson sampling: Russo and others, arXiv 1707.02038). `mean` takes the posterior means.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from openpi_opt.knobs.base import STAGES

Array = NDArray[np.float64]
Pair = tuple[str, str]  # an option
Features = Mapping[str, str]  # options that are not at their default: key -> text
Prior = Callable[[str, str], tuple[float, float] | None]
"""Mean and scale of an option's effect, where something is known of it beforehand."""

# Scale of an effect on a logarithm before anything is known, and of what the effects leave over.
_PRIOR, _NOISE = 0.15, 0.05
_REST_PRIOR = 0.5  # of the time in no stage: a capture takes away nearly all of it
_LEAST_NOISE = 0.002  # fresh processes of one configuration differ by 0.3%
_ROUNDS = 6  # of learning the scales; they hardly move afterwards
_WEIGHT = 2.0  # pseudo-observations behind each prior scale
_FAILURE_PRIOR = 0.3
# Points that differ in so many options still share 1/e of what the effects leave over, of which
# this part is noise, which no other trial shares.
_LENGTH, _OWN = 3.0, 0.05


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


class Codes:
    """Points as the options that they have, to count in how many keys two differ."""

    def __init__(self, rows: Sequence[Features], is_read: Callable[[str], bool]):
        self._rows, self._is_read = rows, is_read
        self.pairs = sorted({pair for row in rows for pair in row.items() if is_read(pair[0])})
        self._number = {pair: number for number, pair in enumerate(self.pairs)}
        self.has = np.zeros((len(rows), len(self.pairs)))
        for here, row in zip(self.has, rows, strict=True):
            here[[self._number[pair] for pair in row.items() if pair in self._number]] = 1.0
        # Two points differ in the keys that one of them has, less those with the same option.
        keys = sorted({key for key, _ in self.pairs})
        of = {key: number for number, key in enumerate(keys)}
        self._has_key = np.zeros((len(rows), len(keys)))
        for number, (key, _) in enumerate(self.pairs):
            self._has_key[:, of[key]] += self.has[:, number]
        self._of = of
        self._more: dict[Pair, NDArray[np.int64] | None] = {}
        self._counts = self.has.sum(axis=1).astype(np.int64)
        self._share = (1 - _OWN) * np.exp(-np.arange(len(keys) + 1) / _LENGTH)

    def near(self, point: Features) -> Array:
        """By row, how much of its deviation the point shares: `1 - _OWN` for the same."""
        apart = self._counts.copy()
        for pair in point.items():
            more = self._more[pair] if pair in self._more else self._look(pair)
            if more is not None:
                apart += more
        return self._shares(apart)

    def among(self) -> Array:
        """The same for all rows with each other."""
        same = self._has_key @ self._has_key.T + self.has @ self.has.T
        counts = self._counts
        return self._shares(counts[:, None] + counts[None] - same.astype(np.int64))

    def _look(self, pair: Pair) -> NDArray[np.int64] | None:
        """By row, how many more keys differ with this option; None where nothing reads it."""
        found: NDArray[np.int64] | None = None
        if self._is_read(pair[0]):
            found = np.ones(len(self._rows), dtype=np.int64)
            if pair[0] in self._of:
                found -= self._has_key[:, self._of[pair[0]]].astype(np.int64)
            if pair in self._number:
                found -= self.has[:, self._number[pair]].astype(np.int64)
        self._more[pair] = found
        return found

    def _shares(self, apart: NDArray[np.int64]) -> Array:
        most = int(apart.max(initial=0))
        if most >= len(self._share):
            self._share = (1 - _OWN) * np.exp(-np.arange(most + 1) / _LENGTH)
        return self._share[apart]


class Effects:
    """Posterior of the effects on one quantity, and of what they leave over."""

    def __init__(
        self, scale: float, noise: float, is_read: Callable[[str], bool], prior: Prior | None = None
    ):
        self._scale, self._noise, self._is_read = scale, noise, is_read
        self._known = prior or (lambda key, text: None)
        self._pairs: list[Pair] = []
        self._scales: dict[str, float] = {}
        self._centre = 0.0
        self._mean: Array = np.zeros(1)
        self._spread: Array = np.eye(1) * 1e-2
        self._codes: Codes | None = None

    def fit(self, rows: Sequence[Features], values: Sequence[float]) -> None:
        """Learn from values; none at all leaves the prior."""
        if not rows:
            return
        self._codes = Codes(rows, self._is_read)
        self._pairs = self._codes.pairs
        self._x = np.hstack([np.ones((len(rows), 1)), self._codes.has])
        y = np.asarray(values, dtype=float)
        self._centre = float(np.median(y))
        self._y = y - self._centre
        # Whitened by what rows share, effects are those of an ordinary regression.
        self._root = np.linalg.cholesky(self._codes.among() + _OWN * np.eye(len(rows)))
        self._learn(np.linalg.solve(self._root, self._x), np.linalg.solve(self._root, self._y))

    def _learn(self, x: Array, y: Array) -> None:
        priors = [self._prior(*pair) for pair in self._pairs]
        expected = np.asarray([0.0, *(mean for mean, _ in priors)])
        y = y - x @ expected
        keys = [key for key, _ in self._pairs]
        names = sorted(set(keys))
        of = np.asarray([names.index(key) for key in keys], dtype=int)
        widest = dict(zip(keys, (scale for _, scale in priors), strict=True))
        prior = np.asarray([widest[name] ** 2 for name in names])
        variance = prior.copy()
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
            variance = (_WEIGHT * prior + sums) / (_WEIGHT + counts)
            left = float(np.sum((y - x @ self._mean) ** 2) + np.sum(gram * self._spread))
            noise = (_WEIGHT * self._noise**2 + left) / (_WEIGHT + len(y))
            noise = max(noise, _LEAST_NOISE**2)
        self._mean = self._mean + expected
        self._scales = {name: float(v) ** 0.5 for name, v in zip(names, variance, strict=True)}

    def _prior(self, key: str, text: str) -> tuple[float, float]:
        return self._known(key, text) or (0.0, self._scale)

    def mean(self) -> Drawn:
        """The posterior means; of what was never seen, what was expected of it."""
        return self._drawn(self._mean, None)

    def draw(self, rng: np.random.Generator) -> Drawn:
        """One sample; what was never seen is sampled from its prior."""
        root = np.linalg.cholesky(self._spread + 1e-12 * np.eye(len(self._mean)))
        return self._drawn(self._mean + root @ rng.standard_normal(len(self._mean)), rng)

    def _drawn(self, effects: Array, rng: np.random.Generator | None) -> Drawn:
        known = {pair: float(e) for pair, e in zip(self._pairs, effects[1:], strict=True)}
        scales = {} if rng is None else self._scales
        base = self._centre + float(effects[0])
        apart = None
        if self._codes is not None:
            left = np.linalg.solve(self._root, self._y - self._x @ effects)
            apart = self._codes, np.linalg.solve(self._root.T, left)

        def unseen(key: str, text: str) -> tuple[float, float]:
            if not self._is_read(key):
                return 0.0, 0.0
            mean, scale = self._prior(key, text)
            # Values never tried are no bolder than those of the same key that were.
            return mean, min(scale, scales.get(key, scale))

        return Drawn(base, known, unseen, rng, apart)


class Drawn:
    """One set of effects: a function of features. `prior` gives mean and scale of unseen ones."""

    def __init__(
        self,
        base: float,
        effects: Mapping[Pair, float],
        prior: Callable[[str, str], tuple[float, float]],
        rng: np.random.Generator | None,
        apart: tuple[Codes, Array] | None,
    ):
        self._base, self._prior, self._rng, self._apart = base, prior, rng, apart
        self._effects = dict(effects)

    def __call__(self, features: Features) -> float:
        """The quantity, a logarithm for times."""
        total = self._base
        for pair in features.items():
            effect = self._effects.get(pair)
            total += self._unseen(pair) if effect is None else effect
        if self._apart is not None:
            codes, weights = self._apart
            total += float(codes.near(features) @ weights)
        return total

    def _unseen(self, pair: Pair) -> float:
        """The prior mean, or one sample of the prior."""
        mean, scale = self._prior(*pair)
        effect = mean if self._rng is None else float(self._rng.normal(mean, scale))
        self._effects[pair] = effect
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
        waited = self.patience * self.seconds(features) if self.patience else 0.0
        return time - float(np.log1p(-likely)) + waited


class StageModel:
    """All quantities of a study. `touches(key)` names the stages that an option can change.

    `times` and `seconds` say what is known beforehand of options' effects on the logarithms of the
    milliseconds of a stage and of the seconds of a trial.
    """

    def __init__(
        self,
        touches: Callable[[str], Iterable[str]],
        times: Prior | None = None,
        seconds: Prior | None = None,
    ):
        self._touches, self._times = touches, times
        self._parts: dict[str, Effects] = {}
        self._fails = Effects(_FAILURE_PRIOR, 0.2, lambda key: True)
        self._seconds = Effects(0.5, 0.3, lambda key: True, seconds)

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
        # What is no stage, any option can change.
        scale = _PRIOR if name in (*STAGES, "call") else _REST_PRIOR
        effects = Effects(
            *(scale, _NOISE, lambda key: name not in STAGES or name in self._touches(key)),
            self._times,
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
