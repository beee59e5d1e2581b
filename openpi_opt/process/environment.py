"""The process environment of a trial: what the configuration says, not what the shell says.

Of the user's variables a trial gets those that say where things are or how the machine's tools are
set up, by an allow-list: whatever it prints goes into a log and to MLflow, so it is not to know any
token. Of what runtimes, compilers and libraries of a GPU read, only names that select devices and
places are on the list: any other might change what a trial measures without being written in its
configuration. The sweep prints the names of those that were kept away, never their values.
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

# What reads variables beginning like this decides kernels, tuning, numerics or clocks of a trial.
DECISIVE_PREFIXES = (
    *("CUDA", "CUBLAS", "CUDNN", "CUFFT", "CUSPARSE", "CUTLASS_", "CUTE_", "CUPTI_", "KINETO_"),
    *("NCCL_", "NVCC_", "NVRTC_", "NVTE_", "NVIDIA_TF32", "HIP", "HSA_", "HCC_", "ROC", "AMD"),
    *("GPU_", "GFX_", "RCCL_", "MIOPEN_", "COMGR_", "TENSILE_", "CK_", "DEBUG_CLR_", "DEBUG_HIP_"),
    *("TORCH", "PYTORCH_", "ATEN_", "TRITON_", "AITER_", "USE_ROCM_", "FLASH_ATTENTION_", "XLA_"),
    *("MLIR_", "LLVM_", "OPTIMIZE_EPILOGUE", "DISABLE_ADDMM_", "DISABLE_LLVM_", "DISABLE_PTXAS_"),
    *("OMP_", "KMP_", "GOMP_", "MKL_", "ONEDNN_", "DNNL_", "OPENBLAS_", "BLIS_", "NUMEXPR_"),
    *("MALLOC_", "GLIBC_TUNABLES", "LD_PRELOAD", "LD_AUDIT", "LD_BIND_NOW", "LD_DEBUG"),
    *("PYTHONOPTIMIZE", "PYTHONMALLOC", "PYTHONDEVMODE", "PYTHONTRACEMALLOC", "PYTHONDEBUG"),
    *("PYTHONASYNCIODEBUG", "PYTHONPROFILE", "PYTHONPERF", "PYTHON_PERF", "PYTHON_GIL"),
    *("PYTHON_JIT", "PYTHON_CPU_COUNT"),
)
# Where compilers keep what they made: below the folder that the sweep gives to a fingerprint.
CACHES = {
    "TORCHINDUCTOR_CACHE_DIR": "inductor",
    "TRITON_CACHE_DIR": "triton",
    "AITER_JIT_DIR": "aiter",
}
# On a CPU a trial keeps freed memory up to these bytes, as torch's cache keeps a GPU's: glibc gave
# 100 MB back after each call of pi0_mini, and a third of the call was page faults.
KEPT_MEMORY = {"MALLOC_MMAP_THRESHOLD_": str(32 << 20), "MALLOC_TRIM_THRESHOLD_": str(512 << 20)}
# Marks every process of a trial, so that a later sweep finds those of a killed one.
TRIAL_VARIABLE = "OPENPI_OPT_TRIAL"
# Names more to let through, with commas between: what a host needs and nobody could foresee.
PASS_VARIABLE = "OPENPI_OPT_PASS"
# The allow-list: names, and how names begin or end, unless they are decisive.
ADMITTED_NAMES = frozenset(
    {
        *("HOME", "LANG", "LANGUAGE", "LOGNAME", "PATH", "PWD", "SHELL", "TERM", "TMP", "TEMP"),
        *("TMPDIR", "TZ", "USER", "VIRTUAL_ENV", "CPATH", "MAX_JOBS", "CC", "CXX", "CFLAGS"),
        *("CXXFLAGS", "CPPFLAGS", "LDFLAGS", "SOURCE_DATE_EPOCH", PASS_VARIABLE),
        # Which GPUs, how they are counted, and for which architectures to build.
        *("CUDA_VISIBLE_DEVICES", "CUDA_DEVICE_ORDER", "CUDA_MPS_PIPE_DIRECTORY"),
        *("HIP_VISIBLE_DEVICES", "ROCR_VISIBLE_DEVICES", "GPU_DEVICE_ORDINAL"),
        *("NVIDIA_VISIBLE_DEVICES", "NVIDIA_DRIVER_CAPABILITIES", "HSA_OVERRIDE_GFX_VERSION"),
        *("TORCH_CUDA_ARCH_LIST", "PYTORCH_ROCM_ARCH", "CUDAARCHS", "HIP_PLATFORM"),
        # Where toolchains and caches are.
        *("CUDA_HOME", "CUDA_PATH", "CUDA_ROOT", "CUDA_BIN_PATH", "CUDA_CACHE_PATH"),
        *("CUDA_TOOLKIT_ROOT_DIR", "CUDAToolkit_ROOT", "CUDNN_HOME", "CUDNN_PATH", "CUDACXX"),
        *("ROCM_HOME", "ROCM_PATH", "ROCM_ROOT", "HIP_PATH", "HIP_ROOT_DIR", "HIP_CLANG_PATH"),
        *("HIP_DEVICE_LIB_PATH", "HSA_PATH", "NVCC_PREPEND_FLAGS", "NVCC_APPEND_FLAGS"),
        *("TORCH_HOME", "TORCH_EXTENSIONS_DIR", "TRITON_HOME", "TRITON_LIBCUDA_PATH"),
        *("TRITON_PTXAS_PATH", "TRITON_PTXAS_BLACKWELL_PATH", "TRITON_CUOBJDUMP_PATH"),
        *("TRITON_NVDISASM_PATH", "TRITON_HIP_LLD_PATH", "TRITON_LIBHIP_PATH", *CACHES),
        # How many cores this process may have; containers and schedulers set them.
        *("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "OMP_WAIT_POLICY"),
    }
)
ADMITTED_PREFIXES = (
    *("LC_", "LD_", "PYTHON", "COVERAGE_", "COV_CORE_", "CONDA_", "XDG_", "NIX_", "OPENPI_OPT_"),
    *("SLURM_", "CMAKE_", "NINJA_", "CCACHE_"),
)
# Caches, tools and data: they say where, not what.
PLACE_SUFFIXES = ("_DIR", "_PATH", "_HOME", "_ROOT")
# Whatever the lists say: by the name, and by what the value looks like.
_SECRET = re.compile(
    r"TOKEN|JWT|SECRET|PASSW|PASSPHRASE|CREDENTIAL|(API|ACCESS|PRIVATE|AUTH|SSH|SIGNING)_?KEY|_KEY$"
    r"|AUTHORIZATION|COOKIE|SESSION|_PW$|_PWD$|_PASS$",
    re.IGNORECASE,
)
_SECRET_VALUE = re.compile(
    r"://[^/\s]*:[^/\s]*@|(^|[\s;,'\"])[^\s/:@]+:[^\s/:@]+@"
    r"|\b(sig|signature|token|passw(or)?d|pwd|secret|api_?key|access_?key|credential)="
    r"|\bbearer\s|-----BEGIN [A-Z ]*PRIVATE KEY",
    re.IGNORECASE,
)


def cleared_names(environ: Mapping[str, str] | None = None) -> list[str]:
    """Names in the environment that might change a trial and are kept from it."""
    source = os.environ if environ is None else environ
    return sorted(name for name in source if name in CACHES or _is_decisive(name))


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
    """
    source = os.environ if environ is None else environ
    more = frozenset(filter(None, source.get(PASS_VARIABLE, "").split(",")))
    env = {
        name: value
        for name, value in source.items()
        if not _is_decisive(name) and (name in more or _is_admitted(name, value))
    }
    if threads is None and machine.quota is not None:
        threads = machine.cores
    if threads is not None:
        threads = machine.threads(threads)
        # OpenMP also admits lists, whose first number counts.
        given = re.match(r"\s*(\d+)\s*(,|$)", env.get("OMP_NUM_THREADS", ""))
        env["OMP_NUM_THREADS"] = str(min(threads, (int(given[1]) if given else 0) or threads))
    if caches is not None:
        env.update({name: str(caches / folder) for name, folder in CACHES.items()})
    env.update(knob_variables(cfg))
    env["PYTHONUNBUFFERED"] = "1"
    if (vendor := BY_DEVICE[cfg.device]).is_gpu:
        # What is left of the user's choice would be applied on top, or to another's runtime.
        for each in GPU_VENDORS:
            for name in set(each.visibility) - set(each.outer_visibility):
                env.pop(name, None)
        shown = gpu or machine.gpus_for(cfg.device)[cfg.platform.gpu or 0]
        env.update(vendor.selection(shown))
    else:
        # A waiting OpenMP thread that spins keeps the core from the thread it waits for as soon as
        # anything else runs: 50 ms calls became 5 s beside one busy neighbour on two cores.
        env.setdefault("OMP_WAIT_POLICY", "PASSIVE")
        env.update(KEPT_MEMORY)
    env.update(import_path(env))
    return env


def _is_admitted(name: str, value: str) -> bool:
    """Whether a trial may know it, and so its log and MLflow."""
    if _SECRET_VALUE.search(value):
        return False
    if name in ADMITTED_NAMES:
        return True
    places = name.startswith(ADMITTED_PREFIXES) or name.endswith(PLACE_SUFFIXES)
    return places and not _SECRET.search(name)


def _is_decisive(name: str) -> bool:
    """Whether a trial may depend on it; versions that a container was built with say nothing."""
    prefixed = name.startswith(DECISIVE_PREFIXES) and not name.endswith("_VERSION")
    return (prefixed or name in VARIABLES) and name not in ADMITTED_NAMES


def knob_variables(cfg: Config) -> dict[str, str]:
    """What the knobs of `cfg` set; ValueError when two want one variable to differ."""
    merged: dict[str, str] = {}
    for knob in (knob for knob in KNOBS if knob.acts(cfg)):
        for name, value in knob.environment(cfg).items():
            if merged.setdefault(name, value) != value:
                raise ValueError(f"two knobs set {name}: {merged[name]!r} and {value!r}")
    return merged


def import_path(env: Mapping[str, str]) -> dict[str, str]:
    """Let the child import this very package, also from a checkout that is not installed.

    Not for site-packages: put in front, it would hide modules of the standard library.
    """
    root = package_dir().parent
    if root in {Path(sysconfig.get_path(name)) for name in ("purelib", "platlib")}:
        return {}
    rest = env.get("PYTHONPATH")
    return {"PYTHONPATH": os.pathsep.join([str(root), *([rest] if rest else [])])}
