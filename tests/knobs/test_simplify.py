"""Knob `simplify`: the same function with less work."""

import itertools
from typing import Any

import pytest
import torch
from distances import distance
from mini_policies import (
    CPU,
    MASKED,
    PI05,
    attention_calls,
    config,
    plain_actions,
    plain_policy,
    prepare,
    sample_inputs,
    sizes,
)
from torch import Tensor, nn

from openpi_opt import runtime
from openpi_opt.knobs import BY_NAME
from openpi_opt.knobs.simplify import SimplifyOptions
from openpi_opt.pi0.precision import cast
from openpi_opt.surgery.folded import fold_norms
from openpi_opt.surgery.lean import lean
from openpi_opt.trial import Progress, run

SWITCHES = tuple(SimplifyOptions.model_fields)
ALL = dict.fromkeys(SWITCHES, True)
FUSED = {"qkv": True, "gate_up": True, "vision_qkv": True}
SDPA = dict.fromkeys(("vision", "prefill", "denoise"), "sdpa")
FULL = {"active_cameras": [True], "prompt_slots": 4, "prompt_tokens": 4}
VISION = ({}, {"cameras": "separate"}, {"skip_masked": True})
# Of fusion, vision and attention all pairs, in half of their combinations.
OTHERS = tuple(
    (fusion, vision, attention)
    for vision, of_plain, of_fused in zip(VISION, ({}, SDPA, {}), (SDPA, {}, SDPA), strict=True)
    for fusion, attention in (({}, of_plain), (FUSED, of_fused))
)


@pytest.mark.usefixtures("two_layers")
@pytest.mark.parametrize(
    ("workload", "others"),
    # Each of the others once; what is skipped is masked.
    [({**MASKED, "batch_size": 2}, (0, 3, 4, 5)), (FULL, (1, 2))],
    ids=["masked, padded, batch 2", "full"],
)
@pytest.mark.parametrize("switch", [*SWITCHES, "all"])
def test_same_actions_with_every_other_knob(switch, workload, others):
    simplify = ALL if switch == "all" else {switch: True}
    inputs = sample_inputs(config(workload))
    plain = plain_actions(config(workload), inputs)
    for fusion, vision, attention in (OTHERS[index] for index in others):
        cfg = config(workload, simplify=simplify, fusion=fusion, vision=vision, attention=attention)
        assert distance(prepare(cfg).call(inputs), plain) < 1e-5, (fusion, vision, attention)


@pytest.mark.usefixtures("two_layers")
@pytest.mark.parametrize(
    ("workload", "attention"),
    [({**MASKED, "batch_size": 2}, SDPA), (FULL, {})],
    ids=["masked, padded, batch 2, sdpa", "full, eager"],
)
@pytest.mark.parametrize("switch", [*SWITCHES, "all"])
def test_same_actions_of_pi05(switch, workload, attention):
    simplify = ALL if switch == "all" else {switch: True}
    inputs = sample_inputs(config(workload, **PI05))
    plain = plain_actions(config(workload, **PI05), inputs)
    for others in ({}, {"fusion": FUSED, "vision": {"skip_masked": True}}):
        cfg = config(workload, simplify=simplify, attention=attention, **others, **PI05)
        assert distance(prepare(cfg).call(inputs), plain) < 1e-5, others


def test_the_modulations_of_pi05_are_computed_before_the_cast_and_once():
    cfg = config(precision={"dtype": "bfloat16"}, simplify={"time_mlp": True}, **PI05)
    prepared = prepare(cfg)
    policy, plain = prepared.policy, plain_policy(cfg)
    exact = torch.stack([plain.modulations(features) for features in plain.time_table])
    assert policy.time_table.shape == (2, 2 * 4 + 1, 3 * 96)
    assert distance(policy.time_table, exact) < 1e-6
    cast(plain, torch.bfloat16)
    rounded = torch.stack([plain.modulations(features) for features in plain.time_table])
    assert distance(policy.time_table, rounded) > 1e-4
    for name, module in policy.named_modules():
        if name.startswith("time_mlp") or name.endswith(".dense"):
            module.register_forward_hook(_never)
    inputs = sample_inputs(cfg)
    first = prepared.call(inputs)
    policy.fill_buffers()
    assert torch.equal(prepared.call(inputs), first)


def test_the_gains_of_the_adaptive_norms_are_not_folded():
    cfg = config(simplify={"fold_norms": True}, **PI05)
    folded, plain = prepare(cfg).policy.state_dict(), plain_policy(cfg).state_dict()
    expert = [name for name in plain if "gemma_expert" in name or "action_out" in name]
    assert all(torch.equal(folded[name], plain[name]) for name in expert)
    norm = "paligemma_with_expert.paligemma.model.language_model.layers.0.input_layernorm.weight"
    assert not folded[norm].any()


def test_pi05_has_no_state_token_to_run_once():
    cfg = config(simplify={"state_once": True}, **PI05)
    assert cfg.hash() == config(**PI05).hash()
    assert "pi05_mini has no state token" in BY_NAME["simplify"].notes(cfg)[0]
    assert BY_NAME["simplify"].notes(config(simplify={"state_once": True})) == []
    policy = plain_policy(cfg)
    policy.declare_layout(runtime.workload_of(cfg).layout)
    with pytest.raises(ValueError, match="pi05_mini has no state token"):
        lean(policy, horizon=3, state_once=True)


def test_all_keys_are_seen_by_the_actions_of_pi05():
    """As many keys as valid prefix tokens and actions, and no mask, with any declared layout."""
    for simplify in ({"rope_tables": True}, {"kv_buffer": True}, {}):
        cfg = config(simplify=simplify, attention=SDPA, **PI05)
        seen = attention_calls(prepare(cfg), "denoise", sample_inputs(cfg), sizes)
        assert seen == [(3, 256 + 4 + 3, True, ((0, 3, None),))] * 2 * 4


@pytest.mark.usefixtures("two_layers")
@pytest.mark.parametrize("pair", list(itertools.combinations(SWITCHES, 2)), ids="+".join)
def test_same_actions_of_two_switches(pair):
    cfg = config(simplify=dict.fromkeys(pair, True))
    inputs = sample_inputs(cfg)
    assert distance(prepare(cfg).call(inputs), plain_actions(cfg, inputs)) < 1e-5


def test_the_last_layer_computes_keys_and_values_only():
    cfg = config(simplify={"last_layer": True})
    prepared = prepare(cfg)
    last = prepared.policy.language.layers[-1]
    ran: list[str] = []
    for name, module in last.named_modules():
        module.register_forward_hook(lambda *_, name=name: ran.append(name))
    assert torch.equal(prepared.call(sample_inputs(cfg)), plain_actions(cfg, sample_inputs(cfg)))
    assert ran == ["input_layernorm", "self_attn.k_proj", "self_attn.v_proj", ""]


def test_folded_norms_are_neutral_and_their_gains_not_read(monkeypatch):
    cfg = config(simplify={"fold_norms": True})
    prepared = prepare(cfg)
    policy = prepared.policy
    for name, parameter in policy.named_parameters():
        if "layernorm" in name or "layer_norm" in name or name.endswith("expert.model.norm.weight"):
            neutral = float(name.endswith(".weight") and "vision" in name)
            assert bool((parameter == neutral).all()), name
    gains = []
    for name in ("rms_norm", "layer_norm"):
        plain = getattr(policy.ops, name)
        setattr(policy.ops, name, lambda x, *a, plain=plain: gains.append(a[0]) or plain(x, *a))
    prepared.call(sample_inputs(cfg))
    assert len(gains) == 2 * 4 + 1 + 2 * 4 + 2 * (2 * 4 + 1)
    assert gains == [None] * len(gains)


def test_norms_are_folded_before_the_cast():
    folded = prepare(config(precision={"dtype": "bfloat16"}, simplify={"fold_norms": True})).policy
    plain = plain_policy(config())
    layer = plain.expert.layers[2]
    exact = layer.self_attn.v_proj.weight * (1.0 + layer.input_layernorm.weight)
    assert torch.equal(folded.expert.layers[2].self_attn.v_proj.weight, exact.bfloat16())
    cast(plain, torch.bfloat16)
    with pytest.raises(ValueError, match="folded in float32"):
        fold_norms(plain)


def test_knobs_want_a_plain_float32_policy():
    cfg = config(precision={"dtype": "bfloat16"})
    policy = plain_policy(cfg)
    cast(policy, torch.bfloat16)
    with pytest.raises(ValueError, match="plain float32 policy"):
        runtime.apply_knobs(policy, cfg)


@pytest.mark.usefixtures("two_layers")
def test_numbers_do_not_depend_on_whether_the_reference_was_known(tmp_path):
    raw = config(precision={"dtype": "bfloat16"}, simplify=ALL, fusion=FUSED).dump()
    raw["measure"] = {"warmup": 3, "iterations": 10, "rel_ci": None}
    raw["profile"] = {"kernels": False, "energy": False, "roofline": "none"}
    cfg = type(config()).load(raw)
    results = [run(cfg, CPU, Progress(None), tmp_path, tmp_path) for _ in range(2)]
    assert [result.outcome for result in results] == ["ok", "ok"], results
    computed, known = (result.guard for result in results)  # type: ignore[union-attr]
    assert computed.rel_l2 == known.rel_l2 > 0.0
    assert computed.tolerance == known.tolerance


def test_time_and_action_projections_are_folded():
    cfg = config(simplify={"time_mlp": True})
    prepared = prepare(cfg)
    policy = prepared.policy
    for module in (policy.action_in_proj, policy.action_time_mlp_in):
        module.register_forward_hook(_never)
    prepared.call(sample_inputs(cfg))
    policy.fill_buffers()
    inputs = sample_inputs(cfg)
    assert distance(prepared.call(inputs), plain_actions(cfg, inputs)) < 1e-5


def _never(module: nn.Module, *_: Any) -> None:
    raise AssertionError(f"{module} was called")


@pytest.mark.parametrize("switches", [("state_once",), ("state_once", "kv_buffer")])
def test_with_the_state_among_the_keys_actions_see_all(switches):
    cfg = config(simplify=dict.fromkeys(switches, True))
    prepared = prepare(cfg)
    states: list[int] = []
    prepared.policy.state_proj.register_forward_hook(lambda *_: states.append(1))
    seen = attention_calls(prepared, "denoise", sample_inputs(cfg), sizes)
    valid, horizon, depth = 256 + 4, 3, 4
    once = (1, valid + 1, True, ((0, 1, None),))
    step = (horizon, valid + 1 + horizon, True, ((0, horizon, None),))
    assert seen == [once] * (depth - 1) + [step] * depth * 2
    assert len(states) == 1


def test_a_step_writes_behind_the_prefix_in_place():
    cfg = config({**MASKED, "batch_size": 2}, simplify={"kv_buffer": True})

    def lies(q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> tuple[int, ...]:
        return k.data_ptr(), v.data_ptr(), k.untyped_storage().nbytes()

    addresses = attention_calls(prepare(cfg), "denoise", sample_inputs(cfg), lies)
    assert addresses[:4] == addresses[4:]
    assert len(set(addresses)) == 4
    assert addresses[0][2] == 2 * (260 + 4) * 32 * 4


def test_nothing_is_left_over_from_another_call():
    cfg = config(simplify=ALL)
    prepared = prepare(cfg)
    first, second = sample_inputs(cfg, seed=0), sample_inputs(cfg, seed=1)
    alone = prepare(cfg).call(second)
    prepared.call(first)
    assert torch.equal(prepared.call(second), alone)


@pytest.mark.parametrize("state_once", [False, True])
def test_rotary_tables_are_not_computed_in_a_call(state_once, monkeypatch):
    cfg = config(simplify={"rope_tables": True, "state_once": state_once})
    prepared, inputs = prepare(cfg), sample_inputs(cfg)
    expected = prepared.call(inputs)
    monkeypatch.setattr("openpi_opt.pi0.policy.rope_at", _never)
    assert torch.equal(prepared.call(inputs), expected)


def test_compiled_stages_write_the_buffer_too():
    cfg = config(simplify=ALL)
    prepared, inputs = prepare(cfg), sample_inputs(cfg)
    expected = prepared.call(inputs)
    torch._dynamo.reset()
    for stage in ("prefill", "denoise_step"):
        compiled = torch.compile(
            getattr(prepared.policy, stage), fullgraph=True, dynamic=False, backend="aot_eager"
        )
        setattr(prepared.policy, stage, compiled)
    for _ in range(2):
        assert distance(prepared.call(inputs), expected) < 1e-6
