import hashlib
import types
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from machine_samples import A100, AMD_AITER, CPU, H100, MI300X, MI350, T4, config, machine

from openpi_opt import runtime
from openpi_opt.config import Config, Guard
from openpi_opt.errors import RefusedError, UserError
from openpi_opt.kernels import fp8
from openpi_opt.knobs import BY_NAME, blas
from openpi_opt.knobs.blas import LIBRARIES, Blas
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


@pytest.mark.parametrize("library", LIBRARIES)
def test_a_library_exists_on_its_vendor_only(library: str) -> None:
    raw = {"blas": {"library": library}}
    runs = [m for m in (CPU, H100, MI300X) if outcome(raw, m) is None]
    assert runs == [{"cuda": H100, "rocm": MI300X}[LIBRARIES[library][0]]]


def test_two_ways_to_choose_a_library_contradict() -> None:
    variables = {"environment": {"variables": {"TORCH_BLAS_PREFER_HIPBLASLT": 1}}}
    assert outcome({"blas": {"library": "rocblas"}, **variables}, MI300X) == "invalid"
    assert outcome(variables, MI300X) is None


@pytest.mark.parametrize(
    ("on", "more", "expected"),
    [
        (H100, {}, None),
        (H100, {"precision": {"dtype": "float32"}}, "invalid"),
        (H100, {"blas": {"algorithm": "searched", "library": "cublas"}}, "invalid"),
        (MI300X, {}, "unavailable"),
        (CPU, {}, "unavailable"),
    ],
)
def test_searched_algorithms_are_cublaslts(on: Machine, more: dict, expected: str | None) -> None:
    raw = {"precision": {"dtype": "bfloat16"}, "blas": {"algorithm": "searched"}}
    assert outcome({**raw, **more}, on) == expected
    assert KNOB.times_kernels(config({**raw, **more}, on))


def test_residuals_are_left_to_searched_products_only() -> None:
    fusion = BY_NAME["fusion"]
    alone = {"precision": {"dtype": "bfloat16"}, "fusion": {"residuals": True}}
    refusal = fusion.check(config(alone, H100), H100)
    assert refusal is not None
    assert refusal.outcome == "invalid"
    searched = {**alone, "blas": {"algorithm": "searched"}}
    assert fusion.check(config(searched, H100), H100) is None
    fp8 = {"algorithm": "searched", "backend": "fp8"}
    assert outcome({**alone, "blas": fp8}, H100) == "invalid"


@pytest.mark.parametrize(
    ("on", "expected"),
    [
        (H100, None),
        (MI300X, None),
        (MI350, None),
        (CPU, None),
        (A100, "unavailable"),
        (T4, "unavailable"),
        (machine("gfx90a"), "unavailable"),
    ],
)
def test_fp8_needs_recent_matrix_cores(on: Machine, expected: str | None) -> None:
    assert outcome(FP8, on) == expected
    assert outcome({**FP8, "precision": {"dtype": "float32"}}, on) == "invalid"


@pytest.mark.parametrize(
    ("on", "expected"),
    [
        (MI300X, None),
        (MI350, None),
        (machine("gfx1200", AMD_AITER), "unavailable"),
        (machine("gfx942"), "unavailable"),
        (H100, "unavailable"),
        (CPU, "unavailable"),
    ],
)
def test_aiters_fp8_needs_amd_and_the_package(on: Machine, expected: str | None) -> None:
    raw = {"blas": {"backend": "fp8", "fp8": {"gemm": "aiter"}}}
    assert outcome(raw, on) == expected
    cfg = config(raw, on)
    assert cfg.lossy()
    assert cfg.hash() != config(FP8, on).hash()
    assert KNOB.environment(cfg)["AITER_LOG_TUNED_CONFIG"] == "1"
    idle = {"blas": {"fp8": {"gemm": "aiter"}}}
    assert config(idle, on).hash() == config({}, on).hash()
    assert KNOB.environment(config(idle, on)) == {}


@pytest.mark.parametrize("raw", [AITER, {"blas": {"backend": "fp8", "fp8": {"gemm": "aiter"}}}])
def test_an_aiter_that_cannot_be_imported_is_unavailable(
    raw: dict, monkeypatch: pytest.MonkeyPatch
) -> None:
    policy = runtime.build_policy(config(WORKLOAD), torch.device("cpu"))
    with pytest.raises(RefusedError, match="importing AMD's aiter failed") as error:
        KNOB.transform(policy, config({**WORKLOAD, **raw}, MI300X))
    assert error.value.outcome == "unavailable"


def test_aiter_needs_amd_and_the_package(tmp_path: Path) -> None:
    assert outcome(AITER, MI300X) is None
    assert outcome(AITER, machine("gfx942")) == "unavailable"
    assert outcome(AITER, H100) == "unavailable"
    assert (
        outcome({"blas": {"backend": "aiter", "aiter": {"table": "no.csv"}}}, MI300X) == "invalid"
    )
    assert outcome({**AITER, "precision": {"dtype": "float32"}}, MI300X) == "invalid"


def test_the_own_kernel_must_have_something_left() -> None:
    gemm = {"gemm": {"backend": "triton_skinny"}}
    assert outcome({**FP8, **gemm}, H100) == "invalid"
    some = {"backend": "fp8", "fp8": {"stages": ["vision", "prefill"]}}
    assert outcome({"blas": some, **gemm}, H100) is None
    assert outcome({**AITER, **gemm}, MI300X) == "invalid"
    few = {"backend": "aiter", "aiter": {"max_rows": 11}}
    assert outcome({"blas": few, **gemm}, MI300X) is None


def test_tunableop_needs_rocm_and_what_it_reads(tmp_path: Path) -> None:
    file = tmp_path / "found.csv"
    use = {"blas": {"tunableop": {"mode": "use", "file": str(file)}}}
    assert outcome({"blas": {"tunableop": {"mode": "tune"}}}, H100) == "unavailable"
    assert outcome({"blas": {"tunableop": {"mode": "tune"}}}, MI300X) is None
    assert outcome(use, MI300X) == "invalid"
    file.touch()
    assert outcome(use, MI300X) is None


@pytest.mark.parametrize(
    ("raw", "same_as"),
    [
        ({"aiter": {"max_rows": 64, "preshuffle": True}, "fp8": {"stages": ["vision"]}}, {}),
        ({"tunableop": {"file": "x.csv", "rotating_mib": 9}}, {}),
        (
            {"backend": "aiter", "aiter": {"preshuffle_min_rows": 1}},
            {"backend": "aiter"},
        ),
        (
            {"backend": "fp8", "fp8": {"stages": ["denoise", "vision", "prefill"]}},
            {"backend": "fp8"},
        ),
        ({"backend": "fp8", "fp8": {"fast_accum": False}}, {"backend": "fp8"}),
    ],
)
def test_settings_of_what_is_not_chosen_do_not_count(raw: dict, same_as: dict) -> None:
    assert config({"blas": raw}, MI300X).hash() == config({"blas": same_as}, MI300X).hash()


@pytest.mark.parametrize(
    "raw",
    [
        {"backend": "fp8", "fp8": {"stages": ["vision"]}},
        {"backend": "fp8", "fp8": {"fast_accum": False}},
        {"library": "cublaslt"},
    ],
)
def test_settings_that_are_read_count(raw: dict) -> None:
    plain = {"backend": raw.get("backend", "torch")}
    assert config({"blas": raw}, H100).hash() != config({"blas": plain}, H100).hash()


def with_table(path: Path) -> dict:
    return {"blas": {"backend": "aiter", "aiter": {"table": str(path)}}}


def with_results(path: Path) -> dict:
    return {"blas": {"tunableop": {"mode": "use", "file": str(path)}}}


@pytest.mark.parametrize("raw", [with_table, with_results])
def test_a_file_of_the_users_counts_by_its_content(raw: Callable, tmp_path: Path) -> None:
    one, other = tmp_path / "one.csv", tmp_path / "other.csv"
    one.write_text("a,b\n1,2\n")
    other.write_text("a,b\n1,2\n")
    first = config(raw(one), MI300X).hash()
    assert config(raw(other), MI300X).hash() == first
    one.write_text("a,b\n1,3\n")
    assert config(raw(one), MI300X).hash() != first
    assert config({}, MI300X).hash() != first
    # Loaded again from its record, as a trial does, it is the same configuration.
    assert Config.load(config(raw(other), MI300X).dump()).hash() == first
    (note,) = [n for n in KNOB.notes(config(raw(other), MI300X)) if "sha256" in n]
    assert hashlib.sha256(b"a,b\n1,2\n").hexdigest() in note


@pytest.mark.parametrize("raw", [with_table, with_results])
def test_a_file_that_is_not_there_is_invalid(raw: Callable, tmp_path: Path) -> None:
    path = tmp_path / "missing.csv"
    refusal = KNOB.check(config(raw(path), MI300X), MI300X)
    assert refusal is not None
    assert refusal.outcome == "invalid"
    assert str(path) in refusal.reason
    before = config(raw(path), MI300X).hash()
    path.write_text("now it is")
    assert config(raw(path), MI300X).hash() != before


def test_a_file_that_is_not_read_does_not_count(tmp_path: Path) -> None:
    path = tmp_path / "results.csv"
    tune = {"blas": {"tunableop": {"mode": "tune", "file": str(path)}}}
    before = config(tune, MI300X).hash()
    path.write_text("what tuning writes")
    assert config(tune, MI300X).hash() == before


def test_fp8_without_a_stage_is_refused() -> None:
    with pytest.raises(UserError, match=r"blas\.fp8\.stages"):
        config({"blas": {"backend": "fp8", "fp8": {"stages": []}}})


def test_only_fp8_is_lossy_and_held_to_what_its_rounding_does() -> None:
    assert config(FP8, H100).lossy()
    for raw in ({}, {"compile": {"mode": "default"}}, {"precision": {"dtype": "float16"}}, AITER):
        assert not config(raw, MI300X).lossy()
    limits = Guard(factor=2.0, cap=0.05, lossy_cap=0.1)
    assert guard.tolerance(limits, 0.01) == 0.02
    actions = [torch.ones(1, 2, 3)] * 3
    known = guard.Reference(actions, actions, ordinary=2, lossy=[0.04, 0.05, 0.01])
    assert known.tolerance(limits, 2, lossy=True) == pytest.approx(1.5 * 0.05)
    known = guard.Reference(actions, actions, ordinary=2, lossy=[0.04, 0.05, 0.06])
    assert known.tolerance(limits, 2, lossy=True) == pytest.approx(1.5 * 0.06)
    assert guard.Reference(actions, actions).tolerance(limits, lossy=True) == 0.1, "not emulated"


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
def one_calibration_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(blas, "_CALIBRATION_SEEDS", range(7, 8))


@pytest.mark.parametrize("stage", ["vision", "prefill", "denoise"])
def test_fp8_replaces_the_layers_of_its_stage_and_stays_close(stage: str) -> None:
    prepared, distance = fp8_policy(
        config({**WORKLOAD, "blas": {"backend": "fp8", "fp8": {"stages": [stage]}}})
    )
    policy = prepared.policy
    towers = {"vision": policy.vision, "prefill": policy.language, "denoise": policy.expert}
    for name, tower in towers.items():
        kinds = [isinstance(m, fp8.Fp8Linear) for m in tower.modules() if hasattr(m, "in_features")]
        assert all(kinds) if name == stage else not any(kinds)
    assert 0.001 < distance < 0.1


def test_fp8_reaches_fused_layers_and_the_files_names_stay() -> None:
    fusion = {"qkv": True, "gate_up": True, "vision_qkv": True}
    cfg = config({**WORKLOAD, **FP8, "fusion": fusion})
    names = set(runtime.build_policy(cfg, torch.device("cpu")).state_dict())
    prepared, distance = fp8_policy(cfg)
    layer = prepared.policy.language.layers[0]
    assert isinstance(layer.self_attn.qkv_proj, fp8.Fp8Linear)  # type: ignore[union-attr]
    assert not isinstance(layer.self_attn.q_proj, fp8.Fp8Linear)  # type: ignore[union-attr]
    assert set(prepared.policy.state_dict()) == names
    assert distance < 0.1


def test_a_library_that_torch_does_not_take_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Torch warns and keeps another one where the architecture is not supported."""
    chosen = torch._C._BlasBackend.Cublas
    monkeypatch.setattr(torch.backends.cuda, "preferred_blas_library", lambda name=None: chosen)
    blas._prefer("rocblas")
    with pytest.raises(RefusedError, match="torch uses") as error:
        blas._prefer("hipblaslt")
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
def test_tuning_happens_in_the_first_call_only_and_leaves_a_file(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, buffered: bool
) -> None:
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


def test_tuning_that_leaves_no_file_is_refused(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(torch.cuda, "tunable", FakeTunable(True, (("Gemm", "x", "y", 0.1),)))
    cfg = config({"blas": {"tunableop": {"mode": "tune"}}}, MI300X)
    with pytest.raises(RefusedError, match=r"did not write tunableop_results\.csv"):
        KNOB.wrap(lambda inputs: None, cfg)(None)  # type: ignore


def test_tuning_that_tuned_nothing_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "tunable", FakeTunable(True, ()))
    cfg = config({"blas": {"tunableop": {"mode": "tune"}}}, MI300X)
    with pytest.raises(RefusedError, match="no product"):
        KNOB.wrap(lambda inputs: None, cfg)(None)  # type: ignore


@pytest.mark.parametrize("readable", [True, False])
def test_a_file_for_another_gpu_is_refused(readable: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    tunable = FakeTunable(readable, ())
    monkeypatch.setattr(torch.cuda, "tunable", tunable)
    cfg = config({"blas": {"tunableop": {"mode": "use"}}}, MI300X)
    if readable:
        KNOB.configure(cfg)
        assert tunable.state["tuning"] is False
        return
    with pytest.raises(RefusedError, match="another GPU"):
        KNOB.configure(cfg)


def test_aiter_that_served_nothing_ends_the_trial(monkeypatch: pytest.MonkeyPatch) -> None:
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


def test_files_of_the_libraries_own_tuners(tmp_path: Path) -> None:
    file = tmp_path / "solutions.txt"
    raw = {"blas": {"overrides": {"hipblaslt": str(file)}}}
    assert outcome(raw, MI300X) == "invalid"
    file.write_text("Git Version: abc\n")
    assert outcome(raw, MI300X) is None
    assert outcome(raw, H100) == "unavailable"
    cfg = config(raw, MI300X)
    assert KNOB.environment(cfg) == {"HIPBLASLT_TUNING_OVERRIDE_FILE": str(file)}
    before = cfg.hash()
    file.write_text("Git Version: abd\n")
    assert config(raw, MI300X).hash() != before, "by content"


def test_aiter_gets_the_layers_of_its_stages(monkeypatch: pytest.MonkeyPatch) -> None:
    from openpi_opt.kernels import aiter as package
    from openpi_opt.kernels.tuned_gemm import TunedLinear

    monkeypatch.setattr(package, "import_part", lambda module, option: None)
    routed = {}
    for stages in (["vision"], ["prefill", "denoise"], ["vision", "prefill", "denoise"]):
        cfg = config(
            {**WORKLOAD, "blas": {"backend": "aiter", "aiter": {"stages": stages}}}, MI300X
        )
        policy = runtime.build_policy(cfg, torch.device("cpu"))
        blas._route_to_aiter(policy, cfg, KNOB.of(cfg).aiter)
        found = [name for name, m in policy.named_modules() if isinstance(m, TunedLinear)]
        routed[stages[0], len(stages)] = set(found)
    vision, others, every = routed.values()
    assert vision
    assert others
    assert not vision & others
    assert vision | others <= every
    assert all("vision" in name or "projector" in name for name in vision)


# --- padded rows ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "rival",
    [{"blas": {"backend": "fp8", "pad_strides": True}}, {"gemm": {"backend": "triton_skinny"}},
     {"fusion": {"qkv": True, "gate_up": True, "expert_layer": True}}],
)  # fmt: skip
def test_own_kernels_read_dense_weights(rival: dict) -> None:
    padded = {"blas": {"pad_strides": True}}
    assert outcome(padded, H100) is None
    assert outcome({**padded, **rival}, H100) == "invalid"


def test_padded_rows_change_addresses_and_nothing_else() -> None:
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


def test_padding_without_anything_to_pad_is_refused() -> None:
    """The small model's rows of 16 bits are no multiples of 512 bytes."""
    cfg = config({**WORKLOAD, "blas": {"pad_strides": True}})
    with pytest.raises(RefusedError, match="no weight of this model"):
        runtime.apply_knobs(runtime.build_policy(cfg, torch.device("cpu")), cfg)


def test_registered() -> None:
    assert isinstance(BY_NAME["blas"], Blas)
