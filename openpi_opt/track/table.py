"""Tables of a study on stdout: trials with figures, reasons, flags, stages against their floors."""

from __future__ import annotations

import shutil
import sys
import textwrap
from collections.abc import Iterator, Sequence
from collections.abc import Set as AbstractSet
from itertools import zip_longest
from typing import NamedTuple

from rich.console import Console
from rich.text import Text

from openpi_opt.figures import FIGURES, Figure
from openpi_opt.result import GuardPower, Ok, Pruned
from openpi_opt.track.mlflow_content import one_line
from openpi_opt.track.report import (
    MAX_REASON,
    STALE_MARK,
    Group,
    Row,
    of_limit,
    what,
    whole,
)

MIN_FOLDED = 8  # a knob's column may fold its text down to this many characters
# A table is this wide at most as long as its figures allow it.
TABLE_WIDTH = 120
WHAT = "what differs"
_STYLES = {"best": "bold green", "old": "dim", "bad": "yellow", "": ""}
_FIGURES_WIDTH = 60  # of the columns beside those of the keys


class Table(NamedTuple):
    """Heads and cells of a table; `texts` are the heads of columns that hold texts."""

    heads: list[str]
    body: list[list[str]]
    texts: frozenset[str]


def markdown(table: Table) -> list[str]:
    """The lines of a table in Markdown."""
    heads = [head.replace("\n", " ") for head in table.heads]
    rule = ["---" if head in table.texts else "---:" for head in table.heads]
    cells = [[cell.replace("|", "\\|") for cell in row] for row in table.body]
    return [f"| {' | '.join(line)} |" for line in (heads, rule, *cells)]


def print_groups(
    found: Sequence[Group], stages: bool = False, columns: Sequence[Figure] = ()
) -> None:
    """Print trials on stdout: folded to the terminal, uncut in a pipe or a file.

    `columns` are figures to show beside those by which the study is judged. With `stages` a second
    table follows, of the stages against their floors. On a terminal too narrow for its numbers the
    lines run over: nothing is left out.
    """
    console = Console(highlight=False) if sys.stdout.isatty() else None
    width = min(console.width, TABLE_WIDTH) if console else TABLE_WIDTH
    for group in found:
        for text, style in _trials(group, columns, width):
            _say(console, Text(text, style) if console else text)
        for text in below(group):
            _say(console, Text(text, overflow="fold") if console else text, folded=True)
        for text in _floors(group, width) if stages else ():
            _say(console, text)


def best_of_each(found: Sequence[Group]) -> Table:
    """The best of each group: of other machines and workloads, so not compared."""
    body = []
    for group in found:
        best = group.best
        if best is None or best.ok is None:
            body.append([group.title, "none", "", "", ""])
            continue
        figures = [FIGURES[key].cell(best.ok) for key in ("mean_ms", "ci95_ms")]
        name = f"{best.record.study}:{best.record.number} {whole(best, group)}"
        body.append([group.title, name, *figures, _gain(best)])
    heads = ["machine and workload", "best", "mean ms", "95% interval", "vs.\nbaseline"]
    return Table(heads, body, frozenset(heads[:2]))


def print_side_by_side(found: Sequence[Group]) -> None:
    """Print `best_of_each`."""
    print("\nside by side, each against its own baseline")
    print_table(best_of_each(found))


def print_table(
    table: Table, pipe_width: int = TABLE_WIDTH, unfolded: AbstractSet[str] = frozenset()
) -> None:
    """Print a table on stdout: folded to the terminal, in a pipe to `pipe_width` columns. Where its
    numbers need more the lines run over: nothing is left out."""
    on_terminal = sys.stdout.isatty()
    width = shutil.get_terminal_size().columns if on_terminal else pipe_width
    for _, line in grid(table, width, unfolded):
        print(line.rstrip())


def _say(console: Console | None, text: str | Text, folded: bool = False) -> None:
    if console is None:
        print(str(text).rstrip())
    else:
        console.print(text, soft_wrap=not folded, markup=False)


def natural_width(table: Table) -> int:
    """The width of a table in which nothing folds."""
    return _width(_natural(table))


def _natural(table: Table) -> list[int]:
    """The widths of columns in which nothing folds."""
    columns = zip(table.heads, *table.body, strict=True)
    return [max(map(len, "\n".join(column).split("\n"))) for column in columns]


def _width(columns: Sequence[int]) -> int:
    return sum(columns) + 2 * len(columns) - 1


def grid(
    table: Table, width: int, unfolded: AbstractSet[str] = frozenset()
) -> Iterator[tuple[int, str]]:
    """Lines of a table, each with its row (-1 for heads); its texts are folded, but `unfolded`."""
    natural = _natural(table)
    least = [
        min(size, max(MIN_FOLDED, *map(len, head.split("\n"))))
        if head in table.texts - unfolded
        else size
        for head, size in zip(table.heads, natural, strict=True)
    ]
    widths = list(natural)
    while _width(widths) > width and widths != least:
        place = max(range(len(widths)), key=lambda n: (widths[n] > least[n], widths[n]))
        widths[place] -= 1
    form = [str.ljust if head in table.texts else str.rjust for head in table.heads]

    def lines(cells: Sequence[Sequence[str]]) -> Iterator[str]:
        for line in zip_longest(*cells, fillvalue=""):
            texts = zip(form, line, widths, strict=True)
            yield "  ".join([put(text, size) for put, text, size in texts])

    heads = [head.split("\n") for head in table.heads]
    tall = max(map(len, heads))  # heads stand on the line below them
    yield from ((-1, line) for line in lines([[""] * (tall - len(head)) + head for head in heads]))
    yield -1, "─" * _width(widths)
    for number, row in enumerate(table.body):
        cells = [
            [text] if len(text) <= size else textwrap.wrap(text, size, break_on_hyphens=False)
            for text, size in zip(row, widths, strict=True)
        ]
        yield from ((number, line) for line in lines(cells))


def trials(
    group: Group, rows: Sequence[Row], columns: Sequence[Figure] = (), single: bool = True
) -> Table:
    """These rows of a group; what tells them apart in a `single` column, or in one for each key.
    `columns` are figures to show beside those by which the group is judged."""
    kinds = {
        row.record.result.kernels.kind
        for row in rows
        if isinstance(row.record.result, Ok | Pruned) and row.record.result.kernels
    }
    knobs = [WHAT] if single else list(group.rows[0].differs)
    limits = [of_limit(row) for row in rows]
    shown = list(dict.fromkeys([*group.criteria.shown(), *columns]))
    heads = ["#", *knobs, "outcome", "mean ± std ms", count_name(kinds), "vs.\nbaseline"]
    heads += ["of\nlimit"] if any(limits) else []
    heads += [figure.head or figure.title for figure in shown]
    body = [
        [
            _number(row, group),
            *([what(row, group)] if single else row.differs.values()),
            outcome(row),
            *_numbers(row, kinds),
            *([limit] if any(limits) else []),
            *(figure.cell(row.ok) if row.ok else "" for figure in shown),
        ]
        for row, limit in zip(rows, limits, strict=True)
    ]
    return Table(heads, body, frozenset([*knobs, "outcome"]))


def common(group: Group) -> str:
    """What all trials of a group share, in a line; empty where they share nothing."""
    shared = " ".join(f"{key}={text}" for key, text in group.shared.items())
    return f"all trials: {shared}" if shared else ""


def _trials(group: Group, columns: Sequence[Figure], width: int) -> Iterator[tuple[str, str]]:
    """Lines of the table of trials, with the style of each."""
    wide = [
        max(len(key), *(len(row.differs[key]) for row in group.rows)) + 2
        for key in group.rows[0].differs
    ]
    single = sum(wide) > TABLE_WIDTH - _FIGURES_WIDTH
    yield group.title, ""
    if single and common(group):
        yield common(group), ""
    table = trials(group, group.rows, columns, single)
    for number, line in grid(table, width, {"outcome"}):
        yield line, "" if number < 0 else _STYLES[mark(group.rows[number])]


def _floors(group: Group, width: int) -> list[str]:
    """Each trial's stages: floor, busy time under the profiler, and the one's share of the other.
    Nothing where no trial has such figures. Confirmations are not profiled."""
    shown = [
        (row, row.ok.roofline, row.ok.latency.mean_ms)
        for row in group.rows
        if row.ok and row.ok.roofline and row.record.role != "confirm"
        if row.ok.roofline.floor_ms is not None
    ]
    names = list(dict.fromkeys(name for _, found, _ in shown for name in found.stages))
    if not names:
        return []
    body = [
        [
            _number(row, group),
            _against(found.floor_ms, mean_ms, found.fraction),
            *(
                _against(each.floor_ms, each.measured_ms, each.fraction) if each else ""
                for each in map(found.stages.get, names)
            ),
        ]
        for row, found, mean_ms in shown
    ]
    lines = ["", "floor of time, ms (of stages: busy, under the profiler)"]
    table = Table(["#", "call", *names], body, frozenset())
    return lines + [line for _, line in grid(table, width)]


def _against(floor_ms: float | None, took_ms: float | None, fraction: float | None) -> str:
    if floor_ms is None:
        return ""
    if took_ms is None or fraction is None:
        return f"{floor_ms:.3f}"
    return f"{floor_ms:.3f} of {took_ms:.3f} {fraction:>5.1%}"


def below(group: Group) -> list[str]:
    """What stands below a table: reasons, flags, footnotes, what the guard sees."""
    return [
        *_reasons(group.rows),
        *flag_lines(group.rows),
        *group.footnotes,
        *_guard_lines(group.rows),
    ]


def _guard_lines(found: Sequence[Row]) -> list[str]:
    """What the guard of these trials sees, where that was measured."""
    powers = {row.ok.guard.power for row in found if row.ok and row.ok.guard.power}
    return [margin(power) for power in sorted(powers, key=lambda power: power.smallest)]


def margin(power: GuardPower) -> str:
    """What the guard sees, in one line."""
    seen = f"smallest margin {power.smallest:.1f} times the tolerance ({power.mutation})"
    some = power.asked is not None and power.asked != power.known
    asked = f", {power.asked} of {power.known} mistakes asked" if some else ""
    missed = f"; this guard cannot see: {', '.join(power.missed)}" if power.missed else ""
    return f"guard, by mistakes made on purpose: {seen}{asked}{missed}"


def outcome(row: Row) -> str:
    """How the trial ended, with its role unless that is `trial`."""
    role = row.record.role
    words = [row.record.result.outcome, *(["lossy"] if row.lossy else [])]
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
    Where there are many, what the check said of the later ones is left out, never their numbers."""
    flagged: dict[str, list[tuple[str, str]]] = {}
    for row in found:
        for check in row.ok.checks if row.ok else []:
            if check.status == "flag" and check.name != "spread":
                flagged.setdefault(check.name, []).append((str(row.record.number), check.detail))
    lines = []
    for name, who in flagged.items():
        text, details = f"flagged {name}: ", True
        for place, (number, detail) in enumerate(who):
            text += ", " if place else ""
            if details:
                said = one_line(detail.removeprefix(f"{name}: "), MAX_REASON)
                details = len(text) + len(said) <= MAX_REASON
            text += f"{number} ({said})" if details else number
        lines.append(text)
    return lines


def count_name(kinds: AbstractSet[str]) -> str:
    """What the count of kernels counts: a CPU has operators."""
    return "operators" if kinds == {"operator_calls"} else "kernels"


def _number(row: Row, group: Group) -> str:
    mark = "* " if row.best or row.pareto else ""
    study = f"{row.record.study}:" if group.studies > 1 else ""
    return f"{mark}{study}{row.record.number}{STALE_MARK if row.stale or row.changed else ''}"


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
        _gain(row),
    ]


def _gain(row: Row) -> str:
    return f"{row.vs_baseline:.2f}x" if row.vs_baseline is not None else ""


def mark(row: Row) -> str:
    """`best`, `old` (not compared with what came after), `bad`, or nothing to mark."""
    if row.best or row.pareto:
        return "best"
    return "old" if row.stale else "" if row.ok and not row.over else "bad"
