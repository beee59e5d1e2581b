"""The last part of a search: neighbours of the best, and what can be left out of it."""

import pytest
from machine_samples import CPU
from search_samples import failed, ok

from openpi_opt.config import Config
from openpi_opt.space.neighbours import BEGINS, Neighbours
from openpi_opt.space.optimizer import Optimizer, Proposal
from openpi_opt.space.points import Points
from openpi_opt.space.sources import Sampled
from openpi_opt.space.space import Space

SWITCHES = ("last_layer", "fold_norms", "time_mlp", "rope_tables")
SPACE = Space.parse([*(f"simplify.{name}=false,true" for name in SWITCHES)])
# Milliseconds that a switch saves of 10: one much, one nothing, two within noise.
GAINS = {"last_layer": 2.0, "fold_norms": 0.0, "time_mlp": 0.01, "rope_tables": 0.02}


def compose(overrides: list[str]) -> Config:
    on = [line.split(".")[1].partition("=")[0] for line in overrides if line.endswith("=true")]
    return Config.parse({"simplify": dict.fromkeys(on, True)})


def latency(params: dict[str, str]) -> float:
    return 10.0 - sum(GAINS[k.split(".")[1]] for k, text in params.items() if text == "true")


@pytest.fixture
def search():
    points = Points(SPACE, compose, CPU)
    optimizer = Optimizer(SPACE, "random", 0)
    return optimizer, Neighbours(optimizer, SPACE, points, share=lambda: 1.0)


def tell(optimizer: Optimizer, neighbours: Neighbours, params: dict[str, str]) -> None:
    cfg = neighbours.points.config(params)
    optimizer.tell(optimizer.ask(params), ok(cfg, latency(params)))


def test_all_neighbours_then_the_simplest(search):
    optimizer, neighbours = search
    assert neighbours.next(set()) is None  # there is no best yet
    tell(optimizer, neighbours, dict.fromkeys(SPACE.dimensions, "true"))
    assert neighbours.text(optimizer.tried) == (
        "best so far: 0 of 4 neighbours measured, none faster beyond noise; 4 left"
    )
    asked = []
    while (params := neighbours.next(optimizer.tried)) is not None:
        asked.append(params)
        tell(optimizer, neighbours, params)
    assert [sum(text == "false" for text in params.values()) for params in asked] == [1, 1, 1, 1, 3]
    assert asked[-1]["simplify.last_layer"] == "true"
    assert neighbours.text(optimizer.tried) == (
        "locally best: 4 of 4 neighbours measured, none faster beyond noise"
    )
    assert neighbours.simplest() == (asked[-1], pytest.approx(8.0))


def test_what_fails_is_known_and_not_asked_again(search):
    optimizer, neighbours = search
    tell(optimizer, neighbours, dict.fromkeys(SPACE.dimensions, "false"))
    first = neighbours.next(optimizer.tried)
    assert first is not None
    optimizer.tell(optimizer.ask(first), failed(neighbours.points.config(first)))
    second = neighbours.next(optimizer.tried)
    assert second is not None
    optimizer.give_up(optimizer.ask(second), learn=True)  # left out: it belongs to a failing class
    third = neighbours.next(optimizer.tried)
    assert third not in (first, second)
    assert "1 of 4" in (neighbours.text(optimizer.tried) or "")


def test_neighbours_come_in_the_last_part_of_a_budget(search):
    optimizer, neighbours = search
    source = Sampled(optimizer, SPACE, 10, set, neighbours)
    neighbours.share = source.share
    near = []
    for number in range(10):
        proposal = source.next()
        assert proposal is not None
        before = optimizer.best()
        if before is not None:
            changed = sum(before[0][key] != text for key, text in proposal.params.items())
            near.append((number / 10 >= BEGINS, changed == 1))
        while optimizer.has(proposal.params):
            optimizer.give_up(proposal, learn=False)
            proposal = optimizer.ask()
        cfg = neighbours.points.config(proposal.params)
        optimizer.tell(
            Proposal(proposal.params, proposal.number), ok(cfg, latency(proposal.params))
        )
    assert [one for late, one in near if late][:2] == [True] * 2


def test_what_was_left_for_a_short_trial_comes_first():
    """The regions that are compiled whole, before any neighbour that the model thinks faster."""
    space = Space.parse(
        [*(f"simplify.{n}=false,true" for n in SWITCHES), "compile.scope=stage,layer"]
    )

    def composed(overrides: list[str]) -> Config:
        scope = next(line.partition("=")[2] for line in overrides if "scope" in line)
        found = compose([line for line in overrides if "scope" not in line])
        whole = found.dump() | {"compile": {"mode": "default", "scope": scope}}
        return Config.parse({"simplify": whole["knobs"]["simplify"], "compile": whole["compile"]})

    points, optimizer = Points(space, composed, CPU), Optimizer(space, "random", 0)
    best = {**dict.fromkeys(space.dimensions, "true"), "compile.scope": "layer"}
    optimizer.tell(optimizer.ask(best), ok(points.config(best), 5.0))
    first = Neighbours(optimizer, space, points, share=lambda: 1.0).next(optimizer.tried)
    assert first == {**best, "compile.scope": "stage"}
