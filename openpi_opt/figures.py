"""The figures of an `ok` result, each stated once, for tables, limits, objectives, plots and JSON.

A new figure is one entry of `FIGURES`. With `objective` a study can minimise it, with `mlflow` it
is a metric, with `limit` it can be limited (`conf/limits/default.yaml` then names the key too,
which a test keeps true). `python -m openpi_opt.figures` prints the list.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

from openpi_opt.result import Compilation, Ok, Pruned

Interval = tuple[float | None, float | None]


@dataclass(frozen=True)
class Figure:
    """One figure of an ok trial.

    `key` names it in JSON, in columns and panels; `value` is None where it was not measured. Only
    figures that are better when they are less can be objectives or have limits. `seen` is what a
    pruned result says of it. A column's title is `head` where the table is narrow, `title` else.
    """

    key: str
    name: str
    unit: str
    value: Callable[[Ok], Any]
    form: str = ".3f"
    better: Literal["less", "more"] | None = None
    mlflow: str | None = None
    head: str = ""
    objective: str | None = None
    limit: str | None = None
    seen: Callable[[Pruned], float | None] = lambda _: None
    interval: Callable[[Ok], Interval] | None = None
    log: bool = False
    show: Callable[[Any], str] | None = None

    @property
    def title(self) -> str:
        """Its name with its unit."""
        return ", ".join(filter(None, [self.name, self.unit]))

    def cell(self, result: Ok) -> str:
        """Its text without a unit; empty where it was not measured."""
        value = self.value(result)
        return "" if value is None else self.plain(value)

    def plain(self, value: Any) -> str:
        """A value of it without its unit."""
        return self.show(value) if self.show else format(value, self.form)

    def text(self, value: float) -> str:
        """A value of it with its unit."""
        return f"{self.plain(value)} {self.unit}".strip()


def _batch(ok: Ok) -> float:
    return float(ok.config["workload"]["batch_size"])


def _interval_ms(ok: Ok) -> tuple[float, float]:
    return ok.latency.ci95_low_ms, ok.latency.ci95_high_ms


def _rates(ok: Ok) -> Interval:
    """A rate's interval is the latency's, turned round; one that reaches 0 ms has no upper end."""
    low, high = _interval_ms(ok)
    per_call = 1e3 * _batch(ok)
    return per_call / high, per_call / low if low > 0 else None


def stages_of_limit(ok: Ok) -> dict[str, float]:
    """By stage, the share of the machine's limit that it reaches, where both are known."""
    found = ok.roofline.stages if ok.roofline else {}
    return {name: stage.fraction for name, stage in found.items() if stage.fraction is not None}


def _stages(found: dict[str, float]) -> str:
    return ", ".join(f"{name} {fraction:.0%}" for name, fraction in found.items())


def _part(part: str, field: str, name: str, unit: str = "ms", **more: Any) -> Figure:
    """A number of `result.Latency`, `Energy` and so on, which a trial may lack."""

    def value(ok: Ok) -> Any:
        found = getattr(ok, part)
        return found and getattr(found, field)

    more = {"key": field, "mlflow": f"{part}/{field}"} | more
    return Figure(name=name, unit=unit, value=value, **more)


def _less(part: str, field: str, name: str, unit: str = "ms", **more: Any) -> Figure:
    """The same, better when it is less; `head` names the column of a narrow table."""
    return _part(part, field, name, unit, better="less", **more)


def _percentile(name: str) -> Figure:
    field, head = f"{name}_ms", f"{name}\nms"
    return _less("latency", field, name, head=head, objective=name, limit=field, log=True)


def _compilation(name: str, value: Callable[[Compilation], int]) -> Figure:
    """A count of `result.Compilation`."""
    return Figure(
        f"compile_{name}",
        name.replace("_", " "),
        "",
        lambda ok: None if ok.compilation is None else value(ok.compilation),
        form="d",
        better="less",
        mlflow=f"compile/{name}",
    )


_ALL = [
    _less(
        "latency", "mean_ms", "latency", head="mean\nms", objective="latency", limit="latency_ms",
        seen=lambda pruned: pruned.seen_low_ms, interval=_interval_ms, log=True,
    ),
    Figure(
        "ci95_ms", "95% interval", "ms", _interval_ms,
        show=lambda ends: f"{ends[0]:.3f} to {ends[1]:.3f}",
    ),
    _less("latency", "std_ms", "std"),
    _less("latency", "min_ms", "least"),
    _less("latency", "p50_ms", "p50", head="p50\nms"),
    _percentile("p95"),
    _percentile("p99"),
    _part("latency", "ci95_low_ms", "95% interval from"),
    _part("latency", "ci95_high_ms", "95% interval to"),
    _part("latency", "p50_low_ms", "p50 from"),
    _part("latency", "p50_high_ms", "p50 to"),
    _less("latency", "rel_ci", "relative half-width", "", form=".2%"),
    _part("latency", "effective_samples", "effective samples", "", form=".1f"),
    _part("latency", "iterations", "iterations", "", form="d"),
    _less("latency", "wall_mean_ms", "wall clock"),
    _less("latency", "upload_ms", "upload"),
    Figure(
        "samples_per_s", "samples/s", "", lambda ok: ok.throughput_hz, form=".2f", better="more",
        mlflow="throughput/hz", interval=_rates,
    ),
    Figure(
        "ms_per_sample", "ms per sample", "", lambda ok: ok.latency.mean_ms / _batch(ok),
        better="less",
    ),
    Figure(
        "compile_seconds", "first call", "s", lambda ok: ok.compile_seconds, form=".1f",
        better="less", mlflow="compile/seconds", head="compile\ns", limit="compile_seconds",
    ),
    _less(
        "memory", "peak_mib", "peak memory", "MiB", form=",.1f", head="peak\nMiB",
        objective="memory", limit="peak_mib",
    ),
    _less(
        "guard", "rel_l2", "rel. L2 of the guard", "", form=".3g", head="rel. L2",
        objective="guard", limit="rel_l2", seen=lambda pruned: pruned.guard.rel_l2,
    ),
    Figure(
        "launch_overhead_ms", "launch overhead", "ms", lambda ok: ok.launch_overhead_ms,
        better="less", mlflow="launch/overhead_ms",
    ),
    _compilation("graphs", lambda found: found.graphs),
    _compilation("recompilations", lambda found: found.recompilations),
    _compilation("graph_breaks", lambda found: sum(found.graph_breaks.values())),
    _part("roofline", "floor_ms", "floor"),
    _part(
        "roofline", "fraction", "share of the machine's limit", "", key="roofline", form=".1%",
        better="more",
    ),
    Figure("stages", "by stage", "", lambda ok: stages_of_limit(ok) or None, show=_stages),
    _less("energy", "joule", "energy of a call", "J", head="J", objective="energy"),
    _less("energy", "watt", "mean power", "W", form=".1f", head="W"),
    _less("energy", "idle_watt", "idle power", "W", form=".1f"),
    _part("energy", "limit_watt", "power limit", "W", form=".1f"),
    _part(
        "energy", "inferences_per_joule", "samples per joule", "", key="samples_per_joule",
        better="more",
    ),
    _part("energy", "hz_per_watt", "Hz per W", "", form=".4f", better="more"),
    _part(
        "energy", "hz_per_limit_watt", "Hz per W of the power limit", "", form=".4f", better="more"
    ),
    _part("energy", "seconds", "time of the energy's calls", "s", key="energy_seconds"),
    _part("energy", "calls", "calls that the energy is of", "", key="energy_calls", form="d"),
]  # fmt: skip
FIGURES: dict[str, Figure] = {figure.key: figure for figure in _ALL}
OBJECTIVES: dict[str, Figure] = {
    figure.objective: figure for figure in _ALL if figure.objective is not None
}
LIMITS: dict[str, Figure] = {figure.limit: figure for figure in _ALL if figure.limit is not None}


def metrics(result: Ok) -> dict[str, float | None]:
    """By MLflow's name, every figure that has one; None where it was not measured."""
    return {figure.mlflow: figure.value(result) for figure in _ALL if figure.mlflow}


def table() -> str:
    """All figures as a table in Markdown."""
    heads = "| key | figure | better | objective | limit | MLflow |\n|---|---|---|---|---|---|"
    rows = [
        [figure.key, figure.title, figure.better, figure.objective, figure.limit, figure.mlflow]
        for figure in _ALL
    ]
    return "\n".join(
        [heads, *("| " + " | ".join(cell or "" for cell in row) + " |" for row in rows)]
    )


if __name__ == "__main__":
    print(table())
