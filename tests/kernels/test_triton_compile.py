"""Every Triton kernel, with the launch parameters it ships with, compiled for GPUs that are absent.

The public functions run on CPU tensors of the model's shapes while Triton's launch is replaced by a
compilation for the target: what is compiled is what would have been launched there. Triton checks
no limits offline, so registers and shared memory are compared here.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction

from openpi_opt.kernels import (
    triton_activation,
    triton_attention,
    triton_decode,
    triton_norm,
    triton_rotary,
    triton_skinny_gemm,
)
from openpi_opt.pi0 import weights
from openpi_opt.pi0.config import PI0, PI0_MINI
from openpi_opt.pi0.gemma import KeysValues, Rope
from openpi_opt.pi0.ops import SEE_ALL, Segment, Visibility, eager_attention
from openpi_opt.pi0.precision import cast
from openpi_opt.surgery.expert import fuse_expert_layers
from openpi_opt.surgery.fused import fuse_gate_up, fuse_qkv

TYPES = {torch.bfloat16: "*bf16", torch.float32: "*fp32", torch.int32: "*i32", torch.uint8: "*u8"}
TARGETS = {
    "gfx942": GPUTarget("hip", "gfx942", 64),
    "gfx950": GPUTarget("hip", "gfx950", 64),
    "sm90": GPUTarget("cuda", 90, 32),
}
# Bytes of LDS or shared memory that one block may have.
SHARED = {"gfx942": 65536, "gfx950": 163840, "sm90": 232448}
EPS = 1e-6
STATE = Visibility(None, (Segment(0, 1, 789), Segment(1, 11, None)))


@dataclass
class Compiler:
    """Stands in for launches: compiles for `target` and keeps what came out, by kernel name."""

    target: str
    compiled: list[tuple[str, Any]]

    def launch(
        self, kernel: JITFunction, *args: Any, grid: Any, warmup: bool, **kwargs: Any
    ) -> None:
        names = [parameter.name for parameter in kernel.params]
        values = dict(zip(names, args, strict=False)) | {
            k: v for k, v in kwargs.items() if k in names
        }
        options = {k: v for k, v in kwargs.items() if k not in names}
        signature, constants, attributes = {}, {}, {}
        for index, parameter in enumerate(kernel.params):
            value = values[parameter.name]
            kind = _kind(value, parameter.is_constexpr)
            signature[parameter.name] = kind
            if kind == "constexpr":
                constants[parameter.name] = value
            elif isinstance(value, Tensor) or (kind == "i32" and value % 16 == 0):
                attributes[(index,)] = [["tt.divisibility", 16]]
        source = ASTSource(kernel, signature, constants, attributes)
        result = triton.compile(source, target=TARGETS[self.target], options=options)
        self.compiled.append((kernel.__name__, result))


def _kind(value: Any, constexpr: bool) -> str:
    if constexpr or (type(value) is int and value == 1):
        return "constexpr"
    if isinstance(value, Tensor):
        return TYPES[value.dtype]
    return "fp32" if isinstance(value, float) else "i32"


@pytest.fixture(params=TARGETS)
def compiler(
    request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> Iterator[Compiler]:
    name = request.param
    stand_in = Compiler(name, [])
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(torch.version, "hip", "7.0" if name.startswith("gfx") else None)
    for module in (triton_attention, triton_decode, triton_skinny_gemm):
        monkeypatch.setattr(module, "arch", lambda tensor: name)
    monkeypatch.setattr(
        JITFunction, "run", lambda kernel, *args, **kw: stand_in.launch(kernel, *args, **kw)
    )
    yield stand_in
    assert stand_in.compiled


def empty(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.empty(*shape, dtype=dtype)


def decode() -> None:
    q, k, v = empty(1, 11, 8, 256), empty(1, 799, 1, 256), empty(1, 799, 1, 256)
    triton_decode.attention()(q, k, v, STATE, 0.0625)


def decode_cached() -> None:
    q, past, new = empty(1, 51, 8, 256), empty(1, 788, 1, 256), empty(1, 51, 1, 256)
    rope = Rope(empty(1, 51, 128), empty(1, 51, 128))
    attend = triton_decode.cached_attention({"fused": 1})
    attend(q, (past, past), (new, new), rope, SEE_ALL, 0.0625)


def prefill() -> None:
    q, k = empty(1, 788, 8, 256), empty(1, 788, 1, 256)
    triton_attention.attention()(q, k, k, SEE_ALL, 0.0625)


def vision() -> None:
    q = empty(3, 256, 16, 72)
    triton_attention.attention()(q, q, q, SEE_ALL, 0.118)


def skinny() -> None:
    x, wide, tall = empty(1, 11, 1024), empty(1, 11, 2048), empty(1, 11, 4096)
    gain = empty(1024, dtype=torch.float32)
    triton_skinny_gemm.skinny_linear(x, empty(2560, 1024), None, None, gain, EPS, [])
    triton_skinny_gemm.skinny_linear(wide, empty(1024, 2048), None, x, None, None, [])
    triton_skinny_gemm.skinny_gelu_mul(x, empty(8192, 1024), None, EPS, [])
    triton_skinny_gemm.skinny_linear_add_rms_norm(tall, empty(1024, 4096), x, None, EPS, [])


def skinny_51() -> None:
    x = empty(1, 51, 1024)
    triton_skinny_gemm.skinny_linear(x, empty(2560, 1024), None, None, None, None, [])
    triton_skinny_gemm.skinny_gelu_mul(x, empty(8192, 1024), None, None, [])


def expert_layer() -> None:
    """A layer of the full model's expert with gains: the state token alone, 11 and 51 rows."""
    small = dataclasses.replace(PI0_MINI.language, depth=1, heads=8, head_dim=256)
    expert = dataclasses.replace(PI0.expert, depth=1)
    policy = weights.build(dataclasses.replace(PI0_MINI, language=small, expert=expert), "cpu")
    cast(policy, torch.bfloat16)
    fuse_qkv(policy)
    fuse_gate_up(policy)
    fuse_expert_layers(policy)
    past, table = KeysValues(empty(1, 788, 1, 256), empty(1, 788, 1, 256)), empty(1, 51, 128)
    for rows in (1, 11, 51):
        rope = Rope(table[:, :rows], table[:, :rows])
        policy.expert(empty(1, rows, 1024), rope, STATE, eager_attention, [past])


def elementwise() -> None:
    x, gain = empty(1, 788, 2048), empty(2048, dtype=torch.float32)
    triton_norm.add_rms_norm(x, x, gain, EPS)
    scale, shift, _ = empty(3 * 1024, dtype=torch.float32).chunk(3)
    triton_norm.adaptive_rms_norm(empty(1, 10, 1024), scale, shift, EPS)
    triton_norm.layer_norm(empty(3, 256, 1152), empty(1152), empty(1152), EPS)
    triton_activation.gelu_mul_fused(empty(1, 788, 32768))
    table = empty(1, 788, 128)
    triton_rotary.rotary_qk(empty(1, 788, 8, 256), empty(1, 788, 1, 256), table, table)


CALLS = [decode, decode_cached, prefill, vision, skinny, skinny_51, expert_layer, elementwise]


@pytest.mark.parametrize("call", CALLS, ids=lambda call: call.__name__)
def test_shipped_parameters_fit_the_machine(call: Callable[[], None], compiler: Compiler) -> None:
    call()
    for name, kernel in compiler.compiled:
        assert kernel.metadata.shared <= SHARED[compiler.target], name
        if compiler.target.startswith("gfx"):
            text = kernel.asm["amdgcn"]
            assert _number("vgpr_spill_count", text) == 0, name
            assert _number("private_segment_fixed_size", text) == 0, name


def _number(field: str, text: str) -> int:
    found = re.search(rf"\.{field}:\s*(\d+)", text)
    assert found, field
    return int(found[1])
