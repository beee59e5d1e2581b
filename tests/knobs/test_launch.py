"""Launch parameters as options: they are the kernels', and what cannot fit is refused."""

from __future__ import annotations

import pytest
from machine_samples import A100, CPU, H100, config

from openpi_opt.kernels import launch as kernels
from openpi_opt.knobs.gemm import Gemm
from openpi_opt.knobs.launch import LINEARS, LinearLaunch
from openpi_opt.surgery import expert

KNOB = Gemm()
FUSED = {
    "model": {"name": "pi0"},
    "fusion": {"qkv": True, "gate_up": True, "expert_layer": True},
    "attention": {"denoise": "triton"},
}


def fused(**launches: dict[str, int]) -> dict:
    return {**FUSED, "gemm": {"backend": "triton_skinny", **launches}}


def test_the_parameters_are_those_that_the_kernel_reads() -> None:
    assert set(LinearLaunch.model_fields) <= set(kernels.LINEAR)
    assert tuple(LINEARS) == expert.LINEARS


@pytest.mark.parametrize("raw", [{}, {"fusion": {"expert_layer": False}}, {"gemm": {}}])
def test_they_count_only_where_the_fused_layer_reads_them(raw: dict) -> None:
    given = fused(launch_out={"block_n": 16})
    read = config({**given, **raw}, H100).canonical().knobs["gemm"].launches()["out"].given()
    assert read == ({"block_n": 16} if raw == {} else {})
    # A norm needs the whole sum in one block: there is nothing to split.
    unsplit = config(fused(launch_qkv={"split_k": 4}), H100)
    assert unsplit.hash() == config(fused(), H100).hash()
    assert config(given, H100).hash() != config(fused(), H100).hash()


@pytest.mark.parametrize(
    ("launch", "words"),
    [
        ({"launch_down": {"block_n": 64, "block_k": 512, "num_stages": 4}}, "shared memory"),
        ({"launch_gate_up": {"block_n": 128, "num_warps": 1}}, "sums a thread"),
        ({"launch_out": {"block_k": 512, "split_k": 8}}, "splits 2048 inputs"),
    ],
)
def test_what_does_not_fit_is_invalid_with_the_reason(launch: dict, words: str) -> None:
    given = fused(**launch)
    if words == "sums a thread":
        given = {**given, "workload": {"horizon": 50}}
    refusal = KNOB.check(config(given, H100), H100)
    assert refusal is not None
    assert refusal.outcome == "invalid"
    assert words in refusal.reason
    assert f"gemm.{next(iter(launch))}" in refusal.reason


def test_the_limit_is_the_gpus() -> None:
    given = fused(launch_down={"block_n": 32, "block_k": 512, "num_stages": 4})
    assert KNOB.check(config(given, H100), H100) is None
    assert KNOB.check(config(given, A100), A100) is not None
    assert config(given, CPU).canonical().labels()["gemm"].count("down.") == 3
