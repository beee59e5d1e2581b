import pytest
from optuna.trial import TrialState
from search_samples import failed, ok

from openpi_opt.config import Config
from openpi_opt.space import optimizer as module
from openpi_opt.space.optimizer import Optimizer, Proposal
from openpi_opt.space.space import Space

SPACE = Space.parse(["measure.warmup=range(3,9)", "weights.seed=0,1,2"])


def states(optimizer: Optimizer) -> list[TrialState]:
    return [trial.state for trial in optimizer.trials]


def config(params: dict[str, str]) -> Config:
    return Config.parse({"weights": {"seed": int(params["weights.seed"])}})


def test_an_ok_outcome_is_complete_and_any_other_pruned():
    optimizer = Optimizer(SPACE, "tpe", 0)
    for result in (ok, failed):
        proposal = optimizer.ask()
        cfg = config(proposal.params)
        optimizer.tell(proposal, ok(cfg, 7.0) if result is ok else failed(cfg))
    assert states(optimizer) == [TrialState.COMPLETE, TrialState.PRUNED]
    assert optimizer.best()[1] == 7.0


def test_points_of_our_own_are_recorded_once_and_in_order():
    optimizer = Optimizer(SPACE, "tpe", 0)
    points = list(SPACE.all())[:3]
    for point in [*points, points[0]]:
        optimizer.tell(Proposal(point), failed(config(point)))
    trials = optimizer.trials
    assert [SPACE.texts(trial.params) for trial in trials] == points
    assert states(optimizer) == [TrialState.PRUNED] * 3


def test_the_same_seed_proposes_the_same():
    def propose(seed: int) -> list[dict[str, str]]:
        optimizer = Optimizer(SPACE, "random", seed)
        proposals = [optimizer.ask() for _ in range(6)]
        for proposal in proposals:
            optimizer.tell(proposal, ok(config(proposal.params), 5.0))
        return [proposal.params for proposal in proposals]

    assert propose(3) == propose(3) != propose(4)


def test_what_is_known_is_learned_once():
    optimizer = Optimizer(SPACE, "tpe", 0)
    point = next(iter(SPACE.all()))
    for _ in range(2):
        optimizer.learn([(point, ok(config(point), 4.0))])
    assert states(optimizer) == [TrialState.COMPLETE]
    assert optimizer.tried == {config(point).hash()}
    assert optimizer.has(point)


def test_the_sampler_sees_the_fastest_and_the_latest(monkeypatch):
    for name, value in (("MOST_SEEN", 8), ("_FASTEST_SEEN", 3), ("_SLACK", 2)):
        monkeypatch.setattr(module, name, value)
    optimizer = Optimizer(Space.parse(["weights.seed=range(0,1000)"]), "tpe", 0)
    waiting = optimizer.ask()
    for number in range(20):
        proposal = optimizer.ask()
        optimizer.tell(proposal, ok(config(proposal.params), 5.0 + number))
    seen = optimizer.trials
    assert len(seen) <= 8 + 2 + 1
    assert optimizer.best()[1] == 5.0
    assert max(t.value for t in seen if t.value) == 24.0
    assert states(optimizer).count(TrialState.RUNNING) == 1
    optimizer.tell(waiting, ok(config(waiting.params), 1.0))
    assert TrialState.RUNNING not in states(optimizer)
    assert len(optimizer.tried) >= 20


def test_of_many_trials_the_sampler_keeps_the_fastest_and_not_only_a_few():
    optimizer = Optimizer(Space.parse(["weights.seed=range(0,2000)"]), "tpe", 0)
    optimizer.learn(({"weights.seed": str(n)}, ok(Config.parse({}), 5.0 + n)) for n in range(1300))
    seen = sorted(trial.value for trial in optimizer.trials if trial.value)
    assert len(seen) == 1000
    assert seen[:200] == [5.0 + n for n in range(200)]
    assert seen[-1] == 5.0 + 1299


def test_giving_up_is_no_lesson_unless_it_is_meant_as_one():
    optimizer = Optimizer(SPACE, "tpe", 0)
    for learn in (False, True):
        optimizer.give_up(optimizer.ask(), learn)
    assert states(optimizer) == [TrialState.FAIL, TrialState.PRUNED]
    assert optimizer.tried == set()


def test_tpe_keeps_away_from_what_fails():
    space = Space.parse(["weights.seed=0,1,2,3"])
    optimizer = Optimizer(space, "tpe", 0)
    proposals = []
    for _ in range(40):
        proposal = optimizer.ask()
        cfg = config(proposal.params)
        bad = proposal.params["weights.seed"] in ("1", "2")
        optimizer.tell(proposal, failed(cfg) if bad else ok(cfg, 5.0))
        proposals.append(bad)
    assert sum(proposals[20:]) <= 6  # half of them would be 10


@pytest.mark.parametrize("sampler", ["tpe", "random", "gp"])
def test_every_sampler_proposes_points_of_the_space(sampler):
    points = [tuple(point.items()) for point in SPACE.all()]
    optimizer = Optimizer(SPACE, sampler, 0)
    for _ in range(12):
        proposal = optimizer.ask()
        assert tuple(proposal.params.items()) in points
        optimizer.tell(proposal, ok(config(proposal.params), 5.0))
