"""Plots for reports: lines and bars with intervals, each figure as PNG and SVG.

Matplotlib is imported when a figure is drawn: verbs start fast without it. Figures are made
without pyplot, so nothing here needs a display or leaves state behind. Every function that draws
panels raises ValueError where there is nothing to draw.
"""

from __future__ import annotations

import io
import json
import textwrap
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from openpi_opt.errors import UserError
from openpi_opt.result import write_atomic

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Okabe and Ito's colours: told apart by colour-blind readers, too.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
MARKERS = "osD^vPX"
FORMATS = ("png", "svg")
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
    """Points under one name in the legend. `level` (of `dots`) is what they say together, a line
    over the whole width with its interval, `colour` the place in `COLOURS`; without it colours go
    by the order."""

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


def lines(title: str, panels: Sequence[Panel]) -> Figure:
    """Panels side by side, each series a line through its points, intervals as error bars."""

    def draw(axes: Axes, series: Series, style: dict[str, Any]) -> None:
        style |= {"capsize": 3, "linewidth": 1.5, "markersize": 5}
        axes.errorbar(*_xy(series), yerr=_errors(series.points), **style)

    figure, every = _panels(title, panels, draw)
    for panel, axes in zip(panels, every, strict=True):
        if not panel.log_y:
            axes.set_ylim(bottom=0)
    return figure


def dots(title: str, panels: Sequence[Panel]) -> Figure:
    """Panels side by side, each point by itself with its interval; the y axis fits the points. The
    x axis counts: its ticks are whole numbers."""
    from matplotlib.ticker import MaxNLocator

    def draw(axes: Axes, series: Series, style: dict[str, Any]) -> None:
        style |= {"linestyle": "none", "elinewidth": 0.8, "markersize": 4}
        axes.errorbar(*_xy(series), yerr=_errors(series.points), **style)
        level, colour = series.level, style["color"]
        if level is not None:
            axes.axhline(level.y, color=colour, linewidth=1.2)
            if level.low is not None and level.high is not None:
                axes.axhspan(level.low, level.high, color=colour, alpha=0.15, linewidth=0)
        axes.xaxis.set_major_locator(MaxNLocator("auto", integer=True, steps=[1, 2, 5, 10]))

    return _panels(title, panels, draw)[0]


def bars(title: str, panels: Sequence[Panel]) -> Figure:
    """Panels side by side, one group of bars for each x, one bar of it for each series. The value
    stands above its bar, intervals as error bars."""
    figure, every = _figure(title, panels)
    for panel, axes in zip(panels, every, strict=True):
        names = list(dict.fromkeys(str(p.x) for series in panel.series for p in series.points))
        width = 0.8 / len(panel.series)
        for number, series in enumerate(panel.series):
            shift = (number - (len(panel.series) - 1) / 2) * width
            drawn = axes.bar(
                [names.index(str(point.x)) + shift for point in series.points],
                [point.y for point in series.points],
                width * 0.92,
                yerr=_errors(series.points),
                capsize=3,
                label=series.label,
                color=COLOURS[number % len(COLOURS)],
            )
            texts = [f"{point.y:.3g}" for point in series.points]
            axes.bar_label(drawn, texts, padding=2, fontsize=7)
        long = max(map(len, names)) > _LONG_LABEL
        axes.set_xticks(
            range(len(names)), names, rotation=30 if long else 0, ha="right" if long else "center"
        )
        axes.margins(y=0.12)
        if panel.log_y:
            _log_y(axes)
    _legends(figure, every)
    return figure


def scatter(title: str, panels: Sequence[Panel]) -> Figure:
    """Panels side by side, each series its points without a line, the first one in front. The text
    of a point stands beside it in the first series, which is what the figure is about."""

    def draw(axes: Axes, series: Series, style: dict[str, Any]) -> None:
        behind = len(axes.lines)
        style |= {"linestyle": "none", "alpha": 0.5 if behind else 1.0, "zorder": 3 - 0.1 * behind}
        axes.plot(*_xy(series), **style)
        if not behind:
            _annotate(axes, series)

    figure, every = _panels(title, panels, draw, legends=False)
    for axes in every:
        axes.grid(axis="x", alpha=0.3)
        axes.margins(0.1)
        axes.legend(fontsize=8)
    return figure


def stairs(title: str, panels: Sequence[Panel]) -> Figure:
    """Panels side by side, each series a value that holds until its next point, with its text."""

    def draw(axes: Axes, series: Series, style: dict[str, Any]) -> None:
        axes.step(*_xy(series), where="post", label=style.pop("label"), color=style["color"])
        axes.plot(*_xy(series), linestyle="none", markersize=4, **style)
        _annotate(axes, series)

    return _panels(title, panels, draw)[0]


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


def _panels(
    title: str,
    panels: Sequence[Panel],
    draw: Callable[[Axes, Series, dict[str, Any]], None],
    legends: bool = True,
) -> tuple[Figure, list[Axes]]:
    """Panels whose series `draw` draws, each with its label, colour and marker."""
    figure, every = _figure(title, panels)
    for panel, axes in zip(panels, every, strict=True):
        for number, series in enumerate(panel.series):
            place = number if series.colour is None else series.colour
            style = {
                "color": COLOURS[place % len(COLOURS)],
                "marker": MARKERS[place % len(MARKERS)],
            }
            draw(axes, series, {"label": series.label, **style})
        if panel.log_x:
            axes.set_xscale("log", base=2)
            ticks = sorted({float(p.x) for series in panel.series for p in series.points})
            axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
            axes.minorticks_off()
        if panel.log_y:
            _log_y(axes)
    if legends:
        _legends(figure, every)
    return figure, every


def _figure(title: str, panels: Sequence[Panel]) -> tuple[Figure, list[Axes]]:
    drawn = [bool(panel.series) and all(s.points for s in panel.series) for panel in panels]
    if not panels or not all(drawn):
        raise ValueError("nothing to draw: each panel needs series, each series points")
    from matplotlib.figure import Figure

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
    return figure, every


def _xy(series: Series) -> tuple[list[float], list[float]]:
    return [float(point.x) for point in series.points], [point.y for point in series.points]


def _annotate(axes: Axes, series: Series) -> None:
    for point in series.points:
        place = float(point.x), point.y
        axes.annotate(point.text, place, (4, 4), textcoords="offset points", fontsize=7)


def _errors(points: Sequence[Point]) -> tuple[list[float], list[float]] | None:
    """Distances below and above, 0 where a point has no interval; None when none has one."""
    if all(point.low is None and point.high is None for point in points):
        return None
    below = [max(0.0, p.y - p.low) if p.low is not None else 0.0 for p in points]
    above = [max(0.0, p.high - p.y) if p.high is not None else 0.0 for p in points]
    return below, above


def _log_y(axes: Axes) -> None:
    """A logarithmic axis whose ticks are 1, 2 and 5 of each decade, in plain numbers."""
    from matplotlib.ticker import FormatStrFormatter, LogLocator

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


@dataclass(frozen=True)
class Bar:
    """One bar from 0 to `value`, its interval from `low` to `high`, and a text at its end."""

    label: str
    value: float
    low: float
    high: float
    text: str = ""


def effects_figure(title: str, axis: str, rows: Sequence[Bar]) -> Figure:
    """Horizontal bars with intervals, the first on top; long labels are folded."""
    from matplotlib.figure import Figure

    labels = [textwrap.fill(row.label, _LABEL_COLUMNS, break_on_hyphens=False) for row in rows]
    lines = max((label.count("\n") + 1 for label in labels), default=1)
    titles = [textwrap.fill(line, _BARS_TITLE_COLUMNS) for line in title.splitlines()]
    figure = Figure(figsize=(10.5, 1.5 + (0.27 + 0.18 * lines) * len(rows)), layout="constrained")
    figure.suptitle("\n".join(titles), x=0.01, ha="left", fontsize=12)
    axes = figure.add_subplot()
    places, values = range(len(rows)), [row.value for row in rows]
    errors = _errors([Point(0, row.value, row.low, row.high) for row in rows])
    axes.barh(places, values, xerr=errors, capsize=4, color="#4c78a8", ecolor="#222222")
    for place, row in zip(places, rows, strict=True):
        end = max(row.value, row.high)
        axes.annotate(row.text, (end, place), (6, 0), textcoords="offset points", va="center")
    axes.axvline(0, color="#222222", linewidth=0.8)
    axes.set_yticks(places, labels)
    axes.invert_yaxis()
    axes.margins(x=0.18)
    axes.set_xlabel(axis)
    axes.spines[["top", "right"]].set_visible(False)
    return figure
