"""AMD aiter's tuned matrix products behind an operator that mutates nothing. Not run on AMD.

`aiter.tuned_gemm.gemm_a16w16` looks a product up in a table by (arch, CUs, M, N, K, bias, dtypes,
preshuffle), trying M and two padded sizes, and runs what the row names: hipBLASLt by solution
number, assembly, skinny, Triton. Without a row it falls back to torch, with one log line per shape
and no exception, so the log is read here: all shapes from torch means that nothing was tried.

Two hazards are kept out:
- aiter rewrites the tables that it is given when their rows collide, and merges several of them
  into one file that all processes of the host share. It gets one, merged by `aiter_tables`.
- Whether a weight is shuffled is a Python attribute on the tensor, lost by `.to`, `nn.Parameter`
  and `.detach`; without it the shuffled bytes are multiplied as they lie, and no error is raised.
  The operator takes it as an argument and sets the attribute itself.

Sources: ROCm/aiter `aiter/tuned_gemm.py`, `aiter/jit/core.py`, `aiter/ops/shuffle.py` at e4048607.
Letters: M rows, K inputs, N outputs.
"""

from __future__ import annotations

import logging
import os
import re
import sys
import tempfile
from functools import cache
from pathlib import Path

from torch import Tensor

from openpi_opt.errors import RefusedError
from openpi_opt.kernels.aiter_tables import merged, write_table
from openpi_opt.kernels.operators import of_product, operator
from openpi_opt.pi0 import layers
from openpi_opt.pi0.layers import Linear

TABLE_VARIABLE = "AITER_CONFIG_GEMM_BF16"
_LOOKUP = re.compile(
    r"shape is M:(\d+), N:(\d+), K:(\d+).*?"
    r"(?:is tuned on .*?libtype is (\w+)|not found tuned config.*?using (\w+) solution)",
    re.DOTALL,
)
# The same of `gemm_a8w8`, whose lines name the weight's dtype.
_FP8_LOOKUP = re.compile(
    r"shape (?:is )?M:(\d+), N:(\d+), K:(\d+),? q_dtype_w:.*?(is tuned|not found tuned config)",
    re.DOTALL,
)
Shape = tuple[int, int, int]


@operator("aiter_tuned_gemm", of_product)
def _gemm(x: Tensor, weight: Tensor, bias: Tensor | None, shuffled: bool) -> Tensor:
    """x [M, K] @ weight [N, K]^T + bias [N]; `shuffled` says how the bytes of `weight` lie."""
    from aiter.tuned_gemm import gemm_a16w16

    weight.is_shuffled = shuffled  # type: ignore[attr-defined]
    out: Tensor = gemm_a16w16(x, weight, bias=bias)
    return out


def linear(x: Tensor, weight: Tensor, bias: Tensor | None, shuffled: bool = False) -> Tensor:
    """The contract of `openpi_opt.pi0.ops.linear`: [..., K] -> [..., N]."""
    out: Tensor = _gemm(x.reshape(-1, x.shape[-1]), weight, bias, shuffled)
    return out.view(*x.shape[:-1], weight.shape[0])


class TunedLinear(Linear):
    """A linear layer that goes to aiter when the product has at most `max_rows` rows.

    With `shuffled`, a second copy of the weight in the layout of the assembly kernels, products of
    `shuffled_min_rows` and more read that one. Made by `become`; the parameters stay as they were.
    """

    shuffled: Tensor | None
    max_rows: int | None
    shuffled_min_rows: int

    def forward(self, x: Tensor) -> Tensor:
        """[..., K] -> [..., N]."""
        rows = x.numel() // x.shape[-1]
        if self.max_rows is not None and rows > self.max_rows:
            return self.ops.linear(x, self.weight, self.bias)
        if self.shuffled is not None and rows >= self.shuffled_min_rows:
            return linear(x, self.shuffled, self.bias, True)
        return linear(x, self.weight, self.bias)


def become(
    plain: Linear, max_rows: int | None, shuffled: Tensor | None, shuffled_min_rows: int
) -> TunedLinear:
    """Turn `plain` into a layer that aiter computes, in place."""
    return layers.become(
        plain,
        TunedLinear,
        {"shuffled": shuffled},
        max_rows=max_rows,
        shuffled_min_rows=shuffled_min_rows,
    )


def shuffled_weight(plain: Linear, multiple: int) -> Tensor | None:
    """The weight in the layout of aiter's assembly kernels, or None where they do not take it.

    They want N and K to be multiples of 64; the fork used 256. Layers with a bias are left out:
    few kernels take both.
    """
    bias: Tensor | None = plain.bias
    if bias is not None or plain.in_features % multiple or plain.out_features % multiple:
        return None
    from aiter.ops.shuffle import shuffle_weight

    out: Tensor = shuffle_weight(plain.weight.data, layout=(16, 16))
    return out


class Lookups(logging.Handler):
    """Reads aiter's log: which library served which shape, and what it warned of."""

    def __init__(self) -> None:
        super().__init__(logging.INFO)
        self.library: dict[Shape, str] = {}
        self.fp8_by_rule: dict[Shape, bool] = {}
        self.warnings: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        """Take note of one line."""
        message = record.getMessage()
        found, in_fp8 = _LOOKUP.search(message), _FP8_LOOKUP.search(message)
        if in_fp8:
            m, n, k = (int(in_fp8.group(i)) for i in (1, 2, 3))
            self.fp8_by_rule[m, n, k] = in_fp8.group(4) != "is tuned"
        elif found:
            m, n, k = (int(found.group(i)) for i in (1, 2, 3))
            self.library[m, n, k] = found.group(4) or found.group(5)
        elif record.levelno >= logging.WARNING:
            self.warnings.append(message.splitlines()[0])

    def by_torch(self) -> list[Shape]:
        """Shapes that aiter handed back to torch."""
        return sorted(shape for shape, library in self.library.items() if library == "torch")

    def require_some(self) -> None:
        """Raise RefusedError when torch computed every product that was routed to aiter."""
        if len(self.by_torch()) < len(self.library):
            return
        shapes = _text(self.by_torch()) or "none was looked up"
        raise RefusedError(
            "unavailable",
            "blas=aiter: no product was served by aiter, its table has no row for them on this "
            f"GPU and torch computed all (M x N x K): {shapes}. `python -m openpi_opt.tune gemm` "
            "writes them for aiter's tuner, whose table blas.aiter.table takes",
        )

    def notes(self) -> list[str]:
        """What to say beside the latency."""
        lines = [f"aiter: {warning}" for warning in self.warnings]
        if self.by_torch():
            served = len(self.library) - len(self.by_torch())
            lines.append(
                f"aiter served {served} of {len(self.library)} shapes; torch computed (M x N x K) "
                f"{_text(self.by_torch())}."
            )
        by_rule = sorted(shape for shape, untuned in self.fp8_by_rule.items() if untuned)
        if by_rule:
            lines.append(
                f"aiter has no tuned FP8 kernel for {len(by_rule)} of {len(self.fp8_by_rule)} "
                f"shapes and chose by its rule (M x N x K): {_text(by_rule)}."
            )
        return lines


@cache
def lookups() -> Lookups:
    """The process's one handler: aiter logs each shape once per process.

    aiter sets the level of its logger at import, and only if it has no handler yet, so it is set
    here as well.
    """
    handler = Lookups()
    logger = logging.getLogger("aiter")
    logger.setLevel(logging.INFO)
    logger.addHandler(handler)
    return handler


def install_table(table: str | None, package: Path) -> Path:
    """Give aiter its own tables merged with `table`, in a private file; before its import.

    Raises RefusedError: `table` is not one of aiter's, or another one is in use in this
    process.
    """
    rows = merged(package, table)
    if "aiter.tuned_gemm" in sys.modules:
        raise RefusedError(
            "invalid", "aiter reads its table at import: one per process, and one is in use"
        )
    target = Path(tempfile.mkdtemp(prefix="openpi_opt_aiter_")) / "bf16_tuned_gemm.csv"
    write_table(target, rows)
    os.environ[TABLE_VARIABLE] = str(target)
    return target


def _text(shapes: list[Shape]) -> str:
    return ", ".join("x".join(map(str, shape)) for shape in shapes)
