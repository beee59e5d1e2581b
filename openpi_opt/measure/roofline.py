"""The least time that a configuration's work takes on a machine: bytes, operations, floor.

The model is the roofline of Williams, Waterman and Patterson (CACM 2009): a stage cannot be faster
than its bytes at the memory's rate, nor than its operations at the rate of their number format.
Stages follow one another, and so do denoising steps, since each reads what the one before made.
Everything is arithmetic on the configuration; no torch.

Counted are products of matrices (two operations for each multiplication and addition) and what
must come from memory: weights once for each pass, images, prompt rows of the embedding table, and
image tokens and keys and values where they are larger than the machine's last-level cache. Biases,
norms, softmax and activations within a stage are left out, because a fused kernel need not move
them: the result is a floor. Attention counts valid keys only, since a mask need not be computed.

Letters: B batch, C encoded cameras, P prefix tokens that are computed, N valid ones of them, H
horizon, S suffix tokens of a step.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from openpi_opt.pi0.config import MODELS, GemmaConfig, Pi0Config
from openpi_opt.result import Ceilings, Roofline, StageRoofline

if TYPE_CHECKING:
    from openpi_opt.config import Config

# Bytes of one number. TF32 rounds float32 factors inside the matrix unit; memory holds float32.
WIDTH = {"float32": 4, "tf32": 4, "bfloat16": 2, "float16": 2, "fp8": 1}
_MIB = 2**20


@dataclass(frozen=True)
class Work:
    """What one stage does: `passes` times the same, for denoising one pass per step.

    `operations` by number format and `weights` (bytes) are those of one pass. `past` are bytes of
    keys and values that each pass reads, `fresh` bytes that come from memory once whatever the
    cache (images, rows of the embedding table), `handed` bytes of activations that another stage
    reads.
    """

    operations: Mapping[str, float]
    weights: float
    passes: int = 1
    past: float = 0.0
    fresh: float = 0.0
    handed: float = 0.0


@dataclass
class _Count:
    """Adds up the matrix products of one pass."""

    operations: Counter[str] = field(default_factory=Counter)
    weights: float = 0.0

    def linear(self, rows: int, parameters: int, fmt: str, times: int = 1) -> None:
        """`times` layers of `parameters` weights each, on `rows` rows each."""
        self.operations[fmt] += 2 * rows * parameters * times
        self.weights += parameters * WIDTH[fmt] * times

    def attention(self, pairs: int, width: int, fmt: str, times: int = 1) -> None:
        """QK^T and AV over `pairs` of query and key, all heads together `width` wide."""
        self.operations[fmt] += 4 * pairs * width * times


def stage_work(cfg: Config) -> dict[str, Work]:
    """The work of vision, prefill and denoise of one call of a resolved configuration."""
    plan = _Plan.of(cfg)
    return {"vision": _vision(plan), "prefill": _prefill(plan), "denoise": _denoise(plan)}


def memory_bytes(work: Mapping[str, Work], cache_bytes: float) -> dict[str, float]:
    """Bytes that each stage has to move from or to memory.

    What is read once more only after something larger than the cache went through it comes from
    memory again: the weights and the past of each pass, unless those of one pass fit in the
    cache, then once; and nothing at all between calls when a whole call's weights fit.
    """
    resident = sum(stage.weights + stage.past for stage in work.values()) <= cache_bytes
    found = {}
    for name, stage in work.items():
        one_pass = stage.weights + stage.past
        passes = stage.passes if one_pass > cache_bytes else 1
        streamed = 0.0 if resident else one_pass * passes
        handed = stage.handed if stage.handed > cache_bytes else 0.0
        found[name] = streamed + stage.fresh + handed
    return found


def roofline(
    cfg: Config,
    ceilings: Ceilings | None,
    mean_ms: float,
    stage_ms: Mapping[str, float] | None = None,
) -> tuple[Roofline, list[str]]:
    """Floors and fractions of one measured call, and remarks on what is missing or odd.

    `mean_ms` is the latency, `stage_ms` the busy time of each stage under the profiler (idle time
    between kernels is in the latency only). Without `ceilings`, or where these lack a number
    format that is used, floors and fractions are None: no value is made up.
    """
    work = stage_work(cfg)
    cache_bytes = ceilings.cache_mib * _MIB if ceilings else 0.0
    moved = memory_bytes(work, cache_bytes)
    stages = {
        name: _stage(stage, moved[name], ceilings, (stage_ms or {}).get(name))
        for name, stage in work.items()
    }
    floors = [stage.floor_ms for stage in stages.values()]
    known = [floor for floor in floors if floor is not None]
    floor_ms = sum(known) if len(known) == len(floors) else None
    fraction = None if floor_ms is None else floor_ms / mean_ms
    found = Roofline(ceilings=ceilings, stages=stages, floor_ms=floor_ms, fraction=fraction)
    return found, _remarks(found, work)


def _stage(
    stage: Work, moved: float, ceilings: Ceilings | None, measured_ms: float | None
) -> StageRoofline:
    operations = {fmt: count * stage.passes for fmt, count in stage.operations.items()}
    known: dict[str, Any] = {"floor_ms": None, "bound": None, "fraction": None}
    if ceilings is not None and set(operations) <= set(ceilings.tflops):
        memory_ms = moved / (ceilings.bandwidth_gb_s * 1e9) * 1e3
        seconds = [count / (ceilings.tflops[fmt] * 1e12) for fmt, count in operations.items()]
        compute_ms = sum(seconds) * 1e3
        floor_ms = max(memory_ms, compute_ms)
        known = {
            "floor_ms": floor_ms,
            "bound": "memory" if memory_ms > compute_ms else "compute",
            "fraction": floor_ms / measured_ms if measured_ms else None,
        }
    return StageRoofline(operations=operations, bytes=moved, measured_ms=measured_ms, **known)


def _remarks(found: Roofline, work: Mapping[str, Work]) -> list[str]:
    ceilings = found.ceilings
    if ceilings is None:
        return []
    used = {fmt for stage in work.values() for fmt in stage.operations}
    missing = sorted(used - set(ceilings.tflops))
    if missing:
        return [f"No floor: this machine has no ceiling for {' and '.join(missing)} products."]
    names = [name for name, stage in found.stages.items() if (stage.fraction or 0) > 1]
    whole = found.fraction is not None and found.fraction > 1
    if whole or names:
        what = "the call" if whole else " and ".join(names)
        return [
            f"Faster than its floor: {what}. The ceilings are too low, as when something else ran "
            "while they were measured; delete the store's ceilings folder to measure them again."
        ]
    return []


@dataclass(frozen=True)
class _Plan:
    """What of the configuration decides the work."""

    model: Pi0Config
    batch: int
    cameras: int
    prompt: int
    valid: int
    horizon: int
    steps: int
    fmt: str
    outer: str
    fp8: frozenset[str]
    last_layer: bool
    state_once: bool
    time_mlp: bool

    @staticmethod
    def of(cfg: Config) -> _Plan:
        knobs: Mapping[str, Any] = cfg.canonical().knobs
        workload, model = cfg.workload, MODELS[cfg.model.name]
        active = sum(workload.active_cameras)
        skip = knobs["vision"].skip_masked
        trimmed = skip and workload.layout == "exact"
        precision = knobs["precision"]
        outer = "tf32" if precision.tf32 else "float32"
        blas = knobs["blas"]
        return _Plan(
            model=model,
            batch=workload.batch_size,
            cameras=active if skip else len(workload.active_cameras),
            prompt=workload.prompt_tokens if trimmed else workload.prompt_slots,
            valid=active * model.vision.tokens + workload.prompt_tokens,
            horizon=workload.horizon,
            steps=workload.steps,
            fmt=outer if precision.dtype == "float32" else precision.dtype,
            outer=outer,
            fp8=frozenset(blas.fp8.stages if blas.backend == "fp8" else ()),
            # Inductor leaves out by itself what nothing reads.
            last_layer=knobs["simplify"].last_layer or knobs["compile"].mode != "off",
            state_once=knobs["simplify"].state_once,
            time_mlp=knobs["simplify"].time_mlp,
        )

    def linear_format(self, stage: str) -> str:
        """The number format of the tower's linear layers."""
        return "fp8" if stage in self.fp8 else self.fmt

    def keys_values(self, tokens: int) -> float:
        """Bytes of all layers' keys and values of `tokens` tokens of each observation."""
        tower = self.model.language
        per_token = 2 * tower.depth * tower.kv_heads * tower.head_dim * WIDTH[self.fmt]
        return float(self.batch * tokens * per_token)


def _vision(plan: _Plan) -> Work:
    tower, language = plan.model.vision, plan.model.language
    fmt = plan.linear_format("vision")
    images = plan.batch * plan.cameras
    rows = images * tower.tokens
    pixels = 3 * tower.patch_size**2
    count = _Count()
    count.linear(rows, pixels * tower.width, plan.outer)
    count.linear(rows, 4 * tower.width**2 + 2 * tower.width * tower.mlp_width, fmt, tower.depth)
    count.attention(images * tower.tokens**2, tower.width, plan.fmt, tower.depth)
    count.linear(rows, tower.width * language.width, fmt)
    return Work(
        operations=dict(count.operations),
        weights=count.weights,
        fresh=images * 3 * tower.image_size**2 * WIDTH["float32"],
        handed=rows * language.width * WIDTH[plan.fmt],
    )


def _prefill(plan: _Plan) -> Work:
    tower = plan.model.language
    image_tokens = plan.cameras * plan.model.vision.tokens
    tokens = image_tokens + plan.prompt
    pairs = plan.batch * tokens * plan.valid
    count = _Count()
    fmt = plan.linear_format("prefill")
    _gemma(count, tower, plan.batch * tokens, pairs, fmt, plan.fmt, plan.last_layer)
    expert = plan.model.expert
    if plan.model.state_tokens:  # projected once a call
        count.linear(plan.batch, plan.model.action_dim * expert.width, plan.outer)
    if plan.state_once:
        denoise = plan.linear_format("denoise")
        pairs = plan.batch * (plan.valid + 1)
        _gemma(count, expert, plan.batch, pairs, denoise, plan.fmt, last_layer=True)
    width = tower.width * WIDTH[plan.fmt]
    return Work(
        operations=dict(count.operations),
        weights=count.weights,
        fresh=float(plan.batch * plan.prompt * width),
        handed=plan.batch * image_tokens * width + plan.keys_values(plan.valid),
    )


def _denoise(plan: _Plan) -> Work:
    expert, actions = plan.model.expert, plan.model.action_dim
    states = plan.model.state_tokens
    own = 0 if plan.state_once else states
    rows, keys = plan.batch * plan.horizon, plan.valid + states + plan.horizon
    count = _Count()
    # The state sees the prefix and itself, actions see everything.
    pairs = plan.batch * (plan.horizon * keys + own * (plan.valid + 1))
    fmt = plan.linear_format("denoise")
    _gemma(count, expert, rows + plan.batch * own, pairs, fmt, plan.fmt, last_layer=False)
    count.linear(rows, actions * expert.width, plan.outer, 2)  # in and out
    if plan.model.family == "pi0":
        count.linear(rows, expert.width**2, plan.outer)
        if not plan.time_mlp:
            count.linear(rows, 2 * expert.width**2, plan.outer)
    elif not plan.time_mlp:
        # One time for the whole batch: two layers for the condition, one for each norm.
        count.linear(1, expert.width**2, plan.outer, 2)
        count.linear(1, 3 * expert.width**2, plan.outer, 2 * expert.depth + 1)
    return Work(
        operations=dict(count.operations),
        weights=count.weights,
        passes=plan.steps,
        past=plan.keys_values(plan.valid + states - own),
    )


def _gemma(
    count: _Count,
    tower: GemmaConfig,
    rows: int,
    pairs: int,
    linear: str,
    attention: str,
    last_layer: bool,
) -> None:
    """A Gemma tower on `rows` tokens; `last_layer`: the last one yields keys and values only."""
    q, kv = tower.heads * tower.head_dim, tower.kv_heads * tower.head_dim
    whole = tower.depth - 1 if last_layer else tower.depth
    parameters = tower.width * (2 * q + 2 * kv + 3 * tower.mlp_width)
    count.linear(rows, parameters, linear, whole)
    count.attention(pairs, q, attention, whole)
    if last_layer:
        count.linear(rows, tower.width * 2 * kv, linear)
