"""The linear layer that both kinds of tower use."""

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
