"""Ladders and ablations with real knobs, the trial's process replaced by a function."""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from search_samples import FakeRun, failed, ok

from openpi_opt import ablate, ladder
from openpi_opt.config import Config
from openpi_opt.confirm.fresh import FreshRuns
from openpi_opt.confirm.judge import Confirmed, Subject
from openpi_opt.confirm.steps import NO_EFFECT, Target
from openpi_opt.errors import UserError
from openpi_opt.knobs import BY_NAME
from openpi_opt.knobs.base import Options
from openpi_opt.machine import Gpu, Machine, TorchBuild
from openpi_opt.process.devices import LEASES_VARIABLE
from openpi_opt.process.run import refused
from openpi_opt.result import TrialResult
from openpi_opt.session import Session, target_session
from openpi_opt.track.journal import Journal
from openpi_opt.track.store import Store

H100 = Machine(
    (Gpu(0, "GPU-1", "H100", "nvidia", "sm90", 80_000, "1"),),
    TorchBuild("2.13.0", "13.0", None),
    "x",
    cores=2,
    memory_mib=8000,
)
# The expert layer needs two other knobs.
EXPERT = {
    "fusion": {"qkv": True, "gate_up": True, "vision_qkv": True, "expert_layer": True},
    "attention": {"vision": "triton", "prefill": "triton", "denoise": "triton"},
    "gemm": {"backend": "triton_skinny"},
    "simplify": {"last_layer": True},
}
NEEDED = frozenset({"fusion", "attention", "gemm"})


def target(raw: dict, machine: Machine = H100) -> Target:
    cfg = Config.parse({"model": {"name": "pi0_mini"}, **raw}).resolved(machine)

    def refuse(tried: Config) -> str | None:
        found = refused(tried, machine)
        return found and found.reason

    return Target(cfg, refuse)


def test_the_whole_set_is_the_target_and_the_empty_one_the_baseline() -> None:
    found = target(EXPERT)
    assert set(found.knobs) == {"fusion", "attention", "gemm", "simplify"}
    assert found.having(found.knobs).hash() == found.config.hash()
    assert found.having([]).is_baseline()


def test_a_knob_that_needs_others_is_added_together_with_them() -> None:
    moves = target(EXPERT).additions(frozenset())
    assert set(moves.sets) == {
        NEEDED,
        *(frozenset({name}) for name in ("attention", "gemm", "simplify")),
    }
    assert list(moves.refused) == ["fusion"]
    assert "expert_layer" in moves.refused["fusion"]
    later = target(EXPERT).additions(frozenset({"attention", "gemm"}))
    assert set(later.sets) == {frozenset({"fusion"}), frozenset({"simplify"})}
    assert later.refused == {}


def test_what_others_need_is_taken_away_together_with_them() -> None:
    moves = target(EXPERT).removals()
    assert set(moves.sets) == {
        frozenset({"fusion"}),
        frozenset({"fusion", "attention"}),
        frozenset({"fusion", "gemm"}),
        frozenset({"simplify"}),
    }
    assert set(moves.refused) == {"attention", "gemm"}


def test_a_knob_without_effect_alone_waits_for_what_gives_it_one(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    knob = BY_NAME["gemm"]

    def needs_simplify(cfg: Config) -> Options:
        live = cfg.knobs["simplify"] != cfg.baseline().knobs["simplify"]
        return cfg.knobs["gemm"] if live else knob.options_type()

    monkeypatch.setattr(knob, "canonical", needs_simplify)
    found = target({name: EXPERT[name] for name in ("gemm", "simplify")})
    moves = found.additions(frozenset())
    assert set(moves.sets) == {frozenset({"gemm", "simplify"}), frozenset({"simplify"})}
    assert moves.refused == {"gemm": NO_EFFECT}
    assert found.additions(frozenset({"simplify"})).sets == [frozenset({"gemm"})]
    assert frozenset({"simplify"}) in found.removals().sets


@settings(max_examples=30, deadline=None)
@given(st.sets(st.sampled_from(sorted(EXPERT)), min_size=1))
def test_every_way_of_greedy_choices_ends_at_the_target(names: set[str]) -> None:
    found = target({name: EXPERT[name] for name in names})
    if found.refuse(found.config) is not None:
        return
    have: frozenset[str] = frozenset()
    while moves := found.additions(have).sets:
        assert all(found.refuse(found.having(have | group)) is None for group in moves)
        have |= moves[-1]
    assert found.having(have).hash() == found.config.hash()


SPEEDS = {"attention": 0.8, "gemm": 0.9, "fusion": 0.95, "simplify": 0.99}


def speed(cfg: Config, number: int = 0) -> TrialResult:
    mean = 20.0
    for name, factor in SPEEDS.items():
        if cfg.knobs[name] != cfg.baseline().knobs[name]:
            mean *= factor
    return ok(cfg, mean * float(np.exp(0.001 * np.sin(7.0 * number))))


@pytest.fixture(autouse=True)
def _leases(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(LEASES_VARIABLE, str(tmp_path / "leases"))


class Sessions:
    def __init__(self, folder: Path, verb: str):
        self.store, self.verb, self.said = Store.open(folder), verb, list[str]()
        self.calls = 0
        self.open = ExitStack()

    def __call__(
        self, judge: Callable[[Config], TrialResult] | None = None, raw: dict = EXPERT
    ) -> tuple[Session, FakeRun]:
        def counted(cfg: Config) -> TrialResult:
            self.calls += 1
            return speed(cfg, self.calls)

        run = FakeRun(judge or counted)
        journal = Journal.open(self.store.study_dir("s"))
        runs = FreshRuns(self.store, journal, None, H100, self.said.append, run)
        folder = self.store.path / "out"
        self.open.close()  # an earlier session has ended
        self.open.enter_context(runs.alone(target(raw).config))
        return Session(self.verb, target(raw).config, runs, folder, seed=0, rounds=6), run


def test_the_ladder_takes_the_largest_gain_first_and_reaches_the_target(tmp_path: Path) -> None:
    found, run = Sessions(tmp_path, "ladder")()
    way = ladder.climb(found, screening=1)
    assert way.additions == [NEEDED, frozenset({"simplify"})], "together they gain most"
    chosen = len(run.ran)
    document = ladder.report(found, way, ladder.measure(found, way)).document
    assert len(run.ran) - chosen == 6 * 3, "no rung rests on a process that chose the way"
    plain, first, last = document["rungs"]
    assert (plain["added"], plain["step"]) == ("baseline", None)
    assert first["step"]["mean"] == pytest.approx(1 - 0.8 * 0.9 * 0.95, abs=0.002)
    assert last["config_hash"] == found.target.config.hash()
    assert last["total"]["mean"] == pytest.approx(1 - 0.8 * 0.9 * 0.95 * 0.99, abs=0.002)
    assert {rung["step"]["verdict"] for rung in (first, last)} == {"faster"}


def test_a_step_that_crashes_alone_is_tried_again_with_more_and_listed(tmp_path: Path) -> None:
    def crashing(cfg: Config) -> TrialResult:
        alone = cfg.knobs["attention"] != cfg.baseline().knobs["attention"]
        with_gemm = cfg.knobs["gemm"] != cfg.baseline().knobs["gemm"]
        return failed(cfg) if alone and not with_gemm else speed(cfg)

    raw = {name: EXPERT[name] for name in ("attention", "gemm", "simplify")}
    found, _ = Sessions(tmp_path, "ladder")(crashing, raw)
    way = ladder.climb(found, screening=1)
    assert [sorted(names) for names in way.additions] == [["gemm"], ["attention"], ["simplify"]]
    assert any("crashed: because" in reason for reason in way.remarks.values())


def test_an_interrupted_ladder_goes_on_with_what_is_finished(tmp_path: Path) -> None:
    sessions = Sessions(tmp_path, "ladder")
    left = [9]

    def interrupted(cfg: Config) -> TrialResult:
        if left[0] == 0:
            raise KeyboardInterrupt
        left[0] -= 1
        return speed(cfg, left[0])

    found, _ = sessions(interrupted)
    with pytest.raises(KeyboardInterrupt):
        ladder.measure(found, ladder.climb(found, 1))
    found, second = sessions()
    result = ladder.measure(found, ladder.climb(found, 1))
    found, third = sessions()
    again = ladder.measure(found, ladder.climb(found, 1))
    assert [again.means(rung) for rung in again.whole] == [result.means(r) for r in result.whole]
    assert third.ran == []
    assert len(second.ran) + 9 == len(found.runs.journal.records())


def test_the_ablation_tells_what_each_knob_is_worth(tmp_path: Path) -> None:
    found, run = Sessions(tmp_path, "ablate")()
    document = ablate.report(found, ablate.measure(found)).document
    assert len(run.ran) == 6 * 5
    losses = document["without"]
    assert {loss["verdict"] for loss in losses} == {"helps"}
    by_knobs = {frozenset(re.findall(r"(\w+)=", loss["knobs"])): loss for loss in losses}
    alone = by_knobs[frozenset({"fusion"})]
    assert alone["added"] == pytest.approx(1 / 0.95 - 1, abs=0.002)
    low, high = alone["ci95"]
    assert 0 < low < alone["added"] < high < 0.06
    both = by_knobs[frozenset({"fusion", "attention"})]
    assert both["added"] == pytest.approx(1 / (0.95 * 0.8) - 1, abs=0.002)
    assert losses[0] is both, "the largest first"
    assert set(document["remarks"]) == {"attention", "gemm"}


def test_a_variant_that_fails_is_listed_and_the_others_measured(tmp_path: Path) -> None:
    def crashing(cfg: Config) -> TrialResult:
        plain = cfg.knobs["simplify"] == cfg.baseline().knobs["simplify"]
        return failed(cfg) if plain else speed(cfg)

    found, _ = Sessions(tmp_path, "ablate")(crashing)
    document = ablate.report(found, ablate.measure(found)).document
    assert list(document["failed"].values()) == ["crashed: because"]
    assert len(document["without"]) == 3
    with pytest.raises(UserError, match="all knobs ended crashed"):
        ablate.measure(Sessions(tmp_path / "b", "ablate")(failed)[0])


def test_documents_tables_and_plots_say_the_same(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    means = iter(np.linspace(20.0, 21.0, 999).tolist())
    found, _ = Sessions(tmp_path, "ladder")(lambda cfg: ok(cfg, next(means), ["drift"]))
    way = ladder.climb(found, 1)
    report = ladder.report(found, way, ladder.measure(found, way))
    found.write(report)
    rows = report.text
    assert capsys.readouterr().out == rows == (tmp_path / "out" / "ladder.md").read_text()
    document = json.loads((tmp_path / "out" / "ladder.json").read_text())
    assert len(document["rungs"]) == 1 + len(way.additions)
    of = 6 * len(document["rungs"])
    assert f"- flagged drift: {of} of {of} processes" in rows, "of those that are judged alone"
    for rung in document["rungs"]:
        assert f"{rung['mean_ms']:.3f}" in rows
    assert document["machine"]["gpu"] == "H100"
    assert "- fusion alone: " in rows
    assert (tmp_path / "out" / "ladder.png").read_bytes().startswith(b"\x89PNG")


def test_no_interval_of_a_latency_goes_below_zero() -> None:
    low, high = Confirmed(Subject("x"), [10.0, 11.0, 200.0]).ci95_ms()
    assert low == 0
    assert high > 200


@pytest.mark.parametrize(
    ("what", "words"),
    [
        (["nowhere"], "does not exist"),
        (["model=pi0_mini", "platform=cpu"], "is the baseline itself"),
        (["graph=manual", "platform=cpu", "model=pi0_mini"], "cannot run here"),
        (["preset=no_such"], "no_such"),
        (["preset=h100", "preset=h100"], "2 presets"),
    ],
)
def test_targets_that_are_none_are_refused(tmp_path: Path, what: list[str], words: str) -> None:
    store = str(tmp_path / "absent")
    found = argparse.Namespace(
        what=what,
        store=store,
        preset_dir=None,
        allow_lossy=False,
        mlflow=False,
        out=None,
        seed=0,
        rounds=3,
    )
    with pytest.raises(UserError, match=words):
        target_session("ladder", found)
