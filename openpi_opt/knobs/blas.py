"""Knob `blas`: which library multiplies the matrices of the towers' linear layers.

Apart from `gemm`, which is one own kernel for products of few rows: the two combine, for instance
FP8 in the vision tower and the prefix with the own kernel in the denoising steps.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import Field

from openpi_opt.errors import RefusedError
from openpi_opt.knobs.base import Configuration, Knob, Options, Refusal
from openpi_opt.knobs.refusals import aiter_problem, sixteen_bits_problem
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
_CALIBRATION_SEEDS = range(1_000_003, 1_000_007)


class AiterOptions(Options):
    """`stages`: whose layers go to aiter. `max_rows`: larger products stay with torch (None: none).

    `table` is a tuned CSV (`python -m openpi_opt.tune gemm`), merged with those that aiter brings.

    `preshuffle` keeps a second copy of the weights whose widths are multiples of
    `preshuffle_multiple`, for products of at least `preshuffle_min_rows` rows.
    """

    stages: Annotated[tuple[Stage, ...], Field(min_length=1)] = STAGES
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

    stages: Annotated[tuple[Stage, ...], Field(min_length=1)] = STAGES
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

    def check(self, cfg: Configuration, machine: Machine) -> Refusal | None:
        """Each library belongs to a vendor, FP8 to recent architectures."""
        options = self.of(cfg)
        problems = [
            _library_problem(cfg, options),
            _algorithm_problem(cfg, options),
            _tunableop_problem(cfg, options.tunableop),
            _aiter_problem(cfg, options.aiter, machine) if options.backend == "aiter" else None,
            _fp8_problem(cfg, options.fp8, machine) if options.backend == "fp8" else None,
            _nothing_left_for_gemm(cfg, options),
            _padding_problem(cfg, options),
            _override_problem(cfg, options.overrides),
        ]
        return next((problem for problem in problems if problem is not None), None)

    def canonical(self, cfg: Configuration) -> BlasOptions:
        """Without the settings of backends that are not chosen."""
        options = self.of(cfg)
        aiter = options.aiter if options.backend == "aiter" else AiterOptions()
        routed = tuple(stage for stage in STAGES if stage in aiter.stages)
        aiter = aiter.model_copy(update={"stages": routed})
        if not aiter.preshuffle:
            aiter = AiterOptions(stages=routed, max_rows=aiter.max_rows, table=aiter.table)
        fp8 = options.fp8 if options.backend == "fp8" else Fp8Options()
        ordered = tuple(stage for stage in STAGES if stage in fp8.stages)
        fast = fp8.fast_accum if cfg.platform.device == "cuda" else True
        tunable = options.tunableop
        if tunable.mode == "off":
            tunable = TunableOpOptions()
        elif tunable.mode == "use":
            tunable = TunableOpOptions(mode="use", file=tunable.file)
        fp8 = Fp8Options(stages=ordered, gemm=fp8.gemm, fast_accum=fast)
        return options.model_copy(update={"aiter": aiter, "tunableop": tunable, "fp8": fp8})

    def files(self, cfg: Configuration) -> Mapping[str, str]:
        """Aiter's table of tuned shapes, and the TunableOp results that are used."""
        options = self.canonical(cfg)
        found = {}
        if options.aiter.table is not None:
            found["aiter.table"] = options.aiter.table
        if options.tunableop.mode == "use":
            found["tunableop.file"] = options.tunableop.file
        for library, path in options.overrides.model_dump().items():
            if path is not None:
                found[f"overrides.{library}"] = path
        return found

    def lossy(self, cfg: Configuration) -> bool:
        """FP8 has 3 bits of mantissa."""
        return self.of(cfg).backend == "fp8"

    def environment(self, cfg: Configuration) -> Mapping[str, str]:
        """Let aiter log each lookup: that is how a silent fallback to torch is noticed."""
        found = {}
        for library, path in self.of(cfg).overrides.model_dump().items():
            if path is not None:
                found[_OVERRIDES[library]] = str(Path(path).absolute())
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
            _prefer(options.library)
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
            _route_to_aiter(policy, cfg, options.aiter)
        elif options.backend == "fp8":
            _to_fp8(policy, cfg, options.fp8)
        if options.algorithm == "searched":
            from openpi_opt.kernels import cublaslt

            gemm = cfg.knobs["gemm"]
            few = 0 if gemm.backend == "torch" else gemm.max_rows  # type: ignore[attr-defined]
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
        """Backend and library, then what differs from the defaults."""
        words: list[str] = [options.backend]
        if options.library != "default":
            words.append(options.library)
        if options.algorithm != "heuristic":
            words.append(options.algorithm)
        if options.pad_strides:
            words.append("pad_strides")
        for name in ("aiter", "tunableop", "fp8", "overrides"):
            group = getattr(options, name)
            default = type(group)()
            words += [
                f"{name}.{key}={value}"
                for key, value in group.model_dump().items()
                if value != getattr(default, key)
            ]
        return " ".join(words)


def _library_problem(cfg: Configuration, options: BlasOptions) -> Refusal | None:
    if options.library == "default":
        return None
    device = LIBRARIES[options.library][0]
    if device != cfg.platform.device:
        return Refusal(
            "unavailable",
            f"blas.library={options.library} exists on {device}; this trial runs on "
            f"{cfg.platform.device}",
        )
    variables = cfg.knobs["environment"].variables  # type: ignore[attr-defined]
    rival = [name for name in variables if name.startswith("TORCH_BLAS_PREFER_")]
    if rival:
        return Refusal(
            "invalid", f"blas.library and environment.variables.{rival[0]} both choose; give one"
        )
    return None


def _algorithm_problem(cfg: Configuration, options: BlasOptions) -> Refusal | None:
    if options.algorithm == "heuristic":
        return None
    wanted = "blas.algorithm=searched"
    if cfg.platform.device != "cuda":
        return Refusal(
            "unavailable",
            f"{wanted} asks NVIDIA's cuBLASLt; on AMD use blas.tunableop.mode=tune",
        )
    if options.library != "default":
        return Refusal("invalid", f"{wanted} and blas.library={options.library} both choose")
    if options.backend != "torch" and cfg.knobs["fusion"].residuals:  # type: ignore[attr-defined]
        return Refusal("invalid", f"fusion.residuals leaves no product to blas={options.backend}")
    return sixteen_bits_problem(wanted, cfg)


def _tunableop_problem(cfg: Configuration, options: TunableOpOptions) -> Refusal | None:
    if options.mode == "off":
        return None
    if cfg.platform.device != "rocm":
        return Refusal(
            "unavailable",
            "blas.tunableop needs ROCm: on NVIDIA torch offers it a single solution, on a CPU none",
        )
    if options.mode == "use":
        how = "write it with blas.tunableop.mode=tune"
        return _file_problem("blas.tunableop.file", options.file, how)
    return None


def _override_problem(cfg: Configuration, options: OverrideOptions) -> Refusal | None:
    for library, path in options.model_dump().items():
        if path is None:
            continue
        key = f"blas.overrides.{library}"
        if LIBRARIES[library][0] != cfg.platform.device:
            return Refusal("unavailable", f"{key} needs ROCm, where {library} is")
        problem = _file_problem(key, path, f"{library}-bench writes such a file")
        if problem is not None:
            return problem
    return None


def _file_problem(key: str, path: str, advice: str) -> Refusal | None:
    """Why a file of the user's cannot be read, or None."""
    if not Path(path).is_file():
        return Refusal("invalid", f"{key}={path} does not exist; {advice}")
    if not os.access(path, os.R_OK):
        return Refusal("invalid", f"{key}={path} cannot be read; {advice}")
    return None


def _aiter_problem(cfg: Configuration, options: AiterOptions, machine: Machine) -> Refusal | None:
    problem = aiter_problem("blas=aiter", cfg, machine)
    if problem is None and options.table is not None:
        how = "aiter's gemm_a16w16_tune.py writes such a table; leave it out for aiter's own"
        problem = _file_problem("blas.aiter.table", options.table, how)
    return problem


def _nothing_left_for_gemm(cfg: Configuration, options: BlasOptions) -> Refusal | None:
    """Layers that are routed here do not reach the kernel of knob `gemm`; some must be left."""
    if cfg.knobs["gemm"].backend == "torch":  # type: ignore[attr-defined]
        return None
    all_fp8 = options.backend == "fp8" and len(set(options.fp8.stages)) == len(STAGES)
    every_stage = len(set(options.aiter.stages)) == len(STAGES)
    all_aiter = options.backend == "aiter" and options.aiter.max_rows is None and every_stage
    if not (all_fp8 or all_aiter):
        return None
    lever = "blas.fp8.stages" if all_fp8 else "blas.aiter.max_rows"
    return Refusal(
        "invalid",
        f"blas={options.backend} takes every linear layer and leaves none to the kernel of gemm; "
        f"use gemm=torch or restrict {lever}",
    )


def _padding_problem(cfg: Configuration, options: BlasOptions) -> Refusal | None:
    """Own kernels and aiter read rows without gaps."""
    if not options.pad_strides:
        return None
    rivals = [
        *([f"blas={options.backend}"] if options.backend != "torch" else []),
        *(["gemm=triton_skinny"] if cfg.knobs["gemm"].backend != "torch" else []),  # type: ignore[attr-defined]
        *(["fusion.expert_layer=true"] if cfg.knobs["fusion"].expert_layer else []),  # type: ignore[attr-defined]
    ]
    if not rivals:
        return None
    return Refusal(
        "invalid", f"blas.pad_strides is for torch's products; {rivals[0]} reads dense weights"
    )


def _fp8_problem(cfg: Configuration, options: Fp8Options, machine: Machine) -> Refusal | None:
    if cfg.knobs["precision"].dtype == "float32":  # type: ignore[attr-defined]
        return Refusal("invalid", "blas=fp8 returns 16 bits; use precision=bfloat16")
    if options.gemm == "aiter":
        missing = aiter_problem("blas.fp8.gemm=aiter", cfg, machine)
        if missing is not None:
            return missing
    if cfg.platform.device == "cpu":
        return None
    arch = machine.gpu(cfg.device, cfg.platform.gpu).arch
    if cfg.platform.device == "cuda":
        able, needed = int(arch.removeprefix("sm")) >= _FP8_MIN_SM, f"sm{_FP8_MIN_SM} or newer"
    else:
        archs = _AITER_FP8_ARCHS if options.gemm == "aiter" else _FP8_ARCHS
        able, needed = arch in archs, f"one of {', '.join(archs)}"
    return None if able else Refusal("unavailable", f"blas=fp8 needs {needed}; this GPU is {arch}")


def _prefer(library: str) -> None:
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


def _route_to_aiter(policy: Pi0Policy, cfg: Configuration, options: AiterOptions) -> None:
    from openpi_opt.kernels import fp8, tuned_gemm
    from openpi_opt.kernels.aiter import import_part

    import_part("aiter.tuned_gemm", "blas=aiter")
    # Only layers that run: what a fusion has replaced needs no shuffled copy.
    with fp8.seen_inputs([policy]) as reached:
        _calibration_runs(policy, cfg, 1)
    towers = _towers(policy)
    routed = {m for stage in options.stages for tower in towers[stage] for m in tower.modules()}
    for plain in reached:
        if plain not in routed and len(set(options.stages)) < len(STAGES):
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
        _calibration_runs(policy, cfg, len(_CALIBRATION_SEEDS))

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
        for seed in _CALIBRATION_SEEDS[:count]:
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
