"""What the guard asks a candidate: inputs in a fixed order, each of which provokes a kind of error.

Independent noise triggers no shortcut that depends on the data. So these are, in this order:

- `ordinary`: independent random batches, `guard.inputs` of them;
- `next patch`, `next frame`: the last ordinary batch a moment later, with one other patch for each
  camera, then with a slight change of every pixel;
- `other noise`: the same observation with another noise to start from;
- `black`, `white and grey`: frames without content, which are not masked;
- `other masks`: rows of one batch with different cameras and prompt lengths, for policies that were
  built for no layout or a flexible one, and so claim to read the masks. The first has cameras that
  the workload leaves out;
- `recorded`: the user's observations, `guard.observations`.

Letters: B batch, C cameras, L prompt slots, H horizon, A action dim.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from openpi_opt.errors import UserError
from openpi_opt.pi0.config import Pi0Config
from openpi_opt.pi0.inputs import Inputs, Layout
from openpi_opt.pi0.workload import Workload, make_inputs

TIMED = 6  # timed calls that are compared with the reference, the last one among them
PIXEL_STEP = 0.02  # of a pixel between two frames, of a range of 2
PATCH = 14  # pixels
RECORDED = 4  # of the user's batches
_TIMED_SEEDS, _OTHER_SEEDS = 2_000_003, 3_000_017  # away from those of workloads and calibration


@dataclass(frozen=True)
class Case:
    """One question; `ordinary` ones decide the tolerance of all. The tensors are on the host."""

    name: str
    inputs: Inputs
    ordinary: bool = False

    def admitted(self, layout: Layout | None) -> bool:
        """Whether a policy that was built for `layout` claims to answer it."""
        if layout is None:
            return True
        try:
            return layout.refusal(self.inputs.image_mask, self.inputs.token_mask) is None
        except ValueError:  # rows with masks of their own
            return False


def cases(
    workload: Workload, config: Pi0Config, seed: int, count: int, observations: str | None = None
) -> list[Case]:
    """All cases of a workload; `count` of them are ordinary.

    Raises:
        UserError: `observations` names a file that does not fit the workload.
    """
    ordinary = [make_inputs(workload, config, seed + i, "cpu") for i in range(count)]
    other = make_inputs(workload, config, seed + _OTHER_SEEDS, "cpu")
    first, last = ordinary[0], ordinary[-1]
    found = [Case(f"ordinary {i}", item, True) for i, item in enumerate(ordinary)]
    found += [
        Case("next patch", next_patch(last, other)),
        Case("next frame", next_frame(last, other)),
        Case("other noise", first._replace(noise=other.noise)),
        Case("black", with_frames(other, [-1.0], last)),
        Case("white and grey", with_frames(other, [1.0, 0.0], first)),
    ]
    if sum(workload.active_cameras) == 1:
        found.append(Case("grey", with_frames(other, [0.0], first)))
    everything = tuple(True for _ in workload.active_cameras)
    for i, cameras in enumerate((everything, workload.active_cameras, workload.active_cameras)):
        inputs = make_inputs(workload, config, seed + _OTHER_SEEDS + 1 + i, "cpu")
        found.append(Case(f"other masks {i}", masked(inputs, i, cameras)))
    if observations is not None:
        found += recorded(Path(observations), workload, config, other.noise)
    return found


def timed_inputs(workload: Workload, config: Pi0Config, seed: int) -> list[Inputs]:
    """The contents of the timed calls that are compared; no call before them has seen any."""
    seeds = range(seed + _TIMED_SEEDS, seed + _TIMED_SEEDS + TIMED)
    return [make_inputs(workload, config, item, "cpu") for item in seeds]


def next_frame(inputs: Inputs, other: Inputs) -> Inputs:
    """Every pixel moves by up to `PIXEL_STEP`; state and noise are new, the prompt is the same."""
    images = (inputs.images + PIXEL_STEP * other.images).clamp(-1.0, 1.0)
    return inputs._replace(images=images, state=other.state, noise=other.noise)


def next_patch(inputs: Inputs, other: Inputs) -> Inputs:
    """One patch of each camera changes altogether, its first, and nothing else."""
    images = inputs.images.clone()
    images[..., :PATCH, :PATCH] = other.images[..., :PATCH, :PATCH]
    return inputs._replace(images=images)


def with_frames(inputs: Inputs, levels: list[float], like: Inputs) -> Inputs:
    """The first active cameras see one level each, whole frames; masks are those of `like`."""
    images = inputs.images.clone()
    active = [index for index, on in enumerate(like.image_mask[0].tolist()) if on]
    for level, camera in zip(levels, active[-len(levels) :], strict=False):
        images[:, camera] = level
    return inputs._replace(images=images)


def masked(inputs: Inputs, which: int, cameras: tuple[bool, ...]) -> Inputs:
    """Masks that differ from row to row: some of `cameras` in turn, prompts of 1 to L tokens."""
    batch, slots = inputs.token_mask.shape
    image_mask, token_mask = inputs.image_mask.clone(), inputs.token_mask.clone()
    active = [index for index, on in enumerate(cameras) if on]
    lengths = [1, slots, (slots + 1) // 2]
    for row in range(batch):
        pattern = ((row + which) * 5 + 1) % 2 ** len(active)  # none at times: the prompt is left
        image_mask[row] = False
        image_mask[row, [c for i, c in enumerate(active) if pattern >> i & 1]] = True
        token_mask[row] = torch.arange(slots) < lengths[(row + which) % len(lengths)]
    return inputs._replace(image_mask=image_mask, token_mask=token_mask)


def recorded(path: Path, workload: Workload, config: Pi0Config, noise: Tensor) -> list[Case]:
    """The user's observations: tensors `images` [N, C, 3, 224, 224], `state` [N, A], ...

    The names are those of `Inputs`; `noise` may be missing. The first `RECORDED` batches are taken,
    the last one filled up with its first rows.
    """
    try:
        tensors = load_file(path)
    except (OSError, SafetensorError) as error:
        raise UserError(f"guard.observations={path} cannot be read: {error}") from None
    needed = [name for name in Inputs._fields if name != "noise"]
    missing = [name for name in needed if name not in tensors]
    if missing:
        raise UserError(
            f"guard.observations={path} lacks {', '.join(missing)}; it holds tensors "
            f"{', '.join(needed)}, each [N, ...], and possibly noise."
        )
    size, rows = workload.batch_size, len(tensors["images"])
    found = []
    for start in range(0, min(rows, RECORDED * size), size):
        index = [start + i if start + i < rows else i % rows for i in range(size)]
        given = {name: tensors[name][index] for name in needed}
        given["noise"] = tensors["noise"][index] if "noise" in tensors else noise
        found.append(
            Case(f"recorded {start // size}", _fitting(path, given, noise, config, workload))
        )
    return found


def _fitting(
    path: Path, given: dict[str, Tensor], noise: Tensor, config: Pi0Config, workload: Workload
) -> Inputs:
    size, cameras = config.vision.image_size, len(workload.active_cameras)
    batch, slots = workload.batch_size, workload.prompt_slots
    shapes: dict[str, tuple[tuple[int, ...], Callable[[Tensor], Tensor]]] = {
        "images": ((batch, cameras, 3, size, size), Tensor.float),
        "image_mask": ((batch, cameras), Tensor.bool),
        "tokens": ((batch, slots), Tensor.long),
        "token_mask": ((batch, slots), Tensor.bool),
        "state": ((batch, config.action_dim), Tensor.float),
        "noise": (tuple(noise.shape), Tensor.float),
    }
    for name, (shape, _) in shapes.items():
        if tuple(given[name].shape) != shape:
            raise UserError(
                f"guard.observations={path}: {name} of a batch has shape "
                f"{list(given[name].shape)}, and this workload takes {list(shape)}."
            )
    return Inputs(*(shapes[name][1](given[name]).contiguous() for name in Inputs._fields))
