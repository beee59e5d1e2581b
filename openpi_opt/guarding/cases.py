"""What the guard asks a candidate: inputs in a fixed order, each of which provokes a kind of error.

Independent noise triggers no shortcut that depends on the data, and no cache that looks at a part
of the inputs. So after `ordinary` batches come the last of them with one thing changed (`changed`):
whatever keeps a result by less than all that it depends on is wrong in one of them. Then the next
frame, smooth frames with large noise, and frames without content. Rows with masks of their own
are for policies that claim to read masks; the first of these has cameras that the workload leaves
out. The user's own batches are the last.

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

TIMED = 12  # timed calls that are compared with the reference, the last one among them
OTHER_MASKS = 4  # more of them, with masks of their own
PIXEL_STEP, STATE_STEP = 0.02, 0.01  # between two moments; pixels have a range of 2
FLICKER = 0.002  # of every pixel
PATCH = 14  # pixels
SQUARE = 28  # pixels of one colour in a smooth frame: 2 x 2 patches
LARGE = 8.0  # times the noise, which the velocity then moves by a few percent in a step
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

    Raises UserError: `observations` names a file that does not fit the workload.
    """
    ordinary = [make_inputs(workload, config, seed + i, "cpu") for i in range(count)]
    other = make_inputs(workload, config, seed + _OTHER_SEEDS, "cpu")
    first, last = ordinary[0], ordinary[-1]
    found = [Case(f"ordinary {i}", item, True) for i, item in enumerate(ordinary)]
    found += [Case(f"same but {name}", item) for name, item in changed(last, other)]
    found += [
        Case("next frame", next_frame(found[-1].inputs, other)),
        Case("smooth", alike(smooth(other), last)),
        Case("black", at_the_edge(with_frames(other, [-1.0], last), config.vocab_size)),
        Case("white and grey", with_frames(other, [1.0, 0.0], first)),
    ]
    if sum(workload.active_cameras) == 1:
        found.append(Case("grey", with_frames(other, [0.0], first)))
    everything = tuple(True for _ in workload.active_cameras)
    inputs = make_inputs(workload, config, seed + _OTHER_SEEDS + 1, "cpu")
    for i, cameras in enumerate((everything, workload.active_cameras, workload.active_cameras)):
        found.append(Case(f"other masks {i}", masked(inputs, i, cameras)))
    if observations is not None:
        found += recorded(Path(observations), workload, config, other.noise)
    return found


def timed_inputs(workload: Workload, config: Pi0Config, seed: int) -> list[Inputs]:
    """The contents of the timed calls that are compared; no call before them has seen any.

    First `TIMED` with the workload's masks, then `OTHER_MASKS` with masks of their own.
    """
    seeds = range(seed + _TIMED_SEEDS, seed + _TIMED_SEEDS + TIMED + OTHER_MASKS)
    found = [make_inputs(workload, config, item, "cpu") for item in seeds]
    others = (masked(item, i, workload.active_cameras) for i, item in enumerate(found[TIMED:]))
    return [*found[:TIMED], *others]


def changed(inputs: Inputs, other: Inputs) -> list[tuple[str, Inputs]]:
    """`inputs` with one thing changed from case to case; what is new comes from `other`.

    Values change places in the last row, so that sums, first values and first rows are as before.
    No regular grid from 0 meets the pixels of the patch. In frames the lower half of the last
    camera changes, then also the right half of the first, also the patch, also all by the flicker.
    """
    noise, state, tokens = (getattr(inputs, n).clone() for n in ("noise", "state", "tokens"))
    noise[-1, -1] = noise[-1, -1].roll(1)
    state[-1, -2:] = state[-1, -2:].flip(0)
    half = max(1, int(inputs.token_mask[-1].sum()) // 2)
    tokens[-1, half - 1 : half + 1] = tokens[-1, half - 1 : half + 1].flip(0)
    if bool((tokens == inputs.tokens).all()):
        tokens[-1, 0] = (tokens[-1, 0] + 1) % 2
    active = inputs.image_mask[0].nonzero().flatten().tolist()
    half = inputs.images.shape[-1] // 2
    last = inputs.images.clone()
    last[-1, active[-1], :, half:] = other.images[-1, active[-1], :, half:]
    first = last.clone()
    first[0, active[0], ..., half:] = other.images[0, active[0], ..., half:]
    patch = first.clone()
    grid = slice(PATCH + 1, 2 * PATCH, 2)
    patch[..., grid, grid] = other.images[..., grid, grid]
    flicker = patch + FLICKER * other.images
    return [
        ("the noise", inputs._replace(noise=noise)),
        ("the state", inputs._replace(state=state)),
        ("the prompt", inputs._replace(tokens=tokens)),
        ("the last camera", inputs._replace(images=last)),
        ("the first camera", inputs._replace(images=first)),
        ("a patch", inputs._replace(images=patch)),
        ("a flicker", inputs._replace(images=flicker.clamp(-1.0, 1.0))),
    ]


def next_frame(inputs: Inputs, other: Inputs) -> Inputs:
    """A moment later: pixels and state move by little, the noise is new, the prompt is the same."""
    return inputs._replace(
        images=(inputs.images + PIXEL_STEP * other.images).clamp(-1.0, 1.0),
        state=inputs.state + STATE_STEP * other.state,
        noise=other.noise,
    )


def smooth(inputs: Inputs) -> Inputs:
    """Frames of squares of one colour each, and `LARGE` times the noise and the state."""
    squares = inputs.images[..., ::SQUARE, ::SQUARE]
    images = squares.repeat_interleave(SQUARE, -2).repeat_interleave(SQUARE, -1)
    return inputs._replace(
        images=images.contiguous(), noise=LARGE * inputs.noise, state=LARGE * inputs.state
    )


def alike(inputs: Inputs, like: Inputs) -> Inputs:
    """All rows have one prompt and one noise; the last camera sees nearly what the first sees."""
    images = inputs.images.clone()
    active = like.image_mask[0].nonzero().flatten().tolist()
    if len(active) > 1:
        images[:, active[-1]] *= PIXEL_STEP
        images[:, active[-1]] += images[:, active[0]]
        images.clamp_(-1.0, 1.0)
    one = {
        name: getattr(inputs, name)[:1].expand_as(getattr(inputs, name)).clone()
        for name in ("tokens", "noise")
    }
    return inputs._replace(images=images, **one)


def at_the_edge(inputs: Inputs, vocabulary: int) -> Inputs:
    """No state, and a prompt of the first and the last token of the vocabulary, two of each."""
    tokens = torch.zeros_like(inputs.tokens)
    tokens[:, ::4] = tokens[:, 3::4] = vocabulary - 1
    return inputs._replace(state=torch.zeros_like(inputs.state), tokens=tokens)


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
