"""Knob `compile`: torch.compile of the stages or of the whole call, and Inductor's options."""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from pydantic import Field

from openpi_opt.knobs.base import Configuration, Knob, Options, Refusal
from openpi_opt.vendor import BY_DEVICE

if TYPE_CHECKING:
    from openpi_opt.machine import Machine
    from openpi_opt.pi0.policy import Pi0Policy

STAGES = ("encode_images", "prefill", "denoise_step")
CAPTURING = ("reduce_overhead", "max_autotune")
AUTOTUNING = ("max_autotune", "max_autotune_no_cudagraphs")

# Nothing in torch 2.9 to 2.15 chooses a kernel by these: group_fusion is marked deprecated and read
# nowhere, benchmark_kernel only adds a benchmark harness to the generated code.
INERT = ("group_fusion", "benchmark_kernel")
# Torch's defaults, the same in torch 2.9 to 2.15. Asking for a default is asking for nothing.
# Not here: layout_optimization and max_autotune_gemm_backends, which depend on the build.
DEFAULTS: dict[str, bool | int] = {
    "coordinate_descent_tuning": False,
    "max_fusion_size": 64,
    "freezing": False,
    "memory_planning": False,
    "aggressive_fusion": False,
    "combo_kernels": False,
    "epilogue_fusion": True,
    "max_autotune_gemm": False,
    "max_autotune_pointwise": False,
    "shape_padding": True,
    "cpp_wrapper": False,
    "comprehensive_padding": True,
    "triton.multi_kernel": 0,
}
# They tune or combine Triton kernels, of which there are none on a CPU.
_AUTOTUNED = ("coordinate_descent_tuning", "max_autotune_gemm", "max_autotune_pointwise")
_TRITON_ONLY = ("coordinate_descent_tuning", "triton.multi_kernel")
_BACKENDS = r"(ATEN|TRITON|CPP|CUTLASS|CK|CKTILE|CUTEDSL)"

BackendList = Annotated[str, Field(pattern=f"^{_BACKENDS}(,{_BACKENDS})*$")]


class TritonOptions(Options):
    """`torch._inductor.config.triton`. multi_kernel: 0 off, 1 chosen at run time, 2 and 3 forced.
    Reported on in the seeds' MI350 set."""

    multi_kernel: Literal[0, 1, 2, 3] | None = None


class InductorOptions(Options):
    """`torch._inductor.config` under its own names; None is torch's default.

    All of these are in the set that the seeds report for MI350 and MI300X, together "-1.6 ms".
    `coordinate_descent_tuning` also turns products with a side of 1 into pointwise code on a GPU;
    `freezing` makes constants of the weights; `memory_planning` was reported to cost 10 ms;
    `combo_kernels` is known for wrong scalars on ROCm (pytorch #168937): the guard decides.
    `max_autotune_gemm` and `max_autotune_pointwise` are the halves of mode `max_autotune` (AMD's
    workload tuning guide). `max_autotune_gemm_backends` is read when autotuning products only.
    `comprehensive_padding` (not in that set) pads rows to 128 bytes, after which torch's addmm
    copies a bias instead of fusing it.
    """

    coordinate_descent_tuning: bool | None = None
    benchmark_kernel: bool | None = None
    group_fusion: bool | None = None
    max_fusion_size: Annotated[int, Field(ge=1)] | None = None
    freezing: bool | None = None
    memory_planning: bool | None = None
    aggressive_fusion: bool | None = None
    combo_kernels: bool | None = None
    epilogue_fusion: bool | None = None
    max_autotune_gemm: bool | None = None
    max_autotune_pointwise: bool | None = None
    shape_padding: bool | None = None
    max_autotune_gemm_backends: BackendList | None = None
    cpp_wrapper: bool | None = None
    layout_optimization: bool | None = None
    comprehensive_padding: bool | None = None
    triton: TritonOptions = TritonOptions()


class CompileOptions(Options):
    """`mode` is torch.compile's; `scope` what is compiled: each stage, the whole call, or layers.

    The whole call unrolls the denoising steps into one graph: more to fuse across, and about
    `steps` times as long to compile. `layer` compiles each kind of layer once and reuses the code
    for all layers of that kind; nothing is fused across layers or compiled outside of them.
    Measured on an H100: the first call takes 14 to 21 s instead of 36 to 71 s, a call 1.3 to 4.7%
    longer. So it is a cheap first look.
    """

    mode: Literal[
        "off", "default", "reduce_overhead", "max_autotune", "max_autotune_no_cudagraphs"
    ] = "off"
    scope: Literal["stage", "call", "layer"] = "stage"
    inductor: InductorOptions = InductorOptions()


class Compile(Knob[CompileOptions]):
    """Compile with Inductor: each stage (vision, prefill, one denoising step), call or layer.

    All vendors. Sources: torch.compile's modes; the MI350 and MI300X configurations of
    sunxxuns/openpi-1 (TORCH_COMPILE_MODE, OPENPI_* Inductor switches), of which `compile=seeds` is
    the set. Per stage, the denoising step is compiled once and called `steps` times. A graph
    break, a recompilation between calls, or a capture that Inductor skips is an error, not a
    slower run: `fullgraph=True`, `dynamic=False` and `openpi_opt.kernels.compiled`.
    """

    name = "compile"
    options_type = CompileOptions
    slow: ClassVar = {
        "mode": AUTOTUNING,
        "scope": ("call",),
        # They time kernels, so they have the device while they compile.
        "inductor.coordinate_descent_tuning": ("True",),
        "inductor.triton.multi_kernel": ("1", "2", "3"),
        "inductor.cpp_wrapper": ("True",),  # a host compiler: 43 to 101 s on two cores
    }
    quick: ClassVar = {"scope": "layer"}
    tuned: ClassVar = ("scope",)  # by layer a call is 1.3 to 4.7% slower (H100)

    def refusals(self, cfg: Configuration, machine: Machine) -> Iterator[Refusal]:
        """Inductor needs a host compiler, its graph capture a GPU, and each option this torch."""
        options = self.of(cfg)
        if options.mode != "off":
            yield from _capture_refusals(cfg, options)
            yield from _torch_refusals(cfg, options.inductor)
            yield from _compiler_refusals(cfg, options)

    def canonical(self, cfg: Configuration) -> CompileOptions:
        """No options where nothing is compiled; none that restate a default or are not read."""
        options = self.of(cfg)
        if options.mode == "off":
            return CompileOptions()
        chosen = {
            key: value
            for key, value in options.inductor.given().items()
            if _matters(key, value, options, cfg.platform.device)
        }
        return options.model_copy(update={"inductor": _nested(chosen)})

    def times_kernels(self, cfg: Configuration) -> bool:
        """Autotuning does, and options that choose among variants; caches may spare it."""
        options = self.canonical(cfg)
        inductor = options.inductor
        return options.mode.startswith("max_autotune") or bool(
            inductor.coordinate_descent_tuning
            or inductor.benchmark_kernel
            or inductor.triton.multi_kernel
        )

    def transform(self, policy: Pi0Policy, cfg: Configuration) -> None:
        """Replace each stage, or the call, by its compiled form; the first call compiles it."""
        options = self.canonical(cfg)
        if options.mode == "off":
            return
        import torch

        from openpi_opt.kernels.compiled import CompiledCall

        how: dict[str, Any] = {"fullgraph": True, "dynamic": False}
        how["options"] = settings(options)
        if options.scope == "layer":
            parts = _compile_layers(policy, how)
        else:
            names = STAGES if options.scope == "stage" else ("sample_actions",)
            for name in names:
                setattr(policy, name, torch.compile(getattr(policy, name), **how))
            parts = len(names)
        call = CompiledCall(policy.sample_actions, parts, options.mode in CAPTURING)
        policy.sample_actions = call  # type: ignore[method-assign]

    def float32_form(self, cfg: Configuration) -> CompileOptions:
        """What Inductor makes of float32 operations says nothing of those in 16 bits."""
        return CompileOptions()

    def notes(self, cfg: Configuration) -> list[str]:
        """Name the options that were asked for and that nothing reads."""
        if self.of(cfg).mode == "off":
            return []
        inert = [key for key in self.of(cfg).inductor.given() if key in INERT]
        return [f"Inert, nothing in this torch reads it: compile.inductor.{key}." for key in inert]

    def label(self, options: CompileOptions) -> str:
        """The mode, the scope where it is not the default, and the options that were chosen."""
        if options.mode == "off":
            return "off"
        words = [options.mode, *([options.scope] if options.scope != "stage" else [])]
        return " ".join([*words, *(f"{k}={v}" for k, v in options.inductor.given().items())])


@cache
def inductor_source() -> str:
    """The text of `torch/_inductor/config.py`: importing torch takes seconds."""
    spec = importlib.util.find_spec("torch")
    if spec is None or spec.origin is None:
        return ""
    return (Path(spec.origin).parent / "_inductor" / "config.py").read_text(encoding="utf-8")


def is_inductor_option(name: str) -> bool:
    """Whether the installed torch assigns the option; `triton.NAME` in its class of that name."""
    of_triton, _, last = name.rpartition(".")
    source, indent = inductor_source(), ""
    if of_triton:
        source, indent = source.partition("\nclass triton:")[2].partition("\nclass ")[0], "    "
    return re.search(rf"^{indent}{last}\b *[:=]", source, re.MULTILINE) is not None


def _capture_refusals(cfg: Configuration, options: CompileOptions) -> Iterator[Refusal]:
    """Of the modes in which Inductor captures graphs itself."""
    if options.mode not in CAPTURING:
        return
    if options.scope == "layer":
        yield Refusal(
            "invalid",
            f"compile={options.mode} would capture each layer by itself with compile.scope=layer; "
            "use compile.scope=stage, or compile=default with graph=manual",
        )
    if cfg.platform.device == "cpu":
        yield Refusal(
            "unavailable",
            f"compile={options.mode} captures CUDA or HIP graphs; this trial runs on the CPU. "
            "Use compile=default or compile=max_autotune_no_cudagraphs",
        )
    if cfg.knobs["graph"].mode != "none":
        yield Refusal(
            "invalid",
            f"compile={options.mode} and graph=manual both capture the call; use graph=none, or "
            "compile=default or compile=max_autotune_no_cudagraphs",
        )
    if options.inductor.cpp_wrapper:
        yield Refusal(
            "invalid",
            f"compile.inductor.cpp_wrapper: Inductor captures no graphs then, as "
            f"compile={options.mode} asks; use compile=default with graph=manual",
        )


def _torch_refusals(cfg: Configuration, inductor: InductorOptions) -> Iterator[Refusal]:
    """Of options that this torch lacks, and of CK, which Inductor leaves out without a word where
    it cannot be had, and fails on where it is alone."""
    chosen = inductor.given()
    missing = [key for key in chosen if key not in INERT and not is_inductor_option(key)]
    if missing:
        names = ", ".join(f"compile.inductor.{key}" for key in missing)
        yield Refusal("unavailable", f"the installed torch has no such Inductor option: {names}")
    if not re.search(r"\bCK", inductor.max_autotune_gemm_backends or ""):
        return
    wanted = f"compile.inductor.max_autotune_gemm_backends={inductor.max_autotune_gemm_backends}"
    if not BY_DEVICE[cfg.device].has_aiter:
        yield Refusal("unavailable", f"{wanted}: Composable Kernel is AMD's, for ROCm")
    if importlib.util.find_spec("ck4inductor") is None:
        where = "https://github.com/rocm/composable_kernel"
        yield Refusal(
            "unavailable", f"{wanted} needs the package ck4inductor (pip install git+{where})"
        )


def _compiler_refusals(cfg: Configuration, options: CompileOptions) -> Iterator[Refusal]:
    """C++ for code on the CPU and for the C++ wrapper; C for Triton's launchers on a GPU."""
    needs_cxx = cfg.platform.device == "cpu" or options.inductor.cpp_wrapper
    variable, names = ("CXX", ["g++", "clang++"]) if needs_cxx else ("CC", ["gcc", "clang", "cc"])
    candidates = [os.environ[variable]] if variable in os.environ else names
    if not any(shutil.which(name) for name in candidates):
        yield Refusal(
            "unavailable",
            f"compile={options.mode} needs a host compiler and found none of "
            f"{', '.join(candidates)}; install one or set {variable}",
        )
    # Failed on an H100 with torch 2.11.
    if options.inductor.cpp_wrapper and cfg.knobs["gemm"].backend == "triton_skinny":
        yield Refusal(
            "invalid",
            "compile.inductor.cpp_wrapper cannot pass the list of launch parameters that "
            "gemm=triton_skinny takes (arg type List[int] is not supported); use one of the two",
        )


def _matters(key: str, value: object, options: CompileOptions, device: str) -> bool:
    if key in INERT or (device == "cpu" and key in _TRITON_ONLY):
        return False
    autotuning = options.mode in AUTOTUNING
    if key == "max_autotune_gemm_backends":
        return autotuning or options.inductor.max_autotune_gemm is True
    if key in _AUTOTUNED and autotuning:
        return value is not True  # these modes turn them on
    return key not in DEFAULTS or value != DEFAULTS[key]


def _nested(chosen: dict[str, Any]) -> InductorOptions:
    """The inverse of `InductorOptions.given`."""
    flat = {key: value for key, value in chosen.items() if "." not in key}
    triton = {key.split(".")[1]: value for key, value in chosen.items() if "." in key}
    return InductorOptions.model_validate({**flat, "triton": triton})


def settings(options: CompileOptions) -> dict[str, Any]:
    """Mode and options as one mapping: torch.compile takes one of the two only."""
    import torch._inductor

    mode = torch._inductor.list_mode_options(options.mode.replace("_", "-"))
    return {**mode, **options.inductor.given()}


def _compile_layers(policy: Pi0Policy, how: dict[str, Any]) -> int:
    """Compile the layers of the three towers; returns how many graphs that can take at most. Dynamo
    finds the code of an earlier layer by its guards. A kind is a class and the shapes of its
    weights; it takes two graphs where the state token goes through the layers alone."""
    from openpi_opt.surgery.layers import decoder_layers, vision_layers

    kinds = set()
    for layer in (*vision_layers(policy.vision), *decoder_layers(policy)):
        layer.compile(**how)
        kinds.add((type(layer), *(tuple(weight.shape) for weight in layer.parameters())))
    return 2 * len(kinds)
