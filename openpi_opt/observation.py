"""Observations as users have them, checked on the host against the workload of a ready policy.

Letters: B batch, C cameras, L prompt slots, H horizon, A action dim.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from openpi_opt.pi0.config import Pi0Config
from openpi_opt.pi0.inputs import Inputs, Layout
from openpi_opt.pi0.workload import Workload

# openpi's camera order; the names are part of its observation format.
CAMERAS = ("base_0_rgb", "left_wrist_0_rgb", "right_wrist_0_rgb")


@dataclass(frozen=True)
class Observation:
    """One batch of preprocessed observations.

    images [B, C, 3, 224, 224] float32 in [-1, 1]; image_mask [B, C] bool; tokens [B, L] int64;
    token_mask [B, L] bool; state [B, A] float32, normalised and padded. pi05 reads the state from
    the prompt, where openpi's tokenizer writes it in 256 steps, and not from here. Keep the two
    masks on the host: they are compared with what the policy was built for before every call.
    """

    images: Tensor
    image_mask: Tensor
    tokens: Tensor
    token_mask: Tensor
    state: Tensor

    @classmethod
    def from_openpi(cls, data: Mapping[str, Any]) -> Observation:
        """Read openpi's model input: `image` and `image_mask` by camera, `state`, prompt ids.

        Images are float [B, 3, 224, 224] in [-1, 1], or uint8 [B, 224, 224, 3].

        Raises:
            ValueError: a camera or key is missing; `image_mask` may be left out for all cameras.
        """
        needed = ("image", "state", "tokenized_prompt", "tokenized_prompt_mask")
        missing = [key for key in needed if key not in data]
        missing += [f"image.{name}" for name in CAMERAS if name not in data.get("image", {})]
        if missing:
            raise ValueError(f"the observation lacks {', '.join(missing)}")
        images = torch.stack([_pixels(data["image"][name]) for name in CAMERAS], dim=1)
        masks = data.get("image_mask", {})
        present = torch.ones(len(images), dtype=torch.bool)
        columns = [torch.as_tensor(masks.get(name, present)).bool() for name in CAMERAS]
        return cls(
            images=images,
            image_mask=torch.stack(columns, dim=1),
            tokens=torch.as_tensor(data["tokenized_prompt"]).long(),
            token_mask=torch.as_tensor(data["tokenized_prompt_mask"]).bool(),
            state=torch.as_tensor(data["state"]).float(),
        )


def to_inputs(
    observation: Observation,
    noise: Tensor | None,
    config: Pi0Config,
    workload: Workload,
    layout: Layout | None,
    device: torch.device,
) -> Inputs:
    """Check shapes and masks, draw noise if none is given, move everything to `device`.

    Raises:
        ValueError: a shape that is not the workload's, or masks that are not those for which the
            policy was built (a policy with a declared layout does not read them again).
    """
    if noise is None:
        noise = torch.randn(workload.batch_size, workload.horizon, config.action_dim)
    inputs = Inputs(
        observation.images,
        observation.image_mask,
        observation.tokens,
        observation.token_mask,
        observation.state,
        noise,
    )
    _check_shapes(inputs, config, workload)
    if layout is not None:
        refusal = layout.refusal(inputs.image_mask.cpu(), inputs.token_mask.cpu())
        if refusal is not None:
            raise ValueError(
                f"{refusal}. Load the policy for this workload, for instance "
                "load_policy(..., overrides=['workload.layout=flexible'])."
            )
    dtypes = (torch.float32, torch.bool, torch.int64, torch.bool, torch.float32, torch.float32)
    return Inputs(*(t.to(device, dtype) for t, dtype in zip(inputs, dtypes, strict=True)))


def _check_shapes(inputs: Inputs, config: Pi0Config, workload: Workload) -> None:
    batch, cameras, slots = (
        workload.batch_size,
        len(workload.active_cameras),
        workload.prompt_slots,
    )
    size = config.vision.image_size
    expected: dict[str, tuple[int, ...]] = {
        "images": (batch, cameras, 3, size, size),
        "image_mask": (batch, cameras),
        "tokens": (batch, slots),
        "token_mask": (batch, slots),
        "state": (batch, config.action_dim),
        "noise": (batch, workload.horizon, config.action_dim),
    }
    for name, shape in expected.items():
        given = tuple(getattr(inputs, name).shape)
        if given != shape:
            raise ValueError(f"{name} has shape {list(given)}; this policy takes {list(shape)}")


def _pixels(image: Any) -> Tensor:
    tensor = torch.as_tensor(image)
    if tensor.dtype == torch.uint8:
        return tensor.permute(0, 3, 1, 2).float() / 255.0 * 2.0 - 1.0
    return tensor.float()
