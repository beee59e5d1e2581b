"""Knob `blas`: which library multiplies the matrices of the towers' linear layers.

Apart from `gemm`, which is one own kernel for products of few rows: the two combine, for instance
FP8 in the vision tower and the prefix with the own kernel in the denoising steps.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import AfterValidator, Field

from openpi_opt.errors import RefusedError
from openpi_opt.knobs.base import Configuration, Knob, Options, Refusal
from openpi_opt.knobs.refusals import aiter_refusals, sixteen_bits_refusals
from openpi_opt.paths import content_of

if TYPE_CHECKING:
    import torch

    from openpi_opt.knobs.base import Call
    from openpi_opt.machine import Machine
    from openpi_opt.pi0.inputs import Inputs
    from openpi_opt.pi0.policy import Pi0Policy

Stage = Literal["vision", "prefill", "denoise"]
STAGES: tuple[Stage, ...] = ("vision", "prefill", "denoise")

# Name here -> device that has it, torch's name for it. hipBLASLt and cuBLASLt are one enumerator.
LIBRARIES = {
    "cublas": ("cuda", "cublas"),
    "cublaslt": ("cuda", "cublaslt"),
    "rocblas": ("rocm", "cublas"),
    "hipblaslt": ("rocm", "cublaslt"),
    "ck": ("rocm", "ck"),
}
_OVERRIDES = {
    "hipblaslt": "HIPBLASLT_TUNING_OVERRIDE_FILE",
    "rocblas": "ROCBLAS_TENSILE_GEMM_OVERRIDE_PATH",
}
_FP8_MIN_SM = 89
# Addresses so far apart lie in the same memory channel of an MI300.
_CHANNEL_BYTES = 512
# aiter names no FP8 format for gfx940 and gfx941, and has no such CK kernels for others.
_AITER_FP8_ARCHS = ("gfx942", "gfx950")
_FP8_ARCHS = ("gfx940", "gfx941", "gfx942", "gfx950", "gfx1200", "gfx1201")
# Other seeds than any workload's: calibrating on the guard's inputs would flatter FP8.
CALIBRATION_SEEDS = range(1_000_003, 1_000_007)
# By option, who writes such a file.
_WRITTEN_BY = {
    "aiter.table": "aiter's gemm_a16w16_tune.py writes such a table; leave it out for aiter's own",
    "tunableop.file": "write it with blas.tunableop.mode=tune",
    "overrides.hipblaslt": "hipblaslt-bench writes such a file",
    "overrides.rocblas": "rocblas-bench writes such a file",
}


def _in_order(stages: tuple[Stage, ...]) -> tuple[Stage, ...]:
    return tuple(stage for stage in STAGES if stage in stages)


Stages = Annotated[tuple[Stage, ...], Field(min_length=1), AfterValidator(_in_order)]


class AiterOptions(Options):
    """`stages`: whose layers go to aiter. `max_rows`: larger products stay with torch (None: none).

    `table` is a tuned CSV (`python -m openpi_opt.tune gemm`), merged with those that aiter brings.

    `preshuffle` keeps a second copy of the weights whose widths are multiples of
    `preshuffle_multiple`, for products of at least `preshuffle_min_rows` rows.
    """

    stages: Stages = STAGES
    max_rows: Annotated[int, Field(ge=1)] | None = None
    table: str | None = None
    preshuffle: bool = False
    preshuffle_min_rows: int = Field(128, ge=1)
    preshuffle_multiple: Literal[64, 128, 256] = 256


class TunableOpOptions(Options):
    """`tune` measures all solutions of rocBLAS and hipBLASLt and writes `file`; `use` reads it.

    What `file` already holds, `tune` keeps and adds to.

    `rotating_mib` is a buffer to walk through while tuning, so that caches are as cold as in use;
    null is torch's default, the size of the L2 cache, 0 none.
    """

    mode: Literal["off", "tune", "use"] = "off"
    file: str = "tunableop_results.csv"
    rotating_mib: Annotated[int, Field(ge=0)] | None = None


class Fp8Options(Options):
    """Stages whose towers compute in FP8, and the kernel: `torch._scaled_mm` or aiter's on AMD.

    `fast_accum` skips promotions of sums on NVIDIA.
    """

    stages: Stages = STAGES
    gemm: Literal["torch", "aiter"] = "torch"
    fast_accum: bool = True


class OverrideOptions(Options):
    """Files of AMD's tuners by which its libraries choose other solutions than their own.

    `hipblaslt` is read by HIPBLASLT_TUNING_OVERRIDE_FILE, `rocblas` by
    ROCBLAS_TENSILE_GEMM_OVERRIDE_PATH.
    """

    hipblaslt: str | None = None
    rocblas: str | None = None


class BlasOptions(Options):
    """`backend` computes the linear layers, `library` is torch's own preference among BLAS.

    `algorithm=searched` times cuBLASLt's algorithms for each shape instead of taking the first one
    of its heuristic, and leaves bias and GELU to it.

    `pad_strides` keeps weights whose rows are multiples of 512 bytes with 256 bytes between them.
    """

    backend: Literal["torch", "aiter", "fp8"] = "torch"
    library: Literal["default", "cublas", "cublaslt", "rocblas", "hipblaslt", "ck"] = "default"
    algorithm: Literal["heuristic", "searched"] = "heuristic"
    aiter: AiterOptions = AiterOptions()
    tunableop: TunableOpOptions = TunableOpOptions()
    fp8: Fp8Options = Fp8Options()
    pad_strides: bool = False
    overrides: OverrideOptions = OverrideOptions()


class Blas(Knob[BlasOptions]):
    """Matrix products by torch's BLAS, by AMD's tuned GEMMs, or in FP8.

    - `library`, both vendors: `torch.backends.cuda.preferred_blas_library`.
    - `algorithm=searched`, NVIDIA: `openpi_opt.kernels.cublaslt`, in the first call of each
      process; the record names the shapes. AMD's counterpart is `tunableop`.
    - `aiter`, AMD: `aiter.tuned_gemm.gemm_a16w16` with a table of tuned shapes; -1.0 ms reported
      on MI350 (sunxxuns/openpi-1, USE_AITER_GEMM and OPENPI_ROUTE_*), with weight preshuffle 31.2
      ms in all (AITER_PRESHUFFLE_WEIGHTS). Not run on AMD.
    - `tunableop`, AMD: PyTorch's TunableOp, AMD's workload tuning guide. Not run on AMD.
    - `fp8`, both: `torch._scaled_mm`, or on AMD aiter's `gemm_a8w8` (`fp8.gemm`; 1.57x reported for
      single products in sunxxuns/openpi-1); static scales per tensor. Lossy. sm89, gfx942 and
      newer; on the CPU it runs as a reference. Not run on AMD.
    - `pad_strides`, both: rows of weights at multiples of 512 bytes meet in the same channels of an
      MI300's memory (AMD's workload tuning guide: leading dimension K + 128). Exact. Not run on
      AMD.
    """

    name = "blas"
    options_type = BlasOptions

    def refusals(self, cfg: Configuration, machine: Machine) -> Iterator[Refusal]:
        """Each library belongs to a vendor, FP8 to recent architectures."""
        options = self.of(cfg)
        yield from _torch_refusals(cfg, options)
        if options.backend == "aiter":
            yield from aiter_refusals("blas=aiter", cfg, machine)
        if options.backend == "fp8":
            yield from _fp8_refusals(cfg, options.fp8, machine)
        yield from _rival_refusals(cfg, options)
        for library, path in options.overrides.model_dump().items():
            if path is not None and LIBRARIES[library][0] != cfg.platform.device:
                yield Refusal(
                    "unavailable", f"blas.overrides.{library} needs ROCm, where {library} is"
                )
        for key, path in self.files(cfg).items():
            exists = Path(path).is_file()
            if not exists or not os.access(path, os.R_OK):
                problem = "cannot be read" if exists else "does not exist"
                yield Refusal("invalid", f"blas.{key}={path} {problem}; {_WRITTEN_BY[key]}")

    def canonical(self, cfg: Configuration) -> BlasOptions:
        """Without the settings of backends that are not chosen."""
        options = self.of(cfg)
        aiter, tunableop, fp8 = options.aiter, options.tunableop, options.fp8
        if options.backend != "aiter":
            aiter = AiterOptions()
        elif not aiter.preshuffle:
            aiter = AiterOptions(stages=aiter.stages, max_rows=aiter.max_rows, table=aiter.table)
        if options.backend != "fp8":
            fp8 = Fp8Options()
        elif cfg.platform.device != "cuda":
            fp8 = fp8.model_copy(update={"fast_accum": True})
        if tunableop.mode == "off":
            tunableop = TunableOpOptions()
        elif tunableop.mode == "use":
            tunableop = TunableOpOptions(mode="use", file=tunableop.file)
        return options.model_copy(update={"aiter": aiter, "tunableop": tunableop, "fp8": fp8})

    def files(self, cfg: Configuration) -> Mapping[str, str]:
        """Aiter's table of tuned shapes, TunableOp results that are used, and overrides."""
        options = self.canonical(cfg)
        found = {f"overrides.{name}": path for name, path in options.overrides.model_dump().items()}
        found["aiter.table"] = options.aiter.table
        found["tunableop.file"] = (
            options.tunableop.file if options.tunableop.mode == "use" else None
        )
        return {key: path for key, path in found.items() if path is not None}

    def lossy(self, cfg: Configuration) -> bool:
        """FP8 has 3 bits of mantissa."""
        return self.of(cfg).backend == "fp8"

    def environment(self, cfg: Configuration) -> Mapping[str, str]:
        """Let aiter log each lookup: that is how a silent fallback to torch is noticed."""
        files = self.of(cfg).overrides.model_dump(exclude_none=True)
        found = {_OVERRIDES[library]: str(Path(path).absolute()) for library, path in files.items()}
        if self._uses_aiter(cfg):
            found |= {"AITER_LOG_TUNED_CONFIG": "1", "AITER_LOG_LEVEL": "INFO"}
        return found

    def _uses_aiter(self, cfg: Configuration) -> bool:
        options = self.canonical(cfg)
        return "aiter" in (options.backend, options.fp8.gemm)

    def configure(self, cfg: Configuration) -> None:
        """Torch's library, TunableOp, and aiter's table, which it reads when it is imported."""
        options = self.of(cfg)
        if options.library != "default":
            prefer(options.library)
        if options.tunableop.mode != "off":
            _start_tunableop(options.tunableop)
        if self._uses_aiter(cfg):
            from openpi_opt.kernels import tuned_gemm

            if options.backend == "aiter":
                tuned_gemm.install_table(options.aiter.table, _aiter_package())
            tuned_gemm.lookups()

    def transform(self, policy: Pi0Policy, cfg: Configuration) -> None:
        """Replace the linear layers; the parameters stay under their names."""
        options = self.of(cfg)
        if options.backend == "aiter":
            route_to_aiter(policy, cfg, options.aiter)
        elif options.backend == "fp8":
            _to_fp8(policy, cfg, options.fp8)
        if options.algorithm == "searched":
            from openpi_opt.kernels import cublaslt

            gemm = cfg.knobs["gemm"]
            few = 0 if gemm.backend == "torch" else gemm.max_rows
            policy.ops.linear = cublaslt.linear(policy.ops.linear, few)
            policy.ops.linear_gelu = cublaslt.linear_gelu
            policy.ops.linear_add = cublaslt.linear_add
        if options.pad_strides:
            _pad_strides(policy)

    def times_kernels(self, cfg: Configuration) -> bool:
        """TunableOp measures every solution, and a search every algorithm."""
        options = self.canonical(cfg)
        return options.tunableop.mode == "tune" or options.algorithm == "searched"

    def wrap(self, call: Call, cfg: Configuration) -> Call:
        """After the first call: did aiter serve anything, and what did TunableOp find?"""
        options = self.of(cfg)
        if options.backend == "aiter":
            from openpi_opt.kernels.tuned_gemm import lookups

            call = _after_first(call, lookups().require_some)
        if options.tunableop.mode == "tune":
            call = _after_first(call, partial(_finish_tuning, options.tunableop.file))
        return call

    def float32_form(self, cfg: Configuration) -> BlasOptions:
        """FP8 keeps its layers; which library multiplies is no structure."""
        options = self.canonical(cfg)
        return BlasOptions(fp8=options.fp8, backend="fp8" if options.backend == "fp8" else "torch")

    def notes(self, cfg: Configuration) -> list[str]:
        """What the files that were read hold, and the shapes that aiter handed back to torch."""
        notes = [f"blas.{key}: {content_of(path)}" for key, path in self.files(cfg).items()]
        if self.of(cfg).algorithm == "searched":
            from openpi_opt.kernels import cublaslt

            notes += cublaslt.searched()
        if not self._uses_aiter(cfg):
            return notes
        from openpi_opt.kernels.tuned_gemm import lookups

        return notes + lookups().notes()

    def label(self, options: BlasOptions) -> str:
        """Backend, library and algorithm, then what else differs from the defaults."""
        words = super().label(options).split(" ")
        return " ".join(re.sub("^(library|algorithm)=", "", word) for word in words)


def _torch_refusals(cfg: Configuration, options: BlasOptions) -> Iterator[Refusal]:
    """Of torch's library, the search among its algorithms, and TunableOp."""
    device, library = cfg.platform.device, options.library
    if library != "default":
        if LIBRARIES[library][0] != device:
            where = f"exists on {LIBRARIES[library][0]}; this trial runs on {device}"
            yield Refusal("unavailable", f"blas.library={library} {where}")
        for name in cfg.knobs["environment"].variables:
            if name.startswith("TORCH_BLAS_PREFER_"):
                rival = f"environment.variables.{name}"
                yield Refusal("invalid", f"blas.library and {rival} both choose; give one")
    if options.algorithm == "searched":
        wanted = "blas.algorithm=searched"
        if device != "cuda":
            yield Refusal(
                "unavailable",
                f"{wanted} asks NVIDIA's cuBLASLt; on AMD use blas.tunableop.mode=tune",
            )
        if library != "default":
            yield Refusal("invalid", f"{wanted} and blas.library={library} both choose")
        if options.backend != "torch" and cfg.knobs["fusion"].residuals:
            yield Refusal(
                "invalid", f"fusion.residuals leaves no product to blas={options.backend}"
            )
        yield from sixteen_bits_refusals(wanted, cfg)
    if options.tunableop.mode != "off" and device != "rocm":
        yield Refusal(
            "unavailable",
            "blas.tunableop needs ROCm: on NVIDIA torch offers it a single solution, on a CPU none",
        )


def _fp8_refusals(cfg: Configuration, options: Fp8Options, machine: Machine) -> Iterator[Refusal]:
    if cfg.knobs["precision"].dtype == "float32":
        yield Refusal("invalid", "blas=fp8 returns 16 bits; use precision=bfloat16")
    if options.gemm == "aiter":
        yield from aiter_refusals("blas.fp8.gemm=aiter", cfg, machine)
    if cfg.platform.device == "cpu":
        return
    arch = machine.gpu(cfg.device, cfg.platform.gpu).arch
    if cfg.platform.device == "cuda":
        able, needed = int(arch.removeprefix("sm")) >= _FP8_MIN_SM, f"sm{_FP8_MIN_SM} or newer"
    else:
        archs = _AITER_FP8_ARCHS if options.gemm == "aiter" else _FP8_ARCHS
        able, needed = arch in archs, f"one of {', '.join(archs)}"
    if not able:
        yield Refusal("unavailable", f"blas=fp8 needs {needed}; this GPU is {arch}")


def _rival_refusals(cfg: Configuration, options: BlasOptions) -> Iterator[Refusal]:
    """Of other kernels for the same layers."""
    skinny = cfg.knobs["gemm"].backend != "torch"
    all_fp8 = options.backend == "fp8" and options.fp8.stages == STAGES
    all_aiter = (
        options.backend == "aiter"
        and options.aiter.max_rows is None
        and options.aiter.stages == STAGES
    )
    if skinny and (all_fp8 or all_aiter):
        lever = "blas.fp8.stages" if all_fp8 else "blas.aiter.max_rows"
        yield Refusal(
            "invalid",
            f"blas={options.backend} takes every linear layer and leaves none to the kernel of "
            f"gemm; use gemm=torch or restrict {lever}",
        )
    rivals = {
        f"blas={options.backend}": options.backend != "torch",
        "gemm=triton_skinny": skinny,
        "fusion.expert_layer=true": cfg.knobs["fusion"].expert_layer,
    }
    rival = next((name for name, chosen in rivals.items() if chosen), None)
    if options.pad_strides and rival:
        yield Refusal(
            "invalid", f"blas.pad_strides is for torch's products; {rival} reads dense weights"
        )


def prefer(library: str) -> None:
    """Choose torch's BLAS library. Raises RefusedError: torch has it not, or uses another."""
    import torch

    wanted = LIBRARIES[library][1]
    try:
        torch.backends.cuda.preferred_blas_library(wanted)
    except RuntimeError as error:  # torch was built without it
        raise RefusedError("unavailable", f"blas.library={library}: {error}") from error
    # On architectures that a library does not support, torch warns and keeps another one.
    chosen = torch.backends.cuda.preferred_blas_library()
    if chosen != torch.backends.cuda._BlasBackends[wanted]:
        raise RefusedError("unavailable", f"blas.library={library}: torch uses {chosen} instead")


def _start_tunableop(options: TunableOpOptions) -> None:
    """By torch's functions, not variables: a variable would win over switching tuning off."""
    import torch

    tunable = torch.cuda.tunable
    tunable.enable(True)
    tunable.tuning_enable(options.mode == "tune")
    tunable.set_filename(options.file, insert_device_ordinal=False)
    if options.mode == "tune":
        if options.rotating_mib is not None:
            tunable.set_rotating_buffer_size(options.rotating_mib)
    elif not tunable.read_file(options.file):
        raise RefusedError(
            "unavailable",
            f"TunableOp refused {options.file}: it was written for another GPU, ROCm, BLAS or "
            "torch version; tune again with blas.tunableop.mode=tune",
        )


def _finish_tuning(file: str) -> None:
    """No tuning while measuring or capturing; an empty result means that nothing was tuned.

    torch 2.9 writes the file at exit, and only while tuning is on, so it is written here. From 2.10
    on each result is written at once, and `write_file` is gone (torch/cuda/tunable.py).
    """
    import torch

    tunable = torch.cuda.tunable
    if not tunable.get_results():
        raise RefusedError("unavailable", "blas.tunableop: no product went through TunableOp")
    write = getattr(tunable, "write_file", None)
    if write is not None:
        write(file)
    tunable.tuning_enable(False)
    if not Path(file).is_file():
        raise RefusedError(
            "unavailable",
            f"blas.tunableop.mode=tune: torch {torch.__version__} found results and did not write "
            f"{file}, so mode=use would have nothing to read",
        )


def _aiter_package() -> Path:
    from openpi_opt.machine import find_aiter

    found = find_aiter()
    if found is None:
        raise RefusedError("unavailable", "blas=aiter: AMD's aiter is not installed")
    return Path(found.location)


def route_to_aiter(policy: Pi0Policy, cfg: Configuration, options: AiterOptions) -> None:
    """Turn the linear layers that run in `options.stages` into aiter's, in place."""
    from openpi_opt.kernels import fp8, tuned_gemm
    from openpi_opt.kernels.aiter import import_part

    import_part("aiter.tuned_gemm", "blas=aiter")
    # Only layers that run: what a fusion has replaced needs no shuffled copy.
    with fp8.seen_inputs([policy]) as reached:
        _calibration_runs(policy, cfg, 1)
    towers = _towers(policy)
    routed = {m for stage in options.stages for tower in towers[stage] for m in tower.modules()}
    for plain in reached:
        if plain not in routed and options.stages != STAGES:
            continue
        shuffled = None
        if options.preshuffle:
            shuffled = tuned_gemm.shuffled_weight(plain, options.preshuffle_multiple)
        tuned_gemm.become(plain, options.max_rows, shuffled, options.preshuffle_min_rows)


def _pad_strides(policy: Pi0Policy) -> None:
    """Lay the weights [N, K] that need it into [N, K + 256 bytes], of which layers see K."""
    from openpi_opt.pi0.layers import Linear

    padded = 0
    for layer in policy.modules():
        weight = layer.weight.data if isinstance(layer, Linear) else None
        if weight is None or weight.stride(0) * weight.element_size() % _CHANNEL_BYTES:
            continue
        rows, columns = weight.shape
        room = weight.new_empty(rows, columns + _CHANNEL_BYTES // 2 // weight.element_size())
        layer.weight.data = room[:, :columns].copy_(weight)
        padded += 1
    if not padded:
        raise RefusedError(
            "invalid",
            f"blas.pad_strides: no weight of this model has rows of a multiple of {_CHANNEL_BYTES} "
            "bytes",
        )


def _towers(policy: Pi0Policy) -> dict[str, list[torch.nn.Module]]:
    """By stage, the modules whose linear layers are its products."""
    model = policy.paligemma_with_expert.paligemma.model
    return {
        "vision": [policy.vision, model.multi_modal_projector],
        "prefill": [policy.language],
        "denoise": [policy.expert],
    }


def _to_fp8(policy: Pi0Policy, cfg: Configuration, options: Fp8Options) -> None:
    from openpi_opt.kernels import fp8
    from openpi_opt.kernels.aiter import import_part

    dtype = fp8.fp8_dtype(fp8.device_arch(policy.device))
    towers = _towers(policy)
    chosen = [tower for stage in options.stages for tower in towers[stage]]

    def run() -> None:
        _calibration_runs(policy, cfg, len(CALIBRATION_SEEDS))

    aiter = options.gemm == "aiter"
    if aiter:
        import_part("aiter.ops.gemm_op_a8w8", "blas.fp8.gemm=aiter")
    if not fp8.convert(chosen, run, dtype, options.fast_accum, aiter):
        raise RefusedError("invalid", "blas=fp8 found no linear layer to replace")


def _calibration_runs(policy: Pi0Policy, cfg: Configuration, count: int) -> None:
    import torch

    from openpi_opt.pi0.workload import make_inputs
    from openpi_opt.runtime import workload_of

    with torch.no_grad():
        for seed in CALIBRATION_SEEDS[:count]:
            inputs = make_inputs(workload_of(cfg), policy.config, seed, policy.device)
            policy.sample_actions(inputs)


def _after_first(call: Call, check: Callable[[], None]) -> Call:
    """`call`, with `check` after its first run."""
    done = False

    def checked(inputs: Inputs) -> torch.Tensor:
        nonlocal done
        actions = call(inputs)
        if not done:
            check()
            done = True
        return actions

    return checked
