"""The ends of a denoising step as two own kernels, around whatever the expert's layers are.

Letters: B batch, S suffix tokens, H horizon, A action dim, E expert width.
"""

from collections.abc import Sequence

from torch import Tensor

from openpi_opt.kernels.triton_suffix import advance_actions, embed_actions
from openpi_opt.pi0.adaptive import AdaptiveTower
from openpi_opt.pi0.gemma import EPS, Attending, Past
from openpi_opt.pi0.policy import Pi0Policy
from openpi_opt.surgery.expert import FusedAdaptiveTower, norm_gain
from openpi_opt.surgery.lean import LeanPolicy


class SuffixPolicy(LeanPolicy):
    """A `LeanPolicy` with `time_mlp` whose steps begin and end in one kernel each.

    pi05's actions become tokens by one product, which stays torch's.
    """

    tf32: bool

    def embed_suffix(self, x_t: Tensor, features: Tensor, state: Tensor) -> Tensor:
        """As in `LeanPolicy`; the tokens of pi0 have the towers' dtype."""
        if self.config.family == "pi05":
            return super().embed_suffix(x_t, features, state)
        out, token = self.action_time_mlp_out, None if self.plan.state_once else state
        suffix: Tensor = embed_actions(
            x_t, self.action_weight, features, out.weight, out.bias, token, self.dtype, self.tf32
        )
        return suffix

    def run_expert(
        self, suffix: Tensor, features: Tensor, how: Attending, past: Sequence[Past], horizon: int
    ) -> Tensor:
        """As in `Pi0Policy`, but all S tokens, before the final norm."""
        if isinstance(self.expert, FusedAdaptiveTower):
            return self.expert.layered(suffix, how, past, features)
        hidden, _ = self.expert(suffix, how, past)
        return hidden

    def advance(self, x_t: Tensor, hidden: Tensor, features: Tensor) -> Tensor:
        """As in `Pi0Policy`, with the final norm."""
        expert, out = self.expert, self.action_out_proj
        gain: Tensor | None
        shift: Tensor | None
        if isinstance(expert, FusedAdaptiveTower):
            gain, shift = expert.last_norm(features)
        else:
            assert not isinstance(expert, AdaptiveTower)
            gain, shift = norm_gain(expert.norm), None
        moved: Tensor = advance_actions(
            x_t, hidden, gain, shift, out.weight, out.bias, self.dt, EPS
        )
        return moved


def fuse_suffix(policy: Pi0Policy, tf32: bool) -> None:
    """Turn `policy` into a `SuffixPolicy` in place; `tf32`: products of float32 may be TF32.

    Raises:
        ValueError: the time MLP is not folded, or pi05's expert is not fused.
    """
    if not (isinstance(policy, LeanPolicy) and policy.plan.time_mlp):
        raise ValueError("fuse_suffix needs the time MLP folded: lean(policy, time_mlp=True)")
    if isinstance(policy.expert, AdaptiveTower) and not isinstance(
        policy.expert, FusedAdaptiveTower
    ):
        raise ValueError("fuse_expert_layers comes before fuse_suffix of pi05")
    policy.__class__ = SuffixPolicy
    assert isinstance(policy, SuffixPolicy)
    policy.tf32 = tf32
