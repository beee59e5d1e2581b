import math
from pathlib import Path

import pytest
import torch
from torch import Tensor

from openpi_opt import runtime
from openpi_opt.config import Config, Guard
from openpi_opt.guarding import reference as references
from openpi_opt.guarding.cases import Case
from openpi_opt.measure import guard
from openpi_opt.pi0.inputs import Inputs
from openpi_opt.pi0.policy import Pi0Policy
from openpi_opt.pi0.workload import make_inputs

CPU = torch.device("cpu")


def config(precision: str = "bfloat16", **workload: object) -> Config:
    raw = {"horizon": 4, "steps": 3, **workload}
    return Config.parse(
        {
            "model": {"name": "pi0_mini"},
            "platform": {"device": "cpu"},
            "precision": {"dtype": precision},
            "workload": raw,
        }
    )


def setup(cfg: Config) -> tuple[Pi0Policy, list[Inputs]]:
    policy = runtime.build_policy(cfg, CPU)
    workload = runtime.workload_of(cfg)
    return policy, [make_inputs(workload, policy.config, seed, CPU) for seed in range(3)]


def obtained(policy: Pi0Policy, inputs: list[Inputs], cfg: Config, folder: Path) -> guard.Reference:
    cases = [Case(f"ordinary {i}", item, True) for i, item in enumerate(inputs)]
    return references.obtain(policy, cases, inputs[:1], cfg, "test", folder)


def test_distances_are_those_of_the_definition():
    reference = torch.tensor([[[3.0, 4.0]], [[1.0, 0.0]]], dtype=torch.float32)
    actual = reference + torch.tensor([[[0.0, 0.5]], [[0.0, 1.0]]])
    found = guard.distance(actual, reference)
    assert found.rel_l2 == pytest.approx(1.0)  # the worse of the two robots, not their mean
    assert found.max_abs == pytest.approx(1.0)
    assert found.cosine == pytest.approx(math.sqrt(0.5))


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_what_is_not_finite_has_no_distance(bad):
    reference = torch.ones(1, 2, 3)
    assert guard.distance(reference * bad, reference).rel_l2 is None
    assert guard.distance(torch.ones(1, 2, 4), reference).rel_l2 is None


@pytest.mark.parametrize(
    ("plain", "expected"), [(0.0, 1e-5), (0.004, 0.008), (0.2, 0.05), (1e-6, 1e-5)]
)
def test_tolerance_follows_the_plain_distance_between_floor_and_cap(plain, expected):
    assert guard.tolerance(Guard(), plain) == pytest.approx(expected)


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_the_plain_policy_passes_and_stale_or_broken_ones_do_not(tmp_path, precision):
    cfg = config(precision)
    policy, inputs = setup(cfg)
    reference = obtained(policy, inputs, cfg, tmp_path)
    first: list[Tensor] = []

    def stale(item: Inputs) -> Tensor:
        first.append(policy.sample_actions(item))
        return first[0]

    calls = {
        "plain": policy.sample_actions,
        "stale": stale,
        "nan": lambda item: policy.sample_actions(item) * math.nan,
        "zeros": lambda item: torch.zeros_like(item.noise),
        "noise": lambda item: item.noise,
    }
    passed = {
        name: guard.check(call, inputs, reference, cfg.guard).passed for name, call in calls.items()
    }
    assert passed == {"plain": True, "stale": False, "nan": False, "zeros": False, "noise": False}


def test_a_call_that_remembers_the_one_before_is_caught(tmp_path):
    """The first input comes again at the end: right answers in a row are not enough."""
    cfg = config("float32")
    policy, inputs = setup(cfg)
    reference = obtained(policy, inputs, cfg, tmp_path)
    count = 0

    def wears_out(item: Inputs) -> Tensor:
        nonlocal count
        count += 1
        return policy.sample_actions(item) * (1.0 if count <= len(inputs) else 1.01)

    assert not guard.check(wears_out, inputs, reference, cfg.guard).passed


def test_a_result_that_a_later_call_overwrites_is_caught(tmp_path):
    cfg = config("float32")
    policy, inputs = setup(cfg)
    reference = obtained(policy, inputs, cfg, tmp_path)
    with torch.no_grad():
        answers = [policy.sample_actions(item) for item in [*inputs, inputs[0]]]
    shared, numbers = answers[1].clone(), iter(range(4))

    def careless(given: Inputs) -> Tensor:
        number = next(numbers)
        return shared.copy_(answers[number]) if number % 2 else answers[number]

    report = guard.check(careless, inputs, reference, cfg.guard)
    assert not report.passed
    assert "overwritten" in guard.explain(report)


def test_reference_is_computed_once_and_for_every_precision(tmp_path, monkeypatch):
    computed: list[torch.dtype] = []
    original = references.plain_actions

    def counting(policy: Pi0Policy, inputs: list[Inputs], tf32: bool) -> list[Tensor]:
        computed.append(policy.dtype)
        return original(policy, inputs, tf32)

    monkeypatch.setattr(references, "plain_actions", counting)
    for precision in ("bfloat16", "float32", "bfloat16"):
        cfg = config(precision)
        policy, inputs = setup(cfg)
        found = obtained(policy, inputs, cfg, tmp_path)
        assert (found.plain_rel_l2 == 0) == (precision == "float32")
    assert computed == [torch.float32, torch.bfloat16]
    other = config("bfloat16", horizon=5)
    policy, inputs = setup(other)
    obtained(policy, inputs, other, tmp_path)
    assert len(computed) == 4, "another workload needs another reference"
