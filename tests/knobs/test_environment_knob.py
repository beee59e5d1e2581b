import re

import pytest
import yaml
from machine_samples import CPU, H100, MI300X, config

from openpi_opt.errors import UserError
from openpi_opt.knobs.environment import REFUSED, VARIABLES, Environment
from openpi_opt.paths import conf_dir
from openpi_opt.process.environment import child_environment, cleared_names

KNOB = Environment()


def of(**variables: object) -> dict:
    return {"environment": {"variables": variables}}


@pytest.mark.parametrize("name", VARIABLES)
def test_every_entry_says_what_it_is_and_has_a_valid_pattern(name):
    entry = VARIABLES[name]
    assert entry.meaning
    assert entry.source
    assert not re.fullmatch(entry.values, "")
    if name in REFUSED:  # but for the value that changes nothing
        assert (entry.values, bool(entry.inert)) == ("0", True)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("HIP_FORCE_DEV_KERNARG", 1),
        ("GPU_MAX_HW_QUEUES", "2"),
        ("PYTORCH_ALLOC_CONF", "expandable_segments:True,max_split_size_mb:128"),
        ("MIOPEN_FIND_MODE", "HYBRID"),
        ("CUBLAS_WORKSPACE_CONFIG", ":4096:2:16:8"),
        ("OMP_NUM_THREADS", 16),
        ("HIP_LAUNCH_BLOCKING", 0),
        ("AMD_LOG_LEVEL", "0"),
        ("PYTORCH_TUNABLEOP_NUMERICAL_CHECK", "1e-5_1e-3"),
    ],
)
def test_admitted_values(name, value):
    assert config(of(**{name: value})).knobs["environment"].variables == {name: str(value)}


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("HIP_FORCE_DEV_KERNAG", "1", ["unknown variable", "Did you mean HIP_FORCE_DEV_KERNARG"]),
        ("LD_PRELOAD", "x.so", ["unknown variable LD_PRELOAD", "known are"]),
        ("HIP_FORCE_DEV_KERNARG", "yes", ["'yes'", "0|1"]),
        ("GPU_MAX_HW_QUEUES", 0, ["'0'"]),
        ("HIP_LAUNCH_BLOCKING", 1, ["refused", "serialises"]),
        ("CUDA_LAUNCH_BLOCKING", 1, ["refused", "serialises"]),
        ("AMD_LOG_LEVEL", 3, ["refused", "logs"]),
        ("PYTORCH_TUNABLEOP_ENABLED", 1, ["blas.tunableop"]),
        ("TORCHINDUCTOR_FREEZING", 1, ["compile.inductor"]),
        ("HIP_FORCE_DEV_KERNARG", True, ["string"]),
    ],
)
def test_refusals_say_why(name, value, words):
    with pytest.raises(UserError) as error:
        config(of(**{name: value}))
    for word in words:
        assert word in str(error.value)


def test_inert_variables_are_recorded_and_have_no_effect():
    cfg = config(of(HIP_CACHE_ENABLED=1, TORCH_ROCM_USE_HIPBLASLT=0), MI300X)
    assert cfg.knobs["environment"].variables
    assert KNOB.environment(cfg) == {}
    assert len(KNOB.notes(cfg)) == 2
    assert KNOB.notes(config(of(HIP_FORCE_DEV_KERNARG=1), MI300X)) == []


def test_how_tunableop_tunes_matters_while_it_tunes():
    how = of(PYTORCH_TUNABLEOP_MAX_TUNING_DURATION_MS=100)
    assert config(how, MI300X).hash() == config({}, MI300X).hash()
    assert KNOB.environment(config(how, MI300X)) == {}
    (note,) = KNOB.notes(config(how, MI300X))
    assert "blas.tunableop.mode=tune" in note
    tune = {"blas": {"tunableop": {"mode": "tune"}}}
    both = config({**how, **tune}, MI300X)
    assert KNOB.environment(both) == {"PYTORCH_TUNABLEOP_MAX_TUNING_DURATION_MS": "100"}
    assert both.hash() != config(tune, MI300X).hash()
    assert child_environment(both, MI300X, {"PYTORCH_TUNABLEOP_TUNING": "1"}).keys() >= {
        "PYTORCH_TUNABLEOP_MAX_TUNING_DURATION_MS"
    }


def test_every_variable_of_the_table_is_kept_out_of_a_trials_environment():
    kept = set(VARIABLES) - set(cleared_names(dict.fromkeys(VARIABLES, "1")))
    assert kept == {"OMP_NUM_THREADS"}  # says how many cores this process may have


@pytest.mark.parametrize("file", sorted((conf_dir() / "environment").glob("*.yaml")), ids=str)
def test_every_named_set_runs_somewhere(file):
    raw = {"environment": yaml.safe_load(file.read_text())}  # type: ignore[attr-defined]
    machines = [m for m in (CPU, H100, MI300X) if KNOB.check(config(raw, m), m) is None]
    assert machines


def test_the_trial_gets_the_options_and_not_the_shell():
    shell = {"HSA_NO_SCRATCH_RECLAIM": "0", "HSA_ENABLE_SDMA": "0", "HOME": "/home/x"}
    cfg = config(of(HSA_NO_SCRATCH_RECLAIM=1), MI300X)
    assert cleared_names(shell) == ["HSA_ENABLE_SDMA", "HSA_NO_SCRATCH_RECLAIM"]
    child = child_environment(cfg, MI300X, shell)
    assert child["HSA_NO_SCRATCH_RECLAIM"] == "1"
    assert "HSA_ENABLE_SDMA" not in child
    assert child["HOME"] == "/home/x"
