from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import optuna
import pytest
from optuna.trial import TrialState
from search_samples import failed, ok

from openpi_opt.config import Config
from openpi_opt.errors import UserError
from openpi_opt.space import optimizer as module
from openpi_opt.space.optimizer import Chooser, Copy, Optimizer, Proposal
from openpi_opt.space.space import Space
from openpi_opt.track.store import Store

SPACE = Space.parse(["measure.warmup=range(3,9)", "weights.seed=0,1,2"])
Open = Callable[..., Optimizer]


@pytest.fixture
def open_(tmp_path: Path) -> Open:
    store = Store.open(tmp_path / "store")

    def make(sampler: str = "tpe", seed: int = 0, space: Space = SPACE) -> Optimizer:
        return Optimizer.open(space, Chooser(sampler, seed), Copy(store, "study#1"))

    return make


def states(optimizer: Optimizer) -> list[TrialState]:
    return [trial.state for trial in optimizer._study.get_trials()]


def config(params: dict[str, str]) -> Config:
    return Config.parse({"weights": {"seed": int(params["weights.seed"])}})


def test_an_ok_outcome_is_complete_and_any_other_pruned(open_: Open) -> None:
    optimizer = open_()
    for result in (ok, failed):
        proposal = optimizer.ask()
        cfg = config(proposal.params)
        optimizer.tell(proposal, ok(cfg, 7.0) if result is ok else failed(cfg))
    assert states(optimizer) == [TrialState.COMPLETE, TrialState.PRUNED]
    assert optimizer._study.best_value == 7.0


def test_points_of_our_own_are_recorded_once_and_in_order(open_: Open) -> None:
    optimizer = open_()
    points = list(SPACE.all())[:3]
    for point in [*points, points[0]]:
        optimizer.tell(Proposal(point), failed(config(point)))
    trials = optimizer._study.get_trials()
    assert [SPACE.texts(trial.params) for trial in trials] == points
    assert states(optimizer) == [TrialState.PRUNED] * 3


def test_the_copy_has_a_result_once_however_many_sweeps_tell_it(open_: Open) -> None:
    first, second = open_(), open_()
    proposal = first.ask()
    found, worse = ok(config(proposal.params), 5.0), ok(config(proposal.params), 6.0)
    for sweep, own in ((first, proposal), (second, Proposal(proposal.params))):
        sweep.tell(own, found)
    (copied,) = second._copy.get_trials()
    assert copied.values == [5.0]
    second.learn([(proposal.params, found)], copy=True)
    assert len(open_()._copy.get_trials()) == 1
    fresh = open_()
    fresh.forget()
    fresh.tell(Proposal(proposal.params), worse)
    assert [trial.values for trial in open_()._copy.get_trials()] == [[5.0], [6.0]]


def test_a_sampler_that_proposes_the_same_again_adds_nothing_to_the_copy(open_: Open) -> None:
    optimizer = open_(space=Space.parse(["weights.seed=0,1"]))
    for _ in range(8):
        proposal = optimizer.ask()
        optimizer.tell(proposal, ok(config(proposal.params), 5.0))
    assert len(optimizer._copy.get_trials()) == len(optimizer.tried) <= 2


def test_a_continued_study_knows_what_was_tried(open_: Open) -> None:
    first = open_()
    proposal = first.ask()
    first.tell(proposal, ok(config(proposal.params), 5.0))
    again = open_()
    assert again.tried == {config(proposal.params).hash()}
    assert again.has(proposal.params)


def test_the_same_seed_proposes_the_same_and_a_continued_study_goes_on(
    open_: Open, tmp_path: Path
) -> None:
    def propose(optimizer: Optimizer) -> list[dict[str, str]]:
        proposals = [optimizer.ask() for _ in range(6)]
        for proposal in proposals:
            optimizer.tell(proposal, ok(config(proposal.params), 5.0))
        return [proposal.params for proposal in proposals]

    store = Store.open(tmp_path / "other")
    elsewhere = Optimizer.open(SPACE, Chooser("random", 3), Copy(store, "study#1"))
    first = propose(open_("random", 3))
    assert first == propose(elsewhere)
    assert first != propose(open_("random", 3))


def test_what_a_killed_sweep_asked_leaves_no_trace(open_: Open) -> None:
    killed = open_()
    finished, _ = killed.ask(), killed.ask()
    killed.tell(finished, ok(config(finished.params), 4.0))
    again = open_()
    assert states(again) == [TrialState.COMPLETE]
    assert again.has(finished.params)


def test_what_others_found_is_learned_once_and_not_copied(open_: Open) -> None:
    optimizer = open_()
    point = next(iter(SPACE.all()))
    for _ in range(2):
        optimizer.learn([(point, ok(config(point), 4.0))])
    assert states(optimizer) == [TrialState.COMPLETE]
    assert states(open_()) == []


def test_the_sampler_sees_the_fastest_and_the_latest(
    open_: Open, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in (("MOST_SEEN", 8), ("_FASTEST_SEEN", 3), ("_SLACK", 2)):
        monkeypatch.setattr(module, name, value)
    optimizer = open_(space=Space.parse(["weights.seed=range(0,1000)"]))
    waiting = optimizer.ask()
    for number in range(20):
        proposal = optimizer.ask()
        optimizer.tell(proposal, ok(config(proposal.params), 5.0 + number))
    seen = optimizer._study.get_trials()
    assert len(seen) <= 8 + 2 + 1
    assert optimizer._study.best_value == 5.0
    assert max(t.value for t in seen if t.value) == 24.0
    assert states(optimizer).count(TrialState.RUNNING) == 1
    optimizer.tell(waiting, ok(config(waiting.params), 1.0))
    assert TrialState.RUNNING not in states(optimizer)
    assert len(optimizer.tried) >= 20
    again = open_(space=Space.parse(["weights.seed=range(0,1000)"]))
    assert again.tried == optimizer.tried


def test_of_many_trials_the_sampler_keeps_the_fastest_and_not_only_a_few(open_: Open) -> None:
    optimizer = open_(space=Space.parse(["weights.seed=range(0,2000)"]))
    points = [({"weights.seed": str(n)}, ok(Config.parse({}), 5.0 + n)) for n in range(1300)]
    optimizer.learn(points)
    seen = sorted(trial.value for trial in optimizer._study.get_trials() if trial.value)
    assert len(seen) == 1000
    assert seen[:200] == [5.0 + n for n in range(200)]
    assert seen[-1] == 5.0 + 1299


def test_giving_up_is_no_lesson_unless_it_is_meant_as_one(open_: Open) -> None:
    optimizer = open_()
    for learn in (False, True):
        optimizer.give_up(optimizer.ask(), learn)
    assert states(optimizer) == [TrialState.FAIL, TrialState.PRUNED]
    assert optimizer.tried == set()


def test_tpe_keeps_away_from_what_fails(open_: Open) -> None:
    space = Space.parse(["weights.seed=0,1,2,3"])
    optimizer = open_(space=space)
    proposals = []
    for _ in range(40):
        proposal = optimizer.ask()
        cfg = config(proposal.params)
        bad = proposal.params["weights.seed"] in ("1", "2")
        optimizer.tell(proposal, failed(cfg) if bad else ok(cfg, 5.0))
        proposals.append(bad)
    assert sum(proposals[20:]) <= 6  # half of them would be 10


@pytest.mark.parametrize("sampler", ["tpe", "random", "gp"])
def test_every_sampler_proposes_points_of_the_space(open_: Open, sampler: str) -> None:
    points = [tuple(point.items()) for point in SPACE.all()]
    optimizer = open_(sampler)
    for _ in range(12):
        proposal = optimizer.ask()
        assert tuple(proposal.params.items()) in points
        optimizer.tell(proposal, ok(config(proposal.params), 5.0))


def test_a_damaged_database_is_the_users_to_mend(open_: Open, tmp_path: Path) -> None:
    (tmp_path / "store" / "optuna.db").write_bytes(b"not a database" * 99)
    with pytest.raises(UserError, match=r"optuna\.db cannot be used"):
        open_()


def test_a_database_of_another_version_is_refused(open_: Open, tmp_path: Path) -> None:
    import sqlite3

    open_()
    with sqlite3.connect(tmp_path / "store" / "optuna.db") as database:
        database.execute("UPDATE alembic_version SET version_num = 'v99.0.0.a'")
    database.close()
    with pytest.raises(UserError, match="another version of Optuna"):
        open_()


def test_processes_that_begin_at_once_share_one_database(tmp_path: Path) -> None:
    code = """
import sys
from openpi_opt.space.optimizer import Chooser, Copy, Optimizer
from openpi_opt.space.space import Space
from openpi_opt.track.store import Store
space = Space.parse(["a=range(9000)"])
chooser = Chooser("random", 7919 * int(sys.argv[2]))
optimizer = Optimizer.open(space, chooser, Copy(Store.open(sys.argv[1]), "s#1"))
optimizer.give_up(optimizer.ask(), learn=True)
"""
    argv = [sys.executable, "-c", code, str(tmp_path / "fresh")]
    started = [
        subprocess.Popen([*argv, str(seed)], stderr=subprocess.PIPE, text=True) for seed in range(3)
    ]
    for process in started:
        _, errors = process.communicate(timeout=60)
        assert process.returncode == 0, errors
    study = optuna.load_study(storage=f"sqlite:///{tmp_path}/fresh/optuna.db", study_name="s#1")
    assert len(study.get_trials()) == 3
