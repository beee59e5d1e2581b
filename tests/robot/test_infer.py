"""`policy.infer`: from checkpoint folders in the formats of openpi and LeRobot to robot actions."""

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from robot_samples import lerobot_folder, libero, openpi_folder, tokenizer

import openpi_opt
from openpi_opt.errors import UserError
from openpi_opt.robot.tokenizer import Tokenizer

pytest.importorskip("sentencepiece", reason="prompts need openpi_opt[robot]")

pytestmark = pytest.mark.usefixtures("home_of_our_own")

SMALL = ["platform=cpu", "workload.steps=2", "workload=openpi", "workload.horizon=4"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path: Path = tmp_path_factory.mktemp("small")
    openpi_folder(path / "openpi")
    lerobot_folder(path / "lerobot")
    openpi_folder(path / "openpi05", "pi05_mini")
    tokenizer(path / "tokenizer.model")
    return path


def loaded(folder: Path, name: str, **arguments: Any) -> openpi_opt.ReadyPolicy:
    arguments = {"robot": "libero", "tokenizer": folder / "tokenizer.model", **arguments}
    path = folder / name
    return openpi_opt.load_policy(checkpoint=path, overrides=SMALL, verify=False, **arguments)


@pytest.mark.parametrize("name", ["openpi", "lerobot", "openpi05"])
def test_raw_observation_to_actions(name, folder):
    policy = loaded(folder, name)
    noise = np.random.default_rng(0).normal(size=(1, 4, 32)).astype(np.float32)
    answer = policy.infer(libero(), noise)
    assert answer["actions"].shape == (4, 7)
    assert np.isfinite(answer["actions"]).all()
    timing = answer["policy_timing"]
    assert set(timing) == {"infer_ms", "model_ms", "transform_ms", "upload_ms", "download_ms"}
    assert all(value >= 0 for value in timing.values())
    assert np.array_equal(policy.infer(libero(), noise)["actions"], answer["actions"])
    other = {**libero(), "prompt": "open the drawer"}
    assert not np.array_equal(policy.infer(other, noise)["actions"], answer["actions"])


def test_openpi_and_lerobot_differ_by_rotary_frequencies_and_epsilon_alone(folder):
    noise = np.random.default_rng(0).normal(size=(1, 4, 32)).astype(np.float32)
    ours = [loaded(folder, name) for name in ("openpi", "lerobot")]
    assert [p.config.model.rope_frequencies for p in ours] == ["bfloat16", "float32"]
    first, second = (p.infer(libero(), noise)["actions"] for p in ours)
    assert 0 < np.abs(first - second).max() < 0.05 * np.abs(first).max()


def test_prompts_are_written_as_openpis(folder):
    ours = Tokenizer(folder / "tokenizer.model")
    model = ours.model
    assert ours.ids(" pick_up\nthe bowl ") == [
        2, *model.encode("pick up the bowl"), *model.encode("\n")
    ]  # fmt: skip
    spoken = ours.ids("go", np.array([-1.0, 0.0, 0.5]))
    assert spoken == [2, *model.encode("Task: go, State: 0 128 192;\nAction: ")]


def test_prompts_longer_than_the_slots_are_refused(folder):
    policy = loaded(folder, "openpi")
    with pytest.raises(ValueError, match="this policy has 48 prompt slots"):
        policy.infer({**libero(), "prompt": "bowl " * 50})


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"tokenizer": None}, "needs tokenizer=FILE"),
        ({"tokenizer": "nowhere.model"}, "no such file"),
        ({"robot": None}, "belong to a robot"),
        ({"robot": "spot"}, "robot=spot is not known"),
    ],
)
def test_what_is_missing_is_said(arguments, words, folder):
    with pytest.raises(UserError, match=words):
        loaded(folder, "openpi", **arguments)


def test_a_file_that_is_no_tokenizer_is_refused(folder, tmp_path):
    (tmp_path / "text.model").write_text("hello")
    with pytest.raises(UserError, match="no SentencePiece model"):
        loaded(folder, "openpi", tokenizer=tmp_path / "text.model")


def test_statistics_are_found_or_named(folder, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(folder / "openpi", copy)
    (copy / "assets/physical-intelligence").rename(copy / "assets/mine")
    loaded(tmp_path, "copy", tokenizer=folder / "tokenizer.model")
    shutil.copytree(copy / "assets/mine", copy / "assets/yours")
    with pytest.raises(UserError, match=r"there: mine/libero, yours/libero"):
        loaded(tmp_path, "copy", tokenizer=folder / "tokenizer.model")
    file = copy / "assets/mine/libero/norm_stats.json"
    loaded(tmp_path, "copy", tokenizer=folder / "tokenizer.model", norm_stats=file)
    file.write_text('{"norm_stats": {"state": {}}}')
    with pytest.raises(UserError, match="lacks what a pi0 policy needs: 'mean'"):
        loaded(tmp_path, "copy", tokenizer=folder / "tokenizer.model", norm_stats=file)


def test_infer_needs_a_robot():
    policy = openpi_opt.load_policy(overrides=["model=pi0_mini", *SMALL], verify=False)
    with pytest.raises(UserError, match="robot='libero'"):
        policy.infer(libero())


def test_actions_that_are_not_finite_reach_no_robot(folder):
    policy = loaded(folder, "openpi")
    call = policy.call
    policy.call = lambda inputs: call(inputs) * torch.nan  # type: ignore[method-assign]
    with pytest.raises(ValueError, match="not finite"):
        policy.infer(libero())
