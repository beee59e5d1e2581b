"""The course of a promotion, whatever measures: processes, or the simulator.

    tau           the baseline alone, in fresh processes
    screening     contenders, until each has the planned number of processes; the best are finalists
    confirmation  baseline and finalists once per round, in random order; nothing else is judged

Who measures is a `Bench`. `promote` gives one that starts processes, `promote --simulate` one that
draws numbers, so what is simulated is what runs.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from typing import Literal, Protocol

import numpy as np
import scipy  # its `stats` takes a second to load, so when it is used: --help does not
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict

from openpi_opt.confirm import power
from openpi_opt.confirm.judge import Confirmed, Subject, choose, gain
from openpi_opt.confirm.power import Costs, Plan, Promise, Tau
from openpi_opt.confirm.rounds import Measurer, NeededError, draw_rounds, measure_rounds

# Neighbours in time whose average is the drift: more than a round of confirmation has, so that
# what is left is what differs within a round.
WINDOW = 15
_TURNS = 4
# What a process takes is read from the journal for this many contenders, the fastest.
_TIMED = 20


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
    finalists: int = power.MAX_FINALISTS
    rounds: int | None = None
    limit_s: float | None = None
    tau_processes: int = power.TAU_PROCESSES
    known: int = 1


@dataclass(frozen=True)
class Judged:
    """What a promotion found."""

    schedule: Schedule
    baseline: Confirmed
    candidates: list[Confirmed]
    winner: Confirmed
    dropped: list[str] = field(default_factory=list)


def run(bench: Bench, baseline: Subject, contenders: Sequence[Subject], wanted: Wanted) -> Judged:
    """Measure what is missing, judge, choose.

    Raises:
        NeededError: the baseline was not ok once.
        power.TooShortError: nothing can be shown within the time.
    """
    schedule = bench.schedule()
    if schedule is None:
        schedule = _prepare(bench, baseline, contenders, wanted)
        bench.keep(schedule)
    subjects = {s.key: s for s in [baseline, *contenders]}
    found, dropped = measure_rounds(bench, schedule.rounds, [baseline.key])
    base = Confirmed(baseline, found[baseline.key])
    candidates = [
        Confirmed(subjects[key], found[key], gain(base.means_ms, found[key], schedule.alpha))
        for key in schedule.finalists
        if key not in dropped
    ]
    winner = choose(base, candidates, schedule.tie_alpha)
    return Judged(schedule, base, candidates, winner, dropped)


def _prepare(
    bench: Bench, baseline: Subject, contenders: Sequence[Subject], wanted: Wanted
) -> Schedule:
    places = min(wanted.finalists, len(contenders), power.MAX_FINALISTS)
    if not contenders or wanted.rounds is not None:
        pairs = wanted.rounds or wanted.tau_processes
        fastest = sorted(contenders, key=lambda s: s.first_ms)[:places]
        return _schedule(baseline, [s.key for s in fastest], pairs, wanted)
    bench.note(check_time(bench.seconds, baseline, contenders, wanted))
    baseline_tau = _measure_tau(bench, baseline, wanted.tau_processes)
    contenders = _near(contenders, places, baseline_tau) if wanted.known else contenders
    alone = len(contenders) <= places
    screening = _Screening(bench, contenders, 0 if alone else wanted.known)
    costs = _costs(bench.seconds, baseline, contenders, wanted)
    bench.note(
        f"spread between processes: {baseline_tau.value:.2%} in {wanted.tau_processes} processes "
        f"of the baseline; the rounds are planned when the {len(contenders)} contender(s) have "
        "shown theirs"
    )
    runs = _for_noise(costs, wanted.limit_s) if alone else power.MIN_SCREENING
    # What the processes of screening differ by is seen before confirmation begins, and none of them
    # is judged: the plan may follow it.
    while True:
        screening.run(runs)
        seen = screening.settled()
        tau = power.of_pair(baseline_tau, seen.tau)
        plan = power.make_plan(tau, costs, wanted.limit_s, screening.runs)
        if plan.screening <= screening.runs:
            break
        runs = plan.screening
    bench.note(explain(tau, seen.tails, costs, plan, wanted.limit_s))
    return _schedule(
        baseline, screening.best(places), plan.pairs, wanted, baseline_tau, plan.promise
    )


def check_time(
    seconds: Callable[[str], float],
    baseline: Subject,
    contenders: Sequence[Subject],
    wanted: Wanted,
) -> str:
    """What to expect of the time, by what processes took (`seconds`), before any is started.

    Raises:
        power.TooShortError: not even a machine that hardly scatters shows anything in the time.
    """
    places = min(wanted.finalists, len(contenders))
    if not contenders or wanted.rounds is not None:
        return ""

    def costs(tau: float) -> Costs:
        near = _near(contenders, places, Tau(tau, wanted.tau_processes - 1))
        return _costs(seconds, baseline, near if wanted.known else contenders, wanted)

    least_s = costs(power.CALM_TAU).least_s
    if wanted.limit_s is not None and wanted.limit_s < least_s:
        raise power.TooShortError(least_s)
    usual = costs(power.USUAL_TAU)
    plan = power.make_plan(Tau(power.USUAL_TAU, power.NOISE_FREEDOM), usual)
    takes = usual.seconds(plan.screening, plan.pairs)
    before = seconds(baseline.key) * wanted.tau_processes
    text = (
        f"time: about {duration(before)} to measure the spread between processes; then about "
        f"{duration(takes)} if it is {power.USUAL_TAU:.1%}, less if it is smaller"
    )
    if wanted.limit_s is not None and wanted.limit_s < takes:
        text += f". --minutes gives {duration(wanted.limit_s)}: only a larger gain may be promised"
    return text


def _costs(
    seconds: Callable[[str], float],
    baseline: Subject,
    contenders: Sequence[Subject],
    wanted: Wanted,
) -> Costs:
    places = min(wanted.finalists, len(contenders), power.MAX_FINALISTS)
    return Costs(
        contenders=len(contenders),
        finalists=places,
        contender_s=float(np.mean([seconds(s.key) for s in contenders[:_TIMED]])),
        baseline_s=seconds(baseline.key),
        known=0 if len(contenders) <= places else wanted.known,
    )


def _for_noise(costs: Costs, limit_s: float | None) -> int:
    """Processes of each finalist that show their spread, where nobody is screened out.

    They take a part of the time only; less than two of each show nothing.
    """
    wanted = 1 + math.ceil(power.NOISE_FREEDOM / costs.contenders)
    if limit_s is not None:
        one_each = costs.contenders * costs.contender_s
        wanted = min(wanted, int(power.NOISE_SHARE * limit_s / one_each))
    return wanted if wanted >= power.MIN_SCREENING else 0


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
        alpha=power.level(len(finalists)),
        tie_alpha=power.tie_level(len(finalists)),
        tau=tau and tau.value,
        tau_processes=wanted.tau_processes if tau else 0,
        promise=kept,
    )


def _measure_tau(bench: Bench, baseline: Subject, processes: int) -> Tau:
    found: list[float] = []
    with closing(bench.means("tau", ((baseline.key, n) for n in range(processes)))) as means:
        for key, _, mean in means:
            if mean is None:
                raise NeededError(key)
            found.append(mean)
    return power.spread(found)


def _near(contenders: Sequence[Subject], places: int, tau: Tau) -> list[Subject]:
    """Without those whose one process in the study is too far behind to belong to the finalists."""
    if len(contenders) <= places:
        return list(contenders)
    last = sorted(s.first_ms for s in contenders)[places - 1]
    limit = last * math.exp(power.CUT * math.sqrt(2) * tau.upper)
    return [s for s in contenders if s.first_ms <= limit]


class _Screening:
    """Processes of the contenders, in turns and in random order; those that fail are out.

    The study's process counts as the first when `known` is 1. `runs` is the number of processes
    that each contender has.
    """

    def __init__(self, bench: Bench, contenders: Sequence[Subject], known: int):
        self._bench, self._known, self.runs = bench, known, known
        # The same order after an interruption: it is the order of time, too.
        self._seed = zlib.crc32("\n".join(s.key for s in contenders).encode())
        self._first = [(s.key, math.log(s.first_ms)) for s in contenders]
        self._left = [s.key for s in contenders]
        self._new: list[tuple[str, float]] = []

    def run(self, runs: int) -> None:
        """Measure until each contender has `runs` processes."""
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

    def settled(self) -> Settled:
        """Levels of those left, and what their processes differ by."""
        series = [self._first, self._new] if self._known else [self._new]
        return settle([[(key, log) for key, log in each if key in self._left] for each in series])

    def best(self, places: int) -> list[str]:
        """The fastest, best first; without any process of its own one keeps the study's place."""
        levels = {**dict(self._first), **self.settled().levels}
        return sorted(self._left, key=lambda key: levels[key])[:places]


@dataclass(frozen=True)
class Settled:
    """Levels of configurations on the log scale, free of drift, with the tau that is left.

    `tails` is the excess kurtosis of what is left: 0 for normal noise, large where few processes
    are slow by far more than the others differ.
    """

    levels: dict[str, float]
    tau: Tau
    tails: float


def settle(series: Sequence[Sequence[tuple[str, float]]]) -> Settled:
    """Settle processes that ran one after another, given as (configuration, log of its mean).

    Each series is a stretch of time of its own. The drift that all share is the moving average over
    `WINDOW` neighbours of what is left beside the levels; both are taken off in turns. The order of
    the configurations is random, so the two hardly mix.
    """
    every = [list(each) for each in series if each]
    keys = list(dict.fromkeys(key for each in every for key, _ in each))
    if not keys:
        return Settled({}, Tau(0.0, 0), 0.0)
    place = {key: number for number, key in enumerate(keys)}
    who = np.array([place[key] for each in every for key, _ in each])
    logs = np.array([log for each in every for _, log in each])
    ends = np.cumsum([len(each) for each in every])[:-1]
    drift = np.zeros(len(logs))
    for _ in range(_TURNS):
        levels = np.bincount(who, logs - drift) / np.bincount(who)
        drift = np.concatenate([_smooth(part) for part in np.split(logs - levels[who], ends)])
    left = logs - drift - levels[who]
    taken = len(keys) - 1 + sum(max(1.0, len(each) / WINDOW) for each in every)
    freedom = math.floor(len(left) - taken)
    tau = Tau(math.sqrt(float(left @ left) / freedom), freedom) if freedom > 0 else Tau(0.0, 0)
    tails = float(scipy.stats.kurtosis(left)) if np.any(left != left[0]) else 0.0
    return Settled(dict(zip(keys, levels.tolist(), strict=True)), tau, tails)


def _smooth(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """Moving average [n] over `WINDOW` neighbours, fewer at the ends."""
    window = np.ones(min(WINDOW, 2 * len(values) - 1))
    sums, counts = (np.convolve(v, window, "same") for v in (values, np.ones(len(values))))
    return sums[: len(values)] / counts[: len(values)]


def explain(tau: Tau, tails: float, costs: Costs, plan: Plan, limit_s: float | None) -> str:
    """The noise, what it takes, and the promise that is kept, in plain words."""
    kept = plan.promise
    lines = [
        f"spread between processes: {tau.value:.2%} in a pair (planned for up to {kept.tau:.2%})"
    ]
    if kept.gain > power.GAIN and limit_s is not None:
        full = power.make_plan(tau, costs, screened=plan.screening)
        lines.append(
            f"a gain of {power.GAIN:.0%} cannot be promised in {duration(limit_s)}: that takes "
            f"about {duration(costs.seconds(full.screening, full.pairs))} (--minutes)"
        )
    lines.append(
        f"promise: a configuration at least {kept.gain:.1%} faster than the baseline is promoted "
        f"with at least {kept.probability:.0%} probability, one that is not faster in fewer than "
        "1% of promotions"
    )
    if tails > power.WILD:
        lines.append(
            "note: a few processes were slow by far more than the others differ (excess kurtosis "
            f"{tails:.0f}); with so rare a noise a true gain may be found some percent less often "
            "than promised"
        )
    lines.append(
        f"plan: {plan.screening} process(es) for each of {costs.contenders} contender(s) in "
        f"screening, then {plan.pairs} rounds of the baseline and {costs.finalists} finalist(s); "
        f"about {duration(costs.seconds(plan.screening, plan.pairs))}"
    )
    return "\n".join(lines)


def duration(seconds: float) -> str:
    """Seconds in words: `45 seconds`, `12 minutes`."""
    if seconds < 90:
        return f"{math.ceil(seconds)} seconds"
    return f"{math.ceil(seconds / 60)} minutes"
