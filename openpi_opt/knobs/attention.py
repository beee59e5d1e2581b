"""Knob `attention`: the attention backend of each stage."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, ClassVar, Literal

from openpi_opt.knobs.base import Configuration, Knob, Options, Refusal
from openpi_opt.knobs.launch import AttentionLaunch, arch_of
from openpi_opt.knobs.refusals import aiter_refusals, sixteen_bits_refusals, triton_refusals

if TYPE_CHECKING:
    from openpi_opt.machine import Machine
    from openpi_opt.pi0.policy import Pi0Policy

Backend = Literal["eager", "sdpa", "flash", "cudnn", "efficient", "math", "aiter", "triton"]
STAGES = ("vision", "prefill", "denoise")
# Single backends of torch's scaled_dot_product_attention, and the devices that can have them.
SDPA_DEVICES = {
    "flash": ("cpu", "cuda", "rocm"),
    "cudnn": ("cuda",),
    "efficient": ("cuda", "rocm"),
    "math": ("cpu", "cuda", "rocm"),
}
_SIXTEEN_BITS = ("flash", "cudnn")  # on a GPU
_WITHOUT_MASK = ("flash", "aiter")


class AttentionOptions(Options):
    """One backend per stage, and the launch parameters of the own Triton kernels."""

    vision: Backend = "eager"
    prefill: Backend = "eager"
    denoise: Backend = "eager"
    launch_vision: AttentionLaunch = AttentionLaunch()
    launch_prefill: AttentionLaunch = AttentionLaunch()
    launch_denoise: AttentionLaunch = AttentionLaunch()

    def launch(self, stage: str) -> AttentionLaunch:
        """The launch parameters of a stage."""
        launch: AttentionLaunch = getattr(self, f"launch_{stage}")
        return launch


class Attention(Knob[AttentionOptions]):
    """Attention backend per stage, always with exact masks.

    `sdpa` is torch's scaled_dot_product_attention, torch choosing; `flash`, `cudnn`, `efficient`
    and `math` are single backends of it (`torch.nn.attention.SDPBackend`): flash attention on both
    vendors, cuDNN on NVIDIA, and a backend that cannot do a stage refuses; `aiter` is AMD's flash
    attention: the CK kernel behind `torch.ops.aiter.mha_fwd` on ROCm, the same package's Triton
    kernel elsewhere; `triton` are the own kernels for both vendors (`kernels.triton_attention`,
    and `kernels.triton_decode`, which splits over keys and serves both masks of the suffix in one
    call: flash attention as in FlashDecoding, Dao-AILab/flash-attention
    `flash_attn_with_kvcache`). Backends that take no mask get the same function by a static split
    of queries and keys (`openpi_opt.pi0.ops.Visibility.segments`). Source: sunxxuns/openpi-1 on
    MI350 (`USE_AITER_ATTENTION`), without the masks that its best configuration drops.
    """

    name = "attention"
    options_type = AttentionOptions
    # The state token, run once, is attention of the denoising kind in the prefill.
    stages: ClassVar = {
        "vision": ("vision",),
        "prefill": ("prefill",),
        "denoise": ("prefill", "denoise"),
        "launch_vision": ("vision",),
        "launch_prefill": ("prefill",),
        "launch_denoise": ("prefill", "denoise"),
    }
    tuned: ClassVar = tuple(f"launch_{stage}" for stage in STAGES)

    def refusals(self, cfg: Configuration, machine: Machine) -> Iterator[Refusal]:
        """Triton kernels need a GPU; AMD's aiter also the package and a 16-bit precision."""
        device, chosen = cfg.platform.device, self._backends(cfg)
        for name, devices in SDPA_DEVICES.items():
            if name in chosen and device not in devices:
                where = f"is a backend of torch on {' or '.join(devices)}, not on {device}"
                yield Refusal("unavailable", f"attention={name} {where}")
            if name in chosen and name in _SIXTEEN_BITS and device != "cpu":
                yield from sixteen_bits_refusals(f"attention={name}", cfg)
        yield from _mask_refusals(self.of(cfg), cfg)
        if "triton" in chosen:
            yield from triton_refusals("attention=triton", cfg)
        # Launch parameters that no processor of this architecture can hold.
        size = 4 if cfg.knobs["precision"].dtype == "float32" else 2
        for stage in STAGES:
            launch = self.canonical(cfg).launch(stage)
            problem = launch.problem(stage, arch_of(cfg, machine), size) if launch.given() else None
            if problem is not None:
                yield Refusal("invalid", f"attention.launch_{stage} {problem}")
        if "aiter" in chosen:
            yield from aiter_refusals("attention=aiter", cfg, machine, elsewhere=True)

    def canonical(self, cfg: Configuration) -> AttentionOptions:
        """Without launch parameters that no kernel reads."""
        options, device = self.of(cfg), cfg.platform.device
        launches = {
            f"launch_{stage}": options.launch(stage).canonical(stage, device)
            if getattr(options, stage) == "triton"
            else AttentionLaunch()
            for stage in STAGES
        }
        return options.model_copy(update=launches)

    def environment(self, cfg: Configuration) -> Mapping[str, str]:
        """Without ROCm only the Triton part of aiter can be imported, and only when told so."""
        if "aiter" in self._backends(cfg) and cfg.platform.device == "cuda":
            return {"AITER_TRITON_ONLY": "1"}
        return {}

    def transform(self, policy: Pi0Policy, cfg: Configuration) -> None:
        """Put the backend of each stage into the policy's operations."""
        from openpi_opt.kernels import attention as backends
        from openpi_opt.runtime import workload_of

        options = self.of(cfg)
        if self._backends(cfg) != {"eager"}:
            policy.declare_layout(workload_of(cfg).layout)
        for stage in STAGES:
            launch = options.launch(stage).canonical(stage, cfg.platform.device).given()
            name = getattr(options, stage)
            if name in SDPA_DEVICES:
                _require(policy, cfg, stage, name)
            function = backends.backend(name, cfg.platform.device, stage, launch)
            setattr(policy.ops, f"attention_{stage}", function)

    def float32_form(self, cfg: Configuration) -> AttentionOptions:
        """Kernels for 16 bits alone become torch's choice: it takes the same layout.

        Launch parameters are those of 16 bits: tiles of float32 would not fit.
        """
        launches = {f"launch_{stage}": AttentionLaunch() for stage in STAGES}
        plain = dict.fromkeys(self.in_16_bits_only(cfg), "sdpa")
        return self.canonical(cfg).model_copy(update={**launches, **plain})

    def in_16_bits_only(self, cfg: Configuration) -> list[str]:
        """The stages whose kernel has no float32 form on this device."""
        options, device = self.of(cfg), cfg.platform.device
        names = ("aiter",) if device == "cpu" else ("aiter", *_SIXTEEN_BITS)
        return [stage for stage in STAGES if getattr(options, stage) in names]

    def label(self, options: AttentionOptions) -> str:
        """One word when the stages agree, and the launch parameters that were given."""
        chosen = {stage: getattr(options, stage) for stage in STAGES}
        words = [f"{stage}={backend}" for stage, backend in chosen.items()]
        if len(set(chosen.values())) == 1:
            words = [options.vision]
        for stage in STAGES:
            given = options.launch(stage).given()
            words += [f"{stage}.{name}={value}" for name, value in given.items()]
        return " ".join(words)

    def _backends(self, cfg: Configuration) -> set[str]:
        options = self.of(cfg)
        return {options.vision, options.prefill, options.denoise}


def _require(policy: Pi0Policy, cfg: Configuration, stage: str, name: str) -> None:
    """Let torch say whether it has the kernel for the calls of a stage."""
    from openpi_opt.kernels.attention import require_sdpa

    workload, layout = cfg.workload, policy.layout
    assert layout is not None
    vision, gemma = policy.config.vision, policy.config.language
    batch, heads, kv_heads, width = workload.batch_size, gemma.heads, gemma.kv_heads, gemma.head_dim
    valid = layout.prefix_slots if layout.flexible else layout.prefix_valid
    keys = {"prefill": valid, "denoise": valid + 1 + workload.horizon}
    rows = {"prefill": [layout.prefix_slots], "denoise": [1, workload.horizon]}  # 1: the state
    if layout.flexible:  # one call with a mask
        rows["denoise"] = [1 + workload.horizon]
    masked = layout.flexible and stage != "vision"
    if stage == "vision":
        heads = kv_heads = vision.heads
        width = vision.head_dim
    like = policy.time_table.new_empty(0, dtype=policy.dtype)
    for queries in rows.get(stage, [vision.tokens]):
        q = (batch, queries, heads, width)
        k = (batch, keys.get(stage, vision.tokens), kv_heads, width)
        require_sdpa(name, stage, q, k, like, masked)


def _mask_refusals(options: AttentionOptions, cfg: Configuration) -> Iterator[Refusal]:
    """Backends without a mask cannot leave out what only the device knows."""
    for stage in ("prefill", "denoise"):
        name = getattr(options, stage)
        if cfg.workload.layout == "flexible" and name in _WITHOUT_MASK:
            yield Refusal(
                "invalid",
                f"attention.{stage}={name} takes no mask, which workload.layout=flexible needs; "
                f"use attention.{stage}=triton or sdpa, or workload.layout=exact",
            )
