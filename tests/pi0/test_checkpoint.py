"""Checkpoints: names there and back, both families, and everything that is refused."""

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from openpi_opt.pi0 import checkpoint
from openpi_opt.pi0.checkpoint import CheckpointError, load, save
from openpi_opt.pi0.config import GemmaConfig, Pi0Config, VisionConfig
from openpi_opt.pi0.policy import Pi0Policy
from openpi_opt.pi0.weights import build, init_random

TINY = Pi0Config(
    name="tiny",
    vision=VisionConfig(width=24, depth=1, heads=2, mlp_width=20, image_size=28),
    language=GemmaConfig(width=32, depth=1, heads=2, kv_heads=1, head_dim=16, mlp_width=24),
    expert=GemmaConfig(width=24, depth=1, heads=2, kv_heads=1, head_dim=16, mlp_width=24),
    vocab_size=10,
)
NORM = "paligemma_with_expert.gemma_expert.model.norm.weight"
W = "paligemma_with_expert."


TINY_PI05 = dataclasses.replace(TINY, name="tiny_pi05", family="pi05")


def filled(seed: int = 0, config: Pi0Config = TINY) -> Pi0Policy:
    policy = build(config, "cpu")
    init_random(policy, seed)
    return policy


def assert_same(policy: Pi0Policy, tensors: dict[str, Tensor]) -> None:
    state = policy.state_dict()
    assert state.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert torch.equal(state[name], tensor), name


@pytest.fixture
def tensors():
    return {name: tensor.clone() for name, tensor in filled().state_dict().items()}


def test_saved_files_have_openpis_names_and_load_again(tmp_path):
    policy = filled()
    save(policy, tmp_path / "model.safetensors")
    assert_same(policy, load_file(tmp_path / "model.safetensors"))
    with safe_open(tmp_path / "model.safetensors", framework="pt") as file:
        assert file.metadata()[checkpoint.EMBEDDING] == checkpoint.TIED
    for path in (tmp_path, tmp_path / "model.safetensors", str(tmp_path)):
        other = filled(seed=1)
        load(other, path)
        assert_same(other, policy.state_dict())
    assert [file.name for file in tmp_path.iterdir()] == ["model.safetensors"]


@pytest.mark.parametrize("prefix", ["", "model."], ids=["openpi", "LeRobot"])
def test_files_of_pi05(tmp_path, prefix, tensors):
    stored = {name: t.clone() for name, t in filled(config=TINY_PI05).state_dict().items()}
    save_file({prefix + name: t for name, t in stored.items()}, tmp_path / "model.safetensors")
    policy = filled(seed=1, config=TINY_PI05)
    load(policy, tmp_path)
    assert_same(policy, stored)
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"is a pi0 checkpoint \(it has \w+.*model=pi0"):
        load(policy, tmp_path)
    assert_same(policy, stored)
    del stored["time_mlp_out.bias"]
    save_file({prefix + name: t for name, t in stored.items()}, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"1 missing: time_mlp_out\.bias"):
        load(policy, tmp_path)


def test_saving_keeps_the_old_file_when_it_fails(tmp_path, monkeypatch):
    path = tmp_path / "model.safetensors"
    path.write_bytes(b"old")

    def fail(*args: object, **kwargs: object) -> None:
        raise OSError("no space left")

    monkeypatch.setattr(checkpoint, "save_file", fail)
    with pytest.raises(OSError, match="no space"):
        save(filled(), path)
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_values_take_the_dtype_of_the_policy(tmp_path, tensors):
    stored = {name: tensor.bfloat16() for name, tensor in tensors.items()}
    stored[NORM] = tensors[NORM].double()
    save_file(stored, tmp_path / "model.safetensors")
    policy = filled(seed=1)
    load(policy, tmp_path)
    assert_same(policy, {name: tensor.float() for name, tensor in stored.items()})


def legacy(name: str) -> str:
    """The names that LeRobot 0.3 gave, by the nesting of its modules."""
    name = name.replace(W + "paligemma.lm_head.", W + "paligemma.language_model.lm_head.")
    name = name.replace("paligemma.model.language_model.", "paligemma.language_model.model.")
    name = name.replace("paligemma.model.vision_tower.", "paligemma.vision_tower.")
    return "model." + name.replace("paligemma.model.multi_modal", "paligemma.multi_modal")


STATISTICS = (
    "normalize_inputs.buffer_observation_state.mean",
    "normalize_targets.buffer_action.std",
)


@pytest.mark.parametrize(
    "renamed",
    [lambda name: "model." + name, legacy, lambda name: name.replace(".vision_model.", ".")],
    ids=["LeRobot", "LeRobot 0.3", "transformers 5"],
)
def test_names_of_other_programs_load(tmp_path, tensors, renamed):
    """Without the statistics that LeRobot 0.3 kept with the policy."""
    stored = {renamed(name): tensor for name, tensor in tensors.items()}
    assert stored.keys() != tensors.keys()
    if renamed is legacy:
        stored |= {name: torch.zeros(7) for name in STATISTICS}
    save_file(stored, tmp_path / "model.safetensors")
    policy = filled(seed=1)
    load(policy, tmp_path)
    assert_same(policy, tensors)
    if renamed is legacy:
        return
    stored[renamed(checkpoint.EMBEDDING)] = tensors[checkpoint.TIED] + 1
    save_file(stored, tmp_path / "model.safetensors")
    load(policy, tmp_path)
    assert_same(policy, tensors | {checkpoint.TIED: tensors[checkpoint.TIED] + 1})


def write_shards(folder: Path, tensors: dict[str, Tensor]) -> None:
    names = sorted(tensors)
    weight_map = {name: f"model-{index % 3}.safetensors" for index, name in enumerate(names)}
    for shard in set(weight_map.values()):
        part = {name: tensors[name] for name in names if weight_map[name] == shard}
        save_file(part, folder / shard)
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def test_sharded_checkpoints_load(tmp_path, tensors):
    write_shards(tmp_path, tensors)
    for path in (tmp_path, tmp_path / "model.safetensors.index.json"):
        policy = filled(seed=1)
        load(policy, path)
        assert_same(policy, tensors)


Change = Callable[[dict[str, Tensor]], None]


def renamed(tensors: dict[str, Tensor]) -> None:
    tensors["surprise"] = tensors.pop(NORM)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda tensors: tensors.pop(NORM), rf"1 missing: {NORM}\."),
        (lambda tensors: tensors.update(surprise=torch.zeros(2)), "1 unexpected: surprise"),
        (renamed, rf"1 missing: {NORM}; 1 unexpected: surprise"),
        (
            lambda tensors: tensors.update({NORM: torch.zeros(25)}),
            rf"1 of another shape: {NORM} \[25\] instead of \[24\]",
        ),
        (
            lambda tensors: tensors.update({NORM: torch.zeros(24, dtype=torch.int32)}),
            rf"no float: {NORM} I32",
        ),
        (
            lambda tensors: tensors.update({"model." + NORM: torch.zeros(24)}),
            rf"holds {NORM} twice",
        ),
        (
            lambda tensors: tensors.update({"time_mlp_in.weight": torch.zeros(2, 2)}),
            r"is a pi05 checkpoint \(it has time_mlp_in\.weight\).* Choose model=pi05",
        ),
        (
            lambda tensors: tensors.update(
                {"model." + NORM.replace("weight", "dense.weight"): torch.zeros(2, 2)}
            ),
            "pi05",
        ),
        (lambda tensors: tensors.clear(), r"\d+ missing: .*, .*, .*, \.\.\."),
    ],
)
def test_misfits_are_named_and_change_nothing(tmp_path, tensors, change, message):
    change(tensors)
    save_file(tensors, tmp_path / "model.safetensors")
    policy = filled(seed=1)
    before = {name: tensor.clone() for name, tensor in policy.state_dict().items()}
    with pytest.raises(CheckpointError, match=message) as caught:
        load(policy, tmp_path)
    assert str(tmp_path) in str(caught.value)
    assert len(str(caught.value).splitlines()) <= 3
    assert_same(policy, before)


def test_a_truncated_file_is_reported(tmp_path):
    path = tmp_path / "model.safetensors"
    save(filled(), path)
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(CheckpointError, match="not a complete safetensors file"):
        load(filled(), path)
