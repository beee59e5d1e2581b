"""Policies with seeded random weights, shaped so that mistakes can be told from rounding.

With naive weights bfloat16 alone moves Pi0's actions by 17 % and many mistakes by less. These are
shaped, and measured at full depth, so that bfloat16 moves the actions by under 1 % and every mask,
position, camera, layer, the state and the prompt by many times that:

- Residual branches are scaled by 1/sqrt(2 depth): the stream stays of order 1, no layer dominates.
- Logits have a standard deviation of about 2: attention is neither uniform nor one-hot.
- Gemma has no biases, trained networks make their own from channels that hardly vary. Here every
  16th channel is such a constant ("bias"), another every 16th says what kind of token it is
  ("kind": image or prompt, action or state; in SigLIP favoured or ordinary patches). No layer
  writes to them.
- Rare tokens that matter (prompt, state, favoured patches) get a bonus on their logits by kind,
  enough for a fair share of the attention. Values differ by kind, so a wrong mask or scale shifts
  all tokens alike, which averages out less than noise does.
- Gain, shift and gate of pi05's adaptive norms vary as much over the steps as over the channels.
- GELU's input is centred at -2, as sparse trained MLPs have it. There tanh and erf differ by 0.4 %
  of the output instead of 0.02 %.
"""

import hashlib
import math

import torch
from torch import Tensor

from openpi_opt.pi0.config import GemmaConfig, Pi0Config, VisionConfig
from openpi_opt.pi0.policy import Pi0Policy

BIAS = slice(0, None, 16)
KIND = slice(8, None, 16)
LEVEL = 2.0  # absolute value of both kinds of channel
RMS = 1.2  # what the norms divide by, roughly, halfway through a tower

BIAS_STD = 0.2
NORM_STD = 0.3  # of Gemma's norm weights around 0 (gain around 1)
MODULATION_STD = 0.2  # of the constant part of an adaptive norm's scale, shift and gate
GATE_MEAN = 1.2  # with less, GELU by erf shows less in pi05 than in pi0
LAYER_NORM_STD = 0.2
LOGIT_GAIN = 1.5  # of q_proj and k_proj each; logits get its square as standard deviation
ATTENTION_GAIN, VISION_ATTENTION_GAIN = 2.0, 4.0  # averaging values over keys shrinks them
KIND_VALUE_GAIN, VISION_KIND_VALUE_GAIN = 2.0, 3.0  # how much values depend on the kind
MLP_IN_GAIN = 0.7
GELU_CENTRE = -2.0
# Of gelu_tanh(x) for x ~ N(-2, 0.7): the root mean square, and the standard deviation.
GELU_RMS, GELU_STD = 0.079, 0.052

PROMPT_BONUS, ACTION_BONUS, STATE_BONUS, PATCH_BONUS = 3.0, 2.0, 4.5, 2.7
QUERY_LEVEL = 1.5  # share of a bonus that queries carry; keys carry the rest
FAVOURED_PATCHES = slice(0, None, 16)

# Of `provoke`: what all logits of a head have in common, beyond the largest argument of exp in
# float32 (88), positive in even heads; a massive channel; shares that are left of what changes the
# velocity from step to step, and of the velocity.
COMMON_LOGIT = 100.0
MASSIVE, MASSIVE_CHANNEL = 100.0, 5
TIME_SHARE, ACTION_SHARE, VELOCITY_SHARE = 0.01, 0.03, 0.02


def build(config: Pi0Config, device: torch.device | str, steps: int = 10) -> Pi0Policy:
    """A policy on `device` in float32 whose weights are allocated once and not yet filled."""
    with torch.device("meta"):
        policy = Pi0Policy(config, steps)
    policy.to_empty(device=device)
    policy.requires_grad_(False)
    policy.fill_buffers()
    return policy.eval()


def init_random(policy: Pi0Policy, seed: int) -> None:
    """Fill every weight, each from its own generator seeded by (seed, name), on its device.

    The same seed gives the same weights on the same kind of device; a CPU and a GPU draw different
    ones. Call it before `precision.cast`.
    """
    for name, parameter in policy.named_parameters():
        digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
        generator = torch.Generator(parameter.device)
        generator.manual_seed(int.from_bytes(digest[:7], "big"))
        _fill(policy.config, name, parameter, generator)


def provoke(policy: Pi0Policy) -> None:
    """Change the weights of `init_random` so that shortcuts which depend on the data are taken.

    All logits get `COMMON_LOGIT` or its negative, by head: a softmax that does not subtract the
    maximum overflows, logits that are clamped become equal, and the softmax itself is as well
    conditioned as before. One channel of the prefix is massive. A step moves the actions by less
    than 1%, and the velocity changes by about 0.6% from step to step.
    """
    config, model = policy.config, policy.paligemma_with_expert.paligemma
    with torch.no_grad():
        for name, parameter in policy.named_parameters():
            if name.split(".")[-2] in ("q_proj", "k_proj"):
                _add_common_logit(config, name, parameter)
        policy.projector.bias[MASSIVE_CHANNEL] += MASSIVE  # type: ignore[index, operator]
        embedding = model.lm_head.weight
        embedding[:, MASSIVE_CHANNEL] += MASSIVE / math.sqrt(config.language.width)
        policy.action_in_proj.weight.mul_(ACTION_SHARE)
        policy.action_out_proj.weight.mul_(VELOCITY_SHARE)
        policy.action_out_proj.bias.mul_(VELOCITY_SHARE)
        if config.family == "pi0":
            policy.action_time_mlp_in.weight[:, config.expert.width :] *= TIME_SHARE
        else:
            policy.time_mlp_out.weight.mul_(TIME_SHARE)


def _add_common_logit(config: Pi0Config, name: str, parameter: Tensor) -> None:
    """Let some head dims of queries and keys be constant: SigLIP's last, Gemma's slowest."""
    if "vision_tower" in name:
        size = config.vision.head_dim
        dims = slice(size - size // 4, size)
    else:
        size = config.language.head_dim
        dims = slice(size // 2 - max(1, size // 16), size // 2)
    level = math.sqrt(COMMON_LOGIT * math.sqrt(size) / (dims.stop - dims.start))
    rows = parameter.view(-1, size, *parameter.shape[1:])[:, dims]
    if parameter.ndim == 1:
        rows.fill_(level)
    else:
        rows.zero_()
        if "vision_tower" not in name:
            rows[:, :, BIAS] = _read(level, parameter.shape[1])
    if "q_proj" in name:
        rows[1::2].neg_()


def _fill(config: Pi0Config, name: str, parameter: Tensor, generator: torch.Generator) -> None:
    parts = name.split(".")
    if "vision_tower" in parts:
        _fill_vision(config.vision, parts[-2], parts[-1], parameter, generator)
    elif parts[-2] == "dense":
        _fill_modulation(config.expert.width, parameter, generator)
    elif "norm" in parts[-2]:
        _draw(parameter, NORM_STD, generator)
    elif "layers" in parts and "gemma_expert" in parts:
        _fill_gemma(config.expert, parts[-2], parameter, generator, (ACTION_BONUS, STATE_BONUS))
    elif "layers" in parts:
        _fill_gemma(config.language, parts[-2], parameter, generator, (0.0, PROMPT_BONUS))
    else:
        _fill_outer(config.family, name, parameter, generator)


def _draw(parameter: Tensor, std: float, generator: torch.Generator, mean: float = 0.0) -> None:
    parameter.normal_(mean, std, generator=generator)


def _unit(parameter: Tensor) -> float:
    """The standard deviation that keeps the size of a vector: fan-in ^ -1/2."""
    return math.prod(parameter.shape[1:]) ** -0.5


def _read(size: float, width: int) -> float:
    """The weight on each bias (or kind) channel for which a projection yields about `size`."""
    channels = len(range(*KIND.indices(width)))
    return size * RMS / (LEVEL * channels)


def _bonus_level(head_dim: int, dims: int) -> float:
    """t such that `dims` entries of t in a query and in a key add 1 to the scaled logit."""
    return math.sqrt(math.sqrt(head_dim) / dims)


def _fill_vision(
    config: VisionConfig, module: str, kind: str, parameter: Tensor, generator: torch.Generator
) -> None:
    """SigLIP: `module` and `kind` are the last two parts of the name ("q_proj", "weight")."""
    unit, dims = _unit(parameter), config.head_dim // 4
    branch, bonus = unit / math.sqrt(2.0 * config.depth), _bonus_level(config.head_dim, dims)
    if "norm" in module:
        _draw(parameter, LAYER_NORM_STD if kind == "weight" else 0.1, generator)
        if kind == "weight":
            parameter += 1.0
    elif module == "position_embedding":
        _draw(parameter, 1.0, generator)
        parameter[:, KIND] = -LEVEL
        parameter[FAVOURED_PATCHES, KIND] = LEVEL
    elif kind == "bias":
        _draw(parameter, BIAS_STD, generator, mean=GELU_CENTRE if module == "fc1" else 0.0)
        if module == "q_proj":
            parameter.view(config.heads, -1)[:, :dims] = QUERY_LEVEL * bonus
    else:
        stds = {
            "patch_embedding": math.sqrt(3.0) * unit,  # pixels in [-1, 1] have the variance 1/3
            "out_proj": VISION_ATTENTION_GAIN * branch,
            "fc2": branch / GELU_STD,
            "v_proj": unit,
            "fc1": MLP_IN_GAIN * unit,
        }
        _draw(parameter, stds.get(module, LOGIT_GAIN * unit), generator)
        if module == "fc2":
            # GELU's mean is not 0: pairs of opposite columns keep it from piling up in the stream.
            parameter[:, 1::2] = -parameter[:, : parameter.shape[1] // 2 * 2 : 2]
        if module == "v_proj":
            parameter[:, KIND] *= VISION_KIND_VALUE_GAIN
        elif module in ("fc1", "q_proj", "k_proj"):
            parameter[:, KIND] = 0.0
        if module == "k_proj":
            rows = parameter.view(config.heads, -1, config.width)[:, :dims]
            rows[:, :, KIND] = _read(PATCH_BONUS / QUERY_LEVEL / 2.0 * bonus, config.width)
    if module in ("patch_embedding", "out_proj", "fc2"):
        parameter[KIND] = 0.0


def _fill_gemma(
    config: GemmaConfig,
    module: str,
    parameter: Tensor,
    generator: torch.Generator,
    bonus: tuple[float, float],
) -> None:
    """A layer's linear `module`; `bonus` on the logits of positive and of negative kind. It is
    written into the head dims that rotate least: it hardly depends on place."""
    unit = _unit(parameter)
    branch = unit / math.sqrt(2.0 * config.depth)
    stds = {
        "o_proj": ATTENTION_GAIN * branch,
        "down_proj": branch / GELU_RMS,
        "q_proj": LOGIT_GAIN * unit,
        "k_proj": LOGIT_GAIN * unit,
        "gate_proj": MLP_IN_GAIN * unit,
    }
    _draw(parameter, stds.get(module, unit), generator)
    if module in ("o_proj", "down_proj"):
        parameter[BIAS] = 0.0
        parameter[KIND] = 0.0
        return
    parameter[:, BIAS] = _read(GELU_CENTRE, config.width) if module == "gate_proj" else 0.0
    parameter[:, KIND] *= KIND_VALUE_GAIN if module == "v_proj" else 0.0
    size = config.head_dim
    slow = slice(3 * size // 8, size // 2)
    level = _bonus_level(size, slow.stop - slow.start)
    if module == "q_proj":
        rows = parameter.view(-1, size, config.width)[:, slow]
        rows[:, :, BIAS] = _read(QUERY_LEVEL * level, config.width)
    elif module == "k_proj":
        rows = parameter.view(-1, size, config.width)[:, slow]
        level /= QUERY_LEVEL
        rows[:, :, BIAS] = _read(level * (bonus[0] + bonus[1]) / 2.0, config.width)
        rows[:, :, KIND] = _read(level * (bonus[0] - bonus[1]) / 2.0, config.width)


def _fill_modulation(width: int, parameter: Tensor, generator: torch.Generator) -> None:
    """The `dense` layer of an adaptive norm: scales and shifts around 0, gates around 1.2.

    Its condition varies over the steps by about 0.28, and so does each of these. The constant
    channels stay constant, or what reads them (logits' bonus, GELU's centre) would not.
    """
    _draw(parameter, MODULATION_STD if parameter.ndim == 1 else _unit(parameter), generator)
    scale, shift, gate = parameter.split(width)
    for part in (scale, shift):
        part[BIAS] = 0.0
        part[KIND] = 0.0
    if parameter.ndim == 1:
        gate += GATE_MEAN


def _fill_outer(family: str, name: str, parameter: Tensor, generator: torch.Generator) -> None:
    """Projector, embedding, and the projections of state, actions and time.

    Those that write tokens set the constant channels: image and action tokens are of positive kind,
    prompt and state tokens of negative.
    """
    tokens = "action_in_proj" if family == "pi05" else "action_time_mlp_out"
    _draw(parameter, BIAS_STD if parameter.ndim == 1 else _unit(parameter), generator)
    if name.endswith("paligemma.lm_head.weight"):
        # Multiplied by sqrt(width) when read.
        parameter[:, BIAS] = LEVEL * _unit(parameter)
        parameter[:, KIND] = -LEVEL * _unit(parameter)
    elif any(part in name for part in ("multi_modal_projector", "state_proj", tokens)):
        constant = LEVEL if parameter.ndim == 1 else 0.0
        parameter[BIAS] = constant
        parameter[KIND] = -constant if "state_proj" in name else constant
    elif "time_mlp_in.weight" in name:
        parameter *= math.sqrt(2.0)  # the time features have a mean square of 1/2
