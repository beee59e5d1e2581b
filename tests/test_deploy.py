import dataclasses
import functools
import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

import openpi_opt
from openpi_opt import Observation, preset, runtime
from openpi_opt.config import Config
from openpi_opt.errors import UserError
from openpi_opt.pi0 import checkpoint, weights
from openpi_opt.pi0.config import PI0_MINI, PI05_MINI, Pi0Config
from openpi_opt.pi0.policy import Pi0Policy
from openpi_opt.pi0.workload import make_inputs

pytestmark = pytest.mark.usefixtures("home_of_our_own")

SDPA = {"attention": {"vision": "sdpa", "prefill": "sdpa", "denoise": "sdpa"}}
# What `verify` does is told by tests/guarding/test_verify.py; it takes seconds.
load_policy = functools.partial(openpi_opt.load_policy, verify=False)
SMALL = ["model=pi0_mini", "platform=cpu", "workload.steps=2", "workload.horizon=4"]


def observation(policy: openpi_opt.ReadyPolicy) -> tuple[Observation, torch.Tensor]:
    workload = runtime.workload_of(policy.config)
    inputs = make_inputs(workload, PI0_MINI, 5, "cpu")
    return Observation(*inputs[:5]), inputs.noise


@pytest.fixture
def presets(tmp_path):
    cfg = Config.parse({**SDPA, "precision": {"dtype": "float32"}})
    workload = {"horizon": 4, "steps": 2, "active_cameras": [True, True, False]}
    provenance = {
        "study": "s",
        "model": {"name": "pi0_mini"},
        "workload": Config.parse({"workload": workload}).workload.model_dump(mode="json"),
    }
    preset.write(tmp_path / "fast.yaml", cfg, provenance)
    return tmp_path


@pytest.fixture(scope="module")
def plain():
    return load_policy(overrides=SMALL)


def test_a_preset_gives_the_actions_of_the_plain_policy(presets):
    policy = load_policy("fast", preset_dir=presets, overrides=["platform=cpu"])
    plain = load_policy(overrides=[*SMALL, "precision=float32"])
    seen, noise = observation(policy)
    actions = policy.sample_actions(seen, noise)
    assert actions.shape == (1, 4, 32)
    torch.testing.assert_close(actions, plain.sample_actions(seen, noise), rtol=1e-4, atol=1e-5)


def test_noise_is_drawn_when_none_is_given(plain):
    seen, _ = observation(plain)
    assert (plain.sample_actions(seen) - plain.sample_actions(seen)).abs().max() > 1e-3


def test_masks_other_than_promised_are_refused(presets):
    policy = load_policy("fast", preset_dir=presets, overrides=["platform=cpu"])
    seen, noise = observation(policy)
    three = Observation(
        seen.images, torch.ones(1, 3, dtype=torch.bool), seen.tokens, seen.token_mask, seen.state
    )
    with pytest.raises(ValueError, match="was built for Layout"):
        policy.sample_actions(three, noise)


def test_openpi_observations():
    names = ("base_0_rgb", "left_wrist_0_rgb", "right_wrist_0_rgb")
    pixels = torch.randint(0, 256, (1, 224, 224, 3), dtype=torch.uint8)
    data = {
        "image": dict.fromkeys(names, pixels),
        "image_mask": {"right_wrist_0_rgb": torch.tensor([False])},
        "state": torch.zeros(1, 32),
        "tokenized_prompt": torch.zeros(1, 20, dtype=torch.int32),
        "tokenized_prompt_mask": torch.ones(1, 20, dtype=torch.bool),
    }
    seen = Observation.from_openpi(data)
    assert seen.image_mask.tolist() == [[True, True, False]]
    assert seen.images.shape == (1, 3, 224, 224, 3)
    assert torch.equal(seen.images[0, 2], pixels[0])
    with pytest.raises(ValueError, match=r"lacks state, image\.base_0_rgb"):
        Observation.from_openpi({"image": {}, "tokenized_prompt": 0, "tokenized_prompt_mask": 0})


def saved(folder: Path, model: Pi0Config = PI0_MINI) -> Pi0Policy:
    """A policy of random weights, and its checkpoint in the folder."""
    policy = weights.build(model, "cpu", steps=2)
    weights.init_random(policy, 1)
    checkpoint.save(policy, folder / "model.safetensors")
    return policy


def test_the_checkpoint_says_which_model_it_is(tmp_path):
    overrides = ["platform=cpu", "workload.steps=2", "workload.horizon=4", "precision=float32"]
    for model in (PI0_MINI, PI05_MINI):
        plain = saved(tmp_path, model)
        policy = load_policy(checkpoint=tmp_path, overrides=overrides)
        assert policy.config.model.name == model.name
        seen, noise = observation(policy)
        inputs = make_inputs(runtime.workload_of(policy.config), model, 5, "cpu")
        torch.testing.assert_close(policy.sample_actions(seen, noise), plain.sample_actions(inputs))


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"preset": "nowhere"}, "nowhere"),
        ({"preset": "../up"}, "preset name"),
        ({"checkpoint": "model.pt"}, "pickle file"),
        ({"overrides": ["attention=warp"]}, "warp"),
        ({"overrides": ["attention=aiter", *SMALL]}, "unavailable"),
        ({"overrides": ["graph=manual", *SMALL]}, "unavailable"),
    ],
)
def test_what_cannot_be_loaded_says_why(arguments, words):
    with pytest.raises(UserError, match=words):
        load_policy(**arguments)


@pytest.mark.parametrize("key", ["action_horizon", "chunk_size"])
def test_the_horizon_is_the_checkpoints_unless_it_is_said(key, tmp_path):
    saved(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({key: 6}))
    with pytest.raises(UserError, match=r"trained to give 6 actions .*\.horizon=6 takes"):
        load_policy(checkpoint=tmp_path, overrides=["platform=cpu", "workload=openpi"])
    for said, horizon in (("workload.horizon=6", 6), ("++workload.horizon=4", 4)):
        policy = load_policy(checkpoint=tmp_path, overrides=["platform=cpu", said])
        assert policy.config.workload.horizon == horizon


@pytest.mark.usefixtures("one_layer", "traced")
def test_threads_share_a_compiled_policy():
    """Traced by Dynamo, whose guards are what threads meet; code is generated in test_compile."""
    policy = load_policy(overrides=[*SMALL, "compile=default", "workload.steps=1"])
    seen, noise = observation(policy)
    states = [torch.full_like(seen.state, float(n)) for n in range(4)]
    views = [dataclasses.replace(seen, state=state) for state in states]
    with ThreadPoolExecutor(4) as pool:
        answers = list(pool.map(lambda view: policy.sample_actions(view, noise), views * 3))
    for index, answer in enumerate(answers):
        assert torch.equal(answer, policy.sample_actions(views[index % 4], noise))


WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "a horizon of 3": (
        {"noise": torch.zeros(1, 3, 32)},
        r"noise has shape \[1, 3, 32\]; .* \[1, 4, 32\]",
    ),
    "NaN state": ({"state": torch.full((1, 32), torch.nan)}, r"state\[0, 0\] is nan"),
    "infinite noise": ({"noise": np.full((1, 4, 32), np.inf, np.float32)}, r"noise\[0, 0, 0\]"),
    "NaN pixel": (
        {"images": torch.zeros(1, 3, 3, 224, 224).index_fill(1, torch.tensor(1), torch.nan)},
        "images of camera 1 .* NaN",
    ),
    "pixels of 0 to 255": (
        {"images": torch.zeros(1, 3, 3, 224, 224).index_fill(1, torch.tensor(2), 255.0)},
        "images of camera 2 have values from 255 to 255",
    ),
    "whole numbers for pixels": (
        {"images": torch.zeros(1, 3, 3, 224, 224, dtype=torch.int32)},
        "images is int32",
    ),
    "unknown id": ({"tokens": torch.full((1, 20), 257152)}, "tokens holds the id 257152"),
    "negative id": ({"tokens": np.full((1, 20), -1)}, "tokens holds the id -1"),
    "floats for ids": ({"tokens": torch.zeros(1, 20)}, "tokens is float32"),
    "numbers for a mask": ({"token_mask": torch.ones(1, 20)}, "token_mask is float32"),
    "a list": ({"state": [0.0] * 32}, "state is a list"),
    "objects": ({"state": np.array([None])}, "state is an array of object"),
    "too many tokens": (
        {"tokens": np.zeros((1, 30), int), "token_mask": np.arange(30)[None] < 25},
        "tokens has 25 valid ids; this policy has 20",
    ),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_no_policy_can_answer_is_refused(name, plain):
    changed, words = WRONG[name]
    seen, noise = observation(plain)
    fields = {**vars(seen), "noise": noise, **changed}
    with pytest.raises(ValueError, match=words):
        plain.sample_actions(Observation(**{k: fields[k] for k in vars(seen)}), fields["noise"])


def test_arrays_bytes_and_short_prompts_mean_the_same(plain):
    seen, noise = observation(plain)
    raw = torch.randint(0, 256, (1, 3, 224, 224, 3), dtype=torch.uint8)
    scaled = raw.permute(0, 1, 4, 2, 3).float() / 255 * 2 - 1
    mask = torch.arange(20)[None] < 7
    expected = plain.sample_actions(
        dataclasses.replace(seen, images=scaled, token_mask=mask), noise
    )
    arrays = {name: value.numpy() for name, value in vars(seen).items()}
    arrays |= {"images": raw.numpy(), "token_mask": mask[:, :9].numpy()}
    arrays["tokens"] = arrays["tokens"][:, :9].astype(np.int32)
    for array in arrays.values():
        array.flags.writeable = False
    assert torch.equal(plain.sample_actions(Observation(**arrays), noise.numpy()), expected)
    long = torch.nn.functional.pad(seen.tokens, (0, 30)), torch.nn.functional.pad(mask, (0, 30))
    padded = dataclasses.replace(seen, images=raw, tokens=long[0], token_mask=long[1])
    assert torch.equal(plain.sample_actions(padded, noise), expected)


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_what_the_callers_program_has_switched_changes_nothing(precision, tmp_path):
    saved(tmp_path)
    knobs = ["attention=sdpa", "simplify=all", f"precision={precision}", *SMALL[1:]]

    def load() -> openpi_opt.ReadyPolicy:
        return load_policy(checkpoint=tmp_path, overrides=knobs)

    plain = load()
    seen, noise = observation(plain)
    expected = plain.sample_actions(seen, noise)
    with torch.inference_mode(), torch.autocast("cpu", dtype=torch.bfloat16):
        inside = Observation(**{name: value.clone() for name, value in vars(seen).items()})
        assert torch.equal(plain.sample_actions(inside, noise), expected)
    try:
        torch.set_default_dtype(torch.float16)
        torch.set_default_device("meta")
        other = load()
        assert torch.get_default_dtype() == torch.float16
    finally:
        torch.set_default_dtype(torch.float32)
        torch.set_default_device(None)
    assert torch.equal(other.sample_actions(seen, noise), expected)


def test_a_damaged_checkpoint_is_refused(tmp_path):
    damaged = saved(tmp_path)
    damaged.state_proj.weight[3, 2] = torch.inf
    checkpoint.save(damaged, tmp_path / "model.safetensors")
    with pytest.raises(checkpoint.CheckpointError, match=r"state_proj\.weight holds NaN"):
        load_policy(checkpoint=tmp_path, overrides=SMALL[1:])


def test_warming_up_tells_the_time_of_the_first_answer(plain):
    first = plain.warm_up()
    assert plain.first_answer_seconds == first > 0
    plain.warm_up()
    assert plain.first_answer_seconds == first
    assert plain.load_seconds > 0


def test_a_flexible_policy_takes_any_prompt_and_admitted_camera():
    workload = ["workload=any_prompt", "workload.active_cameras=[true,true,false]"]
    policy = load_policy(overrides=[*SMALL, *workload, "attention=sdpa"])
    seen, noise = observation(policy)
    short = dataclasses.replace(seen, token_mask=torch.arange(48)[None] < 3)
    assert not torch.equal(policy.sample_actions(short, noise), policy.sample_actions(seen, noise))
    one = dataclasses.replace(seen, image_mask=torch.tensor([[False, True, False]]))
    assert policy.sample_actions(one, noise).isfinite().all()
    three = dataclasses.replace(seen, image_mask=torch.ones(1, 3, dtype=torch.bool))
    with pytest.raises(ValueError, match="camera 2, which active_cameras leaves out"):
        policy.sample_actions(three, noise)
    nothing = dataclasses.replace(
        seen, image_mask=torch.zeros(1, 3).bool(), token_mask=torch.zeros(1, 48).bool()
    )
    with pytest.raises(ValueError, match="nothing valid in element 0"):
        policy.sample_actions(nothing, noise)


@pytest.mark.parametrize(
    ("origin", "rope"),
    [
        ({}, "bfloat16"),
        ({"config": {"action_dim": 32}}, "bfloat16"),
        ({"prefix": "model."}, "float32"),
        ({"config": {"type": "pi0", "dtype": "float32"}}, "float32"),
        ({"prefix": "model.", "config": {"type": "pi0", "dtype": "bfloat16"}}, "bfloat16"),
    ],
)
def test_rotary_frequencies_are_those_of_the_checkpoints_origin(origin, rope, tmp_path):
    state = saved(tmp_path).state_dict()
    tensors = {origin.get("prefix", "") + name: t for name, t in state.items()}
    save_file(tensors, tmp_path / "model.safetensors")
    if "config" in origin:
        (tmp_path / "config.json").write_text(json.dumps(origin["config"]))
    policy = load_policy(checkpoint=tmp_path, overrides=SMALL[1:])
    assert policy.config.model.rope_frequencies == rope
    asked = load_policy(
        checkpoint=tmp_path, overrides=[*SMALL[1:], "++model.rope_frequencies=float32"]
    )
    assert asked.config.model.rope_frequencies == "float32"
