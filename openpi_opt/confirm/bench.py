"""A promotion by fresh processes: who competes, what runs, what an interruption left.

`confirm.promotion` is the course; this is its `Bench` of real processes.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections import defaultdict
from collections.abc import Generator, Iterable, Iterator, Sequence
from contextlib import closing
from dataclasses import replace
from pathlib import Path

from pydantic import ValidationError

from openpi_opt import cli, criteria
from openpi_opt.config import Config
from openpi_opt.confirm import power, promotion
from openpi_opt.confirm.contenders import Contender, short
from openpi_opt.confirm.fresh import FreshRuns, Planned
from openpi_opt.confirm.judge import Subject, changed_knobs
from openpi_opt.confirm.promotion import Judged, Schedule, Wanted
from openpi_opt.confirm.rounds import Mean, NeededError, Place, Stage
from openpi_opt.errors import UserError
from openpi_opt.result import Ok, TrialResult, write_atomic


def confirm(
    runs: FreshRuns,
    candidates: Sequence[Contender],
    wanted: Wanted,
    again: bool = False,
    judged_by: criteria.Criteria | None = None,
) -> tuple[ProcessBench, Judged]:
    """Run a promotion to its end, or the rest of an interrupted one.

    `again` begins a new one where the same was finished before. A candidate that goes above a limit
    of `judged_by` in any process is dropped.

    Raises:
        UserError: the baseline was not ok, or the time is too short to show anything.
    """
    baseline = candidates[0].config.resolved(runs.machine).baseline()
    here = runs.fingerprint_hash(baseline)
    others = [c for c in candidates if not c.config.is_baseline()]
    current = [c for c in others if c.fingerprint_hash == here and not c.changed]
    if others and not current:
        cli.say(
            "note: the study was measured with another machine or software: its order is used, "
            "its numbers are not"
        )
    wanted = replace(wanted, known=int(bool(current) or not others))
    others = current or others
    bench = ProcessBench(runs, baseline, [c.config for c in others], wanted, again, judged_by)
    subjects = [
        Subject(c.config.hash(), changed_knobs(c.config), c.number, c.mean_ms) for c in others
    ]
    cli.say(
        f"{len(others)} configuration(s) of the study {runs.study_dir.name} against the baseline"
    )
    try:
        judged = promotion.run(bench, Subject(baseline.hash()), subjects, wanted)
    except NeededError:
        raise UserError(
            "the baseline did not end ok, so no gain can be stated; see above.\n"
            "Mend the cause, then begin anew with --again."
        ) from None
    except power.TooShortError as error:
        raise too_short(wanted, error) from None
    return bench, judged


def too_short(wanted: Wanted, error: power.TooShortError) -> UserError:
    """What to do when nothing can be shown in the time."""
    return UserError(
        f"--minutes {(wanted.limit_s or 0) / 60:g} is too short to show even a gain of "
        f"{power.WIDEST_GAIN:.0%}: at least {math.ceil(error.least_s / 60)} minutes are needed.\n"
        "The processes that ran are kept. Give more --minutes, or fewer --finalists."
    )


def check_time(runs: FreshRuns, candidates: Sequence[Contender], wanted: Wanted) -> None:
    """Refuse a time that can never do, by what the study's trials took, before any wait.

    A promotion that has begun is left to go on.

    Raises:
        UserError: even the smallest plan does not fit.
    """
    others = [c for c in candidates if not c.config.is_baseline()]
    if not others or any((runs.study_dir / "confirm").glob("schedule-*.json")):
        return
    baseline = candidates[0].config.baseline()
    configs = {c.config.hash(): c.config for c in candidates} | {baseline.hash(): baseline}
    subjects = [Subject(c.config.hash(), first_ms=c.mean_ms) for c in others]
    try:
        promotion.check_time(
            lambda key: runs.seconds(configs[key]), Subject(baseline.hash()), subjects, wanted
        )
    except power.TooShortError as error:
        raise too_short(wanted, error) from None


class ProcessBench:
    """A `promotion.Bench` of fresh processes; the schedule is kept beside their folders."""

    def __init__(
        self,
        runs: FreshRuns,
        baseline: Config,
        others: Sequence[Config],
        wanted: Wanted,
        again: bool = False,
        judged_by: criteria.Criteria | None = None,
    ):
        self.runs = runs
        self.configs = {cfg.hash(): cfg for cfg in [baseline, *others]}
        self.over: dict[str, dict[str, str]] = {key: {} for key in self.configs}
        # The processes that are judged, by configuration.
        self.confirmed: dict[str, list[Ok]] = defaultdict(list)
        self._criteria = judged_by or criteria.Criteria()
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
        self.path = _schedule_path(runs.study_dir / "confirm", digest, again)

    def means(self, stage: Stage, places: Iterable[Place]) -> Generator[Mean, None, None]:
        """Mean latency in ms of fresh processes, now or from before an interruption."""
        asked: list[tuple[str, int, str]] = []

        def planned() -> Iterator[Planned]:
            # Confirmation runs belong to their schedule; the others may serve every promotion here.
            place = (self.path.stem,) if stage == "confirmation" else ()
            for key, number in places:
                cfg = self.configs[key]
                shown = f"{stage} {number + 1}: {short(cfg)}"
                asked.append((key, number, shown))
                yield Planned(cfg, shown, (*place, stage, number), retry=not place)

        with closing(self.runs.in_turn(planned())) as results:
            for place, result in enumerate(results):
                key, number, shown = asked[place]
                if stage == "confirmation" and isinstance(result, Ok):
                    self.confirmed[key].append(result)
                yield key, number, self._mean(key, shown, result)

    def _mean(self, key: str, shown: str, result: TrialResult) -> float | None:
        if not isinstance(result, Ok):
            return None
        over = self._criteria.over(result)
        self.over[key] |= over
        if over and key != self._baseline:  # that one is measured to compare with, whatever it has
            cli.say(f"  {shown}: over the limit ({criteria.over_text(over)})")
            return None
        return result.latency.mean_ms

    def seconds(self, key: str) -> float:
        """What a process takes, by the journal."""
        return self.runs.seconds(self.configs[key])

    def note(self, text: str) -> None:
        """Say it."""
        cli.say(text)

    def schedule(self) -> Schedule | None:
        """The schedule as it was kept.

        Raises:
            UserError: the file is damaged.
        """
        if not self.path.exists():
            return None
        try:
            found = Schedule.model_validate_json(self.path.read_bytes())
        except ValidationError:
            raise UserError(
                f"{self.path} is damaged: it is no schedule of a promotion.\n"
                "Restore it, or begin a new promotion with --again."
            ) from None
        cli.say(
            f"continuing the promotion of {self.path.name}: {len(found.rounds)} rounds in the "
            "order that was drawn for it; what is finished is not run again (--again begins anew)"
        )
        return found

    def keep(self, schedule: Schedule) -> None:
        """Put it on disk, before anything that it is to judge is run."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        earlier = len(list(self.path.parent.glob("schedule-*.json")))
        if earlier:
            cli.say(
                f"note: confirmation {earlier + 1} of this study. Each may be wrong with its own "
                "1%: promoting until something passes would find noise"
            )
        write_atomic(self.path, schedule.model_dump_json(indent=1) + "\n")
        order = f"{len(schedule.rounds)} rounds of {1 + len(schedule.finalists)} fresh processes"
        cli.say(f"confirmation: {order}, each round in random order")


def _schedule_path(folder: Path, digest: str, again: bool) -> Path:
    """The newest schedule of this request; with `again` the next, which does not exist yet."""
    number = 1
    while (folder / f"schedule-{digest}-{number + 1}.json").exists():
        number += 1
    if again and (folder / f"schedule-{digest}-{number}.json").exists():
        number += 1
    return folder / f"schedule-{digest}-{number}.json"
