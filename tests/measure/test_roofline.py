"""Bytes, operations and floors: against figures worked out by hand, and torch's own count."""

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.flop_counter import FlopCounterMode

from openpi_opt import runtime
from openpi_opt.config import Config
from openpi_opt.measure.ceilings import datasheet
from openpi_opt.measure.roofline import memory_bytes, roofline, stage_work
from openpi_opt.pi0.workload import make_inputs
from openpi_opt.result import Ceilings

THREE = {"active_cameras": [True, True, True]}
STAGES = ("vision", "prefill", "denoise")


def config(model: str = "pi0", device: str = "cuda", **raw: Any) -> Config:
    return Config.parse({"model": {"name": model}, "platform": {"device": device}, **raw})


def limits(cache_mib: float = 50, **tflops: float) -> Ceilings:
    return Ceilings(
        source="measured",
        device="an H100",
        bandwidth_gb_s=3000,
        tflops={"bfloat16": 712, "float32": 50, **tflops},
        cache_mib=cache_mib,
    )


def operations(cfg: Config) -> dict[str, float]:
    return {name: sum(work.operations.values()) for name, work in stage_work(cfg).items()}


def test_the_full_model_by_hand():
    """Three cameras, 20 prompt tokens: 788 prefix tokens, and 11 + 788 keys in each step."""
    work = stage_work(config(workload=THREE))
    rows = 3 * 256
    layer = 4 * 1152**2 + 2 * 1152 * 4304
    linear = 2 * rows * (27 * layer + 1152 * 2048)
    attention = 27 * 4 * 3 * 256**2 * 1152
    assert work["vision"].operations == {
        "float32": 2 * rows * 3 * 14**2 * 1152,
        "bfloat16": linear + attention,
    }
    assert work["vision"].weights == 2 * (27 * layer + 1152 * 2048) + 4 * 3 * 14**2 * 1152
    assert work["vision"].fresh == 3 * 3 * 224 * 224 * 4
    layer = 2048 * (2048 + 256 + 256 + 2048 + 3 * 16384)
    assert work["prefill"].operations == {
        "bfloat16": 18 * (2 * 788 * layer + 4 * 788**2 * 2048),
        "float32": 2 * 32 * 1024,  # the state
    }
    assert work["prefill"].weights == 2 * 18 * layer + 4 * 32 * 1024
    layer = 1024 * (2048 + 256 + 256 + 2048 + 3 * 4096)
    outer = 2 * 32 * 1024 + 3 * 1024**2
    assert work["denoise"].passes == 10
    assert work["denoise"].weights == 2 * 18 * layer + 4 * outer
    assert work["denoise"].past == 788 * 18 * 2 * 256 * 2
    assert work["denoise"].operations == {
        "bfloat16": 18 * (2 * 11 * layer + 4 * (10 * 799 + 789) * 2048),
        "float32": 2 * 10 * outer,
    }


def test_pi05_by_hand():
    """No state token; the time goes into 37 norms of 3 x 1024 values, in float32, once a step."""
    plain, pi0 = stage_work(config("pi05", workload=THREE)), stage_work(config(workload=THREE))
    assert plain["vision"] == pi0["vision"]
    state = 4 * 32 * 1024
    assert plain["prefill"].weights == pi0["prefill"].weights - state
    layer = 1024 * (2048 + 256 + 256 + 2048 + 3 * 4096)
    norms, condition = 37 * 3 * 1024**2, 2 * 1024**2
    tower = {"bfloat16": 18 * (2 * 10 * layer + 4 * 10 * 798 * 2048)}
    assert plain["denoise"].operations == {
        **tower,
        "float32": 2 * (10 * 2 * 32 * 1024 + norms + condition),
    }
    outer = 2 * 32 * 1024
    assert plain["denoise"].weights == 2 * 18 * layer + 4 * (outer + norms + condition)
    assert plain["denoise"].past == 788 * 18 * 2 * 256 * 2
    folded = {"time_mlp": True, "state_once": True}
    work = stage_work(config("pi05", workload=THREE, simplify=folded))
    assert work["prefill"] == plain["prefill"]
    assert work["denoise"].operations == {**tower, "float32": 2 * 10 * outer}
    assert work["denoise"].weights == 2 * 18 * layer + 4 * outer


def test_published_totals_of_the_full_model():
    """219 GFLOP per image, prefill 2.15 and 3.21 TFLOP at 532 and 788 tokens, 623 MB an expert."""
    three = operations(config(workload=THREE))
    assert three["vision"] == pytest.approx(3 * 219e9, rel=0.01)
    assert three["prefill"] == pytest.approx(3.21e12, rel=0.005)
    skipped = operations(
        config(vision={"skip_masked": True}, workload={"active_cameras": [True, True, False]})
    )
    assert skipped["prefill"] == pytest.approx(2.15e12, rel=0.005)
    assert skipped["vision"] == pytest.approx(2 * 219e9, rel=0.01)
    expert = stage_work(config(simplify={"time_mlp": True}))["denoise"].weights
    assert expert == pytest.approx(623e6, rel=0.01)


def test_floor_of_the_full_model_on_measured_ceilings():
    """(0.66 + 3.21) TFLOP at 712 TFLOP/s and ten times the expert's 650 MB at 3 TB/s."""
    stage_ms = {"vision": 2.0, "prefill": 6.0, "denoise": 6.0}
    found, notes = roofline(config(workload=THREE), limits(), 16.0, stage_ms)
    assert notes == []
    bounds = {name: stage.bound for name, stage in found.stages.items()}
    assert bounds == {"vision": "compute", "prefill": "compute", "denoise": "memory"}
    prefill = 18 * (2 * 788 * 2048 * (4608 + 3 * 16384) + 4 * 788**2 * 2048) / 712e12 * 1e3
    assert found.stages["prefill"].floor_ms == pytest.approx(prefill)
    denoise = 10 * (635_699_200 + 14_524_416) / 3e12 * 1e3
    assert found.stages["denoise"].floor_ms == pytest.approx(denoise)
    assert found.stages["denoise"].fraction == pytest.approx(denoise / 6.0)
    assert found.floor_ms == pytest.approx(sum(s.floor_ms or 0 for s in found.stages.values()))
    assert found.fraction == pytest.approx((found.floor_ms or 0) / 16.0)


def test_fp8_halves_weights_and_leaves_attention_in_16_bits():
    plain, fp8 = (stage_work(config(blas={"backend": b}))["prefill"] for b in ("torch", "fp8"))
    state = 4 * 32 * 1024  # float32 in both
    assert fp8.weights - state == (plain.weights - state) / 2
    assert fp8.operations["fp8"] + fp8.operations["bfloat16"] == plain.operations["bfloat16"]
    only = stage_work(config(blas={"backend": "fp8", "fp8": {"stages": ["denoise"]}}))
    assert "fp8" not in only["prefill"].operations
    assert "fp8" in only["denoise"].operations


def test_float32_and_tf32_are_told_apart_only_where_there_is_tf32():
    precision = {"dtype": "float32", "tf32": True}
    assert set(stage_work(config(precision=precision))["vision"].operations) == {"tf32"}
    on_cpu = stage_work(config(device="cpu", precision=precision))["vision"]
    assert set(on_cpu.operations) == {"float32"}
    assert on_cpu.weights == stage_work(config(precision=precision))["vision"].weights


def test_compiling_leaves_the_unread_layer_out_as_the_switch_does():
    cut = operations(config(simplify={"last_layer": True}))["prefill"]
    assert operations(config(compile={"mode": "default"}))["prefill"] == cut
    assert cut < operations(config())["prefill"]


def test_what_fits_in_the_cache_is_read_once_or_not_at_all():
    work = stage_work(config())
    one = work["denoise"].weights + work["denoise"].past
    streamed = memory_bytes(work, 50 * 2**20)
    assert streamed["denoise"] == 10 * one
    assert memory_bytes(work, one)["denoise"] == one
    everything = sum(stage.weights + stage.past for stage in work.values())
    kept = memory_bytes(work, everything)
    assert kept == {name: stage.fresh for name, stage in work.items()}


def test_nothing_is_made_up_without_ceilings():
    found, notes = roofline(config(), None, 16.0, {"vision": 1.0})
    assert (found.floor_ms, found.fraction, notes) == (None, None, [])
    assert all(s.floor_ms is None and s.fraction is None for s in found.stages.values())
    found, notes = roofline(config(blas={"backend": "fp8"}), limits(), 16.0)
    assert found.floor_ms is None
    assert "no ceiling for fp8" in notes[0]
    assert datasheet("NVIDIA GeForce RTX 9999") is None


def test_faster_than_the_floor_is_said():
    _, notes = roofline(config(), limits(), 1.0)
    assert "Faster than its floor: the call" in notes[0]


@given(
    batch=st.integers(1, 64),
    cameras=st.lists(st.booleans(), min_size=1, max_size=3).filter(any),
    horizon=st.integers(1, 50),
    steps=st.integers(1, 20),
    slots=st.integers(20, 60),
)
def test_less_work_never_has_a_higher_floor(batch, cameras, horizon, steps, slots):
    workload = {
        "batch_size": batch,
        "active_cameras": cameras,
        "horizon": horizon,
        "steps": steps,
        "prompt_slots": slots,
        "prompt_tokens": 20,
    }

    def floor(**raw: Any) -> float:
        found, _ = roofline(config(workload={**workload, **raw.pop("w", {})}, **raw), limits(), 1)
        assert found.floor_ms is not None
        return found.floor_ms

    plain = floor()
    assert floor(simplify={"last_layer": True}) < plain
    assert floor(simplify={"time_mlp": True}) <= plain
    assert floor(vision={"skip_masked": True}) <= plain
    assert floor(w={"steps": steps + 1}) > plain
    assert floor(w={"batch_size": batch + 1}) > plain


SIMPLER = {"last_layer": True, "state_once": True, "time_mlp": True}


@pytest.mark.parametrize(
    "raw",
    [
        {},
        {"simplify": {"last_layer": True}},
        {"simplify": {"state_once": True}},
        {"simplify": {"time_mlp": True}},
        {"workload": {"active_cameras": [True, False], "prompt_slots": 24}},
        {
            "workload": {"active_cameras": [True, False], "prompt_slots": 24},
            "vision": {"skip_masked": True},
            "simplify": SIMPLER,
        },
        {"model": {"name": "pi05_mini"}, "simplify": {"time_mlp": True}},
    ],
)
def test_operations_are_those_that_torch_counts(raw):
    """The real policy under torch's counter: linear layers and convolution to the operation.

    Eager attention also multiplies what the masks hide, which is no work of a floor.
    """
    workload = {
        "active_cameras": [True],
        "horizon": 4,
        "steps": 2,
        "batch_size": 2,
        **raw.get("workload", {}),
    }
    raw = {"model": {"name": "pi0_mini"}, **raw}
    cfg = Config.parse(
        {
            "platform": {"device": "cpu"},
            **raw,
            "workload": workload,
            "precision": {"dtype": "float32"},
        }
    )
    prepared = runtime.apply_knobs(runtime.build_policy(cfg, torch.device("cpu")), cfg)
    inputs = make_inputs(runtime.workload_of(cfg), prepared.policy.config, 0, "cpu")
    counter = FlopCounterMode(display=False)
    with counter:
        prepared.call(inputs)
    counts = {str(op): n for op, n in counter.get_flop_counts()["Global"].items()}
    attention = counts.pop("aten.bmm") + counts.pop("aten.baddbmm", 0)
    ours = sum(sum(w.operations.values()) * w.passes for w in stage_work(cfg).values())
    own_attention = ours - sum(counts.values())
    # Eager attention of the state over the actions it may not see: H more keys in each step.
    own = prepared.policy.config.state_tokens and "state_once" not in raw.get("simplify", {})
    hidden = 2 * 2 * 4 * 4 * 4 * (4 * 32) if own else 0
    if all(workload["active_cameras"]) or "vision" in raw:
        assert attention == own_attention + hidden
    else:
        assert own_attention + hidden < attention < 2 * own_attention


@pytest.mark.parametrize("model", ["pi0_mini", "pi05_mini"])
def test_weights_are_those_of_the_policy(model):
    """In bytes as cast, without biases and gains: every matrix of the three stages."""
    cfg = config(model, "cpu")
    prepared = runtime.apply_knobs(runtime.build_policy(cfg, torch.device("cpu")), cfg)
    held = {
        name: p.numel() * p.element_size()
        for name, p in prepared.policy.named_parameters()
        if p.dim() > 1 and not name.endswith("lm_head.weight") and "position_embedding" not in name
    }
    assert sum(work.weights for work in stage_work(cfg).values()) == sum(held.values())
