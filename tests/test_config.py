import numpy as np
import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import save_file

from openpi_opt.config import CPU_SECONDS, GPU_SECONDS, Config
from openpi_opt.errors import UserError
from openpi_opt.knobs import KNOBS
from openpi_opt.machine import Gpu, Machine, TorchBuild
from openpi_opt.paths import conf_dir

CPU = Machine(gpus=(), torch=TorchBuild("2.13.0+cpu", None, None), cpu="x", cores=2, memory_mib=1)


def gpu(memory_mib: int, vendor: str = "nvidia") -> Gpu:
    return Gpu(0, "GPU-1", "H100", vendor, "sm90", memory_mib, "580")  # type: ignore[arg-type]


def with_gpu(memory_mib: int, cuda: str | None = "13.0", hip: str | None = None) -> Machine:
    vendor = "amd" if hip else "nvidia"
    return Machine((gpu(memory_mib, vendor),), TorchBuild("2.13.0", cuda, hip), "x", 2, 1)


def test_every_option_file_is_a_valid_option_of_its_group():
    for knob in KNOBS:
        files = sorted((conf_dir() / knob.name).glob("*.yaml"))
        assert files, f"knob {knob.name} has no options"
        for file in files:
            knob.options_type.model_validate(yaml.safe_load(file.read_text()))


def test_groups_and_registry_name_the_same_knobs():
    primary = yaml.safe_load((conf_dir() / "sweep.yaml").read_text())
    groups = [next(iter(entry)) for entry in primary["defaults"] if isinstance(entry, dict)]
    folders = {path.name for path in conf_dir().iterdir() if path.is_dir()}
    assert set(groups) - {g for g in groups if g.startswith("override ")} <= folders
    assert {knob.name for knob in KNOBS} <= set(groups)


def test_dump_and_load_round_trip():
    cfg = Config.parse({"attention": {"vision": "sdpa"}, "workload": {"horizon": 50}})
    assert Config.load(cfg.dump()) == cfg


@pytest.mark.parametrize(
    ("raw", "words"),
    [
        ({"atention": {}}, ["atention", "Did you mean attention?"]),
        ({"attention": {"visoin": "sdpa"}}, ["attention.visoin", "Did you mean attention.vision?"]),
        ({"attention": {"vision": "flash9"}}, ["attention.vision=flash9", "'eager'", "'aiter'"]),
        ({"measure": {"warmup": 0}}, ["measure.warmup=0", "at least 3"]),
        ({"measure": {"iterations": 9}}, ["measure.iterations=9", "at least 10"]),
        ({"measure": {"rel_ci": 0}}, ["measure.rel_ci=0", "greater than 0"]),
        ({"measure": {"max_seconds": -1}}, ["measure.max_seconds=-1", "greater than 0"]),
        (
            {"measure": {"iterations": 50, "max_iterations": 40}},
            ["measure", "max_iterations=40", "iterations=50"],
        ),
        ({"workload": {"batch_size": "many"}}, ["workload.batch_size=many", "integer"]),
        ({"workload": {"prompt_tokens": 21}}, ["prompt_tokens=21", "prompt_slots=20"]),
        ({"workload": {"active_cameras": [False]}}, ["active_cameras"]),
        ({"weights": {"kind": "checkpoint"}}, ["weights.path"]),
        ({"attention": "sdpa"}, ["attention=sdpa"]),
    ],
)
def test_refusals_say_what_was_given_and_what_is_allowed(raw, words):
    with pytest.raises(UserError) as error:
        Config.parse(raw)
    message = str(error.value)
    assert len(message.splitlines()) <= 3
    for word in words:
        assert word in message


def test_auto_takes_the_full_model_only_where_it_fits():
    def chosen(machine: Machine) -> tuple[str, str]:
        cfg = Config.parse({}).resolved(machine)
        return cfg.model.name, cfg.device

    assert chosen(CPU) == ("pi0_mini", "cpu")
    assert chosen(with_gpu(80_000)) == ("pi0", "cuda")
    assert chosen(with_gpu(190_000, cuda=None, hip="7.1")) == ("pi0", "rocm")
    assert chosen(with_gpu(16_000)) == ("pi0_mini", "cuda")
    assert chosen(with_gpu(80_000, cuda=None)) == ("pi0_mini", "cpu")


def test_auto_takes_the_model_that_the_checkpoint_holds(tmp_path):
    file = tmp_path / "model.safetensors"
    for name, chosen in {
        "state_proj.bias": ("pi0_mini", "pi0"),
        "action_time_mlp_in.bias": ("pi0_mini", "pi0"),
        "time_mlp_in.bias": ("pi05_mini", "pi05"),
        "model.time_mlp_in.weight": ("pi05_mini", "pi05"),
    }.items():
        save_file({name: np.zeros(2, np.float32)}, file)
        cfg = Config.parse({"weights": {"kind": "checkpoint", "path": str(tmp_path)}})
        names = [cfg.resolved(machine).model.name for machine in (CPU, with_gpu(80_000))]
        assert tuple(names) == chosen
    explicit = Config.parse(
        {"model": {"name": "pi0"}, "weights": {"kind": "checkpoint", "path": str(tmp_path)}}
    )
    assert explicit.resolved(CPU).model.name == "pi0"


@pytest.mark.parametrize("device", ["cuda", "rocm"])
def test_a_gpu_that_is_not_there_is_refused(device):
    with pytest.raises(UserError, match=f"platform={device}"):
        Config.parse({"platform": {"device": device}}).resolved(CPU)


def test_more_time_to_measure_than_the_phase_may_take_is_refused():
    cfg = Config.parse({"measure": {"max_seconds": 30}, "limits": {"measure": 20}})
    with pytest.raises(UserError, match=r"measure\.max_seconds=30 .* limits\.measure=20"):
        cfg.resolved(CPU)
    Config.parse({"measure": {"rel_ci": None}, "limits": {"measure": 20}}).resolved(CPU)


def test_the_time_to_measure_follows_the_device_and_an_own_one_stays():
    assert Config.parse({}).resolved(CPU).measure.max_seconds == CPU_SECONDS
    assert Config.parse({}).resolved(with_gpu(80_000)).measure.max_seconds == GPU_SECONDS == 20
    own = Config.parse({"measure": {"max_seconds": CPU_SECONDS}})
    assert own.resolved(CPU).context_hash() == Config.parse({}).resolved(CPU).context_hash()
    assert own.resolved(with_gpu(80_000)).measure.max_seconds == CPU_SECONDS


def test_gpu_number_out_of_range():
    with pytest.raises(UserError, match=r"platform\.gpu=3.*0 to 0"):
        Config.parse({"platform": {"gpu": 3}}).resolved(with_gpu(80_000))


def test_hash_follows_what_is_measured_and_nothing_else():
    plain = Config.parse({})
    assert (
        plain.hash() == Config.parse({"limits": {"load": 5}, "tracking": {"mlflow": False}}).hash()
    )
    assert plain.hash() == Config.parse({"workload": {"name": "renamed"}}).hash()
    for raw in (
        {"attention": {"denoise": "sdpa"}},
        {"workload": {"batch_size": 2}},
        {"measure": {"iterations": 31}},
        {"weights": {"seed": 1}},
    ):
        assert plain.hash() != Config.parse(raw).hash()


def test_context_is_shared_by_knobs_only():
    plain = Config.parse({})
    assert plain.context_hash() == Config.parse({"attention": {"vision": "sdpa"}}).context_hash()
    assert plain.context_hash() != Config.parse({"workload": {"horizon": 50}}).context_hash()


def test_baseline_is_the_defaults_under_the_same_context():
    cfg = Config.parse({"attention": {"vision": "sdpa"}, "workload": {"horizon": 50}})
    assert not cfg.is_baseline()
    assert cfg.baseline().is_baseline()
    assert cfg.baseline().workload.horizon == 50


@given(st.dictionaries(st.text(max_size=8), st.integers() | st.text(max_size=8), max_size=3))
def test_wild_mappings_end_in_a_config_or_a_user_error(raw):
    try:
        Config.parse(raw)
    except UserError as error:
        message = str(error)
    else:
        message = "accepted"
    assert 1 <= len(message.splitlines()) <= 3
