"""What the Triton attention kernels know about who sees which key.

Pi0 needs four cases, and each kernel serves all of them in one call: every query sees the first
n keys; the first few queries (the state token) see fewer keys than the others (the actions); keys
between a length that is read on the device and a constant are padding; any bool mask. The first
three cost comparisons, the last reads the mask.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from openpi_opt.pi0.ops import Padding, Segment, Visibility


class Bounds(NamedTuple):
    """Queries [0, lead) see the keys [0, lead_keys), the others [0, keys), where `mask` allows.

    None sees the keys of `padding`.
    """

    lead: int
    lead_keys: int
    keys: int
    mask: Tensor | None
    """bool, broadcastable to [B, 1, S, T]"""
    padding: Padding | None = None

    @property
    def padded(self) -> tuple[Tensor | None, int]:
        """The padding as the kernels' operators take it."""
        return (None, 0) if self.padding is None else self.padding


def bounds(visibility: Visibility, keys: int) -> Bounds:
    """The bounds that say the same as `visibility` over T = `keys` keys.

    Segments that are no such bounds (keys by index) are left to the mask, which says the same.

    Raises ValueError: such segments come without a mask.
    """
    segments = visibility.segments
    if segments is None:
        return Bounds(0, keys, keys, visibility.mask)
    first, last = _count(segments[0], keys), _count(segments[-1], keys)
    if len(segments) <= 2 and first is not None and last is not None:
        lead = segments[0].stop if len(segments) == 2 else 0
        return Bounds(lead, first, last, None, visibility.padding)
    if visibility.mask is None:
        raise ValueError("segments with keys by index need the mask that says the same")
    return Bounds(0, keys, keys, visibility.mask)


def _count(segment: Segment, keys: int) -> int | None:
    if segment.keys is None:
        return keys
    return segment.keys if isinstance(segment.keys, int) else None


def mask_arguments(
    mask: Tensor | None, batch: int, queries: int, keys: int, unused: Tensor
) -> tuple[Tensor, int, int, int]:
    """The mask as bytes and its strides over batch, queries and keys: 0 where it is broadcast."""
    if mask is None:
        return unused, 0, 0, 0
    if mask.dim() == 2:  # [B, T]
        mask = mask[:, None, None, :]
    full = mask.expand(batch, 1, queries, keys).view(torch.uint8)
    return full, full.stride(0), full.stride(2), full.stride(3)
