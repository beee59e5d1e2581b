"""aiter's own Python on a CPU: `python aiter_source.py SOURCE GFX UNITS lookup|tune < JSON`.

What needs a GPU is left out, and no kernel runs. The padding of M is its C++, compiled here.

`lookup` reads [[m, n, k, bias, dtype]...] and prints the library that `aiter/tuned_gemm.py` chooses
for each. `tune` reads {"untuned": FILE, "tuned": FILE}, and its tuner reads the first as it would
before tuning, and writes the second as it does afterwards, as if asm had won everywhere.
"""

import ctypes
import importlib
import json
import logging
import os
import subprocess
import sys
import tempfile
import types
from importlib.machinery import ModuleSpec
from pathlib import Path

source, gfx, units, job = sys.argv[1:]
scratch = Path(tempfile.mkdtemp())
(scratch / "rocm" / ".info").mkdir(parents=True)
(scratch / "rocm" / ".info" / "version").write_text("7.0.0\n")
(scratch / "rocm" / "bin").mkdir()
(scratch / "rocm" / "bin" / "rocminfo").write_text(f"#!/bin/sh\necho Name: {gfx}\n")
(scratch / "rocm" / "bin" / "rocminfo").chmod(0o755)
os.environ |= {"PATH": f"{scratch / 'rocm' / 'bin'}:{os.environ['PATH']}",
               "GPU_ARCHS": gfx, "CU_NUM": units, "ROCM_HOME": str(scratch / "rocm"),
               "ROCM_PATH": str(scratch / "rocm"), "AITER_JIT_DIR": str(scratch)}  # fmt: skip


def module(name: str, **content: object) -> None:
    made = types.ModuleType(name)
    made.__path__ = [str(Path(source) / name.replace(".", "/"))]
    made.__spec__ = ModuleSpec(name, None, is_package=True)
    made.__spec__.submodule_search_locations = made.__path__
    made.__dict__.update(content)
    sys.modules[name] = made


def compiled_padding() -> object:
    library = scratch / "padding.so"
    code = scratch / "padding.cpp"
    code.write_text((Path(source) / "csrc/py_itfs_cu/gemm_common.cu").read_text())
    subprocess.run(["g++", "-shared", "-fPIC", str(code), "-o", str(library)], check=True)
    return ctypes.CDLL(str(library)).getPaddedM


def nothing(*_: object, **__: object) -> None:
    raise AssertionError("needs a GPU")


module("aiter", logger=logging.getLogger("aiter"), gemm_a16w16_asm=nothing,
       hipb_create_extension=nothing, hipb_mm=nothing)  # fmt: skip
sys.path.insert(0, source)
importlib.import_module("aiter.jit.core")
module("aiter.ops")
module("aiter.ops.enum", ActivationType=None, QuantType=None)  # numbers from compiled code
sys.modules["aiter"].dtypes = importlib.import_module("aiter.utility.dtypes")  # type: ignore[attr-defined]
module("aiter.ops")
module("aiter.ops.gemm_op_common", get_padded_m=compiled_padding())
# Whether FlyDSL can be imported is the machine's; a row that names it is served where it can.
module("aiter.ops.flydsl")
module("aiter.ops.flydsl.utils", is_flydsl_available=lambda: True)
kernels = types.SimpleNamespace(get_flydsl_splitk_hgemm_kernel_params=lambda name: {"name": name})
module("aiter.ops.flydsl.gemm_kernels", flydsl_hgemm=nothing,
       get_flydsl_splitk_hgemm_kernels=nothing, **vars(kernels))  # fmt: skip
sys.modules["aiter"].ops = types.SimpleNamespace(  # type: ignore[attr-defined]
    flydsl=types.SimpleNamespace(gemm_kernels=kernels)
)
logging.getLogger("aiter").addHandler(logging.StreamHandler(sys.stderr))
logging.getLogger("aiter").setLevel("INFO")
given = json.load(sys.stdin)

if job == "lookup":
    tuned_gemm = importlib.import_module("aiter.tuned_gemm")
    answers = []
    for m, n, k, bias, dtype in given:
        answers.append(tuned_gemm.get_GEMM_A16W16_config(m, n, k, bias, dtype, dtype)["libtype"])
    print(json.dumps(answers))
else:
    module("aiter.ops.gemm_op_a16w16", ASM_SPLITK_MAX_GRID=1)
    module("aiter.ops.triton.gemm.basic.gemm_a16w16", gemm_a16w16=nothing)
    for package in ("aiter.ops.triton", "aiter.ops.triton.gemm", "aiter.ops.triton.gemm.basic"):
        module(package)
    module("aiter.utility.mp_tuner", mp_tuner=nothing)
    sys.path.insert(0, str(Path(source) / "csrc" / "gemm_a16w16"))
    tuner_module = importlib.import_module("gemm_a16w16_tune")
    keys = ["gfx", "cu_num", "M", "N", "K", "bias", "dtype", "outdtype", "scaleAB", "bpreshuffle"]
    results = ["libtype", "solidx", "splitK", "us", "kernelName", "err_ratio", "tflops", "bw"]
    tuner = tuner_module.GemmA16W16Tuner("GemmA16W16Tuner", keys, results)
    tuner.get_gfx, tuner.get_cu_num = lambda: gfx, lambda: int(units)
    sys.argv = ["tuner", "--input_file", given["untuned"], "--tuned_file", given["tuned"],
                "--with-hipblaslt"]  # fmt: skip
    arguments = tuner.parse_args()
    tuner.pre_process(arguments)
    found = [
        ((tuple(row), 3, 1, "bf16gemm_fp32bf16_tn_64x64", "asm", False), 9.5, 0.0)
        for row in tuner.untunedf.itertuples(index=False)
    ]
    tuner.result_to_csv(tuner.result_to_df(found), given["tuned"])
    tuner.sortResults(given["tuned"], True, keys)
