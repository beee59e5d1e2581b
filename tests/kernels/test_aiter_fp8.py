"""aiter's FP8 product by contract: a module with the name and signature of the real one.

`gemm_a8w8` is that of ROCm/aiter `aiter/ops/gemm_op_a8w8.py` at e4048607, its demands those of
`csrc/ck_gemm_a8w8/gemm_a8w8.cu` and of the pointer arithmetic below it, its log lines its own.
"""

import logging

import pytest
import torch
from torch import Tensor, nn

from openpi_opt.kernels import fp8, tuned_gemm
from openpi_opt.pi0.layers import Linear
from openpi_opt.pi0.ops import Ops

FORMATS = [torch.float8_e4m3fn, torch.float8_e4m3fnuz]


class FakeAiter:
    """Computes in float64 what the kernel would, after checking what the kernel relies on."""

    def __init__(self, tuned: bool) -> None:
        self.tuned = tuned
        self.calls: list[tuple[int, int, int]] = []

    def gemm_a8w8(
        self,
        XQ: Tensor,  # noqa: N803
        WQ: Tensor,  # noqa: N803
        x_scale: Tensor,
        w_scale: Tensor,
        bias: Tensor | None = None,
        dtype: torch.dtype = torch.bfloat16,
        splitK: int | None = None,  # noqa: N803
    ) -> Tensor:
        (m, k), n = XQ.shape, WQ.shape[0]
        assert XQ.dtype == WQ.dtype
        assert XQ.dtype in FORMATS
        assert x_scale.dtype == w_scale.dtype == torch.float32
        assert bias is None or bias.dtype == dtype
        for tensor, count in ((XQ, m * k), (WQ, n * k), (x_scale, m), (w_scale, n)):
            assert tensor.is_contiguous()
            assert tensor.numel() == count
        self.log(m, n, k, WQ.dtype)
        self.calls.append((m, n, k))
        out = XQ.double() * x_scale.double() @ (WQ.double() * w_scale.double()).T
        return (out if bias is None else out + bias.double()).to(dtype)

    def log(self, M: int, N: int, K: int, q_dtype_w: torch.dtype) -> None:  # noqa: N803
        line = f"shape is M:{M}, N:{N}, K:{K}, q_dtype_w:{q_dtype_w}, not found tuned config in "
        line += "/x.csv, will use default config!"
        if self.tuned:
            line = f"shape M:{M}, N:{N}, K:{K} q_dtype_w:{q_dtype_w}, found padded_M: {M}, N:{N}, "
            line += f"K:{K} is tuned, in /x.csv! libtype is ck! kernelName is a (kernelId 1)!"
        logging.getLogger("aiter").info(line)


@pytest.fixture(params=[True, False], ids=["tuned", "untuned"])
def aiter(request, put_aiter):
    fake = FakeAiter(request.param)
    put_aiter(**{"ops.gemm_op_a8w8": {"gemm_a8w8": fake.gemm_a8w8}})
    tuned_gemm.lookups()
    return fake


def layer(bias: bool) -> Linear:
    made = Linear(96, 208, bias, Ops()).requires_grad_(False)
    generator = torch.Generator().manual_seed(0)
    for parameter in made.parameters():
        parameter.normal_(0.0, 0.1, generator=generator)
    return made.bfloat16()


def rows(m: int) -> Tensor:
    return torch.randn(1, m, 96, generator=torch.Generator().manual_seed(1)).bfloat16()


@pytest.mark.parametrize("dtype", FORMATS)
@pytest.mark.parametrize("bias", [True, False])
def test_the_same_numbers_as_torchs_product(aiter, bias, dtype):
    """Same scales, same rounded factors: only the order of the sums differs."""
    x, ours, theirs = rows(11), layer(bias), layer(bias)
    largest = x.abs().amax().float()
    fp8.become_aiter(ours, fp8.Seen(largest, 20), dtype)
    expected = fp8.become(theirs, largest, dtype)(x)
    out = ours(x)
    assert out.dtype == torch.bfloat16
    torch.testing.assert_close(out, expected, rtol=2**-7, atol=2**-9)
    assert aiter.calls == [(11, 208, 96)]
    assert list(ours.state_dict()) == list(theirs.state_dict()) == list(layer(bias).state_dict())


def test_the_operator_is_sound_and_mutates_nothing(aiter):
    x, weight = (torch.ones(n, 32).to(torch.float8_e4m3fn) for n in (3, 16))
    operator = torch.ops.openpi_opt.aiter_gemm_a8w8
    assert not operator.default._schema.is_mutable
    scales = torch.ones(3, 1), torch.ones(16, 1)
    # Not `test_schema`: it multiplies copies of the arguments, which FP8 cannot.
    torch.library.opcheck(
        operator, (x, weight, *scales, None, torch.bfloat16), test_utils="test_faketensor"
    )


def test_calibration_counts_the_rows(aiter):
    tower = nn.ModuleList([layer(False)])

    def run() -> None:
        for count in (3, 7, 5):
            tower[0](rows(count))

    assert fp8.convert([tower], run, FORMATS[0], True, aiter=True) == 1
    (made,) = tower
    assert isinstance(made, fp8.AiterFp8Linear)
    assert made.input_scales.shape == (7, 1)
    made(rows(7))
    with pytest.raises(ValueError, match="8 rows, and scales for 7"):
        made(rows(8))


def test_it_compiles_without_a_break(aiter):
    x, made = rows(11), layer(True)
    fp8.become_aiter(made, fp8.Seen(x.abs().amax().float(), 11), FORMATS[0])
    torch._dynamo.reset()
    compiled = torch.compile(made, fullgraph=True, dynamic=False, backend="aot_eager")
    torch.testing.assert_close(compiled(x), made(x))


def test_what_was_chosen_by_rule_is_a_note(aiter):
    made = fp8.become_aiter(layer(False), fp8.Seen(torch.tensor(1.0), 4), FORMATS[0])
    made(rows(4))
    notes = tuned_gemm.lookups().notes()
    assert any("4x208x96" in note for note in notes) != aiter.tuned
    assert tuned_gemm.lookups().library == {}
