"""Policies that cheat end as `wrong`, in trials: some of each kind of `benchmarks.attacks`."""

import pytest

from benchmarks.attacks import ATTACKS, attacked, config
from benchmarks.attacks import trial as trial_in_a_process
from openpi_opt import runtime, trial
from openpi_opt.machine import probe

# What a reason must say; the guard may find the others in more than one way.
SAYS = {
    "answers by content": "all inputs are repeated",
    "answers by rounded pixels": "",
    "vision by content": "repeated",
    "vision by half the width": "",
    "ring of 2 buffers": "overwritten by a later call",
    "zeros after 30 calls": "while timed",
    "every 29th is the one before": "while timed",
    "every 25th prefix is the one before": "while timed",
    "the noise is the result": "",
    "the frames are scaled": "changes its inputs (images)",
    "vision by address, after 60 calls": "",
    "masks of row 0": "",
    "first masks after 21 calls, 70 at most, flexible": "while timed: a timed call with new",
    "frames within 0.02": "",
    "velocity within 0.02": "large logits",
    "small moves end it": "",
    "actions within 10": "",
    "flat patches are zeros": "",
}
IN_A_PROCESS = (
    "vision by content",
    "velocity within 0.02",
    "first masks after 21 calls, 70 at most, flexible",
)


@pytest.fixture(scope="module")
def references(tmp_path_factory):
    return tmp_path_factory.mktemp("references")


@pytest.mark.parametrize("name", SAYS)
def test_a_policy_that_cheats_is_wrong(name, references, tmp_path, monkeypatch):
    if name in IN_A_PROCESS:
        document = trial_in_a_process(name, tmp_path, references)
    else:
        monkeypatch.setattr(runtime, "apply_knobs", attacked(ATTACKS[name]))
        found = trial.run(config(name), probe(), trial.Progress(None), references, tmp_path)
        document = found.model_dump()
    assert document["outcome"] == "wrong", document.get("reason")
    assert SAYS[name] in document["reason"]
    assert "latency" not in document
