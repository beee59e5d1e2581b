"""Mini policies and the workload that has everything to get wrong: a masked camera, padding."""

import copy
from functools import cache

import pytest
import torch

from openpi_opt.pi0.config import MODELS
from openpi_opt.pi0.policy import Pi0Policy
from openpi_opt.pi0.weights import build, init_random
from openpi_opt.pi0.workload import Workload


@cache
def _shared_policy(name: str) -> Pi0Policy:
    policy = build(MODELS[name], "cpu", steps=3)
    init_random(policy, seed=0)
    return policy


@pytest.fixture
def policy():
    """pi0_mini with random weights, float32, three steps, a copy for each test."""
    return copy.deepcopy(_shared_policy("pi0_mini"))


@pytest.fixture(params=["pi0_mini", "pi05_mini"])
def either(request):
    """Both small models, as `policy`; their inputs have the same sizes."""
    return copy.deepcopy(_shared_policy(request.param))


@pytest.fixture
def masked_workload():
    """Third camera masked, 20 of 28 prompt slots valid."""
    return Workload((True, True, False), 28, 20, horizon=10, steps=3, batch_size=1)


@pytest.fixture(autouse=True)
def _no_grad():
    with torch.no_grad():
        yield
