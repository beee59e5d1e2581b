"""Attention backends behind the signature of `openpi_opt.pi0.ops.eager_attention`.

Flash kernels take no arbitrary mask, and Pi0 needs two: masked cameras and padding in the prefix,
and a state token that does not see the actions in the suffix. Both are exact without a mask once
the layout is declared: a masked key has weight exactly zero, so leaving it out changes nothing,
and queries that see different keys go into different calls (`Visibility.segments`). Where lengths
change from call to call (`Visibility.padding`) a backend needs the mask, or kernels of its own that
read them. Passing
`is_causal=True` instead would be a different function: torch aligns it to the upper left when
there are fewer queries than keys.

Letters: B batch, S queries, T keys, Hq query heads, Hkv key/value heads, D head dim.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from openpi_opt.errors import RefusedError
from openpi_opt.pi0.ops import Attention, Segment, Visibility, eager_attention

# q [B, S, Hq, D], k and v [B, T, Hkv, D], scale, mask -> [B, S, Hq, D]
Core = Callable[[Tensor, Tensor, Tensor, float, Tensor | None], Tensor]

# One of torch's backends alone. `sdpa` leaves the choice to torch, which falls back without a word.
SDPA_BACKENDS = {
    "flash": SDPBackend.FLASH_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "math": SDPBackend.MATH,
}
_NO_KERNEL = ("No available kernel", "No viable backend")
# What torch also says: of the backends that were not asked for, and before each reason.
_NO_REASON = ("runtime disabled", "not used because")


def backend(
    name: str, device: str, stage: str = "prefill", launch: Mapping[str, int] | None = None
) -> Attention:
    """The attention function of an option.

    `device` decides which of aiter's kernels is meant, `stage` which of the own Triton kernels;
    `launch` goes over the launch parameters of the latter.
    """
    if name == "eager":
        return eager_attention
    if name == "sdpa":
        return segmented(sdpa)
    if name in SDPA_BACKENDS:
        return segmented(sdpa_by(name))
    if name == "aiter":
        from openpi_opt.kernels import aiter

        return segmented(aiter.core(device))
    if name == "triton":
        from openpi_opt.kernels import triton_attention, triton_decode

        kernel = triton_decode if stage == "denoise" else triton_attention
        return kernel.attention(launch)
    known = ", ".join(("eager", "sdpa", *SDPA_BACKENDS, "aiter", "triton"))
    raise ValueError(f"attention backend {name!r}; known are {known}")


def segmented(core: Core) -> Attention:
    """Run a kernel once per segment, over exactly the keys that the segment sees."""

    def attention(q: Tensor, k: Tensor, v: Tensor, visibility: Visibility, scale: float) -> Tensor:
        if visibility.segments is None or visibility.padding is not None:
            return core(q, k, v, scale, visibility.mask)
        parts = [_one(core, q, k, v, scale, segment) for segment in visibility.segments]
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)

    return attention


def _one(core: Core, q: Tensor, k: Tensor, v: Tensor, scale: float, segment: Segment) -> Tensor:
    start, stop, keys = segment
    if isinstance(keys, int):
        k, v = k[:, :keys], v[:, :keys]
    elif keys is not None:
        k, v = k.index_select(1, keys), v.index_select(1, keys)
    rows = q if stop - start == q.shape[1] else q[:, start:stop]
    return core(rows, k, v, scale, None)


def sdpa(q: Tensor, k: Tensor, v: Tensor, scale: float, mask: Tensor | None) -> Tensor:
    """torch's scaled_dot_product_attention; `mask` is bool, broadcastable to [B, 1, S, T].

    With one key/value head the query heads become further rows of one head: no key is repeated,
    and the output needs no transposition.
    """
    batch, queries, heads, width = q.shape
    keys, values = k.transpose(1, 2), v.transpose(1, 2)
    if k.shape[2] != 1:
        if k.shape[2] != heads:
            raise ValueError(f"{heads} query heads on {k.shape[2]} key heads: need 1 or {heads}")
        out = F.scaled_dot_product_attention(q.transpose(1, 2), keys, values, mask, scale=scale)
        return out.transpose(1, 2)
    if mask is not None and mask.shape[2] != 1:
        mask = mask.repeat_interleave(heads, dim=2)
    rows = q.reshape(batch, 1, queries * heads, width)
    out = F.scaled_dot_product_attention(rows, keys, values, mask, scale=scale)
    return out.view(batch, queries, heads, width)


def sdpa_by(name: str) -> Core:
    """`sdpa` by one of torch's backends (`SDPA_BACKENDS`) and no other.

    The flash kernels take no mask; where a mask would reach them, ValueError is raised.
    """
    chosen = SDPA_BACKENDS[name]

    def core(q: Tensor, k: Tensor, v: Tensor, scale: float, mask: Tensor | None) -> Tensor:
        if name == "flash" and mask is not None:
            raise ValueError(
                "flash attention takes no mask; declare the layout of the workload "
                "(policy.declare_layout) so that masked keys are left out instead"
            )
        with sdpa_kernel(chosen):
            return sdpa(q, k, v, scale, mask)

    return core


def require_sdpa(
    name: str,
    stage: str,
    q: tuple[int, int, int, int],
    k: tuple[int, int, int, int],
    like: Tensor,
    masked: bool = False,
) -> None:
    """Run a backend of torch once, on zeros q [B, S, Hq, D] and k [B, T, Hkv, D].

    dtype and device are those of `like`. What torch lets a backend take depends on widths, dtype,
    GPU, build and whether there is a mask, and only torch knows it.

    Raises RefusedError: torch has no kernel of this backend for this call, with torch's
    reasons.
    """
    keys = like.new_zeros(k)
    mask = like.new_ones((q[0], 1, q[1], k[1]), dtype=torch.bool) if masked else None
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        try:
            sdpa_by(name)(like.new_zeros(q), keys, keys, 1.0, mask)
        except RuntimeError as error:
            if not str(error).startswith(_NO_KERNEL):
                raise
            reasons = [str(warning.message).partition(" (Triggered")[0] for warning in said]
            about = [r for r in reasons if not any(word in r for word in _NO_REASON)]
            raise RefusedError(
                "unavailable",
                f"attention.{stage}={name}: torch has no such kernel for queries {list(q)} on keys "
                f"{list(k)} in {like.dtype}: {' '.join(about) or error}",
            ) from error
