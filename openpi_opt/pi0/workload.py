"""What is inferred: the sizes of one call, and seeded inputs of those sizes.

Letters: B batch, C cameras, L prompt slots, H horizon, A action dim.
"""

from dataclasses import dataclass

import torch

from openpi_opt.pi0.config import Pi0Config
from openpi_opt.pi0.inputs import Inputs, Layout


@dataclass(frozen=True)
class Workload:
    """One kind of call; every field counts things (tokens, actions, Euler steps, observations).

    `active_cameras` has one entry for each camera slot; False is a masked slot. With `flexible`,
    calls may have fewer cameras and any number of prompt tokens up to `prompt_slots`; without it
    every call has exactly these.
    """

    active_cameras: tuple[bool, ...]
    prompt_slots: int
    prompt_tokens: int
    horizon: int
    steps: int
    batch_size: int
    flexible: bool = False

    @property
    def layout(self) -> Layout:
        """The masks of every batch of this workload, or their bounds; 256 tokens a camera."""
        tokens = self.prompt_slots if self.flexible else self.prompt_tokens
        return Layout(tuple(self.active_cameras), self.prompt_slots, tokens, flexible=self.flexible)


def make_inputs(
    workload: Workload, config: Pi0Config, seed: int, device: torch.device | str
) -> Inputs:
    """A seeded random batch, drawn on the CPU (the same on every machine), then moved.

    Masked cameras and padding get random content like the rest, so that attending them shows. The
    prompt is random, too: what part of pi05's says the state is nothing that the policy knows.
    """
    generator = torch.Generator().manual_seed(seed)
    batch, cameras = workload.batch_size, len(workload.active_cameras)
    size = config.vision.image_size
    images = torch.rand(batch, cameras, 3, size, size, generator=generator) * 2.0 - 1.0
    state = torch.randn(batch, config.action_dim, generator=generator)
    shape = (batch, workload.prompt_slots)
    tokens = torch.randint(config.vocab_size, shape, generator=generator)
    noise = torch.randn(batch, workload.horizon, config.action_dim, generator=generator)
    image_mask = torch.tensor(workload.active_cameras).expand(batch, -1)
    token_mask = (torch.arange(workload.prompt_slots) < workload.prompt_tokens).expand(shape)
    inputs = Inputs(images, image_mask.clone(), tokens, token_mask.clone(), state, noise)
    return Inputs(*(tensor.to(device) for tensor in inputs))
