import pytest
from command_samples import PRESETS, CommandLine

from openpi_opt.space import prepare


@pytest.fixture
def command(tmp_path, monkeypatch):
    """A working folder of its own, and nothing left behind of what `main` sets."""
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "conf" / "preset"
    folder.mkdir(parents=True)
    for name, text in PRESETS.items():
        (folder / f"{name}.yaml").write_text(text)
    return CommandLine(tmp_path)


@pytest.fixture(autouse=True)
def _short_samples(monkeypatch):
    """Estimates are as long as tests of them need."""
    monkeypatch.setattr(prepare, "SAMPLE_SECONDS", 0.25)
