"""Raw observations and robot actions, against transcriptions of openpi's formulas."""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from robot_samples import libero, norm_stats

from openpi_opt.errors import UserError
from openpi_opt.robot import images, spec
from openpi_opt.robot.statistics import Scale, Statistics, read_openpi
from openpi_opt.robot.tokenizer import discretised
from openpi_opt.robot.transform import Transforms

EXACT = {"rtol": 1e-12, "atol": 1e-12}


class Letters:
    """Stands for a tokenizer: one id a letter, so that a test can read the prompt."""

    def ids(self, prompt: str, state: Any = None) -> list[int]:
        said = "" if state is None else "|" + " ".join(map(str, discretised(state)))
        return [ord(letter) for letter in prompt + said]


def statistics(tmp_path: Path, family: Any, state: int = 8, actions: int = 7) -> Statistics:
    file = tmp_path / "norm_stats.json"
    file.write_text(json.dumps(norm_stats(state, actions)))
    return read_openpi(file, family)


def transforms(
    tmp_path: Path, robot: str, family: Any, state: int = 8, actions: int = 7
) -> Transforms:
    stats = statistics(tmp_path, family, state, actions)
    return Transforms(spec.load(robot), family, stats, Letters(), 32)  # type: ignore[arg-type]


def raw(state: int, actions: int) -> tuple[dict[str, Any], dict[str, Any]]:
    content = norm_stats(state, actions)["norm_stats"]
    arrays = {k: {s: np.array(v) for s, v in e.items()} for k, e in content.items()}
    return arrays["state"], arrays["actions"]


def test_z_scores_are_openpis(tmp_path):
    """(x - mean) / (std + 1e-6), and back with mean 0 and deviation 1 where there is none."""
    stats, (state, actions) = statistics(tmp_path, "pi0"), raw(8, 7)
    x, y = np.linspace(-3, 3, 8), np.linspace(-2, 2, 2 * 32).reshape(2, 32)
    expected = (x - state["mean"]) / (state["std"] + 1e-6)
    np.testing.assert_allclose(stats.state.normalised(x), expected, **EXACT)
    mean = np.pad(actions["mean"], (0, 25))
    std = np.pad(actions["std"], (0, 25), constant_values=1.0)
    restored = stats.actions.restored(y)
    np.testing.assert_allclose(restored, y * (std + 1e-6) + mean, rtol=1e-5, atol=5e-6)
    known = y[:, :7] * (actions["std"] + 1e-6) + actions["mean"]
    np.testing.assert_allclose(restored[:, :7], known, **EXACT)


def test_quantiles_are_openpis(tmp_path):
    """2 (x - q01) / (q99 - q01 + 1e-6) - 1; what has no statistics stays as it is."""
    stats, (state, actions) = statistics(tmp_path, "pi05"), raw(8, 7)
    x, y = np.linspace(-3, 3, 8), np.linspace(-2, 2, 2 * 32).reshape(2, 32)
    expected = (x - state["q01"]) / (state["q99"] - state["q01"] + 1e-6) * 2.0 - 1.0
    np.testing.assert_allclose(stats.state.normalised(x), expected, **EXACT)
    width = actions["q99"] - actions["q01"] + 1e-6
    expected = np.concatenate([(y[:, :7] + 1) / 2 * width + actions["q01"], y[:, 7:]], axis=1)
    np.testing.assert_allclose(stats.actions.restored(y), expected, **EXACT)


def test_vectors_shorter_than_the_statistics_use_the_first(tmp_path):
    stats = statistics(tmp_path, "pi0")
    x = np.linspace(-3, 3, 8)
    assert np.array_equal(stats.state.normalised(x[:5]), stats.state.normalised(x)[:5])


@pytest.mark.parametrize("size", [(240, 320), (480, 270), (100, 100), (1, 500), (224, 224)])
def test_images_are_resized_as_openpis_client_does(size):
    """By PIL's bilinear filter to the larger side, centred on black."""
    height, width = size
    image = np.random.default_rng(0).integers(0, 256, (*size, 3), dtype=np.uint8)
    ratio = max(width / 224, height / 224)
    rows, columns = math.floor(height / ratio), math.floor(width / ratio)
    out = images.prepared("image", image)
    assert out.shape == (224, 224, 3)
    if not rows:  # openpi's own fails for a picture that is narrower than a pixel
        return
    picture = Image.new("RGB", (224, 224))
    scaled = Image.fromarray(image).resize((columns, rows), Image.Resampling.BILINEAR)
    picture.paste(scaled, ((224 - columns) // 2, (224 - rows) // 2))
    assert np.array_equal(out, np.asarray(picture))
    assert np.array_equal(images.prepared("image", image.transpose(2, 0, 1)), out)


@pytest.mark.parametrize(
    ("image", "words"),
    [
        (np.zeros((4, 4)), "shape"),
        (np.zeros((4, 4, 4), np.uint8), "shape"),
        (np.full((4, 4, 3), np.nan), "values from nan"),
        (np.full((4, 4, 3), 255.0), "to 255"),
        (np.zeros((4, 4, 3), np.int64), "int64"),
        ("picture.png", "shape"),
    ],
)
def test_what_is_no_image_is_refused_by_name(image, words):
    with pytest.raises(ValueError, match=f"wrist .*{words}"):
        images.prepared("wrist", image)


def test_floats_are_cut_to_whole_steps():
    half = np.full((224, 224, 3), 0.5, np.float32)
    assert np.array_equal(images.prepared("image", half), np.full((224, 224, 3), 127))


def test_states_are_discretised_as_openpis():
    """256 bins of width 1/128 from -1 on."""
    values = np.array([-1.5, -1.0, -0.9999, 0.0, 1 / 128, 0.99, 1.0, 7.0])
    expected = np.clip(np.floor((values + 1) * 128), -1, 255)
    assert discretised(values).tolist() == expected.tolist()


def test_libero_of_pi0(tmp_path):
    """Six of seven actions are relative to the state; the third camera is black and masked."""
    made, sample = transforms(tmp_path, "libero", "pi0"), libero()
    seen, state = made.observation(sample)
    assert seen.image_mask.tolist() == [[True, True, False]]
    assert not np.asarray(seen.images)[0, 2].any()
    stats, (_, actions) = made.statistics, raw(8, 7)
    normalised = stats.state.normalised(sample["observation/state"])
    np.testing.assert_allclose(np.asarray(seen.state)[0], np.pad(normalised, (0, 24)), rtol=1e-6)
    assert bytes(seen.tokens[0].tolist()).decode() == "pick up the black bowl"
    output = np.random.default_rng(3).normal(size=(10, 32))
    expected = output[:, :7] * (actions["std"] + 1e-6) + actions["mean"]
    expected[:, :6] += sample["observation/state"][:6]
    found = made.actions(output, state)
    assert (found.shape, found.dtype) == ((10, 7), np.float32)
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)


def test_libero_of_pi05_is_absolute_and_does_not_say_its_state(tmp_path):
    made = transforms(tmp_path, "libero", "pi05")
    seen, state = made.observation(libero())
    assert "|" not in "".join(map(chr, seen.tokens[0].tolist()))
    output = np.zeros((10, 32))
    actions = raw(8, 7)[1]
    expected = 0.5 * (actions["q99"] - actions["q01"] + 1e-6) + actions["q01"]
    np.testing.assert_allclose(made.actions(output, state)[0], expected, rtol=1e-5)


def test_droid_says_its_state_in_the_prompt_of_pi05(tmp_path):
    made = transforms(tmp_path, "droid", "pi05", actions=8)
    sample = {
        "observation/exterior_image_1_left": np.zeros((3, 180, 320), np.uint8),
        "observation/wrist_image_left": np.zeros((180, 320, 3), np.float32),
        "observation/joint_position": np.linspace(-1, 1, 7),
        "observation/gripper_position": 0.5,
        "prompt": np.asarray("do something"),
    }
    seen, state = made.observation(sample)
    joined = np.append(sample["observation/joint_position"], 0.5)
    assert state.tolist() == joined.tolist()
    q = raw(8, 8)[0]
    normalised = (joined - q["q01"]) / (q["q99"] - q["q01"] + 1e-6) * 2 - 1
    steps = np.clip(np.floor((normalised + 1) * 128), -1, 255).astype(int)
    numbers = " ".join(map(str, steps))
    assert bytes(seen.tokens[0].tolist()).decode() == f"do something|{numbers}"
    assert made.actions(np.zeros((15, 32)), state).shape == (15, 8)


def test_aloha_turns_joints_and_measures_grippers_as_the_base_model(tmp_path):
    made = transforms(tmp_path, "aloha", "pi0", state=14, actions=14)
    state = np.linspace(0.05, 0.9, 14)
    sample = {
        "state": state,
        "images": {"cam_high": np.zeros((3, 480, 640), np.uint8)},
        "prompt": "fold",
    }
    seen, found = made.observation(sample)
    assert seen.image_mask.tolist() == [[True, False, False]]
    turns = np.ones(14)
    turns[[1, 2, 8, 9]] = -1
    expected = state * turns
    for dim in (6, 13):
        metres = state[dim] * (0.058 - 0.01844) + 0.01844
        angle = math.asin((0.022**2 + metres**2 - 0.036**2) / (2 * 0.022 * metres))
        expected[dim] = (angle - 0.5476) / (1.6296 - 0.5476)
    np.testing.assert_allclose(found, expected, **EXACT)
    assert sample["state"] is state
    assert state[1] > 0
    output = np.random.default_rng(0).normal(size=(50, 32))
    actions = raw(14, 14)[1]
    model = output[:, :14] * (actions["std"] + 1e-6) + actions["mean"]
    joints = [dim for dim in range(14) if dim not in (6, 13)]
    model[:, joints] += expected[joints]
    model *= turns
    for dim in (6, 13):
        model[:, dim] = (model[:, dim] + 0.5476 + 0.6213) / (1.4910 + 0.6213)
    np.testing.assert_allclose(made.actions(output, found), model, rtol=1e-5, atol=1e-6)
    assert made.robot.metadata == {"reset_pose": [0, -1.5, 1.5, 0, 0, 0]}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"prompt": None}, "prompt is NoneType"),
        ({"prompt": 5}, "prompt is int"),
        ({"observation/state": None}, "lacks observation/state; it has observation/image"),
        ({"observation/state": np.array([0, np.nan] * 4)}, r"observation/state\[1\] is not finite"),
        ({"observation/state": "open"}, "must be a vector of 8"),
        ({"observation/state": np.zeros(33)}, "must be a vector of 8"),
        ({"observation/image": np.zeros((0, 5, 3), np.uint8)}, "observation/image has shape"),
    ],
)
def test_what_a_robot_does_not_send_is_refused_by_name(change, words, tmp_path):
    sample = {k: v for k, v in {**libero(), **change}.items() if v is not None}
    with pytest.raises(ValueError, match=words):
        transforms(tmp_path, "libero", "pi0").observation(sample)


def test_a_robot_of_ones_own_is_a_small_file(tmp_path):
    file = tmp_path / "mine.yaml"
    file.write_text("cameras: {base_0_rgb: top}\nstate: {arm: 2, hand: 1}\nactions: 3\n")
    robot = spec.load(str(file))
    untouched = Scale(np.zeros(0), np.ones(0), 0.0)
    stats = Statistics(untouched, untouched, file)
    made = Transforms(robot, "pi0", stats, Letters(), 32)  # type: ignore[arg-type]
    top = np.zeros((9, 9, 3), np.uint8)
    seen, state = made.observation({"top": top, "arm": [1, 2], "hand": 3.0, "prompt": "go"})
    assert state.tolist() == [1, 2, 3]
    assert seen.image_mask.tolist() == [[True, False, False]]
    assert made.actions(np.ones((2, 32)), state).tolist() == [[1, 1, 1], [1, 1, 1]]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("cameras: {base_0_rgb: top}\nstate: {arm: 2}\n", "actions .* required"),
        ("cameras: {top: base_0_rgb}\nstate: {arm: 2}\nactions: 3\n", "cameras.top"),
        ("cameras: {base_0_rgb: top}\nstate: {arm: 2}\nactions: 3\nspeed: 2\n", "speed"),
        ("cameras: [", "cannot be read"),
        ("- 1\n", "the file"),
    ],
)
def test_a_file_that_is_no_robot_says_why(text, words, tmp_path):
    (tmp_path / "mine.yaml").write_text(text)
    with pytest.raises(UserError, match=words):
        spec.load(str(tmp_path / "mine.yaml"))


def test_unknown_robots_are_named_with_those_that_there_are():
    with pytest.raises(UserError, match="aloha, droid, libero"):
        spec.load("spot")
