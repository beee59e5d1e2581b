"""A point that is put together without Hydra is the one that Hydra composes, or is left to it."""

import random
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import hydra
import pytest
from hydra import version
from hydra.core.global_hydra import GlobalHydra
from omegaconf import OmegaConf
from space_samples import command_lines

from openpi_opt.config import Config
from openpi_opt.errors import UserError
from openpi_opt.space.compose import Composer, trial_config
from openpi_opt.space.compose import compose as compose_alone


@pytest.fixture(scope="module")
def lines():
    return command_lines()


@pytest.mark.parametrize(
    "words",
    [
        ["space=full"],
        ["space=ladder"],
        ["preset=h100", "attention=glob(*)", "simplify.kv_buffer=true,false"],
        ["preset=mi350_runbook,h200_seeds", "graph=none,manual", "compile.scope=stage,call"],
        ["workload=glob(*)", "workload.batch_size=range(1,4)", "measure.iterations=30"],
        ["+environment.variables.OMP_NUM_THREADS=1,2", "environment=stock,seeds"],
        ["guard.cap=interval(0.1,0.2)", "weights.seed=1,2", "study=a", "n_trials=3"],
        ["blas=fp8,torch", "blas.fp8.stages=[vision],[prefill,denoise]"],
    ],
    ids=" ".join,
)
def test_equal_to_hydra(lines, words):
    space, compose = lines(*words)
    chosen = random.Random(3)
    for _ in range(4):
        point = {key: chosen.choice(d.values) for key, d in space.dimensions.items()}
        overrides = space.overrides(point)
        values = compose.assembled(overrides)
        assert values is not None
        assert trial_config(values) == by_hydra(compose, overrides)


@pytest.mark.parametrize(
    "overrides",
    [
        ["attention=nope"],
        ["attention.nope=1"],
        ["+attention.vision=sdpa"],
        ["attention.vision=nope"],
        ["attention={vision: sdpa}"],
        ["attention.vision=${attention.denoise}"],
        ["attention.vision=${compile.mode}"],
        ["attention.vision=???"],
        ["attention.launch_vision.blocks=1"],
        ["attention=triton", "attention.launch_vision.blocks=1"],
        ["attention=triton", "attention=sdpa"],
        ["workload.active_cameras=[true,true,true]"],
        ["workload.active_cameras.0=false"],
        ["workload.active_cameras=null"],
        ["weights=checkpoint"],
        ["weights.path=/x", "weights=checkpoint"],
        ["++attention.vision=sdpa"],
        ["~attention"],
        ["~attention.vision"],
        ["compile.inductor=5"],
        ["compile.inductor={freezing: true}"],
        ["blas.fp8.stages=[vision]", "blas=fp8"],
        ["attention@here=sdpa"],
        ["preset=nope"],
        ["preset=h100", "simplify=all"],
        ["preset=h100", "simplify.kv_buffer=true", "attention=sdpa"],
    ],
    ids=" ".join,
)
def test_equal_to_hydra_in_what_is_refused_and_in_what_is_odd(lines, overrides):
    _, compose = lines()
    rest = ["graph=manual", "compile=default", "compile.scope=call"]
    words = [*overrides, *rest]
    expected = outcome(lambda: by_hydra(compose, words))
    assert [outcome(lambda: compose(words)) for _ in range(2)] == [expected] * 2


def by_hydra(compose: Composer, overrides: list[str]) -> Config:
    return trial_config(compose.compose(overrides).values)


def outcome(call: Callable[[], Config]) -> Config | str:
    """The configuration, or the words of the refusal."""
    try:
        return call()
    except UserError as error:
        return str(error)


@pytest.mark.parametrize(
    "overrides",
    [
        ["precision=linked", "graph=none"],
        ["precision=linked", "graph=manual"],
        ["precision=elsewhere", "graph=none"],
        ["precision=elsewhere"],
        ["precision=derived", "graph=manual"],
        ["precision=derived", "precision.dtype=float16"],
        ["precision=plain", "graph=manual"],
    ],
    ids=" ".join,
)
def test_options_with_a_life_of_their_own(tmp_path, overrides):
    files = {
        "sweep": "defaults:\n- _self_\n- precision: plain\n- graph: none\n",
        "precision/plain": "dtype: bfloat16\ntf32: false\n",
        "precision/linked": "dtype: ${by_mode:${graph.mode}}\ntf32: false\n",
        "precision/elsewhere": "# @package _global_\nattention: {vision: sdpa}\n",
        "precision/derived": "defaults:\n- plain\ntf32: true\n",
        "graph/none": "mode: none\n",
        "graph/manual": "mode: manual\n",
    }
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / f"{name}.yaml").write_text(text)
    OmegaConf.register_new_resolver(
        "by_mode", lambda mode: {"none": "float32", "manual": "float16"}[mode], replace=True
    )
    _, compose = command_lines(tmp_path)()
    assert compose(["graph=none"]).knobs["precision"].dtype == "bfloat16"
    assert compose(overrides) == by_hydra(compose, overrides)


PROMOTED = """# @package _global_
defaults:
- override /attention: sdpa
provenance:
  model: {name: pi0_mini}
  workload: {horizon: 50, prompt_slots: 48, prompt_tokens: 40, batch_size: 1}
"""


@pytest.mark.parametrize(
    ("overrides", "found"),
    [
        ([], (50, 48, 1, "auto")),
        (["workload.batch_size=2"], (50, 48, 2, "auto")),
        (["++workload.batch_size=2"], (50, 48, 2, "auto")),
        (["+workload.batch_size=2"], None),
        (["++model.rope_frequencies=float32"], (50, 48, 1, "float32")),
        (["workload=openpi"], (50, 48, 1, "auto")),
        (["workload=seed_b1", "workload.steps=3"], (10, 20, 1, "auto")),
    ],
    ids=str,
)
def test_an_override_changes_that_key_of_the_promoted_workload_and_nothing_else(
    tmp_path, overrides, found
):
    (tmp_path / "mine.yaml").write_text(PROMOTED)
    if found is None:  # `+` adds what is not there yet
        with pytest.raises(UserError, match=r"workload\.batch_size"):
            compose_alone(overrides, "mine", tmp_path)
        return
    cfg = compose_alone(overrides, "mine", tmp_path)
    work = cfg.workload
    shown = work.horizon, work.prompt_slots, work.batch_size, cfg.model.rope_frequencies
    assert shown == found
    assert cfg.model.name == "pi0_mini"
    assert cfg.labels()["attention"] == "sdpa"


@pytest.mark.parametrize("base", ["1.2", None])
def test_another_hydra_application_stays_as_it_was(tmp_path, base):
    (tmp_path / "robot.yaml").write_text("rate: 50\n")
    with hydra.initialize_config_dir(str(tmp_path), version_base=base):
        before = version.getbase()
        assert compose_alone(["attention=sdpa"]).labels()["attention"] == "sdpa"
        assert version.getbase() == before
        assert hydra.compose("robot").rate == 50
    assert not GlobalHydra.instance().is_initialized()
    compose_alone([])
    assert not GlobalHydra.instance().is_initialized()


def test_threads_compose_side_by_side():
    seeds = range(12)
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda seed: compose_alone([f"weights.seed={seed}"]), seeds))
    assert [cfg.weights.seed for cfg in found] == list(seeds)


@pytest.mark.parametrize("name", ["My Drive", "müller", "lr=1,wd=0", "it's", "[lab] (2)", "%41#?"])
def test_folders_may_have_any_name(tmp_path, monkeypatch, name):
    folder = tmp_path / name / "conf" / "preset"
    folder.mkdir(parents=True)
    (folder / "mine.yaml").write_text(PROMOTED)
    monkeypatch.chdir(tmp_path / name)
    assert compose_alone([], "mine").labels()["attention"] == "sdpa"
    assert compose_alone([], "mine", folder).labels()["attention"] == "sdpa"
    (folder / "mine.yaml").write_text("a: [\n")
    with pytest.raises(UserError) as error:
        compose_alone([], "mine", folder)
    assert str(folder / "mine.yaml") in str(error.value)
