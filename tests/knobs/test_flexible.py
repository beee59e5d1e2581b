"""`workload.layout=flexible`: one prepared policy serves any prompt length and admitted camera."""

from typing import Any

import pytest
import torch
from distances import distance
from mini_policies import PI05, attention_calls, config, plain_actions, prepare, sample_inputs
from torch import Tensor

from openpi_opt.knobs import BY_NAME
from openpi_opt.knobs.vision import VisionOptions
from openpi_opt.pi0.inputs import Inputs
from openpi_opt.pi0.ops import Visibility

SLOTS = {"active_cameras": [True, False, True], "prompt_slots": 6, "layout": "flexible"}
FLEXIBLE = {**SLOTS, "prompt_tokens": 4, "batch_size": 2}
SIMPLIFY = ("last_layer", "fold_norms", "time_mlp", "state_once", "kv_buffer", "rope_tables")
# (cameras, prompt tokens) of both elements of a batch.
CALLS: tuple[Any, ...] = (
    (([1, 0, 1], 6), ([0, 0, 1], 1)),
    (([1, 0, 0], 0), ([1, 0, 1], 5)),
)
CONFIGURATIONS: dict[str, dict[str, Any]] = {
    "sdpa": {},
    "skipping": {"vision": {"skip_masked": True, "cameras": "separate"}},
    "everything": {"simplify": dict.fromkeys(SIMPLIFY, True), "vision": {"skip_masked": True}},
    "state in the steps": {"simplify": {"kv_buffer": True, "rope_tables": True}},
    "state once": {"simplify": {"state_once": True}},
}


def with_masks(inputs: Inputs, call: Any) -> Inputs:
    """The same content, of which other parts are valid; what is not is NaN where it can be."""
    image_mask = torch.tensor([cameras for cameras, _ in call]).bool()
    token_mask = torch.arange(6) < torch.tensor([tokens for _, tokens in call])[:, None]
    token_mask[:, 2] = False
    return inputs._replace(image_mask=image_mask, token_mask=token_mask)


@pytest.mark.parametrize(
    ("name", "model"),
    [(n, m) for n in CONFIGURATIONS for m in ({}, PI05) if not (m and n.startswith("state"))],
)
def test_one_policy_serves_every_call(name, model):
    attention = dict.fromkeys(("vision", "prefill", "denoise"), "sdpa")
    cfg = config(FLEXIBLE, attention=attention, **CONFIGURATIONS[name], **model)
    prepared = prepare(cfg)
    for call in CALLS:
        inputs = with_masks(sample_inputs(cfg), call)
        spoilt = inputs.images.masked_fill(~inputs.image_mask[..., None, None, None], torch.nan)
        actions = prepared.call(inputs._replace(images=spoilt))
        assert distance(actions, plain_actions(cfg, inputs)) < 1e-5


def test_nothing_but_tensors_depends_on_the_masks():
    """Compiled for one call, the stages serve the others without another graph."""
    cfg = config(FLEXIBLE, simplify=dict.fromkeys(SIMPLIFY, True))
    prepared = prepare(cfg)
    torch._dynamo.reset()
    for stage in ("prefill", "denoise_step"):  # images have no mask
        compiled = torch.compile(
            getattr(prepared.policy, stage), fullgraph=True, dynamic=False, backend="eager"
        )
        setattr(prepared.policy, stage, compiled)
    inputs = sample_inputs(cfg)
    prepared.call(with_masks(inputs, CALLS[0]))
    with torch.compiler.set_stance("fail_on_recompile"):
        other = with_masks(inputs, CALLS[1])
        assert distance(prepared.call(other), plain_actions(cfg, other)) < 1e-5


def test_rotary_tables_are_looked_up_once_a_call():
    cfg = config(FLEXIBLE, simplify={"rope_tables": True})
    prepared, inputs = prepare(cfg), sample_inputs(cfg)
    cache = prepared.policy.prefill_of(inputs, prepared.policy.encode_images(inputs.images))
    assert cache.rope is not None
    assert cache.rope.cos.shape[:2] == (2, 4)  # the state and three actions


def test_kernels_get_lengths():
    """What a kernel without a mask is told: every slot, and where each element's padding begins."""
    cfg = config(FLEXIBLE, attention={"denoise": "sdpa"}, vision={"skip_masked": True})
    prepared = prepare(cfg)

    def told(q: Tensor, k: Tensor, v: Tensor, visibility: Visibility, scale: float) -> Any:
        assert visibility.padding is not None
        start, stop = visibility.padding
        return q.shape[1], visibility.segments, tuple(start.tolist()), start.dtype, stop

    seen = set(attention_calls(prepared, "prefill", with_masks(sample_inputs(cfg), CALLS[0]), told))
    assert seen == {(518, ((0, 518, None),), (517, 257), torch.int32, 518)}


def test_padding_alone_cannot_be_skipped():
    every = {**FLEXIBLE, "active_cameras": [True, True]}
    found = BY_NAME["vision"].canonical(config(every, vision={"skip_masked": True}))
    assert found == VisionOptions()
