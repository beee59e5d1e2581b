"""Policies that cheat end as `wrong`, in trials."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from attack import ATTACKS, attacked

from openpi_opt import runtime, trial
from openpi_opt.config import Config
from openpi_opt.machine import probe

DRIVER = Path(__file__).with_name("attack.py")
RAW: dict[str, Any] = {
    "model": {"name": "pi0_mini"},
    "platform": {"device": "cpu"},
    "workload": {
        "active_cameras": [True, True],
        "prompt_slots": 6,
        "prompt_tokens": 6,
        "steps": 3,
        "horizon": 4,
        "batch_size": 2,
    },
    "measure": {"warmup": 3, "iterations": 40, "rel_ci": None},
    "profile": {"kernels": False, "energy": False, "roofline": "none"},
}
# What a reason must say; the guard may find the others in more than one way.
SAYS = {
    "content_cache": "all inputs are repeated",
    "prefix_cache": "repeated",
    "worn_ring": "while timed",
    "overwritten": "memory",
    "stale_at_times": "while timed",
    "stale_prefix_at_times": "while timed",
    "step_skipping": "large logits",
    "kept_when_seen_twice": "repeated",
    "images_overwritten": "changes its inputs (images)",
}
IN_A_PROCESS = ("prefix_cache", "step_skipping")


@pytest.fixture(scope="module")
def references(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("references")


@pytest.mark.parametrize("name", ATTACKS)
def test_a_policy_that_cheats_is_wrong(
    name: str, references: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cfg = Config.parse(RAW).resolved(probe())
    result = tmp_path / "result.json"
    if name in IN_A_PROCESS:
        config = tmp_path / "config.json"
        config.write_text(json.dumps(cfg.dump()))
        command = [sys.executable, str(DRIVER), name, "--config", str(config)]
        command += ["--result", str(result), "--references", str(references)]
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        document = json.loads(result.read_text())
    else:
        monkeypatch.setattr(runtime, "apply_knobs", attacked(ATTACKS[name]))
        found = trial.run(cfg, probe(), trial.Progress(None), references, tmp_path)
        document = found.model_dump()
    assert document["outcome"] == "wrong", document.get("reason")
    assert SAYS.get(name, "") in document["reason"]
    assert "latency" not in document
