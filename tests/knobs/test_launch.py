"""Launch parameters as options: they are the kernels', and what cannot fit is refused."""

import ast
from dataclasses import replace
from pathlib import Path

import pytest
from machine_samples import A100, CPU, H100, config

from openpi_opt.kernels import launch as kernels
from openpi_opt.knobs.attention import Attention
from openpi_opt.knobs.gemm import Gemm
from openpi_opt.knobs.launch import LINEARS, AttentionLaunch, LinearLaunch
from openpi_opt.result import Ok
from openpi_opt.surgery import expert
from openpi_opt.track.journal import Record

KNOB = Gemm()
FUSED = {
    "model": {"name": "pi0"},
    "fusion": {"qkv": True, "gate_up": True, "expert_layer": True},
    "attention": {"denoise": "triton"},
}


def fused(**launches: dict[str, int]) -> dict:
    return {**FUSED, "gemm": {"backend": "triton_skinny", **launches}}


def test_the_parameters_are_those_that_the_kernel_reads():
    assert set(LinearLaunch.model_fields) <= set(kernels.LINEAR)
    assert set(AttentionLaunch.model_fields) <= {*kernels.DECODE, *kernels.FLASH}
    assert tuple(LINEARS) == expert.LINEARS


@pytest.mark.parametrize("raw", [{}, {"fusion": {"expert_layer": False}}, {"gemm": {}}])
def test_they_count_only_where_the_fused_layer_reads_them(raw):
    given = fused(launch_out={"block_n": 16})
    read = config({**given, **raw}, H100).canonical().knobs["gemm"].launches()["out"].given()
    assert read == ({"block_n": 16} if raw == {} else {})
    # A norm needs the whole sum in one block: there is nothing to split.
    unsplit = config(fused(launch_qkv={"split_k": 4}), H100)
    assert unsplit.hash() == config(fused(), H100).hash()
    assert config(given, H100).hash() != config(fused(), H100).hash()


def test_the_guard_s_float32_form_leaves_them_to_the_kernels():
    """Its tiles take twice the memory, and its structure is the same for all of them."""
    given = fused(launch_down={"block_n": 32, "block_k": 512, "num_stages": 5})
    assert KNOB.float32_form(config(given, H100)) == KNOB.float32_form(config(fused(), H100))


@pytest.mark.parametrize(
    ("launch", "words"),
    [
        ({"launch_down": {"block_n": 64, "block_k": 512, "num_stages": 4}}, "shared memory"),
        ({"launch_gate_up": {"block_n": 128, "num_warps": 1}}, "sums a thread"),
        ({"launch_out": {"block_k": 512, "split_k": 8}}, "splits 2048 inputs"),
    ],
)
def test_what_does_not_fit_is_invalid_with_the_reason(launch, words):
    given = fused(**launch)
    if words == "sums a thread":
        given = {**given, "workload": {"horizon": 50}}
    refusal = KNOB.check(config(given, H100), H100)
    assert refusal is not None
    assert refusal.outcome == "invalid"
    assert words in refusal.reason
    assert f"gemm.{next(iter(launch))}" in refusal.reason


def test_the_limit_is_the_gpus():
    given = fused(launch_down={"block_n": 32, "block_k": 512, "num_stages": 5})
    assert KNOB.check(config(given, H100), H100) is None
    assert KNOB.check(config(given, A100), A100) is not None
    assert config(given, CPU).canonical().labels()["gemm"].count("down.") == 3


@pytest.mark.parametrize(
    ("stage", "launch", "fits"),
    [
        ("prefill", {"block_m": 64, "block_n": 64, "num_stages": 3}, True),
        ("prefill", {"block_m": 64, "block_n": 128, "num_stages": 2}, False),
        ("vision", {"block_m": 128, "block_n": 128, "num_stages": 3, "num_warps": 8}, True),
        ("denoise", {"block_n": 128, "blocks": 2, "num_stages": 2}, True),
        ("denoise", {"block_n": 128, "blocks": 2, "num_stages": 3}, False),
        ("denoise", {"block_n": 128, "blocks": 1, "num_stages": 3}, True),
    ],
)
def test_shared_memory_of_the_attention_is_what_the_compiler_takes(stage, launch, fits):
    """Compiled for an H100, and by the formula of the option."""
    offline = pytest.importorskip("openpi_opt.kernels.offline")
    from openpi_opt.kernels import attention, shipped
    from openpi_opt.pi0.gemma import Rope

    empty, arch = shipped.empty, offline.ARCHS["sm90"]
    if stage == "denoise":
        from openpi_opt.kernels.triton_decode import cached_attention

        past, new = empty(1, 788, 1, 256), empty(1, 11, 1, 256)
        rope = Rope(empty(1, 11, 128), empty(1, 11, 128))
        arguments = (empty(1, 11, 8, 256), (past, past), (new, new), rope)
        call = cached_attention(launch)
        visible = shipped.STATE
    else:
        q = empty(3, 256, 16, 72) if stage == "vision" else empty(1, 788, 8, 256)
        k = q if stage == "vision" else empty(1, 788, 1, 256)
        arguments, visible = (q, k, k), shipped.SEE_ALL
        call = attention.backend("triton", "cuda", stage, launch)
    kernel = offline.variants(lambda: call(*arguments, visible, 0.1), arch, shipped.MODULES)[0]
    assert offline.resources(kernel.compile(arch), arch).fits is fits
    given = {"attention": {stage: "triton", f"launch_{stage}": launch}}
    refusal = Attention().check(config(given, H100), H100)
    assert (refusal is None) is fits
    assert fits or "shared memory" in str(refusal)


def test_what_a_study_found_gets_into_the_table(tmp_path):
    """The entry is put over what was left to the table or the rule, and replaces its like."""
    pytest.importorskip("triton")
    from openpi_opt.kernels import triton_decode, triton_skinny_gemm, write_table

    given = fused(launch_out={"block_n": 16}, launch_down={"split_k": 8})
    given["simplify"] = {"fold_norms": True}
    given["attention"] = {"denoise": "triton", "launch_denoise": {"num_warps": 4}}
    cfg = config(given, H100)
    result = Ok.model_construct(
        outcome="ok", config=cfg.dump(), fingerprint={"gpu": {"arch": "sm90"}}
    )
    record = Record.model_construct(number=7, role="trial", result=result)
    found = {entry.key: entry for entry in write_table.entries(record)}
    out, down = ("sm90", 16, 1024, 2048, "plain"), ("sm90", 16, 1024, 4096, "plain")
    assert set(found) == {out, down, ("sm90", 16)}
    for key in (out, down):
        before, after = triton_skinny_gemm.TABLE[key], found[key].launch
        assert after == replace(before, **({"block_n": 16} if key == out else {"split_k": 8}))
    assert found["sm90", 16].module is triton_decode
    for module in (triton_skinny_gemm, triton_decode):
        copy = tmp_path / "copy.py"
        copy.write_text(Path(str(module.__file__)).read_text())
        own = {key: entry.launch for key, entry in found.items() if entry.module is module}
        for _ in range(2):  # writing it twice leaves one entry
            write_table.write(copy, own, "Study found, trial 7")
        changed = {**module.TABLE, **own}
        assert _table(copy) == changed


def _table(path: Path) -> dict:
    tree = ast.parse(path.read_text())
    table = next(node.value for node in tree.body if ast.unparse(node).startswith("TABLE"))
    scope: dict = {"Launch": kernels.Launch}
    helper = next(node for node in tree.body if getattr(node, "name", "") == "_entry")
    exec(compile(ast.Module([helper], []), "copy", "exec"), scope)
    return eval(compile(ast.Expression(table), "copy", "eval"), scope)
