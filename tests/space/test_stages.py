"""`sampler=stages`: what it learns of stages, what it proposes, and how it ends."""

import random

import numpy as np
import pytest
from optuna.trial import FrozenTrial, TrialState, create_trial
from search_samples import ok
from space_samples import MACHINES, command_lines

from openpi_opt.config import Config
from openpi_opt.engine.plan import StudyRequest, make_plan
from openpi_opt.errors import UserError
from openpi_opt.knobs import KNOBS
from openpi_opt.knobs.base import STAGES
from openpi_opt.result import Kernels
from openpi_opt.space.features import (
    IDLE,
    PARTS,
    SECONDS,
    TOTAL,
    expected_time,
    features,
    parts,
    touched,
)
from openpi_opt.space.optimizer import Optimizer
from openpi_opt.space.points import Points
from openpi_opt.space.prepare import prepare
from openpi_opt.space.settings import Settings
from openpi_opt.space.space import Space
from openpi_opt.space.stage_model import Seen, StageModel
from openpi_opt.space.stages import RANDOM, Map, StagesSampler

H100 = MACHINES["h100"]


@pytest.fixture(scope="module")
def full():
    space, compose = command_lines()("space=full", "model=pi0", "workload=three_cameras")
    space, _ = prepare(space, compose, H100, False)
    return space, Points(space, compose, H100)


def frozen(space: Space, params: dict[str, str], **attributes: object) -> FrozenTrial:
    total = attributes.get(TOTAL)
    return create_trial(
        params=space.values(params),
        distributions=space.distributions(),
        state=TrialState.COMPLETE if total else TrialState.PRUNED,
        values=[total] if total else None,
        user_attrs=attributes,
    )


def test_every_option_declares_stages_that_exist():
    for knob in KNOBS:
        fields = knob.options_type.model_fields
        assert {name.split(".")[0] for name in knob.stages} <= set(fields), knob.name
        for name in fields:
            assert set(knob.touches(name)) <= set(STAGES)
            assert knob.touches(name)
    assert touched("attention.launch_vision.block_m") == ("vision",)
    assert touched("weights.seed") == touched("compile.mode") == STAGES


def test_what_no_kernel_reads_is_no_feature():
    def of(denoise: str) -> dict[str, str]:
        launch = {"block_n": 32}
        raw = {"attention": {"denoise": denoise, "launch_denoise": launch}}
        cfg = Config.parse({"model": {"name": "pi0"}, **raw}).resolved(H100)
        return features(cfg, Space({}), {})

    assert of("sdpa") == {"attention.denoise": "sdpa"}
    assert of("triton") == {"attention.denoise": "triton", "attention.launch_denoise.block_n": "32"}


@pytest.mark.parametrize(("busy", "idle"), [(6.0, 4.0), (20.0, 0.1)])
def test_parts_sum_to_the_latency(busy, idle):
    kernels = Kernels(
        kind="device_kernels",
        total=3,
        by_category={},
        category_ms={},
        stage_ms={"vision": busy / 4, "denoise": busy * 3 / 4},
    )
    found = parts(ok(Config.parse({}), 10.0).model_copy(update={"kernels": kernels}))
    assert found[IDLE] == pytest.approx(idle)
    assert sum(found.values()) == pytest.approx(10.0)
    assert found["denoise"] == pytest.approx(3 * found["vision"])


def test_a_stage_teaches_nothing_of_options_that_do_not_touch_it():
    rng = np.random.default_rng(0)
    chosen = random.Random(0)
    trials = []
    for _ in range(40):
        on = {
            key: "1" for key in ("fusion.vision_qkv", "simplify.time_mlp") if chosen.random() < 0.5
        }
        vision = 5.0 * (0.7 if "fusion.vision_qkv" in on else 1.0)
        denoise = 20.0 * (0.5 if "simplify.time_mlp" in on else 1.0)
        times = {"vision": vision, "denoise": denoise}
        trials.append(Seen(on, vision + denoise, times))
    model = StageModel(touched)
    model.fit(trials)
    mean = model.mean()
    fast = {"fusion.vision_qkv": "1", "simplify.time_mlp": "1"}
    assert mean.milliseconds(fast) == pytest.approx(13.5, rel=0.01)
    assert mean.parts["vision"]({"simplify.time_mlp": "1"}) == mean.parts["vision"]({})
    drawn = model.draw(rng)
    assert drawn.milliseconds(fast) == pytest.approx(13.5, rel=0.05)


def test_two_options_that_only_gain_together_are_learned():
    def time(on: dict[str, str]) -> float:
        return 10.0 if len(on) == 2 else 20.0

    pairs = [{}, {"a": "1"}, {"b": "1"}, {"a": "1", "b": "1"}]
    model = StageModel(lambda key: STAGES)
    model.fit([Seen(on, time(on)) for on in pairs * 10])
    mean = model.mean()
    assert [round(mean.milliseconds(on)) for on in pairs] == [20, 20, 20, 10]


def test_any_option_may_take_away_the_time_outside_the_stages():
    """A capture does, though it touches no kernel."""

    def seen(on: dict[str, str]) -> Seen:
        idle = 0.2 if "graph.mode" in on else 120.0
        return Seen(on, idle + 5.0, {"vision": 5.0, IDLE: idle})

    rows = [{}, {"graph.mode": "manual"}, {"fusion.qkv": "True"}]
    model = StageModel(touched)
    model.fit([seen(on) for on in rows * 4])
    both = {"graph.mode": "manual", "fusion.qkv": "True"}
    assert model.mean().milliseconds(both) == pytest.approx(5.2, rel=0.1)


def test_a_known_point_is_predicted_as_it_was_measured():
    """Whatever its many options are taken to add; and its neighbours from there."""
    chosen = random.Random(0)
    keys = [f"fusion.{n}" for n in range(20)]
    rows = [{key: "1" for key in keys if chosen.random() < 0.5} for _ in range(30)]
    fast = dict.fromkeys(keys, "1")
    model = StageModel(lambda key: STAGES)
    model.fit([*(Seen(on, 20.0) for on in rows), Seen(fast, 10.0)])
    mean = model.mean()
    assert mean.milliseconds(fast) == pytest.approx(10.0, rel=0.02)
    assert 10.0 < mean.milliseconds({k: fast[k] for k in keys[1:]}) < 17.0


def test_what_is_known_of_an_option_is_believed_until_measured():
    """A default that measuring found best is left for a good reason only."""
    model = StageModel(touched, expected_time)
    launch = "attention.launch_denoise.block_n"
    model.fit([Seen({"attention.denoise": "triton"}, 10.0)] * 3)
    tried = {"attention.denoise": "triton", launch: "32"}
    assert model.mean().milliseconds(tried) == pytest.approx(10.2, rel=0.01)


def test_what_fails_and_what_takes_long_is_avoided():
    model = StageModel(touched)
    rows: list[Seen] = []
    for key, outcome in (("a", None), ("b", 10.0), ("c", 10.0)):
        rows += [Seen({key: "1"}, outcome, {}, 500.0 if key == "c" else 20.0, outcome is None)] * 6
    model.fit(rows)
    mean = model.mean()
    assert mean.cost({"a": "1"}) > mean.cost({"b": "1"}) + 0.3
    mean.patience = 0.1
    assert mean.cost({"c": "1"}) > mean.cost({"b": "1"}) + 0.1


def test_proposals_are_admitted_new_and_soon_fast(full):
    """Of a made-up machine on which some options are fast, in a space of billions of points."""
    space, points = full
    sampler = StagesSampler(space, points, seed=1)
    gains = {
        "graph.mode": (IDLE, 0.01),
        "attention.denoise": ("denoise", 0.7),
        "fusion.expert_layer": ("denoise", 0.5),
        "fusion.vision_qkv": ("vision", 0.8),
        "simplify.last_layer": ("prefill", 0.9),
    }
    trials: list[FrozenTrial] = []
    keys, totals = [], []
    for _ in range(RANDOM + 30):
        params = sampler.propose(trials)
        place = sampler.place(params)
        assert place is not None  # a knob would have refused it
        times = {"vision": 5.0, "prefill": 10.0, "denoise": 25.0, IDLE: 100.0}
        for key, (part, gain) in gains.items():
            times[part] *= gain if key in place.features else 1.0
        keys.append(place.key)
        totals.append(sum(times.values()))
        attributes = {PARTS: times, TOTAL: totals[-1], SECONDS: 20.0}
        trials.append(frozen(space, params, **attributes))
    assert len(set(keys)) == len(keys)
    best = 4.0 + 9.0 + 25 * 0.7 * 0.5 + 1.0
    assert min(totals) < 1.05 * best


def test_a_value_brings_what_its_knob_asks_for(full):
    space, points = full
    atlas = Map(space, points)
    plain = atlas.place({key: d.values[0] for key, d in space.dimensions.items()})
    assert plain is not None
    found = atlas.changed(plain, "fusion.expert_layer", "true")
    assert found is not None
    assert found.features["fusion.expert_layer"] == "True"
    assert len(found.features) <= 6  # its own five, and a precision of 16 bits


def test_no_search_begins_by_compiling_for_minutes(full):
    space, points = full
    sampler = StagesSampler(space, points, seed=2)
    first = [sampler.propose([]) for _ in range(20)]
    assert {params["compile"] for params in first} >= {"off", "default"}
    assert not {"max_autotune", "max_autotune_no_cudagraphs"} & {p["compile"] for p in first}
    compiled = [params for params in first if params["compile"] != "off"]
    assert {params["compile.scope"] for params in compiled} <= {"stage", "layer"}
    assert {p["precision.dtype"] for p in first} == {"bfloat16"}
    assert sum(p["graph"] == "manual" for p in first) > 15  # Inductor captures the others


def test_pending_points_are_not_proposed_again(full):
    space, points = full
    sampler = StagesSampler(space, points, seed=3)
    trials: list[FrozenTrial] = []
    keys = set()
    for number in range(RANDOM + 6):
        params = sampler.propose(trials)
        place = sampler.place(params)
        assert place is not None
        keys.add(place.key)
        done = number < RANDOM
        trial = frozen(space, params, **({TOTAL: 30.0 + number} if done else {}))
        trial.state = TrialState.COMPLETE if done else TrialState.RUNNING
        trials.append(trial)
    assert len(keys) == len(trials)


def test_the_default_of_a_large_space_and_what_is_not_for_it():
    def plan(*words: str, **settings: object) -> str:
        space = Space.parse([*words, "weights.seed=range(0,60)"])
        parsed = Settings.parse({"n_trials": 5, **settings})
        return make_plan(StudyRequest("s", space, parsed, H100)).sampler

    assert plan() == "stages"
    assert plan("guard.factor=interval(1,2)") == "tpe"
    assert plan(objective={"minimize": ["latency", "memory"]}) == "tpe"
    with pytest.raises(UserError, match="needs at most 64 values"):
        plan("guard.factor=interval(1,2)", sampler="stages")
    with pytest.raises(UserError, match="minimises the latency alone"):
        plan(objective={"minimize": ["latency", "memory"]}, sampler="stages")


def test_it_is_a_sampler_of_optuna_and_a_continued_study_knows_the_parts(full):
    space, points = full
    optimizer, found = Optimizer(space, "stages", 0, points=points), []
    for number in range(3):
        proposal = optimizer.ask()
        found.append((proposal.params, ok(points.config(proposal.params), 5.0 + number)))
        optimizer.tell(proposal, found[-1][1])
    continued = Optimizer(space, "stages", 1, points=points)
    continued.learn(found)
    for each in (optimizer, continued):
        assert [t.user_attrs[TOTAL] for t in each.trials] == [5.0, 6.0, 7.0]
