"""The course of a promotion, whatever measures: processes, or the simulator.

    tau        the baseline alone, in fresh processes
    screening  contenders, until each has the planned number of processes; the best are finalists
    confirmation  baseline and finalists once per round, in random order; nothing else is judged

Who measures is a `Bench`. `promote` gives one that starts processes, `confirm --simulate` one that
draws numbers, so what is simulated is what runs.
"""

from __future__ import annotations

import math
import random
import zlib
from collections.abc import Generator, Iterable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from typing import Literal, Protocol, TypeVar

import numpy as np
from pydantic import BaseModel, ConfigDict

from openpi_opt.confirm import promise
from openpi_opt.confirm.deadline import Deadline
from openpi_opt.confirm.judge import Confirmed, Subject, choose, gain
from openpi_opt.confirm.noise import Fit, Noise, fit, noise_of
from openpi_opt.confirm.promise import Costs, Plan, Promise, Tau

Stage = Literal["tau", "screening", "confirmation"]
Key = TypeVar("Key", bound=str)


class Schedule(BaseModel):
    """All that is fixed before the first confirmation run: who, how often, in which order.

    `rounds` holds keys of configurations; `baseline` is in every round.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    schema_version: Literal[1] = 1
    baseline: str
    finalists: list[str]
    rounds: list[list[str]]
    seed: int
    alpha: float
    tie_alpha: float
    tau: float | None
    tau_processes: int
    promise: Promise | None


# A configuration's key, and the number of its process in the stage.
Place = tuple[str, int]
# With the mean latency of that process in ms; None: it was not ok.
Mean = tuple[str, int, float | None]


class Measurer(Protocol):
    """Who measures."""

    def means(self, stage: Stage, places: Iterable[Place]) -> Generator[Mean, None, None]:
        """Mean latency in ms of one fresh process for each place, in order; None: not ok.

        Some places are asked for before the means of those in front of them are there.
        """


class Bench(Measurer, Protocol):
    """Who measures, and who remembers the schedule."""

    def seconds(self, key: str) -> float:
        """What one process of this configuration takes, as far as is known."""

    def note(self, text: str) -> None:
        """Say something."""

    def schedule(self) -> Schedule | None:
        """The schedule of this promotion, when it was interrupted after it had been drawn."""

    def keep(self, schedule: Schedule) -> None:
        """Remember it; called before the first confirmation run."""


@dataclass(frozen=True)
class Wanted:
    """What the user asks for.

    `rounds` fixes the number of confirmation rounds by hand: tau is then not measured and no
    promise of finding a gain is made. `limit_s` is the time that there is in seconds. `known` is
    the number of screening processes that each contender has already. `seed` draws the orders.
    """

    seed: int
    finalists: int = promise.MAX_FINALISTS
    rounds: int | None = None
    limit_s: float | None = None
    tau_processes: int = promise.TAU_PROCESSES
    known: int = 1


@dataclass(frozen=True)
class Judged:
    """What a promotion found."""

    schedule: Schedule
    baseline: Confirmed
    candidates: list[Confirmed]
    winner: Confirmed
    dropped: list[str] = field(default_factory=list)


class BaselineError(Exception):
    """The baseline did not end ok, so there is nothing to compare with."""


def run(bench: Bench, baseline: Subject, contenders: Sequence[Subject], wanted: Wanted) -> Judged:
    """Measure what is missing, judge, choose.

    Raises:
        BaselineError: the baseline was not ok once.
        promise.TooShortError: nothing can be shown within the time.
    """
    schedule = bench.schedule()
    if schedule is None:
        schedule = _prepare(bench, baseline, contenders, wanted)
        bench.keep(schedule)
    subjects = {s.key: s for s in [baseline, *contenders]}
    found, dropped = measure_rounds(bench, schedule.rounds, baseline.key)
    base = Confirmed(baseline, found[baseline.key])
    candidates = [
        Confirmed(subjects[key], found[key], gain(base.means_ms, found[key], schedule.alpha))
        for key in schedule.finalists
        if key not in dropped
    ]
    winner = choose(base, candidates, schedule.tie_alpha)
    return Judged(schedule, base, candidates, winner, dropped)


def draw_rounds(keys: Sequence[Key], count: int, seed: int) -> list[list[Key]]:
    """`count` rounds, each all of `keys` in an order of its own: every order is as likely.

    So within each pair of a round either is first with probability 1/2.
    """
    drawn = random.Random(seed)
    return [drawn.sample(list(keys), len(keys)) for _ in range(count)]


def measure_rounds(
    bench: Measurer,
    rounds: Sequence[Sequence[str]],
    needed: str,
    deadline: Deadline | None = None,
) -> tuple[dict[str, list[float]], list[str]]:
    """The means of every configuration by round, and who was dropped.

    A configuration that is not ok once is not run again: it cannot be judged any more. With a
    `deadline` there may be fewer rounds, but only whole ones.

    Raises:
        BaselineError: `needed` was not ok.
    """
    found: dict[str, list[float]] = {key: [] for order in rounds for key in order}
    dropped: list[str] = []

    def places() -> Iterator[Place]:
        for number, order in enumerate(rounds):
            done = sum(map(len, found.values())) / len(order)
            if deadline is not None and not deadline.another(number, done):
                return
            yield from ((key, number) for key in order if key not in dropped)

    with closing(bench.means("confirmation", places())) as means:
        for key, _, mean in means:
            if key in dropped:
                continue  # it had been started ahead
            if mean is not None:
                found[key].append(mean)
            elif key == needed:
                raise BaselineError
            else:
                dropped.append(key)
    return found, dropped


def _prepare(
    bench: Bench, baseline: Subject, contenders: Sequence[Subject], wanted: Wanted
) -> Schedule:
    places = min(wanted.finalists, len(contenders), promise.MAX_FINALISTS)
    if not contenders:
        pairs = wanted.rounds or wanted.tau_processes
        return _schedule(baseline, [], pairs, wanted)
    if wanted.rounds is not None:
        first = _Screening(bench, contenders, wanted)
        return _schedule(baseline, first.best(places), wanted.rounds, wanted)
    means = _measure_tau(bench, baseline, wanted.tau_processes)
    tau = promise.spread(means)
    contenders = _near(contenders, places, tau) if wanted.known else contenders
    alone = len(contenders) <= places
    screening = _Screening(bench, contenders, wanted, only_new=alone)
    costs = Costs(
        contenders=len(contenders),
        finalists=places,
        contender_s=_mean([bench.seconds(s.key) for s in contenders]),
        baseline_s=bench.seconds(baseline.key),
        known=screening.runs,
    )
    least = _for_noise(costs, wanted.limit_s) if alone else 0
    plan = promise.make_plan(tau, costs, wanted.limit_s, least)
    bench.note(_beginning(tau, costs, plan))
    # What the processes of screening differ by is seen before confirmation begins, and none of them
    # is judged: the plan may follow it.
    while True:
        screening.run(plan.screening)
        fit = screening.fit()
        noise = noise_of(np.log(means).tolist(), fit)
        plan = promise.make_plan(noise, costs, wanted.limit_s, screening.runs)
        if plan.screening <= screening.runs:
            break
    bench.note(explain(noise, costs, plan, wanted.limit_s))
    return _schedule(baseline, screening.best(places), plan.pairs, wanted, tau, plan.promise)


def _for_noise(costs: Costs, limit_s: float | None) -> int:
    """Processes of each finalist that show their noise, where there is nobody to leave out.

    They take a part of the time only; less than two of each show nothing.
    """
    wanted = 1 + math.ceil(promise.NOISE_FREEDOM / costs.contenders)
    if limit_s is not None:
        one_each = costs.contenders * costs.contender_s
        wanted = min(wanted, int(promise.NOISE_SHARE * limit_s / one_each))
    return wanted if wanted >= promise.MIN_SCREENING else 0


def _schedule(
    baseline: Subject,
    finalists: list[str],
    pairs: int,
    wanted: Wanted,
    tau: Tau | None = None,
    kept: Promise | None = None,
) -> Schedule:
    return Schedule(
        baseline=baseline.key,
        finalists=finalists,
        rounds=draw_rounds([baseline.key, *finalists], pairs, wanted.seed),
        seed=wanted.seed,
        alpha=promise.level(len(finalists)),
        tie_alpha=promise.tie_level(len(finalists)),
        tau=tau and tau.value,
        tau_processes=tau.processes if tau else 0,
        promise=kept,
    )


def _measure_tau(bench: Bench, baseline: Subject, processes: int) -> list[float]:
    found: list[float] = []
    with closing(bench.means("tau", ((baseline.key, n) for n in range(processes)))) as means:
        for _, _, mean in means:
            if mean is None:
                raise BaselineError
            found.append(mean)
    return found


def _near(contenders: Sequence[Subject], places: int, tau: Tau) -> list[Subject]:
    """Without those whose one process in the study is too far behind to belong to the finalists."""
    if len(contenders) <= places:
        return list(contenders)
    last = sorted(s.first_ms for s in contenders)[places - 1]
    limit = last * math.exp(promise.CUT * math.sqrt(2) * tau.upper)
    return [s for s in contenders if s.first_ms <= limit]


class _Screening:
    """Processes of the contenders, in turns and in random order; those that fail are out.

    The study's process counts as the first when it is `known`, unless `only_new` ones are to count.
    `runs` is the number of processes that each has.
    """

    def __init__(
        self, bench: Bench, contenders: Sequence[Subject], wanted: Wanted, only_new: bool = False
    ):
        self._bench = bench
        # The same order after an interruption: it is the order of time, too.
        self._seed = zlib.crc32("\n".join(s.key for s in contenders).encode())
        self._known = 0 if only_new else wanted.known
        self.runs = self._known
        self._first = [(s.key, math.log(s.first_ms)) for s in contenders]
        self._left = [s.key for s in contenders]
        self._new: list[tuple[str, float]] = []

    def run(self, runs: int) -> None:
        """Measure until each contender has so many processes."""
        # The first rounds are the same however many are drawn.
        rounds = draw_rounds([key for key, _ in self._first], runs - self._known, self._seed)
        places = (
            (key, number)
            for number, order in enumerate(rounds)
            for key in order
            if number >= self.runs - self._known and key in self._left
        )
        with closing(self._bench.means("screening", places)) as means:
            for key, _, mean in means:
                if key not in self._left:
                    continue  # it had been started ahead
                if mean is None:
                    self._left.remove(key)
                else:
                    self._new.append((key, math.log(mean)))
        self.runs = max(self.runs, runs)

    def fit(self) -> Fit:
        """Levels of those left, and what their processes differ by."""
        series = [self._first, self._new] if self._known else [self._new]
        return fit([[(key, log) for key, log in each if key in self._left] for each in series])

    def best(self, places: int) -> list[str]:
        """The fastest, best first; without any process of its own one keeps the study's place."""
        levels = {**dict(self._first), **self.fit().levels}
        return sorted(self._left, key=lambda key: levels[key])[:places]


def _beginning(tau: Tau, costs: Costs, plan: Plan) -> str:
    minutes = costs.seconds(plan.screening, plan.pairs) / 60
    return (
        f"spread between processes: {tau.value:.2%} in {tau.processes} processes of the baseline; "
        f"so about {plan.pairs} rounds and {minutes:.0f} minutes, to be planned when the "
        f"{costs.contenders} contender(s) have shown theirs"
    )


def explain(noise: Noise, costs: Costs, plan: Plan, limit_s: float | None) -> str:
    """The noise, what it takes, and the promise that is kept, in plain words."""
    kept = plan.promise
    minutes = costs.seconds(plan.screening, plan.pairs) / 60
    lines = [
        f"spread between processes: {noise.tau:.2%} in a pair (planned for up to {kept.tau:.2%}, "
        f"and for tails as they were seen)"
    ]
    if kept.gain > promise.GAIN:
        full = promise.make_plan(noise, costs, screened=plan.screening)
        needed = costs.seconds(full.screening, full.pairs) / 60
        lines.append(
            f"a gain of {promise.GAIN:.0%} cannot be promised in {(limit_s or 0) / 60:.0f} "
            f"minutes: that takes about {needed:.0f} (--minutes)"
        )
    lines.append(
        f"promise: a configuration at least {kept.gain:.1%} faster than the baseline is promoted "
        f"with at least {kept.probability:.0%} probability, one that is not faster in fewer than "
        "1% of promotions"
    )
    if noise.excess_kurtosis > promise.WILD:
        lines.append(
            "note: a few processes were slow by far more than the others differ (excess kurtosis "
            f"{noise.excess_kurtosis:.0f}); with so rare a noise a true gain may be found some "
            "percent less often than promised"
        )
    lines.append(
        f"plan: {plan.screening} process(es) for each of {costs.contenders} contender(s) in "
        f"screening, then {plan.pairs} rounds of the baseline and {costs.finalists} finalist(s); "
        f"about {minutes:.0f} minutes"
    )
    return "\n".join(lines)


def _mean(values: Sequence[float]) -> float:
    return float(np.mean(values)) if values else 0.0
