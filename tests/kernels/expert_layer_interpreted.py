"""The fused expert layer in interpreter mode, against the plain one, alone and in whole policies.

Not collected by name: `test_triton_interpreter.py` runs it in a process with TRITON_INTERPRET=1.
"""

import copy
import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from openpi_opt import runtime
from openpi_opt.config import Config
from openpi_opt.pi0 import weights
from openpi_opt.pi0.config import MODELS, PI0_MINI
from openpi_opt.pi0.gemma import Attending, KeysValues, Past, Rope, rope_at
from openpi_opt.pi0.inputs import Inputs
from openpi_opt.pi0.ops import Segment, Visibility, eager_attention
from openpi_opt.pi0.policy import Pi0Policy
from openpi_opt.pi0.precision import cast
from openpi_opt.pi0.workload import make_inputs
from openpi_opt.surgery import fused
from openpi_opt.surgery.expert import (
    FusedAdaptiveTower,
    FusedExpertLayer,
    FusedExpertTower,
    fuse_expert_layers,
)
from openpi_opt.surgery.folded import fold_norms
from openpi_opt.surgery.layers import gemma_layers, with_room

HALF, FULL = torch.float16, torch.float32
TOLERANCE = {HALF: 1.5e-3, FULL: 2e-6}
STORED, ROWS = 21, 5  # keys before the call, tokens of the call
ALL = Visibility(None, (Segment(0, ROWS, None),))
# The interpreter is slow, and a layer knows no more than whether it is the last one.
SHALLOW = dataclasses.replace(
    PI0_MINI,
    vision=dataclasses.replace(PI0_MINI.vision, depth=1),
    language=dataclasses.replace(PI0_MINI.language, depth=2),
    expert=dataclasses.replace(PI0_MINI.expert, depth=2),
)


def mini(dtype: torch.dtype, folded: bool = False) -> tuple[Pi0Policy, Pi0Policy]:
    """The same weights twice: plain, in float64 but rounded to `dtype`, and with fused layers."""
    policy = weights.build(SHALLOW, "cpu", steps=2)
    weights.init_random(policy, seed=0)
    if folded:
        fold_norms(policy)
    cast(policy, dtype)
    plain = copy.deepcopy(policy)
    plain.expert.double()
    fused.fuse_qkv(policy)
    fused.fuse_gate_up(policy)
    fuse_expert_layers(policy, {"attention": {"block_n": 16}, "down": {"split_k": 2}})
    return plain, policy


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def state_token(segments: bool) -> Visibility:
    """The first token sees what is stored and itself."""
    mask = torch.ones(1, 1, ROWS, STORED + ROWS, dtype=torch.bool)
    mask[:, :, 0, STORED + 1 :] = False
    parts = (Segment(0, 1, STORED + 1), Segment(1, ROWS, None))
    return Visibility(mask, parts if segments else None)


def holes() -> Visibility:
    """A mask of keys in each element of the batch, and no layout."""
    mask = torch.ones(2, 1, ROWS, STORED + ROWS, dtype=torch.bool)
    mask[0, ..., 3:9] = mask[1, ..., 15:STORED] = mask[:, :, 0, STORED + 1 :] = False
    return Visibility(mask, None)


VISIBILITIES: dict[str, Callable[[], Visibility]] = {
    "state token": lambda: state_token(True),
    "state token by mask": lambda: state_token(False),
    "holes": holes,
    "state run once": lambda: ALL,
}


def error(actual: Tensor, expected: Tensor) -> float:
    """Relative L2 error, the larger one of the whole and of a quarter of the worst row's."""
    assert actual.shape == expected.shape
    rows = (actual.double() - expected.double()).flatten(0, -2).norm(dim=-1)
    sizes = expected.double().flatten(0, -2).norm(dim=-1)
    return max(float(rows.norm() / sizes.norm()), float((rows / sizes).max()) / 4)


def tokens(
    policy: Pi0Policy, dtype: torch.dtype, batch: int = 2
) -> tuple[Tensor, Rope, KeysValues]:
    """The input of a layer, its rotary tables, and what is stored, in `dtype`."""
    positions = torch.arange(STORED, STORED + ROWS)[None]
    x = randn(batch, ROWS, SHALLOW.expert.width).to(dtype)
    stored = randn(2, batch, STORED, 1, SHALLOW.expert.head_dim, seed=1).to(dtype)
    return x, rope_at(positions, policy.frequencies, dtype), KeysValues(*stored)


def wide(*tensors: Tensor) -> list[Tensor]:
    return [tensor.double() for tensor in tensors]


@pytest.mark.parametrize(
    ("name", "dtype", "folded"),
    [
        *((name, FULL, False) for name in VISIBILITIES),
        ("state token", HALF, True),
        ("state run once", FULL, True),
        ("holes", HALF, False),
    ],
)
def test_a_layer_is_the_plain_one(name, dtype, folded):
    plain, policy = mini(dtype, folded)
    x, rope, past = tokens(policy, dtype)
    visibility = VISIBILITIES[name]()
    for theirs, mine in zip(gemma_layers(plain.expert), gemma_layers(policy.expert), strict=True):
        assert isinstance(mine, FusedExpertLayer)
        how = Attending(Rope(*wide(*rope)), visibility, eager_attention)
        expected, expected_cache = theirs(x.double(), how, KeysValues(*wide(*past)))
        out, cache = mine(x, how._replace(rope=rope), past)
        assert out.dtype == dtype
        assert error(out, expected) < TOLERANCE[dtype]
        for actual, wanted in zip(cache, expected_cache, strict=True):
            assert error(actual, wanted) < TOLERANCE[dtype]


def test_one_row_as_the_state_token_alone_has_it():
    plain, policy = mini(FULL)
    x, rope, past = tokens(policy, FULL)
    x, rope = x[:, :1], Rope(*(table[:, :1] for table in rope))
    how = Attending(rope, Visibility(None, (Segment(0, 1, None),)), eager_attention)
    expected, _ = gemma_layers(plain.expert.float())[0](x, how, past)
    out, cache = gemma_layers(policy.expert)[0](x, how, past)
    assert error(out, expected) < TOLERANCE[FULL]
    assert cache.keys.shape[1] == STORED + 1


def test_without_anything_stored():
    plain, policy = mini(FULL)
    x, rope, _ = tokens(policy, FULL)
    how = Attending(rope, ALL, eager_attention)
    expected, _ = gemma_layers(plain.expert.float())[0](x, how, None)
    out, cache = gemma_layers(policy.expert)[0](x, how, None)
    assert error(out, expected) < TOLERANCE[FULL]
    assert cache.keys.shape[1] == ROWS


def test_a_buffer_is_read_as_far_as_filled_and_written_by_the_layer_only():
    _, policy = mini(FULL)
    x, rope, past = tokens(policy, FULL)
    layer = gemma_layers(policy.expert)[0]
    how = Attending(rope, ALL, eager_attention)
    expected, joined = layer(x, how, past)
    buffer = with_room(past, ROWS + 2)
    for part in (buffer.keys, buffer.values):
        part[:, STORED:] = torch.nan
    pasts: list[Past] = [buffer] * SHALLOW.expert.depth
    hidden, none = policy.expert(x, how, pasts)
    assert bool(hidden.isfinite().all())
    assert bool(buffer.keys[:, STORED:].isnan().all())
    assert none == []
    out, cache = layer(x, how, buffer)
    assert torch.equal(out, expected)
    for actual, wanted in zip(cache, joined, strict=True):
        assert torch.equal(actual, wanted)
    assert torch.equal(buffer.keys[:, STORED : STORED + ROWS], joined.keys[:, STORED:])


def test_what_is_not_fused_is_refused():
    policy = weights.build(SHALLOW, "cpu", steps=2)
    fused.fuse_qkv(policy)
    with pytest.raises(ValueError, match="fuse_gate_up"):
        fuse_expert_layers(policy)
    fused.fuse_gate_up(policy)
    with pytest.raises(ValueError, match="'up'"):
        fuse_expert_layers(policy, {"up": {}})


KNOBS = {
    "fusion": dict.fromkeys(("qkv", "gate_up", "vision_qkv", "expert_layer"), True),
    # Large blocks: the interpreter takes its time for each, however large it is.
    "attention": {"denoise": "triton", "launch_denoise": {"block_n": 128}},
    "gemm": {"backend": "triton_skinny"},
}
ONCE = {"state_once": True, "last_layer": True}
REST = {"fold_norms": True, "time_mlp": True, "kv_buffer": True, "rope_tables": True}


def configuration(
    dtype: str,
    simplify: dict[str, bool],
    model: str = "pi0_mini",
    layout: str = "exact",
    **knobs: Any,
) -> Config:
    workload: dict[str, Any] = {"active_cameras": [False, True], "prompt_slots": 6}
    workload |= {"prompt_tokens": 4, "layout": layout}
    return Config.parse(
        {
            "model": {"name": model},
            "platform": {"device": "cpu"},
            "workload": {**workload, "horizon": 3, "steps": 2, "batch_size": 1},
            "precision": {"dtype": dtype},
            "simplify": simplify,
            **knobs,
        }
    )


def answers(cfg: Config) -> tuple[Pi0Policy, Callable[[Inputs], Tensor], Inputs]:
    policy = runtime.build_policy(cfg, torch.device("cpu"))
    inputs = make_inputs(runtime.workload_of(cfg), policy.config, 0, "cpu")
    return policy, runtime.apply_knobs(policy, cfg).call, inputs


ALL_OF_IT = {**ONCE, **REST}
MANY = {"gemm": {"backend": "triton_skinny", "max_rows": 2}}
# Precision, simplify, other knobs, whether compiled.
CASES: dict[str, tuple[str, dict[str, bool], dict[str, Any], bool]] = {
    "the rest": ("float32", REST, {}, False),
    "all, compiled": ("float32", ALL_OF_IT, {}, True),
    "all, float16": ("float16", ALL_OF_IT, {}, False),
    "more rows than the kernels are for": ("float32", REST, MANY, False),
}
PI05: dict[str, tuple[str, dict[str, bool], dict[str, Any], bool]] = {
    "compiled": ("float32", REST, {}, True),
    "float16": ("float16", REST, {}, False),
    "many rows": ("float32", REST, MANY, False),
}
LIMITS = {"float32": 1e-5, "float16": 3e-3}


@pytest.fixture
def shallow(monkeypatch, traced):
    """Two layers instead of four, and a compiler that only traces."""
    for family in ("pi0", "pi05"):
        config = dataclasses.replace(SHALLOW, name=f"{family}_mini", family=family)
        monkeypatch.setitem(MODELS, config.name, config)


@pytest.mark.usefixtures("shallow")
@pytest.mark.parametrize(
    ("model", "name"), [*(("pi0_mini", n) for n in CASES), *(("pi05_mini", n) for n in PI05)]
)
def test_a_policy_of_such_layers(model, name):
    """`check` refuses float32 and the CPU; here they tell mistakes from rounding."""
    dtype, simplify, more, compiled = (CASES if model == "pi0_mini" else PI05)[name]
    _, plain, inputs = answers(configuration("float32", {}, model))
    mode = {"mode": "default" if compiled else "off"}
    cfg = configuration(dtype, simplify, model, **{**KNOBS, **more}, compile=mode)
    policy, call, _ = answers(cfg)
    assert isinstance(policy.expert, FusedExpertTower | FusedAdaptiveTower)
    out = call(inputs)
    assert error(out, plain(inputs)) < LIMITS[dtype]
    if compiled:
        assert torch.equal(out, call(inputs))


@pytest.mark.usefixtures("shallow")
def test_such_a_policy_in_a_flexible_layout():
    """Both attention kernels read the lengths; what is masked or padding is never seen."""
    large = {"prefill": "triton", "launch_prefill": {"block_m": 128, "block_n": 128}}
    triton = {**KNOBS, "attention": {**KNOBS["attention"], **large}}
    _, plain, inputs = answers(configuration("float32", {}))
    _, call, _ = answers(configuration("float32", REST, layout="flexible", **triton))
    for tokens in (6, 1):
        mask = torch.arange(6)[None] < tokens
        other = inputs._replace(token_mask=mask)
        expected = plain(other)
        spoilt = other.images.clone()
        spoilt[:, 0] = torch.nan
        assert error(call(other._replace(images=spoilt)), expected) < 1e-5
