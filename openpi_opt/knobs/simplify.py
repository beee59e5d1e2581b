"""Knob `simplify`: exact algebra at inference."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from openpi_opt.knobs.base import Configuration, Knob, Options

if TYPE_CHECKING:
    from openpi_opt.pi0.policy import Pi0Policy

_STAGES = ("time_mlp", "state_once", "kv_buffer", "rope_tables")
_FOR_A_LAYOUT = ("state_once", "kv_buffer", "rope_tables")


class SimplifyOptions(Options):
    """Each switch on its own, in any combination.

    `last_layer`: the last prefix layer yields keys and values only.
    `fold_norms`: gains (and SigLIP's biases) of norms become part of the next projections; those
    of pi05's expert, which change from step to step, do not.
    `time_mlp`: time features and the action projection are folded into `action_time_mlp_in`; of
    pi05, gain, shift and gate of every norm are computed once for all steps.
    `state_once`: the state token runs once; the steps then need no mask, H actions see all keys.
    pi05 has no such token, and the switch no effect.
    `kv_buffer`: keys and values of a step are written behind the prefix's, not copied with them.
    With `fusion.expert_layer` no step does either, and the switch has no effect.
    `rope_tables`: rotary tables are computed once, not in every call and step.
    """

    last_layer: bool = False
    fold_norms: bool = False
    time_mlp: bool = False
    state_once: bool = False
    kv_buffer: bool = False
    rope_tables: bool = False


class Simplify(Knob[SimplifyOptions]):
    """Leave out what is not read, fold what is linear, keep what does not change. All vendors.

    All are exact in real arithmetic; `last_layer`, `kv_buffer` and `rope_tables` to the bit where
    the GEMMs are. Norms are folded in float32, before the cast, so that each weight is still
    rounded once. The last three are built for the workload's layout, declared here; batches with
    other masks are refused before they reach the policy.

    Source: Dexmal/realtime-vla on NVIDIA (`convert_from_jax.py` folds Gemma's norms, the time
    features and the action projection). `last_layer` helps eager runs: with `compile` the unread
    part goes anyway, as the H200 trace of sunxxuns/openpi-1 shows.
    """

    name = "simplify"
    options_type = SimplifyOptions
    stages: ClassVar = {
        "last_layer": ("prefill",),
        "time_mlp": ("denoise",),
        "state_once": ("prefill", "denoise"),
        "kv_buffer": ("prefill", "denoise"),
        "rope_tables": ("prefill", "denoise"),
    }

    def canonical(self, cfg: Configuration) -> SimplifyOptions:
        """A fused expert layer needs no buffer; pi05 has no state token to run once."""
        options = self.of(cfg)
        fused = cfg.knobs["fusion"].expert_layer
        return options.model_copy(
            update={
                "kv_buffer": options.kv_buffer and not fused,
                "state_once": options.state_once and cfg.model.family == "pi0",
            }
        )

    def fold(self, policy: Pi0Policy, cfg: Configuration) -> None:
        """Fold the norms, and compute the modulations of pi05's, in float32."""
        options = self.of(cfg)
        if options.fold_norms:
            from openpi_opt.surgery.folded import fold_norms

            fold_norms(policy)
        if options.time_mlp and policy.config.family == "pi05":
            from openpi_opt.surgery.lean import tabulate_modulations

            tabulate_modulations(policy)

    def transform(self, policy: Pi0Policy, cfg: Configuration) -> None:
        """Replace the last prefix layer and the stages."""
        options = self.canonical(cfg)
        if options.last_layer:
            from openpi_opt.surgery.layers import keep_keys_values

            keep_keys_values(policy)
        changes = {name: getattr(options, name) for name in _STAGES}
        if not any(changes.values()):
            return
        from openpi_opt.runtime import workload_of
        from openpi_opt.surgery.lean import lean

        if any(changes[name] for name in _FOR_A_LAYOUT):
            policy.declare_layout(workload_of(cfg).layout)
        lean(policy, horizon=cfg.workload.horizon, **changes)

    def notes(self, cfg: Configuration) -> list[str]:
        """Say so when another option took the switch's meaning away."""
        options, canonical = self.of(cfg), self.canonical(cfg)
        notes = []
        if options.kv_buffer and not canonical.kv_buffer:
            notes.append("simplify.kv_buffer has no effect with fusion.expert_layer.")
        if options.state_once and not canonical.state_once:
            notes.append(f"simplify.state_once has no effect: {cfg.model.name} has no state token.")
        return notes

    def label(self, options: SimplifyOptions) -> str:
        """The switches that are on, `all` or `none`."""
        on = [name for name, value in options.model_dump().items() if value]
        return "all" if len(on) == len(SimplifyOptions.model_fields) else "+".join(on) or "none"
