"""Knob `fusion`: projections of one input in one GEMM, and whole layers of the action expert."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, ClassVar

from openpi_opt.knobs.base import Configuration, Knob, Options, Refusal
from openpi_opt.knobs.refusals import triton_refusals

if TYPE_CHECKING:
    from openpi_opt.machine import Machine
    from openpi_opt.pi0.policy import Pi0Policy


class FusionOptions(Options):
    """Each switch on its own; the shapes are those of the full model, [out, in].

    `qkv`: Gemma towers, [2560, 2048] and [2560, 1024]. `gate_up`: Gemma towers, [32768, 2048] and
    [8192, 1024]. `vision_qkv`: SigLIP, [3456, 1152] with bias. `vision_mlp`: SigLIP's GELU in the
    GEMM before it. `expert_layer`: a layer of the action expert is six launches of own kernels; it
    needs the first two. `vision_patches`: SigLIP's patch convolution as one GEMM, [1152, 588],
    float32 or TF32. `residuals`: SigLIP and the prefix, in the GEMMs before them.
    """

    qkv: bool = False
    gate_up: bool = False
    vision_qkv: bool = False
    vision_mlp: bool = False
    expert_layer: bool = False
    vision_patches: bool = False
    residuals: bool = False


_PROJECTIONS = ("qkv", "gate_up", "vision_qkv")
_MORE = ("vision_mlp", "expert_layer", "vision_patches", "residuals")


class Fusion(Knob[FusionOptions]):
    """Two or three GEMMs of the same input become one: fewer launches, better tiles. All vendors.

    Exact, only the tiling of the sums changes. Weights are loaded and saved under their original
    names: these are views of the fused weight. Source: sunxxuns/openpi-1 on MI350 and H200
    (`USE_FUSED_PROJECTIONS`, `OPENPI_FUSE_SIGLIP_QKV`).

    `vision_mlp` leaves bias and GELU to the epilogue of cuBLASLt or hipBLASLt (not run on AMD):
    one rounding less, and no pass over [768, 4304] afterwards. On a CPU it is the plain formula.

    `expert_layer` (NVIDIA and AMD, not run on AMD) also takes norms, GELU and residuals into the
    GEMMs of the action expert, and its attention reads the prefix's cache in place. Only roundings
    differ. Of pi05 it needs `simplify.time_mlp`: gain, shift and gate of a step are its constants.
    It is made of the kernels of `attention.denoise=triton` and `gemm=triton_skinny`, and these must
    be chosen, so that no other choice is overruled. Of more than `gemm.max_rows` rows (batches) the
    products are torch's. `elementwise` and `blas` go on to act outside of these layers. Source:
    Dexmal/realtime-vla, whose decoder is such a chain of Triton kernels;
    `openpi_opt.surgery.expert`.

    `vision_patches` is exact: kernel and stride of the convolution are the same. cuDNN computed it
    in float32 for 75 us although TF32 was on (H100); `precision.tf32` decides for the product.

    `residuals` needs `blas.algorithm=searched`, whose products read a residual in their epilogue. A
    sum is rounded once instead of twice.
    """

    name = "fusion"
    options_type = FusionOptions
    stages: ClassVar = {
        "qkv": ("prefill", "denoise"),
        "gate_up": ("prefill", "denoise"),
        "vision_qkv": ("vision",),
        "vision_mlp": ("vision",),
        "vision_patches": ("vision",),
        "residuals": ("vision", "prefill"),
        "expert_layer": ("prefill", "denoise"),
    }

    def refusals(self, cfg: Configuration, machine: Machine) -> Iterator[Refusal]:
        """The fused expert layer needs a GPU, and its parts among the other options."""
        options, blas = self.of(cfg), cfg.knobs["blas"]
        if options.vision_mlp:
            for problem in _left_by(blas, "vision", "no product of SigLIP's fc1"):
                yield Refusal("invalid", f"fusion.vision_mlp {problem}")
        if options.expert_layer:
            yield from triton_refusals("fusion.expert_layer", cfg)
            for problem in _layer_contradictions(cfg, options):
                yield Refusal("invalid", f"fusion.expert_layer {problem}")
        if options.residuals and blas.algorithm != "searched":
            yield Refusal(
                "invalid",
                "fusion.residuals leaves residuals to the products of blas.algorithm=searched",
            )

    def transform(self, policy: Pi0Policy, cfg: Configuration) -> None:
        """Fuse the weights as cast by `precision`, which comes before."""
        from openpi_opt.surgery import fused

        options = self.of(cfg)
        for switch, fuse in fused.FUSIONS.items():
            if getattr(options, switch):
                fuse(policy)
        if options.expert_layer:
            from openpi_opt.surgery.expert import fuse_expert_layers

            gemm, device = cfg.knobs["gemm"], cfg.platform.device
            launches = {name: own.canonical(name, device) for name, own in gemm.launches().items()}
            launches["attention"] = cfg.knobs["attention"].launch_denoise.canonical(
                "denoise", device
            )
            given = {name: launch.given() for name, launch in launches.items()}
            fuse_expert_layers(policy, given, gemm.max_rows)
            policy.derive()

    def label(self, options: FusionOptions) -> str:
        """The switches that are on; `all` are the three of projections."""
        on = [name for name in _PROJECTIONS if getattr(options, name)]
        words = ["all"] if len(on) == len(_PROJECTIONS) else on
        more = [name for name in _MORE if getattr(options, name)]
        return "+".join([*words, *more]) or "none"


def _left_by(blas: Any, stage: str, what: str) -> Iterator[str]:
    """Who else computes the products of `stage`: aiter, or FP8."""
    if blas.backend == "aiter":
        yield f"leaves {what} to aiter; use another blas"
    if blas.backend == "fp8" and stage in blas.fp8.stages:
        yield f"leaves {what} to FP8; take {stage} out of blas.fp8.stages"


def _layer_contradictions(cfg: Configuration, options: FusionOptions) -> Iterator[str]:
    """What among the options keeps the expert's layers from being fused."""
    knobs = cfg.knobs
    if not (options.qkv and options.gate_up):
        yield "needs fusion.qkv and fusion.gate_up"
    if knobs["precision"].dtype == "float32":
        yield "is made for 16-bit weights; precision=float32 contradicts it"
    own = "by the own Triton kernel; use"
    if knobs["attention"].denoise != "triton":
        yield f"computes the expert's attention {own} attention.denoise=triton"
    if knobs["gemm"].backend != "triton_skinny":
        yield f"computes the expert's products {own} gemm=triton_skinny"
    yield from _left_by(knobs["blas"], "denoise", "none of the expert's products")
    if cfg.model.family == "pi05" and not knobs["simplify"].time_mlp:
        yield "needs the constants of each step of pi05; use simplify.time_mlp=true"
