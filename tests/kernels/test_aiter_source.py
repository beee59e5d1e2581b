"""By contract with aiter's own Python: OPENPI_OPT_AITER_SOURCE=FOLDER, a clone of ROCm/aiter.

Its lookup, its merge of tables, the reader and the writer of its tuner run unchanged on the CPU
(`tests/samples/aiter_source.py`). Seen to pass at e4048607. Without the variable what it says is
transcribed in `test_tuned_gemm.py` and `test_tune.py`.
"""

import ast
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from openpi_opt import tune
from openpi_opt.kernels import aiter_tables, tuned_gemm
from openpi_opt.kernels.aiter_tables import Product

SOURCE = os.environ.get("OPENPI_OPT_AITER_SOURCE", "")
pytestmark = pytest.mark.skipif(
    not SOURCE, reason="OPENPI_OPT_AITER_SOURCE names no clone of aiter"
)
SCRIPT = Path(__file__).parents[1] / "samples" / "aiter_source.py"
GPUS = [("gfx942", 304), ("gfx942", 80), ("gfx950", 256)]
# Products of the policy and around it: vectors, few rows, sizes that are padded, biases.
ASKED = [
    Product(m, n, k, bias)
    for m in (1, 4, 8, 11, 16, 51, 256, 532, 768, 788, 1024)
    for n, k in ((32, 1024), (200, 256), (1024, 4096), (2560, 1024), (2560, 2048), (8192, 1024))
    for bias in (False, True)
]


@pytest.fixture
def source(tmp_path):
    """A copy of what is read: aiter rewrites its own tables when their rows collide."""
    root = tmp_path / "aiter"
    for part in ("aiter/configs", "aiter/jit", "aiter/ops", "aiter/utility", "csrc"):
        shutil.copytree(Path(SOURCE) / part, root / part)
    shutil.copy(Path(SOURCE) / "aiter" / "tuned_gemm.py", root / "aiter")
    return root


def aiters(source: Path, gfx: str, units: int, job: str, given: Any, table: str = "") -> Any:
    """What its own code says."""
    run = subprocess.run(
        [sys.executable, str(SCRIPT), str(source), gfx, str(units), job],
        input=json.dumps(given), capture_output=True, text=True, timeout=300,
        env={**os.environ, "AITER_CONFIG_GEMM_BF16": table},
    )  # fmt: skip
    assert run.returncode == 0, run.stderr[-3000:]
    return json.loads(run.stdout.splitlines()[-1]) if job == "lookup" else None


@pytest.mark.parametrize(
    ("file", "name", "used"),
    [
        # by position, in `openpi_opt.kernels.aiter`; `out` and what follows are left to defaults
        ("ops/mha.py", "mha_fwd", "q k v dropout_p softmax_scale is_causal window_size_left "
         "window_size_right sink_size return_softmax_lse return_dropout_randval"),
        ("ops/rmsnorm.py", "rmsnorm", "out input weight epsilon gemma_norm"),
        ("ops/activation.py", "gelu_tanh_and_mul", "out input"),
        ("ops/shuffle.py", "shuffle_weight", "x layout"),
        ("ops/gemm_op_a8w8.py", "gemm_a8w8", "XQ WQ x_scale w_scale bias dtype"),
        ("tuned_gemm.py", "gemm_a16w16", "A B bias"),
    ],
)  # fmt: skip
def test_what_is_called_has_these_arguments(file, name, used):
    tree = ast.parse((Path(SOURCE) / "aiter" / file).read_text())
    found = [node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name == name]
    arguments = [argument.arg for argument in found[-1].args.args]
    assert arguments[: len(used.split())] == used.split()


@pytest.mark.parametrize(("gfx", "units"), GPUS)
def test_the_lookup_is_aiters(source, gfx, units):
    """With its own tables merged by itself, and with the one file that a trial gives it."""
    package = source / "aiter"
    rows = aiter_tables.merged(package, None)
    own = aiter_tables.served(rows, gfx, units, ASKED)
    expected = [own[product] or "torch" for product in ASKED]
    assert aiters(source, gfx, units, "lookup", ASKED) == expected
    table = str(tuned_gemm.install_table(None, package))
    assert aiters(source, gfx, units, "lookup", ASKED, table) == expected
    assert len(set(expected)) > 1


def test_from_untuned_to_tuned_to_used(source, tmp_path):
    """The whole way of `tune gemm`; its tuner's answer serves every product that it was asked."""
    out = tmp_path / "tuned"
    words = ["model=pi0_mini", "fusion=all", "--out", str(out)]
    assert tune.main(["gemm", *words]) == 0
    untuned, tuned = out / "bf16_untuned_gemm.csv", out / "bf16_tuned_gemm.csv"
    aiters(source, "gfx942", 304, "tune", {"untuned": str(untuned), "tuned": str(tuned)})
    asked = [
        Product(int(row["M"]), int(row["N"]), int(row["K"]), row["bias"] == "True", row["dtype"])
        for row in aiter_tables.read_table(tuned)
    ]
    assert len(asked) == len(untuned.read_text().splitlines()) - 1 > 5
    table = str(tuned_gemm.install_table(str(tuned), source / "aiter"))
    assert set(aiters(source, "gfx942", 304, "lookup", asked, table)) == {"asm"}
    rows = aiter_tables.merged(source / "aiter", str(tuned))
    assert set(aiter_tables.served(rows, "gfx942", 304, asked).values()) == {"asm"}
    assert "asm" not in aiter_tables.served(rows, "gfx942", 80, asked).values()
