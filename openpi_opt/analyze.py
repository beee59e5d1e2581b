"""Where the time of recorded traces goes: `python -m openpi_opt.analyze TRACE...`.

Traces of torch.profiler and of rocprof, side by side. docs/analyze.md explains the figures.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import shutil
import string
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from openpi_opt.analysis.breakdown import Breakdown, Part, analyse
from openpi_opt.cli import run
from openpi_opt.errors import UserError
from openpi_opt.measure.trace import ProfileError
from openpi_opt.track.table import Table, grid, natural_width
from openpi_opt.verbs import verb_parser

PIPE_WIDTH = 100
_TOP = 15
# A name may take two lines: what tells one GEMM from another stands far behind in it.
_NAME_LINES = 2
_MIN_NAME = 20

_WORDS = frozenset(["", "category"])  # heads of columns of words, which never fold
_TOTAL = "total"

Rows = Sequence[Sequence[str]]
Titled = tuple[str, Table]


def main(argv: Sequence[str] | None = None) -> int:
    """Print the breakdown of each trace on stdout."""
    arguments = _parser().parse_args(argv)
    if arguments.top < 0:
        raise UserError(f"--top {arguments.top}: give the number of kernels to list, 0 or more")
    found = [_analyse(path) for path in arguments.traces]
    names = [each.file for each in found]
    found = [
        each if names.count(each.file) == 1 else dataclasses.replace(each, file=str(path))
        for path, each in zip(arguments.traces, found, strict=True)
    ]
    if arguments.json:
        documents = [dataclasses.asdict(breakdown) for breakdown in found]
        print(json.dumps({"traces": documents}, indent=1, allow_nan=False))
    else:
        _print(found, arguments.top)
    return 0


def _analyse(path: Path) -> Breakdown:
    try:
        return analyse(path)
    except ProfileError as error:
        raise UserError(
            f"{path}: {error}\n"
            "read are Chrome traces (torch.profiler, rocprof), rocprofv3's json, csv and rocpd, "
            "and Nsight Systems' sqlite export"
        ) from error


def _print(found: Sequence[Breakdown], top: int) -> None:
    width = shutil.get_terminal_size().columns if sys.stdout.isatty() else PIPE_WIDTH
    labels = list(string.ascii_uppercase[: len(found)]) if len(found) > 1 else [""]
    labels += [str(number + 1) for number in range(len(labels), len(found))]
    traces = list(zip(labels, found, strict=True))
    for label, each in traces:
        print(_printable(f"{label}: {each.file}" if label else each.file))
        for note in each.notes:
            print(f"   {note}")
    title = "per inference" if any((each.inferences or 1) > 1 for each in found) else ""
    what = {each.kind for each in found}
    launches = "kernels" if what == {"device_kernels"} else "launches"
    _side_by_side(width, title, [""], lambda each: _overview(each, launches), traces)
    units = ["ms", "share", "launches"]
    if any(each.stages for each in found):
        title = "stages" + _source(found)
        _side_by_side(width, title, units, lambda each: _parts(each, each.stages), traces)
    _side_by_side(width, "categories", units, lambda each: _parts(each, each.categories), traces)
    for label, each in traces if top else ():
        _print_table(_kernels(each, label, top, width), width)
    _side_by_side(width, "gaps", ["gaps", "ms"], _gaps, traces)
    print()
    for label, each in traces:
        _print_longest_gaps(width, each, f"{label}: " if label else "")


Traces = Sequence[tuple[str, Breakdown]]
Cells = dict[str, list[str]]  # of one trace, by the name of the row


def _side_by_side(
    width: int,
    title: str,
    units: Sequence[str],
    cells: Callable[[Breakdown], Cells],
    traces: Traces,
) -> None:
    """As many traces in a table as the width has room for, the others in tables below it. Each has
    a column for each of `units`; rows come in the order of the traces, the total last."""

    def joined(some: Traces) -> Titled:
        columns = [cells(each) for _, each in some]
        names = dict.fromkeys(name for column in columns for name in column)
        ordered = sorted(names, key=lambda name: name == _TOTAL)
        blank = [""] * len(units)
        rows = [[name, *(c for col in columns for c in col.get(name, blank))] for name in ordered]
        heads = [f"{label}\n{unit}".strip() for label, _ in some for unit in units]
        return _table(title, ["", *heads], rows)

    def fits(count: int) -> bool:
        parts = [traces[i : i + count] for i in range(0, len(traces), count)]
        return max(natural_width(joined(part)[1]) for part in parts) <= width

    count = next((n for n in range(len(traces), 1, -1) if fits(n)), 1)
    for first in range(0, len(traces), count):
        _print_table(joined(traces[first : first + count]), width)


def _print_table(titled: Titled, width: int) -> None:
    """Names may fold and numbers may not: where there is no room lines run over."""
    title, table = titled
    print(f"\n{title}" if title else "")
    for _, line in grid(table, width, unfolded=_WORDS):
        print(line.rstrip())


def _overview(each: Breakdown, launches: str) -> Cells:
    return {
        launches: [_count(each.launches, each)],
        "sum of their times, ms": [_ms(each.total_ms, each)],
        "something running, ms": [_ms(each.busy_ms, each)],
        "first start to last end, ms": [_ms(each.span_ms, each)],
        "idle, ms": [_ms(each.idle_ms, each)],
        "idle, share": [_share(each.idle_ms, each.span_ms)],
        "one denoising step, ms": [_step(each)],
        "inferences": [str(each.inferences or "unknown")],
    }


def _parts(each: Breakdown, parts: dict[str, Part]) -> Cells:
    """Time, share and launches of each part that has some, and of all."""
    every = {name: part for name, part in parts.items() if part.launches}
    if every:
        every[_TOTAL] = Part(each.launches, each.total_ms)
    return {
        name: [_ms(part.ms, each), _share(part.ms, each.total_ms), _count(part.launches, each)]
        for name, part in every.items()
    }


def _kernels(each: Breakdown, label: str, top: int, width: int) -> Titled:
    heads = ["ms", "share", "launches", "category", "name"]
    shown = [
        (_ms(row.ms, each), _share(row.ms, each.total_ms), _count(row.launches, each), row.category)
        for row in each.kernels[:top]
    ]
    taken = sum(max(map(len, [head, *cells])) for head, *cells in zip(heads, *shown, strict=False))
    room = max(_MIN_NAME, width - taken - 2 * len(heads))
    rows: list[Sequence[str]] = [
        (*cells, _short(row.name, _NAME_LINES * room))
        for cells, row in zip(shown, each.kernels, strict=False)
    ]
    rest = each.kernels[top:]
    if rest:
        launches, ms = sum(row.launches for row in rest), sum(row.ms for row in rest)
        cells = _ms(ms, each), _share(ms, each.total_ms), _count(launches, each)
        rows.append((*cells, "", f"{len(rest)} others"))
    return _table(f"{label} top kernels".strip(), heads, rows)


def _gaps(each: Breakdown) -> Cells:
    upper = [f" to {gap.above_us:g}" for gap in each.gaps[1:]] + [""]
    return {
        f"above {gap.above_us:g}{to} us": [_count(gap.gaps, each), _ms(gap.ms, each)]
        for gap, to in zip(each.gaps, upper, strict=True)
    }


def _print_longest_gaps(width: int, each: Breakdown, label: str) -> None:
    room = max(_MIN_NAME, (width - 50) // 2)
    for gap in each.longest_gaps[:3]:
        print(
            f"{label}{gap.us:.1f} us idle at {gap.at_ms:.3f} ms, after {_short(gap.after, room)}, "
            f"before {_short(gap.before, room)}"
        )


def _table(title: str, heads: Sequence[str], rows: Rows) -> Titled:
    return title, Table([*heads], [[*row] for row in rows], frozenset([*_WORDS, "name"]))


def _source(found: Sequence[Breakdown]) -> str:
    sources = {each.stages_from for each in found if each.stages_from}
    return f", from {sources.pop()}" if len(sources) == 1 else ""


def _ms(value: float, each: Breakdown) -> str:
    return f"{value / (each.inferences or 1):.3f}"


def _count(value: int, each: Breakdown) -> str:
    return (
        f"{value / (each.inferences or 1):.4g}"
        if value % (each.inferences or 1)
        else str(value // (each.inferences or 1))
    )


def _step(each: Breakdown) -> str:
    denoise = each.stages.get("denoise")
    if denoise is None or not each.steps:
        return ""
    return f"{denoise.ms / (each.inferences or 1) / each.steps:.3f}"


def _share(part: float, whole: float) -> str:
    return f"{part / whole:.1%}" if whole > 0 else ""


def _short(name: str, limit: int) -> str:
    name = _printable(name)
    return name if len(name) <= limit else name[: limit - 3] + "..."


def _printable(text: str) -> str:
    """What a terminal would obey, or cannot show, is escaped: names come from other programs."""
    return "".join(
        c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in text
    )


def _parser() -> argparse.ArgumentParser:
    parser = verb_parser(
        "analyze",
        description="Where the time of traces goes: stages, categories, kernels, gaps.",
    )
    parser.add_argument(
        "traces", metavar="TRACE", nargs="+", type=Path,
        help="Chrome trace of torch.profiler or rocprof, JSON, gzipped or not",
    )  # fmt: skip
    parser.add_argument("--top", type=int, default=_TOP, help=f"kernels to list (default: {_TOP})")
    parser.add_argument("--json", action="store_true", help="everything, as one JSON document")
    return parser


if __name__ == "__main__":
    run(main)
