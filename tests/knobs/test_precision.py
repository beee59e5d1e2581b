import sys
import types

import pytest
import torch
from machine_samples import CPU, H100, MI300X, T4, config

from openpi_opt import runtime
from openpi_opt.guarding import reference
from openpi_opt.knobs.precision import Precision

KNOB = Precision()
TF32 = {"precision": {"dtype": "float32", "tf32": True}}


def test_tf32_is_unavailable_without_the_instruction():
    refusal = KNOB.check(config(TF32, T4), T4)
    assert refusal is not None
    assert T4.gpus[0].arch in refusal.reason


def test_on_a_cpu_a_note_says_that_tf32_means_nothing():
    assert KNOB.notes(config(TF32))
    assert not KNOB.notes(config(TF32, H100))


def test_only_amd_needs_a_variable():
    assert KNOB.environment(config(TF32, MI300X)) == {"HIPBLASLT_ALLOW_TF32": "1"}
    assert KNOB.environment(config(TF32, H100)) == {}
    assert KNOB.environment(config({}, MI300X)) == {}


@pytest.mark.parametrize(("raw", "precision"), [(TF32, "high"), ({}, "highest")])
def test_configure_sets_both_switches(raw, precision, monkeypatch):
    seen: list[str] = []
    cudnn = types.SimpleNamespace(allow_tf32=None)
    monkeypatch.setattr(torch, "set_float32_matmul_precision", seen.append)
    monkeypatch.setattr(torch.backends, "cudnn", cudnn)
    KNOB.configure(config(raw, H100))
    assert seen == [precision]
    assert cudnn.allow_tf32 is (precision == "high")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_towers_have_the_dtype_that_was_asked_for(dtype):
    cfg = config({"precision": {"dtype": dtype}})
    policy = runtime.build_policy(cfg, torch.device("cpu"))
    KNOB.transform(policy, cfg)
    assert policy.dtype == getattr(torch, dtype)
    assert policy.language.layers[0].mlp.up_proj.weight.dtype == policy.dtype
    assert policy.action_in_proj.weight.dtype == torch.float32


def test_the_guard_measures_the_plain_policy_with_tf32_where_it_decides():
    """In float32 the plain distance is 0 without TF32, and every TF32 candidate would be wrong."""
    assert reference._plain_name(config(TF32, H100)) == "float32+tf32"
    assert reference._plain_name(config(TF32, CPU)) == "float32"
    mixed = {"precision": {"dtype": "bfloat16", "tf32": True}}
    assert reference._plain_name(config(mixed, H100)) == "bfloat16"


def test_the_module_needs_no_torch():
    module = sys.modules[Precision.__module__]
    assert not hasattr(module, "torch")
