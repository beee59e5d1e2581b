"""The guard by mutation: it catches every mistake by a margin, and nothing that is honest."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from benchmarks.guard import Bench, margin_of, variants
from benchmarks.mutations import WORKLOAD, catalogue
from openpi_opt.machine import probe
from openpi_opt.measure import guard
from openpi_opt.pi0.policy import Pi0Policy
from openpi_opt.pi0.workload import Workload

# What the guard is there for; a mutation's name begins with one of these.
MISTAKES = (
    "mask dropped",
    "is_causal misuse",
    "masked camera attended",
    "camera 0 skipped",
    "suffix positions +1",
    "rotary halves swapped",
    "last step left out",
    "time reversed",
    "vision layer",
    "language layer",
    "expert layer",
    "norm weight as w",
    "K/V of layer",
    "padding attended",
    "scale +5%",
    "scale -5%",
    "erf GELU",
    "NaN",
    "zeros",
    "last call's output again",
    "first call's output again",
)
MISTAKES_OF = {
    "pi0": ("state token left out", "state ignored"),
    "pi05": (
        "gates dropped",
        "scale and shift swapped",
        "condition stale by one step",
        "state in the prompt left out",
        "state in the prompt stale",
    ),
}
SUBTLE = ("scale", "erf GELU", "one step fewer, rescheduled", "language layer 2 skipped")
# A masked camera before a valid one, and padding: nothing is right by being first.
MASKED = Workload((False, True), 6, 4, horizon=3, steps=2, batch_size=1)


def bench(seed: int, workload: Workload = WORKLOAD, model: str = "pi0_mini") -> Bench:
    return Bench(model, "cpu", seed, 2, probe(), workload)


def test_no_mistake_is_missing_and_few_are_subtle(either: Pi0Policy) -> None:
    mutations = catalogue(either)
    names = [mutation.name for mutation in mutations]
    assert len(set(names)) == len(names)
    for mistake in MISTAKES + MISTAKES_OF[either.config.family]:
        assert any(name.startswith(mistake) for name in names), mistake
    assert all(m.name.startswith(SUBTLE) for m in mutations if m.subtle)
    assert {m.name for m in mutations if m.float32_only} == {"erf GELU", "scale +5% in vision"}
    assert all((margin_of(m, "float32") or 0) >= 100 for m in mutations)


@pytest.mark.parametrize("model", ["pi0_mini", "pi05_mini"])
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_every_mutation_is_caught_by_its_margin(precision: str, model: str, tmp_path: Path) -> None:
    """float32: 100 times the tolerance. bfloat16: 3 times, subtle ones 1.5 times."""
    found = bench(0, model=model)
    policy = found.plain(precision, tmp_path)
    rows = list(found.mutated(policy, precision))
    assert {row.name: row.multiple for row in rows if row.missed} == {}
    assert 0.0 <= found.references[precision].plain_rel_l2 < 0.01
    # Every mutation restored the policy.
    with torch.no_grad():
        cfg, reference = found.config(precision), found.references[precision]
        report = guard.check(policy.sample_actions, found.inputs, reference, cfg.guard)
    assert report.rel_l2 == reference.plain_rel_l2


@pytest.mark.parametrize(
    ("seed", "precision", "model"),
    [
        (1, "bfloat16", "pi0_mini"),
        (2, "bfloat16", "pi05_mini"),
        (3, "float16", "pi0_mini"),
    ],
)
def test_honest_variants_pass(seed: int, precision: str, model: str, tmp_path: Path) -> None:
    """Weights and inputs of other seeds than the contract test's."""
    found = bench(seed, MASKED, model)
    found.plain(precision, tmp_path)
    # A CPU multiplies float16 slowly: there only what is made of several.
    rows = [
        found.honest(name, precision, knobs)
        for name, knobs in variants("cpu").items()
        if name != "blas=fp8" and not ("." in name and precision == "float16")
    ]
    assert {row.name: row.rel_l2 for row in rows if row.outcome == "wrong"} == {}
    passed = {row.name for row in rows if row.outcome == "ok"}
    assert {"plain", "attention=sdpa", "simplify=all", "all exact, sdpa"} <= passed
    assert all("unavailable" in row.outcome for row in rows if row.outcome != "ok")
