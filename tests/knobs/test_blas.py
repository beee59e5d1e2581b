import hashlib
import types
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from machine_samples import H100, MI300X, config

from openpi_opt import runtime
from openpi_opt.config import Config, Guard
from openpi_opt.errors import RefusedError, UserError
from openpi_opt.kernels import fp8
from openpi_opt.knobs import blas
from openpi_opt.knobs.blas import Blas
from openpi_opt.machine import Machine
from openpi_opt.measure import guard
from openpi_opt.pi0.layers import Linear
from openpi_opt.pi0.workload import make_inputs

KNOB = Blas()
FP8 = {"blas": {"backend": "fp8"}}
AITER = {"blas": {"backend": "aiter"}}
WORKLOAD = {
    "workload": {"steps": 1, "active_cameras": [True], "prompt_slots": 4, "prompt_tokens": 4}
}


def outcome(raw: dict, on: Machine) -> str | None:
    refusal = KNOB.check(config(raw, on), on)
    return refusal and refusal.outcome


def with_table(path: Path) -> dict:
    return {"blas": {"backend": "aiter", "aiter": {"table": str(path)}}}


def with_results(path: Path) -> dict:
    return {"blas": {"tunableop": {"mode": "use", "file": str(path)}}}


def overrides(library: str) -> Callable[[Path], dict]:
    return lambda path: {"blas": {"overrides": {library: str(path)}}}


FILES = [with_table, with_results, overrides("hipblaslt"), overrides("rocblas")]


@pytest.mark.parametrize("raw", FILES)
def test_a_file_of_the_users_counts_by_its_content(raw, tmp_path):
    one, other = tmp_path / "one.csv", tmp_path / "other.csv"
    refusal = KNOB.check(config(raw(one), MI300X), MI300X)
    assert refusal is not None
    assert refusal.outcome == "invalid"
    assert str(one) in refusal.reason
    missing = config(raw(one), MI300X).hash()
    one.write_text("a,b\n1,2\n")
    other.write_text("a,b\n1,2\n")
    first = config(raw(one), MI300X).hash()
    assert config(raw(other), MI300X).hash() == first
    assert outcome(raw(one), MI300X) is None
    assert outcome(raw(one), H100) == "unavailable"
    one.write_text("a,b\n1,3\n")
    assert len({first, missing, config(raw(one), MI300X).hash(), config({}, MI300X).hash()}) == 4
    # Loaded again from its record, as a trial does, it is the same configuration.
    assert Config.load(config(raw(other), MI300X).dump()).hash() == first
    (note,) = [n for n in KNOB.notes(config(raw(other), MI300X)) if "sha256" in n]
    assert hashlib.sha256(b"a,b\n1,2\n").hexdigest() in note


def test_a_file_that_is_not_read_does_not_count(tmp_path):
    path = tmp_path / "results.csv"
    tune = {"blas": {"tunableop": {"mode": "tune", "file": str(path)}}}
    before = config(tune, MI300X).hash()
    path.write_text("what tuning writes")
    assert config(tune, MI300X).hash() == before


def test_fp8_without_a_stage_is_refused():
    with pytest.raises(UserError, match=r"blas\.fp8\.stages"):
        config({"blas": {"backend": "fp8", "fp8": {"stages": []}}})


def test_searching_algorithms_times_kernels():
    assert KNOB.times_kernels(config({"blas": {"algorithm": "searched"}}, H100))
    assert not KNOB.times_kernels(config({}, H100))


def test_only_fp8_is_lossy_and_held_to_what_its_rounding_does():
    aiter: dict = {"blas": {"backend": "fp8", "fp8": {"gemm": "aiter"}}}
    assert config(FP8, H100).lossy()
    assert config(aiter, MI300X).lossy()
    assert KNOB.environment(config(aiter, MI300X))["AITER_LOG_TUNED_CONFIG"] == "1"
    assert KNOB.environment(config({"blas": {"fp8": {"gemm": "aiter"}}}, MI300X)) == {}
    for raw in ({}, {"compile": {"mode": "default"}}, {"precision": {"dtype": "float16"}}, AITER):
        assert not config(raw, MI300X).lossy()
    limits = Guard(factor=2.0, cap=0.05, lossy_cap=0.1)
    assert guard.tolerance(limits, 0.01) == 0.02
    actions = [torch.ones(1, 2, 3)] * 3
    known = guard.Reference(actions, actions, ordinary=2, lossy=[0.03, 0.04, 0.01])
    assert known.tolerance(limits, 2, lossy=True) == pytest.approx(2.0 * 0.04)
    known = guard.Reference(actions, actions, ordinary=2, lossy=[0.03, 0.04, 0.045])
    assert known.tolerance(limits, 2, lossy=True) == pytest.approx(2.0 * 0.045)
    assert guard.Reference(actions, actions).tolerance(limits, lossy=True) == 0.1, "not emulated"
    known = guard.Reference(actions, actions, ordinary=2, lossy=[0.0, 0.0, 0.0])  # from a cache
    assert known.tolerance(limits, lossy=True) == limits.floor


# --- in the trial --------------------------------------------------------------------------------


def fp8_policy(cfg: Config) -> tuple[runtime.Prepared, float]:
    """The policy with its knobs, and its distance from float32 on an input of its own."""
    policy = runtime.build_policy(cfg, torch.device("cpu"))
    inputs = make_inputs(runtime.workload_of(cfg), policy.config, 0, "cpu")
    with torch.no_grad():
        expected = policy.sample_actions(inputs)
    prepared = runtime.apply_knobs(policy, cfg)
    found = guard.distance(prepared.call(inputs), expected).rel_l2
    assert found is not None
    return prepared, found


@pytest.fixture(autouse=True)
def one_calibration_run(monkeypatch):
    monkeypatch.setattr(blas, "CALIBRATION_SEEDS", range(7, 8))


@pytest.mark.parametrize("stage", ["vision", "prefill", "denoise"])
def test_fp8_replaces_the_layers_of_its_stage_and_stays_close(stage):
    prepared, distance = fp8_policy(
        config({**WORKLOAD, "blas": {"backend": "fp8", "fp8": {"stages": [stage]}}})
    )
    policy = prepared.policy
    towers = {"vision": policy.vision, "prefill": policy.language, "denoise": policy.expert}
    for name, tower in towers.items():
        kinds = [isinstance(m, fp8.Fp8Linear) for m in tower.modules() if hasattr(m, "in_features")]
        assert all(kinds) if name == stage else not any(kinds)
    assert 0.001 < distance < 0.1


def test_fp8_reaches_fused_layers_and_the_files_names_stay():
    fusion = {"qkv": True, "gate_up": True, "vision_qkv": True}
    cfg = config({**WORKLOAD, **FP8, "fusion": fusion})
    names = set(runtime.build_policy(cfg, torch.device("cpu")).state_dict())
    prepared, distance = fp8_policy(cfg)
    layer = prepared.policy.language.layers[0]
    assert isinstance(layer.self_attn.qkv_proj, fp8.Fp8Linear)  # type: ignore[union-attr]
    assert not isinstance(layer.self_attn.q_proj, fp8.Fp8Linear)  # type: ignore[union-attr]
    assert set(prepared.policy.state_dict()) == names
    assert distance < 0.1


def test_a_library_that_torch_does_not_take_is_refused(monkeypatch):
    """Torch warns and keeps another one where the architecture is not supported."""
    chosen = torch._C._BlasBackend.Cublas
    monkeypatch.setattr(torch.backends.cuda, "preferred_blas_library", lambda name=None: chosen)
    blas.prefer("rocblas")
    with pytest.raises(RefusedError, match="torch uses") as error:
        blas.prefer("hipblaslt")
    assert error.value.outcome == "unavailable"


class FakeTunable(types.SimpleNamespace):
    """The functions of `torch.cuda.tunable` that are called, keeping what was set.

    `buffered` behaves as torch 2.9 does: results are in memory until `write_file`, or until exit
    if tuning is on. Later versions have no such function and write each result when it is found.
    """

    def __init__(self, readable: bool, results: tuple, buffered: bool = False) -> None:
        state: dict = {}

        def write(name: str) -> None:
            Path(name).write_text("Validator,PT_VERSION,2.9.1\n")

        def tune() -> None:
            if state["tuning"] and not buffered:
                write(state["file"])

        more = {"write_file": write} if buffered else {}
        super().__init__(
            state=state,
            enable=lambda value: state.update(enabled=value),
            tuning_enable=lambda value: state.update(tuning=value),
            set_filename=lambda name, insert_device_ordinal: state.update(file=name),
            set_rotating_buffer_size=lambda size: state.update(rotating=size),
            read_file=lambda name: readable,
            get_results=lambda: results,
            tune=tune,
            **more,
        )


@pytest.mark.parametrize("buffered", [True, False])
def test_tuning_happens_in_the_first_call_only_and_leaves_a_file(monkeypatch, tmp_path, buffered):
    monkeypatch.chdir(tmp_path)
    tunable = FakeTunable(True, (("GemmTunableOp", "x", "y", 0.1),), buffered)
    monkeypatch.setattr(torch.cuda, "tunable", tunable)
    cfg = config({"blas": {"tunableop": {"mode": "tune", "rotating_mib": 64}}}, MI300X)
    KNOB.configure(cfg)
    assert tunable.state == {
        "enabled": True,
        "tuning": True,
        "file": "tunableop_results.csv",
        "rotating": 64,
    }
    during: list[bool] = []

    def product(inputs: object) -> None:
        during.append(tunable.state["tuning"])
        tunable.tune()

    call = KNOB.wrap(product, cfg)  # type: ignore[arg-type]
    call(None)  # type: ignore[arg-type]
    call(None)  # type: ignore[arg-type]
    assert during == [True, False]
    use = {"blas": {"tunableop": {"mode": "use"}}}
    assert KNOB.check(config(use, MI300X), MI300X) is None, "what was tuned can be used"


@pytest.mark.parametrize(
    ("results", "words"),
    [
        ((("Gemm", "x", "y", 0.1),), r"did not write tunableop_results\.csv"),
        ((), "no product went through TunableOp"),
    ],
)
def test_tuning_that_leaves_nothing_is_refused(results, words, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(torch.cuda, "tunable", FakeTunable(True, results))
    cfg = config({"blas": {"tunableop": {"mode": "tune"}}}, MI300X)
    with pytest.raises(RefusedError, match=words):
        KNOB.wrap(lambda inputs: None, cfg)(None)  # type: ignore


@pytest.mark.parametrize("readable", [True, False])
def test_a_file_for_another_gpu_is_refused(readable, monkeypatch):
    tunable = FakeTunable(readable, ())
    monkeypatch.setattr(torch.cuda, "tunable", tunable)
    cfg = config({"blas": {"tunableop": {"mode": "use"}}}, MI300X)
    if readable:
        KNOB.configure(cfg)
        assert tunable.state["tuning"] is False
        return
    with pytest.raises(RefusedError, match="another GPU"):
        KNOB.configure(cfg)


def test_aiter_that_served_nothing_ends_the_trial(monkeypatch):
    from openpi_opt.kernels import tuned_gemm

    found = tuned_gemm.Lookups()
    monkeypatch.setattr(tuned_gemm, "lookups", lambda: found)
    cfg = config(AITER, MI300X)
    assert KNOB.environment(cfg)["AITER_LOG_TUNED_CONFIG"] == "1"
    found.library[11, 64, 64] = "torch"
    with pytest.raises(RefusedError, match="11x64x64"):
        KNOB.wrap(lambda inputs: None, cfg)(None)  # type: ignore
    found.library[16, 64, 64] = "asm"
    KNOB.wrap(lambda inputs: None, cfg)(None)  # type: ignore
    assert KNOB.notes(cfg)


def test_each_librarys_tuner_has_a_variable(tmp_path):
    files = {"hipblaslt": str(tmp_path / "a.txt"), "rocblas": str(tmp_path / "b.txt")}
    assert KNOB.environment(config({"blas": {"overrides": files}}, MI300X)) == {
        "HIPBLASLT_TUNING_OVERRIDE_FILE": files["hipblaslt"],
        "ROCBLAS_TENSILE_GEMM_OVERRIDE_PATH": files["rocblas"],
    }


def test_aiter_gets_the_layers_of_its_stages(monkeypatch):
    from openpi_opt.kernels import aiter as package
    from openpi_opt.kernels.tuned_gemm import TunedLinear

    monkeypatch.setattr(package, "import_part", lambda module, option: None)
    routed = {}
    for stages in (["vision"], ["prefill", "denoise"], ["vision", "prefill", "denoise"]):
        cfg = config(
            {**WORKLOAD, "blas": {"backend": "aiter", "aiter": {"stages": stages}}}, MI300X
        )
        policy = runtime.build_policy(cfg, torch.device("cpu"))
        blas.route_to_aiter(policy, cfg, KNOB.of(cfg).aiter)
        found = [name for name, m in policy.named_modules() if isinstance(m, TunedLinear)]
        routed[stages[0], len(stages)] = set(found)
    vision, others, every = routed.values()
    assert vision
    assert others
    assert not vision & others
    assert vision | others <= every
    assert all("vision" in name or "projector" in name for name in vision)


# --- padded rows ---------------------------------------------------------------------------------


def test_padded_rows_change_addresses_and_nothing_else():
    raw = {"precision": {"dtype": "float32"}, "fusion": {"qkv": True}, **WORKLOAD}
    actions, strides = [], []
    for pad in (False, True):
        cfg = config({**raw, "blas": {"pad_strides": pad}})
        policy = runtime.build_policy(cfg, torch.device("cpu"))
        prepared = runtime.apply_knobs(policy, cfg)
        inputs = make_inputs(runtime.workload_of(cfg), policy.config, 0, "cpu")
        with torch.no_grad():
            actions.append(prepared.call(inputs))
        linears = [m for m in policy.modules() if isinstance(m, Linear)]
        strides.append([m.weight.stride(0) * m.weight.element_size() for m in linears])
    assert any(stride % 512 == 0 for stride in strides[0])
    assert not any(stride % 512 == 0 for stride in strides[1])
    torch.testing.assert_close(actions[0], actions[1], rtol=1e-5, atol=1e-5)


def test_padding_without_anything_to_pad_is_refused():
    """The small model's rows of 16 bits are no multiples of 512 bytes."""
    cfg = config({**WORKLOAD, "blas": {"pad_strides": True}})
    with pytest.raises(RefusedError, match="no weight of this model"):
        runtime.apply_knobs(runtime.build_policy(cfg, torch.device("cpu")), cfg)
