"""Two instances of a real policy on one CPU, and one that cannot start."""

import json

import pytest
from quick import SMALL

from openpi_opt import sweep
from openpi_opt.errors import UserError
from openpi_opt.instances import added

MINI = ["experiment=instances", *SMALL, "guard.inputs=2"]


def test_two_instances_share_a_machine(tmp_path, capsys):
    words = [*MINI, "counts=1,2", "seconds=1", f"out={tmp_path}"]
    assert sweep.main(words) == 0
    one, two = json.loads((tmp_path / "instances.json").read_text())["loads"]
    assert (one["each"], two["each"], one["problem"], two["problem"]) == (1, 2, "", "")
    for load in (one, two):
        assert len(load["calls"]) == load["each"]
        assert min(load["calls"]) > 0
        assert load["hz"] * load["mean_ms"] / 1e3 > 0.9 * load["each"]
        assert 0 < load["p50_ms"] <= load["p99_ms"]
    assert f"| 1 | 2 | {two['hz']:.2f} |" in capsys.readouterr().out
    assert not list((tmp_path / "logs").glob("*.go"))


def test_an_instance_that_fails_is_said_and_ends_the_others(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("OPENPI_OPT_PASS_ENV", "PYTHONPATH")
    (tmp_path / "sitecustomize.py").write_text(
        "import sys\nif '--verify' in sys.argv: sys.exit('CUDA out of memory')\n"
    )
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    assert sweep.main([*MINI, "counts=2,4", "seconds=1", f"out={tmp_path / 'out'}"]) == 1
    assert "CUDA out of memory |" in capsys.readouterr().out
    assert len(json.loads((tmp_path / "out" / "instances.json").read_text())["loads"]) == 1


def test_throughput_adds_and_latencies_are_of_all():
    answers = [
        {"samples_ms": [10.0] * 30, "peak_mib": 5.0},
        {"samples_ms": [20.0] * 10, "peak_mib": 7.0},
    ]
    load = added(answers, 1, 2, 2.0)
    seen = load.hz, load.mean_ms, load.p50_ms, load.p99_ms, load.peak_mib
    assert seen == (150, 12.5, 10, 20, 7)
    assert added([{"samples_ms": [], "peak_mib": None}], 1, 1, 2.0).problem


@pytest.mark.parametrize("word", ["counts=0", "seconds=0", "blas=nothing"])
def test_bad_words_are_refused(word, tmp_path):
    with pytest.raises(UserError):
        sweep.main([*MINI, word, f"out={tmp_path}"])
