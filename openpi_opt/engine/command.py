"""A composed command line turned into a study, and the study's end as text on stdout."""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from openpi_opt import cli
from openpi_opt.config import Config
from openpi_opt.engine.display import Lines, Live
from openpi_opt.engine.dry_run import print_dry_run
from openpi_opt.engine.plan import StudyRequest
from openpi_opt.engine.study import StudyOutcome, run_study
from openpi_opt.errors import UserError, hidden
from openpi_opt.process.devices import Devices, lease
from openpi_opt.process.environment import child_environment
from openpi_opt.remote.remote import Nodes, connected
from openpi_opt.result import GuardPower, Ok, write_atomic
from openpi_opt.space.named import chosen_starts
from openpi_opt.space.points import Compose, Points
from openpi_opt.space.prepare import prepare, require_some
from openpi_opt.space.settings import Settings, check_not_swept, default_study_name
from openpi_opt.space.space import Space
from openpi_opt.track.link import where
from openpi_opt.track.mlflow_content import reason
from openpi_opt.track.report import Group, Row, groups, mean_ms, whole
from openpi_opt.track.store import DEFAULT_STORE, Store, check_study_name
from openpi_opt.track.table import margin, print_groups

# Calls of the policy that fit into `guard.seconds`, or nothing is asked.
LEAST_CALLS = 10


def run_command_line(
    overrides: Sequence[str],
    composed: Mapping[str, Any],
    space: Space,
    compose: Compose,
    swept: bool,
    command: Sequence[str],
) -> int:
    """Run the study that was asked for and print what came of it; returns the exit code."""
    settings = Settings.parse(composed)
    check_not_swept(space)
    space = chosen_starts(space, settings.start)
    if not (swept or settings.space.is_empty()):
        raise UserError("a space is a sweep. Add -m to try its combinations.")
    name = default_study_name(overrides) if settings.study is None else settings.study
    check_study_name(name)
    with _nodes(settings) as nodes:
        machine = cli.this_machine() if nodes is None else nodes.machine
        command = tuple(map(hidden, command))
        request = StudyRequest(name, space, settings, machine, command, swept)
        return _run(request, compose, nodes)


@contextlib.contextmanager
def _nodes(settings: Settings) -> Iterator[Nodes | None]:
    """The nodes of the engine, asked; a dry run starts nothing, so it counts for this host."""
    kind, cpu_slots = settings.executor.kind, settings.devices.cpu_slots
    if kind != "local" and settings.dry_run is not None:
        print(f"counted for this host: executor={kind} was not asked", file=sys.stderr)
    if kind == "local" or settings.dry_run is not None:
        yield None
        return
    with connected(settings.executor, cpu_slots) as engine:
        assert engine is not None  # local was left above
        yield Nodes.ask(engine, Store.open(settings.store), Lines(), cpu_slots)


def _run(request: StudyRequest, compose: Compose, nodes: Nodes | None) -> int:
    settings, space, machine = request.settings, request.space, request.machine
    allow_lossy = settings.objective.allow_lossy
    if space.sensible_only or settings.dry_run is not None:
        Points(space, compose, machine).check()
        space, found = prepare(space, compose, machine, allow_lossy)
        request = replace(request, space=space)
        if settings.dry_run is not None:
            points = Points(space, compose, machine, allow_lossy)
            return print_dry_run(request, points, found, settings.dry_run)
        require_some(space, found)
    # Ray prints what happened to its workers; stdout is for the result.
    shown = Live() if sys.stderr.isatty() else Lines()
    with shown as display, contextlib.redirect_stdout(sys.stderr):
        outcome = run_study(request, compose, display, nodes=nodes)
    print_outcome(outcome, request.swept, allow_lossy)
    if nodes is None and (outcome.new or not _power_file(outcome).exists()):
        ask_guard(outcome, Devices(settings.devices, machine))
    return outcome.exit_code


def ask_guard(outcome: StudyOutcome, devices: Devices) -> None:
    """Print and keep what the guard of the trials on a CPU sees, once for each context.

    A process of its own asks mistakes made on purpose for `guard.seconds`; what it found is in the
    store, where later trials find it, and in the study's `guard.json`. Contexts of which that many
    seconds would show next to nothing are named with the command that measures them. Where another
    sweep measures on these cores it is left for the same command later.
    """
    results = [record.result for record in outcome.points]
    found = {}
    for key, ok in {ok.context_hash: ok for ok in results if isinstance(ok, Ok)}.items():
        cfg = Config.load(ok.config)
        seconds, power = cfg.guard.seconds, ok.guard.power
        whole = power is not None and power.asked == power.known
        if whole or cfg.device != "cpu" or seconds == 0 or ok.guard.structure is None:
            continue
        if ok.latency.mean_ms > seconds * 1e3 / LEAST_CALLS:
            print("guard: a call is too slow to ask what it sees here; `python -m openpi_opt.guard "
                  f"model={cfg.model.name} ...` measures it")  # fmt: skip
            continue
        taken = [lease(slot) for slot in devices.slots("cpu")]
        with contextlib.ExitStack() as leased:
            for held in filter(None, taken):
                leased.enter_context(contextlib.closing(held))
            if None in taken:
                print("guard: another measures on these cores, so the same command asks later what "
                      "the guard sees")  # fmt: skip
                break
            print(f"guard: mistakes are made on purpose for {seconds:g} s (guard.seconds=0 makes "
                  "none)", file=sys.stderr)  # fmt: skip
            command = [sys.executable, "-m", "openpi_opt.guard", "--config", json.dumps(ok.config)]
            command += ["--store", str(outcome.store.path), "--seconds", str(seconds)]
            env = child_environment(cfg, devices.machine)
            done = subprocess.run(command, env=env, capture_output=True, text=True)
        if done.returncode != 0:
            lines = done.stderr.strip().splitlines() or [f"exit code {done.returncode}"]
            why = " ".join(lines[-1:] if lines[0].startswith("Traceback") else lines[-3:])
            print(f"guard: what it sees could not be measured: {why}\n"
                  "  the same command tries again; guard.seconds=0 does not ask")  # fmt: skip
            continue
        found[key] = GuardPower.model_validate_json(done.stdout)
        print(margin(found[key]))
    if found:
        said = {key: power.model_dump(mode="json") for key, power in found.items()}
        write_atomic(_power_file(outcome), json.dumps(said))


def _power_file(outcome: StudyOutcome) -> Path:
    return outcome.store.study_dir(outcome.name) / "guard.json"


def print_outcome(outcome: StudyOutcome, swept: bool, allow_lossy: bool = False) -> None:
    """The table, the best of each context, and what to type next.

    With `allow_lossy`, lossy trials compete for the best.
    """
    ok = sum(isinstance(record.result, Ok) for record in outcome.points)
    new = f", {outcome.new} new" if len(outcome.records) > outcome.new else ""
    counted = f"{ok} of {len(outcome.points)} configurations ok{new}"
    print(f"study {outcome.name}: {counted}; {outcome.ended}")
    criteria = outcome.criteria.allowing(allow_lossy)
    found = groups(outcome.records, criteria=criteria, kept=outcome.kept)
    print_groups(found)
    for line in outcome.left_out:
        print(f"left out: {line}")
    best = [row for group in found for row in _winners(group)]
    if not best and any(criteria.over(record.result) for record in outcome.records):
        print(f"best: none, nothing that may win keeps the limits ({criteria.limits_text()})")
    for line in outcome.remarks:
        print(line)
    if outcome.exit_code:
        _print_reasons(outcome)
    path = outcome.store.path
    flags = "" if path == Path(DEFAULT_STORE).absolute() else f" --store {path}"
    flags += " --allow-lossy" if allow_lossy else ""
    print("next:")
    print(f"  python -m openpi_opt.compare {outcome.name}{flags}")
    if swept and any(row.record.role != "baseline" for row in best):
        print(f"  python -m openpi_opt.promote {outcome.name}{flags} --name NAME")
    print(f"  {where(outcome.store.study_dir(outcome.name))}")


def _winners(group: Group) -> list[Row]:
    """Print the best of a context, or its Pareto set, the fastest first; returns them."""
    criteria, best = group.criteria, [row for row in group.rows if row.best]
    for row in best:
        assert row.ok is not None
        latency = row.ok.latency
        others = [figure for figure in criteria.figures() if figure.key != "mean_ms"]
        figures = ", ".join([
            f"{latency.mean_ms:.3f} ± {latency.std_ms:.3f} ms",
            *(f"{figure.name} {figure.text(figure.value(row.ok))}" for figure in others),
        ])  # fmt: skip
        line = f"trial {row.record.number} ({whole(row, group)}), {figures}"
        if row.record.role == "baseline":
            print(f"best: the baseline, {line}; nothing that was tried is faster")
        else:
            print(f"best: {line}{_gain(row)}")
    front = sorted((row for row in group.rows if row.pareto), key=mean_ms)
    if front:
        ok = sum(row.ok is not None for row in group.rows)
        print(f"Pareto set of {criteria.objectives_text()}: {len(front)} of {ok} ok trials")
    for row in front:
        values = criteria.values(row.record.result)
        assert values is not None
        texts = (f.text(value) for f, value in zip(criteria.figures(), values, strict=True))
        trial = f"trial {row.record.number} ({whole(row, group)})"
        print(f"  {trial}: {', '.join(texts)}{_gain(row)}")
    return best + front


def _gain(row: Row) -> str:
    return f", {row.vs_baseline:.2f}x the baseline's speed" if row.vs_baseline else ""


def _print_reasons(outcome: StudyOutcome) -> None:
    print("no configuration was ok:")
    for record in outcome.points:
        first = (reason(record).splitlines() or [""])[0]
        print(f"  trial {record.number} {record.result.outcome}: {first}")
        if record.trial_dir:
            print(f"    log: {outcome.store.study_dir(outcome.name) / record.trial_dir}/log.txt")
