import re
from pathlib import Path

import pytest
import torch
from machine_samples import CPU, H100, MI300X, config
from torch import Tensor

from openpi_opt import runtime
from openpi_opt.kernels.compiled import CompilationError, CompiledCall
from openpi_opt.knobs import compile as module
from openpi_opt.knobs.compile import Compile, CompileOptions, InductorOptions
from openpi_opt.pi0.inputs import Inputs
from openpi_opt.pi0.workload import make_inputs

KNOB = Compile()
NOT_BOOL = {"max_fusion_size", "max_autotune_gemm_backends"}
INDUCTOR = list(InductorOptions().model_dump())


def of(mode: str = "default", scope: str = "stage", **inductor: object) -> dict:
    return {"compile": {"mode": mode, "scope": scope, "inductor": inductor}}


def test_every_option_exists_in_this_torch_under_this_name():
    known = torch._inductor.list_options()
    chosen = InductorOptions(**dict.fromkeys(set(INDUCTOR) - {"triton"} - NOT_BOOL, True))
    assert set(chosen.given()) <= set(known)
    assert {"max_fusion_size", "max_autotune_gemm_backends", "triton.multi_kernel"} <= set(known)


def test_the_table_of_defaults_is_this_torchs():
    current = torch._inductor.config.get_config_copy()
    assert {key: current[key] for key in module.DEFAULTS} == module.DEFAULTS


def test_inert_options_have_no_reader_in_this_torch_and_the_others_have():
    """benchmark_kernel has readers: they write a benchmark beside the code and choose nothing."""
    folder = Path(torch._inductor.__file__).parent
    read = "".join(f.read_text() for f in folder.rglob("*.py") if f != folder / "config.py")
    options = set(re.findall(r"config(?:\.triton)?\.(\w+)", read))
    named = {*INDUCTOR, "multi_kernel"} - {"triton"}
    assert named - options == {"group_fusion"}
    assert set(module.INERT) == {"group_fusion", "benchmark_kernel"}


def test_names_are_read_from_the_source_without_importing_it(monkeypatch) -> None:
    assert all(map(module.is_inductor_option, module.DEFAULTS))
    source = "a: bool = 1\nb = 2\nclass triton:\n    d: int = (\n    )\nclass cpp:\n    e = 1\n"
    monkeypatch.setattr(module, "inductor_source", lambda: source)
    names = ("a", "b", "d", "e", "triton.a", "triton.d", "triton.e")
    assert [name for name in names if module.is_inductor_option(name)] == ["a", "b", "triton.d"]


def test_an_option_that_this_torch_lacks_is_unavailable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "inductor_source", lambda: "freezing = False\n")
    assert KNOB.check(config(of(freezing=True)), CPU) is None
    refusal = KNOB.check(config(of(freezing=True, cpp_wrapper=True)), CPU)
    assert refusal is not None
    assert refusal.outcome == "unavailable"
    assert "compile.inductor.cpp_wrapper" in refusal.reason
    assert "freezing" not in refusal.reason


@pytest.mark.parametrize("backends", ["CK", "ATEN,CKTILE"])
def test_composable_kernel_is_refused_where_it_is_not_to_be_had(backends, monkeypatch):
    """Alone it would end `error` in the compile phase, and beside others be left out silently."""
    raw = of("max_autotune_no_cudagraphs", max_autotune_gemm_backends=backends)
    for on, words in ((H100, "is AMD's"), (CPU, "is AMD's"), (MI300X, "ck4inductor")):
        refusal = KNOB.check(config(raw, on), on)
        assert refusal is not None
        assert refusal.outcome == "unavailable"
        assert words in refusal.reason
    find = module.importlib.util.find_spec
    monkeypatch.setattr(
        module.importlib.util, "find_spec", lambda name: find("json" if "ck4" in name else name)
    )
    assert KNOB.check(config(raw, MI300X), MI300X) is None


@pytest.mark.parametrize("mode", ["default", "reduce_overhead", "max_autotune"])
def test_modes_are_torchs_and_options_come_on_top(mode):
    options = CompileOptions(mode=mode, inductor={"triton": {"multi_kernel": 1}})  # type: ignore[arg-type]
    expected = torch._inductor.list_mode_options(mode.replace("_", "-"))
    assert module.settings(options) == {**expected, "triton.multi_kernel": 1}


def test_inert_options_are_noted_and_shown():
    cfg = config(of(group_fusion=True, freezing=True))
    (note,) = KNOB.notes(cfg)
    assert "compile.inductor.group_fusion" in note
    assert cfg.labels()["compile"] == "default group_fusion=True freezing=True"
    assert KNOB.notes(config(of("off", group_fusion=True))) == []


def test_the_cpp_wrapper_needs_a_cpp_compiler(monkeypatch):
    monkeypatch.setattr(module.shutil, "which", lambda name: name if name == "gcc" else None)
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.delenv("CXX", raising=False)
    assert KNOB.check(config(of(), H100), H100) is None
    assert KNOB.check(config(of(cpp_wrapper=True), H100), H100) is not None


# --- what happens at the calls -------------------------------------------------------------------


def inputs(batch: int = 1) -> Inputs:
    return Inputs(*(torch.ones(batch, 2) for _ in Inputs._fields))


def compiled(function: object) -> object:
    return torch.compile(function, fullgraph=True, dynamic=False, backend="eager")


@pytest.fixture(autouse=True)
def fresh_dynamo():
    torch._dynamo.reset()


def test_a_recompilation_between_calls_is_an_error():
    part = compiled(lambda x: x * 2)
    call = CompiledCall(lambda i: part(i.noise), parts=1)  # type: ignore[operator]
    assert call(inputs()).shape == (1, 2)
    assert call(inputs()).shape == (1, 2)
    with pytest.raises(RuntimeError, match="recompile"):
        call(inputs(batch=2))


def test_a_recompilation_within_the_first_call_is_an_error():
    """As when each denoising step had a shape of its own: ten graphs instead of one."""
    part = compiled(lambda x: x * 2)

    def grows(i: Inputs) -> Tensor:
        return part(torch.cat([part(i.noise), i.noise]))  # type: ignore[operator,no-any-return]

    with pytest.raises(CompilationError, match="2 graphs were compiled for 1"):
        CompiledCall(grows, parts=1)(inputs())


def test_a_second_policy_in_the_process_may_compile():
    for scale in (2, 3):
        part = compiled(lambda x, scale=scale: x * scale)
        call = CompiledCall(lambda i, part=part: part(i.noise), parts=1)
        for _ in range(2):
            assert float(call(inputs())[0, 0]) == scale


def test_a_capture_that_inductor_skips_is_an_error():
    def skipping(i: Inputs) -> Tensor:
        torch._dynamo.utils.counters["inductor"]["cudagraph_skips"] += 1
        return i.noise

    with pytest.raises(CompilationError, match="did not capture"):
        CompiledCall(skipping, parts=1, captured=True)(inputs())
    CompiledCall(skipping, parts=1)(inputs())


def test_captured_actions_are_a_copy():
    static = torch.zeros(1, 2)
    call = CompiledCall(lambda i: static.copy_(i.noise), parts=1, captured=True)
    first = call(inputs())
    call(inputs()._replace(noise=torch.full((1, 2), 7.0)))
    assert float(first[0, 0]) == 1.0


@pytest.mark.usefixtures("one_layer")
@pytest.mark.parametrize(("scope", "graphs"), [("stage", 3), ("call", 1), ("layer", 3)])
def test_the_small_model_compiles_and_computes_the_same(scope, graphs, request):
    """The stages by Inductor, for a C++ compiler takes its time; the other two are traced only."""
    if scope != "stage":
        request.getfixturevalue("traced")
    cfg = config(
        {
            "precision": {"dtype": "float32"},
            "workload": {"steps": 2, "active_cameras": [True]},
            "attention": {"vision": "eager", "prefill": "sdpa", "denoise": "eager"},
            **of(scope=scope, freezing=True, max_fusion_size=128),
        }
    )
    policy = runtime.build_policy(cfg, torch.device("cpu"))
    first, second = (
        make_inputs(runtime.workload_of(cfg), policy.config, seed, "cpu") for seed in (0, 1)
    )
    with torch.no_grad():
        expected = policy.sample_actions(second)
    prepared = runtime.apply_knobs(policy, cfg)
    before = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    prepared.call(first)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] - before == graphs
    torch.testing.assert_close(prepared.call(second), expected, rtol=1e-3, atol=1e-4)
    assert not list(torch._dynamo.utils.counters["graph_break"])
    with pytest.raises(RuntimeError, match="recompile"):
        prepared.call(Inputs(*(tensor.repeat_interleave(2, 0) for tensor in second)))
