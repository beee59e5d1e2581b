import sys
import types

import pytest
import torch
from machine_samples import CPU, H100, MI300X, config

from openpi_opt.guarding import reference
from openpi_opt.knobs.precision import Precision

KNOB = Precision()
TF32 = {"precision": {"dtype": "float32", "tf32": True}}


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


def test_the_guard_measures_the_plain_policy_with_tf32_where_it_decides():
    """In float32 the plain distance is 0 without TF32, and every TF32 candidate would be wrong."""
    assert reference._plain_name(config(TF32, H100)) == "float32+tf32"
    assert reference._plain_name(config(TF32, CPU)) == "float32"
    mixed = {"precision": {"dtype": "bfloat16", "tf32": True}}
    assert reference._plain_name(config(mixed, H100)) == "bfloat16"


def test_the_module_needs_no_torch():
    module = sys.modules[Precision.__module__]
    assert not hasattr(module, "torch")
