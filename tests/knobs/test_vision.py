"""Knob `vision`: cameras batched or one by one, masked tokens encoded or left out."""

import dataclasses

import pytest
import torch
from distances import distance
from mini_policies import (
    MASKED,
    attention_calls,
    config,
    plain_actions,
    plain_policy,
    prepare,
    sample_inputs,
    sizes,
)

from openpi_opt.knobs import BY_NAME
from openpi_opt.knobs.vision import VisionOptions
from openpi_opt.surgery.lean import lean

SKIP = {"skip_masked": True}
GAP = {"active_cameras": [True, False, True], "prompt_slots": 5, "prompt_tokens": 3}
FULL = {"active_cameras": [True, True], "prompt_slots": 4, "prompt_tokens": 4}


@pytest.mark.parametrize(
    ("attention", "vision"),
    [
        ("sdpa", {"cameras": "separate"}),
        ("sdpa", SKIP),
        ("eager", {"cameras": "separate", **SKIP}),
    ],
)
@pytest.mark.parametrize("workload", [MASKED, GAP, FULL], ids=["leading", "gap", "full"])
def test_same_actions(workload, vision, attention):
    stages = dict.fromkeys(("vision", "prefill", "denoise"), attention)
    cfg = config({**workload, "batch_size": 2}, vision=vision, attention=stages)
    inputs = sample_inputs(cfg)
    assert distance(prepare(cfg).call(inputs), plain_actions(cfg, inputs)) < 1e-5


@pytest.mark.parametrize(
    ("vision", "passes"),
    [
        ({}, [3]),
        ({"cameras": "separate"}, [1, 1, 1]),
        (SKIP, [2]),
        ({"cameras": "separate", **SKIP}, [1, 1]),
    ],
)
def test_passes_of_the_tower(vision, passes):
    cfg = config(GAP, vision=vision)
    prepared = prepare(cfg)
    images: list[int] = []
    prepared.policy.vision.register_forward_pre_hook(lambda _, args: images.append(len(args[0])))
    prepared.call(sample_inputs(cfg))
    assert images == passes


def test_skipping_leaves_a_prefix_of_valid_tokens_without_a_mask():
    cfg = config(GAP, vision=SKIP)
    seen = attention_calls(prepare(cfg), "prefill", sample_inputs(cfg), sizes)
    assert set(seen) == {(515, 515, True, ((0, 515, None),))}


def test_nothing_of_what_is_skipped_is_read():
    cfg = config(MASKED, vision=SKIP)
    prepared, inputs = prepare(cfg), sample_inputs(cfg)
    images, tokens = inputs.images.clone(), inputs.tokens.clone()
    images[:, 0] = torch.nan
    tokens[:, 4:] = 10**9
    assert torch.equal(
        prepared.call(inputs._replace(images=images, tokens=tokens)), prepared.call(inputs)
    )


@pytest.mark.parametrize("change", ["skip_masked", "state_once", "kv_buffer", "rope_tables"])
def test_a_layout_is_needed(change):
    with pytest.raises(ValueError, match="needs a declared layout"):
        lean(plain_policy(config()), horizon=3, **{change: True})
    policy = prepare(config(MASKED, vision=SKIP)).policy
    assert policy.layout is not None
    assert (policy.layout.cameras, policy.layout.prompt_slots) == ((False, True), 6)
    with pytest.raises(ValueError, match="needs a declared layout"):
        policy.declare_layout(None)


def test_the_layout_can_be_declared_anew():
    cfg = config(GAP, vision=SKIP)
    prepared, inputs = prepare(config(MASKED, vision=SKIP)), sample_inputs(cfg)
    prepared.policy.declare_layout(dataclasses.replace(prepare(cfg).policy.layout))
    assert distance(prepared.call(inputs), plain_actions(cfg, inputs)) < 1e-5


@pytest.mark.parametrize("knobs", [{"vision": SKIP}, {"simplify": {"kv_buffer": True}}])
@pytest.mark.parametrize("horizon", [1, 4])
def test_another_horizon_is_refused(horizon, knobs):
    inputs = sample_inputs(config({**MASKED, "horizon": horizon}))
    with pytest.raises(ValueError, match=f"horizon is {horizon}; this policy was built for 3"):
        prepare(config(MASKED, **knobs)).call(inputs)


@pytest.mark.parametrize(
    ("workload", "asked", "canonical"),
    [
        (FULL, SKIP, {}),
        (MASKED, SKIP, SKIP),
        ({**FULL, "prompt_tokens": 3}, SKIP, SKIP),
        (GAP, {"cameras": "separate", **SKIP}, {"cameras": "separate", **SKIP}),
        (MASKED, {"cameras": "separate", **SKIP}, SKIP),
        (MASKED, {"cameras": "separate"}, {"cameras": "separate"}),
        ({**FULL, "active_cameras": [True]}, {"cameras": "separate"}, {}),
    ],
)
def test_canonical_form(workload, asked, canonical):
    found = BY_NAME["vision"].canonical(config(workload, vision=asked))
    assert found == VisionOptions(**canonical)
