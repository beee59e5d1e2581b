"""Launch parameters: one record that every own Triton kernel takes, and how others override it.

A kernel gets its `Launch` as one compile-time argument. A parameter that a caller leaves out comes
from the kernel's table, which holds what was measured, or from its rule.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch


@dataclass(frozen=True)
class Launch:
    """Launch parameters; each kernel names those that it reads (`LINEAR` and others below).

    `block_m`, `block_n` and `block_k` are the tile: rows, columns, and the axis that is summed.
    `dependent`: see `triton_common.follow`. `waves_per_eu` and `matrix_instr_nonkdim` are AMD's; 0
    leaves them to the compiler.
    """

    block_m: int = 16
    block_n: int = 32
    block_k: int = 128
    split_k: int = 1
    """blocks that share the sum over K of one tile"""
    blocks: int = 1
    """tiles of keys that one block of the attention sums"""
    num_warps: int = 4
    num_stages: int = 1
    """tiles that are on their way while one is multiplied"""
    fused: int = 0
    """1: the last block adds the parts of a split; 0: a second kernel does"""
    dependent: int = 0
    """1 or 2: start beside the kernel before (NVIDIA from sm90 on)"""
    prefetch: int = 0
    """bytes an instruction asks for in L2 before the wait; 0: none"""
    dies: int = 1
    """8: blocks that read the same run on one of the 8 dies of an MI300 or MI350"""
    waves_per_eu: int = 0
    matrix_instr_nonkdim: int = 0

    def options(self) -> dict[str, Any]:
        """The arguments of the launch itself, those that this vendor's compiler knows."""
        given: dict[str, Any] = {"num_warps": self.num_warps, "num_stages": self.num_stages}
        if self.dependent:
            given["launch_pdl"] = True
        if torch.version.hip is not None:
            amd = {
                "waves_per_eu": self.waves_per_eu,
                "matrix_instr_nonkdim": self.matrix_instr_nonkdim,
            }
            given |= {name: value for name, value in amd.items() if value}
        return given


FIELDS = tuple(field.name for field in dataclasses.fields(Launch))
_OF_ALL = ("num_warps", "num_stages", "dependent", "waves_per_eu", "matrix_instr_nonkdim")
DECODE = ("block_m", "block_n", "blocks", "fused", *_OF_ALL)
FLASH = ("block_m", "block_n", "dies", *_OF_ALL[:2], *_OF_ALL[3:])
LINEAR = ("block_n", "block_k", "split_k", "fused", "prefetch", *_OF_ALL)
"""What `triton_decode`, `triton_attention` and `triton_skinny_gemm` read."""


def encoded(names: Sequence[str], overrides: Mapping[str, int] | None) -> list[int]:
    """Overrides as an operator takes them: one number for each of `FIELDS`, -1 for the table's.

    Raises ValueError: an override that is not among `names`, the parameters that the kernel
    reads.
    """
    overrides = overrides or {}
    unknown = set(overrides) - set(names)
    if unknown:
        raise ValueError(f"{sorted(unknown)} are not among {', '.join(names)}")
    return [overrides.get(field, -1) for field in FIELDS] if overrides else []


def applied(table: Launch, overrides: Sequence[int] | None) -> Launch:
    """The table's entry with what `encoded` wrote put over it."""
    if not overrides:
        return table
    given = {k: v for k, v in zip(FIELDS, overrides, strict=True) if v != -1}
    return dataclasses.replace(table, **given)
