"""What results teach a sweep: the fastest so far, which classes fail, what its sampler knows.

A class of combinations is a set of key=value pairs. It is barred when at least three different
configurations in it ran, every one failed in the same way, and something outside it did not fail
so. The class named is the most general one; where several explain the same failures equally well,
all of their pairs together, so that nothing is barred that was not seen to fail.
"""

from __future__ import annotations

import itertools
import json
import math
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from openpi_opt.config import RACE_FILE, Config, is_lossy
from openpi_opt.criteria import Criteria
from openpi_opt.engine.display import Display, shown
from openpi_opt.engine.ledger import Job, Ledger
from openpi_opt.result import Failed, Ok, Pruned, TrialResult, Wrong, write_atomic
from openpi_opt.space.optimizer import Optimizer
from openpi_opt.space.settings import Settings
from openpi_opt.track.journal import Record

MIN_FAILURES = 3
_MOST_KEYS = 2
Pairs = frozenset[tuple[str, str]]


class Findings:
    """Results of one study, of this sweep and of others, as far as `space` is concerned."""

    def __init__(
        self,
        settings: Settings,
        ledger: Ledger,
        optimizer: Optimizer,
        criteria: Criteria,
        display: Display,
        space: str,
    ):
        self.ledger, self.optimizer, self.criteria, self.space = ledger, optimizer, criteria, space
        self.baselines: dict[str, Record | None] = {}  # by context; None while it is measured
        self._settings, self._display = settings, display
        self._lessons = Lessons()
        self._barred: Counter[FailingClass] = Counter()  # points that were left out
        self._best: dict[str, float] = {}  # milliseconds, by context
        self._read = 0  # records of the journal that were looked at

    def begin(self) -> None:
        """Take in what is known."""
        if self._settings.fresh:  # the sampler keeps what it learned
            self._learn((), known_from=0)
            self.optimizer.forget()
        self.learn(())

    def learn(self, open_points: Iterable[dict[str, str]]) -> None:
        """Take in what was recorded since the last look.

        A point of `open_points` is left out: its job looks at the journal and tells the sampler.
        """
        self._learn(open_points, self.ledger.known_from)

    def _learn(self, open_points: Iterable[dict[str, str]], known_from: int) -> None:
        new = self.ledger.journal.records()[self._read :]
        self._read += len(new)
        asked = list(open_points)
        found = [
            (record.params, record.result)
            for record in new
            if record.space == self.space
            and record.number >= known_from
            and record.params not in asked
            and self.ledger.known.answers(record)
        ]
        self.optimizer.learn(found)
        self._note_best([result for _, result in found])
        for params, result in found:
            self._teach(params, result)

    def take(self, job: Job, record: Record) -> None:
        """Take in the result of a job."""
        self._note_best([record.result])
        if job.proposal is None:
            self.baselines[job.cfg.context_hash()] = record
        else:
            self.optimizer.tell(job.proposal, record.result)
            self._teach(job.params, record.result)

    def wants_baseline(self, cfg: Config) -> bool:
        """Whether the plain policy of this context was not asked for yet; it is from now on."""
        context = cfg.context_hash()
        if context in self.baselines:
            return False
        self.baselines[context] = None
        return True

    def raced(self, job: Job) -> Config:
        """The job's configuration, hash included, with what its trial runs against.

        That is the fastest so far, and how many times slower is hopeless. A trial prepares for a
        minute while others measure, so it looks into `config.RACE_FILE` again when it has the
        device (`openpi_opt.trial`). A baseline is to compare with, however slow.
        """
        best = factor = None
        if job.proposal is not None and self.criteria.objectives == ("latency",):
            factor, best = self._settings.pruning, self._best.get(job.cfg.context_hash())
            assert factor != "auto"  # settled before anything runs
        limits = job.cfg.limits.model_copy(update={"best_ms": best, "race": factor})
        return job.cfg.model_copy(update={"limits": limits}).raced()

    def against_best(self, result: TrialResult) -> str:
        """How a result stands against the best so far; empty where that says nothing."""
        best = self._best.get(result.context_hash)
        if best is None or not isinstance(result, Ok):
            return ""
        gain = result.latency.mean_ms / best - 1
        return "best so far" if gain <= 0 else f"{gain:+.1%} to the best"

    def bars(self, job: Job) -> bool:
        """Whether the point belongs to a class that fails, and is not known either."""
        assert job.proposal is not None
        known = self._lessons.bars(job.params)
        if known is None or self.ledger.find(job.cfg) is not None:
            return False
        self._barred[known] += 1
        self.optimizer.give_up(job.proposal, learn=True)
        return True

    def barred(self) -> list[str]:
        """Which classes of combinations were left out, and how many of each."""
        return [
            f"{known}: all {known.seen} configurations that were tried with it ended {known.way}; "
            f"{self._barred[known]} more left out (--fresh begins anew)"
            for known in self._lessons.classes
            if self._barred[known]
        ]

    def points(self) -> list[Record]:
        """The newest records of the points that were tried, in the order of their numbers."""
        newest = {
            record.result.config_hash: record
            for record in self.ledger.measured_here()
            if self.ledger.known.answers(record)
        }
        found = [newest[tried] for tried in self.optimizer.tried if tried in newest]
        return sorted(found, key=lambda record: record.number)

    def _note_best(self, results: Iterable[TrialResult]) -> None:
        before = dict(self._best)
        for result in results:
            if not isinstance(result, Ok) or self.criteria.over(result):  # fast, but no winner
                continue
            if self.criteria.allow_lossy or not is_lossy(result.config):
                best = self._best.get(result.context_hash, math.inf)
                self._best[result.context_hash] = min(best, result.latency.mean_ms)
        if self._best != before:  # once for all that a study holds: each write waits for the disk
            write_atomic(self.ledger.study_dir / RACE_FILE, json.dumps(self._best))

    def _teach(self, params: dict[str, str], result: TrialResult) -> None:
        known = self._lessons.add(params, result)
        if known is not None:
            self._display.note(f"no more of {known}: {known.seen} of it ended {known.way}")


@dataclass(frozen=True)
class FailingClass:
    """A combination of values that fails. `way` says how, `seen` in how many configurations."""

    pairs: Pairs
    way: str
    seen: int

    def __str__(self) -> str:
        return shown(dict(sorted(self.pairs)))


@dataclass
class Lessons:
    """Points with what became of them (way and configuration), and the classes that follow."""

    _seen: dict[Pairs, tuple[str | None, str]] = field(default_factory=dict)
    classes: list[FailingClass] = field(default_factory=list)

    def add(self, params: Mapping[str, str], result: TrialResult) -> FailingClass | None:
        """Take in a result; returns the class that it completed, if any.

        Refusals teach nothing: they cost no process.
        """
        point = frozenset(params.items())
        if point in self._seen or not isinstance(result, Ok | Pruned | Wrong | Failed):
            return None
        self._seen[point] = way(result), result.config_hash
        found = self._found(point)
        if found is None or any(old.pairs <= found.pairs for old in self.classes):
            return None
        self.classes.append(found)
        return found

    def bars(self, params: Mapping[str, str]) -> FailingClass | None:
        """The class that a point belongs to, if it is not to be tried."""
        return next((known for known in self.classes if known.pairs <= params.items()), None)

    def _found(self, point: Pairs) -> FailingClass | None:
        """The class that the newest failure completes. Only classes with that point can be new."""
        failed, _ = self._seen[point]
        if failed is None or all(other == failed for other, _ in self._seen.values()):
            return None
        alike = [seen for seen, (other, _) in self._seen.items() if other == failed]
        unlike = [seen for seen, (other, _) in self._seen.items() if other != failed]
        for size in range(1, _MOST_KEYS + 1):
            explained: dict[frozenset[Pairs], set[tuple[str, str]]] = {}  # pairs, by what they hold
            for pairs in map(set, itertools.combinations(sorted(point), size)):
                if not any(pairs <= seen for seen in unlike):
                    members = frozenset(seen for seen in alike if pairs <= seen)
                    explained[members] = explained.get(members, set()) | pairs
            counts = {
                members: len({self._seen[member][1] for member in members}) for members in explained
            }
            enough = [members for members in explained if counts[members] >= MIN_FAILURES]
            if enough:
                most = max(enough, key=len)
                return FailingClass(frozenset(explained[most]), failed, counts[most])
        return None


def way(result: TrialResult) -> str | None:
    """How a configuration failed, as far as two failures can be the same; None for none."""
    if isinstance(result, Failed):
        return f"{result.outcome} in phase {result.phase}"
    return None if isinstance(result, Ok | Pruned) else str(result.outcome)
