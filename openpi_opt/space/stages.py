"""`sampler=stages`: a sampler for Optuna that knows what an inference is made of.

Each trial tells the time of every stage, and each option which stages it can change, so one trial
is a lesson for three smaller searches. `stage_model.StageModel` learns from them; a proposal is the
point that is fastest by the model's means or, every second time, under one sample of its effects,
found by changing one key at a time from a known point and from a random one. Only points that every
knob admits are looked at, and none that is known or being measured.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from optuna.samplers import BaseSampler
from optuna.trial import TrialState

from openpi_opt.errors import UserError
from openpi_opt.space.features import (
    PARTS,
    SECONDS,
    TOTAL,
    expected_seconds,
    expected_time,
    features,
    is_slow,
    is_tuned,
    quick_values,
    touched,
)
from openpi_opt.space.points import Points
from openpi_opt.space.space import Space
from openpi_opt.space.stage_model import Guess, Seen, StageModel

if TYPE_CHECKING:
    from optuna import Study
    from optuna.distributions import BaseDistribution
    from optuna.trial import FrozenTrial

# Random points before the model proposes: fewer leave it with effects that cannot be told apart.
RANDOM = 10
_TRIES = 400  # random points looked at for one that a knob admits
_PASSES = 2  # over all keys, from each start
_MOST_NEW, _MOST_TUNED = 6, 2
_CONTRADICTION = "invalid: "  # how the reason of a knob begins that other options can mend
_MOST_REASONS = 8

Params = dict[str, str]
Key = frozenset[tuple[str, str]]


@dataclass(frozen=True)
class Place:
    """A point of the space that every knob admits."""

    params: Params
    features: dict[str, str]

    @property
    def key(self) -> Key:
        """Equal for points that are the same configuration."""
        return frozenset(self.features.items())


class _Move(NamedTuple):
    """A change of a place that was not composed, and what it would about cost."""

    cost: float
    start: Place
    here: Place
    key: str
    text: str


class Map:
    """The space as places: composed, refused where a knob refuses, in canonical form."""

    def __init__(self, space: Space, points: Points):
        self.space = space
        self._points = points
        self.values = {key: tuple(d.values) for key, d in space.dimensions.items()}
        self._examples: dict[tuple[str, str], Params] = {}
        self._with: dict[tuple[str, str], Params] = {}
        self._acted: dict[tuple[str, str], dict[str, str]] = {}
        self._owned: dict[str, set[str]] = {}

    def place(self, params: Params) -> Place | None:
        """The place of a point; None where a knob refuses it, or its values contradict."""
        try:
            cfg = self._points.config(params)
        except UserError:
            return None
        for pair in params.items():
            self._examples.setdefault(pair, params)
        return Place(params, features(cfg, self.space, params))

    def anywhere(self, chosen: random.Random, default: float = 0.5) -> Place | None:
        """A random place: a key is at its default with that chance, else at any of its values.

        Keys whose default is a table of measured values stay there.
        """
        for _ in range(_TRIES):
            params = {
                key: texts[0]
                if is_tuned(key) or chosen.random() < default
                else chosen.choice(texts)
                for key, texts in self.values.items()
            }
            found = self.place(params)
            if found is not None:
                return found
        return None

    def quick(self, place: Place) -> Place:
        """The place with the values of a short trial, where a knob admits them."""
        slow = [key for key, text in place.features.items() if is_slow({key: text})]
        plain = {key: self.values[key][0] for key in slow if key in self.values}
        place = (self.place({**place.params, **plain}) if plain else None) or place
        for option, text in quick_values().items():
            key = option if option in self.values else option.split(".")[0]
            if text in self.values.get(key, ()):
                place = self.place({**place.params, key: text}) or place
        return place

    def roughly(self, place: Place, key: str, text: str) -> dict[str, str] | None:
        """The features after a change as it acted elsewhere, without composing; None: not known."""
        acted = self._acted.get((key, text))
        if acted is None:
            return None
        kept = {name: v for name, v in place.features.items() if name not in self._owned[key]}
        return {**kept, **acted}

    def _note(self, place: Place, other: Place, key: str, text: str) -> None:
        # In the order of the features: a set's would differ from one process to the next.
        gone = {k: v for k, v in place.features.items() if other.features.get(k) != v}
        come = {k: v for k, v in other.features.items() if place.features.get(k) != v}
        if gone or come:  # else nothing reads it here, which says nothing of elsewhere
            self._owned.setdefault(key, set()).update(gone, come)
            self._acted[key, text] = come

    def changed(self, place: Place, key: str, text: str) -> Place | None:
        """The place with one value changed, and as few others as a knob then asks for.

        An option such as `fusion.expert_layer` needs others. Which ones, a place that has it shows:
        every other key goes back to its value here unless a knob refuses that.
        """
        direct = self.place({**place.params, key: text})
        if direct is not None:
            self._note(place, direct, key, text)
            return direct
        more = self._with.get((key, text))
        if more is not None and (found := self.place({**place.params, **more, key: text})):
            return found
        if (key, text) not in self._examples:
            # A value that nothing admits is not looked for again.
            self._examples[key, text] = self._example(key, text) or {}
        example = self._examples[key, text]
        if not example:
            return None
        nearest = Place(example, {})
        for other, wanted in place.params.items():
            if other != key and nearest.params[other] != wanted:
                nearest = self.place({**nearest.params, other: wanted}) or nearest
        self._with[key, text] = {
            k: v for k, v in nearest.params.items() if place.params[k] != v and k != key
        }
        return self.place(nearest.params)

    def _example(self, key: str, text: str) -> Params | None:
        """A point with this value that is admitted, found by following the reasons of refusals.

        Of the defaults one key is changed, or two together, as long as that changes the reason.
        """
        params = {**{name: texts[0] for name, texts in self.values.items()}, key: text}
        reasons: list[str] = []
        while len(reasons) < _MOST_REASONS:
            reason = self._reason(params)
            if reason is None:
                return params
            if not reason.startswith(_CONTRADICTION):  # nothing here can mend it
                return None
            reasons.append(reason)
            found = self._mended(params, key, reasons)
            if found is None:
                return None
            params = found
        return None

    def _mended(self, params: Params, key: str, known: Sequence[str]) -> Params | None:
        """The point with one or two other values that is refused for a new reason, or for none.

        Keys that the reason names come first, and reasons of the same option: another option may
        only bring a refusal of its own.
        """
        single = [
            {name: text}
            for name, texts in self.values.items()
            for text in texts
            if name != key and text != params[name] and not is_tuned(name)
        ]
        named = [change for change in single if next(iter(change)) in known[-1]]
        for changes in (named, _pairs(named), single, _pairs(single)):
            later: Params | None = None
            for change in changes:
                changed = {**params, **change}
                reason = self._reason(changed)
                if reason is None:
                    return changed
                if later is None and _subject(reason) == _subject(known[-1]):
                    later = changed if reason not in known else None
            if later is not None:
                return later
        return None

    def _reason(self, params: Params) -> str | None:
        """Why a point is refused; None where it is not."""
        try:
            self._points.config(params)
        except UserError as error:
            return str(error)
        return None


def _pairs(changes: Sequence[Params]) -> Iterator[Params]:
    pairs = itertools.combinations(changes, 2)
    return ({**a, **b} for a, b in pairs if a.keys() != b.keys())


def _subject(reason: str) -> str:
    """What a contradiction is about: its first word, an option."""
    return reason.removeprefix(_CONTRADICTION).split(" ")[0] if _CONTRADICTION in reason else ""


class StagesSampler(BaseSampler):
    """Proposes by the model. `patience()` says how much a trial's seconds count: 0 not at all.

    `hurried`: what compiles for minutes is never proposed.
    """

    def __init__(
        self,
        space: Space,
        points: Points,
        seed: int,
        patience: Callable[[], float] = lambda: 0.0,
        hurried: bool = False,
    ):
        self._hurried = hurried
        self._map = Map(space, points)
        self._space = space
        self._random = random.Random(seed)
        self._rng = np.random.default_rng(seed)
        self._patience = patience
        self._model = StageModel(touched, expected_time, expected_seconds)
        self._turn = 0
        self._tried: set[tuple[str, str]] = set()  # options, with their values
        self._places: dict[tuple[str, ...], Place | None] = {}

    def infer_relative_search_space(
        self, study: Study, trial: FrozenTrial
    ) -> dict[str, BaseDistribution]:
        """All of it."""
        return self._space.distributions()

    def sample_relative(
        self, study: Study, trial: FrozenTrial, search_space: dict[str, BaseDistribution]
    ) -> dict[str, Any]:
        """A whole point."""
        others = [t for t in study.get_trials(deepcopy=False) if t.number != trial.number]
        return {**self._space.values(self.propose(others))}

    def sample_independent(
        self,
        study: Study,
        trial: FrozenTrial,
        param_name: str,
        param_distribution: BaseDistribution,
    ) -> Any:
        """A key that an enqueued point leaves out stands at its default."""
        dimension = self._space.dimensions[param_name]
        return dimension.value(dimension.values[0])

    def propose(self, trials: Sequence[FrozenTrial]) -> Params:
        """The point that is worth a trial next."""
        seen, pending = self._sorted(trials)
        known = {place.key for place, _ in seen} | {place.key for place in pending}
        self._tried = set().union(*known)
        timed = [place for place, trial in seen if trial.total is not None and not trial.bad]
        if len(seen) + len(pending) < RANDOM or not timed:
            return self._any(known, quick=True)
        guess = self._draw([trial for _, trial in seen], pending)
        starts = sorted(timed, key=lambda place: guess.cost(place.features))[:1]
        if (somewhere := self._map.anywhere(self._random)) is not None:
            starts.append(somewhere)
        looked: dict[Key, tuple[float, Params]] = {}
        left: list[_Move] = []
        for start in starts:
            left += self._descend(start, guess, looked)
        fresh = [entry for key, entry in looked.items() if key not in known]
        best = min(fresh, key=lambda entry: entry[0], default=None)
        for move in sorted(left, key=lambda move: move.cost):
            if best is not None and best[0] <= move.cost:
                break
            other = self._map.changed(move.here, move.key, move.text)
            if other is not None and other.key not in known and self._admits(other, move.start):
                best = guess.cost(other.features), other.params
        return best[1] if best is not None else self._any(known)

    def guess(self, trials: Sequence[FrozenTrial]) -> Callable[[Params], float]:
        """The expected cost of a point, to order points by."""
        seen, _ = self._sorted(trials)
        self._model.fit([trial for _, trial in seen])
        mean = self._model.mean()

        def cost(params: Params) -> float:
            place = self.place(params)
            return float("inf") if place is None else mean.cost(place.features)

        return cost

    def _draw(self, seen: list[Seen], pending: Sequence[Place]) -> Guess:
        """A sample of the model, to which what is being measured looks as it expects."""
        self._model.fit(seen)
        if pending:
            mean = self._model.mean()
            believed = [
                Seen(
                    place.features,
                    mean.milliseconds(place.features),
                    {name: float(np.exp(p(place.features))) for name, p in mean.parts.items()},
                )
                for place in pending
            ]
            self._model.fit([*seen, *believed])
        self._turn += 1
        if self._turn % 2:  # what is best by all that is known; the other half explores
            return self._model.mean(self._patience())
        return self._model.draw(self._rng, self._patience())

    def _descend(
        self, start: Place, guess: Guess, looked: dict[Key, tuple[float, Params]]
    ) -> list[_Move]:
        """Change one key at a time as long as that is faster; every place goes to `looked`.

        At most `_MOST_NEW` options of a place were never tried: of many at once a trial says
        little, and it is as slow as the worst of them. At most `_MOST_TUNED` whose default is what
        measuring found best are changed: there are many of these, and little is in them. Returns
        the changes that were not composed, since what they did elsewhere makes nothing faster here.
        """
        here, cost = start, guess.cost(start.features)
        looked.setdefault(start.key, (cost, start.params))
        left = []
        for _ in range(_PASSES):
            before = cost
            for key in self._random.sample(sorted(self._map.values), len(self._map.values)):
                for text in self._map.values[key]:
                    if text == here.params[key]:
                        continue
                    rough = self._map.roughly(here, key, text)
                    expected = None if rough is None else guess.cost(rough)
                    if expected is not None and expected >= cost:
                        left.append(_Move(expected, start, here, key, text))
                        continue
                    other = self._map.changed(here, key, text)
                    if other is not None and other.key == here.key and is_tuned(key):
                        break  # its kernel does not run here
                    if other is None or other.key in looked or not self._admits(other, start):
                        continue
                    found = guess.cost(other.features)
                    looked[other.key] = found, other.params
                    if found < cost:
                        here, cost = other, found
            if cost == before:
                break
        return left

    def _admits(self, place: Place, start: Place) -> bool:
        new = sum(pair not in self._tried for pair in place.features.items())
        changed = {key for key, _ in place.features.items() ^ start.features.items()}
        few = new <= _MOST_NEW and sum(map(is_tuned, changed)) <= _MOST_TUNED
        return few and not (self._hurried and is_slow(place.features))

    def _any(self, known: set[Key], quick: bool = False) -> Params:
        """A random point that is not known, if there is one among many.

        The first points are `quick`: no search begins by compiling for minutes.
        """
        found = None
        for _ in range(_TRIES):
            found = self._map.anywhere(self._random, 0.2 if quick else 0.5)
            if found is None:
                break
            if quick:
                found = self._map.quick(found)
            if found.key not in known and not (
                (quick or self._hurried) and is_slow(found.features)
            ):
                break
        return found.params if found else {key: t[0] for key, t in self._map.values.items()}

    def place(self, params: Params) -> Place | None:
        """As the map's, kept: the trials of a study are asked for again at every proposal."""
        key = tuple(params.values())
        if key not in self._places:
            self._places[key] = self._map.place(params)
        return self._places[key]

    def _sorted(
        self, trials: Sequence[FrozenTrial]
    ) -> tuple[list[tuple[Place, Seen]], list[Place]]:
        """Finished trials as the model learns from them, and the places being measured."""
        finished, pending = [], []
        for trial in trials:
            if trial.params.keys() != self._space.dimensions.keys():
                continue
            place = self.place(self._space.texts(trial.params))
            if place is None:
                continue
            if trial.state in (TrialState.COMPLETE, TrialState.PRUNED):
                finished.append((place, _seen(place, trial)))
            elif trial.state == TrialState.RUNNING:
                pending.append(place)
        return finished, pending


def _seen(place: Place, trial: FrozenTrial) -> Seen:
    attributes = trial.user_attrs
    total = attributes.get(TOTAL) or (trial.values[0] if trial.values else None)
    bad = total is None or any(excess > 0 for excess in trial.constraints.values())
    return Seen(
        place.features, total, attributes.get(PARTS) or {}, attributes.get(SECONDS) or None, bad
    )
