"""Inference of pi0 and pi05 written a second time: slowly, in float64, straight from the formulas.

It reads a state dict by name, one observation and one head at a time, and shares nothing with the
code under test. Masked prefix tokens are left out instead of masked.

Letters: C cameras, L prompt slots, N valid prefix tokens, H horizon, A action dim, W width.
"""

import math

import torch
from torch import Tensor

State = dict[str, Tensor]

PATCH = 14
EPS = 1e-6
WITH_EXPERT = "paligemma_with_expert."
PALIGEMMA = WITH_EXPERT + "paligemma."
VISION = PALIGEMMA + "model.vision_tower.vision_model."
LANGUAGE = PALIGEMMA + "model.language_model."
EXPERT = WITH_EXPERT + "gemma_expert.model."


def gelu(x: Tensor) -> Tensor:
    return 0.5 * x * (1.0 + torch.tanh(math.sqrt(2.0 / math.pi) * (x + 0.044715 * x**3)))


def affine(state: State, name: str, x: Tensor) -> Tensor:
    y = x @ state[name + ".weight"].T
    return y + state[name + ".bias"] if name + ".bias" in state else y


def layer_norm(state: State, name: str, x: Tensor) -> Tensor:
    mean = x.mean(-1, keepdim=True)
    variance = ((x - mean) ** 2).mean(-1, keepdim=True)
    normed = (x - mean) / torch.sqrt(variance + EPS)
    return normed * state[name + ".weight"] + state[name + ".bias"]


def rms_norm(state: State, name: str, x: Tensor) -> Tensor:
    return x / torch.sqrt((x**2).mean(-1, keepdim=True) + EPS) * (1.0 + state[name + ".weight"])


def attend(q: Tensor, k: Tensor, v: Tensor, visible: list[int]) -> Tensor:
    """One head: queries [S, D], keys and values [T, D]; query i sees the first visible[i] keys."""
    logits = q @ k.T / math.sqrt(q.shape[1])
    for row, n in zip(logits, visible, strict=True):
        row[n:] = -math.inf
    weights = torch.exp(logits - logits.max(dim=1, keepdim=True).values)
    return (weights / weights.sum(dim=1, keepdim=True)) @ v


def count(state: State, prefix: str) -> int:
    return len({name[len(prefix) :].split(".")[0] for name in state if name.startswith(prefix)})


def image_tokens(state: State, image: Tensor, heads: int) -> Tensor:
    """[3, 224, 224] -> [256, W of the language model]."""
    kernel = state[VISION + "embeddings.patch_embedding.weight"]
    rows = []
    for top in range(0, image.shape[1], PATCH):
        for left in range(0, image.shape[2], PATCH):
            patch = image[:, top : top + PATCH, left : left + PATCH]
            rows.append((kernel * patch).sum(dim=(1, 2, 3)))
    x = torch.stack(rows) + state[VISION + "embeddings.patch_embedding.bias"]
    x = x + state[VISION + "embeddings.position_embedding.weight"]
    for index in range(count(state, VISION + "encoder.layers.")):
        layer = f"{VISION}encoder.layers.{index}."
        y = layer_norm(state, layer + "layer_norm1", x)
        q, k, v = (affine(state, f"{layer}self_attn.{part}_proj", y) for part in "qkv")
        size = q.shape[1] // heads
        outs = []
        for head in range(heads):
            columns = slice(head * size, (head + 1) * size)
            outs.append(attend(q[:, columns], k[:, columns], v[:, columns], [len(x)] * len(x)))
        x = x + affine(state, layer + "self_attn.out_proj", torch.cat(outs, dim=1))
        y = layer_norm(state, layer + "layer_norm2", x)
        x = x + affine(state, layer + "mlp.fc2", gelu(affine(state, layer + "mlp.fc1", y)))
    x = layer_norm(state, VISION + "post_layernorm", x)
    return affine(state, PALIGEMMA + "model.multi_modal_projector.linear", x)


def rotate(x: Tensor, positions: list[int], rounded: bool) -> Tensor:
    """Head vectors [S, D] at their positions: pair d is (x[d], x[d + D/2])."""
    half = x.shape[1] // 2
    frequencies = torch.tensor([10000.0 ** (-d / half) for d in range(half)], dtype=torch.float64)
    frequencies = frequencies.to(torch.bfloat16 if rounded else torch.float32).double()
    angles = torch.tensor(positions, dtype=torch.float64)[:, None] * frequencies
    a, b = x[:, :half], x[:, half:]
    return torch.cat((a * angles.cos() - b * angles.sin(), b * angles.cos() + a * angles.sin()), 1)


def adaptive_norm(
    state: State, name: str, x: Tensor, condition: Tensor | None
) -> tuple[Tensor, Tensor | float]:
    """The normed x [S, W] and the gate of what reads it; 1 without a condition [W]."""
    if condition is None:
        return rms_norm(state, name, x), 1.0
    scale, shift, gate = affine(state, name + ".dense", condition).view(3, -1)
    normed = x / torch.sqrt((x**2).mean(-1, keepdim=True) + EPS)
    return normed * (1.0 + scale) + shift, gate


def gemma_layer(
    state: State,
    layer: str,
    x: Tensor,
    positions: list[int],
    rounded: bool,
    past: tuple[Tensor, Tensor] | None,
    visible: list[int],
    condition: Tensor | None = None,
) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    """Tokens x [S, W]; token i sees the first visible[i] of the past and own keys together."""
    y, gate = adaptive_norm(state, layer + "input_layernorm", x, condition)
    k = rotate(affine(state, layer + "self_attn.k_proj", y), positions, rounded)
    v = affine(state, layer + "self_attn.v_proj", y)
    if past is not None:
        k, v = torch.cat((past[0], k)), torch.cat((past[1], v))
    q = affine(state, layer + "self_attn.q_proj", y)
    size = k.shape[1]  # one key head, shared by all query heads
    outs = []
    for head in range(q.shape[1] // size):
        rows = rotate(q[:, head * size : (head + 1) * size], positions, rounded)
        outs.append(attend(rows, k, v, visible))
    x = x + gate * affine(state, layer + "self_attn.o_proj", torch.cat(outs, dim=1))
    y, gate = adaptive_norm(state, layer + "post_attention_layernorm", x, condition)
    gated = gelu(affine(state, layer + "mlp.gate_proj", y)) * affine(
        state, layer + "mlp.up_proj", y
    )
    return x + gate * affine(state, layer + "mlp.down_proj", gated), (k, v)


def prefix(
    state: State, images: Tensor, cameras: list[bool], tokens: list[int], heads: int, rounded: bool
) -> list[tuple[Tensor, Tensor]]:
    """Keys and values of every layer for the active cameras and the given prompt tokens."""
    parts = [
        image_tokens(state, image, heads) for image, on in zip(images, cameras, strict=True) if on
    ]
    table = state[PALIGEMMA + "lm_head.weight"]
    parts += [torch.stack([table[token] for token in tokens]) * math.sqrt(table.shape[1])]
    x = torch.cat(parts)
    positions, everything = list(range(len(x))), [len(x)] * len(x)
    caches = []
    for index in range(count(state, LANGUAGE + "layers.")):
        layer = f"{LANGUAGE}layers.{index}."
        x, cache = gemma_layer(state, layer, x, positions, rounded, None, everything)
        caches.append(cache)
    return caches


def time_features(time: float, width: int) -> Tensor:
    half = width // 2
    periods = [0.004 * 1000.0 ** (i / (half - 1)) for i in range(half)]
    angles = [2.0 * math.pi * time / period for period in periods]
    features = [math.sin(angle) for angle in angles] + [math.cos(angle) for angle in angles]
    return torch.tensor(features, dtype=torch.float64).float().double()


def velocity(
    state: State,
    x_t: Tensor,
    time: float,
    robot: Tensor,
    caches: list[tuple[Tensor, Tensor]],
    rounded: bool,
) -> Tensor:
    """x_t [H, A], robot state [A] -> [H, A]."""
    if "time_mlp_in.weight" in state:
        return adaptive_velocity(state, x_t, time, caches, rounded)
    horizon, n = len(x_t), len(caches[0][0])
    action = affine(state, "action_in_proj", x_t)
    features = time_features(time, action.shape[1]).expand_as(action)
    hidden = affine(state, "action_time_mlp_in", torch.cat((action, features), dim=1))
    action = affine(state, "action_time_mlp_out", hidden * torch.sigmoid(hidden))
    x = torch.cat((affine(state, "state_proj", robot)[None], action))
    positions = list(range(n, n + horizon + 1))
    visible = [n + 1] + [n + 1 + horizon] * horizon
    for index, past in enumerate(caches):
        layer = f"{EXPERT}layers.{index}."
        x, _ = gemma_layer(state, layer, x, positions, rounded, past, visible)
    return affine(state, "action_out_proj", rms_norm(state, EXPERT + "norm", x[1:]))


def silu(x: Tensor) -> Tensor:
    return x * torch.sigmoid(x)


def adaptive_velocity(
    state: State, x_t: Tensor, time: float, caches: list[tuple[Tensor, Tensor]], rounded: bool
) -> Tensor:
    """pi05: actions only, which all see one another; the time conditions the norms."""
    horizon, n = len(x_t), len(caches[0][0])
    x = affine(state, "action_in_proj", x_t)
    features = time_features(time, x.shape[1])
    condition = silu(affine(state, "time_mlp_out", silu(affine(state, "time_mlp_in", features))))
    positions, visible = list(range(n, n + horizon)), [n + horizon] * horizon
    for index, past in enumerate(caches):
        layer = f"{EXPERT}layers.{index}."
        x, _ = gemma_layer(state, layer, x, positions, rounded, past, visible, condition)
    return affine(state, "action_out_proj", adaptive_norm(state, EXPERT + "norm", x, condition)[0])


def actions(
    state: State,
    images: Tensor,
    cameras: list[bool],
    tokens: list[int],
    robot: Tensor,
    noise: Tensor,
    *,
    steps: int,
    vision_heads: int,
    rounded: bool,
) -> Tensor:
    """One observation: images [C, 3, 224, 224], valid prompt ids, robot [A], noise [H, A]."""
    state = {name: tensor.double() for name, tensor in state.items()}
    caches = prefix(state, images.double(), cameras, tokens, vision_heads, rounded)
    x_t, time = noise.double(), torch.tensor(1.0)
    dt = torch.tensor(-1.0 / steps)
    for _ in range(steps):
        x_t = x_t + float(dt) * velocity(state, x_t, float(time), robot.double(), caches, rounded)
        time = time + dt  # accumulated in float32, as the reference does
    return x_t
