"""What one inference takes: the tensors, and the masks that are known before it runs.

Letters: B batch, C cameras, L prompt slots, P prefix slots, H horizon, A action dim.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor


class Inputs(NamedTuple):
    """A batch of observations and the noise to start from, all on the policy's device."""

    images: Tensor
    """[B, C, 3, 224, 224] float32 in [-1, 1]"""
    image_mask: Tensor
    """[B, C] bool; False for a camera that is absent"""
    tokens: Tensor
    """[B, L] int64 ids"""
    token_mask: Tensor
    """[B, L] bool; False for padding"""
    state: Tensor
    """[B, A] float32, normalised; not read by pi05, whose prompt says it"""
    noise: Tensor
    """[B, H, A] float32"""


@dataclass(frozen=True)
class Layout:
    """The masks that every element of a batch has in common.

    The prefix is all cameras' tokens in order, then the prompt slots, of which the first
    `prompt_tokens` are valid.

    A `flexible` layout only bounds them: each element has its own masks, within these cameras and
    slots, and they are read on the device.
    """

    cameras: tuple[bool, ...]
    prompt_slots: int
    prompt_tokens: int
    tokens_per_camera: int = 256
    flexible: bool = False

    def __post_init__(self) -> None:
        if not 0 <= self.prompt_tokens <= self.prompt_slots:
            raise ValueError(
                f"prompt_tokens is {self.prompt_tokens}; allowed are 0 to prompt_slots, "
                f"which is {self.prompt_slots}."
            )
        if self.prefix_valid < 1:
            raise ValueError(
                "No prefix token is valid: enable at least one camera or prompt token."
            )
        if self.flexible and self.prompt_tokens != self.prompt_slots:
            raise ValueError(
                f"A flexible layout takes any prompt up to its {self.prompt_slots} slots; "
                f"prompt_tokens, {self.prompt_tokens}, must be as many."
            )

    @property
    def prefix_slots(self) -> int:
        """P: all prefix tokens, valid or not."""
        return self.tokens_per_camera * len(self.cameras) + self.prompt_slots

    @property
    def prefix_valid(self) -> int:
        """The prefix tokens that may be attended."""
        return self.tokens_per_camera * sum(self.cameras) + self.prompt_tokens

    @property
    def all_valid(self) -> bool:
        """Whether no prefix token is masked, so that no mask is needed."""
        return self.prefix_valid == self.prefix_slots

    @property
    def leading(self) -> bool:
        """Whether the valid prefix tokens are the first ones, without gaps."""
        active = sum(self.cameras)
        return all(self.cameras[:active]) and (
            active == len(self.cameras) or self.prompt_tokens == 0
        )

    def refusal(self, image_mask: Tensor, token_mask: Tensor) -> str | None:
        """Why masks [B, C] and [B, L] on the host cannot be served, or None."""
        if not self.flexible:
            given = Layout.of(image_mask, token_mask, self.tokens_per_camera)
            return None if given == self else f"this policy was built for {self}, not for {given}"
        cameras = torch.tensor(self.cameras)
        extra = (image_mask & ~cameras).any(0).nonzero().flatten().tolist()
        if extra:
            return f"image_mask has camera {extra[0]}, which active_cameras leaves out"
        empty = ~(image_mask.any(1) | token_mask.any(1))
        if bool(empty.any()):
            row = empty.nonzero().flatten().tolist()[0]
            return f"image_mask and token_mask have nothing valid in element {row} of the batch"
        return None

    def valid_index(self) -> list[int]:
        """The slots of the valid prefix tokens, in order."""
        size = self.tokens_per_camera
        slots = [
            camera * size + token
            for camera, active in enumerate(self.cameras)
            if active
            for token in range(size)
        ]
        prompt_start = len(self.cameras) * size
        return slots + list(range(prompt_start, prompt_start + self.prompt_tokens))

    @classmethod
    def of(cls, image_mask: Tensor, token_mask: Tensor, tokens_per_camera: int = 256) -> "Layout":
        """The layout of a batch, from its masks [B, C] and [B, L] on the host.

        Raises ValueError when the elements differ or the valid prompt tokens are not the first
        ones; such a batch runs without a declared layout. (Masks on a GPU would synchronise.)
        """
        for name, mask in (("image_mask", image_mask), ("token_mask", token_mask)):
            if mask.ndim != 2 or not len(mask) or not bool((mask == mask[:1]).all()):
                raise ValueError(
                    f"{name} {list(mask.shape)} has no layout: every element of the batch must "
                    "have the same mask [B, slots]. Run without a declared layout instead."
                )
        prompt = [bool(valid) for valid in token_mask[0].tolist()]
        prompt_tokens = sum(prompt)
        if not all(prompt[:prompt_tokens]):
            raise ValueError(
                "token_mask has no layout: its valid tokens must come first, without gaps. "
                "Run without a declared layout instead."
            )
        cameras = tuple(bool(active) for active in image_mask[0].tolist())
        return cls(cameras, len(prompt), prompt_tokens, tokens_per_camera)
