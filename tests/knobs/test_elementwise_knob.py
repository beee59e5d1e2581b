from typing import Any

import pytest
import torch
from machine_samples import CPU, H100, MI300X, config, machine

from openpi_opt import runtime
from openpi_opt.errors import RefusedError
from openpi_opt.knobs.elementwise import Elementwise
from openpi_opt.machine import Machine

KNOB = Elementwise()
AITER: dict[str, Any] = {"elementwise": {"backend": "aiter"}}


@pytest.mark.parametrize(
    ("on", "expected"),
    [
        (MI300X, None),
        (machine("gfx942"), "unavailable"),
        (H100, "unavailable"),
        (CPU, "unavailable"),
    ],
)
def test_aiter_needs_amd_and_the_package(on: Machine, expected: str | None) -> None:
    refusal = KNOB.check(config(AITER, on), on)
    assert (refusal and refusal.outcome) == expected


def test_aiter_contradicts_float32() -> None:
    refusal = KNOB.check(config({**AITER, "precision": {"dtype": "float32"}}, MI300X), MI300X)
    assert refusal is not None
    assert refusal.outcome == "invalid"


def test_an_aiter_that_cannot_be_imported_is_unavailable() -> None:
    policy = runtime.build_policy(config({}), torch.device("cpu"))
    with pytest.raises(RefusedError, match="elementwise=aiter: importing AMD's aiter failed"):
        KNOB.transform(policy, config(AITER, MI300X))
