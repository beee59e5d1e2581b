"""The float32 form of a candidate, what is compared apart from it, and the store of verdicts."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from openpi_opt import runtime
from openpi_opt.config import Config
from openpi_opt.errors import RefusedError
from openpi_opt.guarding import question, reference, structure
from openpi_opt.kernels import attention as backends
from openpi_opt.kernels import fp8
from openpi_opt.knobs import BY_NAME
from openpi_opt.pi0 import weights
from openpi_opt.pi0.inputs import Inputs
from openpi_opt.pi0.ops import Segment, Visibility
from openpi_opt.pi0.policy import Pi0Policy
from openpi_opt.result import StructureReport

CPU = torch.device("cpu")
SIMPLIFIED = {"last_layer": True, "fold_norms": True, "time_mlp": True, "state_once": True}
FP8: dict[str, Any] = {"blas": {"backend": "fp8"}}


def config(model: str = "pi0_mini", batch: int = 1, cameras: Any = (True,), **knobs: Any) -> Config:
    workload = {"active_cameras": cameras, "prompt_slots": 6, "prompt_tokens": 4}
    return Config.parse(
        {
            "model": {"name": model},
            "platform": {"device": "cpu"},
            "workload": {**workload, "horizon": 3, "steps": 2, "batch_size": batch},
            "precision": {"dtype": "bfloat16"},
            **knobs,
        }
    )


def ask(cfg: Config, folder: Path) -> question.Question:
    return question.ask(runtime.build_policy(cfg, CPU), cfg, "test", folder)


@pytest.mark.parametrize("model", ["pi0_mini", "pi05_mini"])
@pytest.mark.parametrize(
    "knobs",
    [
        {},
        {"simplify": {**SIMPLIFIED, "kv_buffer": True}, "fusion": {"qkv": True, "gate_up": True}},
        {**FP8, "simplify": SIMPLIFIED},
        {"attention": dict.fromkeys(("vision", "prefill", "denoise"), "flash")},
    ],
    ids=["plain", "simplified", "fp8", "flash"],
)
def test_honest_structures_pass(model: str, knobs: dict[str, Any], tmp_path: Path) -> None:
    asked = ask(config(model, **knobs), tmp_path)
    report = asked.structure()
    assert report.problem is None
    assert report.rel_l2 is not None
    assert report.rel_l2 < 2e-6
    assert report.large_logits_rel_l2 is not None
    assert report.large_logits_rel_l2 < 1e-5
    assert [item.name for item in report.local] == (
        ["fp8 product", "fp8 weight", "fp8 input"] if "blas" in knobs else []
    )
    assert all((item.rel_l2 or 1.0) < item.tolerance for item in report.local)


def test_every_knob_has_a_float32_form() -> None:
    cfg = config(**FP8, graph={"mode": "manual"}, compile={"mode": "default"})
    form = structure.float32_form(cfg)
    assert form.labels()["precision"] == "float32"
    assert form.labels()["compile"] == "off"
    assert form.labels()["graph"] == "none"
    assert form.labels()["blas"] == "fp8"
    aiter = config(attention=dict.fromkeys(("vision", "prefill", "denoise"), "aiter"))
    assert structure.float32_form(aiter).labels()["attention"] == "sdpa"
    assert set(form.knobs) == set(BY_NAME)


def changed(monkeypatch: pytest.MonkeyPatch, change: Callable[[Pi0Policy], None]) -> None:
    honest = runtime.apply_knobs

    def apply(policy: Pi0Policy, cfg: Config) -> runtime.Prepared:
        prepared = honest(policy, cfg)
        change(prepared.policy)
        return prepared

    monkeypatch.setattr(runtime, "apply_knobs", apply)


def test_what_hides_in_bfloat16_is_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An eps of 1e-3, and weights of the expert that are 0.1% too large."""

    def change(policy: Pi0Policy) -> None:
        policy.expert.layers[0].mlp.down_proj.weight.mul_(1.001)

    asked = ask(config(), tmp_path)
    changed(monkeypatch, change)
    report = asked.structure()
    assert not report.passed
    assert "with float32 operands" in str(report.problem)
    own = asked.check(
        runtime.apply_knobs(runtime.build_policy(asked.cfg, CPU), asked.cfg).call, None
    )
    assert own.passed, "else this test shows nothing"


def test_softmax_without_the_maximum_is_seen(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def attend(q: Tensor, k: Tensor, v: Tensor, visibility: Visibility, scale: float) -> Tensor:
        keys, values = (t.transpose(1, 2).expand(-1, q.shape[2], -1, -1) for t in (k, v))
        shares = (q.transpose(1, 2) @ keys.transpose(2, 3) * scale).exp()
        if visibility.mask is not None:
            shares = shares * visibility.mask
        return (shares / shares.sum(-1, keepdim=True) @ values).transpose(1, 2)

    asked = ask(config(), tmp_path)
    changed(monkeypatch, lambda policy: setattr(policy.ops, "attention_denoise", attend))
    report = asked.structure()
    assert report.rel_l2 is not None
    assert report.rel_l2 < report.tolerance, "ordinary logits do not show it"
    assert "large logits" in str(report.problem)


@pytest.mark.parametrize("factor", [1.01, 1.05])
def test_a_wrong_scale_of_fp8_is_seen(
    factor: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the product that the kernel makes, which the float32 form does not use."""
    right = fp8.Fp8Linear.forward
    asked = ask(config(**FP8), tmp_path)
    monkeypatch.setattr(fp8.Fp8Linear, "forward", lambda self, x: factor * right(self, x))
    report = asked.structure()
    assert "fp8 product" in str(report.problem)


def test_kernels_in_16_bits_are_compared_with_their_own_rounding() -> None:
    """A key that is dropped, a mask of -10: not in what flash rounds."""
    generator = torch.Generator().manual_seed(0)
    q = torch.randn(1, 5, 4, 32, generator=generator)
    k, v = (torch.randn(1, 40, 1, 32, generator=generator) for _ in range(2))
    mask = torch.arange(40) < 30
    seen = Visibility(mask[None, None, None], (Segment(0, 5, 30),))
    right = backends.backend("flash", "cpu")

    def dropping(q: Tensor, k: Tensor, v: Tensor, visibility: Visibility, scale: float) -> Tensor:
        return right(q, k, v, Visibility(None, (Segment(0, 5, 29),)), scale)

    for kernel, passes in ((right, True), (dropping, False)):
        judge = structure.Judge(torch.bfloat16, active=True)
        attend = structure.judged_attention("flash", kernel, judge)
        attend(q, k, v, seen, 32**-0.5)
        (found,) = judge.checks()
        assert (found.rel_l2 is not None and found.rel_l2 <= found.tolerance) == passes


def test_a_trials_process_has_no_foreign_code(tmp_path: Path) -> None:
    """Else no verdict would be kept, and each trial would make its own."""
    (tmp_path / "mine.py").write_text("")
    code = (
        "from openpi_opt import measuring\n"
        "from openpi_opt.guarding.structure import foreign_code\n"
        "print(foreign_code())\n"
        "import mine\n"
        "print(foreign_code())\n"
    )
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False", "True"]


def test_a_verdict_is_kept_for_this_very_program(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[Config] = []

    def checked(cfg: Config, *_: Any) -> StructureReport:
        made.append(cfg)
        return StructureReport(passed=True, rel_l2=0.0, tolerance=1e-5, case="")

    monkeypatch.setattr(structure, "_checked", checked)
    asked = ask(config(), tmp_path)
    asked.structure()
    asked.structure()
    assert len(made) == 2, "a test is foreign code, which may have changed anything"
    monkeypatch.setattr(structure, "foreign_code", lambda: False)
    asked.structure()
    asked.structure()
    ask(config(compile={"mode": "default"}), tmp_path).structure()
    assert len(made) == 3
    ask(config(simplify={"last_layer": True}), tmp_path).structure()
    assert len(made) == 4
    monkeypatch.setattr(structure, "program_hash", lambda: "changed")
    asked.structure()
    assert len(made) == 5


def test_plain_float16_that_overflows_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def large(policy: Pi0Policy, seed: int) -> None:
        random(policy, seed)
        policy.projector.bias[3] = 1e5  # type: ignore[index]

    random = weights.init_random
    monkeypatch.setattr(weights, "init_random", large)
    with pytest.raises(RefusedError, match=r"plain eager policy itself.*float16.*bfloat16"):
        ask(config(precision={"dtype": "float16"}), tmp_path)
    ask(config(precision={"dtype": "bfloat16"}), tmp_path)


def test_a_checkpoint_is_known_by_its_content(tmp_path: Path) -> None:
    import os

    file = tmp_path / "model.safetensors"
    file.write_bytes(b"a" * 100)
    os.utime(file, ns=(10**18, 10**18))
    first = reference.content_hash(file, tmp_path)
    assert reference.content_hash(file, tmp_path) == first
    with file.open("r+b") as stream:  # in place: the same inode, size and, below, time
        stream.write(b"b")
    os.utime(file, ns=(10**18, 10**18))
    assert reference.content_hash(file, tmp_path) != first


def test_rows_have_masks_of_their_own_where_no_layout_was_promised(tmp_path: Path) -> None:
    asked = ask(config(batch=3, cameras=(True, False)), tmp_path)
    masks = [case.inputs for case in asked.cases if case.name.startswith("other masks")]
    assert len({tuple(row.tolist()) for row in masks[0].image_mask}) > 1
    for inputs in masks:
        assert len({int(row.sum()) for row in inputs.token_mask}) == 3
        assert bool((inputs.image_mask.any(1) | inputs.token_mask.any(1)).all())
    layout = runtime.workload_of(asked.cfg).layout
    names = [case.name for case in asked.cases if not case.admitted(layout)]
    assert names == ["other masks 0", "other masks 1", "other masks 2"]
    flexible = dataclasses.replace(layout, prompt_tokens=6, flexible=True)
    names = [case.name for case in asked.cases if not case.admitted(flexible)]
    assert names == ["other masks 0"]


def test_recorded_observations_are_asked_as_well(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    cfg = config(batch=2)
    one = ask(cfg, tmp_path).cases[0].inputs
    file = tmp_path / "recorded.safetensors"
    rows = {name: torch.cat((getattr(one, name),) * 2)[:3] for name in Inputs._fields[:-1]}
    save_file(rows, file)
    asked = ask(config(batch=2, guard={"observations": str(file)}), tmp_path)
    assert [case.name for case in asked.cases][-2:] == ["recorded 0", "recorded 1"]
    assert asked.cases[-1].inputs.images.shape[0] == 2
