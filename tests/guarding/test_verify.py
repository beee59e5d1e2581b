"""`load_policy` asks the guard before it hands a policy out, and remembers that it passed."""

from pathlib import Path
from typing import Any

import pytest
from quick import SMALL

import openpi_opt
from openpi_opt import runtime
from openpi_opt.config import Config
from openpi_opt.errors import UserError
from openpi_opt.guarding import question
from openpi_opt.pi0.policy import Pi0Policy


def load(store: Path, *more: str, **arguments: Any) -> openpi_opt.ReadyPolicy:
    return openpi_opt.load_policy(
        overrides=[*SMALL, "guard.inputs=2", *more], store=store, **arguments
    )


def test_what_passed_is_not_asked_again(tmp_path, monkeypatch):
    load(tmp_path, "attention=sdpa")
    asked: list[Config] = []
    ask = question.ask

    def counted(policy: Pi0Policy, cfg: Config, *rest: Any) -> question.Question:
        asked.append(cfg)
        return ask(policy, cfg, *rest)

    monkeypatch.setattr(question, "ask", counted)
    load(tmp_path, "attention=sdpa")
    assert asked == []
    load(tmp_path, "attention=sdpa", "workload.batch_size=2")
    assert len(asked) == 1, "another workload is another combination"


def test_a_wrong_policy_is_not_handed_out(tmp_path, monkeypatch):
    honest = runtime.apply_knobs

    def wrong(policy: Pi0Policy, cfg: Config) -> runtime.Prepared:
        policy.language.layers[0].self_attn.scale *= 1.01
        return honest(policy, cfg)

    monkeypatch.setattr(runtime, "apply_knobs", wrong)
    for _ in range(2):
        with pytest.raises(UserError, match=r"wrong structure.*\n.*not handed out"):
            load(tmp_path)
    assert load(tmp_path, verify=False).config.lossy() is False
