"""What holds for every knob and every option, run over the registry and the folders of `conf/`."""

import inspect
import itertools
import re
from collections.abc import Collection
from functools import cache
from typing import Any

import pytest
import torch
from mini_policies import (
    CPU,
    MASKED,
    config,
    options,
    plain_actions,
    plain_policy,
    prepare,
    sample_inputs,
)

from openpi_opt.config import Config
from openpi_opt.knobs import BY_NAME, KNOBS
from openpi_opt.knobs.base import Refusal
from openpi_opt.measure import guard
from openpi_opt.pi0 import checkpoint
from openpi_opt.space.compose import compose

pytestmark = pytest.mark.usefixtures("two_layers")
OPTIONS = {knob.name: options(knob.name) for knob in KNOBS}
CASES = [(knob, option) for knob, found in OPTIONS.items() for option in found]
FULL = {"active_cameras": [True], "prompt_slots": 4, "prompt_tokens": 4}

# Options that change the values of the state dict (never its names or shapes), and why. What is
# saved is the same function all the same.
VALUES_CHANGE = {
    ("precision", "bfloat16"): "rounds the weights",
    ("precision", "float16"): "rounds the weights",
    ("simplify", "all"): "folds the gains of norms into the next weights",
}
# Options that are not run here though `check` allows them on a CPU, and why.
NOT_RUN = {
    ("blas", "tunableop_tune"): "writes a file, and tunes nothing on a CPU",
    ("blas", "tunableop_use"): "needs a file that was tuned before",
}
# Options left out of the pairs, and the one that stands for them there.
SAME_TRACE = {
    ("compile", option): "default; they differ in how Inductor generates code, not in the trace"
    for option in OPTIONS["compile"]
    if option not in ("off", "default")
}
SAME_TRACE |= {
    ("environment", option): "stock; variables act in a process of its own"
    for option in OPTIONS["environment"]
    if option != "stock"
}
# The pairs are run in float32.
NOT_FLOAT32 = {("precision", "bfloat16"), ("precision", "float16")}


def chosen(*cases: tuple[str, str], workload: dict[str, Any] | None = None, **base: Any) -> Config:
    return config(workload, **{**base, **{knob: OPTIONS[knob][option] for knob, option in cases}})


def refusal(cfg: Config) -> Refusal | None:
    found = (knob.check(cfg, CPU) for knob in KNOBS)
    return next((reason for reason in found if reason is not None), None)


def runs_here(knob: str, option: str, dtype: str = "float32") -> bool:
    return (knob, option) not in NOT_RUN and (
        refusal(chosen((knob, option), precision={"dtype": dtype})) is None
    )


def is_default(knob: str, option: str) -> bool:
    return BY_NAME[knob].options_type(**OPTIONS[knob][option]) == BY_NAME[knob].options_type()


FLOAT32 = [case for case in CASES if runs_here(*case)]
# Each option in the precisions in which it runs here; those of `precision` bring their own, which
# are the runs of all defaults too.
RUNS = [
    (model, knob, option, dtype)
    for model in ("pi0_mini", "pi05_mini")
    for knob, option in CASES
    for dtype in (["float32"] if knob == "precision" else ["float32", "bfloat16"])
    if runs_here(knob, option, dtype)
    and (knob == "precision" or not is_default(knob, option))
    and ((knob, option) not in SAME_TRACE or (model, dtype) == ("pi0_mini", "float32"))
]


def covering(paired: list[tuple[str, str]]) -> list[tuple[tuple[str, str], ...]]:
    """Few combinations, in which every allowed pair of options of two knobs occurs."""
    pairs = {pair for pair in map(frozenset, itertools.combinations(paired, 2)) if _allowed(pair)}
    rows = []
    while pairs:
        row = sorted(min(pairs, key=sorted))
        for knob in [knob for knob in OPTIONS if knob not in dict(row)]:
            candidates = [case for case in paired if case[0] == knob and _allowed({*row, case})]
            if candidates:
                row.append(max(candidates, key=lambda case: _gain(row, case, pairs)))
        rows.append(tuple(sorted(row)))
        pairs = {pair for pair in pairs if not pair <= set(row)}
    return rows


# The knobs that meet in pi05's expert; elsewhere it is the same as pi0.
IN_THE_EXPERT = ("simplify", "fusion", "attention", "compile")
PAIRED = [case for case in FLOAT32 if case not in SAME_TRACE and case not in NOT_FLOAT32]


def _allowed(cases: Collection[tuple[str, str]]) -> bool:
    """One option of each knob, and nothing that contradicts another."""
    return len(dict(cases)) == len(cases) and refusal(chosen(*cases)) is None


def _gain(
    row: list[tuple[str, str]], case: tuple[str, str], pairs: set[frozenset[tuple[str, str]]]
) -> int:
    return sum(frozenset((other, case)) in pairs for other in row)


@pytest.fixture(autouse=True)
def _process_settings(traced):
    """What knobs configure is undone."""
    precision, tf32 = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    yield
    torch.set_float32_matmul_precision(precision)
    torch.backends.cudnn.allow_tf32 = tf32


@cache
def reference(model: str, dtype: str) -> guard.Reference:
    cfg = config(model={"name": model})
    inputs = [sample_inputs(cfg, seed) for seed in (0, 1)]
    return guard.Reference(
        actions=[plain_actions(cfg, item) for item in inputs],
        plain=[plain_actions(cfg, item, dtype) for item in inputs],
    )


@cache
def defaults() -> Config:
    return compose([])


def judged(call: Any, cfg: Config) -> guard.GuardReport:
    """The guard's verdict: in float32 its limit is 1e-5, else twice the plain policy's distance."""
    inputs = [sample_inputs(cfg, seed) for seed in (0, 1)]
    known = reference(cfg.model.name, cfg.knobs["precision"].dtype)  # type: ignore[attr-defined]
    return guard.check(call, inputs, known, cfg.guard, cfg.lossy())


def test_the_tables_of_exceptions_name_existing_options():
    exceptions = {*VALUES_CHANGE, *NOT_RUN, *SAME_TRACE, *NOT_FLOAT32}
    assert exceptions <= set(CASES)


@pytest.mark.parametrize("knob", BY_NAME)
def test_defaults_are_an_option_and_the_one_that_the_sweep_starts_with(knob):
    default = BY_NAME[knob].options_type()
    assert default in [BY_NAME[knob].options_type(**values) for values in OPTIONS[knob].values()]
    assert defaults().knobs[knob] == default


@pytest.mark.parametrize("knob", BY_NAME)
def test_docstring_names_a_vendor_and_a_source(knob):
    text = inspect.getdoc(type(BY_NAME[knob])) or ""
    assert re.search(r"\b(NVIDIA|AMD|[Aa]ll vendors|[Bb]oth vendors)\b", text)
    assert re.search(r"\b([Ss]ources?|[Rr]eported|guide)\b", text)


@pytest.mark.parametrize(("knob", "option"), CASES)
def test_check_says_nothing_or_why(knob, option):
    found = BY_NAME[knob].check(chosen((knob, option)), CPU)
    assert found is None or (found.outcome in ("unavailable", "invalid") and found.reason)


@pytest.mark.parametrize("workload", [MASKED, FULL], ids=["masked", "full"])
@pytest.mark.parametrize(("knob", "option"), CASES)
def test_canonical_form_is_stable(knob, option, workload):
    cfg = chosen((knob, option), workload=workload)
    canonical = cfg.canonical()
    assert canonical.canonical() == canonical
    assert canonical.hash() == cfg.hash()


@pytest.mark.parametrize(("model", "knob", "option", "dtype"), RUNS)
def test_right_numbers_and_the_same_again(model, knob, option, dtype):
    cfg = chosen((knob, option), precision={"dtype": dtype}, model={"name": model})
    prepared, inputs = prepare(cfg), sample_inputs(cfg)
    first = prepared.call(inputs)
    report = judged(prepared.call, cfg)
    assert report.passed, guard.explain(report)
    assert torch.equal(first, prepared.call(inputs))
    if knob != "compile":  # which would only be traced a second time
        assert torch.equal(first, prepare(cfg).call(inputs))


@pytest.mark.parametrize(
    ("model", "knob", "option", "dtype"), [r for r in RUNS if r[1:3] not in SAME_TRACE]
)
def test_weights_are_saved_under_the_original_names(model, knob, option, dtype, tmp_path):
    base: Any = {"precision": {"dtype": dtype}, "model": {"name": model}}
    cfg = chosen((knob, option), **base)
    original, changed = prepare(config(**base)).policy.state_dict(), prepare(cfg).policy
    found = changed.state_dict()
    assert {n: t.shape for n, t in found.items()} == {n: t.shape for n, t in original.items()}
    same = all(torch.equal(found[name], original[name]) for name in original)
    assert same == ((knob, option) not in VALUES_CHANGE)
    checkpoint.save(changed, tmp_path / "model.safetensors")
    loaded = plain_policy(cfg)
    checkpoint.load(loaded, tmp_path / "model.safetensors")
    with torch.no_grad():
        report = judged(loaded.sample_actions, cfg)
    assert report.passed, guard.explain(report)


ROWS = [("pi0_mini", row) for row in covering(PAIRED)] + [
    ("pi05_mini", row) for row in covering([case for case in PAIRED if case[0] in IN_THE_EXPERT])
]


@pytest.mark.parametrize(
    ("model", "row"), ROWS, ids=[" ".join([m, *(f"{k}={o}" for k, o in row)]) for m, row in ROWS]
)
def test_every_pair_of_options_in_some_combination(model, row):
    cfg = chosen(*row, model={"name": model})
    report = judged(prepare(cfg).call, cfg)
    assert report.passed, guard.explain(report)


def test_the_combinations_trace_every_option():
    rows = covering(PAIRED)
    traced = {case for row in rows if ("compile", "default") in row for case in row}
    assert traced == set(PAIRED) - {("compile", "off")}
