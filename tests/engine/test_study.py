"""The engine, with the trial's process replaced by a function."""

from __future__ import annotations

import json
import re
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from search_samples import FakeRun, failed, pruned
from sweep_samples import Sweeps, by_seed

from openpi_opt.config import Config
from openpi_opt.engine import study as engine
from openpi_opt.engine.study import StudyOutcome
from openpi_opt.errors import UserError
from openpi_opt.result import TrialResult
from openpi_opt.space import sources
from openpi_opt.track.journal import Journal, Record


@pytest.fixture
def sweep(tmp_path: Path) -> Sweeps:
    return Sweeps(tmp_path / "store")


def seeds(run: FakeRun) -> list[int]:
    return [cfg.weights.seed for cfg in run.ran]


def test_every_combination_in_order_after_its_baseline(sweep: Sweeps) -> None:
    outcome, run = sweep("attention=aiter,sdpa")
    assert [(r.role, r.params, r.result.outcome) for r in outcome.records] == [
        ("baseline", {}, "ok"),
        ("trial", {"attention": "aiter"}, "unavailable"),
        ("trial", {"attention": "sdpa"}, "ok"),
    ]
    assert [cfg.labels()["attention"] for cfg in run.ran] == ["eager", "sdpa"]
    assert outcome.points[0].trial_dir is None, "what is refused has no process"
    assert outcome.exit_code == 0
    assert [t.state.name for t in sweep.optuna()] == ["PRUNED", "COMPLETE"]
    assert [t.params["attention"] for t in sweep.optuna()] == ["aiter", "sdpa"]


def test_the_baseline_alone_is_no_success(sweep: Sweeps) -> None:
    outcome, _ = sweep("attention=aiter,sdpa", judge=lambda cfg: failed(cfg))
    assert outcome.exit_code == 1
    outcome, _ = sweep("compile=default", judge=by_seed)
    assert [r.role for r in outcome.baselines] == ["baseline"]


def test_a_swept_baseline_is_the_baseline_and_counts(sweep: Sweeps) -> None:
    outcome, run = sweep("attention=eager,sdpa")
    assert len(run.ran) == 2
    assert [record.role for record in outcome.records] == ["baseline", "trial"]
    assert len(outcome.points) == 2
    assert [trial.params["attention"] for trial in sweep.optuna()] == ["eager", "sdpa"]


def test_a_report_that_fails_changes_nothing(
    sweep: Sweeps, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(studies: object) -> str:
        raise RuntimeError("no plotly\nhere")

    monkeypatch.setattr("openpi_opt.track.html_report.html", fails)
    outcome, _ = sweep("attention=eager,sdpa")
    assert outcome.exit_code == 0
    said = sweep.screen.notes[-1]
    assert said.startswith("no report: RuntimeError: no plotly here; python -m openpi_opt.report /")


def test_each_context_has_a_baseline_before_its_first_trial(sweep: Sweeps) -> None:
    _, run = sweep("workload.seed=0,1", "attention=sdpa,eager")
    ran = [(cfg.workload.seed, cfg.labels()["attention"]) for cfg in run.ran]
    assert ran == [(0, "eager"), (0, "sdpa"), (1, "eager"), (1, "sdpa")]


def test_without_a_sweep_there_is_one_trial_and_no_baseline(sweep: Sweeps) -> None:
    outcome, run = sweep("attention=sdpa", swept=False)
    assert [record.role for record in outcome.records] == ["trial"]
    assert len(run.ran) == 1
    _, again = sweep("attention=sdpa", swept=False)
    assert again.ran == []


def test_the_journal_answers_for_another_space_of_the_study(sweep: Sweeps) -> None:
    sweep("weights.seed=0,1")
    outcome, run = sweep("weights.seed=1,2,0", baseline=False)
    assert seeds(run) == [2]
    assert [record.result.config["weights"]["seed"] for record in outcome.points] == [0, 1, 2]


def test_a_failure_is_a_result_and_is_not_repeated(sweep: Sweeps) -> None:
    sweep("weights.seed=0,1", "compile=default", judge=failed)
    _, run = sweep("weights.seed=0,1", "compile=default")
    assert run.ran == []


def test_n_trials_counts_different_configurations(sweep: Sweeps) -> None:
    _, run = sweep("weights.seed=range(0,100)", n_trials=7, baseline=False)
    assert len(set(seeds(run))) == 7
    outcome, run = sweep("weights.seed=range(0,100)", n_trials=9, baseline=False)
    assert len(run.ran) == 2
    assert len(outcome.points) == 9
    outcome, run = sweep("weights.seed=range(0,100)", n_trials=9, baseline=False)
    assert run.ran == []
    assert len(outcome.points) == 9


def test_grid_beyond_n_trials_takes_the_first_and_says_so(sweep: Sweeps) -> None:
    _, run = sweep("weights.seed=range(0,9)", n_trials=3, sampler="grid", baseline=False)
    assert seeds(run) == [0, 1, 2]
    assert "the first 3 in order" in sweep.screen.notes[0]


def test_grid_needs_an_end(sweep: Sweeps) -> None:
    with pytest.raises(UserError, match="sampler=grid"):
        sweep("guard.cap=interval(0.01,0.1)", sampler="grid")
    assert not sweep.folder.exists()


@pytest.mark.parametrize("sampler", ["tpe", "random", "gp"])
def test_a_sampler_ends_when_a_finite_space_is_tried(sweep: Sweeps, sampler: str) -> None:
    outcome, run = sweep("weights.seed=0,1,2", sampler=sampler, baseline=False)
    assert sorted(seeds(run)) == [0, 1, 2]
    assert outcome.ended == "every combination is tried"


def test_a_sampler_that_finds_nothing_new_ends(
    sweep: Sweeps, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All values of the interval are one configuration: the limits are no part of it."""
    monkeypatch.setattr(sources, "MAX_REPEATS", 5)
    outcome, run = sweep("limits.load=interval(100,200)", baseline=False)
    assert len(run.ran) == 1
    assert "seems exhausted" in outcome.ended
    assert len(sweep.screen.ended) == 1


def test_no_trial_begins_after_the_minutes(sweep: Sweeps) -> None:
    outcome, run = sweep("weights.seed=range(0,9)", minutes=1e-9, baseline=False)
    assert (outcome.ended, run.ran) == ("minutes=1e-09 are over", [])


def test_wrong_values_are_found_before_anything_runs(sweep: Sweeps) -> None:
    for bad in ("measure.warmup=5,0", "measure.iterations=range(8,20)", "attention=sdpa,nope"):
        with pytest.raises(UserError):
            sweep(bad)
    assert not sweep.folder.exists()


def test_values_that_contradict_each_other_are_left_out(sweep: Sweeps) -> None:
    outcome, run = sweep(
        "workload.prompt_tokens=20,40", "workload.prompt_slots=20,48", baseline=False
    )
    pairs = [(cfg.workload.prompt_tokens, cfg.workload.prompt_slots) for cfg in run.ran]
    assert pairs == [(20, 20), (20, 48), (40, 48)]
    assert len(outcome.points) == 3
    assert any("left out" in note and "prompt_tokens=40" in note for note in sweep.screen.notes)


def test_the_journal_is_first_and_optuna_second(
    sweep: Sweeps, monkeypatch: pytest.MonkeyPatch
) -> None:
    happened: list[str] = []
    real_append, real_tell = Journal.append, engine.Optimizer.tell

    def append(self: Journal, record: Record) -> Record:
        happened.append("journal")
        return real_append(self, record)

    def tell(self: engine.Optimizer, proposal: object, result: TrialResult) -> None:
        happened.append("optuna")
        real_tell(self, proposal, result)

    monkeypatch.setattr(Journal, "append", append)
    monkeypatch.setattr(engine.Optimizer, "tell", tell)
    sweep("attention=sdpa", baseline=False)
    assert happened == ["journal", "optuna"]


class Killed(BaseException):
    """As little as `kill -9` lets the controller do."""


@pytest.mark.parametrize("where", ["run", "append", "tell"])
def test_a_controller_that_dies_anywhere_repeats_no_finished_trial(
    sweep: Sweeps, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    overrides = ("weights.seed=range(0,60)",)
    arguments = {"n_trials": 6, "baseline": False, "sampler": "random"}
    calls = 0

    def die_at_third(*args: object, **kwargs: object) -> None:
        nonlocal calls
        calls += 1
        if calls == 3:
            raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(engine.Optimizer, "give_up", lambda *args, **kwargs: None)
        real = {"append": Journal.append, "tell": engine.Optimizer.tell}

        def judge(cfg: Config) -> TrialResult:
            if where == "run":
                die_at_third()
            return by_seed(cfg)

        if where != "run":
            owner = Journal if where == "append" else engine.Optimizer

            def dying(*args: object) -> object:
                die_at_third()
                return real[where](*args)  # type: ignore[operator]

            patch.setattr(owner, where, dying)
        with pytest.raises(Killed):
            sweep(*overrides, judge=judge, **arguments)
    finished = len(sweep.journal)
    assert finished == (3 if where == "tell" else 2)
    outcome, run = sweep(*overrides, **arguments)
    assert len(run.ran) == 6 - finished
    assert len({r.result.config_hash for r in sweep.journal}) == len(sweep.journal) == 6
    assert [r.number for r in sweep.journal] == list(range(6))
    assert all(trial.state.is_finished() for trial in sweep.optuna())
    assert len(outcome.points) == 6


@pytest.mark.parametrize("sampler", ["grid", "random"])
def test_sweeps_at_the_same_time_share_a_study(tmp_path: Path, sampler: str) -> None:
    def slow(cfg: Config) -> TrialResult:
        time.sleep(0.02)
        return by_seed(cfg)

    def one(_: int) -> tuple[StudyOutcome, FakeRun]:
        return Sweeps(tmp_path / "store")(
            "weights.seed=range(0,40)",
            judge=slow,
            sampler=sampler,
            n_trials=20,
            baseline=False,
            devices={"cpu_slots": 2},
        )

    with ThreadPoolExecutor(3) as threads:
        found = list(threads.map(one, range(3)))
    ran = sorted(seed for _, run in found for seed in seeds(run))
    assert len(ran) == len(set(ran)) == 20
    records = Sweeps(tmp_path / "store").journal
    assert [record.number for record in records] == list(range(20))
    assert all(len(outcome.points) == 20 for outcome, _ in found)
    assert not list((tmp_path / "store" / "studies" / "study" / "claims").iterdir())
    assert not list((tmp_path / "store" / "studies" / "study" / "controllers").glob("*-*"))


def test_every_slot_is_kept_busy(sweep: Sweeps) -> None:
    """No barrier: while one trial is slow, the other slot goes through all the rest."""
    fast_ones_done = threading.Event()

    def judge(cfg: Config) -> TrialResult:
        if cfg.weights.seed == 0:
            assert fast_ones_done.wait(20)
        if cfg.weights.seed == 9:
            fast_ones_done.set()
        return by_seed(cfg)

    outcome, _ = sweep(
        "weights.seed=range(0,10)", judge=judge, baseline=False, devices={"cpu_slots": 2}
    )
    order = [record.result.config["weights"]["seed"] for record in outcome.points]
    assert order.index(0) >= 8
    assert re.search(
        r"measured in \d+ s: CPU slot 0 \d+%, CPU slot 1 \d+% of the time", sweep.screen.notes[-2]
    )


def test_fresh_measures_anew_and_keeps_the_old(sweep: Sweeps) -> None:
    sweep("weights.seed=0,1", baseline=False)
    outcome, run = sweep("weights.seed=0,1", baseline=False, fresh=True)
    assert seeds(run) == [0, 1]
    assert [record.number for record in outcome.points] == [2, 3]
    assert len(sweep.journal) == 4
    _, run = sweep("weights.seed=0,1", baseline=False)
    assert run.ran == []


def test_a_class_that_fails_three_times_is_left_out(sweep: Sweeps) -> None:
    def judge(cfg: Config) -> TrialResult:
        return failed(cfg) if cfg.labels()["compile"] == "default" else by_seed(cfg)

    arguments = {"judge": judge, "baseline": False}
    outcome, run = sweep("compile=off,default", "weights.seed=range(0,8)", **arguments)
    assert len(run.ran) == 8 + 3
    (line,) = outcome.left_out
    assert "compile=default" in line
    assert "crashed in phase load" in line
    assert "5 more left out" in line
    states = [trial.state.name for trial in sweep.optuna()]  # and none FAIL
    assert (states.count("COMPLETE"), states.count("PRUNED")) == (8, 3)
    again, run = sweep("compile=off,default", "weights.seed=range(0,8)", **arguments)
    assert run.ran == []
    assert again.left_out == outcome.left_out


def test_pruning_gives_trials_a_limit_and_keeps_what_was_seen(sweep: Sweeps) -> None:
    given: list[float | None] = []

    def judge(cfg: Config) -> TrialResult:
        given.append(cfg.limits.latency_ms)
        if cfg.limits.latency_ms is not None and cfg.labels()["compile"] == "default":
            return pruned(cfg, 99.0)
        return by_seed(cfg)

    words = ("attention=eager,sdpa", "compile=off,default")
    outcome, _ = sweep(*words, judge=judge, pruning=2)
    assert given == [None, 20.0, 20.0, 20.0]  # the first is the baseline
    assert [*json.loads((sweep.folder / "studies/study/race.json").read_text()).values()] == [10.0]
    outcomes = [r.result.outcome for r in outcome.points]
    assert outcomes == ["ok", "pruned", "ok", "pruned"]
    seen = [t.intermediate_values for t in sweep.optuna() if t.state.name == "PRUNED"]
    assert seen == [{0: 99.0}] * 2
    _, run = sweep(*words, judge=judge, pruning=2)
    assert run.ran == []
    outcome, run = sweep(*words, judge=judge)  # without pruning: to the end
    assert [cfg.labels()["compile"] for cfg in run.ran] == ["default"] * 2
    assert {r.result.outcome for r in outcome.points} == {"ok"}


def test_a_disk_that_fills_up_ends_the_sweep_with_words(sweep: Sweeps) -> None:
    def full(cfg: Config) -> TrialResult:
        raise OSError(28, "No space left on device")

    with pytest.raises(UserError, match="No space left on device"):
        sweep("attention=sdpa", judge=full)
    _, run = sweep("attention=sdpa")
    assert len(run.ran) == 2


def test_what_is_not_inherited_is_named(sweep: Sweeps, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    sweep("attention=sdpa")
    assert any("TRITON_INTERPRET" in note for note in sweep.screen.notes)


def test_the_start_says_study_store_and_what_auto_became(sweep: Sweeps) -> None:
    sweep("attention=aiter,sdpa")
    first, second, *_ = sweep.screen.notes
    assert all(word in first for word in ("study", str(sweep.folder), "2 combinations", "auto"))
    assert "pi0_mini on cpu" in second


def test_another_machine_measures_anew(sweep: Sweeps, monkeypatch: pytest.MonkeyPatch) -> None:
    here, _ = sweep("attention=sdpa", baseline=False)
    with monkeypatch.context() as patch:
        patch.setattr("openpi_opt.engine.ledger.fingerprint_hash", lambda seen: "0" * 12)
        there, run = sweep("attention=sdpa", baseline=False)
    assert len(run.ran) == 1
    assert len(there.points) == 1
    back, run = sweep("attention=sdpa", baseline=False)
    assert run.ran == []
    assert back.points == here.points != there.points
