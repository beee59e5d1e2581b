"""What is left of a space on a machine, and how many combinations it has."""

import dataclasses
import math
import random

import pytest
from space_samples import MACHINES, CommandLines, command_lines

from openpi_opt.space import prepare as preparing
from openpi_opt.space.dimensions import Dimension
from openpi_opt.space.points import NotSensibleError, Points
from openpi_opt.space.prepare import prepare
from openpi_opt.space.space import Space

MOST_POINTS = 400


@pytest.fixture(scope="module")
def lines():
    return command_lines()


def some_space(lines: CommandLines, seed: int) -> Space:
    """A few swept keys of `space=full`, the others as at one of its starts or at the defaults."""
    chosen = random.Random(seed)
    full, _ = lines("space=full")
    swept: dict[str, Dimension] = {}
    for key in chosen.sample([*full.dimensions], len(full.dimensions)):
        size = math.prod(len(d.values) for d in swept.values())
        dimension = full.dimensions[key]
        if dimension.kind is str and size * len(dimension.values) <= MOST_POINTS:
            swept[key] = dimension
    start = chosen.choice([{}, *full.start.values()])
    fixed = [f"{key}={text}" for key, text in start.items() if key not in swept]
    return Space(dict(swept), tuple(fixed), sensible_only=True)


@pytest.mark.parametrize("seed", range(4))
def test_an_estimate_is_near_a_walk_and_no_value_that_can_run_is_dropped(lines, seed, monkeypatch):
    space, (_, compose) = some_space(lines, seed), lines()
    for name in ("cpu", "h100", "mi300x"):
        _, walked = prepare(space, compose, MACHINES[name], allow_lossy=False)
        with monkeypatch.context() as patch:
            patch.setattr(preparing, "MAX_WALK", 1)
            _, guessed = prepare(space, compose, MACHINES[name], allow_lossy=False)
        assert walked.exact
        assert walked.raw == guessed.raw == space.combinations()
        assert walked.sensible + walked.left_out.total() == walked.raw
        assert all(walked.alive[key] <= guessed.alive[key] for key in space.dimensions)
        assert walked.sensible * 0.6 <= guessed.sensible <= walked.sensible * 1.6 + 5, name
        assert walked.distinct * 0.4 <= guessed.distinct <= walked.distinct * 2.5 + 5, name


def test_billions_are_estimated_and_every_sensible_sample_is_of_live_values(lines):
    space, compose = lines("space=full")
    chosen = random.Random(1)
    _, found = prepare(space, compose, MACHINES["h100"], allow_lossy=False)
    assert found.raw == space.combinations()
    assert found.raw is not None
    assert 10**9 < found.distinct <= found.sensible < found.raw
    low, high = found.share()
    assert low < found.drawn_sensible / found.drawn < high
    full = dataclasses.replace(space, sensible_only=True)
    points = Points(full, compose, MACHINES["h100"], allow_lossy=False)
    for _ in range(50):
        params = {key: chosen.choice(d.values) for key, d in space.dimensions.items()}
        try:
            points.config(params)
        except NotSensibleError:
            continue
        assert all(text in found.alive[key] for key, text in params.items())


def test_a_continuum_has_no_number(lines):
    space, compose = lines("guard.cap=interval(0.1,0.2)", "attention=eager,triton")
    _, found = prepare(space, compose, MACHINES["cpu"], allow_lossy=False)
    assert found.raw is None
    assert not found.exact
    assert found.alive["attention"] == {"eager"}
