"""Tables of a study's trials: what differs, how each ended, how fast it is against the baseline.

Numbers are set against one another only where the context (model, weights, workload, platform,
measure, guard) and the fingerprint of machine and software are the same.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Iterable, Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, field

from rich import box
from rich.console import Console, JustifyMethod
from rich.table import Table
from rich.text import Text

from openpi_opt.cli import least_width, print_uncut
from openpi_opt.config import Config, nature
from openpi_opt.criteria import Criteria, pareto
from openpi_opt.figures import Figure
from openpi_opt.result import FILES_SINCE, Ok, Pruned
from openpi_opt.track import identity
from openpi_opt.track.fingerprint import differences
from openpi_opt.track.journal import Record
from openpi_opt.track.mlflow_content import device, one_line, reason

MAX_REASON = 300
MIN_FOLDED = 8  # a knob's column may fold its text down to this many characters
# Below a table in a pipe or a file each remark is one line; the table itself is this wide at most
# as long as its figures allow it.
PIPE_WIDTH = 1_000
TABLE_WIDTH = 120
WHAT = "what differs"
STALE_MARK = "†"
_FIGURES_WIDTH = 60  # of the columns beside those of the keys
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
    not keep, with what it has instead.
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


def rows(
    records: Iterable[Record], allow_lossy: bool = False, criteria: Criteria | None = None
) -> list[Row]:
    """All rows, grouped by context, in the order of the numbers within."""
    return [row for group in groups(records, allow_lossy, criteria) for row in group.rows]


def groups(
    records: Iterable[Record],
    allow_lossy: bool = False,
    criteria: Criteria | None = None,
    kept: Mapping[str, str] | None = None,
) -> list[Group]:
    """One group for each context, in the order of their first trial.

    With `allow_lossy`, lossy trials compete for the best. Without `criteria` the fastest is it.
    `kept` has, by uid, what changed in this package since trials that are to count all the same.
    """
    criteria = (criteria or Criteria()).allowing(allow_lossy)
    contexts: dict[str, list[Record]] = {}
    for record in sorted(records, key=lambda record: record.number):
        contexts.setdefault(record.result.context_hash, []).append(record)
    titles = [_title(members[-1]) for members in contexts.values()]
    return [
        _group(
            members,
            title if titles.count(title) == 1 else f"{title} (context {context})",
            criteria,
            kept or {},
        )
        for (context, members), title in zip(contexts.items(), titles, strict=True)
    ]


def table(records: Iterable[Record]) -> Table:
    """A table of all trials, one part for each context, with reasons and footnotes below it."""
    grid = Table.grid()
    for group in groups(records):
        grid.add_row(_table(group))
        for line in _below(group):
            grid.add_row(line)
    return grid


def print_table(
    records: Sequence[Record],
    allow_lossy: bool = False,
    criteria: Criteria | None = None,
    stages: bool = False,
    columns: Sequence[Figure] = (),
    kept: Mapping[str, str] | None = None,
) -> None:
    """Print the table on stdout: folded to the terminal, uncut in a pipe or a file.

    `columns` are figures to show beside those by which the study is judged.
    With `stages` a second one follows, of the stages against their floors. On a terminal too
    narrow for its numbers the lines run over: nothing is left out.
    """
    console = Console(width=None if sys.stdout.isatty() else PIPE_WIDTH, highlight=False)
    with console.capture() as capture:
        for group in groups(records, allow_lossy, criteria, kept):
            _print(console, _table(group, columns))
            console.print(*_below(group), sep="\n", overflow="fold")
            if stages and (floors := _floors(group)):
                console.print()
                print_uncut(console, floors)
    for line in capture.get().splitlines():
        print(line.rstrip())


def _print(console: Console, view: Table) -> None:
    """A table as wide as it has to be, and no wider than `TABLE_WIDTH` if it can be folded."""
    natural = console.measure(view, options=console.options.update(width=PIPE_WIDTH)).maximum
    if min(natural, console.width) > TABLE_WIDTH:
        view.width = max(TABLE_WIDTH, least_width(view))
    print_uncut(console, view)


def _widths(group: Group) -> list[int]:
    """Of the columns, if each key has one."""
    rows = [row.differs for row in group.rows]
    return [max(len(key), *(len(differs[key]) for differs in rows)) + 2 for key in rows[0]]


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
    # A plain trial that somebody asked for will do where no baseline was measured.
    plain = [r for r in records if r.role == "trial" and isinstance(r.result, Ok) and _is_plain(r)]
    measured = [r for r in records if r.role == "baseline"]
    baselines = {
        record.fingerprint_hash: record.result.latency.mean_ms
        for record in [*plain, *measured]
        if isinstance(record.result, Ok)
    }
    candidates = [r for r in records if r.uid not in stale and _may_win(r, criteria)]
    best = None if criteria.several else _best(candidates, criteria)
    front = _pareto(records, candidates, criteria) if criteria.several else []
    columns = _varying(records)
    found = [
        Row(
            record=record,
            differs={key: _value(record, key) for key in columns},
            reason=one_line(reason(record), MAX_REASON),
            vs_baseline=_ratio(record, baselines.get(record.fingerprint_hash)),
            best=record is best,
            stale=record.uid in stale,
            changed=changed[record.uid],
            kept=record.uid in kept,
            pareto=any(record is one for one in front),
            over=_over(record, criteria),
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


def what(row: Row, group: Group) -> str:
    """What tells the trial apart: what varies and is not at its default, without what all share."""
    plain, common = Config.parse({}).labels(), shared(group)
    shown = {k: text for k, text in row.differs.items() if text not in ("", plain.get(k))}
    shown = {k: text for k, text in shown.items() if common.get(k) != text}
    rest = "baseline" if row.record.role == "baseline" else "nothing else" if common else "defaults"
    return " ".join(f"{key}={text}" for key, text in shown.items()) or rest


def shared(group: Group) -> dict[str, str]:
    """What all trials have in common, unlike the baseline; nothing where there is one trial."""
    trials = [row.differs for row in group.rows if row.record.role != "baseline"]
    if len(trials) < 2:
        return {}
    plain = Config.parse({}).labels()
    first = trials[0]
    same = {key for key in first if all(other.get(key) == first[key] for other in trials)}
    return {key: text for key, text in first.items() if key in same and text != plain.get(key)}


def mean_ms(row: Row) -> float:
    """The trial's mean latency, to sort by; infinite where it has none."""
    return row.ok.latency.mean_ms if row.ok else math.inf


def lossy(record: Record) -> bool:
    """Whether the trial computes in a format that loses accuracy beyond rounding, as FP8 does.

    Such a trial has a wider limit of its own in the guard, so it is not the best one unless asked.
    """
    return nature(record.result.config).lossy


def _is_plain(record: Record) -> bool:
    return nature(record.result.config).plain


def _over(record: Record, criteria: Criteria) -> dict[str, str]:
    """Of an ok trial: others have their reason."""
    return criteria.over(record.result) if isinstance(record.result, Ok) else {}


def _may_win(record: Record, criteria: Criteria) -> bool:
    return (
        isinstance(record.result, Ok)
        and record.role != "confirm"
        and not criteria.over(record.result)
        and (criteria.allow_lossy or not lossy(record))
    )


def _best(candidates: Sequence[Record], criteria: Criteria) -> Record | None:
    found = [
        (values, record.number, record)
        for record in candidates
        if (values := criteria.values(record.result)) is not None
    ]
    return min(found, key=lambda item: item[:2])[2] if found else None


def _pareto(
    records: Sequence[Record], candidates: Sequence[Record], criteria: Criteria
) -> list[Record]:
    """Of each configuration its newest measurement only: older ones are no choice of their own."""
    newest = {
        record.result.config_hash: record.uid
        for record in records
        if isinstance(record.result, Ok) and record.role != "confirm"
    }
    known = [
        (record, criteria.values(record.result))
        for record in candidates
        if newest[record.result.config_hash] == record.uid
    ]
    compared = [(record, values) for record, values in known if values is not None]
    chosen = pareto([values for _, values in compared])
    return [record for (record, _), on in zip(compared, chosen, strict=True) if on]


def _ratio(record: Record, baseline_ms: float | None) -> float | None:
    if baseline_ms is None or not isinstance(record.result, Ok):
        return None
    return baseline_ms / record.result.latency.mean_ms


def _varying(records: Sequence[Record]) -> list[str]:
    """Knobs, then swept keys that no varying knob's label covers.

    When none varies, the knobs that differ from the baseline's; none of them for the baseline.
    """
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
    plain = Config.parse({}).labels()
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
    if any(_of_limit(row).endswith(DATASHEET_MARK) for row in found):
        notes.append(f"{DATASHEET_MARK} of the datasheet's limit; this machine's was not measured")
    if any(lossy(row.record) for row in found):
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


def _table(group: Group, columns: Sequence[Figure] = ()) -> Table:
    counted = [row.record.result for row in group.rows]
    ok = [result for result in counted if isinstance(result, Ok | Pruned)]
    kinds = {result.kernels.kind for result in ok if result.kernels}
    single = sum(_widths(group)) > TABLE_WIDTH - _FIGURES_WIDTH
    common = " ".join(f"{key}={text}" for key, text in shared(group).items())
    title = f"{group.title}\nall trials: {common}" if single and common else group.title
    view = Table(
        title=Text(title),
        title_justify="left",
        box=box.SIMPLE_HEAD,
        show_edge=False,
        padding=(0, 1, 0, 0),
    )
    knobs = [WHAT] if single else list(group.rows[0].differs)
    heads = ["#", *knobs, "outcome", "mean ± std ms", _count_name(kinds), "vs.\nbaseline"]
    limits = [_of_limit(row) for row in group.rows]
    heads += ["of\nlimit"] if any(limits) else []
    shown = list(dict.fromkeys([*group.criteria.shown(), *columns]))
    heads += [figure.head or figure.title for figure in shown]
    body = [
        [
            _number(row),
            *([what(row, group)] if single else row.differs.values()),
            _outcome(row),
            *_numbers(row, kinds),
            *([limit] if any(limits) else []),
            *(figure.cell(row.ok) if row.ok else "" for figure in shown),
        ]
        for row, limit in zip(group.rows, limits, strict=True)
    ]
    for head, *cells in zip(heads, *body, strict=True):
        if head in knobs:
            view.add_column(Text(head), overflow="fold", min_width=MIN_FOLDED)
        else:
            width = max(map(len, [*cells, *head.split("\n")]))
            justify: JustifyMethod = "left" if head == "outcome" else "right"
            view.add_column(Text(head), justify=justify, no_wrap=True, min_width=width)
    for row, line in zip(group.rows, body, strict=True):
        view.add_row(*map(Text, line), style=_style(row))
    return view


def _floors(group: Group) -> Table | None:
    """Each trial's stages: floor, busy time under the profiler, and the one's share of the other.

    None where no trial has such figures. Confirmations are not profiled.
    """
    shown = [
        (row, row.ok.roofline, row.ok.latency.mean_ms)
        for row in group.rows
        if row.ok and row.ok.roofline and row.record.role != "confirm"
        if row.ok.roofline.floor_ms is not None
    ]
    names = list(dict.fromkeys(name for _, found, _ in shown for name in found.stages))
    if not names:
        return None
    heads = ["#", "call", *names]
    body = [
        [
            _number(row),
            _against(found.floor_ms, mean_ms, found.fraction),
            *(
                _against(each.floor_ms, each.measured_ms, each.fraction) if each else ""
                for each in map(found.stages.get, names)
            ),
        ]
        for row, found, mean_ms in shown
    ]
    view = Table(
        title=Text("floor of time, ms (of stages: busy, under the profiler)"),
        title_justify="left",
        box=box.SIMPLE_HEAD,
        show_edge=False,
        padding=(0, 1, 0, 0),
    )
    for head, *cells in zip(heads, *body, strict=True):
        width = max(map(len, [head, *cells]))
        view.add_column(Text(head), justify="right", no_wrap=True, min_width=width)
    for line in body:
        view.add_row(*map(Text, line))
    return view


def _against(floor_ms: float | None, took_ms: float | None, fraction: float | None) -> str:
    if floor_ms is None:
        return ""
    return f"{floor_ms:.3f}" + (
        f" of {took_ms:.3f} {fraction:>5.1%}"
        if took_ms is not None and fraction is not None
        else ""
    )


def _below(group: Group) -> list[Text]:
    """What stands below a table: reasons, flags, then footnotes."""
    lines = [*_reasons(group.rows), *flag_lines(group.rows), *group.footnotes]
    lines += _guard_lines(group.rows)
    return [Text(line, overflow="fold") for line in lines]


def _guard_lines(found: Sequence[Row]) -> list[str]:
    """What the guard of these trials sees, where that was measured."""
    powers = {row.ok.guard.power for row in found if row.ok and row.ok.guard.power}
    lines = []
    for power in sorted(powers, key=lambda power: power.smallest):
        seen = f"smallest margin {power.smallest:.1f} times the tolerance ({power.mutation})"
        missed = f"; this guard cannot see: {', '.join(power.missed)}" if power.missed else ""
        lines.append(f"guard, by mistakes made on purpose: {seen}{missed}")
    return lines


def _outcome(row: Row) -> str:
    role = row.record.role
    words = [row.record.result.outcome, *(["lossy"] if lossy(row.record) else [])]
    words += ["over limit"] if row.over else []
    return " ".join(words if role == "trial" else [*words, role])


def _reasons(found: Sequence[Row]) -> list[str]:
    """Each reason once, with the numbers of the trials that have it."""
    numbers: dict[tuple[str, str], list[str]] = {}
    for row in found:
        if row.reason:
            key = row.record.result.outcome, row.reason
            numbers.setdefault(key, []).append(str(row.record.number))
    return [f"{', '.join(who)} {outcome}: {why}" for (outcome, why), who in numbers.items()]


def flag_lines(found: Sequence[Row]) -> list[str]:
    """A line for each check that flagged a trial, with the trials; `~` shows the spread already.

    Where there are many, what the check said of the later ones is left out, never their numbers.
    """
    flagged: dict[str, list[tuple[str, str]]] = {}
    for row in found:
        for check in row.ok.checks if row.ok else []:
            if check.status == "flag" and check.name != "spread":
                said = one_line(check.detail.removeprefix(f"{check.name}: "), MAX_REASON)
                flagged.setdefault(check.name, []).append((str(row.record.number), said))
    lines = []
    for name, who in flagged.items():
        text, details = f"flagged {name}: ", True
        for place, (number, said) in enumerate(who):
            details = details and len(text) + len(said) <= MAX_REASON
            text += (", " if place else "") + (f"{number} ({said})" if details else number)
        lines.append(text)
    return lines


def _count_name(kinds: AbstractSet[str]) -> str:
    return "operators" if kinds == {"operator_calls"} else "kernels"


def _number(row: Row) -> str:
    mark = "* " if row.best or row.pareto else ""
    return f"{mark}{row.record.number}{STALE_MARK if row.stale or row.changed else ''}"


def _numbers(row: Row, kinds: AbstractSet[str]) -> list[str]:
    """Mean and std, kernels, ratio: empty where the outcome has none."""
    pruned = row.record.result
    if isinstance(pruned, Pruned):
        count = str(pruned.kernels.total) if pruned.kernels else ""
        return [f"above {pruned.seen_low_ms:.3f}", count, ""]
    if row.ok is None:
        return ["", "", ""]
    latency, kernels = row.ok.latency, row.ok.kernels
    count = str(kernels.total) if kernels else ""
    if len(kinds) > 1 and kernels and kernels.kind == "operator_calls":
        count += " operators"
    return [
        f"{'~ ' if latency.noisy else ''}{latency.mean_ms:.3f} ± {latency.std_ms:.3f}",
        count,
        f"{row.vs_baseline:.2f}x" if row.vs_baseline is not None else "",
    ]


def _of_limit(row: Row) -> str:
    """Share of the machine's limit that the call reaches: its floor divided by its mean."""
    roofline = row.ok.roofline if row.ok else None
    if roofline is None or roofline.fraction is None or roofline.ceilings is None:
        return ""
    mark = DATASHEET_MARK if roofline.ceilings.source == "datasheet" else ""
    return f"{roofline.fraction:.1%}{mark}"


def _style(row: Row) -> str:
    if row.best or row.pareto:
        return "bold green"
    if row.stale:
        return "dim"
    return "" if row.ok and not row.over else "yellow"
