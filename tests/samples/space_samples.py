"""Machines, and what the sweeper makes of a command line, without running it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra._internal.utils import create_automatic_config_search_path
from hydra.core.config_loader import ConfigLoader
from hydra.types import RunMode
from machine_samples import machine

from openpi_opt.machine import AiterPackage, Machine, TorchBuild
from openpi_opt.paths import conf_dir
from openpi_opt.space.composing import SweepCompose, plain
from openpi_opt.space.settings import Settings
from openpi_opt.space.space import Space

AITER = AiterPackage("amd", "0.1.20", "/nowhere")
MACHINES = {
    "cpu": Machine((), TorchBuild("2.13.0", None, None), "x", 2, 8_000),
    "t4": machine("sm75"),
    "h100": machine("sm90", AITER),
    "mi300x": machine("gfx942", AITER),
    "mi350": machine("gfx950"),
}


@dataclass
class CommandLines:
    """Composes as `python -m openpi_opt.sweep -m` does."""

    loader: ConfigLoader

    def __call__(self, *words: str) -> tuple[Space, SweepCompose]:
        master = self.loader.load_configuration("sweep", list(words), RunMode.MULTIRUN)
        named = Settings.parse(plain(master, lenient=True)).space
        return named.join(words, self.loader), SweepCompose(self.loader, master)


def command_lines(conf: Path | None = None) -> CommandLines:
    path = create_automatic_config_search_path(None, None, str(conf or conf_dir()))
    return CommandLines(ConfigLoaderImpl(path))
