"""How far actions, or other tensors, are from what they should be."""

from torch import Tensor


def distance(actions: Tensor, reference: Tensor) -> float:
    """Relative L2 distance in float64; infinite where `actions` is not finite."""
    wide = actions.double()
    if not bool(wide.isfinite().all()):
        return float("inf")
    return float((wide - reference.double()).norm() / reference.double().norm())
