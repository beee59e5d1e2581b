"""The linear layer that both kinds of tower use, and how one is made to compute differently."""

from collections.abc import Mapping
from functools import cache
from typing import Any, TypeVar

from torch import Tensor, nn

from openpi_opt.pi0.ops import Ops


class Linear(nn.Linear):
    """A linear layer of a tower, computed by `ops.linear`."""

    def __init__(self, in_features: int, out_features: int, bias: bool, ops: Ops) -> None:
        super().__init__(in_features, out_features, bias=bias)
        self.ops = ops

    def forward(self, x: Tensor) -> Tensor:
        """[..., in] -> [..., out]."""
        return self.ops.linear(x, self.weight, self.bias)


L = TypeVar("L", bound=Linear)


def become(
    layer: Linear, kind: type[L], buffers: Mapping[str, Tensor | None], **attributes: Any
) -> L:
    """Turn `layer` in place into one that computes like `kind`, and loads and saves as before.

    It gets `buffers`, which are no part of its state dict, and `attributes`.
    """
    for name, value in buffers.items():
        layer.register_buffer(name, value, persistent=False)
    for name, value in attributes.items():
        setattr(layer, name, value)
    layer.__class__ = on_top(kind, type(layer))  # type: ignore[arg-type]
    assert isinstance(layer, kind)
    return layer


@cache
def on_top(kind: type[Linear], base: type[Linear]) -> type[Linear]:
    """One class per pair, however many layers: torch.compile tells modules apart by their class."""
    return kind if base is Linear else type(kind.__name__ + base.__name__, (kind, base), {})
