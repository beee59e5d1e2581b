"""Policies that cheat end as `wrong`, in trials of their own."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from attack import ATTACKS

from openpi_opt.config import Config
from openpi_opt.machine import probe

DRIVER = Path(__file__).with_name("attack.py")
RAW: dict[str, Any] = {
    "model": {"name": "pi0_mini"},
    "platform": {"device": "cpu"},
    "workload": {"active_cameras": [True, False], "steps": 3, "horizon": 4, "batch_size": 2},
    "measure": {"warmup": 3, "iterations": 60, "rel_ci": None},
    "profile": {"kernels": False, "energy": False, "roofline": "none"},
}
# More of the call is vision.
SHORT = {"prefix_cache": {"active_cameras": [True, True, True], "steps": 1}}
# What a reason must say; the guard may find the others in more than one way.
SAYS = {
    "content_cache": "all inputs are repeated",
    "prefix_cache": "repeated",
    "worn_ring": "while timed",
    "overwritten": "memory",
    "stale_at_times": "while timed",
    "noise_overwritten": "memory of its inputs",
    "step_skipping": "large logits",
}


# Open: these end `ok` on some machines; what it takes is in docs/guard.md, "What it cannot see".
OPEN = pytest.mark.xfail(reason="not caught on every machine yet", strict=False)


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=OPEN if name in ("prefix_cache", "step_skipping") else ())
        for name in ATTACKS
    ],
)
def test_a_policy_that_cheats_is_wrong(name: str, tmp_path: Path) -> None:
    config, result = tmp_path / "config.json", tmp_path / "result.json"
    raw = {**RAW, "workload": {**RAW["workload"], **SHORT.get(name, {})}}
    config.write_text(json.dumps(Config.parse(raw).resolved(probe()).dump()))
    command = [sys.executable, str(DRIVER), name, "--config", str(config)]
    command += ["--result", str(result), "--references", str(tmp_path / "references")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    document = json.loads(result.read_text())
    assert document["outcome"] == "wrong", document.get("reason")
    assert SAYS.get(name, "") in document["reason"]
    assert "latency" not in document
