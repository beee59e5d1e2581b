import dataclasses
import subprocess
import sys
from pathlib import Path

import pytest
from search_samples import CPU

from openpi_opt.config import Config
from openpi_opt.machine import Gpu, TorchBuild
from openpi_opt.paths import package_dir
from openpi_opt.process import environment
from openpi_opt.process.environment import CACHES, KEPT_MEMORY, child_environment, cleared_names

PLAIN = {"PATH": "/bin", "HOME": "/home/x", "LD_LIBRARY_PATH": "/lib", "TMPDIR": "/tmp"}
KEPT = ["TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR", "AITER_JIT_DIR", "TRITON_PTXAS_PATH"]
KEPT += ["CUDA_HOME", "ROCM_PATH", "HSA_OVERRIDE_GFX_VERSION", "SLURM_JOB_ID", "NVCC_PREPEND_FLAGS"]
CLEARED = [
    "TORCHINDUCTOR_MAX_AUTOTUNE",
    "TORCH_COMPILE_DISABLE",
    "PYTORCH_TUNABLEOP_ENABLED",
    "TRITON_INTERPRET",
    "AITER_TRITON_ONLY",
    "CUDA_LAUNCH_BLOCKING",
    "HIP_LAUNCH_BLOCKING",
    "NVIDIA_TF32_OVERRIDE",
    "TORCH_ALLOW_TF32_CUBLAS_OVERRIDE",
    # What nobody had thought of when there was a list of bad names.
    *("HSA_CU_MASK", "ROC_GLOBAL_CU_MASK", "ROCBLAS_TENSILE_GEMM_OVERRIDE_PATH"),
    *("HIP_ONLINE_TUNING", "AMD_DIRECT_DISPATCH", "TORCH_LOGS", "MLIR_ENABLE_DUMP"),
    *("AMDGCN_ENABLE_DUMP", "PYTORCH_NO_HIP_MEMORY_CACHING", "HSA_TOOLS_LIB", "CUDA_NEW_THING"),
    *("ROCM_DEBUG_AGENT_OPTIONS", "HIPBLASLT_TUNING_FILE", "KMP_AFFINITY", "MALLOC_ARENA_MAX"),
    *("LD_PRELOAD", "PYTHONOPTIMIZE", "PYTHONMALLOC", "PYTHON_GIL"),
]


def on(device: str, gpu: int = 0) -> Config:
    return Config.parse({"platform": {"device": device, "gpu": gpu}})


def gpus(vendor: str) -> tuple[Gpu, ...]:
    return tuple(Gpu(index, f"GPU-{index}", "gpu", vendor, "arch", 80_000, "1") for index in (2, 5))


def test_variables_that_change_a_trial_are_taken_out():
    given = PLAIN | dict.fromkeys(KEPT + CLEARED, "1")
    env = child_environment(on("cpu"), CPU, given | {"MALLOC_TRIM_THRESHOLD_": "1"})
    assert not set(CLEARED) & set(env)
    assert env.items() >= KEPT_MEMORY.items()
    assert (PLAIN | dict.fromkeys(KEPT, "1")).items() <= env.items()
    places = [name for name in KEPT if name in CACHES]
    assert len(places) == 3  # a trial by hand keeps them, a sweep has folders of its own
    assert cleared_names(given) == sorted([*CLEARED, *places])
    assert env["PYTHONUNBUFFERED"] == "1"


@pytest.mark.parametrize(
    ("device", "vendor", "given", "name", "value"),
    [
        ("cuda", "nvidia", {"CUDA_VISIBLE_DEVICES": "2,5"}, "CUDA_VISIBLE_DEVICES", "GPU-5"),
        # HIP reads CUDA's variable, too.
        ("rocm", "amd", {"CUDA_VISIBLE_DEVICES": "0"}, "HIP_VISIBLE_DEVICES", "5"),
    ],
)
def test_a_trial_sees_one_gpu(device, vendor, given, name, value):
    torch = (
        TorchBuild("2.13", "13.0", None) if vendor == "nvidia" else TorchBuild("2.13", None, "7")
    )
    machine = dataclasses.replace(CPU, gpus=gpus(vendor), torch=torch)
    env = child_environment(on(device, 1), machine, given)
    assert {n: v for n, v in env.items() if n.endswith("_VISIBLE_DEVICES")} == {name: value}


def test_what_a_knob_needs_is_set_although_its_prefix_is_cleared():
    machine = dataclasses.replace(CPU, gpus=gpus("nvidia"))
    cfg = Config.parse({"platform": {"device": "cuda"}, "attention": {"vision": "aiter"}})
    env = child_environment(cfg, machine, {"AITER_TRITON_ONLY": "0"})
    assert env["AITER_TRITON_ONLY"] == "1"


def test_knobs_that_want_different_values_are_a_defect(monkeypatch):
    class Wants:
        def __init__(self, value: str):
            self.value = value

        def acts(self, cfg: Config) -> bool:
            return True

        def environment(self, cfg: Config) -> dict[str, str]:
            return {"X": self.value}

    monkeypatch.setattr(environment, "KNOBS", (Wants("1"), Wants("2")))
    with pytest.raises(ValueError, match="two knobs set X"):
        child_environment(on("cpu"), CPU, {})


def test_the_package_can_be_imported_from_any_folder(tmp_path, monkeypatch):
    env = child_environment(on("cpu"), CPU, {"PYTHONPATH": "/elsewhere"})
    assert env["PYTHONPATH"].split(":") == [str(package_dir().parent), "/elsewhere"]
    code = "import openpi_opt, sys; sys.stdout.write(openpi_opt.__file__)"
    done = subprocess.run(
        [sys.executable, "-S", "-c", code], cwd=tmp_path, env=env, capture_output=True, text=True
    )
    assert done.stdout == str(package_dir() / "__init__.py")
    root = str(package_dir().parent)  # site-packages would hide modules of the standard library
    monkeypatch.setattr(environment.sysconfig, "get_path", lambda name: root)
    assert "PYTHONPATH" not in child_environment(on("cpu"), CPU, {})


def test_a_slot_gives_gpu_threads_and_caches():
    machine = dataclasses.replace(CPU, gpus=gpus("nvidia"))
    given = {"OMP_NUM_THREADS": "3", "TRITON_CACHE_DIR": "/elsewhere"}
    caches = Path("/store/caches/abc")
    env = child_environment(
        Config.parse({"platform": {"device": "cuda"}}),
        machine,
        given,
        gpu=machine.gpus[1],
        threads=8,
        caches=caches,
    )
    assert env["CUDA_VISIBLE_DEVICES"] == "GPU-5"
    assert env["OMP_NUM_THREADS"] == "3"  # the user may want fewer
    assert {env[name] for name in CACHES} == {str(caches / part) for part in CACHES.values()}
    few = child_environment(on("cpu"), CPU, {"OMP_NUM_THREADS": "64,2"}, threads=2)
    assert few["OMP_NUM_THREADS"] == "2"
