"""What a robot sends and takes, as data: `conf/robot/*.yaml` or a file of the user's.

The keys say what openpi's robot policies and data configurations do in code
(Physical-Intelligence/openpi, `policies/*_policy.py` and `training/config.py`).
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import yaml
from numpy.typing import NDArray
from pydantic import Field, ValidationError, model_validator

from openpi_opt.checkpoint_file import Family
from openpi_opt.config import Section
from openpi_opt.errors import UserError, first_reason
from openpi_opt.paths import conf_dir, user_conf_dir

_MOST = 32  # dimensions of the model's state and actions
Camera = Literal["base_0_rgb", "left_wrist_0_rgb", "right_wrist_0_rgb"]


class Gripper(Section):
    """A linear gripper for a model that was trained on angles (ALOHA's for pi0).

    state: an opening in [0, 1] becomes metres of `travel`, by the crank (`arm` and `horn`, metres)
    an angle, and by `angle` (radians) again [0, 1]. Actions: the model's angle, from the first of
    `angle` on, becomes [0, 1] of `command` (radians).
    """

    dims: tuple[int, ...]
    travel: tuple[float, float]
    arm: float = Field(gt=0)
    horn: float = Field(gt=0)
    angle: tuple[float, float]
    command: tuple[float, float]


class Robot(Section):
    """One kind of robot.

    `cameras`: where each of the model's cameras is in an observation; `a/b` is `observation["a/b"]`
    or `observation["a"]["b"]`. A camera that is left out, or is in `optional` and absent, is black
    and masked. `state`: the vectors that make up the state, in order, with their lengths.
    `actions`: how many leading dimensions are the robot's. `delta`: runs of dimensions for each
    family, positive where the model's actions are relative to the state, negative where they are
    absolute: [6, -1]. `discrete_state`: families whose prompt says the state. `asset_id`: folder
    of the statistics below `assets/` of a checkpoint. `signs` turn joints, of state and actions
    alike. `metadata` is what a server tells its clients.
    """

    cameras: dict[Camera, str] = Field(min_length=1)
    optional: tuple[Camera, ...] = ()
    state: dict[str, Annotated[int, Field(ge=1)]] = Field(min_length=1)
    prompt: str = "prompt"
    default_prompt: str | None = None
    actions: int = Field(ge=1)
    delta: dict[Family, tuple[int, ...]] = Field(default_factory=dict)
    discrete_state: tuple[Family, ...] = ("pi05",)
    asset_id: str | None = None
    signs: tuple[Literal[1, -1], ...] | None = None
    gripper: Gripper | None = None
    metadata: dict[str, Any] = Field(default_factory=dict)

    @model_validator(mode="after")
    def _agrees(self) -> Robot:
        unknown = set(self.optional) - set(self.cameras)
        if unknown:
            raise ValueError(f"optional names {', '.join(sorted(unknown))}, not among cameras")
        dims = sum(self.state.values())
        if dims > _MOST or self.actions > _MOST:
            raise ValueError(f"state has {dims} dimensions and actions {self.actions}, of {_MOST}")
        if self.signs is not None and {dims, self.actions} != {len(self.signs)}:
            raise ValueError(f"{len(self.signs)} signs for a state of {dims} dimensions")
        return self

    def relative(self, family: Family) -> NDArray[np.bool_]:
        """Which leading dimensions of the actions are relative to the state -> [n] bool."""
        runs = self.delta.get(family, ())
        return np.concatenate([np.full(abs(n), n > 0) for n in runs] or [np.zeros(0, bool)])


def load(name: str) -> Robot:
    """The robot called `name` in `conf/robot` (the working folder's first), or in a YAML file.
    Raises UserError: there is none, or the file is not one."""
    file = _find(name)
    try:
        content = yaml.safe_load(file.read_text(encoding="utf-8"))
        return Robot.model_validate(content)
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise UserError(f"robot={name}: {file} cannot be read: {error}") from error
    except ValidationError as error:
        key = ".".join(map(str, error.errors()[0]["loc"])) or "the file"
        raise UserError(f"robot={name}: {key} in {file}: {first_reason(error)}") from error


def _find(name: str) -> Path:
    if name.endswith((".yaml", ".yml")):
        file = Path(name).expanduser()
        if file.is_file():
            return file
        raise UserError(f"robot={name}: there is no such file.")
    folders = (user_conf_dir() / "robot", conf_dir() / "robot")
    known = {file.stem: file for folder in reversed(folders) for file in folder.glob("*.yaml")}
    if name not in known:
        raise UserError(
            f"robot={name} is not known; there are {', '.join(sorted(known))}, or give the path of "
            "a YAML file of your own."
        )
    return known[name]
