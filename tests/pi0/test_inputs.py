"""Layouts, workloads and their inputs."""

import pytest
import torch

from openpi_opt.pi0.config import MODELS, PI0_MINI
from openpi_opt.pi0.inputs import Layout
from openpi_opt.pi0.workload import Workload, make_inputs

WORKLOAD = Workload((True, True, False), 20, 12, horizon=10, steps=10, batch_size=3)


def test_layout_counts_slots():
    layout = Layout((True, False, True), 20, 12)
    assert (layout.prefix_slots, layout.prefix_valid) == (788, 524)
    assert not layout.all_valid
    assert not layout.leading
    index = layout.valid_index()
    assert index == [*range(256), *range(512, 780)]


@pytest.mark.parametrize(
    ("cameras", "prompt_tokens", "leading"),
    [
        ((True, True), 3, True),
        ((True, True), 4, True),
        ((True, False), 0, True),
        ((True, False), 1, False),
        ((False, True), 0, False),
        ((True, True), 0, True),
    ],
)
def test_layout_knows_when_valid_tokens_lead(cameras, prompt_tokens, leading):
    layout = Layout(cameras, 4, prompt_tokens, tokens_per_camera=2)
    assert layout.leading is leading
    assert leading is (layout.valid_index() == list(range(layout.prefix_valid)))


def test_layout_of_masks_is_the_workloads():
    inputs = make_inputs(WORKLOAD, PI0_MINI, 0, "cpu")
    assert Layout.of(inputs.image_mask, inputs.token_mask) == WORKLOAD.layout


@pytest.mark.parametrize(
    ("image_mask", "token_mask", "message"),
    [
        ([[1, 0], [1, 1]], [[1, 0], [1, 0]], "image_mask"),
        ([[1, 0], [1, 0]], [[1, 0], [1, 1]], "token_mask"),
        ([[1, 0]], [[1, 0, 1]], "come first"),
        ([[0, 0]], [[0, 0]], "at least one"),
        ([1, 0], [[1, 0]], "image_mask"),
    ],
)
def test_masks_without_a_layout_are_refused(image_mask, token_mask, message):
    with pytest.raises(ValueError, match=message):
        Layout.of(torch.tensor(image_mask).bool(), torch.tensor(token_mask).bool())


def test_inputs_have_the_documented_shapes_and_ranges():
    inputs = make_inputs(WORKLOAD, PI0_MINI, 0, "cpu")
    assert inputs.images.shape == (3, 3, 3, 224, 224)
    assert -1.0 <= float(inputs.images.min()) < -0.99 < 0.99 < float(inputs.images.max()) <= 1.0
    assert inputs.tokens.dtype == torch.int64
    assert int(inputs.tokens.max()) < PI0_MINI.vocab_size
    assert inputs.state.shape == (3, 32)
    assert inputs.noise.shape == (3, 10, 32)
    assert inputs.image_mask.tolist() == [[True, True, False]] * 3
    # What is masked must differ from nothing, or attending it would not show.
    assert float(inputs.images[:, 2].std()) > 0.5
    assert len(inputs.tokens[:, 12:].unique()) > 5


def test_inputs_depend_on_the_seed_only():
    first, again, other = (make_inputs(WORKLOAD, PI0_MINI, seed, "cpu") for seed in (1, 1, 2))
    for name, left, right, different in zip(first._fields, first, again, other, strict=True):
        assert torch.equal(left, right)
        assert ("mask" in name) is torch.equal(left, different)


def test_the_small_models_have_the_graphs_of_the_full_ones():
    assert list(MODELS) == ["pi0", "pi0_mini", "pi05", "pi05_mini"]
    assert [config.family for config in MODELS.values()] == ["pi0", "pi0", "pi05", "pi05"]
    assert [config.state_tokens for config in MODELS.values()] == [1, 1, 0, 0]
    for config in MODELS.values():
        assert config.vision.tokens == 256
        assert config.expert.heads * config.expert.head_dim != config.expert.width
