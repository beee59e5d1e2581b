"""Spaces that have a name: what they add to a command line, and what they leave to it."""

import contextlib
import itertools

import pytest
import yaml
from space_samples import MACHINES, command_lines

from openpi_opt.config import Config
from openpi_opt.errors import UserError
from openpi_opt.knobs import BY_NAME, KNOBS
from openpi_opt.paths import conf_dir
from openpi_opt.space.dimensions import key_values
from openpi_opt.space.named import NamedSpace, chosen_starts
from openpi_opt.space.points import NotSensibleError, Points
from openpi_opt.space.prepare import prepare, require_some
from openpi_opt.space.space import Space, parse_override

FILES = sorted((conf_dir() / "space").glob("*.yaml"))
STEPS = NamedSpace(
    steps={
        "one": ("compile=default", "attention=sdpa"),
        "two": ("graph=manual",),
        "three": ("attention=eager", "attention.denoise=sdpa"),
    }
)


@pytest.fixture(scope="module")
def lines():
    return command_lines()


def points(space: Space) -> list[list[str]]:
    return [space.overrides(point) for point in space.all()]


def test_a_sweep_is_as_if_it_were_typed():
    named = NamedSpace(sweep=("attention=eager,sdpa", "compile=off,default"))
    typed = Space.parse([*named.sweep, "weights.seed=1"])
    joined = named.join(["weights.seed=1"])
    assert points(joined) == points(typed)
    assert joined.hash() == typed.hash()
    assert joined.sensible_only


@pytest.mark.parametrize(
    ("typed", "left"),
    [
        (["attention=sdpa"], []),
        (["attention=sdpa,eager"], ["attention"]),
        (["attention.vision=sdpa"], ["attention.denoise"]),
        (["attention.denoise=sdpa", "+attention.vision=x"], []),
        (["attentio=sdpa", "attention.den=1"], ["attention.vision", "attention.denoise"]),
        (["~attention"], []),
    ],
)
def test_what_the_command_line_names_wins(typed, left):
    named = NamedSpace(
        sweep=("attention.vision=eager,sdpa", "attention.denoise=eager,sdpa", "seed_=1,2")
    )
    assert [*named.join(typed).dimensions] == (
        ["seed_", *left] if left == ["attention"] else [*left, "seed_"]
    )


def test_a_space_of_which_nothing_is_left():
    with pytest.raises(UserError, match="Leave out an override"):
        NamedSpace(sweep=("attention=eager,sdpa",)).join(["attention=aiter"])


def test_steps_keep_what_stood_before_and_replace_what_is_said_again():
    assert points(STEPS.join([])) == [
        ["compile=default", "attention=sdpa"],
        ["compile=default", "attention=sdpa", "graph=manual"],
        ["compile=default", "attention=eager", "graph=manual", "attention.denoise=sdpa"],
    ]


def test_the_command_line_wins_over_steps_too_and_multiplies_them():
    space = STEPS.join(["graph=none", "workload=seed_b1,openpi"])
    assert points(space)[2:4] == [
        ["graph=none", "compile=default", "attention=sdpa", f"workload={w}"]
        for w in ("seed_b1", "openpi")
    ]
    assert space.combinations() == 6


def test_the_order_of_steps_is_no_part_of_the_identity_but_their_content_is():
    turned = NamedSpace(steps={"b": ("graph=manual",), "a": ("compile=default",)}).join([])
    space = NamedSpace(steps={"a": ("graph=manual",)}).join([])
    other = NamedSpace(steps={"a": ("graph=none",)}).join([])
    assert space.hash() != other.hash()
    assert turned.hash() == turned.hash() != space.hash()


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_every_space_composes_on_every_machine_and_every_start_runs_somewhere(lines, file):
    space, compose = lines(f"space={file.stem}")
    ran = set()
    for name, machine in MACHINES.items() if space.dimensions else ():
        if file.stem == "compile" and name not in ("cpu", "h100"):  # a second each
            continue
        Points(space, compose, machine).check()
        ready, found = prepare(space, compose, machine, allow_lossy=False)
        assert 0 < found.distinct <= found.sensible, name
        points = Points(ready, compose, machine)
        for start, params in [*ready.start.items(), ("", next(iter(ready.all())))]:
            assert params.keys() == ready.dimensions.keys()
            with contextlib.suppress(NotSensibleError):
                points.config(params)
                ran.add(start)
    named = NamedSpace.model_validate(yaml.safe_load(file.read_text()))
    assert {*space.start} == {*named.start} == ran - {""}
    assert bool(space.dimensions) == (file.stem != "none")


def test_full_sweeps_every_knob_and_every_option_there_is(lines):
    space, _ = lines("space=full")
    heads = {key.split(".")[0] for key in space.dimensions}
    assert heads == {knob.name for knob in KNOBS}
    for head in heads & set(space.dimensions):
        options = {file.stem for file in (conf_dir() / head).glob("*.yaml")}
        # compile=seeds is a set of keys, each of which is swept.
        assert set(space.dimensions[head].values) == options - {
            "seeds" if head == "compile" else ""
        }
    for key in set(space.dimensions) - heads:
        # A list, as blas.fp8.stages, has no values that the schema could name.
        if not key.startswith("compile.inductor") and ".launch_" not in key and key_values(key):
            assert len(space.dimensions[key].values) == len(key_values(key)), key


def test_the_ladder_has_the_seven_steps_of_the_seeds(lines):
    space, compose = lines("space=ladder", "platform=cuda")
    configs = [Points(space, compose, MACHINES["h100"]).config(params) for params in space.all()]
    changes = [
        {name for name in cfg.knobs if cfg.knobs[name] != before.knobs[name]}
        for before, cfg in itertools.pairwise(configs)
    ]
    assert changes == [
        {"graph"},
        {"attention"},
        {"fusion"},
        {"fusion"},
        {"compile"},
        {"vision", "compile"},
    ]
    assert configs[-1].knobs["compile"] == lines_option("compile", "seeds")


def lines_option(group: str, option: str) -> object:
    values = yaml.safe_load((conf_dir() / group / f"{option}.yaml").read_text())
    return Config.parse({group: values}).knobs[group]


def test_dead_values_go_and_the_default_comes_first(lines):
    space, compose = lines("space=attention")
    ready, _ = prepare(space, compose, MACHINES["cpu"], allow_lossy=False)
    assert {key: list(d.values) for key, d in ready.dimensions.items()} == {
        "attention.vision": ["eager", "sdpa", "flash", "math"],
        "attention.prefill": ["eager", "sdpa", "flash", "math"],
        "attention.denoise": ["eager", "sdpa", "flash", "math"],
        "compile": ["off", "default"],
        "graph": ["none"],
    }
    assert ready.count == ready.combinations() == 128


def test_lossy_options_take_part_only_when_asked(lines):
    space, compose = lines("space=full", "platform=cuda")
    machine = MACHINES["h100"]
    without, _ = prepare(space, compose, machine, allow_lossy=False)
    allowed, _ = prepare(space, compose, machine, allow_lossy=True)
    assert "fp8" not in without.dimensions["blas"].values
    assert "fp8" in allowed.dimensions["blas"].values
    typed, compose = lines("space=attention", "blas=fp8", "platform=cuda", "graph=none")
    _, found = prepare(typed, compose, machine, allow_lossy=False)
    assert {reason.kind for reason in found.left_out} >= {"lossy"}
    with pytest.raises(UserError, match=r"objective\.allow_lossy=true"):
        require_some(typed, found)


def test_what_a_knob_refuses_is_no_point_of_a_named_space_and_one_of_a_typed_one(lines):
    space, compose = lines("space=attention")
    refused = {**next(iter(space.all())), "graph": "manual"}
    with pytest.raises(NotSensibleError, match="graph=manual"):
        Points(space, compose, MACHINES["cpu"]).config(refused)
    typed, compose = lines("graph=manual,none")
    assert Points(typed, compose, MACHINES["cpu"]).config({"graph": "manual"})


@pytest.mark.parametrize(
    ("start", "word"),
    [
        ({"a": ("graph=manual",)}, "graph"),
        ({"a": ("nonsense",)}, "nonsense"),
        ({"a": ("attention=triton",)}, "attention=triton"),
    ],
)
def test_a_start_that_the_space_does_not_sweep(lines, start, word):
    _, compose = lines()
    named = NamedSpace(sweep=("attention=eager,sdpa",), start=start)
    with pytest.raises(UserError, match=word):
        prepare(named.join([]), compose, MACHINES["cpu"], allow_lossy=False)


@pytest.mark.parametrize(
    ("key", "expected"),
    [
        ("attention.denoise", ["eager", "sdpa", "aiter", "triton"]),
        ("fusion.qkv", [False, True]),
        ("simplify.kv_buffer", [False, True]),
        ("compile.inductor.freezing", [None, False, True]),
        ("compile.inductor.triton.multi_kernel", [None, 0, 1, 2, 3]),
        ("workload.batch_size", []),
        ("compile.inductor.max_fusion_size", []),
        ("compile.inductor", []),
        ("attention.speed", []),
        ("attention", []),
        ("nothing.at.all", []),
    ],
)
def test_values_of_a_key_come_from_the_schema(key, expected):
    found = key_values(key)
    assert found[:1] == expected[:1]
    assert set(map(repr, found)) >= set(map(repr, expected))
    assert bool(found) == bool(expected)


def test_glob_over_a_key():
    space = Space.parse(["compile.inductor.triton.multi_kernel=glob(*,exclude=[2,'3'])"])
    texts = space.dimensions["compile.inductor.triton.multi_kernel"].values
    assert list(texts) == ["null", "0", "1"]
    assert [parse_override(f"x={text}").value() for text in texts] == [None, 0, 1]


def test_full_has_every_key_that_a_space_or_a_preset_uses(lines):
    """A key itself, or its whole group; a group that is chosen also by the keys below it."""
    full, compose = lines("space=full")
    keys = set(full.dimensions)
    used: set[str] = set()
    for file in FILES:
        named = NamedSpace.model_validate(yaml.safe_load(file.read_text()))
        words = [*named.sweep, *itertools.chain(*named.steps.values(), *named.start.values())]
        used |= {parse_override(word).key_or_group for word in words}
    plain = compose.compose([]).values
    for file in sorted((conf_dir() / "preset").glob("*.yaml")):
        document = yaml.safe_load(file.read_text())
        for entry in document["defaults"]:
            used |= {name.removeprefix("override /") for name in entry}
        used |= {key for name in BY_NAME for key in _leaves(name, document.get(name), plain[name])}
    for key in used - {"environment"}:
        below = any(other.startswith(f"{key}.") for other in keys)
        group, _, leaf = key.partition(".")
        chosen = group in keys and leaf in ("", "mode", "backend", "variables")
        assert key in keys or below or chosen or group == "environment", key


def _leaves(name: str, value: object, other: object = None) -> list[str]:
    """Keys below `name` that differ from `other`."""
    if isinstance(value, dict):
        others = other if isinstance(other, dict) else {}
        parts = ((f"{name}.{key}", part, others.get(key)) for key, part in value.items())
        return [leaf for part in parts for leaf in _leaves(*part)]
    return [] if value in (None, other) else [name]


@pytest.mark.parametrize("word", ["space.start={}", "space.start={captured:['graph=manual']}"])
def test_start_points_of_the_command_line_replace_those_of_the_file(lines, word):
    space, _ = lines("space=full", word)
    assert space.start == ({} if "{}" in word else {"captured": {"graph": "manual"}})


def test_starts_are_chosen_by_name(lines):
    space, _ = lines("space=full")
    assert chosen_starts(space, None) is space
    assert chosen_starts(space, ()).start == {}
    assert list(chosen_starts(space, ("captured",)).start) == ["captured"]
    with pytest.raises(UserError, match=r"no point fastest; it has searched"):
        chosen_starts(space, ("fastest",))
