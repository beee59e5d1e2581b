"""A study over a named space, and what lossy configurations may do in it."""

from __future__ import annotations

from pathlib import Path

import pytest
from hosts import optuna_study
from search_samples import FakeRun, ok
from space_samples import MACHINES, CommandLines, command_lines

from openpi_opt.config import Config
from openpi_opt.criteria import Criteria
from openpi_opt.engine.display import Display
from openpi_opt.engine.plan import StudyRequest, make_plan, space_hash
from openpi_opt.engine.study import StudyOutcome, run_study
from openpi_opt.result import TrialResult
from openpi_opt.space.points import left_out
from openpi_opt.space.prepare import prepare
from openpi_opt.space.settings import Settings
from openpi_opt.space.space import Space
from openpi_opt.track.report import rows

H100 = MACHINES["h100"]
ON_GPU = ("platform=cuda", "tracking=none", "model=pi0_mini")


@pytest.fixture(scope="module")
def lines() -> CommandLines:
    return command_lines()


class Screen(Display):
    def __init__(self) -> None:
        self.notes: list[str] = []

    def note(self, text: str) -> None:
        self.notes.append(text)


def run(
    lines: CommandLines, store: Path, *words: str, fake: FakeRun, **settings: object
) -> tuple[StudyOutcome, Screen, Space]:
    space, compose = lines(*words, *ON_GPU)
    parsed = Settings.parse({"store": str(store), **settings})
    if space.sensible_only:
        space, _ = prepare(space, compose, H100, parsed.objective.allow_lossy)
    screen = Screen()
    return run_study(StudyRequest("s", space, parsed, H100), compose, screen, fake), screen, space


def simple(cfg: Config) -> TrialResult:
    return ok(cfg, 20.0 - 5 * (cfg.knobs["graph"].mode == "manual"))


def test_a_sampled_space_begins_with_its_starts_and_starts_nothing_senseless(
    lines: CommandLines, tmp_path: Path
) -> None:
    fake = FakeRun(simple)
    outcome, screen, space = run(lines, tmp_path / "store", "space=full", fake=fake, n_trials=12)
    assert all(left_out(cfg, H100, allow_lossy=False) is None for cfg in fake.ran)
    records = [record for record in outcome.records if record.role == "trial"]
    assert [record.params for record in records[: len(space.start)]] == list(space.start.values())
    assert len(records) == len({record.result.config_hash for record in records}) == 12
    assert {record.result.outcome for record in records} == {"ok"}
    assert not [note for note in screen.notes if "left out" in note]
    again, _, _ = run(lines, tmp_path / "store", "space=full", fake=fake, n_trials=12)
    assert again.new == 0
    assert len(fake.ran) == 13


def test_a_small_space_is_enumerated_and_ends(lines: CommandLines, tmp_path: Path) -> None:
    fake = FakeRun(simple)
    four = "aiter,eager,sdpa,triton"
    stages = (f"attention.prefill={four}", f"attention.denoise={four}")
    words = ("space=attention", "compile=off", "attention.vision=eager", *stages)
    outcome, _, space = run(lines, tmp_path / "store", *words, fake=fake)
    assert space.count == len(outcome.points) == 4 * 4 * 2
    assert outcome.ended == "every combination is tried"
    few, _, _ = run(lines, tmp_path / "tpe", *words, fake=fake, sampler="tpe", n_trials=99)
    assert few.ended in ("every combination is tried", "every sensible combination is tried")
    assert len(few.points) == 32


def test_a_space_with_few_sensible_points_is_enumerated(lines: CommandLines) -> None:
    space, compose = lines("space=attention", *ON_GPU)
    request = StudyRequest("s", space, Settings(), H100)
    assert not make_plan(request).enumerated  # 256 as written
    space, _ = prepare(space, compose, MACHINES["cpu"], allow_lossy=False)
    assert make_plan(StudyRequest("s", space, Settings(), H100)).enumerated


def test_steps_are_taken_in_order_even_when_there_are_more_than_n_trials(
    lines: CommandLines, tmp_path: Path
) -> None:
    outcome, _, _ = run(lines, tmp_path, "space=ladder", fake=FakeRun(simple), n_trials=3)
    steps = [record.params["step"] for record in outcome.points]
    assert steps == ["1_baseline", "2_graph", "3_cached_keys"]


def by_blas(cfg: Config) -> TrialResult:
    return ok(cfg, 5.0 if cfg.lossy() else 10.0 + cfg.weights.seed)


def test_a_lossy_trial_is_told_as_a_violation_unless_allowed(
    lines: CommandLines, tmp_path: Path
) -> None:
    for allowed in (False, True):
        store = tmp_path / str(allowed)
        outcome, _, _ = run(
            lines,
            store,
            "blas=torch,fp8",
            fake=FakeRun(by_blas),
            objective={"allow_lossy": allowed},
        )
        judged_by = Criteria(allow_lossy=allowed)
        best = [row.record for row in rows(outcome.records, judged_by) if row.best]
        assert [record.params.get("blas") == "fp8" for record in best] == [allowed]
        study = optuna_study(store, "s")
        violated = {
            trial.params["blas"]: sum(value > 0 for value in trial.constraints.values())
            for trial in study.get_trials()
            if trial.params
        }
        assert violated == {"torch": 0, "fp8": 0 if allowed else 1}


def test_what_may_win_is_part_of_the_study() -> None:
    plain = Space.parse(["attention=eager,sdpa", "n_trials=3"])
    allowed = Space.parse(["attention=eager,sdpa", "objective.allow_lossy=true"])
    named = Space.parse(["attention=eager,sdpa", "space=full"])
    assert len({space_hash(space, "x") for space in (plain, allowed, named)}) == 3
