"""What results teach a sweep: the fastest so far, which classes fail, what its sampler knows."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Iterable

from openpi_opt.config import RACE_FILE, Config, is_lossy
from openpi_opt.criteria import Criteria
from openpi_opt.engine.display import Display
from openpi_opt.engine.ledger import Ledger
from openpi_opt.engine.lessons import Lessons
from openpi_opt.engine.plan import StudyRequest
from openpi_opt.engine.trials import Job, Race
from openpi_opt.result import Ok, TrialResult, write_atomic
from openpi_opt.space.optimizer import Optimizer
from openpi_opt.track.journal import Record


class Findings:
    """Results of one study, of this sweep and of others, as far as `space` is concerned."""

    def __init__(
        self,
        request: StudyRequest,
        ledger: Ledger,
        optimizer: Optimizer,
        criteria: Criteria,
        display: Display,
        space: str,
    ):
        self.ledger, self.optimizer, self.criteria, self.space = ledger, optimizer, criteria, space
        self.baselines: dict[str, Record | None] = {}  # by context; None while it is measured
        self._settings, self._display = request.settings, display
        self._lessons = Lessons()
        self._barred: Counter[str] = Counter()  # points, by the text of their class
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
        new = self.ledger.journal.since(self._read)
        self._read += len(new)
        asked, answers = list(open_points), self.ledger.known.answers
        found = [
            record
            for record in new
            if record.space == self.space and record.number >= known_from and answers(record)
        ]
        found = [record for record in found if record.params not in asked]
        self.optimizer.learn((record.params, record.result) for record in found)
        for record in found:
            self._note_best(record.result)
            self._teach(record.params, record.result)

    def take(self, job: Job, record: Record) -> None:
        """Take in the result of a job."""
        self._note_best(record.result)
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

    def race(self, job: Job) -> Race:
        """What a trial runs against; a baseline is to compare with, however slow."""
        pruning, best = self._settings.pruning, self._best.get(job.cfg.context_hash())
        if job.proposal is None or self.criteria.objectives != ("latency",):
            return Race()
        assert pruning != "auto"  # settled before anything runs
        return Race(best, pruning)

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
        self._barred[known.text(0)] += 1
        self.optimizer.give_up(job.proposal, learn=True)
        return True

    def barred(self) -> list[str]:
        """Which classes of combinations were left out, and how many of each."""
        counts = ((known, self._barred[known.text(0)]) for known in self._lessons.classes)
        return [known.text(count) for known, count in counts if count]

    def points(self) -> list[Record]:
        """The newest records of the points that were tried, in the order of their numbers."""
        machines = self.ledger.fingerprint_hashes()
        newest = {
            record.result.config_hash: record
            for record in self.ledger.journal.records()
            if record.role != "confirm"
            and record.fingerprint_hash in machines
            and self.ledger.known.answers(record)
        }
        found = [newest[tried] for tried in self.optimizer.tried if tried in newest]
        return sorted(found, key=lambda record: record.number)

    def _note_best(self, result: TrialResult) -> None:
        if not isinstance(result, Ok) or self.criteria.over(result):  # fast perhaps, but no winner
            return
        may_win = self.criteria.allow_lossy or not is_lossy(result.config)
        if may_win and result.latency.mean_ms < self._best.get(result.context_hash, math.inf):
            self._best[result.context_hash] = result.latency.mean_ms
            write_atomic(self.ledger.study_dir / RACE_FILE, json.dumps(self._best))

    def _teach(self, params: dict[str, str], result: TrialResult) -> None:
        known = self._lessons.add(params, result)
        if known is not None:
            shown = " ".join(f"{key}={value}" for key, value in sorted(known.pairs))
            self._display.note(f"no more of {shown}: {known.seen} of it ended {known.way}")
