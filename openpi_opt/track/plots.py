"""Plots for reports: lines and bars with intervals, each figure as PNG and SVG.

Matplotlib is imported when a figure is drawn: verbs start fast without it. Figures are made
without pyplot, so nothing here needs a display or leaves state behind.
"""

from __future__ import annotations

import io
import json
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from openpi_opt.errors import UserError
from openpi_opt.result import write_atomic

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Kind = Literal["lines", "dots", "scatter", "stairs", "bars"]
# Okabe and Ito's colours: told apart by colour-blind readers, too.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
MARKERS = "osD^vPX"
FORMATS = ("png", "svg")
# How each kind draws a series of points, as arguments of matplotlib's `errorbar`.
_STYLES: dict[str, dict[str, Any]] = {
    "lines": {"linewidth": 1.5, "markersize": 5, "capsize": 3},
    "dots": {"linestyle": "none", "markersize": 4, "elinewidth": 0.8},
    "scatter": {"linestyle": "none"},
    "stairs": {"drawstyle": "steps-post", "markersize": 4},  # a value holds until the next point
}
_PANEL_INCHES = (5.2, 3.9)
_TITLE_COLUMNS = 50  # of a panel
_LONG_LABEL = 12
_LABEL_COLUMNS = 42  # of a horizontal bar
_BARS_TITLE_COLUMNS = 96


@dataclass(frozen=True)
class Point:
    """One value at `x` (a number, for bars a name), with its interval, and a text beside it."""

    x: float | str
    y: float
    low: float | None = None
    high: float | None = None
    text: str = ""


@dataclass(frozen=True)
class Series:
    """Points under one name in the legend. `level` is what they say together, a line over the whole
    width with its interval, `colour` the place in `COLOURS`; without it colours go by the order."""

    label: str
    points: Sequence[Point]
    level: Point | None = None
    colour: int | None = None


@dataclass(frozen=True)
class Panel:
    """One pair of axes. Logarithmic x axes are labelled with the values that occur."""

    title: str
    series: Sequence[Series]
    x_label: str = ""
    y_label: str = ""
    log_x: bool = False
    log_y: bool = False


def draw(kind: Kind, title: str, panels: Sequence[Panel]) -> Figure:
    """Panels side by side, intervals as error bars. The y axis of lines and bars begins at 0, the x
    axis of dots has whole numbers. The first series is in front, with the texts of its points. Bars
    form a group for each x, with the value above. Raises ValueError: nothing to draw."""
    if not panels or not all(p.series and all(s.points for s in p.series) for p in panels):
        raise ValueError("nothing to draw: each panel needs series, each series points")
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    width, height = _PANEL_INCHES
    figure = Figure(figsize=(width * len(panels), height), layout="constrained")
    lines = [textwrap.fill(line, _TITLE_COLUMNS * len(panels)) for line in title.splitlines()]
    figure.suptitle("\n".join(lines), fontsize=11)
    every = list(figure.subplots(1, len(panels), squeeze=False)[0])
    for panel, axes in zip(panels, every, strict=True):
        axes.set_title(panel.title, fontsize=10)
        axes.set_xlabel(panel.x_label)
        axes.set_ylabel(panel.y_label)
        axes.grid(axis="y", alpha=0.3)
        axes.set_axisbelow(True)
        if kind == "bars":
            _bars(axes, panel.series)
        else:
            _points(axes, panel.series, _STYLES[kind])
        if kind == "lines" and not panel.log_y:
            axes.set_ylim(bottom=0)
        if kind == "dots":
            axes.xaxis.set_major_locator(MaxNLocator("auto", integer=True, steps=[1, 2, 5, 10]))
        _logarithmic(axes, panel)
    _legends(figure, every)
    return figure


def horizontal_bars(title: str, axis: str, rows: Sequence[Point]) -> Figure:
    """Horizontal bars from 0 with intervals, named by `x`, the first on top, with a text at their
    end. Long names are folded."""
    from matplotlib.figure import Figure

    labels = [textwrap.fill(str(row.x), _LABEL_COLUMNS, break_on_hyphens=False) for row in rows]
    lines = max((label.count("\n") + 1 for label in labels), default=1)
    titles = [textwrap.fill(line, _BARS_TITLE_COLUMNS) for line in title.splitlines()]
    figure = Figure(figsize=(10.5, 1.5 + (0.27 + 0.18 * lines) * len(rows)), layout="constrained")
    figure.suptitle("\n".join(titles), x=0.01, ha="left", fontsize=12)
    axes = figure.add_subplot()
    places, values = range(len(rows)), [row.y for row in rows]
    axes.barh(places, values, xerr=errors(rows), capsize=4, color="#4c78a8", ecolor="#222222")
    for place, row in zip(places, rows, strict=True):
        end = row.y if row.high is None else max(row.y, row.high)
        axes.annotate(row.text, (end, place), (6, 0), textcoords="offset points", va="center")
    axes.axvline(0, color="#222222", linewidth=0.8)
    axes.set_yticks(places, labels)
    axes.invert_yaxis()
    axes.margins(x=0.18)
    axes.set_xlabel(axis)
    axes.spines[["top", "right"]].set_visible(False)
    return figure


def save(figure: Figure, folder: Path, stem: str) -> list[Path]:
    """Write `stem.png` and `stem.svg`, each whole or not at all; the same figure, the same bytes.
    Raises OSError: the folder cannot be written."""
    import matplotlib

    folder.mkdir(parents=True, exist_ok=True)
    written = []
    for kind in FORMATS:
        path = folder / f"{stem}.{kind}"
        image = io.BytesIO()
        with matplotlib.rc_context({"svg.hashsalt": stem}):
            metadata = {"Date": None} if kind == "svg" else {"Software": None}
            figure.savefig(image, format=kind, dpi=150, metadata=metadata)
        write_atomic(path, image.getvalue())
        written.append(path)
    return written


def write_report(
    folder: Path, name: str, text: str, document: Any, figure: Figure | None, mend: str
) -> list[Path]:
    """Write NAME.md, NAME.json and the plot of a report, and print its text; returns the files.

    Raises UserError: the folder cannot be written; `mend` says what to do.
    """
    files = [folder / f"{name}.md", folder / f"{name}.json"]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write_atomic(files[0], text)
        write_atomic(files[1], json.dumps(document, indent=1, allow_nan=False) + "\n")
        files += save(figure, folder, name) if figure is not None else []
    except OSError as error:
        why = error.strerror or error
        raise UserError(f"cannot write in {folder}: {why}.\n{mend}") from error
    print(text, end="")
    return files


def _points(axes: Axes, every: Sequence[Series], style: dict[str, Any]) -> None:
    for number, series in enumerate(every):
        place = number if series.colour is None else series.colour
        colour, points = COLOURS[place % len(COLOURS)], series.points
        axes.errorbar(
            [float(point.x) for point in points],
            [point.y for point in points],
            yerr=errors(points),
            label=series.label,
            color=colour,
            marker=MARKERS[place % len(MARKERS)],
            zorder=3 - 0.1 * number,
            **style,
        )
        if series.level is not None:
            axes.axhline(series.level.y, color=colour, linewidth=1.2)
            if series.level.low is not None and series.level.high is not None:
                axes.axhspan(series.level.low, series.level.high, color=colour, alpha=0.15, lw=0)
    for point in every[0].points:
        if point.text:
            place_of = float(point.x), point.y
            axes.annotate(point.text, place_of, (4, 4), textcoords="offset points", fontsize=7)


def _bars(axes: Axes, every: Sequence[Series]) -> None:
    names = list(dict.fromkeys(str(point.x) for series in every for point in series.points))
    width = 0.8 / len(every)
    for number, series in enumerate(every):
        shift = (number - (len(every) - 1) / 2) * width
        drawn = axes.bar(
            [names.index(str(point.x)) + shift for point in series.points],
            [point.y for point in series.points],
            width * 0.92,
            yerr=errors(series.points),
            capsize=3,
            label=series.label,
            color=COLOURS[number % len(COLOURS)],
        )
        axes.bar_label(drawn, [f"{p.y:.3g}" for p in series.points], padding=2, fontsize=7)
    long = max(map(len, names)) > _LONG_LABEL
    slant: dict[str, Any] = {"rotation": 30, "ha": "right"} if long else {}
    axes.set_xticks(range(len(names)), names, **slant)
    axes.margins(y=0.12)


def errors(points: Sequence[Point]) -> tuple[list[float], list[float]] | None:
    """Distances below and above, 0 where a point has no interval; None when none has one."""
    if all(point.low is None and point.high is None for point in points):
        return None
    below = [max(0.0, p.y - p.low) if p.low is not None else 0.0 for p in points]
    above = [max(0.0, p.high - p.y) if p.high is not None else 0.0 for p in points]
    return below, above


def _logarithmic(axes: Axes, panel: Panel) -> None:
    """Axes that the panel has as logarithmic, in plain numbers: x at the values that occur, y at 1,
    2 and 5 of each decade."""
    from matplotlib.ticker import FormatStrFormatter, LogLocator

    if panel.log_x:
        axes.set_xscale("log", base=2)
        ticks = sorted({float(point.x) for series in panel.series for point in series.points})
        axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
        axes.xaxis.minorticks_off()
    if panel.log_y:
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
        axes.yaxis.set_major_formatter(FormatStrFormatter("%g"))
        axes.yaxis.minorticks_off()


def _legends(figure: Figure, every: Sequence[Axes]) -> None:
    """One for all panels, below them, if they show the same series; else one in each panel. Names
    of configurations are long: within a panel they would lie over what it shows."""
    found = [axes.get_legend_handles_labels() for axes in every]
    if all(labels == found[0][1] for _, labels in found):
        if len(found[0][1]) > 1:
            figure.legend(*found[0], loc="outside lower center", fontsize=8)
        return
    for axes in every:
        axes.legend(fontsize=8)
