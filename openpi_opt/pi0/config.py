"""The sizes that define a Pi0 policy, and the policies of this project.

`PI0` is the published 3.5 B model (SigLIP So400m/14, Gemma-2B prefix, 300 M action expert), `PI05`
its successor of 3.6 B. `PI0_MINI` and `PI05_MINI` are the same graphs with small widths for CPUs.
"""

import dataclasses
from dataclasses import dataclass
from typing import Literal, get_args

RopeFrequencies = Literal["bfloat16", "float32"]
Family = Literal["pi0", "pi05"]


def _require_positive(owner: object) -> None:
    """Raise ValueError when an integer field of the dataclass instance `owner` is below one."""
    for name, value in vars(owner).items():
        if isinstance(value, int) and value < 1:
            raise ValueError(f"{type(owner).__name__}.{name} is {value}; it must be at least 1.")


@dataclass(frozen=True)
class VisionConfig:
    """Sizes of the SigLIP tower. `image_size` and `patch_size` are in pixels."""

    width: int
    depth: int
    heads: int
    mlp_width: int
    image_size: int = 224
    patch_size: int = 14

    def __post_init__(self) -> None:
        _require_positive(self)
        if self.width % self.heads or self.image_size % self.patch_size:
            raise ValueError(
                f"VisionConfig: width {self.width} must be a multiple of heads {self.heads}, and "
                f"image_size {self.image_size} one of patch_size {self.patch_size}."
            )

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
    """Sizes of one Gemma tower; the query width `heads * head_dim` may differ from `width`."""

    width: int
    depth: int
    heads: int
    kv_heads: int
    head_dim: int
    mlp_width: int

    def __post_init__(self) -> None:
        _require_positive(self)
        if self.heads % self.kv_heads or self.head_dim % 2:
            raise ValueError(
                f"GemmaConfig: heads {self.heads} must be a multiple of kv_heads {self.kv_heads}, "
                f"and head_dim {self.head_dim} must be even for the rotary embedding."
            )


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

    def __post_init__(self) -> None:
        _require_positive(self)
        if self.rope_frequencies not in get_args(RopeFrequencies):
            raise ValueError(
                f"rope_frequencies is {self.rope_frequencies!r}; "
                f"allowed are {', '.join(get_args(RopeFrequencies))}."
            )
        if self.family not in get_args(Family):
            raise ValueError(
                f"family is {self.family!r}; allowed are {', '.join(get_args(Family))}."
            )
        if self.expert.width < 4 or self.expert.width % 2:
            raise ValueError(
                f"The expert's width is {self.expert.width}; the time features (half sines, half "
                "cosines, at least two periods) need an even width of 4 or more."
            )
        for field in ("depth", "kv_heads", "head_dim"):
            prefix, suffix = getattr(self.language, field), getattr(self.expert, field)
            if prefix != suffix:
                raise ValueError(
                    f"language.{field} is {prefix} and expert.{field} is {suffix}; they must be "
                    "equal because each expert layer reads the prefix keys of the same layer."
                )

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
