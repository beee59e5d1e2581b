"""Experiments: a sweep that is written in `conf/experiment/`, and the report at its end.

`sweep experiment=NAME out=FOLDER [key=value ...]` runs one, `python -m openpi_opt.experiment NAME
STUDY --out FOLDER` writes its report again: a table, JSON and a plot, all called NAME.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from openpi_opt import cli
from openpi_opt.config import SECTIONS
from openpi_opt.errors import UserError
from openpi_opt.figures import FIGURES
from openpi_opt.paths import conf_dir
from openpi_opt.space.files import read
from openpi_opt.space.settings import Settings, default_study_name
from openpi_opt.space.space import parse_override
from openpi_opt.track import plots
from openpi_opt.track.journal import Journal, utc_now
from openpi_opt.track.mlflow_content import device
from openpi_opt.track.report import Row, rows
from openpi_opt.track.store import DEFAULT_STORE, Store
from openpi_opt.track.table import Table, flag_lines, markdown
from openpi_opt.verbs import add_store

# Keys of an experiment's command line that the sweep does not have.
_OWN_KEYS = ("experiment", "out")
# What says how to search and to measure does not tell configurations apart.
_NO_KNOBS = {*Settings.model_fields, *SECTIONS} - {"model", "weights", "workload"}


Entry = tuple[Row, dict[str, Any]]  # a trial, and its line of the table


class Experiment(BaseModel):
    """One file of `conf/experiment/`."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    title: str
    overrides: tuple[str, ...]
    x: str
    x_label: str
    columns: tuple[str, ...] = Field(min_length=1)
    plot: Literal["lines", "bars"]
    panels: tuple[str, ...] = Field(min_length=1)

    @staticmethod
    def load(name: str) -> Experiment:
        """Read `conf/experiment/NAME.yaml`. Raises UserError: no such experiment; says which there
        are."""
        folder = conf_dir() / "experiment"
        known = sorted(path.stem for path in folder.glob("*.yaml"))
        if name not in known:
            raise UserError(f"experiment={name}: unknown. Use one of {', '.join(known)}.")
        if name == "instances":
            raise UserError("experiment=instances is no study; its report is written at its end.")
        found = Experiment.model_validate(read(folder / f"{name}.yaml").content)
        unknown = {*found.columns, *found.panels} - set(FIGURES)
        assert not unknown, f"{name}: no such column {unknown}"
        return found


def run(words: Sequence[str], sweep: Callable[[Sequence[str]], int]) -> int:
    """Run the experiment of a sweep's command line by `sweep`, and write its report. The report
    goes to `out=FOLDER`, or to the study's folder. Returns the sweep's exit code. Raises UserError:
    unknown experiment, or a wrong override."""
    own, rest = _own_words(words)
    name = own["experiment"]
    if name == "instances":  # no sweep: several processes of one configuration
        from openpi_opt import instances

        return instances.run(rest, own.get("out"))
    experiment = Experiment.load(name)
    given = [word for word in rest if not word.startswith("-") and "=" in word]
    keys = {parse_override(word).key_or_group for word in given}
    added = [line for line in experiment.overrides if line.partition("=")[0] not in keys]
    study = _value(given, "study") or _study_name(name, given)
    store = _value(given, "store") or DEFAULT_STORE
    if "study" not in keys:
        added.append(f"study='{study}'")
    flags = [] if {"-m", "--multirun"} & set(rest) else ["-m"]
    code = sweep([*flags, *rest, *added])
    known = Path(store).is_dir() and study in Store.open(store, create=False).studies()
    if known:
        study_dir = Store.open(store, create=False).find_study(study)
        write_report(name, study_dir, Path(own.get("out") or study_dir / "report"))
    return code


def _study_name(name: str, given: Sequence[str]) -> str:
    """The day, the experiment, and a hash of the command line."""
    day, *_, digest = default_study_name([f"experiment={name}", *given]).split("-")
    return f"{day}-{name}-{digest}"


def _own_words(words: Sequence[str]) -> tuple[dict[str, str], list[str]]:
    own: dict[str, str] = {}
    rest = []
    for word in words:
        key, _, text = word.partition("=")
        if key in _OWN_KEYS:
            if not text:
                raise UserError(f"{word!r} gives {key} no value. Write {key}=VALUE.")
            own[key] = text
        else:
            rest.append(word)
    return own, rest


def _value(given: Sequence[str], key: str) -> str | None:
    found = [parse_override(word).value() for word in given if word.startswith(f"{key}=")]
    return str(found[-1]) if found else None


def write_report(name: str, study_dir: Path, folder: Path) -> list[Path]:
    """Write table and plot of a study, print the table; returns the files. Trials of an older
    machine or software (another fingerprint), and confirmations, are left out. Raises UserError:
    the study holds no trial, or the folder cannot be written."""
    experiment = Experiment.load(name)
    journal = Journal.read(study_dir)
    found = [r for r in rows(journal.records()) if not r.stale and r.record.role != "confirm"]
    if not found:
        raise UserError(f"study {study_dir.name} has no finished trial, so there is no report.")
    typed = _typed(experiment, journal.header.command if journal.header else [])
    entries = [(row, _entry(row, experiment, typed)) for row in found]
    entries.sort(key=lambda pair: (pair[1]["configuration"], pair[1][experiment.x]))
    found, table = [row for row, _ in entries], [entry for _, entry in entries]
    newest = max(found, key=lambda row: row.record.number).record.result
    config, where = newest.config, device(newest.config, newest.fingerprint)
    model, workload = config["model"]["name"], found[0].record.result.config["workload"]
    heading = f"{experiment.title}: {model} on {where}, workload {config['workload']['name']}"
    ceilings = next((r.ok.roofline.ceilings for r in found if r.ok and r.ok.roofline), None)
    document = {
        "experiment": name,
        "title": experiment.title,
        "study": study_dir.name,
        "written_at": utc_now(),
        "model": model,
        "workload": workload,
        "device": where,
        "fingerprint": newest.fingerprint,
        "ceilings": ceilings and ceilings.model_dump(),
        "rows": table,
    }
    panels = _panels(experiment, entries)
    text = _markdown(experiment, [f"# {heading}", "", f"Study `{study_dir.name}`.", ""], entries)
    mend = (
        f"The study is kept: python -m openpi_opt.experiment {name} {study_dir.name} --out FOLDER "
        "writes the report elsewhere."
    )
    figure = plots.draw(experiment.plot, heading, panels) if panels else None
    files = plots.write_report(folder, name, text, document, figure, mend)
    for file in files:
        cli.say(f"wrote {file}")
    return files


def _typed(experiment: Experiment, command: Sequence[str]) -> str:
    """What the whole study was given, apart from the experiment's own and what is no knob."""
    ignored = {experiment.x, *_NO_KNOBS, *_OWN_KEYS}
    return " ".join(
        word
        for word in command
        if "=" in word
        and not word.startswith("-")
        and not {word.partition("=")[0], word.split("=")[0].split(".")[0]} & ignored
        and word not in experiment.overrides
    )


def _entry(row: Row, experiment: Experiment, typed: str) -> dict[str, Any]:
    """One line of the table as plain data; figures are None where the outcome has none. Its
    configuration are the swept keys besides x, or what was `typed`, or the baseline."""
    record = row.record
    swept = [f"{key}={text}" for key, text in record.params.items() if key != experiment.x]
    name = " ".join(swept) or typed
    x: Any = record.result.config
    for part in experiment.x.split("."):
        x = x[part]
    figures = {key: FIGURES[key].value(row.ok) if row.ok else None for key in experiment.columns}
    return {
        "configuration": "baseline" if record.role == "baseline" or not name else name,
        experiment.x: x,
        "outcome": record.result.outcome,
        **figures,
        "noisy": row.ok.latency.noisy if row.ok else None,
        "flags": row.ok.flags() if row.ok else [],
        "notes": record.result.notes,
        "reason": row.reason or None,
        "number": record.number,
    }


def _markdown(experiment: Experiment, top: list[str], entries: Sequence[Entry]) -> str:
    heads = ["configuration", experiment.x.split(".")[-1]]
    heads += [*(FIGURES[key].title for key in experiment.columns), "trial"]
    body, remarks = [], dict[str, list[str]]()
    for _, entry in entries:
        first, number = (entry["configuration"], str(entry[experiment.x])), str(entry["number"])
        body.append([*first, *(_cell(entry, key) for key in experiment.columns), number])
        for text in [*filter(None, [entry["reason"]]), *entry["notes"]]:
            remarks.setdefault(text, []).append(number)
    lines = [*top, *markdown(Table(heads, body, frozenset(heads[:1]))), ""]
    lines += [f"- {text} (trial {', '.join(who)})" for text, who in remarks.items()]
    lines += [f"- {line}" for line in flag_lines([row for row, _ in entries])]
    if any(entry["noisy"] for _, entry in entries):
        lines.append("- ~ noisy: standard deviation above 10% of the mean")
    return "\n".join(lines).rstrip() + "\n"


def _cell(entry: dict[str, Any], key: str) -> str:
    if entry["outcome"] != "ok":
        return str(entry["outcome"])
    if entry[key] is None:
        return "not measured"
    return "~ " * (entry["noisy"] and key == "mean_ms") + FIGURES[key].plain(entry[key])


def _panels(experiment: Experiment, entries: Sequence[Entry]) -> list[plots.Panel]:
    """One for each figure that at least one trial has."""
    panels = []
    lines = experiment.plot == "lines"
    for figure in map(FIGURES.__getitem__, experiment.panels):
        points: dict[str, list[plots.Point]] = {}
        for row, entry in entries:
            if row.ok is None or (value := figure.value(row.ok)) is None:
                continue
            x = entry[experiment.x] if lines else str(entry[experiment.x])
            interval = figure.interval(row.ok) if figure.interval else (None, None)
            points.setdefault(entry["configuration"], []).append(plots.Point(x, value, *interval))
        series = [plots.Series(name, each) for name, each in points.items()]
        if series:
            log_y = lines and figure.log
            panels.append(
                plots.Panel(figure.title, series, experiment.x_label, log_x=lines, log_y=log_y)
            )
    return panels


def main(argv: Sequence[str] | None = None) -> int:
    """Write the report of a study once more."""
    arguments = _parser().parse_args(argv)
    Experiment.load(arguments.name)
    study_dir = Store.open(arguments.store, create=False).find_study(arguments.study)
    write_report(arguments.name, study_dir, arguments.out or study_dir / "report")
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m openpi_opt.experiment",
        description="Write table and plot of an experiment's study again. The experiment itself is "
        "run by `python -m openpi_opt.sweep experiment=NAME out=FOLDER`.",
    )
    parser.add_argument("name", metavar="NAME", help="batch_scaling or perf_per_watt")
    parser.add_argument("study", metavar="STUDY", help="name of the study")
    add_store(parser)
    parser.add_argument("--out", type=Path, metavar="FOLDER", help="default: the study's report/")
    return parser


if __name__ == "__main__":
    cli.run(main)
