"""A promotion by fresh processes: who competes, what runs, what an interruption left.

`confirm.promotion` is the course; this is its `Bench` of real processes.
"""

from __future__ import annotations

import hashlib
import json
from collections import defaultdict
from collections.abc import Generator, Iterable, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from itertools import count

from pydantic import ValidationError

from openpi_opt import cli
from openpi_opt.config import Config
from openpi_opt.confirm import promotion
from openpi_opt.confirm.fresh import FreshRuns, Planned
from openpi_opt.confirm.judge import Subject, differing
from openpi_opt.confirm.promotion import Judged, Schedule, Stage, Wanted
from openpi_opt.confirm.rounds import NeededError
from openpi_opt.criteria import Criteria, over_text
from openpi_opt.errors import UserError
from openpi_opt.result import Ok, write_atomic
from openpi_opt.track import identity
from openpi_opt.track.journal import Record


@dataclass(frozen=True, kw_only=True)
class Contender(Subject):
    """A configuration of the study with its newest measurement there.

    `edited` names what has changed of the package since.
    """

    config: Config
    fingerprint_hash: str
    edited: tuple[str, ...] = ()


def contenders(
    records: Sequence[Record], allow_lossy: bool = False, criteria: Criteria | None = None
) -> list[Contender]:
    """The different configurations of a study that are right, best first, without the baseline.

    The best is the least of the study's objective, or of the mean latency where it has several.
    Lossy ones (FP8) do not compete unless `allow_lossy`, and those above a limit of `criteria` not
    at all. When only the baseline itself was `ok`, it is the only element. Raises UserError: no
    trial is `ok`, none keeps the limits, or the trials belong to different contexts.
    """
    criteria = (criteria or Criteria()).allowing(allow_lossy)
    ok = [(r, r.result) for r in records if isinstance(r.result, Ok) and r.role != "confirm"]
    if not ok:
        raise UserError(
            "this study has no trial with outcome ok, so there is nothing to promote. "
            "`python -m openpi_opt.compare STUDY` shows the reasons."
        )
    contexts = {result.context_hash for _, result in ok}
    if len(contexts) > 1:
        raise UserError(
            f"this study holds {len(contexts)} different models, workloads or platforms, whose "
            "latencies cannot be compared. Sweep one of them in a study of its own."
        )
    newest: dict[str, tuple[Contender, Ok]] = {}
    for record, result in ok:
        cfg = _unlimited(Config.load(result.config))
        if not cfg.is_baseline() and (criteria.allow_lossy or not cfg.lossy()):
            newest[cfg.hash()] = _contender(cfg, record, result), result
    first = criteria.figures()[0]
    within = [found for found in newest.values() if not criteria.over(found[1])]
    if newest and not within:
        raise UserError(
            f"none of the {len(newest)} configurations of this study keeps its limits "
            f"({criteria.limits_text()}), so there is nothing to promote.\n"
            "promote takes another one with --limit NAME=VALUE; the sweep with another one judges "
            "the same results again. Or sweep further."
        )
    by_mean = criteria.several
    within.sort(key=lambda found: found[0].first_ms if by_mean else first.value(found[1]))
    plain = _unlimited(Config.load(ok[0][1].config)).baseline()
    return [each for each, _ in within] or [_contender(plain, *ok[0])]


def _contender(cfg: Config, record: Record, result: Ok) -> Contender:
    return Contender(
        key=cfg.hash(),
        changed=len(differing(cfg)),
        order=record.number,
        first_ms=result.latency.mean_ms,
        config=cfg,
        fingerprint_hash=record.fingerprint_hash,
        edited=tuple(identity.changes(result)),
    )


def _unlimited(cfg: Config) -> Config:
    """The same, measured to its end however slow: the limit was that day's, or of `pruning`."""
    return cfg.model_copy(update={"limits": cfg.limits.model_copy(update={"latency_ms": None})})


def short(cfg: Config) -> str:
    """The knobs that differ from the baseline, with their labels."""
    plain = cfg.baseline().labels()
    changed = {k: v for k, v in cfg.labels().items() if v != plain[k]}
    return " ".join(f"{k}={v}" for k, v in changed.items()) or "baseline"


def confirm(
    runs: FreshRuns,
    candidates: Sequence[Contender],
    wanted: Wanted,
    again: bool = False,
    judged_by: Criteria | None = None,
) -> tuple[ProcessBench, Judged]:
    """Run a promotion to its end, or the rest of an interrupted one.

    `again` begins a new one where the same was finished before. A candidate that goes above a limit
    of `judged_by` in any process is dropped. Raises UserError: the baseline was not ok, or the time
    is too short to show anything.
    """
    baseline = candidates[0].config.resolved(runs.machine).baseline()
    here = runs.fingerprint_hash(baseline)
    others = [c for c in candidates if not c.config.is_baseline()]
    current = [c for c in others if c.fingerprint_hash == here and not c.edited]
    if others and not current:
        cli.say(
            "note: the study was measured with another machine or software: its order is used, "
            "its numbers are not"
        )
    wanted = replace(wanted, known=int(bool(current) or not others))
    others = current or others
    bench = ProcessBench(runs, baseline, [c.config for c in others], wanted, again, judged_by)
    cli.say(
        f"{len(others)} configuration(s) of the study {runs.study_dir.name} against the baseline"
    )
    try:
        return bench, promotion.run(bench, Subject(baseline.hash()), others, wanted)
    except NeededError:
        raise UserError(
            "the baseline did not end ok, so no gain can be stated; see above.\n"
            "Mend the cause, then start over with --again."
        ) from None


def check_time(runs: FreshRuns, candidates: Sequence[Contender], wanted: Wanted) -> None:
    """Refuse a time that can never do, by what the study's trials took, before any wait.

    A promotion that has begun is left to go on. Raises UserError: even the smallest plan does not
    fit.
    """
    others = [c for c in candidates if not c.config.is_baseline()]
    if not any((runs.study_dir / "confirm").glob("schedule-*.json")):
        baseline = candidates[0].config.baseline()
        configs = {c.key: c.config for c in others} | {baseline.hash(): baseline}
        promotion.check_time(
            lambda key: runs.seconds(configs[key]), Subject(baseline.hash()), others, wanted
        )


class ProcessBench(promotion.Bench):
    """A `promotion.Bench` of fresh processes. The schedule is kept next to their folders."""

    def __init__(
        self,
        runs: FreshRuns,
        baseline: Config,
        others: Sequence[Config],
        wanted: Wanted,
        again: bool = False,
        judged_by: Criteria | None = None,
    ):
        self.runs = runs
        self.configs = {cfg.hash(): cfg for cfg in [baseline, *others]}
        self.over: dict[str, dict[str, str]] = {key: {} for key in self.configs}
        # The processes that are judged, by configuration.
        self.confirmed: dict[str, list[Ok]] = defaultdict(list)
        self._criteria = judged_by or Criteria()
        self._baseline = baseline.hash()
        gpu = runs.fingerprint(baseline)["gpu"]
        asked = {
            "configurations": sorted(self.configs),
            "fingerprint": runs.fingerprint_hash(baseline),
            "gpu": gpu and gpu["uuid"],
            "finalists": wanted.finalists,
            "rounds": wanted.rounds,
            "limit_s": wanted.limit_s,
        }
        digest = hashlib.sha256(json.dumps(asked, sort_keys=True).encode()).hexdigest()[:12]
        # The newest schedule of this request; with `again` the next, which does not exist yet.
        self._folder = runs.study_dir / "confirm"
        paths = (self._folder / f"schedule-{digest}-{number}.json" for number in count(1))
        self.path = following = next(paths)
        while following.exists():
            self.path, following = following, next(paths)
        self.path = following if again else self.path

    def means(
        self, stage: Stage, places: Iterable[tuple[str, int]]
    ) -> Generator[tuple[str, float | None], None, None]:
        """Mean latency in ms of fresh processes, now or from before an interruption."""
        # Confirmation runs belong to their schedule; the others may serve every promotion here.
        judged = stage == "confirmation"
        place = (self.path.stem, stage) if judged else (stage,)

        def planned(key: str, number: int) -> Planned:
            cfg = self.configs[key]
            shown = f"{stage} {number + 1}: {short(cfg)}"
            return Planned(cfg, shown, place, not judged, key, number)

        with closing(self.runs.in_turn(planned(*each) for each in places)) as results:
            for each, result in results:
                if not isinstance(result, Ok):
                    yield each.key, None
                    continue
                if judged:
                    self.confirmed[each.key].append(result)
                over = self._criteria.over(result)
                self.over[each.key] |= over
                if over and each.key != self._baseline:  # which is compared with, whatever it has
                    cli.say(f"  {each.shown}: over the limit ({over_text(over)})")
                    yield each.key, None
                else:
                    yield each.key, result.latency.mean_ms

    def seconds(self, key: str) -> float:
        """What a process takes, by the journal."""
        return self.runs.seconds(self.configs[key])

    def note(self, text: str) -> None:
        """Say it."""
        cli.say(text)

    def schedule(self) -> Schedule | None:
        """The schedule as it was kept. Raises UserError: the file is damaged."""
        if not self.path.exists():
            return None
        try:
            found = Schedule.model_validate_json(self.path.read_bytes())
        except ValidationError:
            raise UserError(
                f"{self.path} is damaged: it is not the schedule of a promotion.\n"
                "Restore it, or begin a new promotion with --again."
            ) from None
        cli.say(
            f"continuing the promotion of {self.path.name}: {len(found.rounds)} rounds in the "
            "order that was drawn for it; what is finished is not run again (--again starts over)"
        )
        return found

    def keep(self, schedule: Schedule) -> None:
        """Put it on disk, before anything that it is to judge is run."""
        self._folder.mkdir(parents=True, exist_ok=True)
        earlier = len(list(self._folder.glob("schedule-*.json")))
        if earlier:
            cli.say(
                f"note: confirmation {earlier + 1} of this study. Each may be wrong with its own "
                "1%: promoting until something passes would find noise"
            )
        write_atomic(self.path, schedule.model_dump_json(indent=1) + "\n")
        order = f"{len(schedule.rounds)} rounds of {1 + len(schedule.finalists)} fresh processes"
        cli.say(f"confirmation: {order}, each round in random order")
