"""aiter's tuned products by contract: modules with the names and signatures of the real ones.

`gemm_a16w16`, its log lines and the lookups are those of ROCm/aiter `aiter/tuned_gemm.py` at
e4048607; `shuffle_weight` permutes as `aiter/ops/shuffle.py` does.
"""

import csv
import logging
import os
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from openpi_opt.errors import RefusedError
from openpi_opt.kernels import aiter_tables, tuned_gemm
from openpi_opt.kernels.aiter_tables import Product
from openpi_opt.pi0.layers import Linear
from openpi_opt.pi0.ops import Ops

COLUMNS = (
    "gfx,cu_num,M,N,K,bias,dtype,outdtype,scaleAB,bpreshuffle,libtype,solidx,splitK,us,kernelName,"
    "err_ratio,tflops,bw"
)
ROW = "gfx950,256,11,64,64,False,torch.bfloat16,torch.bfloat16,False,False,asm,5,2,7.9,kernel,0,1,1"


def shuffle_weight(x: Tensor, layout: tuple[int, int] = (16, 16)) -> Tensor:
    n, k, pack = layout[0], layout[1] * 2, 16 // x.element_size()
    out = x.view(x.shape[0] // n, n, x.shape[1] // k, k // pack, pack)
    out = out.permute(0, 2, 3, 1, 4).contiguous().view(*x.shape)
    out.is_shuffled = True  # type: ignore[attr-defined]
    return out


def unshuffled(x: Tensor) -> Tensor:
    n, k, pack = 16, 32, 16 // x.element_size()
    out = x.view(x.shape[0] // n, x.shape[1] // k, k // pack, n, pack)
    return out.permute(0, 3, 1, 2, 4).contiguous().view(*x.shape)


class FakeAiter:
    """`tuned` shapes are served by asm, the others by torch with the real log line."""

    def __init__(self) -> None:
        self.tuned: set[tuple[int, int, int]] = set()
        self.calls: list[tuple[int, bool]] = []
        self.logged: set[tuple[int, int, int]] = set()

    def gemm_a16w16(
        self,
        A: Tensor,  # noqa: N803
        B: Tensor,  # noqa: N803
        bias: Tensor | None = None,
        otype: torch.dtype | None = None,
        scale_a: Tensor | None = None,
        scale_b: Tensor | None = None,
        scale_c: Tensor | None = None,
    ) -> Tensor:
        shuffled = hasattr(B, "is_shuffled") and B.is_shuffled is True
        self.calls.append((A.shape[0], shuffled))
        self.log(A.shape[0], B.shape[0], A.shape[1], str(A.dtype), shuffled)
        return F.linear(A, unshuffled(B) if shuffled else B, bias)

    def log(self, M: int, N: int, K: int, dtype: str, bpreshuffle: bool) -> None:  # noqa: N803
        if (M, N, K) in self.logged:
            return
        self.logged.add((M, N, K))
        otype, bias, scaleAB = dtype, False, False  # noqa: N806
        start = (
            f"shape is M:{M}, N:{N}, K:{K} {dtype=} {otype=} {bias=}, {scaleAB=}, {bpreshuffle=}"
        )
        if (M, N, K) in self.tuned:
            end = (
                f" found padded_M: {M}, N:{N}, K:{K} is tuned on cu_num = 256 in /x.csv, "
                "libtype is asm, kernel name is kernel"
            )
        else:
            end = (
                ", not found tuned config in /x.csv, will use default config! "
                "using torch solution:0"
            )
        logging.getLogger("aiter").info(start + end)


@pytest.fixture
def aiter(put_aiter):
    fake = FakeAiter()
    put_aiter(**{
        "ops.shuffle": {"shuffle_weight": shuffle_weight},
        "tuned_gemm": {"gemm_a16w16": fake.gemm_a16w16},
    })  # fmt: skip
    return fake


def layer(bias: bool = False, n: int = 64, k: int = 64) -> Linear:
    made = Linear(k, n, bias, Ops()).requires_grad_(False)
    made.weight.normal_(generator=torch.Generator().manual_seed(0))
    return made.bfloat16()


def rows(m: int, k: int = 64) -> Tensor:
    return torch.randn(1, m, k, generator=torch.Generator().manual_seed(1)).bfloat16()


@pytest.mark.parametrize("bias", [True, False])
def test_the_threshold_decides_and_the_product_is_the_same(aiter, bias):
    small, large = rows(11), rows(12)
    plain = layer(bias)
    expected = [plain(small), plain(large)]
    tuned_gemm.become(plain, max_rows=11, shuffled=None, shuffled_min_rows=1)
    torch.testing.assert_close([plain(small), plain(large)], expected)
    assert aiter.calls == [(11, False)]
    torch.library.opcheck(
        torch.ops.openpi_opt.aiter_tuned_gemm, (small[0], plain.weight, plain.bias, False)
    )
    plain.ops.linear = lambda x, weight, bias: torch.full((1,), 42.0)
    assert float(plain(large)) == 42.0, "more rows are the other knobs' linear"


def test_shuffled_weights_are_read_as_such_whatever_became_of_the_flag(aiter):
    plain, small, large = layer(), rows(11), rows(200)
    expected = [plain(small), plain(large)]
    shuffled = tuned_gemm.shuffled_weight(plain, 64)
    assert shuffled is not None
    assert not torch.equal(shuffled, plain.weight)
    lost = shuffled.detach().clone()
    assert not hasattr(lost, "is_shuffled")
    tuned_gemm.become(plain, max_rows=None, shuffled=lost, shuffled_min_rows=128)
    torch.testing.assert_close([plain(small), plain(large)], expected)
    assert aiter.calls == [(11, False), (200, True)]
    assert list(plain.state_dict()) == ["weight"]


def test_compiled_it_is_still_told_apart(aiter):
    plain, large = layer(), rows(200)
    expected = plain(large)
    shuffled = tuned_gemm.shuffled_weight(plain, 64)
    tuned_gemm.become(plain, max_rows=None, shuffled=shuffled, shuffled_min_rows=128)
    compiled = torch.compile(plain, fullgraph=True, dynamic=False, backend="aot_eager")
    torch.testing.assert_close(compiled(large), expected)
    assert aiter.calls[-1] == (200, True)


@pytest.mark.parametrize(("bias", "n", "multiple"), [(True, 64, 64), (False, 96, 64)])
def test_what_the_kernels_do_not_take_is_not_shuffled(aiter, bias, n, multiple):
    assert tuned_gemm.shuffled_weight(layer(bias, n), multiple) is None


def test_all_by_torch_is_unavailable_with_the_shapes(aiter):
    found = tuned_gemm.lookups()
    with pytest.raises(RefusedError, match="none was looked up"):
        found.require_some()
    for m in (11, 788):
        tuned_gemm.linear(rows(m), layer().weight, None)
    with pytest.raises(RefusedError) as error:
        found.require_some()
    assert error.value.outcome == "unavailable"
    assert "11x64x64, 788x64x64" in error.value.reason


def test_some_by_aiter_is_a_note(aiter):
    aiter.tuned.add((11, 64, 64))
    found = tuned_gemm.lookups()
    for m in (11, 788):
        tuned_gemm.linear(rows(m), layer().weight, None)
    found.require_some()
    assert found.library == {(11, 64, 64): "asm", (788, 64, 64): "torch"}
    assert found.notes() == ["aiter served 1 of 2 shapes; torch computed (M x N x K) 788x64x64."]


def test_warnings_are_kept(aiter):
    found = tuned_gemm.lookups()
    logging.getLogger("aiter").warning("opus is not available; falling back to torch")
    assert found.notes() == ["aiter: opus is not available; falling back to torch"]


# --- tables --------------------------------------------------------------------------------------


def table(path: Path, *lines: str) -> Path:
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


@pytest.fixture
def variable(monkeypatch):
    monkeypatch.setenv(tuned_gemm.TABLE_VARIABLE, "")


def rows_of(path: Path) -> list[dict[str, str]]:
    with path.open() as file:
        return list(csv.DictReader(file))


def test_aiter_gets_its_own_tables_and_the_users_in_one_private_file(tmp_path, variable):
    """Alone, a table that is named replaces all of aiter's."""
    models = tmp_path / "configs" / "model_configs"
    models.mkdir(parents=True)
    other = ROW.replace("gfx950,256,", "gfx950,256,9", 1)
    table(tmp_path / "configs" / "bf16_tuned_gemm.csv", COLUMNS, ROW.replace("kernel", "base"))
    table(models / "a_bf16_tuned_gemm.csv", COLUMNS, other.replace("kernel", "model"))
    table(models / "a_bf16_untuned_gemm.csv", "M,N,K", "1,2,3")
    alone = rows_of(tuned_gemm.install_table(None, tmp_path))
    assert [row["kernelName"] for row in alone] == ["base", "model"]
    source = table(tmp_path / "mine.csv", COLUMNS, ROW.replace("kernel", "mine"))
    before = source.read_bytes()
    copies = [tuned_gemm.install_table(str(source), tmp_path) for _ in range(2)]
    assert copies[0] != copies[1]
    assert os.environ[tuned_gemm.TABLE_VARIABLE] == str(copies[1])
    assert [row["kernelName"] for row in rows_of(copies[1])] == ["mine", "model"]
    copies[1].write_text("rewritten by aiter")
    assert source.read_bytes() == before


def test_the_lookup_is_aiters(tmp_path):
    """Its own `get_padded_m`: the rows as they are, in steps of 16 to 128, the power of two."""
    head = "gfx,cu_num,M,N,K,bias,dtype,outdtype,scaleAB,bpreshuffle,libtype,solidx,splitK,us"
    tail = "torch.bfloat16,torch.bfloat16,False,False"
    rows = [
        f"gfx950,256,16,1024,4096,False,{tail},asm,0,4,7.1,k",
        f"gfx950,256,800,2048,2048,False,{tail},hipblaslt,5,0,9.1,k",
        f"gfx950,256,1024,2560,2048,True,{tail},triton,5,0,9.1,k",
        f"gfx942,80,16,2560,1024,False,{tail},asm,5,0,9.1,k",
    ]
    read = aiter_tables.read_table(table(tmp_path / "t.csv", f"{head},kernelName", *rows))
    asked = {
        Product(11, 1024, 4096, False): "asm",
        Product(11, 1024, 4096, True): None,
        Product(788, 2048, 2048, False): "hipblaslt",
        Product(788, 2560, 2048, True): "triton",
        Product(33, 1024, 4096, False): None,
        Product(11, 2560, 1024, False): None,
    }
    assert aiter_tables.served(read, "gfx950", 256, asked) == asked
    on_80 = aiter_tables.served(read, "gfx942", 80, [Product(11, 2560, 1024, False)])
    assert list(on_80.values()) == ["asm"]
    assert aiter_tables.usable(read, "gfx942", 304) == []


@pytest.mark.parametrize(
    ("cu_num", "gfx"), [("256", "gfx950"), ("304", "gfx942"), ("80", "gfx942")]
)
def test_old_tables_get_their_architecture(tmp_path, cu_num, gfx):
    """aiter itself raises KeyError 'gfx' at the first product."""
    old = ROW.removeprefix("gfx950,256").join([cu_num, ""])
    path = table(tmp_path / "old.csv", COLUMNS.removeprefix("gfx,"), old)
    assert aiter_tables.read_table(path)[0]["gfx"] == gfx


@pytest.mark.parametrize(
    ("lines", "words"),
    [
        (("a,b", "1,2"), "no column cu_num"),
        ((COLUMNS, ROW.replace("kernel", "bf16gemm_bshuffle_64x64")), "bpreshuffle=False"),
        ((COLUMNS, ROW.replace("gfx950,256", ",128")), "cu_num=128"),
        ((COLUMNS, "gfx950,256,11"), "fewer values"),
    ],
)
def test_tables_that_cannot_work_are_refused(tmp_path, lines, words):
    with pytest.raises(RefusedError, match=words) as error:
        aiter_tables.read_table(table(tmp_path / "bad.csv", *lines))
    assert error.value.outcome == "invalid"


def test_one_table_per_process(tmp_path, variable, aiter):
    source = table(tmp_path / "mine.csv", COLUMNS, ROW)
    with pytest.raises(RefusedError, match="one per process"):
        tuned_gemm.install_table(str(source), tmp_path)
