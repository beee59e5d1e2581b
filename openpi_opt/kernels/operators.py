"""How kernels become operators: opaque to torch.compile, of known shape, mutating nothing."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


def _like_first(first: Tensor, *_: Any, **__: Any) -> Tensor:
    return first.new_empty(first.shape)


def of_product(x: Tensor, weight: Tensor, *_: Any, **__: Any) -> Tensor:
    """The result's shape of x [..., K] @ weight [N, K]^T: [..., N]."""
    return x.new_empty(*x.shape[:-1], weight.shape[0])


def operator(name: str, shape: Callable[..., Any] = _like_first) -> Callable[..., Any]:
    """Decorator: the operator `openpi_opt::name`.

    `shape` gets the operator's arguments and returns empty tensors like its results; without one
    the result is like the first argument.
    """

    def made(function: Callable[..., Any]) -> Any:
        found = torch.library.custom_op(f"openpi_opt::{name}", mutates_args=())(function)
        found.register_fake(shape)
        return found

    return made
