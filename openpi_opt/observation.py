"""Observations as users have them, checked on the host against the workload of a ready policy.

Letters: B batch, C cameras, L prompt slots, H horizon, A action dim.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from openpi_opt.pi0.config import Pi0Config
from openpi_opt.pi0.inputs import Inputs, Layout
from openpi_opt.pi0.workload import Workload

# openpi's camera order; the names are part of its observation format.
CAMERAS = ("base_0_rgb", "left_wrist_0_rgb", "right_wrist_0_rgb")
# What resizing in float32 may add to the range of pixels.
_ROUNDING = 0.01

Array: TypeAlias = "Tensor | NDArray[np.generic]"


@dataclass(frozen=True)
class Observation:
    """One batch of preprocessed observations, as tensors or numpy arrays.

    images [B, C, 3, 224, 224] floats in [-1, 1], or uint8 (also [B, C, 224, 224, 3]), of which 0
    means -1 and 255 means 1; image_mask [B, C] bool; tokens [B, up to L] integers; token_mask of
    the same shape, bool; state [B, A] floats, normalised and padded. Floats in [0, 1] cannot be
    told from a bright picture: they pass, and mean something else. pi05 reads the state from the
    prompt, where openpi's tokenizer writes it in 256 steps, and not from here. Keep the masks on
    the host: they are looked at before every call.
    """

    images: Array
    image_mask: Array
    tokens: Array
    token_mask: Array
    state: Array

    @classmethod
    def from_openpi(cls, data: Mapping[str, object]) -> Observation:
        """Read openpi's model input: `image` and `image_mask` by camera, `state`, prompt ids.
        Images are float [B, 3, 224, 224] in [-1, 1], or uint8 [B, 224, 224, 3]. Raises ValueError:
        a camera or key is missing; `image_mask` may be left out for all cameras."""
        needed = ("image", "state", "tokenized_prompt", "tokenized_prompt_mask")
        missing = [key for key in needed if key not in data]
        images, masks = data.get("image", {}), data.get("image_mask", {})
        if not isinstance(images, Mapping) or not isinstance(masks, Mapping):
            raise ValueError("image and image_mask of the observation are mappings by camera")
        missing += [f"image.{name}" for name in CAMERAS if name not in images]
        if missing:
            raise ValueError(f"the observation lacks {', '.join(missing)}")
        stacked = torch.stack([_tensor(f"image.{name}", images[name]) for name in CAMERAS], dim=1)
        present = torch.ones(len(stacked), dtype=torch.bool)
        columns = [_tensor(f"image_mask.{n}", masks.get(n, present)) for n in CAMERAS]
        return cls(
            images=stacked,
            image_mask=torch.stack(columns, dim=1),
            tokens=_tensor("tokenized_prompt", data["tokenized_prompt"]),
            token_mask=_tensor("tokenized_prompt_mask", data["tokenized_prompt_mask"]),
            state=_tensor("state", data["state"]),
        )


def to_inputs(
    observation: Observation,
    noise: Array | None,
    config: Pi0Config,
    workload: Workload,
    layout: Layout | None,
    device: torch.device,
) -> Inputs:
    """Check everything, draw noise if none is given, move it to `device`. Raises ValueError: names
    the field that has another shape or type than the workload's, holds what is not finite or out of
    range, or masks for which the policy was not built."""
    batch, slots = workload.batch_size, workload.prompt_slots
    if noise is None:
        noise = torch.randn(batch, workload.horizon, config.action_dim)
    fields = {**vars(observation), "noise": noise}
    given = Inputs(**{name: _tensor(name, fields[name]) for name in Inputs._fields})
    images = _images(given.images, batch, len(workload.active_cameras), config.vision.image_size)
    tokens, token_mask = _prompt(given.tokens, given.token_mask, batch, slots, config.vocab_size)
    _like("image_mask", given.image_mask, (batch, len(workload.active_cameras)), torch.bool)
    state = _floats("state", given.state, (batch, config.action_dim))
    noise = _floats("noise", given.noise, (batch, workload.horizon, config.action_dim))
    refusal = None if layout is None else layout.refusal(given.image_mask.cpu(), token_mask.cpu())
    if refusal is not None:
        raise ValueError(
            f"{refusal}. Load the policy for this workload, for instance "
            "load_policy(..., overrides=['workload.layout=flexible'])."
        )
    moved = (images, given.image_mask, tokens, token_mask, state, noise)
    inputs = Inputs(*(tensor.to(device) for tensor in moved))
    if images.dtype == torch.uint8:  # after the transfer, which then has a quarter of the bytes
        return inputs._replace(images=inputs.images.float() / 255.0 * 2.0 - 1.0)  # as openpi
    return inputs


def _tensor(name: str, value: object) -> Tensor:
    """A tensor or numpy array as a tensor that a compiled call may take."""
    if isinstance(value, np.ndarray | np.generic):
        value = np.asarray(value)
        if value.dtype.kind not in "biuf":
            raise ValueError(f"{name} is an array of {value.dtype}; it must hold numbers")
        # Arrays decoded from a message are read-only, of which torch warns.
        value = torch.from_numpy(value if value.flags.writeable else value.copy())
    if not isinstance(value, Tensor):
        raise ValueError(f"{name} is a {type(value).__name__}; it must be a tensor or numpy array")
    # A tensor of inference mode has other dispatch keys: compiled code would not take it.
    return value.clone() if value.is_inference() else value


def _like(name: str, tensor: Tensor, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    if tuple(tensor.shape) != shape:
        raise ValueError(f"{name} has shape {list(tensor.shape)}; this policy takes {list(shape)}")
    if tensor.dtype != dtype:
        wanted, found = (str(d).removeprefix("torch.") for d in (dtype, tensor.dtype))
        raise ValueError(f"{name} is {found}; it must be {wanted}")


def _floats(name: str, tensor: Tensor, shape: tuple[int, ...]) -> Tensor:
    if not tensor.is_floating_point():
        raise ValueError(f"{name} is {_dtype(tensor)}; it must hold floats")
    tensor = tensor.float()
    _like(name, tensor, shape, torch.float32)
    if not bool(tensor.isfinite().all()):
        place = [int(i) for i in (~tensor.isfinite()).nonzero()[0]]
        raise ValueError(f"{name}{place} is {float(tensor[tuple(place)])}; it must be finite")
    return tensor


def _images(images: Tensor, batch: int, cameras: int, size: int) -> Tensor:
    """[B, C, 3, size, size], float32 in [-1, 1] or uint8 as it came."""
    if images.dtype == torch.uint8 and images.ndim == 5 and images.shape[-1] == 3:
        images = images.permute(0, 1, 4, 2, 3)
    shape = (batch, cameras, 3, size, size)
    if images.dtype == torch.uint8:
        _like("images", images, shape, torch.uint8)
        return images
    if not images.is_floating_point():
        raise ValueError(f"images is {_dtype(images)}; it must be uint8, or floats in [-1, 1]")
    images = images.float()
    _like("images", images, shape, torch.float32)
    if _out_of_range(images) is None:
        return images
    found = next((i, said) for i, p in enumerate(images.unbind(1)) if (said := _out_of_range(p)))
    raise ValueError(
        f"images of camera {found[0]} have values {found[1]}; floats are in [-1, 1]. Pixels of 0 "
        "to 255 are taken as uint8."
    )


def _out_of_range(pixels: Tensor) -> str | None:
    """None, or which values there are instead of [-1, 1]."""
    low, high = (float(bound) for bound in pixels.aminmax())
    if -1 - _ROUNDING <= low <= high <= 1 + _ROUNDING:  # NaN compares false
        return None
    return f"from {low:.3g} to {high:.3g}" if low == low else "with NaN"


def _prompt(
    tokens: Tensor, mask: Tensor, batch: int, slots: int, vocabulary: int
) -> tuple[Tensor, Tensor]:
    """Ids and mask [B, L] int64 and bool: shorter ones padded, padding beyond L cut off."""
    if tokens.is_floating_point() or tokens.dtype == torch.bool:
        raise ValueError(f"tokens is {_dtype(tokens)}; ids are integers")
    tokens = tokens.long()
    length = tokens.shape[-1]
    _like("tokens", tokens, (batch, length), torch.int64)
    _like("token_mask", mask, (batch, length), torch.bool)
    if length > slots:
        used = int(mask.any(0).nonzero().max()) + 1 if bool(mask.any()) else 0
        if used > slots:
            raise ValueError(
                f"tokens has {used} valid ids; this policy has {slots} prompt slots. Load it with "
                f"overrides=['workload.prompt_slots={used}'] or more."
            )
        tokens, mask = tokens[:, :slots], mask[:, :slots]
    low, high = (int(bound) for bound in tokens.aminmax())
    if low < 0 or high >= vocabulary:
        raise ValueError(
            f"tokens holds the id {low if low < 0 else high}; ids are 0 to {vocabulary - 1}"
        )
    padding = (0, slots - tokens.shape[1])
    return F.pad(tokens, padding), F.pad(mask, padding, value=False)


def _dtype(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")
