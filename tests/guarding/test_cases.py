"""What is asked provokes shortcuts: for each kind, some case is one that shows it."""

import itertools
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from openpi_opt.guarding.cases import cases
from openpi_opt.pi0.config import PI0_MINI
from openpi_opt.pi0.inputs import Inputs
from openpi_opt.pi0.workload import Workload


@pytest.fixture(scope="module")
def asked() -> list[Inputs]:
    workload = Workload((True, True), 6, 6, horizon=4, steps=4, batch_size=3)
    return [case.inputs for case in cases(workload, PI0_MINI, seed=0, count=3)]


def same(tensor: Tensor) -> bool:
    """Whether all rows are the same."""
    return torch.equal(tensor, tensor[:1].expand_as(tensor))


# Of one case.
PROVOKED: dict[str, Callable[[Inputs], bool]] = {
    "one noise, other frames": lambda i: same(i.noise) and not same(i.images),
    "one prompt, other frames": lambda i: same(i.tokens) and not same(i.images),
    "one prompt, other states": lambda i: same(i.tokens) and not same(i.state),
    "one state, other frames": lambda i: same(i.state) and not same(i.images),
    "cameras that see nearly the same": lambda i: (
        0.0 < float((i.images[:, 0] - i.images[:, 1]).abs().mean()) < 0.02
    ),
    "a token twice in a row": lambda i: bool((i.tokens[:, 1:] == i.tokens[:, :-1]).any(1).all()),
    "the last token": lambda i: int(i.tokens.max()) == PI0_MINI.vocab_size - 1,
    "a large state": lambda i: float(i.state.abs().max()) > 10.0,
    "large noise": lambda i: float(i.noise.abs().max()) > 10.0,
}
# Of a case and the one before it: what stays as it was while something else changes.
KEPT: dict[str, Callable[[Tensor], Tensor]] = {
    "the upper half": lambda x: x[..., :112, :],
    "the left half": lambda x: x[..., :112],
    "the first patches": lambda x: x[..., :14, :14],
    "a grid": lambda x: x[..., ::2, ::2],
}


@pytest.mark.parametrize("name", PROVOKED)
def test_some_case_provokes(asked, name):
    assert any(PROVOKED[name](inputs) for inputs in asked)


@pytest.mark.parametrize("name", KEPT)
def test_some_case_changes_frames_only_outside_of(asked, name):
    part = KEPT[name]
    pairs = [(old.images, new.images) for old, new in itertools.pairwise(asked)]
    assert any(
        torch.equal(part(old), part(new)) and not torch.equal(old, new) for old, new in pairs
    )


def test_a_case_is_near_the_one_before(asked):
    pairs = [(old.images, new.images) for old, new in itertools.pairwise(asked)]
    assert any(0.005 < float((new - old).abs().mean()) < 0.02 for old, new in pairs)
