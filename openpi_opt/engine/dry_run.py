"""What a sweep would do, as text on stdout. Starts nothing and writes nothing."""

from __future__ import annotations

import contextlib
import time
from functools import cache
from pathlib import Path

from openpi_opt.config import Config
from openpi_opt.engine.display import label, shown
from openpi_opt.engine.ledger import Known
from openpi_opt.engine.plan import Plan, StudyRequest, check_same, enumerated, goals, make_plan
from openpi_opt.errors import UserError
from openpi_opt.process.devices import Devices
from openpi_opt.result import Ok
from openpi_opt.space.points import Points, left_out
from openpi_opt.space.prepare import Count
from openpi_opt.track.fingerprint import fingerprint, fingerprint_hash
from openpi_opt.track.journal import Journal, Record
from openpi_opt.track.store import Store


def print_dry_run(request: StudyRequest, points: Points, found: Count, limit: int) -> int:
    """Print counts, reasons, and the first `limit` configurations; returns the exit code."""
    checked = points.check()
    first = checked[0]
    Devices(request.settings.devices, request.machine).check(checked)
    criteria = goals(request.settings.objective, first, request.machine)
    known = _Known(request)
    if known.journal is not None:
        check_same(criteria, known.journal.study_dir)
    print(f"study {request.name}: dry run, nothing is started or written")
    print(f"{first.model.name} on {first.platform.device}, workload {first.workload.name}")
    _print_counts(found)
    if found.exact and request.space.sensible_only and not found.sensible:
        print("nothing would run")
        return 1
    plan = make_plan(request)
    print(f"plan: {plan.text}")
    if criteria.several:
        print(f"objectives: {criteria.objectives_text()}; the answer is their Pareto set")
    if criteria.limits:
        print(f"limits: {criteria.limits_text()}")
    if request.has_baselines:
        print(f"baseline first{known.remark(first.baseline())}")
    if plan.enumerated:
        _print_enumerated(request, points, known, limit)
    else:
        _print_sampled(request, points, known, plan, limit)
    if known.journal is not None:
        print(f"the journal of this study holds {len(known.journal.records())} result(s)")
    print(f"{time.process_time():.1f} s of processor time")
    return 0


class _Known:
    """What the journal of the study would answer; makes nothing."""

    def __init__(self, request: StudyRequest):
        settings, self._machine = request.settings, request.machine
        self.journal: Journal | None = None
        if Path(settings.store).expanduser().is_dir():
            store = Store.open(settings.store, create=False)
            if request.name in store.studies():
                self.journal = Journal.read(store.study_dir(request.name))
        self._answers = Known(request.machine, settings.keep_source).answers
        self._hash = cache(lambda platform: fingerprint_hash(fingerprint(self._machine, platform)))

    def record(self, cfg: Config) -> Record | None:
        """The record of an equal configuration on an equal machine."""
        if self.journal is None:
            return None
        return self.journal.find(cfg.hash(), self._hash(cfg.platform), self._answers)

    def remark(self, cfg: Config) -> str:
        """What there is to say behind a configuration."""
        record = self.record(cfg)
        if record is not None:
            result = record.result
            latency = f" {result.latency.mean_ms:.3f} ms" if isinstance(result, Ok) else ""
            return f"  [known: trial {record.number} {result.outcome}{latency}]"
        reason = left_out(cfg, self._machine, allow_lossy=True)
        if reason is not None:
            return f"  [no process: {reason.kind}]"
        return "  [lossy]" if cfg.lossy() else ""


def _print_counts(found: Count) -> None:
    """How many combinations there are, and why some are not sensible."""
    raw = "combinations: " + ("without end" if found.raw is None else f"{found.raw:,} as written")
    if found.exact:
        print(f"{raw}, {found.sensible:,} sensible, {found.distinct:,} different")
    else:
        low, high = found.share()
        if found.raw is not None:
            raw += f", {_about(found.sensible)} sensible, {_about(found.distinct)} different"
        print(
            f"{raw} (estimated: of {found.drawn:,} drawn at random from values that can run "
            f"{low:.1%} to {high:.1%} are sensible)"
        )
    if not found.left_out:
        return
    exact = found.exact and found.sensible + found.left_out.total() == found.raw
    print("not sensible, by the first reason" + (":" if exact else ", estimated:"))
    ordered = sorted(found.left_out.items(), key=lambda item: (-item[1], item[0]))
    lines = [(f"{number:,}" if exact else _about(number), why) for why, number in ordered]
    width = max(len(text) for text, _ in lines)
    for text, why in lines:
        print(f"  {text:>{width}} {why.kind}: {why.reason.splitlines()[0]}")


def _about(number: int) -> str:
    """Two digits of an estimate."""
    digits = max(0, len(str(number)) - 2)
    return f"about {round(number, -digits):,}"


def _print_enumerated(request: StudyRequest, points: Points, known: _Known, limit: int) -> None:
    """Every configuration once, in the order in which they would run."""
    listed = list(enumerated(request, points))
    print("would run, in this order:" if listed else "nothing would run")
    for number, (params, cfg) in enumerate(listed[:limit], start=1):
        print(f"  {number:>3}  {label(cfg, 'trial', params)}{known.remark(cfg)}")
    if len(listed) > limit:
        print(f"  ... and {len(listed) - limit} more; --limit {len(listed)} lists them")
    answered = sum(known.record(cfg) is not None for _, cfg in listed)
    if answered:
        print(f"{answered} of {len(listed)} would be answered from the journal")


def _print_sampled(
    request: StudyRequest, points: Points, known: _Known, plan: Plan, limit: int
) -> None:
    """The points that are tried first, and what the sampler then chooses from."""
    dimensions = {key: each.values for key, each in request.space.dimensions.items()}
    starts = []
    for name, params in request.space.start.items():
        with contextlib.suppress(UserError):
            remark = known.remark(points.config(params))
            changed = {key: text for key, text in params.items() if text != dimensions[key][0]}
            starts.append(f"  {name}: {shown(changed) or 'defaults'}{remark}")
    for line in ["begins with:", *starts[:limit]] if starts else []:
        print(line)
    print(f"then {plan.sampler} chooses from:")
    width = max(map(len, dimensions))
    for key, texts in dimensions.items():
        values = " ".join(texts[:limit]) + (" ..." if len(texts) > limit else "")
        if request.space.dimensions[key].count() is None:
            values = f"{texts[0]} to {texts[-1]}"
        print(f"  {key:<{width}}  {values}")
