"""A study's trials as rows: what differs, how each ended, how fast it is against the baseline.

Numbers are set against one another only where the context (model, weights, workload, platform,
measure, guard) and the fingerprint of machine and software are the same.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

from openpi_opt.config import is_lossy, is_plain, plain_labels
from openpi_opt.criteria import Criteria, pareto
from openpi_opt.result import FILES_SINCE, Ok
from openpi_opt.track import identity
from openpi_opt.track.fingerprint import differences
from openpi_opt.track.journal import Record
from openpi_opt.track.mlflow_content import device, one_line, reason

MAX_REASON = 300
STALE_MARK = "†"
DATASHEET_MARK = "‡"


@dataclass(frozen=True)
class Row:
    """One trial as a table shows it.

    `differs` holds what varies within the trial's context. `stale` marks a fingerprint other than
    the newest of its context, or files of this package that a later trial imported with other
    content. `changed` names these files; with `kept` the row counts all the same. `best` is the
    fastest ok trial of the context, never a stale one, a confirmation, above a limit, or a lossy
    one unless allowed; `vs_baseline` is the baseline's mean divided by this one's. Of several
    objectives there is no best one: `pareto` marks those that could be `best` and have no other
    that is as good in all objectives and better in one. `over` has the limits that the trial does
    not keep, with what it has instead. `lossy`: it computes in a format that loses accuracy beyond
    rounding, as FP8 does, under a wider limit of its own in the guard.
    """

    record: Record
    differs: dict[str, str]
    reason: str
    vs_baseline: float | None = None
    best: bool = False
    stale: bool = False
    changed: str = ""
    kept: bool = False
    pareto: bool = False
    over: Mapping[str, str] = field(default_factory=dict)
    lossy: bool = False

    @property
    def ok(self) -> Ok | None:
        """The result, if it is one with a latency."""
        return self.record.result if isinstance(self.record.result, Ok) else None


@dataclass(frozen=True)
class Group:
    """The trials that share a context: only they are comparable."""

    title: str
    rows: list[Row]
    footnotes: list[str] = field(default_factory=list)
    criteria: Criteria = field(default_factory=Criteria)

    @cached_property
    def shared(self) -> dict[str, str]:
        """What all trials have in common, unlike the baseline; nothing where there is one trial."""
        trials = [row.differs for row in self.rows if row.record.role != "baseline"]
        if len(trials) < 2:
            return {}
        plain, first = plain_labels(), trials[0]
        same = {key for key in first if all(other.get(key) == first[key] for other in trials)}
        return {k: text for k, text in first.items() if k in same and text != plain.get(k)}

    @cached_property
    def studies(self) -> int:
        """How many studies its trials are of."""
        return len({row.record.study for row in self.rows})

    @property
    def best(self) -> Row | None:
        """The row that is marked as the best."""
        return next((row for row in self.rows if row.best), None)


def rows(records: Iterable[Record], criteria: Criteria | None = None) -> list[Row]:
    """All rows, grouped by context, in the order of the numbers within."""
    return [row for group in groups(records, criteria) for row in group.rows]


def groups(
    records: Iterable[Record],
    criteria: Criteria | None = None,
    kept: Mapping[str, str] | None = None,
    apart: bool = False,
) -> list[Group]:
    """One group for each context, in the order of their first trial.

    Without `criteria` the fastest that is not lossy is the best.
    `kept` has, by uid, what changed in this package since trials that are to count all the same.
    With `apart` records of several studies are grouped by fingerprint, too, in the order given.
    """
    criteria = criteria or Criteria()
    found: dict[tuple[str, str], list[Record]] = {}
    for record in records if apart else sorted(records, key=lambda record: record.number):
        key = record.result.context_hash, record.fingerprint_hash if apart else ""
        found.setdefault(key, []).append(record)
    return [
        _group(members, title, criteria, kept or {})
        for members, title in zip(found.values(), _titles(list(found.values())), strict=True)
    ]


def _titles(found: Sequence[Sequence[Record]]) -> list[str]:
    """Of each group; where two are alike, with the context or machine that tells them apart."""
    newest = [members[-1] for members in found]
    plain = [_title(record) for record in newest]
    same: dict[str, list[Record]] = {}
    for title, record in zip(plain, newest, strict=True):
        same.setdefault(title, []).append(record)
    contexts_of = {title: {r.result.context_hash for r in alike} for title, alike in same.items()}
    machines_of = {title: {r.fingerprint_hash for r in alike} for title, alike in same.items()}
    titles = []
    for title, record in zip(plain, newest, strict=True):
        alike, contexts, machines = same[title], contexts_of[title], machines_of[title]
        words = [f"context {record.result.context_hash}"] if len(contexts) > 1 else []
        if len(contexts) < len(alike) and len(machines) > 1:
            changed = differences(alike[0].result.fingerprint, record.result.fingerprint)
            words.append("; ".join([f"fingerprint {record.fingerprint_hash}", *changed]))
        titles.append(f"{title} ({', '.join(words)})" if words else title)
    studies = [dict.fromkeys(record.study for record in members) for members in found]
    if len({name for names in studies for name in names}) > 1:
        return [f"{', '.join(names)}: {text}" for names, text in zip(studies, titles, strict=True)]
    return titles


def _group(
    records: Sequence[Record], title: str, criteria: Criteria, kept: Mapping[str, str]
) -> Group:
    newest = records[-1].fingerprint_hash
    changed = _changed(records) | {
        record.uid: kept.get(record.uid, "") for record in records if kept
    }
    stale = {
        record.uid
        for record in records
        if record.fingerprint_hash != newest or (changed[record.uid] and record.uid not in kept)
    }
    baselines = _baselines(records)
    lossy = {record.uid for record in records if is_lossy(record.result.config)}
    candidates = [
        record
        for record in records
        if isinstance(record.result, Ok)
        and record.role != "confirm"
        and record.uid not in stale
        and (criteria.allow_lossy or record.uid not in lossy)
        and not criteria.over(record.result)
    ]
    winners = _winners(records, candidates, criteria)
    columns = _varying(records)
    found = [
        Row(
            record=record,
            differs={key: _value(record, key) for key in columns},
            reason=one_line(reason(record), MAX_REASON),
            vs_baseline=baselines[record.fingerprint_hash] / record.result.latency.mean_ms
            if isinstance(record.result, Ok) and record.fingerprint_hash in baselines
            else None,
            best=record.uid in winners and not criteria.several,
            stale=record.uid in stale,
            changed=changed[record.uid],
            kept=record.uid in kept,
            pareto=record.uid in winners and criteria.several,
            over=criteria.over(record.result) if isinstance(record.result, Ok) else {},
            lossy=record.uid in lossy,
        )
        for record in records
    ]
    return Group(title, found, _footnotes(records, found, criteria), criteria)


def _changed(records: Sequence[Record]) -> dict[str, str]:
    """By uid, the files of this package that a later trial of these imported with other content."""
    results = [record.result for record in records]
    files = identity.newest_files(results)
    older = results[-1].schema_version < FILES_SINCE
    return {
        record.uid: identity.summary([identity.since(record.result, files, older)])
        for record in records
    }


def _baselines(records: Sequence[Record]) -> dict[str, float]:
    """Milliseconds of the newest baseline, by fingerprint. A plain trial that somebody asked for
    will do where no baseline was measured."""
    ok = [(record, record.result) for record in records if isinstance(record.result, Ok)]
    found = {r.fingerprint_hash: o.latency.mean_ms for r, o in ok if r.role == "baseline"}
    plain = {
        r.fingerprint_hash: o.latency.mean_ms
        for r, o in ok
        if r.role == "trial" and r.fingerprint_hash not in found and is_plain(o.config)
    }
    return plain | found


def what(row: Row, group: Group) -> str:
    """What tells the trial apart: what varies and is not at its default, without what all share."""
    plain, common = plain_labels(), group.shared
    shown = {k: text for k, text in row.differs.items() if text not in ("", plain.get(k))}
    shown = {k: text for k, text in shown.items() if common.get(k) != text}
    rest = "baseline" if row.record.role == "baseline" else "nothing else" if common else "defaults"
    return " ".join(f"{key}={text}" for key, text in shown.items()) or rest


def whole(row: Row, group: Group) -> str:
    """What tells the trial apart from the baseline, also what all trials share."""
    words = [*(f"{key}={text}" for key, text in group.shared.items()), what(row, group)]
    if row.record.role == "baseline":
        return "baseline"
    found = " ".join(word for word in words if word != "nothing else")
    return found + (", lossy" if row.lossy else "")


def best_line(group: Group) -> str:
    """The group's best with its interval, or that there is none."""
    row = group.best
    if row is None or row.ok is None:
        front = [str(row.record.number) for row in group.rows if row.pareto]
        return f"Pareto set: trials {', '.join(front)}." if front else "No trial is the best one."
    latency = row.ok.latency
    gain = "" if row.vs_baseline is None else f", {row.vs_baseline:.2f}x the baseline's speed"
    return (
        f"Best: trial {row.record.number} ({whole(row, group)}), {latency.mean_ms:.3f} ms "
        f"(95%: {latency.ci95_low_ms:.3f} to {latency.ci95_high_ms:.3f}){gain}. "
        "One process: a promotion confirms it."
    )


def of_limit(row: Row) -> str:
    """Share of the machine's limit that the call reaches: its floor divided by its mean."""
    roofline = row.ok.roofline if row.ok else None
    if roofline is None or roofline.fraction is None or roofline.ceilings is None:
        return ""
    mark = DATASHEET_MARK if roofline.ceilings.source == "datasheet" else ""
    return f"{roofline.fraction:.1%}{mark}"


def mean_ms(row: Row) -> float:
    """The trial's mean latency, to sort by; infinite where it has none."""
    return row.ok.latency.mean_ms if row.ok else math.inf


def _winners(
    records: Sequence[Record], candidates: Sequence[Record], criteria: Criteria
) -> set[str]:
    """Uids of the best trial, or of the Pareto set. To that belongs the newest measurement of a
    configuration only: older ones are ignored."""
    if criteria.several:
        newest = {
            record.result.config_hash: record.uid
            for record in records
            if isinstance(record.result, Ok) and record.role != "confirm"
        }
        candidates = [one for one in candidates if newest[one.result.config_hash] == one.uid]
    found = [
        (values, record.number, record.uid)
        for record in candidates
        if (values := criteria.values(record.result)) is not None
    ]
    if not criteria.several:
        return {min(found)[-1]} if found else set()
    chosen = pareto([values for values, *_ in found])
    return {uid for (*_, uid), on in zip(found, chosen, strict=True) if on}


def _varying(records: Sequence[Record]) -> list[str]:
    """Knobs, then swept keys that no varying knob's label covers. When none varies, the knobs that
    differ from the baseline's; none of them for the baseline."""
    knobs = list(dict.fromkeys(key for record in records for key in record.labels))
    swept = list(dict.fromkeys(key for record in records for key in record.params))
    varying = [key for key in knobs if len({r.labels.get(key) for r in records}) > 1]
    # The baseline has no swept keys: absence is not a value.
    varying += [
        key
        for key in swept
        if key.split(".")[0] not in varying
        and key not in knobs
        and len({r.params[key] for r in records if key in r.params}) > 1
    ]
    plain = plain_labels()
    return varying or [key for key in knobs if records[0].labels[key] != plain.get(key)]


def _value(record: Record, key: str) -> str:
    return one_line(record.labels.get(key, record.params.get(key, "")), 60)


def _title(record: Record) -> str:
    config = record.result.config
    workload = config.get("workload", {})
    batch = workload.get("batch_size", 1)
    return (
        f"{config.get('model', {}).get('name', 'unknown model')} "
        f"on {device(config, record.result.fingerprint)}, "
        f"workload {workload.get('name', 'unknown')}" + (f", batch {batch}" if batch != 1 else "")
    )


def _footnotes(records: Sequence[Record], found: Sequence[Row], criteria: Criteria) -> list[str]:
    notes = []
    if any(row.best for row in found):
        least = "mean" if criteria.figures()[0].key == "mean_ms" else criteria.figures()[0].name
        notes.append(f"* lowest {least} of one process; python -m openpi_opt.promote confirms it")
    if any(row.pareto for row in found):
        notes.append(
            f"* Pareto set of {criteria.objectives_text()}: no other is as good in all of them and "
            "better in one; of one process each"
        )
    notes += _without_figures(found, criteria) + _overs(found, criteria)
    if any(row.ok and row.ok.latency.noisy for row in found):
        notes.append("~ noisy: std above 10% of the mean")
    if any(of_limit(row).endswith(DATASHEET_MARK) for row in found):
        notes.append(f"{DATASHEET_MARK} of the datasheet's limit; this machine's was not measured")
    if any(row.lossy for row in found):
        compete = "competes, as allowed" if criteria.allow_lossy else "never best unless allowed"
        notes.append(f"lossy: computes in FP8, under a wider limit of the guard; {compete}")
    newest = records[-1]
    for old in {r.fingerprint_hash: r for r in records}.values():
        if old.fingerprint_hash != newest.fingerprint_hash:
            changed = differences(old.result.fingerprint, newest.result.fingerprint)
            notes.append(
                f"{STALE_MARK} measured on {old.fingerprint_hash}, the newest on "
                f"{newest.fingerprint_hash}, and not compared with it"
                + (f" ({'; '.join(changed)})" if changed else "")
            )
    for text, kept in dict.fromkeys((row.changed, row.kept) for row in found if row.changed):
        how = "kept by --keep-source" if kept else "not compared with what came after"
        notes.append(f"{STALE_MARK} before {text}: {how}")
    return notes


def _without_figures(found: Sequence[Row], criteria: Criteria) -> list[str]:
    """What cannot be in the Pareto set, since the machine did not tell a figure of it."""
    if not criteria.several:
        return []
    missing = {
        figure.name: [str(row.record.number) for row in found if row.ok and not figure.cell(row.ok)]
        for figure in criteria.figures()
    }
    return [f"no {name}, so not compared: {', '.join(who)}" for name, who in missing.items() if who]


def _overs(found: Sequence[Row], criteria: Criteria) -> list[str]:
    """A line for each limit that is not kept, with the trials and what they have."""
    notes = []
    for name, limit in criteria.limits.items():
        who = [f"{row.record.number} ({row.over[name]})" for row in found if name in row.over]
        if who:
            notes.append(f"over limits.{name}={limit:g}, so never best: {', '.join(who)}")
    return notes
