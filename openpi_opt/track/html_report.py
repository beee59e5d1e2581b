"""One self-contained HTML file about one study or several: for a colleague without this project.

Figures come from the journals, and from `ladder/` and `ablate/` beside them. Plots are drawn by
plotly's script, which is inside the file; the file is made without importing plotly.
"""

from __future__ import annotations

import importlib.util
import itertools
import json
import math
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path
from typing import Any

from openpi_opt.criteria import Criteria
from openpi_opt.errors import UserError
from openpi_opt.figures import FIGURES
from openpi_opt.track import curve, table
from openpi_opt.track.journal import Journal, Record
from openpi_opt.track.left import VERDICTS_FILE, read_lines
from openpi_opt.track.pareto import panels
from openpi_opt.track.report import Group, Row, best_line, groups, mean_ms, what
from openpi_opt.track.table import Table

_MOST_ROWS = 60
_COLUMNS = ("ci95_ms", "p99_ms")
_FEWEST = 8  # trials from which an importance is told
_FEWEST_MINUTES = 0.1  # results that were read from a folder have no times of their own
_MOST_FOR_IMPORTANCE = 1_000  # of the newest: Optuna adds them one at a time
_TEMPLATE = Path(__file__).with_name("report.html")

Section = dict[str, Any]


@dataclass(frozen=True)
class Study:
    """A study as a report shows it."""

    folder: Path
    journal: Journal
    criteria: Criteria

    @staticmethod
    def read(study_dir: Path) -> Study:
        """The study of a folder. Raises UserError: a damaged journal."""
        criteria = Criteria.load(study_dir) or Criteria()
        return Study(study_dir, Journal.read(study_dir, brief=True), criteria)

    @property
    def trials(self) -> list[Record]:
        """All records but those of confirmations."""
        return [record for record in self.journal.records() if record.role != "confirm"]


def html(studies: Sequence[Study]) -> str:
    """The whole report as text. Studies that share a context and a fingerprint share a table;
    others are shown side by side. Raises UserError: plotly's script is not installed."""
    import jinja2

    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined)
    several = len(studies) > 1
    criteria = studies[0].criteria
    records = [record for study in studies for record in study.trials]
    found = groups(records, criteria=criteria, apart=several)
    names = ", ".join(study.folder.name for study in studies)

    asked = f"Minimised: {criteria.objectives_text()}" + (
        f". Limits: {criteria.limits_text()}." if criteria.limits else "."
    )
    return environment.from_string(_TEMPLATE.read_text(encoding="utf-8")).render(
        title=f"openpi_opt: {names}",
        asked=asked,
        script=_script(),
        overview=_overview(found) if several and found else None,
        parts=[_part(group) for group in found],
        studies=[_study(study) for study in studies],
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
    keys = _varying(timed)
    if len(timed) < _FEWEST or not keys:
        return {}
    import optuna
    from optuna.distributions import CategoricalDistribution

    optuna.logging.set_verbosity(optuna.logging.ERROR)
    kinds = {
        key: CategoricalDistribution(sorted({row.differs[key] for row in timed})) for key in keys
    }
    study = optuna.create_study()
    study.add_trials(
        optuna.trial.create_trial(
            params={key: row.differs[key] for key in keys},
            distributions=dict(kinds),
            value=math.log(mean_ms(row)),
        )
        for row in timed
    )
    evaluator = optuna.importance.PedAnovaImportanceEvaluator()
    return dict(optuna.importance.get_param_importances(study, evaluator=evaluator))


def effect(rows: Sequence[Row], key: str, value: Callable[[Row], float]) -> float:
    """Share of the variance of the log of `value` that knob `key` explains alone, 0 to 1. The
    correlation ratio (Fisher): variance of the means of its options by the whole variance."""
    by_option: dict[str, list[float]] = defaultdict(list)
    for row in rows:
        by_option[row.differs[key]].append(math.log(value(row)))
    every = [number for numbers in by_option.values() for number in numbers]
    mean = math.fsum(every) / len(every)
    whole = math.fsum((number - mean) ** 2 for number in every)
    between = math.fsum(
        len(numbers) * (math.fsum(numbers) / len(numbers) - mean) ** 2
        for numbers in by_option.values()
    )
    return between / whole if whole else 0.0


def _varying(rows: Sequence[Row]) -> list[str]:
    keys = list(rows[0].differs) if rows else []
    return [key for key in keys if len({row.differs[key] for row in rows}) > 1]


def _study(study: Study) -> dict[str, Any]:
    header, records = study.journal.header, study.journal.records()
    seen: Mapping[str, Any] = records[-1].result.fingerprint if records else {}
    versions = {
        "torch": (seen.get("torch") or {}).get("version"),
        "triton": seen.get("triton"),
        "aiter": (seen.get("aiter") or {}).get("version"),
        "openpi_opt": seen.get("openpi_opt"),
        "git": seen.get("git"),
    }
    return {
        "name": study.folder.name,
        "sections": [*_ladder(study.folder), *_ablation(study.folder)],
        "confirmed": [
            line["text"].replace("**", "") for line in read_lines(study.folder / VERDICTS_FILE)
        ],
        "command": "python -m openpi_opt.sweep " + " ".join(header.command if header else []),
        "versions": ", ".join(f"{name} {text}" for name, text in versions.items() if text),
    }


def _overview(found: Sequence[Group]) -> Section:
    """The best of each context on each machine: not compared where machines differ."""
    bars = [
        (group.title, latency.mean_ms, latency.ci95_low_ms, latency.ci95_high_ms)
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
    return {
        "title": group.title,
        "best": best_line(group),
        "machine": ", ".join(str(text) for text in machine if text),
        "sections": [
            *_progress(group),
            *_trials(group, rows),
            *_stages(group.best),
            *_categories(group.best),
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
    found = curve.steps(records, group.criteria)
    if len(found) < 2 or group.studies > 1 or found[-1].minutes < _FEWEST_MINUTES:
        return
    names = {row.record.number: what(row, group) for row in group.rows}
    trace = {
        "x": [step.minutes for step in found],
        "y": [step.best_ms for step in found],
        "text": [names[step.number] for step in found],
        "mode": "lines+markers",
        "line": {"shape": "hv"},
    }
    figure = _figure([trace], "minutes of the sweep", "best so far, ms")
    yield _section("Best so far", figure=figure)


def _stages(best: Row | None) -> Iterator[Section]:
    ok = best.ok if best else None
    if ok is None or ok.kernels is None or not ok.kernels.stage_ms:
        return
    took = ok.kernels.stage_ms
    floors = {
        name: stage.floor_ms
        for name, stage in (ok.roofline.stages if ok.roofline else {}).items()
        if stage.floor_ms is not None and name in took
    }
    bars = [_bar("took", took), *([_bar("floor", floors)] if floors else [])]
    text = "Time of each stage in the best trial, beside the least that its work needs here."
    yield _section("Stages against the floor", text, figure=_figure(bars, "", "ms"))


def _categories(best: Row | None) -> Iterator[Section]:
    ok = best.ok if best else None
    if ok is None or ok.kernels is None or not ok.kernels.category_ms:
        return
    spent = dict(sorted(ok.kernels.category_ms.items(), key=lambda entry: -entry[1]))
    bar = _bar("", spent)
    bar |= {"textposition": "outside", "cliponaxis": False}
    bar["text"] = [f"{ok.kernels.by_category.get(name, 0)} calls" for name in spent]
    heading = "Kernel categories of the best trial"
    yield _section(heading, figure=_figure([bar], "", "ms"))


def _importance(rows: Sequence[Row]) -> Iterator[Section]:
    shares = importance(rows)
    if not shares:
        return
    text = "Share of each knob in what sets the fastest trials apart (Optuna's PED-ANOVA)."
    bars = [(key, share, share, share) for key, share in shares.items()]
    yield _section("Importance of knobs", text, figure=_horizontal(bars, "share"))
    timed = [row for row in rows if row.ok and row.ok.kernels and row.ok.kernels.stage_ms]
    stages = dict.fromkeys(n for r in timed if r.ok and r.ok.kernels for n in r.ok.kernels.stage_ms)
    shares_of: dict[str, list[float]] = {}
    for stage in stages:

        def took(row: Row, stage: str = stage) -> float:
            assert row.ok is not None
            assert row.ok.kernels is not None
            return row.ok.kernels.stage_ms.get(stage, 0.0)

        known = [row for row in timed if took(row) > 0]
        if len(known) >= _FEWEST:
            shares_of[stage] = [effect(known, key, took) for key in shares]
    if shares_of:
        heat = {
            "type": "heatmap",
            "x": list(shares_of),
            "y": list(shares),
            "z": [list(column) for column in zip(*shares_of.values(), strict=True)],
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
    names = {str(row.record.number): what(row, group) for row in group.rows}
    for panel in panels(group) if group.criteria.several else ():
        traces = [
            {
                "name": series.label,
                "mode": "markers",
                "x": [point.x for point in series.points],
                "y": [point.y for point in series.points],
                "text": [f"{point.text}: {names[point.text]}" for point in series.points],
            }
            for series in panel.series
        ]
        yield _section("Pareto set", figure=_figure(traces, panel.x_label, panel.y_label))


def _ladder(folder: Path) -> Iterator[Section]:
    """What `ladder` left: each knob on top of those before it, in fresh processes."""
    found = _document(folder / "ladder" / "ladder.json")
    if found is None:
        return
    body = []
    for rung in found["rungs"]:
        step, (low, high) = rung["step"], rung["ci95_ms"]
        saved = [f"{step['mean']:+.2%}", _percents(step["ci95"]), step["verdict"]] if step else []
        cells = [rung["added"], f"{rung['mean_ms']:.3f}", f"{low:.3f} to {high:.3f}"]
        body.append([*cells, *(saved or [""] * 3)])
    bars = [(rung["added"], rung["mean_ms"], *rung["ci95_ms"]) for rung in found["rungs"]]
    heads = ["added", "mean ms", "95% interval", "saved by the step", "its 95% interval", "verdict"]
    text = "Each step in interleaved fresh processes."
    steps = Table(heads, body, frozenset(["added", "verdict"]))
    yield _section("Ladder", text, steps, _horizontal(bars, "latency, ms"))


def _ablation(folder: Path) -> Iterator[Section]:
    """What `ablate` left: the best without each of its knobs, in fresh processes."""
    found = _document(folder / "ablate" / "ablate.json")
    if found is None:
        return
    body = [["(nothing: all knobs)", f"{found['whole']['mean_ms']:.3f}", "", "", ""]]
    for loss in found["without"]:
        cells = [loss["knobs"], f"{loss['mean_ms']:.3f}", f"{loss['added']:+.2%}"]
        body.append([*cells, _percents(loss["ci95"]), loss["verdict"]])
    heads = ["without", "mean ms", "time added", "95% interval", "the knob"]
    text = "The best without each of its knobs, in interleaved fresh processes."
    yield _section("Ablation", text, Table(heads, body, frozenset(["without", "the knob"])))


def _document(path: Path) -> Any:
    try:
        return json.loads(path.read_bytes())
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read: {error}. Move it away, then try again.") from error


def _percents(interval: Sequence[float]) -> str:
    return " to ".join(f"{end:+.2%}" for end in interval)


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
    return {"heading": heading, "text": text, "table": shown, "figure": figure}


def _bar(name: str, values: Mapping[str, float | None]) -> dict[str, Any]:
    return {"type": "bar", "name": name, "x": list(values), "y": list(values.values())}


def _horizontal(bars: Sequence[tuple[str, float, float, float]], x: str) -> str:
    """Bars with their intervals, the first on top."""
    trace: dict[str, Any] = {"type": "bar", "orientation": "h"}
    trace |= {"x": [value for _, value, _, _ in bars], "y": [name for name, *_ in bars]}
    if any(low != high for _, _, low, high in bars):
        trace["error_x"] = {
            "type": "data",
            "symmetric": False,
            "array": [high - value for _, value, _, high in bars],
            "arrayminus": [value - low for _, value, low, _ in bars],
        }
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
