"""What a sweep would do, as text on stdout. Starts nothing and writes nothing."""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from openpi_opt.config import Config
from openpi_opt.engine.goals import check_same, goals
from openpi_opt.engine.known import Known
from openpi_opt.engine.plan import Plan, StudyRequest, make_plan
from openpi_opt.engine.trials import label
from openpi_opt.errors import UserError
from openpi_opt.process.devices import Devices
from openpi_opt.result import Ok
from openpi_opt.space.points import Points, left_out
from openpi_opt.space.prepare import Count
from openpi_opt.track.fingerprint import fingerprint, fingerprint_hash
from openpi_opt.track.journal import Journal, Record
from openpi_opt.track.store import Store


def print_dry_run(request: StudyRequest, points: Points, found: Count, limit: int) -> int:
    """Print the counts, the reasons, and the first `limit` configurations; returns the exit code.

    Raises:
        UserError: a value that no schema admits, or a journal that cannot be read.
    """
    checked = points.check()
    first = checked[0]
    Devices(request.settings.devices, request.machine).check(checked)
    criteria = goals(request.settings.objective, first, request.machine)
    known = _Known(request, _journal(request))
    if known.journal is not None:
        check_same(criteria, known.journal.study_dir)
    print(f"study {request.name}: dry run, nothing is started or written")
    print(f"{first.model.name} on {first.platform.device}, workload {first.workload.name}")
    for line in _counts(found):
        print(line)
    _print_reasons(found)
    if found.exact and request.space.sensible_only and not found.sensible:
        print("nothing would run")
        return 1
    plan = make_plan(request)
    print(f"plan: {plan.text}")
    if criteria.several:
        print(f"objectives: {criteria.objectives_text()}; the answer is their Pareto set")
    if criteria.limits:
        print(f"limits: {criteria.limits_text()}")
    if request.swept and request.settings.baseline:
        print(f"baseline first{known.remark(first.baseline())}")
    if plan.enumerated:
        _print_enumerated(request, points, known, limit)
    else:
        _print_sampled(request, points, known, plan, limit)
    if known.journal is not None:
        print(f"the journal of this study holds {len(known.journal.records())} result(s)")
    print(f"{time.process_time():.1f} s of processor time")
    return 0


@dataclass
class _Known:
    """What the journal of the study would answer."""

    request: StudyRequest
    journal: Journal | None
    _hashes: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._known = Known(self.request.machine, self.request.settings.keep_source)

    def record(self, cfg: Config) -> Record | None:
        """The record of an equal configuration on an equal machine."""
        if self.journal is None:
            return None
        platform = repr(cfg.platform)
        if platform not in self._hashes:
            seen = fingerprint(self.request.machine, cfg.platform)
            self._hashes[platform] = fingerprint_hash(seen)
        return self.journal.find(cfg.hash(), self._hashes[platform], self._known.answers)

    def remark(self, cfg: Config) -> str:
        """What there is to say behind a configuration."""
        record = self.record(cfg)
        if record is not None:
            result = record.result
            latency = f" {result.latency.mean_ms:.3f} ms" if isinstance(result, Ok) else ""
            return f"  [known: trial {record.number} {result.outcome}{latency}]"
        reason = left_out(cfg, self.request.machine, allow_lossy=True)
        if reason is not None:
            return f"  [no process: {reason.kind}]"
        return "  [lossy]" if cfg.lossy() else ""


def _journal(request: StudyRequest) -> Journal | None:
    """The study's journal, if there is one; makes nothing."""
    if not Path(request.settings.store).expanduser().is_dir():
        return None
    store = Store.open(request.settings.store, create=False)
    known = request.name in store.studies()
    return Journal.read(store.study_dir(request.name)) if known else None


def _counts(found: Count) -> Iterator[str]:
    raw = "combinations: " + ("without end" if found.raw is None else f"{found.raw:,} as written")
    if found.exact:
        yield f"{raw}, {found.sensible:,} sensible, {found.distinct:,} different"
        return
    low, high = found.share()
    if found.raw is not None:
        raw += f", {_about(found.sensible)} sensible, {_about(found.distinct)} different"
    yield (
        f"{raw} (estimated: of {found.drawn:,} drawn at random from values that can run "
        f"{low:.1%} to {high:.1%} are sensible)"
    )


def _about(number: int) -> str:
    """Two digits of an estimate."""
    digits = max(0, len(str(number)) - 2)
    return f"about {round(number, -digits):,}"


def _print_reasons(found: Count) -> None:
    if not found.left_out:
        return
    exact = found.exact and found.sensible + found.left_out.total() == found.raw
    print("not sensible, by the first reason" + (":" if exact else ", estimated:"))
    ordered = sorted(found.left_out.items(), key=lambda item: (-item[1], item[0]))
    shown = [(f"{number:,}" if exact else _about(number), why) for why, number in ordered]
    width = max(len(text) for text, _ in shown)
    for text, why in shown:
        print(f"  {text:>{width}} {why.kind}: {why.reason.splitlines()[0]}")


def _print_enumerated(request: StudyRequest, points: Points, known: _Known, limit: int) -> None:
    """Every configuration once, in the order in which they would run."""
    listed = list(itertools.islice(_enumerated(request, points), request.settings.most_trials))
    print("would run, in this order:" if listed else "nothing would run")
    for number, (params, cfg) in enumerate(listed[:limit], start=1):
        print(f"  {number:>3}  {label(cfg, 'trial', params)}{known.remark(cfg)}")
    if len(listed) > limit:
        print(f"  ... and {len(listed) - limit} more; --limit {len(listed)} lists them")
    answered = sum(known.record(cfg) is not None for _, cfg in listed)
    if answered:
        print(f"{answered} of {len(listed)} would be answered from the journal")


def _enumerated(request: StudyRequest, points: Points) -> Iterator[tuple[dict[str, str], Config]]:
    seen: set[str] = set()
    for params in request.space.all():
        try:
            cfg = points.config(params)
        except UserError:
            continue
        if cfg.hash() not in seen:
            seen.add(cfg.hash())
            yield params, cfg


def _print_sampled(
    request: StudyRequest, points: Points, known: _Known, plan: Plan, limit: int
) -> None:
    """The points that are tried first, and what the sampler then chooses from."""
    starts = list(_starts(request, points))
    if starts:
        print("begins with:")
        for name, params, cfg in starts[:limit]:
            changed = {key: text for key, text in params.items() if text != _first(request, key)}
            print(f"  {name}: {_shown(changed)}{known.remark(cfg)}")
    print(f"then {plan.sampler} chooses from:")
    width = max(len(key) for key in request.space.dimensions)
    for key, dimension in request.space.dimensions.items():
        texts = dimension.texts()
        if dimension.count() is None:
            values = f"{texts[0]} to {texts[-1]}"
        else:
            values = " ".join(texts[:limit]) + (" ..." if len(texts) > limit else "")
        print(f"  {key:<{width}}  {values}")


def _starts(
    request: StudyRequest, points: Points
) -> Iterator[tuple[str, Mapping[str, str], Config]]:
    for name, params in request.space.start.items():
        try:
            yield name, params, points.config(params)
        except UserError:
            continue


def _first(request: StudyRequest, key: str) -> str:
    return request.space.dimensions[key].texts()[0]


def _shown(params: Mapping[str, str]) -> str:
    return " ".join(f"{key}={text}" for key, text in params.items()) or "defaults"
