"""One self-contained HTML file about one study or several: for a colleague without this project.

Figures come from the journals, and from `ladder/` and `ablate/` beside them. Plots are drawn by
plotly's script, which is inside the file; the file is made without importing plotly.
"""

from __future__ import annotations

import base64
import importlib.util
import itertools
import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from itertools import zip_longest
from pathlib import Path
from typing import Any

import numpy as np

from openpi_opt.criteria import Criteria
from openpi_opt.errors import UserError
from openpi_opt.figures import FIGURES
from openpi_opt.result import Ok
from openpi_opt.track import study_plots, table
from openpi_opt.track.journal import Journal
from openpi_opt.track.left import VERDICTS_FILE, read_lines
from openpi_opt.track.plots import Panel, Point, Series, errors
from openpi_opt.track.report import Group, Row, best_line, groups, mean_ms, what
from openpi_opt.track.table import Table

_MOST_ROWS = 60
_COLUMNS = ("ci95_ms", "p99_ms")
_FEWEST = 8  # trials from which an importance is told
_FEWEST_MINUTES = 0.1  # results that were read from a folder have no times of their own
_MOST_FOR_IMPORTANCE = 1_000  # of the newest: Optuna adds them one at a time
_ROUNDING = 1e-18  # a variance of logarithms as small as this is that of equal numbers
_TEMPLATE = Path(__file__).with_name("report.html")
# How plotly draws the series of a panel.
_STAIRS = {"mode": "lines+markers", "line": {"shape": "hv"}}
_SCATTER = {"mode": "markers"}
_BARS = {"type": "bar", "textposition": "outside", "cliponaxis": False}

Section = dict[str, Any]


def html(folders: Sequence[Path]) -> str:
    """The whole report of the studies in `folders` as text. Studies that share a context and a
    fingerprint share a table; others are shown side by side. Raises UserError: a damaged study, or
    plotly's script is not installed."""
    import jinja2

    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined)
    journals = [Journal.read(folder, brief=True) for folder in folders]
    criteria = Criteria.load(folders[0]) or Criteria()
    records = [r for journal in journals for r in journal.records() if r.role != "confirm"]
    several = len(journals) > 1
    found = groups(records, criteria=criteria, apart=several)
    limits = f". Limits: {criteria.limits_text()}." if criteria.limits else "."
    return environment.from_string(_TEMPLATE.read_text(encoding="utf-8")).render(
        title=f"openpi_opt: {', '.join(folder.name for folder in folders)}",
        asked=f"Minimised: {criteria.objectives_text()}{limits}",
        script=_script(),
        overview=_overview(found) if several and found else None,
        parts=[_part(group) for group in found],
        studies=[_study(journal) for journal in journals],
        next_id=itertools.count().__next__,
    )


def _script() -> str:
    spec = importlib.util.find_spec("plotly")
    if spec is None or spec.origin is None:
        raise UserError("a report needs plotly: pip install 'plotly>=6'.")
    path = Path(spec.origin).parent / "package_data" / "plotly.min.js"
    return path.read_text(encoding="utf-8")


def importance(rows: Sequence[Row]) -> dict[str, float]:
    """The share of each knob in the differences of the log time, by Optuna's PED-ANOVA. Source:
    Watanabe et al., PED-ANOVA, IJCAI 2023. Empty with fewer than 8 trials."""
    timed = [row for row in rows if row.ok][-_MOST_FOR_IMPORTANCE:]
    if len(timed) < _FEWEST:
        return {}
    options = {key: sorted({row.differs[key] for row in timed}) for key in timed[0].differs}
    options = {key: texts for key, texts in options.items() if len(texts) > 1}
    if not options:
        return {}
    import optuna

    optuna.logging.set_verbosity(optuna.logging.ERROR)
    categorical = optuna.distributions.CategoricalDistribution
    study = optuna.create_study()
    study.add_trials(
        optuna.trial.create_trial(
            params={key: row.differs[key] for key in options},
            distributions={key: categorical(texts) for key, texts in options.items()},
            value=math.log(mean_ms(row)),
        )
        for row in timed
    )
    evaluator = optuna.importance.PedAnovaImportanceEvaluator()
    return dict(optuna.importance.get_param_importances(study, evaluator=evaluator))


def effect(options: Sequence[str], values: Sequence[float]) -> float:
    """Share of the variance of the log of `values` that the option of each explains alone, 0 to 1.
    The correlation ratio (Fisher): variance of the means of options by the whole variance."""
    logs = np.log(values)
    _, option = np.unique(options, return_inverse=True)
    means = np.bincount(option, logs) / np.bincount(option)
    whole = float(np.var(logs))
    return float(np.var(means[option])) / whole if whole > _ROUNDING else 0.0


def _study(journal: Journal) -> dict[str, Any]:
    folder, header, records = journal.study_dir, journal.header, journal.records()
    seen: Mapping[str, Any] = records[-1].result.fingerprint if records else {}
    versions = {
        "torch": (seen.get("torch") or {}).get("version"),
        "triton": seen.get("triton"),
        "aiter": (seen.get("aiter") or {}).get("version"),
        "openpi_opt": seen.get("openpi_opt"),
        "git": seen.get("git"),
    }
    verdicts = read_lines(folder / VERDICTS_FILE)
    return {
        "name": folder.name,
        "sections": [
            *_left(folder, "ladder", "Ladder", "Each step in interleaved fresh processes."),
            *_left(
                folder,
                "ablate",
                "Ablation",
                "The best without each of its knobs, in interleaved fresh processes.",
            ),
        ],
        "confirmed": [line["text"].replace("**", "") for line in verdicts],
        "command": "python -m openpi_opt.sweep " + " ".join(header.command if header else []),
        "versions": ", ".join(f"{name} {text}" for name, text in versions.items() if text),
    }


def _overview(found: Sequence[Group]) -> Section:
    """The best of each context on each machine: not compared where machines differ."""
    bars = [
        Point(group.title, latency.mean_ms, latency.ci95_low_ms, latency.ci95_high_ms)
        for group in found
        if group.best and group.best.ok and (latency := group.best.ok.latency)
    ]
    text = (
        "Each line has machine, software and workload of its own. Speeds against the baseline "
        "compare; milliseconds of different workloads do not."
    )
    figure = _horizontal(bars, "latency of the best, ms") if len(bars) > 1 else None
    return _section("", text, table.best_of_each(found), figure)


def _part(group: Group) -> dict[str, Any]:
    rows = sorted(group.rows, key=mean_ms)
    fingerprint = group.rows[-1].record.result.fingerprint
    gpu = fingerprint.get("gpu") or {}
    driver = f"driver {gpu['driver']}" if gpu.get("driver") else None
    cores = f"{fingerprint['cores']} cores" if fingerprint.get("cores") else None
    machine = [gpu.get("name"), driver, fingerprint.get("cpu"), cores]
    best = group.best.ok if group.best else None
    return {
        "title": group.title,
        "best": best_line(group),
        "machine": ", ".join(str(text) for text in machine if text),
        "sections": [
            *_progress(group),
            *_trials(group, rows),
            *(_kernels(best) if best else ()),
            *_importance(rows),
            *_pareto(group),
        ],
        "notes": table.below(group),
    }


def _trials(group: Group, rows: Sequence[Row]) -> Iterator[Section]:
    """The table of trials, the fastest first, as `compare` prints it."""
    found = table.trials(group, rows[:_MOST_ROWS], [FIGURES[key] for key in _COLUMNS])
    marks = [table.mark(row) for row in rows]
    yield _section("Trials", table.common(group), found, marks=marks)
    if len(rows) > _MOST_ROWS:
        yield _section("", f"{len(rows) - _MOST_ROWS} more trials are in the study's journal.")


def _progress(group: Group) -> Iterator[Section]:
    records = sorted((row.record for row in group.rows), key=lambda record: record.created_at)
    found = study_plots.steps(records, group.criteria)
    if len(found) < 2 or group.studies > 1 or found[-1].minutes < _FEWEST_MINUTES:
        return
    names = {row.record.number: what(row, group) for row in group.rows}
    panel = study_plots.curve_panel(found, lambda step: names[step.number])
    yield _section("Best so far", figure=_panel(panel, _STAIRS))


def _kernels(best: Ok) -> Iterator[Section]:
    """Time of the stages and of the categories of kernels in the best trial."""
    if best.kernels is None:
        return
    took, floors = best.kernels.stage_ms, best.roofline.stages if best.roofline else {}
    known = [(name, floor.floor_ms) for name, floor in floors.items() if name in took]
    series = [
        Series("took", [Point(name, ms) for name, ms in took.items()]),
        Series("floor", [Point(name, ms) for name, ms in known if ms is not None]),
    ]
    if took:
        text = "Time of each stage in the best trial, beside the least that its work needs here."
        panel = Panel("", [each for each in series if each.points], y_label="ms")
        yield _section("Stages against the floor", text, figure=_panel(panel, _BARS))
    spent = sorted(best.kernels.category_ms.items(), key=lambda entry: -entry[1])
    calls = best.kernels.by_category
    points = [Point(name, ms, text=f"{calls.get(name, 0)} calls") for name, ms in spent]
    if points:
        panel = Panel("", [Series("", points)], y_label="ms")
        yield _section("Kernel categories of the best trial", figure=_panel(panel, _BARS))


def _importance(rows: Sequence[Row]) -> Iterator[Section]:
    shares = importance(rows)
    if not shares:
        return
    text = "Share of each knob in what sets the fastest trials apart (Optuna's PED-ANOVA)."
    figure = _horizontal([Point(key, share) for key, share in shares.items()], "share")
    yield _section("Importance of knobs", text, figure=figure)
    times = [(row, row.ok.kernels.stage_ms) for row in rows if row.ok and row.ok.kernels]
    by_stage: dict[str, list[float]] = {}
    for stage in dict.fromkeys(name for _, stage_ms in times for name in stage_ms):
        known = [(row.differs, ms[stage]) for row, ms in times if ms.get(stage, 0.0) > 0]
        if len(known) >= _FEWEST:
            took = [ms for _, ms in known]
            by_stage[stage] = [effect([row[key] for row, _ in known], took) for key in shares]
    if by_stage:
        heat = {
            "type": "heatmap",
            "x": list(by_stage),
            "y": list(shares),
            "z": [list(column) for column in zip(*by_stage.values(), strict=True)],
            "texttemplate": "%{z:.0%}",
            "colorscale": "Blues",
            "zmin": 0,
            "zmax": 1,
        }
        text = "Share of the variance of each stage's log time that a knob explains alone."
        figure = _figure([heat], "", "", height=160 + 28 * len(shares))
        yield _section("Importance by stage", text, figure=figure)


def _pareto(group: Group) -> Iterator[Section]:
    """The plots that stand beside the study, to be pointed at."""
    if group.criteria.several:
        for panel in study_plots.pareto_panels(
            group, lambda row: f"{row.record.number}: {what(row, group)}"
        ):
            yield _section("Pareto set", figure=_panel(panel, _SCATTER))


def _left(folder: Path, verb: str, heading: str, text: str) -> Iterator[Section]:
    """The table and the plot that `ladder` or `ablate` left beside the study."""
    table_file, plot = (folder / verb / f"{verb}.{ending}" for ending in ("md", "svg"))
    if not table_file.exists():
        return
    lines = table_file.read_text(encoding="utf-8").splitlines()
    cells = [[cell.strip() for cell in line[1:-1].split("|")] for line in lines if line[:1] == "|"]
    heads, body = cells[0], cells[2:]
    numbers = re.compile(r"[-+\d.% to]*")
    columns = zip(heads, *body, strict=True)
    texts = [head for head, *column in columns if not all(map(numbers.fullmatch, column))]
    section = _section(heading, text, Table(heads, body, frozenset(texts)))
    image = base64.b64encode(plot.read_bytes()).decode() if plot.exists() else ""
    yield {**section, "image": image}


def _section(
    heading: str,
    text: str = "",
    found: Table | None = None,
    figure: str | None = None,
    marks: Sequence[str] = (),
) -> Section:
    """`marks` are the classes of the table's rows."""
    shown = found and {
        "heads": [(head.replace("\n", " "), head not in found.texts) for head in found.heads],
        "rows": list(zip_longest(found.body, marks[: len(found.body)], fillvalue="")),
    }
    return {"heading": heading, "text": text, "table": shown, "figure": figure, "image": ""}


def _panel(panel: Panel, style: Mapping[str, Any]) -> str:
    """A panel with its series in the style of plotly's traces; texts are seen on pointing."""
    traces = [
        {
            "name": series.label,
            "x": [point.x for point in series.points],
            "y": [point.y for point in series.points],
            "text": [point.text for point in series.points],
            **style,
        }
        for series in panel.series
    ]
    return _figure(traces, panel.x_label, panel.y_label)


def _horizontal(bars: Sequence[Point], x: str) -> str:
    """Bars with their intervals, the first on top."""
    trace: dict[str, Any] = {"type": "bar", "orientation": "h"}
    trace |= {"x": [bar.y for bar in bars], "y": [bar.x for bar in bars]}
    if intervals := errors(bars):
        below, above = intervals
        trace["error_x"] = {"type": "data", "symmetric": False, "array": above, "arrayminus": below}
    return _figure([trace], x, "", height=120 + 34 * len(bars), reverse=True)


def _figure(
    traces: Sequence[Mapping[str, Any]],
    x: str,
    y: str,
    height: int = 380,
    reverse: bool = False,
) -> str:
    """What Plotly.newPlot takes after the element; safe inside of a script."""
    layout: dict[str, Any] = {
        "height": height,
        "margin": {"t": 20, "b": 50},
        "barmode": "group",
        "showlegend": len(traces) > 1,
        "xaxis": {"title": {"text": x}, "automargin": True},
        "yaxis": {"title": {"text": y}, "automargin": True},
    }
    layout["yaxis"]["autorange" if reverse else "rangemode"] = "reversed" if reverse else "tozero"
    parts = [list(traces), layout, {"responsive": True, "displayModeBar": False}]
    return ", ".join(json.dumps(part, allow_nan=False).replace("</", "<\\/") for part in parts)
