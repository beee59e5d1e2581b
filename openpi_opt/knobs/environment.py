"""Knob `environment`: variables that runtimes and libraries read before the first kernel."""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import BeforeValidator, Field, field_validator

from openpi_opt.knobs.base import Configuration, Knob, Options, Refusal

if TYPE_CHECKING:
    from openpi_opt.machine import Machine

Vendor = Literal["amd", "nvidia", "gpu", "any"]

FLAG = "0|1"
AMD_GUIDE = "AMD workload tuning guide for MI300X"
FORK = "sunxxuns/openpi-1"
ROCM, TORCH, TRITON = "ROCm documentation", "PyTorch documentation", "Triton source"
CUDA = "CUDA documentation"
_OFF = "0 is how it is without it; any other value is refused"
_ONE_GPU = "an inference on one GPU runs no collective"
# One setting under several names.
_SPELLINGS = (
    ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_HIP_ALLOC_CONF"),
    ("DISABLE_ADDMM_CUDA_LT", "DISABLE_ADDMM_HIP_LT"),
)


@dataclass(frozen=True)
class Variable:
    """One admitted variable. `values` is a regular expression for the whole value.

    `inert` says why nothing reads it: such a variable is kept in the record and has no effect.
    So is one with `tuning` unless blas.tunableop.mode=tune: nothing else reads it.
    """

    vendor: Vendor
    values: str
    meaning: str
    source: str
    inert: str | None = None
    tuning: bool = False


def _allocator(source: str) -> Variable:
    pair = r"[a-z_0-9]+:[A-Za-z0-9_.\[\]>:-]+"
    return Variable("gpu", f"{pair}(,{pair})*", "caching allocator, key:value pairs", source)


def _tuning(values: str, meaning: str) -> Variable:
    return Variable("amd", values, f"TunableOp: {meaning}", AMD_GUIDE, tuning=True)


# Effects were reported for MI300X and MI350 unless a source says otherwise. Not run on AMD.
VARIABLES: dict[str, Variable] = {
    "HIP_FORCE_DEV_KERNARG": Variable(
        "amd", FLAG, "kernel arguments in device memory: 2-3 us per launch", AMD_GUIDE
    ),
    "GPU_MAX_HW_QUEUES": Variable(
        "amd", r"[1-9]\d?", "hardware queues per device, 4 if unset", AMD_GUIDE
    ),
    "HSA_NO_SCRATCH_RECLAIM": Variable(
        "amd", FLAG, "keep scratch memory per queue: for kernels that spill", AMD_GUIDE
    ),
    "HSA_ENABLE_SDMA": Variable("amd", FLAG, "copies by the DMA engines instead of kernels", FORK),
    "DEBUG_CLR_GRAPH_PACKET_CAPTURE": Variable(
        "amd", FLAG, "queue packets of HIP graphs recorded ahead", AMD_GUIDE
    ),
    "TORCH_BLAS_PREFER_HIPBLASLT": Variable(
        "amd", FLAG, "hipBLASLt (1) or rocBLAS (0) for matrix products", AMD_GUIDE
    ),
    "TORCH_BLAS_PREFER_CUBLASLT": Variable(
        "nvidia", FLAG, "cuBLASLt (1) or cuBLAS (0) for matrix products", TORCH
    ),
    "DISABLE_ADDMM_CUDA_LT": Variable(
        "gpu", FLAG, "no Lt library for products with a bias (also on ROCm)", FORK
    ),
    "DISABLE_ADDMM_HIP_LT": Variable(
        "amd", FLAG, "the same under the name of older ROCm builds; torch 2.12 has it not", FORK
    ),
    "ROCBLAS_USE_HIPBLASLT": Variable(
        "amd", FLAG, "rocBLAS hands products to hipBLASLt (1) or keeps them (0)", ROCM
    ),
    "PYTORCH_TUNABLEOP_MAX_TUNING_DURATION_MS": _tuning(r"\d+", "ms for a solution, 30 if unset"),
    "PYTORCH_TUNABLEOP_MAX_TUNING_ITERATIONS": _tuning(r"\d+", "runs of one, 100 if unset"),
    "PYTORCH_TUNABLEOP_MAX_WARMUP_DURATION_MS": _tuning(r"\d+", "ms before it counts, 0 if unset"),
    "PYTORCH_TUNABLEOP_MAX_WARMUP_ITERATIONS": _tuning(r"\d+", "runs before it counts, 0 if unset"),
    "PYTORCH_TUNABLEOP_ICACHE_FLUSH_ENABLED": _tuning(FLAG, "cold instruction cache, 1 if unset"),
    "PYTORCH_TUNABLEOP_NUMERICAL_CHECK": _tuning(
        r"[01]|[\d.e-]+_[\d.e-]+", "drop wrong solutions: 1, or atol_rtol in newer torch"
    ),
    "PYTORCH_TUNABLEOP_ROCBLAS_ENABLED": _tuning(FLAG, "try rocBLAS, 1 if unset"),
    "PYTORCH_TUNABLEOP_HIPBLASLT_ENABLED": _tuning(FLAG, "try hipBLASLt, 1 if unset"),
    "MIOPEN_FIND_MODE": Variable(
        "amd",
        "[1-7]|NORMAL|FAST|HYBRID|DYNAMIC_HYBRID|TRUST_VERIFY",
        "how MIOpen chooses a convolution: here the patch convolution only",
        AMD_GUIDE,
    ),
    "MIOPEN_FIND_ENFORCE": Variable(
        "amd",
        "[1-5]|NONE|DB_UPDATE|SEARCH|SEARCH_DB_UPDATE|DB_CLEAN",
        "when MIOpen tunes a convolution",
        AMD_GUIDE,
    ),
    "PYTORCH_MIOPEN_SUGGEST_NHWC": Variable(
        "amd", FLAG, "channels-last convolutions; goes with layout_optimization", AMD_GUIDE
    ),
    "TORCH_ROCM_AOTRITON_ENABLE_EXPERIMENTAL": Variable(
        "amd", FLAG, "AOTriton attention on architectures that it calls experimental", TORCH
    ),
    "TORCH_ROCM_FA_PREFER_CK": Variable(
        "amd", FLAG, "CK instead of AOTriton in scaled_dot_product_attention", TORCH
    ),
    "AMDGCN_USE_BUFFER_OPS": Variable("amd", FLAG, "buffer loads and stores in Triton", TRITON),
    "TRITON_HIP_USE_ASYNC_COPY": Variable(
        "amd", FLAG, "direct loads from memory to LDS in Triton", TRITON
    ),
    "TRITON_HIP_USE_BLOCK_PINGPONG": Variable(
        "amd", FLAG, "Triton's ping-pong scheduling of two warps", TRITON
    ),
    "PYTORCH_ALLOC_CONF": _allocator(TORCH),
    "PYTORCH_CUDA_ALLOC_CONF": _allocator(TORCH),
    "PYTORCH_HIP_ALLOC_CONF": _allocator(FORK),
    "CUDA_MODULE_LOADING": Variable("nvidia", "LAZY|EAGER", "when kernels are loaded", CUDA),
    "CUBLAS_WORKSPACE_CONFIG": Variable(
        "nvidia", r"(:\d+:\d+)+", "sizes (KiB) and number of cuBLAS workspaces", CUDA
    ),
    "CUBLASLT_WORKSPACE_SIZE": Variable("nvidia", r"\d+", "KiB of cuBLASLt's workspace", TORCH),
    "CUDA_DEVICE_MAX_CONNECTIONS": Variable(
        "nvidia", r"[1-9]\d?", "hardware queues, 8 if unset", CUDA
    ),
    "OMP_NUM_THREADS": Variable("any", r"[1-9]\d*", "threads of the CPU's loops", AMD_GUIDE),
    "HIP_LAUNCH_BLOCKING": Variable("amd", "0", "launches do not wait", AMD_GUIDE, inert=_OFF),
    "CUDA_LAUNCH_BLOCKING": Variable("gpu", "0", "launches do not wait", CUDA, inert=_OFF),
    "AMD_LOG_LEVEL": Variable("amd", "0", "no log of the runtime", AMD_GUIDE, inert=_OFF),
    "TORCH_ROCM_USE_HIPBLASLT": Variable(
        "amd",
        FLAG,
        "said to choose the BLAS library",
        FORK,
        inert="neither torch nor ROCm reads it; TORCH_BLAS_PREFER_HIPBLASLT is the real one",
    ),
    "HIP_CACHE_ENABLED": Variable(
        "amd", FLAG, "said to cache compiled kernels", FORK, inert="nothing in ROCm reads it"
    ),
    "ENABLE_HIP_GRAPHS": Variable(
        "amd",
        FLAG,
        "said to switch HIP graphs on",
        FORK,
        inert="read by the fork's own code only; graph=manual captures",
    ),
    "OPTIMIZE_EPILOGUE": Variable(
        "amd",
        FLAG,
        "Triton stores results without a detour through LDS",
        AMD_GUIDE,
        inert="Triton 3.6 and newer do not read it and always do so",
    ),
    "USE_ROCM_AITER_ROPE_BACKEND": Variable(
        "amd", FLAG, "aiter's rotary embedding", FORK, inert="nothing in aiter or torch reads it"
    ),
    "NCCL_MIN_NCHANNELS": Variable(
        "amd", r"[1-9]\d*", "channels of a collective", AMD_GUIDE, inert=_ONE_GPU
    ),
    "TORCH_NCCL_HIGH_PRIORITY": Variable(
        "gpu", FLAG, "collectives on a stream of high priority", AMD_GUIDE, inert=_ONE_GPU
    ),
}

_SLOW = "serialises launches for debugging; nothing that it times is worth knowing"
_LOGS = "writes logs or dumps for debugging while being timed"
_CHECKS = "makes the runtime check or forgo what it does otherwise, for debugging"
_OTHER_KNOB = "is chosen by {}, so that the record says it in one place"
# Known and not admitted. A name that ends in "*" stands for all that begin like it.
REFUSED: dict[str, str] = {
    "HIP_LAUNCH_BLOCKING": _SLOW,
    "CUDA_LAUNCH_BLOCKING": _SLOW,
    "AMD_SERIALIZE_KERNEL": _SLOW,
    "AMD_SERIALIZE_COPY": _SLOW,
    "AMD_LOG_LEVEL": _LOGS,
    "TORCH_LOGS": _LOGS,
    "TORCH_COMPILE_DEBUG": _LOGS,
    "TORCHDYNAMO_VERBOSE": _LOGS,
    "PYTORCH_TUNABLEOP_VERBOSE": _LOGS,
    "MLIR_ENABLE_DUMP": _LOGS,
    "AMDGCN_ENABLE_DUMP": _LOGS,
    "PYTORCH_NO_CUDA_MEMORY_CACHING": _CHECKS,
    "PYTORCH_NO_HIP_MEMORY_CACHING": _CHECKS,
    "HSA_DISABLE_FRAGMENT_ALLOCATOR": _CHECKS,
    "HSA_TOOLS_LIB": _CHECKS,
    "HSA_ENABLE_DEBUG": _CHECKS,
    "ROCM_DEBUG_AGENT_OPTIONS": _CHECKS,
    "PYTORCH_TUNABLEOP_*": _OTHER_KNOB.format("blas.tunableop"),
    "AITER_*": _OTHER_KNOB.format("attention and blas"),
    "TORCHINDUCTOR_*": _OTHER_KNOB.format("compile.inductor"),
    "CUDA_VISIBLE_DEVICES": _OTHER_KNOB.format("platform.gpu"),
    "HIP_VISIBLE_DEVICES": _OTHER_KNOB.format("platform.gpu"),
    "ROCR_VISIBLE_DEVICES": _OTHER_KNOB.format("platform.gpu"),
    "HIPBLASLT_ALLOW_TF32": _OTHER_KNOB.format("precision.tf32"),
    "NVIDIA_TF32_OVERRIDE": _OTHER_KNOB.format("precision.tf32"),
    "TORCH_ALLOW_TF32_CUBLAS_OVERRIDE": _OTHER_KNOB.format("precision.tf32"),
}


def _as_text(value: Any) -> Any:
    """YAML reads 1 as a number; a variable holds text. True and False have no one spelling."""
    return str(value) if isinstance(value, int) and not isinstance(value, bool) else value


class EnvironmentOptions(Options):
    """`variables`: names of the table `VARIABLES` and their values."""

    variables: dict[str, Annotated[str, BeforeValidator(_as_text)]] = Field(default_factory=dict)

    @field_validator("variables")
    @classmethod
    def _admitted(cls, variables: dict[str, str]) -> dict[str, str]:
        for name, value in variables.items():
            problem = _problem(name, value)
            if problem:
                raise ValueError(problem)
        return dict(sorted(variables.items()))


class Environment(Knob[EnvironmentOptions]):
    """Process environment of the trial, set before torch is imported.

    AMD: most of the table, from AMD's workload tuning guide and sunxxuns/openpi-1; NVIDIA: from
    the documentation of CUDA and PyTorch. The options of the group are named sets; single
    variables are added with `+environment.variables.NAME=VALUE`. What the user's shell sets of
    these is cleared, so an option says all that a trial gets. Not run on AMD.
    """

    name = "environment"
    options_type = EnvironmentOptions

    def check(self, cfg: Configuration, machine: Machine) -> Refusal | None:
        """A variable of the other vendor would be ignored, and called a result."""
        device = cfg.platform.device
        foreign = [
            name for name in self.of(cfg).variables if not _serves(VARIABLES[name].vendor, device)
        ]
        if foreign:
            kind = {"amd": "AMD GPU", "nvidia": "NVIDIA GPU", "gpu": "GPU"}
            what = ", ".join(f"{name} ({kind[VARIABLES[name].vendor]})" for name in foreign)
            return Refusal(
                "unavailable", f"this trial runs on {device}, which does not read {what}"
            )
        for names in _SPELLINGS:
            given = [name for name in names if name in self.of(cfg).variables]
            if len(given) > 1:
                return Refusal("invalid", f"{' and '.join(given)} are the same setting; give one")
        return None

    def canonical(self, cfg: Configuration) -> EnvironmentOptions:
        """Without the variables that nothing reads."""
        live = {n: v for n, v in self.of(cfg).variables.items() if _why_inert(n, cfg) is None}
        return EnvironmentOptions(variables=live)

    def environment(self, cfg: Configuration) -> Mapping[str, str]:
        """The variables that something reads."""
        return self.canonical(cfg).variables

    def notes(self, cfg: Configuration) -> list[str]:
        """Name the variables that nothing reads."""
        reasons = {name: _why_inert(name, cfg) for name in self.of(cfg).variables}
        return [f"Inert: {name}: {reason}." for name, reason in reasons.items() if reason]

    def label(self, options: EnvironmentOptions) -> str:
        """All variables, or `stock`."""
        return " ".join(f"{name}={value}" for name, value in options.variables.items()) or "stock"


def _why_inert(name: str, cfg: Configuration) -> str | None:
    """Why nothing reads a variable under `cfg`, or None."""
    if VARIABLES[name].tuning and cfg.knobs["blas"].tunableop.mode != "tune":  # type: ignore[attr-defined]
        return "it is read while tuning only, blas.tunableop.mode=tune"
    return VARIABLES[name].inert


def _serves(vendor: Vendor, device: str) -> bool:
    devices = {
        "any": ("cpu", "cuda", "rocm"),
        "gpu": ("cuda", "rocm"),
        "amd": ("rocm",),
        "nvidia": ("cuda",),
    }
    return device in devices[vendor]


def _problem(name: str, value: str) -> str | None:
    known = VARIABLES.get(name)
    if known is not None and re.fullmatch(known.values, value):
        return None
    for pattern, reason in REFUSED.items() if known is None or name in REFUSED else ():
        if name == pattern or (pattern.endswith("*") and name.startswith(pattern[:-1])):
            return f"{name} is refused: it {reason}"
    if name not in VARIABLES:
        close = difflib.get_close_matches(name, VARIABLES, n=1)
        hint = f" Did you mean {close[0]}?" if close else ""
        return f"unknown variable {name}; known are {', '.join(VARIABLES)}.{hint}"
    return f"{name}={value!r}: allowed is {VARIABLES[name].values} ({VARIABLES[name].meaning})"
