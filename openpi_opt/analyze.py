"""Where the time of recorded traces goes: `python -m openpi_opt.analyze TRACE...`.

Traces of torch.profiler and of rocprof, side by side. docs/analyze.md explains the figures.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import string
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from openpi_opt.analysis.breakdown import Breakdown, Part, analyse
from openpi_opt.cli import run
from openpi_opt.errors import UserError
from openpi_opt.measure.trace import ProfileError

if TYPE_CHECKING:
    from rich.console import Console, RenderableType
    from rich.table import Table

_PIPE_WIDTH = 160
_TOP = 15


def main(argv: Sequence[str] | None = None) -> int:
    """Print the breakdown of each trace on stdout.

    Raises:
        UserError: a file that is no trace, or a damaged one.
    """
    arguments = _parser().parse_args(argv)
    if arguments.top < 0:
        raise UserError(f"--top {arguments.top}: give the number of kernels to list, 0 or more")
    found = [_analyse(path) for path in arguments.traces]
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
            "a Chrome trace is wanted, as torch.profiler (export_chrome_trace) or rocprof write "
            "it: JSON, gzipped or not"
        ) from error


def _print(found: Sequence[Breakdown], top: int) -> None:
    from rich.console import Console

    console = Console(
        width=None if sys.stdout.isatty() else _PIPE_WIDTH, highlight=False, emoji=False
    )
    labels = _labels(len(found))
    for label, each in zip(labels, found, strict=True):
        head = f"{label}: {each.file}" if len(found) > 1 else each.file
        console.print(head, markup=False, soft_wrap=True)
        for note in each.notes:
            console.print(f"   {note}", markup=False, soft_wrap=True)
    console.print(_overview(found, labels))
    if any(each.stages for each in found):
        title = "stages" + _source(found)
        console.print(_parts(title, [each.stages for each in found], found, labels))
    console.print(_parts("categories", [each.categories for each in found], found, labels))
    if top:
        for label, each in zip(labels, found, strict=True):
            console.print(_kernels(each, label, top, console.width - 50))
    console.print(_gaps(found, labels))
    for label, each in zip(labels, found, strict=True):
        _print_longest_gaps(console, each, f"{label}: " if len(found) > 1 else "")


def _overview(found: Sequence[Breakdown], labels: Sequence[str]) -> RenderableType:
    table = _table("per inference" if _repeated(found) else "", ["", *labels])
    what = {each.kind for each in found}
    rows: list[tuple[str, list[str]]] = [
        ("kernels" if what == {"device_kernels"} else "launches",
         [_count(each.launches, each) for each in found]),
        ("sum of their times, ms", [_ms(each.total_ms, each) for each in found]),
        ("something running, ms", [_ms(each.busy_ms, each) for each in found]),
        ("first start to last end, ms", [_ms(each.span_ms, each) for each in found]),
        ("idle, ms", [_ms(each.idle_ms, each) for each in found]),
        ("idle, share", [_share(each.idle_ms, each.span_ms) for each in found]),
        ("one denoising step, ms", [_step(each) for each in found]),
        ("inferences", [str(each.inferences or "unknown") for each in found]),
    ]  # fmt: skip
    for name, cells in rows:
        table.add_row(name, *cells)
    return table


def _parts(
    title: str,
    columns: Sequence[dict[str, Part]],
    found: Sequence[Breakdown],
    labels: Sequence[str],
) -> RenderableType:
    """A row per part, a group of columns per trace: time, share, launches."""
    heads = [f"{label} {unit}".strip() for label in labels for unit in ("ms", "share", "launches")]
    table = _table(title, ["", *heads])
    names = list(dict.fromkeys(name for parts in columns for name in parts))
    for name in names:
        parts = [each.get(name) for each in columns]
        if not any(part and part.launches for part in parts):
            continue
        cells = []
        for part, each in zip(parts, found, strict=True):
            cells += _cells(part, each)
        table.add_row(name, *cells)
    total = []
    for parts_of, each in zip(columns, found, strict=True):
        total += _cells(Part(each.launches, each.total_ms) if parts_of else None, each)
    table.add_row("total", *total)
    return table


def _cells(part: Part | None, each: Breakdown) -> list[str]:
    if part is None:
        return ["", "", ""]
    return [_ms(part.ms, each), _share(part.ms, each.total_ms), _count(part.launches, each)]


def _kernels(each: Breakdown, label: str, top: int, width: int) -> RenderableType:
    table = _table(f"{label} top kernels".strip(), ["ms", "share", "launches", "category", "name"])
    for row in each.kernels[:top]:
        table.add_row(
            _ms(row.ms, each), _share(row.ms, each.total_ms), _count(row.launches, each),
            row.category, _short(row.name, max(20, width)),
        )  # fmt: skip
    rest = each.kernels[top:]
    if rest:
        launches, ms = sum(row.launches for row in rest), sum(row.ms for row in rest)
        table.add_row(
            _ms(ms, each), _share(ms, each.total_ms), _count(launches, each), "",
            f"{len(rest)} others",
        )  # fmt: skip
    return table


def _gaps(found: Sequence[Breakdown], labels: Sequence[str]) -> RenderableType:
    heads = [f"{label} {unit}".strip() for label in labels for unit in ("gaps", "ms")]
    table = _table("gaps", ["", *heads])
    bounds = [gap.above_us for gap in found[0].gaps]
    for i, bound in enumerate(bounds):
        following = f" to {bounds[i + 1]:g}" if i + 1 < len(bounds) else ""
        cells = []
        for each in found:
            cells += [_count(each.gaps[i].gaps, each), _ms(each.gaps[i].ms, each)]
        table.add_row(f"above {bound:g}{following} us", *cells)
    return table


def _print_longest_gaps(console: Console, each: Breakdown, label: str) -> None:
    for gap in each.longest_gaps[:3]:
        text = (
            f"{label}{gap.us:.1f} us idle at {gap.at_ms:.3f} ms, after {_short(gap.after)}, "
            f"before {_short(gap.before)}"
        )
        console.print(text, markup=False, soft_wrap=True)


def _table(title: str, heads: Sequence[str]) -> Table:
    from rich import box
    from rich.table import Table

    table = Table(title=title or None, box=box.SIMPLE_HEAD, title_justify="left")
    for head in heads:
        is_text = head in ("", "name", "category")
        table.add_column(
            head, justify="left" if is_text else "right", no_wrap=True,
            overflow="ellipsis" if is_text else "fold",
        )  # fmt: skip
    return table


def _labels(count: int) -> list[str]:
    if count == 1:
        return [""]
    letters = string.ascii_uppercase
    return [letters[i] if i < len(letters) else f"{i + 1}" for i in range(count)]


def _source(found: Sequence[Breakdown]) -> str:
    sources = {each.stages_from for each in found if each.stages_from}
    return f", from {sources.pop()}" if len(sources) == 1 else ""


def _repeated(found: Sequence[Breakdown]) -> bool:
    return any((each.inferences or 1) > 1 for each in found)


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


def _short(name: str, limit: int = 60) -> str:
    return name if len(name) <= limit else name[: limit - 3] + "..."


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m openpi_opt.analyze",
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
