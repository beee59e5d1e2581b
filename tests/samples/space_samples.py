"""Machines, and what the sweeper makes of a command line, without running it."""

from dataclasses import dataclass
from pathlib import Path

from machine_samples import machine

from openpi_opt.machine import AiterPackage, Machine, TorchBuild
from openpi_opt.space.compose import Composer
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

    composer: Composer

    def __call__(self, *words: str) -> tuple[Space, Composer]:
        named = Settings.parse(self.composer.settings(words)).space
        return named.join(words, self.composer.options), self.composer


def command_lines(conf: Path | None = None) -> CommandLines:
    return CommandLines(Composer(conf=conf))
