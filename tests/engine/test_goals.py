"""Several objectives and limits in a study, with the trial's process replaced by a function."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hosts import optuna_study
from search_samples import CPU, failed, ok, pruned
from space_samples import command_lines
from sweep_samples import Sweeps
from sweep_samples import compose as plain_compose

from openpi_opt.config import Config
from openpi_opt.criteria import Criteria
from openpi_opt.engine.plan import goals, space_hash
from openpi_opt.errors import UserError
from openpi_opt.result import Memory, Ok, TrialResult
from openpi_opt.space import optimizer as module
from openpi_opt.space.optimizer import Optimizer, Proposal
from openpi_opt.space.settings import Objective, Settings, default_study_name
from openpi_opt.space.space import Space
from openpi_opt.sweep import spelled_out
from openpi_opt.track.report import rows
from openpi_opt.vendor import cpu

# One context, so that all are compared; the first is the baseline's configuration.
SIX = ("attention.vision=eager,sdpa,math", "attention.prefill=eager,sdpa")
BOTH = ["latency", "memory"]
# By number; 0, 2 and 4 are the Pareto set, 1 and 3 are dominated, 5 equals 4 in one and is worse.
FIGURES = [(10.0, 900.0), (12.0, 950.0), (15.0, 600.0), (16.0, 601.0), (30.0, 100.0), (31.0, 100.0)]


def sized(cfg: Config, mean_ms: float, peak_mib: float) -> Ok:
    memory = Memory(peak_mib=peak_mib, device_peak_mib=None, host_peak_mib=peak_mib)
    return ok(cfg, mean_ms).model_copy(update={"memory": memory})


def number(cfg: Config) -> int:
    """Which of the six it is."""
    attention = cfg.knobs["attention"].model_dump()
    vision = ["eager", "sdpa", "math"].index(attention["vision"])
    return 2 * vision + ["eager", "sdpa"].index(attention["prefill"])


def trade(cfg: Config) -> TrialResult:
    return sized(cfg, *FIGURES[number(cfg)])


@pytest.fixture
def sweep(tmp_path: Path) -> Sweeps:
    return Sweeps(tmp_path / "store")


def front(sweep: Sweeps, criteria: Criteria) -> list[int]:
    found = rows(sweep.journal, criteria=criteria)
    return [number(Config.load(row.record.result.config)) for row in found if row.pareto]


def best(sweep: Sweeps, criteria: Criteria) -> list[int]:
    found = rows(sweep.journal, criteria=criteria)
    return [number(Config.load(row.record.result.config)) for row in found if row.best]


@pytest.mark.parametrize("sampler", ["grid", "tpe", "random", "gp"])
def test_a_study_of_two_objectives_finds_their_pareto_set(sweep: Sweeps, sampler: str) -> None:
    outcome, run = sweep(
        *SIX,
        judge=trade,
        objective={"minimize": ["memory", "latency"]},
        sampler=sampler,
        baseline=False,
    )
    assert outcome.criteria.objectives == ("latency", "memory")
    assert len(run.ran) == 6
    assert sorted(front(sweep, outcome.criteria)) == [0, 2, 4]
    assert best(sweep, outcome.criteria) == [], "there is no single best one"
    study = optuna_study(sweep.folder, "study")
    assert len(study.directions) == 2
    found = sorted({tuple(trial.values) for trial in study.best_trials})  # samplers repeat
    assert found == FIGURES[::2]
    study_dir = sweep.folder / "studies" / "study"
    (context,) = json.loads((study_dir / "pareto.json").read_text())["contexts"]
    assert [each["objectives"] for each in context["pareto"]] == [
        {"latency": latency, "memory": memory} for latency, memory in FIGURES[::2]
    ]
    assert (study_dir / "pareto.png").read_bytes().startswith(b"\x89PNG")


def test_the_same_again_measures_nothing_and_other_objectives_are_refused(sweep: Sweeps) -> None:
    sweep(*SIX, judge=trade, objective={"minimize": BOTH}, baseline=False)
    outcome, run = sweep(*SIX, judge=trade, objective={"minimize": BOTH}, baseline=False)
    assert (run.ran, outcome.new, len(outcome.points)) == ([], 0, 6)
    files = {path: path.stat().st_mtime_ns for path in sweep.folder.rglob("*") if path.is_file()}
    for other in (["latency"], ["latency", "guard"]):
        with pytest.raises(UserError) as caught:
            sweep(*SIX, judge=trade, objective={"minimize": other}, baseline=False)
        assert "objective=[latency,memory]" in str(caught.value)
        assert f"objective=[{','.join(other)}]" in str(caught.value)
    after = {path: path.stat().st_mtime_ns for path in sweep.folder.rglob("*") if path.is_file()}
    assert after == files, "refused before anything is touched"


def test_a_study_of_the_latency_alone_is_not_continued_with_more(sweep: Sweeps) -> None:
    sweep(*SIX, judge=trade, baseline=False)
    assert not (sweep.folder / "studies" / "study" / "criteria.json").exists()
    with pytest.raises(UserError, match=r"begun with objective=\[latency\]"):
        sweep(*SIX, judge=trade, objective={"minimize": BOTH}, baseline=False)


def test_limits_judge_what_is_known_anew(sweep: Sweeps) -> None:
    outcome, _ = sweep(*SIX, judge=trade, baseline=False)
    assert best(sweep, outcome.criteria) == [0]
    for limits, wins in (
        (["limits.peak_mib=800"], [2]),
        (["limits.peak_mib=100"], [4]),
        (["limits.peak_mib=99"], []),
        (["limits.peak_mib=800", "limits.latency_ms=14"], []),
        ([], [0]),
    ):
        outcome, run = sweep(*SIX, *limits, judge=trade, baseline=False)
        assert run.ran == [], "limits are no part of what is measured"
        assert len(outcome.points) == 6
        assert best(sweep, outcome.criteria) == wins
        assert any("judged anew" in note for note in sweep.screen.notes)
        known = Criteria.load(sweep.folder / "studies" / "study")
        assert known == outcome.criteria


def test_optuna_is_told_by_how_much_a_limit_is_violated() -> None:
    space = Space.parse(SIX)
    optimizer = Optimizer(space, "tpe", 0, Criteria(limits={"peak_mib": 600.0}))
    for point in space.all():
        cfg = plain_compose([f"{key}={text}" for key, text in point.items()])
        optimizer.tell(Proposal(point), trade(cfg))
    told = [trial.constraints for trial in optimizer.trials]
    assert told == [
        {"lossy": -1.0, "peak_mib": pytest.approx(peak / 600 - 1)} for _, peak in FIGURES
    ]


def test_what_several_objectives_have_seen_is_bounded_and_keeps_the_pareto_set(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in (("MOST_SEEN", 12), ("_FASTEST_SEEN", 6), ("_SLACK", 2)):
        monkeypatch.setattr(module, name, value)
    space = Space.parse(["weights.seed=range(0,1000)"])
    criteria = Criteria(objectives=("latency", "memory"), limits={"peak_mib": 950.0})
    optimizer = Optimizer(space, "tpe", 0, criteria)
    waiting = optimizer.ask()
    figures = [(1.0, 999.0), (5.0, 100.0), (3.0, 300.0), *((50.0 + n, 500.0) for n in range(30))]
    for seed, (latency, memory) in enumerate(figures):
        cfg = Config.parse({"weights": {"seed": seed}})
        result = failed(cfg) if seed == 7 else sized(cfg, latency, memory)
        optimizer.tell(Proposal({"weights.seed": str(seed)}), result)
    seen = [trial for trial in optimizer.trials if trial.values]
    assert len(optimizer.trials) <= 12 + 2 + 1
    assert {(5.0, 100.0), (3.0, 300.0)} <= {tuple(trial.values) for trial in seen}
    optimizer.tell(waiting, sized(Config.parse({"weights": {"seed": 999}}), 2.0, 200.0))
    assert optimizer.ask().params


def test_pruning_is_off_with_a_reason(sweep: Sweeps) -> None:
    _, run = sweep(*SIX, judge=trade, objective={"minimize": BOTH}, pruning=1, baseline=False)
    assert [cfg.limits.latency_ms for cfg in run.ran] == [None] * 6
    (note,) = [note for note in sweep.screen.notes if note.startswith("pruning=1 is off")]
    assert "latency and memory" in note


def test_what_is_over_a_limit_prunes_nobody(sweep: Sweeps) -> None:
    _, run = sweep(*SIX, "limits.peak_mib=800", judge=trade, pruning=1, baseline=False)
    # The first two are faster than all others, and never the best.
    assert [cfg.limits.latency_ms for cfg in run.ran] == [None, None, None, 15.0, 15.0, 15.0]


def test_a_limit_that_ended_a_trial_answers_for_lower_ones_only(sweep: Sweeps) -> None:
    def slow(cfg: Config) -> TrialResult:
        limit = cfg.limits.latency_ms
        return pruned(cfg, 30.0) if limit is not None and limit < 29.0 else ok(cfg, 30.0)

    def swept(*limits: str) -> tuple[str, int]:
        outcome, run = sweep("weights.seed=0", *limits, judge=slow, baseline=False)
        return outcome.points[0].result.outcome, len(run.ran)

    assert swept("limits.latency_ms=20") == ("pruned", 1)
    assert swept("limits.latency_ms=20") == ("pruned", 0)
    assert swept("limits.latency_ms=10") == ("pruned", 0)
    assert swept("limits.latency_ms=100") == ("ok", 1)
    assert swept("limits.latency_ms=20") == ("ok", 0)
    assert swept() == ("ok", 0)


def test_limits_that_differ_from_point_to_point_are_left_out(sweep: Sweeps) -> None:
    def own_limits(overrides: list[str]) -> Config:
        cfg = plain_compose(overrides)
        limits = cfg.limits.model_copy(update={"peak_mib": 5.0 if number(cfg) == 3 else None})
        return cfg.model_copy(update={"limits": limits})

    outcome, run = sweep(*SIX, judge=trade, compose=own_limits, baseline=False)
    assert [number(cfg) for cfg in run.ran] == [0, 1, 2, 4, 5]
    assert any("limits.peak_mib=5.0 here" in note for note in sweep.screen.notes)
    assert len(outcome.points) == 5


def rapl(folder: Path) -> Path:
    zone = folder / "intel-rapl:0"
    zone.mkdir(parents=True)
    for name, text in (
        ("name", "package-0"),
        ("energy_uj", "1000"),
        ("max_energy_range_uj", "262143328850"),
    ):
        (zone / name).write_text(text)
    return folder


def test_energy_is_refused_before_anything_starts_where_it_is_not_told(
    sweep: Sweeps, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cpu, "POWERCAP", tmp_path / "none")
    with pytest.raises(UserError, match=r"objective=\[latency,energy\]: .* no RAPL counters"):
        sweep(
            *SIX, "platform.device=cpu", judge=trade, objective={"minimize": ["latency", "energy"]}
        )
    assert not sweep.folder.exists()


def test_energy_as_an_objective_where_it_is_told(
    sweep: Sweeps, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cpu, "POWERCAP", rapl(tmp_path / "powercap"))
    energy = Objective(minimize=("latency", "energy"))
    first = Config.parse({"platform": {"device": "cpu"}})
    assert goals(energy, first, CPU).objectives == ("latency", "energy")
    without = Config.parse({"platform": {"device": "cpu"}, "profile": {"energy": False}})
    with pytest.raises(UserError, match=r"profile\.energy=false"):
        goals(energy, without, CPU)
    outcome, _ = sweep(
        *SIX, judge=trade, objective={"minimize": ["latency", "energy"]}, baseline=False
    )
    assert {t.state.name for t in sweep.optuna()} == {"PRUNED"}, "the stub's trials have none"
    assert front(sweep, outcome.criteria) == []


def test_the_same_objectives_are_one_search_however_they_are_written() -> None:
    space = Space.parse(SIX)
    written = [
        Space.parse([*SIX, f"{key}={value}"])
        for key in ("objective", "objective.minimize")
        for value in ("[latency,memory]", "[memory,latency]")
    ]
    assert len({space_hash(each, "x", ("latency", "memory")) for each in [space, *written]}) == 1
    assert space_hash(space, "x") != space_hash(space, "x", ("latency", "memory"))
    default = Space.parse([*SIX, "objective.minimize=[latency]", "limits.peak_mib=5"])
    assert space_hash(space, "x") == space_hash(default, "x")
    names = {
        default_study_name([*SIX, f"objective.minimize={v}"])
        for v in ("[latency,memory]", "[memory,latency]")
    }
    assert len(names) == 1
    assert names != {default_study_name(SIX)}


def test_the_command_line_takes_the_short_spelling() -> None:
    assert spelled_out("objective=[latency,memory]") == "objective.minimize=[latency,memory]"
    assert spelled_out("objective=latency") == "objective.minimize=[latency]"
    for word in ("objective=latency,memory", "objective.allow_lossy=true", "objective={a:1}"):
        assert spelled_out(word) == word
    _, compose = command_lines()("objective.minimize=[latency,memory]", "limits.rel_l2=0.01")
    assert compose([]).limits.rel_l2 is None
    with pytest.raises(UserError, match=r"minimize\.1=speed: unknown, use one of latency"):
        Settings.parse({"objective": {"minimize": ["latency", "speed"]}})
    with pytest.raises(UserError, match=r"latency \(or .*\) must be among the objectives"):
        Settings.parse({"objective": {"minimize": ["memory"]}})
