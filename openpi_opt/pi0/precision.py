"""Casting a policy to a precision, as openpi does it.

Reduced precision covers everything inside `paligemma_with_expert` except the patch convolution,
the vision position table and the Gemma norms (those of pi05's expert with their `dense` layers);
the projections outside (state, action, time) and the constant tables stay float32 too. Activations
of the towers have the reduced dtype, sums over the denoising steps are float32.
"""

import torch

from openpi_opt.pi0.policy import Pi0Policy

PRECISIONS = (torch.float32, torch.bfloat16, torch.float16)

INNER = "paligemma_with_expert."
# Substrings, as in openpi: "model.norm" is the final norm of both Gemma towers.
KEPT_FLOAT32 = (
    "vision_model.embeddings.",
    "input_layernorm",
    "post_attention_layernorm",
    "model.norm",
)


def parameter_dtype(name: str, dtype: torch.dtype) -> torch.dtype:
    """The dtype in which the parameter called `name` is stored under precision `dtype`."""
    if not name.startswith(INNER) or any(part in name for part in KEPT_FLOAT32):
        return torch.float32
    return dtype


def cast(policy: Pi0Policy, dtype: torch.dtype) -> None:
    """Cast `policy` in place to float32, bfloat16 or float16; ValueError for another dtype.

    Tensors inside `paligemma_with_expert` that stay float32 are rounded to `dtype` all the same:
    openpi's loader casts everything down and these back up. Rounding cannot be undone by a later
    cast to float32, so load or initialise before casting.
    """
    if dtype not in PRECISIONS:
        names = ", ".join(str(allowed).removeprefix("torch.") for allowed in PRECISIONS)
        raise ValueError(f"The policy cannot be cast to {dtype}; allowed are {names}.")
    for name, parameter in policy.named_parameters():
        if name.startswith(INNER):
            # One parameter at a time, so that no second copy of the model exists.
            parameter.data = parameter.data.to(dtype).to(parameter_dtype(name, dtype))
        else:
            parameter.data = parameter.data.float()
    policy.dtype = dtype
