from typing import Any

import pytest
import torch
from machine_samples import CPU, config

from openpi_opt import runtime
from openpi_opt.errors import RefusedError
from openpi_opt.kernels import attention as backends
from openpi_opt.knobs.attention import SDPA_DEVICES, STAGES, Attention

KNOB = Attention()
SMALL = {"steps": 1, "horizon": 2, "active_cameras": [False, True], "prompt_slots": 4}


def of(backend: str, dtype: str = "bfloat16", **stages: str) -> dict[str, Any]:
    chosen = {**dict.fromkeys(STAGES, backend), **stages}
    workload = {**SMALL, "prompt_tokens": 3}
    return {"attention": chosen, "precision": {"dtype": dtype}, "workload": workload}


def test_each_stage_gets_its_own(monkeypatch):
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


def test_what_torch_cannot_do_ends_the_trial(monkeypatch):
    """As for a head width that a backend does not take: found before anything is measured."""
    monkeypatch.setitem(SDPA_DEVICES, "efficient", ("cpu",))
    cfg = config(of("sdpa", denoise="efficient"))
    policy = runtime.build_policy(cfg, torch.device("cpu"))
    assert KNOB.check(cfg, CPU) is None
    with pytest.raises(RefusedError, match=r"attention\.denoise=efficient") as error:
        runtime.apply_knobs(policy, cfg)
    assert error.value.outcome == "unavailable"
