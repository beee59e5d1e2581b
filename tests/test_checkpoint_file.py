from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from openpi_opt.checkpoint_file import inspect
from openpi_opt.errors import UserError


@pytest.fixture
def good(tmp_path: Path) -> Path:
    path = tmp_path / "model.safetensors"
    save_file({"a": torch.ones(3, 4), "b": torch.zeros(5)}, path)
    return path


def test_a_file_and_its_folder_are_accepted(good: Path) -> None:
    assert inspect(str(good)) == str(good)
    assert inspect(str(good.parent)) == str(good.parent)


@pytest.mark.parametrize("suffix", [".pt", ".pth", ".bin", ".pkl", ".ckpt"])
def test_pickles_are_refused_with_the_reason(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"model{suffix}"
    path.touch()
    with pytest.raises(UserError, match="pickles, which can run code"):
        inspect(str(path))


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"model\.safetensors does not exist"):
        inspect(str(tmp_path))


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(cut=st.integers(min_value=1))
def test_a_truncated_file_never_passes(good: Path, cut: int) -> None:
    data = good.read_bytes()
    part = good.parent / "part.safetensors"
    part.write_bytes(data[: len(data) - 1 - cut % len(data)])
    with pytest.raises(UserError, match=r"truncated|damaged"):
        inspect(str(part))


@given(junk=st.binary(max_size=64))
def test_junk_never_passes(tmp_path_factory: pytest.TempPathFactory, junk: bytes) -> None:
    path = tmp_path_factory.mktemp("junk") / "x.safetensors"
    path.write_bytes(junk)
    with pytest.raises(UserError):
        inspect(str(path))
