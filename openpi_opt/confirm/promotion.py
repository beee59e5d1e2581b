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
from abc import ABC, abstractmethod
from collections.abc import Callable, Generator, Iterable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Literal

import numpy as np
import scipy  # its `stats` takes a second to load, so when it is used: --help does not
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict

from openpi_opt.confirm import power
from openpi_opt.confirm.judge import Confirmed, Subject, choose, gain
from openpi_opt.confirm.power import Costs, Plan, Promise, Tau
from openpi_opt.confirm.rounds import draw_rounds, measure_rounds

Stage = Literal["tau", "screening", "confirmation"]
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


class Bench(ABC):
    """Measures, and remembers the schedule; this one neither remembers nor tells anything."""

    @abstractmethod
    def means(
        self, stage: Stage, places: Iterable[tuple[str, int]]
    ) -> Generator[tuple[str, float | None], None, None]:
        """Measure for a stage, as `rounds.Measure` says."""

    def seconds(self, key: str) -> float:
        """What one process of this configuration takes, as far as is known."""
        return 1.0

    def note(self, text: str) -> None:  # noqa: B027  not all tell
        """Tell the user."""

    def schedule(self) -> Schedule | None:
        """The schedule of this promotion, when it was interrupted after it had been drawn."""
        return None

    def keep(self, schedule: Schedule) -> None:  # noqa: B027  not all remember
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

    Raises NeededError: the baseline was not ok once. power.TooShortError: nothing can be shown
    within the time.
    """
    schedule = bench.schedule()
    if schedule is None:
        schedule = _prepare(bench, baseline, contenders, wanted)
        bench.keep(schedule)
    subjects = {s.key: s for s in [baseline, *contenders]}
    confirm = partial(bench.means, "confirmation")
    found, dropped = measure_rounds(confirm, schedule.rounds, [baseline.key])
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
    """Tau, screening and plan, as far as they are asked for; then draw the rounds."""
    places, tau, promise = min(wanted.finalists, len(contenders)), None, None
    if not contenders or wanted.rounds is not None:
        pairs = wanted.rounds or power.TAU_PROCESSES
        finalists = [s.key for s in sorted(contenders, key=lambda s: s.first_ms)[:places]]
    else:
        bench.note(check_time(bench.seconds, baseline, contenders, wanted))
        alone = [[baseline.key]] * power.TAU_PROCESSES
        means, _ = measure_rounds(partial(bench.means, "tau"), alone, [baseline.key])
        tau = power.spread(means[baseline.key])
        finalists, plan = _screen(bench, tau, baseline, contenders, wanted)
        pairs, promise = plan.pairs, plan.promise
    return Schedule(
        baseline=baseline.key,
        finalists=finalists,
        rounds=draw_rounds([baseline.key, *finalists], pairs, wanted.seed),
        seed=wanted.seed,
        alpha=power.level(len(finalists)),
        tie_alpha=power.level(math.comb(len(finalists), 2)),
        tau=tau and tau.value,
        tau_processes=power.TAU_PROCESSES if tau else 0,
        promise=promise,
    )


def _screen(
    bench: Bench, tau: Tau, baseline: Subject, contenders: Sequence[Subject], wanted: Wanted
) -> tuple[list[str], Plan]:
    """The finalists, the best first, and the plan of their rounds.

    What the processes of screening differ by is seen before confirmation begins, and none of them
    is judged: the plan may follow it. The orders are the same after an interruption.
    """
    contenders, costs = _competing(bench.seconds, baseline, contenders, tau, wanted)
    bench.note(
        f"spread between processes: {tau.value:.2%} in {power.TAU_PROCESSES} processes "
        f"of the baseline; the rounds are planned when the {len(contenders)} contender(s) have "
        "shown theirs"
    )
    logs = {s.key: [math.log(s.first_ms)] * costs.known for s in contenders}
    seed = zlib.crc32("\n".join(logs).encode())
    everyone, have, runs = [*logs], costs.known, _first_runs(costs, wanted.limit_s)
    while True:
        orders = draw_rounds(everyone, runs - costs.known, seed)[have - costs.known :]
        rounds = [[key for key in order if key in logs] for order in orders]
        measure = partial(bench.means, "screening")
        means, failed = measure_rounds(measure, rounds, first=have - costs.known)
        logs = {
            key: [*known, *np.log(means.get(key, [])).tolist()]
            for key, known in logs.items()
            if key not in failed
        }
        have = max(have, runs)
        seen, tails = settle(np.array([*logs.values()]).T)
        of_pair = power.of_pair(tau, seen)
        plan = power.make_plan(of_pair, costs, wanted.limit_s, have)
        if plan.screening <= have:
            break
        runs = plan.screening
    bench.note(explain(of_pair, tails, costs, plan, wanted.limit_s))
    first = {s.key: math.log(s.first_ms) for s in contenders}
    best = sorted(logs, key=lambda key: float(np.mean(logs[key] or first[key])))
    return best[: costs.finalists], plan


def settle(logs: NDArray[np.float64]) -> tuple[Tau, float]:
    """The spread between processes when levels and rounds are taken off, and its excess kurtosis.

    `logs` [rounds, configurations] holds logarithms of means. What a round adds to all of them is
    drift of the machine, or the day of the sweep. With one configuration that cannot be told from
    spread, so all of it counts. The excess kurtosis is 0 for normal noise, and large where few
    processes are slow by far more than the others differ.
    """
    if not logs.size:
        return Tau(0.0, 0), 0.0
    rounds, configurations = logs.shape
    left = logs - logs.mean(axis=0)
    if configurations > 1:
        left = left - left.mean(axis=1, keepdims=True)
    freedom = (rounds - 1) * max(1, configurations - 1)
    if not freedom or not np.any(left != left[0, 0]):
        return Tau(0.0, freedom), 0.0
    tau = Tau(math.sqrt(float(np.sum(left**2)) / freedom), freedom)
    return tau, float(scipy.stats.kurtosis(left, axis=None))


def check_time(
    seconds: Callable[[str], float],
    baseline: Subject,
    contenders: Sequence[Subject],
    wanted: Wanted,
) -> str:
    """What to say of the time before any process starts; `seconds` tells what one takes.

    Raises power.TooShortError: not even a machine that hardly scatters shows anything in the time.
    """
    if not contenders or wanted.rounds is not None:
        return ""

    def costs(tau: float) -> Costs:
        estimate = Tau(tau, power.TAU_PROCESSES - 1)
        return _competing(seconds, baseline, contenders, estimate, wanted)[1]

    limit_s = math.inf if wanted.limit_s is None else wanted.limit_s
    least_s = costs(power.CALM_TAU).least_s
    if limit_s < least_s:
        raise power.TooShortError(limit_s, least_s)
    usual = costs(power.USUAL_TAU)
    plan = power.make_plan(Tau(power.USUAL_TAU, power.NOISE_FREEDOM), usual)
    takes = usual.seconds(plan.screening, plan.pairs)
    before = seconds(baseline.key) * power.TAU_PROCESSES
    text = (
        f"time: about {duration(before)} to measure the spread between processes; then about "
        f"{duration(takes)} if it is {power.USUAL_TAU:.1%}, less if it is smaller"
    )
    if limit_s < takes:
        text += f". --minutes gives {duration(limit_s)}: only a larger gain may be promised"
    return text


def _competing(
    seconds: Callable[[str], float],
    baseline: Subject,
    contenders: Sequence[Subject],
    tau: Tau,
    wanted: Wanted,
) -> tuple[list[Subject], Costs]:
    """Those that may belong to the finalists, and what their processes take.

    Left out is whose one process in the study is too far behind.
    """
    near = list(contenders)
    if len(near) > wanted.finalists and wanted.known:
        last = sorted(s.first_ms for s in near)[wanted.finalists - 1]
        limit = last * math.exp(power.CUT * math.sqrt(2) * tau.upper)
        near = [s for s in near if s.first_ms <= limit]
    places = min(wanted.finalists, len(near))
    return near, Costs(
        contenders=len(near),
        finalists=places,
        contender_s=float(np.mean([seconds(s.key) for s in near[:_TIMED]])),
        baseline_s=seconds(baseline.key),
        known=0 if len(near) <= places else wanted.known,
    )


def _first_runs(costs: Costs, limit_s: float | None) -> int:
    """Processes of each contender before the first plan.

    Where nobody is screened out they show the spread, in a part of the time only; less than two of
    each show nothing.
    """
    if costs.contenders > costs.finalists:
        return power.MIN_SCREENING
    wanted: float = 1 + math.ceil(power.NOISE_FREEDOM / costs.contenders)
    if limit_s is not None:
        wanted = min(wanted, power.NOISE_SHARE * limit_s / costs.contenders / costs.contender_s)
    return int(wanted) if wanted >= power.MIN_SCREENING else 0


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
