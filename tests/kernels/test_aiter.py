"""aiter by contract: operators of the published signature, computed by a reference on the CPU.

The signature is that of ROCm/aiter `aiter/ops/mha.py` (before and after `sink_size` was added).
"""

import importlib
import sys
import types

import pytest
import torch
from torch import Tensor

from openpi_opt.errors import RefusedError
from openpi_opt.kernels import aiter
from openpi_opt.pi0.ops import Visibility, eager_attention

OLD = (
    "mha_fwd(Tensor(a0!) q, Tensor(a1!) k, Tensor(a2!) v, float dropout_p, float softmax_scale, "
    "bool is_causal, int window_size_left, int window_size_right, {sink}bool return_softmax_lse, "
    "bool return_dropout_randval) -> (Tensor, Tensor, Tensor, Tensor)"
)
seen: list[tuple] = []


def fake_mha(q: Tensor, k: Tensor, v: Tensor, *rest: object) -> tuple[Tensor, ...]:
    seen.append(rest)
    out = eager_attention(q, k, v, Visibility(None, None), float(rest[1]))  # type: ignore[arg-type]
    return out.contiguous(), torch.empty(0), torch.empty(0), torch.empty(2)


@pytest.fixture(params=["", "int sink_size, "], ids=["before sink_size", "after sink_size"])
def operator(request, monkeypatch):
    library = torch.library.Library("aiter", "FRAGMENT")
    library.define(OLD.format(sink=request.param))
    library.impl("mha_fwd", fake_mha, "CPU")
    monkeypatch.setattr(aiter, "import_part", lambda module, option: None)
    aiter.sink_size.cache_clear()
    seen.clear()
    yield request.param
    library._destroy()
    if hasattr(torch.ops.aiter, "mha_fwd"):
        delattr(torch.ops.aiter, "mha_fwd")
    aiter.sink_size.cache_clear()


def inputs() -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    q = torch.randn(1, 11, 8, 16, generator=generator)
    return q, *torch.randn(2, 1, 30, 1, 16, generator=generator).unbind()


def test_arguments_in_the_order_of_the_schema(operator):
    q, k, v = inputs()
    out = aiter.core("rocm")(q, k, v, 0.25, None)
    expected = eager_attention(q, k, v, Visibility(None, None), 0.25)
    torch.testing.assert_close(out, expected)
    flags = [False, -1, -1, *([0] if operator else []), False, False]
    assert list(seen[-1]) == [0.0, 0.25, *flags]


def test_the_wrapper_mutates_nothing(operator):
    torch.library.opcheck(torch.ops.openpi_opt.aiter_mha_ck, (*inputs(), 0.25))
    assert not torch.ops.openpi_opt.aiter_mha_ck.default._schema.is_mutable


def test_a_mask_is_refused_not_ignored(operator):
    with pytest.raises(ValueError, match="takes no mask"):
        aiter.core("rocm")(*inputs(), 0.25, torch.ones(1, 1, 1, 30, dtype=torch.bool))


def test_what_cannot_be_imported_is_unavailable():
    with pytest.raises(RefusedError, match="importing AMD's aiter failed") as error:
        aiter.core("cuda")
    assert error.value.outcome == "unavailable"


def test_no_launch_parameter_is_amd_only():
    for config in (aiter.PREFILL_CONFIG, aiter.DECODE_CONFIG):
        assert not {"waves_per_eu", "matrix_instr_nonkdim", "kpack"} & set(config)


def test_prebuilt_modules_are_kept_when_new_ones_go_elsewhere(tmp_path, monkeypatch):
    """With AITER_JIT_DIR aiter imports from that folder alone, and compiles what it lacks."""
    package, own = tmp_path / "site" / "aiter", tmp_path / "jit"
    (package / "jit").mkdir(parents=True)
    (package / "__init__.py").write_text("")
    built = {"module_host": b"host", "module_here": b"amdhsa--gfx942 amdhsa--gfx950",
             "module_other": b"amdhsa--gfx950", "module_built": b"host"}  # fmt: skip
    for name, content in built.items():
        (package / "jit" / f"{name}.so").write_bytes(content)
    own.mkdir()
    (own / "module_built.so").write_bytes(b"own")
    monkeypatch.syspath_prepend(tmp_path / "site")
    monkeypatch.delitem(sys.modules, "aiter", raising=False)
    importlib.invalidate_caches()
    monkeypatch.setattr(aiter, "_on_amd", lambda: True)
    properties = types.SimpleNamespace(gcnArchName="gfx942:sramecc+:xnack-")
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: properties)
    monkeypatch.delenv("AITER_JIT_DIR", raising=False)
    assert aiter.keep_prebuilt() == []
    monkeypatch.setenv("AITER_JIT_DIR", str(own))
    assert [link.name for link in aiter.keep_prebuilt()] == ["module_here.so", "module_host.so"]
    assert (own / "module_built.so").read_bytes() == b"own"
    assert not (own / "module_other.so").exists(), "aiter would build it anew, through the link"
    assert aiter.keep_prebuilt() == []
