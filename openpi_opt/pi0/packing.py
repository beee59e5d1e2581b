"""The valid prefix tokens first, where that depends on masks which only the device knows.

One capture then serves any masks: valid tokens keep their order, so token j has position j, keys
are seen up to a length, and what follows is padding. Exact: a masked key's weight is exactly 0 and
positions count valid tokens only.

Letters: B batch, P prefix slots, W width.
"""

from typing import NamedTuple

import torch
from torch import Tensor


class Packing(NamedTuple):
    """Where the valid tokens of each element lie."""

    order: Tensor
    """[B, P] int64: the slot of valid token j; beyond the last one, its slot again"""
    length: Tensor
    """[B] int32: valid tokens, at least one"""
    valid: Tensor
    """[B, P] bool: the first `length`"""


def packing(mask: Tensor) -> Packing:
    """Masks [B, P] bool, each with a true entry -> the packing; nothing waits for the device.

    Padding repeats a valid token: no content of a masked slot, NaN included, enters a sum.
    """
    # The slot of token j is the number of slots up to which at most j tokens are valid. P^2
    # comparisons in one pass; a sort or a scatter are several launches.
    upto = mask.cumsum(1)
    slots = torch.arange(mask.shape[1], device=mask.device)
    token = torch.minimum(slots, upto[:, -1:] - 1)
    order = (upto.unsqueeze(1) <= token.unsqueeze(2)).sum(2)
    return Packing(order, upto[:, -1].int(), slots < upto[:, -1:])


def packed(tokens: Tensor, order: Tensor) -> Tensor:
    """Tokens [B, P, W] in `order` [B, P] -> [B, P, W]."""
    return tokens.gather(1, order.unsqueeze(2).expand_as(tokens))
