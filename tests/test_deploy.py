from pathlib import Path

import pytest
import torch

import openpi_opt
from openpi_opt import Observation, preset, runtime
from openpi_opt.config import Config
from openpi_opt.errors import UserError
from openpi_opt.pi0 import checkpoint, weights
from openpi_opt.pi0.config import MODELS, PI0_MINI, PI05_MINI
from openpi_opt.pi0.workload import make_inputs

SDPA = {"attention": {"vision": "sdpa", "prefill": "sdpa", "denoise": "sdpa"}}
SMALL = ["model=pi0_mini", "platform=cpu", "workload.steps=2", "workload.horizon=4"]


def observation(policy: openpi_opt.ReadyPolicy) -> tuple[Observation, torch.Tensor]:
    workload = runtime.workload_of(policy.config)
    inputs = make_inputs(workload, PI0_MINI, 5, "cpu")
    return Observation(*inputs[:5]), inputs.noise


@pytest.fixture
def presets(tmp_path: Path) -> Path:
    cfg = Config.parse({**SDPA, "precision": {"dtype": "float32"}})
    workload = {"horizon": 4, "steps": 2, "active_cameras": [True, True, False]}
    provenance = {
        "study": "s",
        "model": {"name": "pi0_mini"},
        "workload": Config.parse({"workload": workload}).workload.model_dump(mode="json"),
    }
    preset.write(tmp_path / "fast.yaml", cfg, provenance)
    return tmp_path


def test_a_preset_gives_the_actions_of_the_plain_policy(presets: Path) -> None:
    policy = openpi_opt.load_policy("fast", preset_dir=presets, overrides=["platform=cpu"])
    plain = openpi_opt.load_policy(overrides=[*SMALL, "precision=float32"])
    seen, noise = observation(policy)
    actions = policy.sample_actions(seen, noise)
    assert actions.shape == (1, 4, 32)
    torch.testing.assert_close(actions, plain.sample_actions(seen, noise), rtol=1e-4, atol=1e-5)


def test_noise_is_drawn_when_none_is_given() -> None:
    policy = openpi_opt.load_policy(overrides=SMALL)
    seen, _ = observation(policy)
    assert (policy.sample_actions(seen) - policy.sample_actions(seen)).abs().max() > 1e-3


def test_masks_other_than_promised_are_refused(presets: Path) -> None:
    policy = openpi_opt.load_policy("fast", preset_dir=presets, overrides=["platform=cpu"])
    seen, noise = observation(policy)
    three = Observation(
        seen.images, torch.ones(1, 3, dtype=torch.bool), seen.tokens, seen.token_mask, seen.state
    )
    with pytest.raises(ValueError, match="was built for Layout"):
        policy.sample_actions(three, noise)


def test_wrong_shapes_are_named() -> None:
    policy = openpi_opt.load_policy(overrides=SMALL)
    seen, noise = observation(policy)
    with pytest.raises(ValueError, match=r"noise has shape \[1, 3, 32\]; .* \[1, 4, 32\]"):
        policy.sample_actions(seen, noise[:, :3])


def test_openpi_observations() -> None:
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
    assert seen.images.shape == (1, 3, 3, 224, 224)
    assert seen.image_mask.tolist() == [[True, True, False]]
    assert seen.images[0, 0, 2, 7, 9] == pixels[0, 7, 9, 2] / 255.0 * 2 - 1
    with pytest.raises(ValueError, match=r"lacks state, image\.base_0_rgb"):
        Observation.from_openpi({"image": {}, "tokenized_prompt": 0, "tokenized_prompt_mask": 0})


def test_a_checkpoint_of_another_model_is_refused(tmp_path: Path) -> None:
    """With a checkpoint the model is pi0: the small one's file does not fit."""
    policy = weights.build(PI0_MINI, "cpu")
    weights.init_random(policy, 0)
    checkpoint.save(policy, tmp_path / "model.safetensors")
    cfg = Config.parse(
        {"model": {"name": "pi0_mini"}, "weights": {"kind": "checkpoint", "path": str(tmp_path)}}
    )
    loaded = runtime.build_policy(cfg, torch.device("cpu"))
    for name, tensor in policy.state_dict().items():
        torch.testing.assert_close(loaded.state_dict()[name], tensor)


def test_the_checkpoint_says_which_model_it_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Full models do not fit here: under their names stand the small ones."""
    monkeypatch.setitem(MODELS, "pi0", PI0_MINI)
    monkeypatch.setitem(MODELS, "pi05", PI05_MINI)
    overrides = ["platform=cpu", "workload.steps=2", "workload.horizon=4", "precision=float32"]
    for model in (PI0_MINI, PI05_MINI):
        saved = weights.build(model, "cpu", steps=2)
        weights.init_random(saved, 1)
        checkpoint.save(saved, tmp_path / "model.safetensors")
        policy = openpi_opt.load_policy(checkpoint=tmp_path, overrides=overrides)
        assert policy.config.model.name == model.family
        seen, noise = observation(policy)
        inputs = make_inputs(runtime.workload_of(policy.config), model, 5, "cpu")
        torch.testing.assert_close(policy.sample_actions(seen, noise), saved.sample_actions(inputs))


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"preset": "nowhere"}, "nowhere"),
        ({"preset": "../up"}, "preset name"),
        ({"checkpoint": "model.pt"}, "pickles"),
        ({"overrides": ["attention=warp"]}, "warp"),
        ({"overrides": ["attention=aiter", *SMALL]}, "unavailable"),
        ({"overrides": ["graph=manual", *SMALL]}, "unavailable"),
    ],
)
def test_what_cannot_be_loaded_says_why(arguments: dict, words: str) -> None:
    with pytest.raises(UserError, match=words):
        openpi_opt.load_policy(**arguments)
