"""One self-contained HTML file about one study or several: for a colleague without this project.

Figures come from the journals alone. Plots are plotly's, with its script inside the file.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from openpi_opt.criteria import Criteria
from openpi_opt.result import Ok
from openpi_opt.track.journal import Journal, Record
from openpi_opt.track.mlflow_study import differs
from openpi_opt.track.report import Group, Row, groups, mean_ms
from openpi_opt.track.table import flag_lines

if TYPE_CHECKING:
    import plotly.graph_objects as go

_TEMPLATE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>{{ title }}</title>
<meta name="viewport" content="width=device-width, initial-scale=1">
<style>
body { font: 15px/1.5 system-ui, sans-serif; color: #1f2933; max-width: 1100px; margin: 2em auto;
       padding: 0 1em; }
h1 { font-size: 1.6em; } h2 { margin-top: 2em; border-bottom: 1px solid #d8dee4; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; width: 100%; }
th, td { padding: .25em .6em; text-align: left; border-bottom: 1px solid #e6eaee;
         vertical-align: top; }
th { background: #f5f7f9; } td.n, th.n { text-align: right; }
tr.best { background: #e8f6ec; } .note { color: #5b6773; } code, pre { background: #f5f7f9; }
pre { padding: .8em; overflow-x: auto; } .big { font-size: 1.25em; }
</style><script>{{ script | safe }}</script></head><body>
<h1>{{ title }}</h1>
{% for study in studies %}{% for part in study.parts %}
<h2>{{ study.name }}: {{ part.title }}</h2>
<p class="big">{{ part.best }}</p>
<p class="note">{{ part.machine }}</p>
{{ part.progress | safe }}
<table><tr><th class="n">#</th><th>what differs</th><th>outcome</th><th class="n">mean ms</th>
<th class="n">95% interval</th><th class="n">std</th><th class="n">p99</th>
<th class="n">vs baseline</th><th class="n">kernels</th></tr>
{% for row in part.rows %}<tr{% if row.best %} class="best"{% endif %}>
<td class="n">{{ row.number }}</td><td>{{ row.differs }}</td><td>{{ row.outcome }}</td>
<td class="n">{{ row.mean }}</td>
<td class="n">{{ row.interval }}</td><td class="n">{{ row.std }}</td>
<td class="n">{{ row.p99 }}</td><td class="n">{{ row.ratio }}</td>
<td class="n">{{ row.kernels }}</td></tr>{% endfor %}</table>
{% if part.more %}<p class="note">{{ part.more }} more trials are in the study's journal.</p>
{% endif %}
{% for heading, text, plot in part.plots %}<h3>{{ heading }}</h3><p class="note">{{ text }}</p>
{{ plot | safe }}{% endfor %}
{% if part.notes %}<h3>Flags and notes</h3><ul>{% for note in part.notes %}<li>{{ note }}</li>
{% endfor %}</ul>{% endif %}
{% endfor %}
<h3>Reproduce</h3><pre>{{ study.command }}</pre>
<p class="note">{{ study.versions }}</p>
{% endfor %}
</body></html>
"""
_MOST_ROWS = 60


@dataclass(frozen=True)
class Study:
    """A study as a report shows it."""

    name: str
    journal: Journal
    criteria: Criteria

    @staticmethod
    def read(study_dir: Path) -> Study:
        """The study of a folder.

        Raises:
            UserError: a damaged journal.
        """
        criteria = Criteria.load(study_dir) or Criteria()
        return Study(study_dir.name, Journal.read(study_dir), criteria)

    @property
    def trials(self) -> list[Record]:
        """All records but those of confirmations."""
        return [record for record in self.journal.records() if record.role != "confirm"]


def html(studies: Sequence[Study]) -> str:
    """The whole report as text. Imports plotly and jinja2."""
    import jinja2
    from plotly.offline import get_plotlyjs

    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined)
    names = ", ".join(study.name for study in studies)
    return environment.from_string(_TEMPLATE).render(
        title=f"openpi_opt: {names}",
        script=get_plotlyjs(),
        studies=[_study(study) for study in studies],
    )


def best_so_far(records: Iterable[Record]) -> list[tuple[float, float, Record]]:
    """Minutes since the first start, best mean in ms, and the trial, at each improvement."""
    done = sorted(records, key=lambda record: record.created_at)
    if not done:
        return []
    begun = min(_time(record.result.started_at) for record in done)
    found: list[tuple[float, float, Record]] = []
    best = math.inf
    for record in done:
        if isinstance(record.result, Ok) and record.result.latency.mean_ms < best:
            best = record.result.latency.mean_ms
            found.append(((_time(record.created_at) - begun).total_seconds() / 60, best, record))
    return found


def importance(rows: Sequence[Row]) -> dict[str, float]:
    """The share of each knob in the differences of the log time, by Optuna's PED-ANOVA.

    Source: Watanabe et al., PED-ANOVA, IJCAI 2023. Empty with fewer than 8 trials.
    """
    timed = [row for row in rows if row.ok]
    keys = list(timed[0].differs) if timed else []
    keys = [key for key in keys if len({row.differs[key] for row in timed}) > 1]
    if len(timed) < 8 or not keys:
        return {}
    import optuna
    from optuna.distributions import CategoricalDistribution

    optuna.logging.set_verbosity(optuna.logging.ERROR)
    kinds = {
        key: CategoricalDistribution(sorted({row.differs[key] for row in timed})) for key in keys
    }
    study = optuna.create_study()
    for row in timed:
        study.add_trial(
            optuna.trial.create_trial(
                params={key: row.differs[key] for key in keys},
                distributions=dict(kinds),
                value=math.log(mean_ms(row)),
            )
        )
    evaluator = optuna.importance.PedAnovaImportanceEvaluator()
    return dict(optuna.importance.get_param_importances(study, evaluator=evaluator))


def _study(study: Study) -> dict[str, Any]:
    header = study.journal.header
    records = study.trials
    seen = records[-1].result.fingerprint if records else {}
    versions = {
        "torch": (seen.get("torch") or {}).get("version"),
        "triton": seen.get("triton"),
        "aiter": (seen.get("aiter") or {}).get("version"),
        "openpi_opt": seen.get("openpi_opt"),
        "git": seen.get("git"),
    }
    return {
        "name": study.name,
        "parts": [_part(group) for group in groups(records, criteria=study.criteria)],
        "command": "python -m openpi_opt.sweep " + " ".join(header.command if header else []),
        "versions": ", ".join(f"{name} {text}" for name, text in versions.items() if text),
    }


def _part(group: Group) -> dict[str, Any]:
    rows = sorted(group.rows, key=mean_ms)
    best = next((row for row in rows if row.best), None)
    fingerprint = group.rows[-1].record.result.fingerprint
    gpu = fingerprint.get("gpu") or {}
    machine = [gpu.get("name"), fingerprint.get("cpu"), f"{fingerprint.get('cores')} cores"]
    return {
        "title": group.title,
        "best": _best(best),
        "machine": ", ".join(str(text) for text in machine if text),
        "progress": _progress(group),
        "rows": [_row(row) for row in rows[:_MOST_ROWS]],
        "more": max(0, len(rows) - _MOST_ROWS),
        "plots": [*_stages(best), *_categories(best), *_importance(rows), *_pareto(group)],
        "notes": [*group.footnotes, *flag_lines(group.rows)],
    }


def _best(row: Row | None) -> str:
    if row is None or row.ok is None:
        return "No trial is the best one."
    latency = row.ok.latency
    gain = "" if row.vs_baseline is None else f", {row.vs_baseline:.2f}x the baseline's speed"
    return (
        f"Best: trial {row.record.number} ({differs(row)}), {latency.mean_ms:.3f} ms "
        f"(95%: {latency.ci95_low_ms:.3f} to {latency.ci95_high_ms:.3f}){gain}. "
        "One process: a promotion confirms it."
    )


def _row(row: Row) -> dict[str, Any]:
    found = {
        "number": row.record.number,
        "differs": differs(row),
        "outcome": row.record.result.outcome + (f": {row.reason}" if row.reason else ""),
        "best": row.best,
        "ratio": "" if row.vs_baseline is None else f"{row.vs_baseline:.2f}x",
    } | dict.fromkeys(("mean", "interval", "std", "p99", "kernels"), "")
    if row.ok is not None:
        latency = row.ok.latency
        found |= {
            "mean": f"{latency.mean_ms:.3f}",
            "interval": f"{latency.ci95_low_ms:.3f} to {latency.ci95_high_ms:.3f}",
            "std": f"{latency.std_ms:.3f}",
            "p99": f"{latency.p99_ms:.3f}",
            "kernels": row.ok.kernels.total if row.ok.kernels else "",
        }
    return found


def _progress(group: Group) -> str:
    import plotly.graph_objects as go

    found = best_so_far(row.record for row in group.rows)
    if len(found) < 2:
        return ""
    titles = {row.record.uid: differs(row) for row in group.rows}
    figure = go.Figure(
        go.Scatter(
            x=[minutes for minutes, _, _ in found],
            y=[best for _, best, _ in found],
            text=[titles[record.uid] for _, _, record in found],
            mode="lines+markers",
            line_shape="hv",
        )
    )
    return _drawn(figure, "minutes since the first trial began", "best so far, ms")


def _stages(best: Row | None) -> list[tuple[str, str, str]]:
    import plotly.graph_objects as go

    ok = best.ok if best else None
    if ok is None or ok.kernels is None or not ok.kernels.stage_ms:
        return []
    took = ok.kernels.stage_ms
    bars = [go.Bar(name="took", x=list(took), y=list(took.values()))]
    floors = {
        name: stage.floor_ms
        for name, stage in (ok.roofline.stages if ok.roofline else {}).items()
        if stage.floor_ms is not None and name in took
    }
    if floors:
        bars.append(go.Bar(name="floor", x=list(floors), y=list(floors.values())))
    text = "Time of each stage in the best trial, beside the least that its work needs here."
    return [("Stages against the floor", text, _drawn(go.Figure(bars), "", "ms"))]


def _categories(best: Row | None) -> list[tuple[str, str, str]]:
    import plotly.graph_objects as go

    ok = best.ok if best else None
    if ok is None or ok.kernels is None or not ok.kernels.category_ms:
        return []
    spent = dict(sorted(ok.kernels.category_ms.items(), key=lambda entry: -entry[1]))
    counts = [ok.kernels.by_category.get(name, 0) for name in spent]
    text = [f"{count} calls" for count in counts]
    bar = go.Bar(x=list(spent), y=list(spent.values()), text=text)
    return [("Kernel categories of the best trial", "", _drawn(go.Figure(bar), "", "ms"))]


def _importance(rows: Sequence[Row]) -> list[tuple[str, str, str]]:
    import plotly.graph_objects as go

    shares = importance(rows)
    if not shares:
        return []
    ordered = dict(sorted(shares.items(), key=lambda entry: entry[1]))
    bar = go.Bar(x=list(ordered.values()), y=list(ordered), orientation="h")
    text = "Share of each knob in what sets the fastest trials apart (PED-ANOVA)."
    return [("Importance of knobs", text, _drawn(go.Figure(bar), "share", ""))]


def _pareto(group: Group) -> list[tuple[str, str, str]]:
    import plotly.graph_objects as go

    criteria = group.criteria
    if not criteria.several:
        return []
    first, second = criteria.figures()[:2]
    kinds = {"Pareto set": True, "dominated": False}
    traces = []
    for name, front in kinds.items():
        rows = [row for row in group.rows if row.ok and row.pareto == front]
        traces.append(
            go.Scatter(
                name=name,
                mode="markers",
                x=[first.value(row.ok) for row in rows if row.ok],
                y=[second.value(row.ok) for row in rows if row.ok],
                text=[differs(row) for row in rows],
            )
        )
    return [("Pareto set", "", _drawn(go.Figure(traces), first.title, second.title))]


def _drawn(figure: go.Figure, x: str, y: str) -> str:
    figure.update_layout(
        template="plotly_white", height=380, margin={"t": 20, "b": 50}, barmode="group"
    )
    figure.update_xaxes(title=x)
    figure.update_yaxes(title=y, rangemode="tozero")
    return str(figure.to_html(full_html=False, include_plotlyjs=False))


def _time(text: str) -> datetime:
    return datetime.fromisoformat(text.replace("Z", "+00:00"))
