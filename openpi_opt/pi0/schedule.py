"""The fixed time schedule of the flow-matching integration, and its sinusoidal features.

Time runs from 1 (noise) to 0 (actions); the network predicts v = noise - action.
"""

import math

import torch
from torch import Tensor

MIN_PERIOD = 0.004
MAX_PERIOD = 4.0


def step_size(steps: int) -> float:
    """dt = -1/steps, rounded to float32 as the reference's tensor is."""
    return torch.tensor(-1.0 / steps, dtype=torch.float32, device="cpu").item()


def times(steps: int) -> Tensor:
    """The times [steps] float32 at which v is evaluated, accumulated in float32 as openpi does."""
    time = torch.tensor(1.0, dtype=torch.float32, device="cpu")
    visited = []
    for _ in range(steps):
        visited.append(time)
        time = time + step_size(steps)
    return torch.stack(visited)


def time_features(steps: int, width: int) -> Tensor:
    """[sin | cos](2 pi t / period) for every time -> [steps, width] float32 on the CPU.

    width/2 periods, geometric from 0.004 to 4; computed in float64, cast once.
    """
    fractions = torch.linspace(0.0, 1.0, width // 2, dtype=torch.float64, device="cpu")
    periods = MIN_PERIOD * (MAX_PERIOD / MIN_PERIOD) ** fractions
    angles = 2.0 * math.pi * times(steps).double().unsqueeze(1) / periods
    return torch.cat((angles.sin(), angles.cos()), dim=1).float()
