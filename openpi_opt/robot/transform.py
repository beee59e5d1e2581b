"""Raw observation -> the model's observation -> robot actions, in openpi's order of steps.

Letters: H horizon, A action dim, n dimensions of the robot's state or actions.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from openpi_opt.checkpoint_file import Family
from openpi_opt.observation import CAMERAS, Observation
from openpi_opt.robot import images
from openpi_opt.robot.spec import Gripper, Robot
from openpi_opt.robot.statistics import Floats, Statistics
from openpi_opt.robot.tokenizer import Tokenizer


class Transforms(NamedTuple):
    """Everything between a robot and a policy of one family."""

    robot: Robot
    family: Family
    statistics: Statistics
    tokenizer: Tokenizer
    action_dim: int

    def observation(self, raw: Mapping[str, Any]) -> tuple[Observation, Floats]:
        """A raw observation -> a batch of one, and the state [n] that actions may be relative to.
        Raises ValueError: names the key that is missing or is not what it must be."""
        robot = self.robot
        pictures, present = self._pictures(raw)
        state = _model_state(robot, _state(robot, raw))
        normalised = self.statistics.state.normalised(state)
        spoken = normalised if self.family in robot.discrete_state else None
        ids = self.tokenizer.ids(_prompt(robot, raw), spoken)
        padded = np.zeros((1, self.action_dim), np.float32)
        padded[0, : len(state)] = normalised
        tokens = np.asarray([ids], np.int64)
        observation = Observation(
            images=pictures[None],
            image_mask=present[None],
            tokens=tokens,
            token_mask=np.ones_like(tokens, dtype=bool),
            state=padded,
        )
        return observation, state

    def actions(self, normalised: Floats, state: Floats) -> np.ndarray[Any, np.dtype[np.float32]]:
        """The model's output [H, A] and the state [n] of `observation` -> [H, actions] float32."""
        robot = self.robot
        actions = self.statistics.actions.restored(normalised)
        relative = robot.relative(self.family)
        known = min(len(relative), len(state))
        actions[:, :known] += np.where(relative[:known], state[:known], 0.0)
        actions = actions[:, : robot.actions]
        if robot.signs is not None:
            actions = actions * robot.signs
        if robot.gripper is not None:
            closed, opened = robot.gripper.command
            dims = list(robot.gripper.dims)
            angle = actions[:, dims] + robot.gripper.angle[0]
            actions[:, dims] = (angle - closed) / (opened - closed)
        return actions.astype(np.float32)

    def _pictures(self, raw: Mapping[str, Any]) -> tuple[Any, Any]:
        """[C, 224, 224, 3] uint8, black where there is no camera, and [C] bool."""
        robot = self.robot
        pictures = np.zeros((len(CAMERAS), images.SIZE, images.SIZE, 3), np.uint8)
        present = np.zeros(len(CAMERAS), bool)
        for index, camera in enumerate(CAMERAS):
            key = robot.cameras.get(camera)  # type: ignore[call-overload]
            if key is None or (camera in robot.optional and _find(raw, key) is None):
                continue
            pictures[index] = images.prepared(key, _needed(raw, key))
            present[index] = True
        return pictures, present


def _find(raw: Mapping[str, Any], key: str) -> Any:
    """`raw["a/b"]`, or `raw["a"]["b"]`, or None."""
    if key in raw:
        return raw[key]
    value: Any = raw
    for part in key.split("/"):
        if not isinstance(value, Mapping) or part not in value:
            return None
        value = value[part]
    return value


def _needed(raw: Mapping[str, Any], key: str) -> Any:
    value = _find(raw, key)
    if value is None:
        given = ", ".join(sorted(str(name) for name in raw)) or "nothing"
        raise ValueError(f"the observation lacks {key}; it has {given}")
    return value


def _state(robot: Robot, raw: Mapping[str, Any]) -> Floats:
    parts = []
    for key, dims in robot.state.items():
        part = np.atleast_1d(np.asarray(_needed(raw, key)))
        if part.shape != (dims,) or part.dtype.kind not in "iuf":
            found = f"{part.dtype} {list(part.shape)}"
            raise ValueError(f"{key} is {found}; it must be a vector of {dims} numbers")
        if not np.isfinite(part).all():
            raise ValueError(f"{key}[{int(np.argmin(np.isfinite(part)))}] is not finite")
        parts.append(part.astype(np.float64))
    return np.concatenate(parts)


def _prompt(robot: Robot, raw: Mapping[str, Any]) -> str:
    prompt = _find(raw, robot.prompt)
    if prompt is None:
        prompt = robot.default_prompt
    if isinstance(prompt, np.ndarray | np.generic):
        prompt = prompt.item() if prompt.size == 1 else prompt
    if isinstance(prompt, bytes):
        prompt = prompt.decode()
    if not isinstance(prompt, str):
        raise ValueError(
            f"the observation's {robot.prompt} is {type(prompt).__name__}; it must be a text"
        )
    return prompt


def _model_state(robot: Robot, state: Floats) -> Floats:
    """The robot's state in the model's conventions."""
    if robot.signs is not None:
        state = state * np.asarray(robot.signs)
    if robot.gripper is not None:
        dims = list(robot.gripper.dims)
        state[dims] = _angle(robot.gripper, state[dims])
    return state


def _angle(gripper: Gripper, opening: Floats) -> Floats:
    """An opening in [0, 1] -> the angle of the crank in [0, 1] of `angle`."""
    low, high = gripper.travel
    metres = opening * (high - low) + low
    sine = (gripper.horn**2 + metres**2 - gripper.arm**2) / (2 * gripper.horn * metres)
    first, last = gripper.angle
    return np.asarray((np.arcsin(np.clip(sine, -1.0, 1.0)) - first) / (last - first))
