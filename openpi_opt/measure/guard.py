"""The guard: are a candidate's actions those of the policy?

The reference is the same weights and inputs in float32, plain and eager, with the general masks
and without TF32. How far honest rounding may move the actions is not a constant: it is measured,
as the distance of the plain eager policy in the candidate's own precision on the same inputs, and
a candidate may be at most `guard.factor` times as far away (and under `guard.cap`). Several
different inputs are compared, and the first one again at the end: a replay that ignores its inputs
cannot pass, nor can one that depends on the call before.

Reference and plain actions are computed once per (policy code, model, weights, workload, device,
torch) and kept in the store.

Letters: B batch, H horizon, A action dim.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock
from safetensors.torch import load_file, save_file
from torch import Tensor

from openpi_opt import pi0
from openpi_opt.config import Config, Guard
from openpi_opt.pi0.inputs import Inputs
from openpi_opt.pi0.policy import Pi0Policy
from openpi_opt.pi0.precision import cast
from openpi_opt.result import GuardReport

Call = Callable[[Inputs], Tensor]
_TF32 = "+tf32"


@dataclass(frozen=True)
class Distance:
    """How far actions [B, H, A] are from the reference; None where they are not finite."""

    rel_l2: float | None
    max_abs: float | None
    cosine: float | None


@dataclass(frozen=True)
class Reference:
    """Reference actions per input, and those of the plain policy in the candidate's precision."""

    actions: list[Tensor]
    plain: list[Tensor]

    @property
    def plain_rel_l2(self) -> float:
        """The largest distance of the plain policy over the inputs; 0 in float32."""
        pairs = zip(self.plain, self.actions, strict=True)
        distances = [distance(plain, actions).rel_l2 for plain, actions in pairs]
        if any(d is None for d in distances):
            raise ValueError(
                "the plain eager policy itself returns NaN or infinity in this precision"
            )
        return max(d for d in distances if d is not None)


def distance(actual: Tensor, reference: Tensor) -> Distance:
    """Relative L2, largest absolute and angular distance, in float64 on the host.

    The relative distance is the largest over the batch: one wrong robot among 64 is wrong.
    """
    a, r = actual.detach().cpu().double(), reference.double()
    if a.shape != r.shape or not bool(torch.isfinite(a).all()):
        return Distance(None, None, None)
    difference, a, r = (t.flatten(1) for t in (a - r, a, r))
    relative = difference.norm(dim=1) / r.norm(dim=1)
    cosine = torch.nn.functional.cosine_similarity(a, r, dim=1)
    return Distance(
        rel_l2=float(relative.max()),
        max_abs=float(difference.abs().max()),
        cosine=float(cosine.min()),
    )


def tolerance(guard: Guard, plain_rel_l2: float, lossy: bool = False) -> float:
    """Largest admitted relative L2 distance."""
    if lossy:
        return guard.lossy_cap
    return min(max(guard.factor * plain_rel_l2, guard.floor), guard.cap)


def check(
    call: Call,
    inputs: Sequence[Inputs],
    reference: Reference,
    guard: Guard,
    lossy: bool = False,
) -> GuardReport:
    """Run `call` over all inputs, the first one twice, and compare with the reference."""
    order = [*range(len(inputs)), 0]
    found = [distance(call(inputs[i]), reference.actions[i]) for i in order]
    plain = reference.plain_rel_l2
    limit = tolerance(guard, plain, lossy)
    if any(d.rel_l2 is None for d in found):
        worst = Distance(None, None, None)
    else:
        worst = max(found, key=lambda d: d.rel_l2 or 0.0)
    return GuardReport(
        passed=worst.rel_l2 is not None and worst.rel_l2 <= limit,
        rel_l2=worst.rel_l2,
        max_abs=worst.max_abs,
        cosine=worst.cosine,
        plain_rel_l2=plain,
        tolerance=limit,
        inputs=len(inputs),
    )


def explain(report: GuardReport) -> str:
    """One line for a configuration that failed."""
    if report.rel_l2 is None:
        return "wrong actions: NaN, infinity or a wrong shape"
    return (
        f"wrong actions: {report.rel_l2:.2%} from the float32 reference; admitted are "
        f"{report.tolerance:.2%} (plain eager in this precision: {report.plain_rel_l2:.2%})"
    )


def obtain(
    policy: Pi0Policy, inputs: Sequence[Inputs], cfg: Config, arch: str, folder: Path
) -> Reference:
    """The reference for `cfg`, from the store or computed now with `policy`.

    `policy` is freshly built in float32 and plain; it is cast to the candidate's precision when
    the plain actions of that precision are missing (then build another: knobs start from float32).
    One process computes, others wait for it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{_key(cfg, arch)}.safetensors"
    names = ["float32", _plain_name(cfg)]
    with FileLock(f"{path}.lock"):
        known = load_file(path) if path.exists() else {}
        for name in names:
            if f"{name}/0" not in known:
                cast(policy, getattr(torch, name.removesuffix(_TF32)))
                tf32 = name.endswith(_TF32)
                for index, actions in enumerate(_plain_actions(policy, inputs, tf32)):
                    known[f"{name}/{index}"] = actions
                temporary = path.with_suffix(".tmp")
                save_file(known, temporary)
                temporary.replace(path)
    of = {name: [known[f"{name}/{i}"] for i in range(len(inputs))] for name in names}
    return Reference(actions=of["float32"], plain=of[names[1]])


def _plain_name(cfg: Config) -> str:
    """The precision of the plain policy. TF32 decides only where the towers are float32."""
    options: Any = cfg.canonical().knobs["precision"]
    return options.dtype + (_TF32 if options.tf32 and options.dtype == "float32" else "")


def _plain_actions(policy: Pi0Policy, inputs: Sequence[Inputs], tf32: bool) -> list[Tensor]:
    with torch.inference_mode(), _float32_products(tf32):
        return [policy.sample_actions(item).cpu().contiguous() for item in inputs]


@contextmanager
def _float32_products(tf32: bool) -> Iterator[None]:
    """float32 products with or without TF32, whatever the process has set."""
    before = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    torch.set_float32_matmul_precision("high" if tf32 else "highest")
    torch.backends.cudnn.allow_tf32 = tf32
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before[0])
        torch.backends.cudnn.allow_tf32 = before[1]


def _key(cfg: Config, arch: str) -> str:
    context: dict[str, Any] = cfg.context()
    del context["measure"]
    parts = {
        "context": {**context, "guard": cfg.guard.inputs},
        "arch": arch,
        "torch": torch.__version__,
        "weights": weights_identity(cfg),
        "code": _policy_code(),
    }
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:24]


def weights_identity(cfg: Config) -> list[list[Any]]:
    """Names, sizes and modification times of the checkpoint's files; empty for random weights."""
    if cfg.weights.path is None:
        return []
    path = Path(cfg.weights.path)
    files = sorted(path.glob("*.safetensors*")) if path.is_dir() else [path]
    return [[file.name, file.stat().st_size, file.stat().st_mtime_ns] for file in files]


def _policy_code() -> str:
    digest = hashlib.sha256()
    for file in sorted(Path(pi0.__file__).parent.glob("*.py")):
        digest.update(file.read_bytes())
    return digest.hexdigest()
