"""Knob `environment`: variables that runtimes and libraries read before the first kernel."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import BeforeValidator, Field, field_validator

from openpi_opt.errors import near
from openpi_opt.knobs.base import Configuration, Knob, Options, Refusal

if TYPE_CHECKING:
    from openpi_opt.machine import Machine

Vendor = Literal["amd", "nvidia", "gpu", "any"]
_SERVED: dict[Vendor, tuple[str, ...]] = {
    "any": ("cpu", "cuda", "rocm"),
    "gpu": ("cuda", "rocm"),
    "amd": ("rocm",),
    "nvidia": ("cuda",),
}

FLAG = "0|1"
AMD_GUIDE = "AMD workload tuning guide for MI300X"
TUNABLE_OP = f"{AMD_GUIDE}, TunableOp"
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
    """One admitted variable. `values` is a regular expression for the whole value. `inert` says why
    nothing reads it: such a variable is kept in the record and has no effect. So is one of
    TunableOp's tuning unless blas.tunableop.mode=tune: nothing else reads it."""

    vendor: Vendor
    values: str
    meaning: str
    source: str
    inert: str | None = None


_ALLOCATOR = r"[a-z_0-9]+:[A-Za-z0-9_.\[\]>:-]+(,[a-z_0-9]+:[A-Za-z0-9_.\[\]>:-]+)*"
_FIND_MODES = "[1-7]|NORMAL|FAST|HYBRID|DYNAMIC_HYBRID|TRUST_VERIFY"
_FIND_ENFORCE = "[1-5]|NONE|DB_UPDATE|SEARCH|SEARCH_DB_UPDATE|DB_CLEAN"
# By vendor and source: name, admitted values, meaning and, where nothing reads it, why.
# Effects were reported for MI300X and MI350 unless a source says otherwise. Not run on AMD.
_ADMITTED: dict[tuple[Vendor, str], tuple[tuple[str, ...], ...]] = {
    ("amd", AMD_GUIDE): (
        ("HIP_FORCE_DEV_KERNARG", FLAG, "kernel arguments in device memory: 2-3 us per launch"),
        ("GPU_MAX_HW_QUEUES", r"[1-9]\d?", "hardware queues per device, 4 if unset"),
        ("HSA_NO_SCRATCH_RECLAIM", FLAG, "keep scratch memory per queue: for kernels that spill"),
        ("DEBUG_CLR_GRAPH_PACKET_CAPTURE", FLAG, "queue packets of HIP graphs recorded ahead"),
        ("TORCH_BLAS_PREFER_HIPBLASLT", FLAG, "hipBLASLt (1) or rocBLAS (0) for matrix products"),
        ("MIOPEN_FIND_MODE", _FIND_MODES, "how MIOpen chooses a convolution: of patches only here"),
        ("MIOPEN_FIND_ENFORCE", _FIND_ENFORCE, "when MIOpen tunes a convolution"),
        ("PYTORCH_MIOPEN_SUGGEST_NHWC", FLAG, "channels-last; goes with layout_optimization"),
        ("HIP_LAUNCH_BLOCKING", "0", "launches do not wait", _OFF),
        ("AMD_LOG_LEVEL", "0", "no log of the runtime", _OFF),
        ("OPTIMIZE_EPILOGUE", FLAG, "Triton stores results without a detour through LDS",
         "Triton 3.6 and newer do not read it and always do so"),
        ("NCCL_MIN_NCHANNELS", r"[1-9]\d*", "channels of a collective", _ONE_GPU),
    ),
    ("amd", TUNABLE_OP): (
        ("PYTORCH_TUNABLEOP_MAX_TUNING_DURATION_MS", r"\d+", "ms for a solution, 30 if unset"),
        ("PYTORCH_TUNABLEOP_MAX_TUNING_ITERATIONS", r"\d+", "runs of one, 100 if unset"),
        ("PYTORCH_TUNABLEOP_MAX_WARMUP_DURATION_MS", r"\d+", "ms before it counts, 0 if unset"),
        ("PYTORCH_TUNABLEOP_MAX_WARMUP_ITERATIONS", r"\d+", "runs before it counts, 0 if unset"),
        ("PYTORCH_TUNABLEOP_ICACHE_FLUSH_ENABLED", FLAG, "cold instruction cache, 1 if unset"),
        ("PYTORCH_TUNABLEOP_NUMERICAL_CHECK", r"[01]|[\d.e-]+_[\d.e-]+",
         "drop wrong solutions: 1, or atol_rtol in newer torch"),
        ("PYTORCH_TUNABLEOP_ROCBLAS_ENABLED", FLAG, "try rocBLAS, 1 if unset"),
        ("PYTORCH_TUNABLEOP_HIPBLASLT_ENABLED", FLAG, "try hipBLASLt, 1 if unset"),
    ),
    ("amd", FORK): (
        ("HSA_ENABLE_SDMA", FLAG, "copies by the DMA engines instead of kernels"),
        ("DISABLE_ADDMM_HIP_LT", FLAG, "DISABLE_ADDMM_CUDA_LT of older ROCm builds of torch"),
        ("TORCH_ROCM_USE_HIPBLASLT", FLAG, "said to choose the BLAS library",
         "neither torch nor ROCm reads it; TORCH_BLAS_PREFER_HIPBLASLT is the real one"),
        ("HIP_CACHE_ENABLED", FLAG, "said to cache compiled kernels", "nothing in ROCm reads it"),
        ("ENABLE_HIP_GRAPHS", FLAG, "said to switch HIP graphs on",
         "read by the fork's own code only; graph=manual captures"),
        ("USE_ROCM_AITER_ROPE_BACKEND", FLAG, "aiter's rotary embedding",
         "nothing in aiter or torch reads it"),
    ),
    ("amd", ROCM): (
        ("ROCBLAS_USE_HIPBLASLT", FLAG, "rocBLAS hands products to hipBLASLt (1) or does not"),
    ),
    ("amd", TORCH): (
        ("TORCH_ROCM_AOTRITON_ENABLE_EXPERIMENTAL", FLAG,
         "AOTriton attention on architectures that it calls experimental"),
        ("TORCH_ROCM_FA_PREFER_CK", FLAG,
         "CK instead of AOTriton in scaled_dot_product_attention"),
    ),
    ("amd", TRITON): (
        ("AMDGCN_USE_BUFFER_OPS", FLAG, "buffer loads and stores in Triton"),
        ("TRITON_HIP_USE_ASYNC_COPY", FLAG, "direct loads from memory to LDS in Triton"),
        ("TRITON_HIP_USE_BLOCK_PINGPONG", FLAG, "Triton's ping-pong scheduling of two warps"),
    ),
    ("gpu", TORCH): (
        ("PYTORCH_ALLOC_CONF", _ALLOCATOR, "caching allocator, key:value pairs"),
        ("PYTORCH_CUDA_ALLOC_CONF", _ALLOCATOR, "caching allocator, key:value pairs"),
    ),
    ("gpu", FORK): (
        ("PYTORCH_HIP_ALLOC_CONF", _ALLOCATOR, "caching allocator, key:value pairs"),
        ("DISABLE_ADDMM_CUDA_LT", FLAG, "no Lt library for products with a bias (also on ROCm)"),
    ),
    ("gpu", AMD_GUIDE): (
        ("TORCH_NCCL_HIGH_PRIORITY", FLAG, "collectives on a stream of high priority", _ONE_GPU),
    ),
    ("gpu", CUDA): (("CUDA_LAUNCH_BLOCKING", "0", "launches do not wait", _OFF),),
    ("nvidia", TORCH): (
        ("TORCH_BLAS_PREFER_CUBLASLT", FLAG, "cuBLASLt (1) or cuBLAS (0) for matrix products"),
        ("CUBLASLT_WORKSPACE_SIZE", r"\d+", "KiB of cuBLASLt's workspace"),
    ),
    ("nvidia", CUDA): (
        ("CUDA_MODULE_LOADING", "LAZY|EAGER", "when kernels are loaded"),
        ("CUBLAS_WORKSPACE_CONFIG", r"(:\d+:\d+)+", "sizes (KiB) and number of workspaces"),
        ("CUDA_DEVICE_MAX_CONNECTIONS", r"[1-9]\d?", "hardware queues, 8 if unset"),
    ),
    ("any", AMD_GUIDE): (("OMP_NUM_THREADS", r"[1-9]\d*", "threads of the CPU's loops"),),
}  # fmt: skip
VARIABLES: dict[str, Variable] = {
    name: Variable(vendor, values, meaning, source, *inert)
    for (vendor, source), entries in _ADMITTED.items()
    for name, values, meaning, *inert in entries
}

_SLOW = "serialises launches for debugging; nothing that it times is worth knowing"
_LOGS = "writes logs or dumps for debugging while being timed"
_CHECKS = "makes the runtime check or forgo what it does otherwise, for debugging"
_OF_DEBUGGING = {
    _SLOW: "HIP_LAUNCH_BLOCKING CUDA_LAUNCH_BLOCKING AMD_SERIALIZE_KERNEL AMD_SERIALIZE_COPY",
    _LOGS: "AMD_LOG_LEVEL TORCH_LOGS TORCH_COMPILE_DEBUG TORCHDYNAMO_VERBOSE MLIR_ENABLE_DUMP "
    "PYTORCH_TUNABLEOP_VERBOSE AMDGCN_ENABLE_DUMP",
    _CHECKS: "PYTORCH_NO_CUDA_MEMORY_CACHING PYTORCH_NO_HIP_MEMORY_CACHING HSA_ENABLE_DEBUG "
    "HSA_DISABLE_FRAGMENT_ALLOCATOR HSA_TOOLS_LIB ROCM_DEBUG_AGENT_OPTIONS",
}
_OF_OTHER_KNOBS = {
    "blas.tunableop": "PYTORCH_TUNABLEOP_*",
    "attention and blas": "AITER_*",
    "compile.inductor": "TORCHINDUCTOR_*",
    "platform.gpu": "CUDA_VISIBLE_DEVICES HIP_VISIBLE_DEVICES ROCR_VISIBLE_DEVICES",
    "precision.tf32": "HIPBLASLT_ALLOW_TF32 NVIDIA_TF32_OVERRIDE TORCH_ALLOW_TF32_CUBLAS_OVERRIDE",
}
# Known and not admitted, with the reason. A name that ends in "*" stands for all that begin so.
REFUSED: dict[str, str] = {
    name: why for why, names in _OF_DEBUGGING.items() for name in names.split()
} | {
    name: f"is chosen by {knob}, so that the record says it in one place"
    for knob, names in _OF_OTHER_KNOBS.items()
    for name in names.split()
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

    def refusals(self, cfg: Configuration, machine: Machine) -> Iterator[Refusal]:
        """A variable of the other vendor would be ignored, and called a result."""
        given, device = self.of(cfg).variables, cfg.platform.device
        kinds = {"amd": "AMD GPU", "nvidia": "NVIDIA GPU", "gpu": "GPU"}
        vendors = {name: VARIABLES[name].vendor for name in given}
        foreign = {name: v for name, v in vendors.items() if device not in _SERVED[v]}
        if foreign:
            what = ", ".join(f"{name} ({kinds[vendor]})" for name, vendor in foreign.items())
            yield Refusal("unavailable", f"this trial runs on {device}, which does not read {what}")
        for names in _SPELLINGS:
            same = [name for name in names if name in given]
            if len(same) > 1:
                yield Refusal("invalid", f"{' and '.join(same)} are the same setting; give one")

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
    if VARIABLES[name].source == TUNABLE_OP and cfg.knobs["blas"].tunableop.mode != "tune":
        return "it is read while tuning only, blas.tunableop.mode=tune"
    return VARIABLES[name].inert


def _problem(name: str, value: str) -> str | None:
    known = VARIABLES.get(name)
    if known is not None and re.fullmatch(known.values, value):
        return None
    for pattern, reason in REFUSED.items() if known is None or name in REFUSED else ():
        if name == pattern or (pattern.endswith("*") and name.startswith(pattern[:-1])):
            return f"{name} is refused: it {reason}"
    if known is None:
        names = ", ".join(VARIABLES)
        return f"unknown variable {name}; known are {names}.{near(name, VARIABLES)}"
    return f"{name}={value!r}: allowed is {known.values} ({known.meaning})"
