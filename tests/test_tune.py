"""The tuning workflow on the CPU, against the formats of aiter's tuner and of torch's TunableOp."""

import csv
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.cuda import tunable
from torch.nn import functional as F

from openpi_opt import tune
from openpi_opt.config import Config
from openpi_opt.errors import UserError
from openpi_opt.kernels.aiter_tables import Product

MINI = ("model=pi0_mini", "simplify=none", "fusion=all")


def run(tmp_path: Path, *words: str) -> Path:
    assert tune.main(["gemm", *MINI, "--out", str(tmp_path / "out"), *words]) == 0
    return tmp_path / "out"


def tuned(path: Path, *products: Product, units: int = 304) -> Path:
    """What aiter's tuner would leave: its columns, in its order."""
    lines = [
        "gfx,cu_num,M,N,K,bias,dtype,outdtype,scaleAB,bpreshuffle,libtype,solidx,splitK,us,"
        "kernelName,err_ratio,tflops,bw"
    ]
    for m, n, k, bias, dtype in products:
        key = f"gfx942,{units},{m},{n},{k},{bias},{dtype},{dtype},False,False"
        lines.append(f"{key},asm,5,2,7.9,kernel,0.0,1,1")
    path.write_text("\n".join(lines) + "\n")
    return path


def test_the_products_are_those_that_run(tmp_path):
    """By another way: the matrix products of a real call of the same policy, recorded by torch."""
    from torch.utils._python_dispatch import TorchDispatchMode

    from openpi_opt import runtime
    from openpi_opt.pi0.workload import make_inputs

    raw = {
        "model": {"name": "pi0_mini"}, "platform": {"device": "cpu"}, "workload": {"steps": 2},
        "fusion": {"qkv": True, "gate_up": True},
    }  # fmt: skip
    cfg = Config.parse(raw)
    seen: set[tuple[int, int, int, bool]] = set()

    class Record(TorchDispatchMode):
        def __torch_dispatch__(
            self, func: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            if func in (torch.ops.aten.mm.default, torch.ops.aten.addmm.default):
                left, right = args[-2:]
                seen.add((left.shape[0], right.shape[1], left.shape[1], len(args) == 3))
            return func(*args, **(kwargs or {}))

    policy = runtime.build_policy(cfg, torch.device("cpu"))
    prepared = runtime.apply_knobs(policy, cfg)
    inputs = make_inputs(runtime.workload_of(cfg), policy.config, 0, "cpu")
    with torch.no_grad(), Record():
        prepared.call(inputs)
    found = tune.products(cfg)
    assert {tuple(product)[:4] for product in found} <= seen
    assert found[next(p for p in found if p.m == 11 and p.n == 96 and p.k == 128)] == 2 * 4


def test_aiters_tuner_gets_its_format_and_its_answer_is_looked_up(tmp_path, capsys):
    out = run(tmp_path)
    with (out / "bf16_untuned_gemm.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert tuple(rows[0]) == ("M", "N", "K", "bias", "dtype", "outdtype", "scaleAB", "bpreshuffle")
    assert {row["dtype"] for row in rows} == {"torch.bfloat16"}
    first = Product(*(int(rows[0][name]) for name in "MNK"), rows[0]["bias"] == "True")
    capsys.readouterr()
    for units, hits in ((304, 1), (80, 0)):
        table = tuned(tmp_path / "tuned.csv", first, units=units)
        run(tmp_path, "--gpu", "gfx942:304", "--table", str(table))
        shown = capsys.readouterr().out
        assert sum(line.endswith(" asm") for line in shown.splitlines()) == hits
        # without a row it has a kernel for few rows and inputs; the mini model has such products
        small = sum(line.endswith(" skinny") for line in shown.splitlines())
        assert f"aiter serves {hits + small} of {len(rows)} products" in shown


def test_torch_reads_what_its_offline_tuning_is_given(tmp_path, monkeypatch):
    """By torch's own reader: the products that it would tune are those of the policy."""
    file = run(tmp_path) / "tunableop_untuned0.csv"
    lines = tunable._gather_unique_untuned_gemm_from_files(str(file))
    asked: set[Product] = set()

    def matrices(m: int, n: int, k: int, *rest: Any, **more: Any) -> tuple[torch.Tensor, ...]:
        assert more.get("subMatrix") is False
        left, right = torch.empty(m, k, device="meta"), torch.empty(n, k, device="meta").t()
        return left, right

    def mm(left: torch.Tensor, right: torch.Tensor) -> None:
        asked.add(Product(left.shape[0], right.shape[1], left.shape[1], False))

    def linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> None:
        assert len(bias) == weight.shape[0]
        asked.add(Product(x.shape[0], weight.shape[0], x.shape[1], True))

    monkeypatch.setattr(tunable, "_create_matrices", matrices)
    monkeypatch.setattr(torch, "mm", mm)
    monkeypatch.setattr(F, "linear", linear)
    rand = torch.rand
    monkeypatch.setattr(torch, "rand", lambda *size, dtype, device: rand(*size, dtype=dtype))
    for line in lines:
        tunable._process_single_offline_gemm(line, 0)
    monkeypatch.undo()
    raw = {"model": {"name": "pi0_mini"}, "platform": {"device": "cpu"}}
    fused = {"qkv": True, "gate_up": True, "vision_qkv": True}
    expected = set(tune.products(Config.parse({**raw, "fusion": fused})))
    # torch skips products of one row, with a warning
    assert asked == {product for product in expected if product.m > 1}


def test_what_cannot_be_tuned_is_said(tmp_path):
    (tmp_path / "bad.csv").write_text("a,b\n1,2\n")
    with pytest.raises(UserError, match="no table of aiter's"):
        run(tmp_path, "--gpu", "gfx942:304", "--table", str(tmp_path / "bad.csv"))
    with pytest.raises(UserError, match=r"there is no .*gemm_tuner\.py"):
        run(tmp_path, "--run")
