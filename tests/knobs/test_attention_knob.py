from typing import Any

import pytest
import torch
from machine_samples import CPU, H100, MI300X, config

from openpi_opt import runtime
from openpi_opt.errors import RefusedError
from openpi_opt.kernels import attention as backends
from openpi_opt.knobs.attention import SDPA_DEVICES, STAGES, Attention
from openpi_opt.machine import Machine

KNOB = Attention()
SMALL = {"steps": 1, "horizon": 2, "active_cameras": [False, True], "prompt_slots": 4}


def of(backend: str, dtype: str = "bfloat16", **stages: str) -> dict[str, Any]:
    chosen = {**dict.fromkeys(STAGES, backend), **stages}
    workload = {**SMALL, "prompt_tokens": 3}
    return {"attention": chosen, "precision": {"dtype": dtype}, "workload": workload}


@pytest.mark.parametrize("backend", SDPA_DEVICES)
@pytest.mark.parametrize("on", [CPU, H100, MI300X], ids=["cpu", "cuda", "rocm"])
def test_a_backend_of_torch_runs_where_torch_has_it(backend: str, on: Machine) -> None:
    cfg = config(of("eager", prefill=backend), on)
    refusal = KNOB.check(cfg, on)
    assert (refusal is None) == (cfg.device in SDPA_DEVICES[backend])
    if refusal:
        assert refusal.outcome == "unavailable"
        assert f"attention={backend}" in refusal.reason


@pytest.mark.parametrize(
    ("backend", "expected"),
    [("flash", "invalid"), ("cudnn", "invalid"), ("efficient", None), ("math", None)],
)
def test_flash_and_cudnn_contradict_float32_on_a_gpu(backend: str, expected: str | None) -> None:
    refusal = KNOB.check(config(of(backend, "float32"), H100), H100)
    assert (refusal and refusal.outcome) == expected


def test_each_stage_gets_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[Any, ...]] = []
    monkeypatch.setattr(backends, "require_sdpa", lambda *arguments: asked.append(arguments))
    cfg = config(of("eager", "float32", vision="math", denoise="flash"))
    policy = runtime.build_policy(cfg, torch.device("cpu"))
    prepared = runtime.apply_knobs(policy, cfg)
    past = (1, 256 + 3 + 1 + 2, 1, 32)
    assert [arguments[:4] for arguments in asked] == [
        ("math", "vision", (1, 256, 4, 24), (1, 256, 4, 24)),
        ("flash", "denoise", (1, 1, 4, 32), past),
        ("flash", "denoise", (1, 2, 4, 32), past),
    ]
    assert prepared.policy.ops.attention_prefill is backends.eager_attention


def test_what_torch_cannot_do_ends_the_trial(monkeypatch: pytest.MonkeyPatch) -> None:
    """As for a head width that a backend does not take: found before anything is measured."""
    monkeypatch.setitem(SDPA_DEVICES, "efficient", ("cpu",))
    cfg = config(of("sdpa", denoise="efficient"))
    policy = runtime.build_policy(cfg, torch.device("cpu"))
    assert KNOB.check(cfg, CPU) is None
    with pytest.raises(RefusedError, match=r"attention\.denoise=efficient") as error:
        runtime.apply_knobs(policy, cfg)
    assert error.value.outcome == "unavailable"


def test_backends_are_told_apart() -> None:
    hashes = {config(of(b), H100).hash() for b in ("sdpa", "flash", "cudnn", "efficient", "math")}
    assert len(hashes) == 5
    assert config(of("flash"), H100).labels()["attention"] == "flash"
