"""The sizes that define a Pi0 policy, and the policies of this project.

`PI0` is the published 3.5 B model (SigLIP So400m/14, Gemma-2B prefix, 300 M action expert), `PI05`
its successor of 3.6 B. `PI0_MINI` and `PI05_MINI` are the same graphs with small widths for CPUs.
"""

import dataclasses
from dataclasses import dataclass
from typing import Literal

RopeFrequencies = Literal["bfloat16", "float32"]
Family = Literal["pi0", "pi05"]


@dataclass(frozen=True)
class VisionConfig:
    """Sizes of the SigLIP tower. `image_size` and `patch_size` are in pixels."""

    width: int
    depth: int
    heads: int
    mlp_width: int
    image_size: int = 224
    patch_size: int = 14

    @property
    def head_dim(self) -> int:
        """Width of one attention head."""
        return self.width // self.heads

    @property
    def tokens(self) -> int:
        """Image tokens of one camera: 256 for 224 pixels and patches of 14."""
        return (self.image_size // self.patch_size) ** 2


@dataclass(frozen=True)
class GemmaConfig:
    """Sizes of one Gemma tower; the query width `heads * head_dim` may differ from `width`.

    `heads` is a multiple of `kv_heads`, and `head_dim` even. Both towers of a policy have the same
    depth, `kv_heads` and `head_dim`: a layer of the expert reads the prefix keys of its like.
    """

    width: int
    depth: int
    heads: int
    kv_heads: int
    head_dim: int
    mlp_width: int


@dataclass(frozen=True)
class Pi0Config:
    """A whole policy.

    `rope_frequencies` is part of the model's definition and holds in every precision: "bfloat16"
    rounds the 1/theta^(2d/D) to bfloat16 as the PyTorch code of openpi and LeRobot does, "float32"
    keeps them as the JAX code does. The angles differ by about 0.7 rad at position 531.

    `family` says how the action expert learns of the robot's state and of the time. "pi0": the
    state is a token before the actions, the time is mixed into the action tokens. "pi05": the state
    is written into the prompt, in words, and the time sets gain, shift and gate of every norm of
    the expert.
    """

    name: str
    vision: VisionConfig
    language: GemmaConfig
    expert: GemmaConfig
    vocab_size: int
    action_dim: int = 32
    rope_frequencies: RopeFrequencies = "bfloat16"
    family: Family = "pi0"

    @property
    def state_tokens(self) -> int:
        """How many suffix tokens come before the actions: the state of pi0, none in pi05."""
        return 1 if self.family == "pi0" else 0


PI0 = Pi0Config(
    name="pi0",
    vision=VisionConfig(width=1152, depth=27, heads=16, mlp_width=4304),
    language=GemmaConfig(width=2048, depth=18, heads=8, kv_heads=1, head_dim=256, mlp_width=16384),
    expert=GemmaConfig(width=1024, depth=18, heads=8, kv_heads=1, head_dim=256, mlp_width=4096),
    vocab_size=257152,
)

# Widths are multiples of 16 (as the full model's, so every GEMM backend takes them) and mostly no
# powers of two; vision head_dim 24 stands for 72, the expert's query width 128 differs from its 96.
PI0_MINI = Pi0Config(
    name="pi0_mini",
    vision=VisionConfig(width=96, depth=4, heads=4, mlp_width=208),
    language=GemmaConfig(width=128, depth=4, heads=4, kv_heads=1, head_dim=32, mlp_width=400),
    expert=GemmaConfig(width=96, depth=4, heads=4, kv_heads=1, head_dim=32, mlp_width=272),
    vocab_size=1024,
)

PI05 = dataclasses.replace(PI0, name="pi05", family="pi05")
PI05_MINI = dataclasses.replace(PI0_MINI, name="pi05_mini", family="pi05")

MODELS = {config.name: config for config in (PI0, PI0_MINI, PI05, PI05_MINI)}
