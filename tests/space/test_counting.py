"""Counts without a walk are those of a walk, over the real knobs."""

from __future__ import annotations

import dataclasses
import math
import random
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st
from space_samples import MACHINES, CommandLines, command_lines

from openpi_opt.config import Config
from openpi_opt.errors import UserError
from openpi_opt.knobs.compile import CompileOptions
from openpi_opt.knobs.graph import GraphOptions
from openpi_opt.machine import Machine
from openpi_opt.space.counting import Count, _union_size, count
from openpi_opt.space.dimensions import Choices
from openpi_opt.space.factors import NotFactorableError
from openpi_opt.space.peek import explore
from openpi_opt.space.points import Compose, Points
from openpi_opt.space.prepare import Sample, prepare
from openpi_opt.space.sensible import LeftOut, NotSensibleError
from openpi_opt.space.space import Space

MOST_POINTS = 400
# Beside those of space=full: other contexts, presets, additions, values that contradict.
MORE = [
    "workload=glob(*)",
    "workload.batch_size=1,8",
    "workload.name=a,b",
    "preset=h100,h200_seeds",
    "gemm.max_rows=8,64,65",
    "blas.fp8.fast_accum=true,false",
    "blas.fp8.stages=[vision],[denoise],[vision,prefill,denoise]",
    "blas.aiter.max_rows=null,64",
    "+environment.variables.CUDA_MODULE_LOADING=LAZY,EAGER",
    "compile.inductor.group_fusion=null,true",
    "limits.load=1,2",
    "weights=random,checkpoint",
]


@pytest.fixture(scope="module")
def lines() -> CommandLines:
    return command_lines()


def walk(space: Space, compose: Compose, machine: Machine, allow_lossy: bool) -> Count:
    points = Points(dataclasses.replace(space, sensible_only=True), compose, machine, allow_lossy)
    found = Count(alive={key: set() for key in space.dimensions})
    hashes = set()
    for params in space.all():
        found.raw += 1
        try:
            hashes.add(points.config(params).hash())
        except UserError as error:
            reason = getattr(error, "left_out", LeftOut("invalid", str(error)))
            found.left_out[reason] += 1
            continue
        found.sensible += 1
        for key, text in params.items():
            found.alive[key].add(text)
    found.distinct = len(hashes)
    return found


def some_space(lines: CommandLines, seed: int) -> tuple[Space, Compose]:
    """A few swept keys of `space=full`, the others as at one of its starts or at the defaults."""
    chosen = random.Random(seed)
    full, _ = lines("space=full")
    more = Space.parse(chosen.sample(MORE, 2), lines.loader)
    dimensions = {**full.dimensions, **more.dimensions}
    keys = [*chosen.sample([*full.dimensions], len(full.dimensions)), *more.dimensions]
    swept: dict[str, str] = {}
    for key in reversed(keys):
        texts = [*dimensions[key].texts()]
        size = math.prod(len(text.split("|")) for text in swept.values())
        if size * len(texts) <= MOST_POINTS and len(swept) < 7:
            swept[key] = "|".join(texts)
    start = chosen.choice([{}, *full.start.values()])
    odd = {key: chosen.choice(full.dimensions[key].texts()) for key in chosen.sample(keys[:25], 2)}
    fixed = {
        key: text
        for key, text in {**start, **odd}.items()
        if key in full.dimensions and key not in swept
    }
    _, compose = lines()
    return (
        Space(
            {key: Choices(tuple(text.split("|"))) for key, text in swept.items()},
            tuple(f"{key}={text}" for key, text in fixed.items()),
        ),
        compose,
    )


@pytest.mark.parametrize("seed", range(12))
def test_the_count_is_that_of_a_walk(lines: CommandLines, seed: int) -> None:
    space, compose = some_space(lines, seed)
    for i, machine in enumerate(MACHINES.values()):
        allow_lossy = (seed + i) % 2 == 0
        walked = walk(space, compose, machine, allow_lossy)
        counted = count(space, compose, machine, allow_lossy)
        assert counted.raw == walked.raw == space.combinations()
        assert counted.sensible == walked.sensible, space
        assert counted.distinct == walked.distinct, space
        assert counted.left_out.total() == walked.left_out.total()
        assert counted.alive == walked.alive
        if not any("preset" in key or "checkpoint" in key for key in space.dimensions):
            assert +counted.left_out == +walked.left_out


def test_billions_are_counted_and_every_sample_agrees(lines: CommandLines) -> None:
    space, compose = lines("space=full")
    chosen = random.Random(1)
    for machine in MACHINES.values():
        found = count(space, compose, machine, allow_lossy=False)
        assert found.raw == space.combinations() > 10**9
        assert found.raw == found.sensible + found.left_out.total()
        assert 0 < found.distinct <= found.sensible
        points = Points(
            dataclasses.replace(space, sensible_only=True), compose, machine, allow_lossy=False
        )
        seen: set[LeftOut] = set()
        for _ in range(100):
            params = {key: chosen.choice(d.texts()) for key, d in space.dimensions.items()}
            try:
                points.config(params)
            except NotSensibleError as error:
                seen.add(error.left_out)
            else:
                assert all(text in found.alive[key] for key, text in params.items())
        assert seen <= found.left_out.keys()


@pytest.mark.parametrize(
    ("words", "why"),
    [
        (["guard.cap=interval(0.1,0.2)"], "no end"),
        (["workload.seed=range(1000)"], "too many"),
        (["gemm.max_rows=range(1,30000)"], "too many"),
    ],
)
def test_what_cannot_be_counted_is_sampled_and_said(
    lines: CommandLines, words: list[str], why: str
) -> None:
    space, compose = lines(*words, "attention=eager,triton")
    with pytest.raises(NotFactorableError, match=why):
        count(space, compose, MACHINES["cpu"], allow_lossy=False)
    _, found = prepare(space, compose, MACHINES["cpu"], allow_lossy=False)
    assert isinstance(found, Sample)
    assert found.sensible + sum(found.left_out.values()) == found.drawn
    assert found.distinct <= found.sensible
    low, high = found.share()
    assert low < (0.5 if "gemm" not in words[0] else 0.01) < high


@given(
    st.lists(
        st.tuples(*(st.frozensets(st.sampled_from("abcd"), min_size=1) for _ in range(3))),
        max_size=6,
    )
)
def test_a_union_of_boxes_counts_each_tuple_once(boxes: list) -> None:
    tuples = {(a, b, c) for one, two, three in boxes for a in one for b in two for c in three}
    assert _union_size(boxes) == len(tuples)


class Reads:
    """Stands in for a function of the configuration; counts its calls."""

    def __init__(self, function) -> None:  # type: ignore[no-untyped-def]
        self.function, self.calls = function, 0

    def __call__(self, cfg: Config) -> object:
        self.calls += 1
        return self.function(cfg)


MODES = [
    CompileOptions(mode=mode, scope=s) for mode in ("off", "default") for s in ("stage", "call")
]
CANDIDATES = {"graph": [GraphOptions()], "compile": MODES}


@pytest.mark.parametrize(
    ("function", "answers", "conditions"),
    [
        (lambda cfg: cfg.model.name, ["auto"], 0),
        (lambda cfg: cfg.knobs["graph"].mode, ["none"], 0),
        (lambda cfg: cfg.knobs["compile"].mode, ["off", "default"], 1),
        (lambda cfg: cfg.knobs["compile"].inductor.freezing, [None], 1),
        (lambda cfg: isinstance(cfg.knobs["compile"], CompileOptions), [True], 0),
        (lambda cfg: cfg.knobs["compile"].inductor.chosen(), [{}], 1),
        (lambda cfg: cfg.knobs["compile"] == MODES[2], [False, False, True, False], 1),
        (lambda cfg: MODES[2] == cfg.knobs["compile"], [False, False, True, False], 1),
        (lambda cfg: len({cfg.knobs["compile"], MODES[0]}), [1, 2, 2, 2], 1),
        (lambda cfg: str(cfg.knobs["compile"]), [str(mode) for mode in MODES], 1),
        (lambda cfg: dict(cfg.knobs["compile"])["scope"], ["stage", "call"] * 2, 1),
        (lambda cfg: sorted(cfg.knobs), [["compile", "graph"]], 0),
    ],
)
def test_answers_depend_on_what_is_read_and_on_nothing_else(
    function,  # type: ignore[no-untyped-def]
    answers: list,
    conditions: int,
) -> None:
    leaves = explore(function, Config.parse({}), "graph", GraphOptions(), CANDIDATES)
    assert [leaf.answer for leaf in leaves] == answers
    assert {len(leaf.conditions) for leaf in leaves} == {conditions}


def test_a_field_that_is_read_only_under_a_condition_is_asked_for_only_there() -> None:
    def function(cfg: Config) -> str:
        options = cfg.knobs["compile"]
        return options.scope if options.mode == "default" else "none"

    reads = Reads(function)
    leaves = explore(reads, Config.parse({}), "graph", GraphOptions(), CANDIDATES)
    assert [leaf.answer for leaf in leaves] == ["none", "stage", "call"]
    assert [len(leaf.conditions) for leaf in leaves] == [1, 2, 2]
    assert reads.calls == 5
    assert Counter(read for leaf in leaves for read, _ in leaf.conditions) == {
        ("compile", ("mode",)): 3,
        ("compile", ("scope",)): 2,
    }
