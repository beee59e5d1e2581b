"""The whole inference: against the transcription, with layouts, in other precisions, compiled."""

import copy
import dataclasses

import pytest
import torch
from distances import distance
from torch import Tensor

from openpi_opt.pi0.config import PI0_MINI, PI05_MINI
from openpi_opt.pi0.inputs import Inputs, Layout
from openpi_opt.pi0.ops import Visibility, eager_attention
from openpi_opt.pi0.packing import packing
from openpi_opt.pi0.policy import Pi0Policy
from openpi_opt.pi0.precision import cast
from openpi_opt.pi0.weights import build, init_random
from openpi_opt.pi0.workload import Workload, make_inputs

from . import transcription

SEED_B1 = Workload((True, True, False), 20, 20, horizon=10, steps=10, batch_size=1)
WORKLOADS = {
    "seed_b1": SEED_B1,
    "all_cameras_padded_horizon50": Workload((True, True, True), 48, 31, 50, 10, 1),
    "middle_camera_masked_3_steps": Workload((True, False, True), 9, 1, 4, 3, 1),
    "first_camera_masked_batch2": Workload((False, True), 6, 4, 1, 2, 2),
}


def transcribed(policy: Pi0Policy, inputs: Inputs) -> Tensor:
    """The transcription's actions for every observation of a batch."""
    state = policy.state_dict()
    rows = [
        transcription.actions(
            state,
            inputs.images[row],
            inputs.image_mask[row].tolist(),
            inputs.tokens[row][inputs.token_mask[row]].tolist(),
            inputs.state[row],
            inputs.noise[row],
            steps=policy.steps,
            vision_heads=policy.config.vision.heads,
            rounded=policy.config.rope_frequencies == "bfloat16",
        )
        for row in range(len(inputs.noise))
    ]
    return torch.stack(rows)


@pytest.mark.parametrize("name", WORKLOADS)
@pytest.mark.parametrize(
    ("model", "rope"), [(PI0_MINI, "bfloat16"), (PI0_MINI, "float32"), (PI05_MINI, "bfloat16")]
)
def test_actions_equal_the_transcription(name, model, rope):
    workload = WORKLOADS[name]
    config = dataclasses.replace(model, rope_frequencies=rope)
    policy = build(config, "cpu", steps=workload.steps)
    init_random(policy, seed=3)
    inputs = make_inputs(workload, config, seed=4, device="cpu")
    expected = transcribed(policy, inputs)
    assert distance(policy.sample_actions(inputs), expected) < 1e-5
    assert Layout.of(inputs.image_mask, inputs.token_mask) == workload.layout
    policy.declare_layout(workload.layout)
    assert distance(policy.sample_actions(inputs), expected) < 1e-5
    policy.declare_layout(None)
    assert distance(policy.sample_actions(inputs), expected) < 1e-5


@pytest.mark.parametrize("model", [PI0_MINI, PI05_MINI], ids=lambda model: model.name)
def test_batch_of_different_masks_equals_the_transcription(model):
    policy = build(model, "cpu", steps=2)
    init_random(policy, seed=5)
    inputs = make_inputs(Workload((True, True), 8, 8, 5, 2, 2), PI0_MINI, 6, "cpu")
    image_mask = torch.tensor([[True, True], [False, True]])
    # Not a leading run: masked tokens in front and in between.
    token_mask = torch.tensor([[1, 1, 1, 0, 0, 0, 0, 0], [0, 1, 1, 0, 1, 1, 1, 0]]).bool()
    inputs = inputs._replace(image_mask=image_mask, token_mask=token_mask)
    actions = policy.sample_actions(inputs)
    assert actions.dtype == torch.float32
    assert distance(actions, transcribed(policy, inputs)) < 1e-5


def test_the_state_of_pi05_is_in_its_prompt():
    """Two states with the same prompt are the same observation."""
    policy = build(PI05_MINI, "cpu", steps=2)
    init_random(policy, seed=0)
    inputs = make_inputs(SEED_B1, PI05_MINI, 1, "cpu")
    other = inputs._replace(state=torch.full_like(inputs.state, torch.nan))
    assert torch.equal(policy.sample_actions(other), policy.sample_actions(inputs))


def layout_of(layout: Layout) -> Workload:
    return Workload(layout.cameras, layout.prompt_slots, layout.prompt_tokens, 6, 2, 2)


FLEXIBLE = Workload((True, True, True), 12, 12, 6, 2, 2, flexible=True)


def ragged() -> list[Inputs]:
    """Batches in which no element has the masks of another; prompts have gaps."""
    images = [[1, 1, 1], [0, 1, 0]], [[1, 0, 1], [0, 0, 0]], [[0, 0, 1], [1, 1, 0]]
    prompts = [12, 1], [5, 7], [0, 11]
    batches = []
    for image_mask, lengths in zip(images, prompts, strict=True):
        inputs = make_inputs(FLEXIBLE, PI0_MINI, 7, "cpu")
        token_mask = torch.arange(12) < torch.tensor(lengths)[:, None]
        token_mask[:, 3] = False
        batches.append(
            inputs._replace(image_mask=torch.tensor(image_mask).bool(), token_mask=token_mask)
        )
    return batches


def test_padding_and_segments_say_the_same_as_the_mask(either):
    """For kernels that read lengths: the first `start[b]` keys of each segment, and from `stop`."""

    def lengths_only(
        q: Tensor, k: Tensor, v: Tensor, visibility: Visibility, scale: float
    ) -> Tensor:
        padding, segments = visibility.padding, visibility.segments
        assert padding is not None
        assert segments is not None
        rows = []
        for row, start in enumerate(padding.start.tolist()):
            parts = []
            for begin, end, count in segments:
                keys = torch.arange(k.shape[1] if count is None else count)
                keys = keys[(keys < start) | (keys >= padding.stop)]
                one = slice(row, row + 1)
                kept = k[one, keys], v[one, keys]
                parts.append(
                    eager_attention(q[one, begin:end], *kept, Visibility(None, None), scale)
                )
            rows.append(torch.cat(parts, dim=1))
        return torch.cat(rows)

    policy = either
    policy.declare_layout(FLEXIBLE.layout)
    batches = ragged()
    masked = [policy.sample_actions(inputs) for inputs in batches]
    policy.ops.attention_prefill = policy.ops.attention_denoise = lengths_only
    for inputs, expected in zip(batches, masked, strict=True):
        assert distance(policy.sample_actions(inputs), expected) < 1e-5


def test_packing_keeps_order_and_repeats_a_valid_token():
    mask = torch.tensor([[0, 1, 1, 0, 1], [1, 1, 1, 1, 1], [0, 0, 0, 1, 0]]).bool()
    order, length, valid = packing(mask)
    assert order.tolist() == [[1, 2, 4, 4, 4], [0, 1, 2, 3, 4], [3, 3, 3, 3, 3]]
    assert length.tolist() == [3, 5, 1]
    assert valid.sum(1).tolist() == [3, 5, 1]


def gathered_attention(
    q: Tensor, k: Tensor, v: Tensor, visibility: Visibility, scale: float
) -> Tensor:
    """What a backend without masks does: one call for each segment, on the keys it sees."""
    assert visibility.segments is not None
    outs, covered = [], 0
    for start, stop, keys in visibility.segments:
        assert start == covered
        covered = stop
        if isinstance(keys, Tensor):
            seen = keys
        else:
            seen = torch.arange(k.shape[1] if keys is None else keys)
        all_seen = Visibility(None, None)
        outs.append(eager_attention(q[:, start:stop], k[:, seen], v[:, seen], all_seen, scale))
    assert covered == q.shape[1]
    return torch.cat(outs, dim=1)


@pytest.mark.parametrize(
    "layout",
    [Layout((True, False, True), 12, 7), Layout((True, True), 12, 7), Layout((True,), 5, 5)],
    ids=["scattered", "leading", "all_valid"],
)
def test_segments_say_the_same_as_the_mask(either, layout):
    policy = either
    inputs = make_inputs(layout_of(layout), PI0_MINI, 8, "cpu")
    policy.declare_layout(layout)
    masked = policy.sample_actions(inputs)
    policy.ops.attention_prefill = policy.ops.attention_denoise = gathered_attention
    assert distance(policy.sample_actions(inputs), masked) < 1e-5


def test_layout_of_another_tower_is_refused(policy):
    with pytest.raises(ValueError, match="64 tokens a camera"):
        policy.declare_layout(Layout((True,), 4, 4, tokens_per_camera=64))


def test_deepcopy_shares_nothing(policy):
    other = copy.deepcopy(policy)
    other.ops.gelu = torch.relu
    assert policy.ops.gelu is not torch.relu
    assert other.vision.encoder.layers[0].mlp.ops is other.ops


def test_float16_and_bfloat16_stay_near_float32(either, masked_workload):
    policy = either
    inputs = make_inputs(masked_workload, PI0_MINI, 9, "cpu")
    exact = policy.sample_actions(inputs)
    for dtype, limit in ((torch.float16, 2e-3), (torch.bfloat16, 1e-2)):
        other = copy.deepcopy(policy)
        cast(other, dtype)
        assert 0 < distance(other.sample_actions(inputs), exact) < limit
