"""The process environment of a trial: what the configuration says, not what the shell says.

Of the user's variables a trial gets those that say where things are or how the machine's tools are
set up, by an allow-list: whatever it prints goes into a log and to MLflow, so it is not to know any
token. Among those, a variable that selects kernels, tuning or numerics would change what a trial
measures without being written in its configuration, so they are taken out as well; the sweep prints
their names, never their values.
"""

from __future__ import annotations

import os
import re
import sysconfig
from collections.abc import Mapping
from pathlib import Path

from openpi_opt.config import Config
from openpi_opt.knobs import KNOBS
from openpi_opt.knobs.environment import VARIABLES
from openpi_opt.machine import Gpu, Machine
from openpi_opt.paths import package_dir
from openpi_opt.vendor import BY_DEVICE, GPU_VENDORS

CLEARED_PREFIXES = (
    "AITER_",
    "AMD_SERIALIZE_",
    "CUBLASLT_",
    "CUDNN_",
    "FLASH_ATTENTION_",
    "HIPBLASLT_",
    "MIOPEN_",
    "PYTORCH_TUNABLEOP_",
    "ROCBLAS_",
    "TORCHDYNAMO_",
    "TORCHINDUCTOR_",
    "TORCH_BLAS_",
    "TORCH_COMPILE_",
    "TORCH_CUDNN_",
    "TRITON_",
)
# Where compilers keep what they made: below the folder that the sweep gives to a fingerprint.
CACHES = {
    "TORCHINDUCTOR_CACHE_DIR": "inductor",
    "TRITON_CACHE_DIR": "triton",
    "AITER_JIT_DIR": "aiter",
}
# Marks every process of a trial, so that a later sweep finds those of a killed one.
TRIAL_VARIABLE = "OPENPI_OPT_TRIAL"
CLEARED_NAMES = frozenset(
    {
        "AMD_LOG_LEVEL",
        "CUBLAS_WORKSPACE_CONFIG",
        "CUDA_LAUNCH_BLOCKING",
        "CUDA_MODULE_LOADING",
        "DISABLE_ADDMM_CUDA_LT",
        "GPU_MAX_HW_QUEUES",
        "HIP_FORCE_DEV_KERNARG",
        "HIP_LAUNCH_BLOCKING",
        "NVIDIA_TF32_OVERRIDE",
        "PYTORCH_ALLOC_CONF",
        "PYTORCH_CUDA_ALLOC_CONF",
        "PYTORCH_HIP_ALLOC_CONF",
        "PYTORCH_NO_CUDA_MEMORY_CACHING",
        "TORCH_ALLOW_TF32_CUBLAS_OVERRIDE",
        "TORCH_ROCM_AOTRITON_ENABLE_EXPERIMENTAL",
        "USE_ROCM_AITER_ROPE_BACKEND",
    }
)
# Names more to let through, with commas between: what a host needs and nobody could foresee.
PASS_VARIABLE = "OPENPI_OPT_PASS"
# The allow-list. Variables of toolchains, runtimes and schedulers, by name or how it begins.
ADMITTED_NAMES = frozenset(
    {
        *("HOME", "LANG", "LANGUAGE", "LOGNAME", "PATH", "PWD", "SHELL", "TERM", "TMP", "TEMP"),
        *("TMPDIR", "TZ", "USER", "VIRTUAL_ENV", "CPATH", "MAX_JOBS", "CC", "CXX", "CFLAGS"),
        *("CXXFLAGS", "CPPFLAGS", "LDFLAGS", "SOURCE_DATE_EPOCH", PASS_VARIABLE),
    }
)
ADMITTED_PREFIXES = (
    *("LC_", "LD_", "PYTHON", "COVERAGE_", "COV_CORE_", "CONDA_", "XDG_", "NIX_", "OPENPI_OPT_"),
    *("OMP_", "KMP_", "GOMP_", "MKL_", "OPENBLAS_", "BLIS_", "NUMEXPR_", "MALLOC_", "GLIBC_"),
    *("CUDA", "CUBLAS", "CUDNN", "CUPTI_", "KINETO_", "NVIDIA_", "NV_", "NVCC_", "NCCL_"),
    *("HIP", "HSA_", "HCC_", "ROC", "AMD", "GPU_", "GFX", "RCCL_", "MIOPEN_", "COMGR_"),
    *("TORCH", "PYTORCH_", "TRITON_", "AITER_", "FLASH_ATTENTION_", "SLURM_", "CMAKE_", "NINJA_"),
    *("MLIR_", "LLVM_", "OPTIMIZE_EPILOGUE", "DISABLE_ADDMM_CUDA_LT", "USE_ROCM_", "CCACHE_"),
)
# Whatever the list says.
_SECRET = re.compile(
    r"TOKEN|JWT|SECRET|PASSW|PASSPHRASE|CREDENTIAL|(API|ACCESS|PRIVATE|AUTH|SSH|SIGNING)_?KEY|_KEY$"
    r"|AUTHORIZATION|COOKIE|SESSION|_PW$|_PWD$|_PASS$",
    re.IGNORECASE,
)
_URL_WITH_PASSWORD = re.compile(r"://[^/\s]*:[^/\s]*@")
# Says how many cores this process may have; containers and schedulers set it.
_KEPT = frozenset({"OMP_NUM_THREADS"})
# Caches, tools and data: they say where, not what.
PLACE_SUFFIXES = ("_DIR", "_PATH", "_HOME", "_ROOT")


def cleared_names(environ: Mapping[str, str] | None = None) -> list[str]:
    """Names in the environment that would change a trial and are kept from it."""
    source = os.environ if environ is None else environ
    return sorted(name for name in source if _changes_a_trial(name) or name in CACHES)


def child_environment(
    cfg: Config,
    machine: Machine,
    environ: Mapping[str, str] | None = None,
    gpu: Gpu | None = None,
    threads: int | None = None,
    caches: Path | None = None,
) -> dict[str, str]:
    """Environment of the process that runs `cfg`, from the controller's own.

    Only admitted variables of the controller's are in it, and those that knobs set.
    `gpu` is the one that it is to see, `threads` bounds those of OpenMP, and `caches` is where
    compilers find what they made before.

    Raises:
        ValueError: two knobs want one variable to have different values.
    """
    source = os.environ if environ is None else environ
    more = frozenset(filter(None, source.get(PASS_VARIABLE, "").split(",")))
    env = {
        name: value
        for name, value in source.items()
        if not _changes_a_trial(name) and (name in more or _is_admitted(name, value))
    }
    if threads is None and machine.quota is not None:
        threads = machine.cores
    if threads is not None:
        threads = machine.threads(threads)
        env["OMP_NUM_THREADS"] = str(min(threads, _number(env.get("OMP_NUM_THREADS")) or threads))
    if caches is not None:
        env.update({name: str(caches / folder) for name, folder in CACHES.items()})
    env.update(knob_variables(cfg))
    env.update(_gpu_selection(cfg, machine, env, gpu))
    env["PYTHONUNBUFFERED"] = "1"
    if not BY_DEVICE[cfg.device].is_gpu:
        # A waiting OpenMP thread that spins keeps the core from the thread it waits for as soon as
        # anything else runs: 50 ms calls became 5 s beside one busy neighbour on two cores.
        env.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    env.update(_import_path(env))
    return env


def _is_admitted(name: str, value: str) -> bool:
    """Whether a trial may know it, and so its log and MLflow."""
    if name in ADMITTED_NAMES:
        return True
    if _SECRET.search(name) or _URL_WITH_PASSWORD.search(value):
        return False
    return name.startswith(ADMITTED_PREFIXES) or name.endswith(PLACE_SUFFIXES)


def _changes_a_trial(name: str) -> bool:
    if name in CLEARED_NAMES or (name in VARIABLES and name not in _KEPT):
        return True
    return name.startswith(CLEARED_PREFIXES) and not name.endswith(PLACE_SUFFIXES)


def knob_variables(cfg: Config) -> dict[str, str]:
    """What the knobs of `cfg` set.

    Raises:
        ValueError: two knobs want one variable to have different values.
    """
    merged: dict[str, str] = {}
    for knob in (knob for knob in KNOBS if knob.acts(cfg)):
        for name, value in knob.environment(cfg).items():
            if merged.setdefault(name, value) != value:
                raise ValueError(f"two knobs set {name}: {merged[name]!r} and {value!r}")
    return merged


def _number(text: str | None) -> int | None:
    """A whole number above 0; OpenMP also admits lists, whose first number counts."""
    first = (text or "").split(",")[0].strip()
    return int(first) if first.isdecimal() and int(first) > 0 else None


def _gpu_selection(
    cfg: Config, machine: Machine, env: dict[str, str], chosen: Gpu | None
) -> dict[str, str]:
    """Show the trial one GPU, in the way of its vendor."""
    vendor = BY_DEVICE[cfg.platform.device]
    if not vendor.is_gpu:
        return {}
    gpu = chosen or machine.gpus_for(cfg.platform.device)[cfg.platform.gpu or 0]
    chosen_by = vendor.selection(gpu)
    # What is left of the user's choice would be applied on top, or to another vendor's runtime.
    for each in GPU_VENDORS:
        for name in set(each.visibility) - set(each.outer_visibility):
            env.pop(name, None)
    return chosen_by


def _import_path(env: Mapping[str, str]) -> dict[str, str]:
    """Let the child import this very package, also from a checkout that is not installed.

    Not for site-packages: put in front, it would hide modules of the standard library.
    """
    root = package_dir().parent
    if root in {Path(sysconfig.get_path(name)) for name in ("purelib", "platlib")}:
        return {}
    rest = env.get("PYTHONPATH")
    return {"PYTHONPATH": os.pathsep.join([str(root), *([rest] if rest else [])])}
