"""What tensors should be, and how far actions and others are from it."""

from torch import Tensor


def distance(actions: Tensor, reference: Tensor) -> float:
    """Relative L2 distance in float64; infinite where `actions` is not finite."""
    wide = actions.double()
    if not bool(wide.isfinite().all()):
        return float("inf")
    return float((wide - reference.double()).norm() / reference.double().norm())


def attended(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float) -> Tensor:
    """Attention in float64; q [B, S, Hq, D], k and v [B, T, Hkv, D], mask [.., S or 1, T]."""
    wide = [t.double().transpose(1, 2) for t in (q, k, v)]
    group = q.shape[2] // k.shape[2]
    logits = wide[0] @ wide[1].repeat_interleave(group, 1).transpose(2, 3) * scale
    if mask is not None:
        logits = logits.masked_fill(~mask, float("-inf"))
    return (logits.softmax(-1) @ wide[2].repeat_interleave(group, 1)).transpose(1, 2)
