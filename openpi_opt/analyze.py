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
from typing import Literal

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
    labels = _labels(len(found))
    for label, each in zip(labels, found, strict=True):
        print(_printable(f"{label}: {each.file}" if len(found) > 1 else each.file))
        for note in each.notes:
            print(f"   {note}")
    traces = list(zip(labels, found, strict=True))
    title = "per inference" if any((each.inferences or 1) > 1 for each in found) else ""
    _side_by_side(width, lambda some: _overview(title, some), traces)
    if any(each.stages for each in found):
        title = "stages" + _source(found)
        _side_by_side(width, lambda some: _parts(title, "stages", some), traces)
    _side_by_side(width, lambda some: _parts("categories", "categories", some), traces)
    for label, each in traces if top else ():
        _print_table(_kernels(each, label, top, width), width)
    _side_by_side(width, _gaps, traces)
    print()
    for label, each in traces:
        _print_longest_gaps(width, each, f"{label}: " if len(found) > 1 else "")


Traces = Sequence[tuple[str, Breakdown]]


def _side_by_side(width: int, make: Callable[[Traces], Titled], traces: Traces) -> None:
    """As many traces in a table as the width has room for, the others in tables below it."""

    def fits(count: int) -> bool:
        parts = [traces[i : i + count] for i in range(0, len(traces), count)]
        return max(natural_width(make(part)[1]) for part in parts) <= width

    count = next((n for n in range(len(traces), 1, -1) if fits(n)), 1)
    for first in range(0, len(traces), count):
        _print_table(make(traces[first : first + count]), width)


def _print_table(titled: Titled, width: int) -> None:
    """Names may fold and numbers may not: where there is no room lines run over."""
    title, table = titled
    print(f"\n{title}" if title else "")
    for _, line in grid(table, width, unfolded=_WORDS):
        print(line.rstrip())


def _overview(title: str, traces: Traces) -> Titled:
    labels, found = [label for label, _ in traces], [each for _, each in traces]
    what = {each.kind for each in found}
    rows = [
        ("kernels" if what == {"device_kernels"} else "launches",
         *(_count(each.launches, each) for each in found)),
        ("sum of their times, ms", *(_ms(each.total_ms, each) for each in found)),
        ("something running, ms", *(_ms(each.busy_ms, each) for each in found)),
        ("first start to last end, ms", *(_ms(each.span_ms, each) for each in found)),
        ("idle, ms", *(_ms(each.idle_ms, each) for each in found)),
        ("idle, share", *(_share(each.idle_ms, each.span_ms) for each in found)),
        ("one denoising step, ms", *(_step(each) for each in found)),
        ("inferences", *(str(each.inferences or "unknown") for each in found)),
    ]  # fmt: skip
    return _table(title, ["", *labels], rows)


def _parts(title: str, what: Literal["stages", "categories"], traces: Traces) -> Titled:
    """A row per part, a group of columns per trace: time, share, launches."""
    heads = [
        f"{label}\n{unit}".strip() for label, _ in traces for unit in ("ms", "share", "launches")
    ]
    columns: list[dict[str, Part]] = [getattr(each, what) for _, each in traces]
    rows = []
    for name in dict.fromkeys(name for parts in columns for name in parts):
        parts = [each.get(name) for each in columns]
        if any(part and part.launches for part in parts):
            cells = [_cells(part, each) for part, (_, each) in zip(parts, traces, strict=True)]
            rows.append([name, *(cell for three in cells for cell in three)])
    total = ["total"]
    for parts_of, (_, each) in zip(columns, traces, strict=True):
        total += _cells(Part(each.launches, each.total_ms) if parts_of else None, each)
    return _table(title, ["", *heads], [*rows, total])


def _cells(part: Part | None, each: Breakdown) -> list[str]:
    if part is None:
        return ["", "", ""]
    return [_ms(part.ms, each), _share(part.ms, each.total_ms), _count(part.launches, each)]


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


def _gaps(traces: Traces) -> Titled:
    heads = [f"{label} {unit}".strip() for label, _ in traces for unit in ("gaps", "ms")]
    bounds = [gap.above_us for gap in traces[0][1].gaps]
    rows = []
    for i, bound in enumerate(bounds):
        following = f" to {bounds[i + 1]:g}" if i + 1 < len(bounds) else ""
        cells = []
        for _, each in traces:
            cells += [_count(each.gaps[i].gaps, each), _ms(each.gaps[i].ms, each)]
        rows.append([f"above {bound:g}{following} us", *cells])
    return _table("gaps", ["", *heads], rows)


def _print_longest_gaps(width: int, each: Breakdown, label: str) -> None:
    room = max(_MIN_NAME, (width - 50) // 2)
    for gap in each.longest_gaps[:3]:
        print(
            f"{label}{gap.us:.1f} us idle at {gap.at_ms:.3f} ms, after {_short(gap.after, room)}, "
            f"before {_short(gap.before, room)}"
        )


def _table(title: str, heads: Sequence[str], rows: Rows) -> Titled:
    return title, Table([*heads], [[*row] for row in rows], frozenset([*_WORDS, "name"]))


def _labels(count: int) -> list[str]:
    if count == 1:
        return [""]
    letters = string.ascii_uppercase
    return [letters[i] if i < len(letters) else f"{i + 1}" for i in range(count)]


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
