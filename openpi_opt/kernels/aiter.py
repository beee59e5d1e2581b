"""AMD's flash attention (package `amd-aiter`), as operators that mutate nothing.

aiter registers its operators with every tensor marked as mutated, weights included, which keeps
torch.compile from removing dead calls and from freezing weights. The operators here wrap them
with `mutates_args=()`.

- ROCm: `torch.ops.aiter.mha_fwd`, the Composable Kernel forward. Pi0's head widths 256 and 72
  always land there, so calling it directly loses nothing. Not run on AMD hardware by this project.
- Elsewhere: the package's Triton kernel with an explicit `config`, because it ships launch
  parameters for AMD only. Needs AITER_TRITON_ONLY=1 before the package is imported.

Sources: ROCm/aiter `aiter/ops/mha.py`, `aiter/ops/triton/attention/mha.py` at e4048607.
"""

from __future__ import annotations

import importlib
import importlib.util
import mmap
import os
import re
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from openpi_opt.errors import RefusedError
from openpi_opt.kernels.operators import operator

# Launch parameters seen working on sm_90. AMD-only keys (waves_per_eu, matrix_instr_nonkdim,
# kpack) are left out: Triton's CUDA backend refuses keys that it does not know.
PREFILL_CONFIG = {
    "BLOCK_M": 64, "BLOCK_N": 32, "PRELOAD_V": False, "num_warps": 4, "num_ctas": 1, "num_stages": 1
}  # fmt: skip
# The denoising steps have 10 or 50 action rows: larger row blocks would be mostly padding.
DECODE_CONFIG = {**PREFILL_CONFIG, "BLOCK_M": 16, "BLOCK_N": 64}
_DECODE_ROWS = 32


def core(device: str) -> Callable[[Tensor, Tensor, Tensor, float, Tensor | None], Tensor]:
    """The flash kernel for `device` ("rocm" or "cuda").

    Raises RefusedError: the package cannot be imported here.
    """
    flash = _mha_ck if device == "rocm" else _mha_triton
    # aiter.ops.mha defines torch.ops.aiter.mha_fwd.
    part = "aiter.ops.mha" if device == "rocm" else "aiter.ops.triton.attention.mha"
    import_part(part, "attention=aiter")

    def attention(q: Tensor, k: Tensor, v: Tensor, scale: float, mask: Tensor | None) -> Tensor:
        if mask is not None:
            raise ValueError(
                "aiter's flash attention takes no mask; declare the layout of the workload "
                "(policy.declare_layout) so that masked keys are left out instead"
            )
        out: Tensor = flash(q, k, v, scale)
        return out

    return attention


@operator("aiter_mha_ck")
def _mha_ck(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    """Full attention, q [B, S, Hq, D], k and v [B, T, Hkv, D], bfloat16 or float16."""
    flags = [False, -1, -1, *sink_size(), False, False]  # causal, window, sink, lse, randval
    q, k, v = (t.contiguous() for t in (q, k, v))
    out: Tensor = torch.ops.aiter.mha_fwd(q, k, v, 0.0, scale, *flags)[0]
    return out


@operator("aiter_mha_triton")
def _mha_triton(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    """Full attention by aiter's Triton kernel; shapes as `_mha_ck`."""
    from aiter.ops.triton.attention.mha import flash_attn_func

    config = DECODE_CONFIG if q.shape[1] <= _DECODE_ROWS else PREFILL_CONFIG
    out: Tensor = flash_attn_func(q, k, v, softmax_scale=scale, causal=False, config=dict(config))
    return out


@cache
def sink_size() -> list[Any]:
    """`sink_size` entered the signature on 2025-12-16 (aiter d917238748)."""
    schema = str(torch.ops.aiter.mha_fwd.default._schema)
    return [0] if "sink_size" in schema else []


def import_part(module: str, option: str) -> None:
    """Import a module of AMD's aiter that `option` needs.

    Raises RefusedError: it cannot be imported here.
    """
    keep_prebuilt()
    try:
        importlib.import_module(module)
    except Exception as error:
        # aiter raises RuntimeError, AssertionError, KeyError and others when it does not find its
        # platform; whichever it is, the backend that was asked for is not to be had.
        raise RefusedError(
            "unavailable",
            f"{option}: importing AMD's aiter failed: {type(error).__name__}: {error}",
        ) from error


def keep_prebuilt() -> list[Path]:
    """Link aiter's prebuilt modules into AITER_JIT_DIR; returns the links that are new.

    With that variable set aiter imports modules from the folder alone and compiles what it lacks
    with hipcc, minutes each, though the package may hold them (`aiter/jit/core.py` at e4048607,
    `get_module_custom_op`). Modules with device code for other architectures only are left out:
    aiter would build them anew, into the file that a link points to.
    """
    folder = os.environ.get("AITER_JIT_DIR")
    spec = importlib.util.find_spec("aiter")
    if not folder or spec is None or not spec.submodule_search_locations:
        return []
    own = Path(folder)
    own.mkdir(parents=True, exist_ok=True)
    arch = torch.cuda.get_device_properties(0).gcnArchName.split(":")[0] if _on_amd() else ""
    made = []
    for package in spec.submodule_search_locations:
        for module in sorted(Path(package, "jit").glob("*.so")):
            link, archs = own / module.name, _offload_archs(module)
            if link.exists() or (archs and arch not in archs):
                continue
            try:
                link.symlink_to(module.resolve())
            except FileExistsError:  # another trial was faster
                continue
            made.append(link)
    return made


def _on_amd() -> bool:
    return torch.version.hip is not None and torch.cuda.is_available()


def _offload_archs(module: Path) -> set[str]:
    """Architectures whose code a module holds, by the entry ids of clang's offload bundle."""
    with module.open("rb") as file:
        if not module.stat().st_size:
            return set()
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
            return {m.group(1).decode() for m in re.finditer(rb"amdhsa--(gfx[0-9a-z]+)", content)}
