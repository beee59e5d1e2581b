"""Hydra's side of `-m`: hands the overrides and a way to compose them to the engine."""

from __future__ import annotations

from hydra.plugins.sweeper import Sweeper
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig


class OpenpiOptSweeper(Sweeper):
    """Runs a study instead of launching a list of jobs.

    The engine is imported when a sweep begins, not with this module: Hydra imports every plugin
    at every start.
    """

    def setup(
        self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig
    ) -> None:
        """Keep what Hydra gives; trials are processes, so the task function is not called."""
        self.hydra_context = hydra_context
        self.config = config

    def sweep(self, arguments: list[str]) -> None:
        """Run the study and end the program with its exit code.

        Raises:
            SystemExit: always, with 0 when at least one trial was ok, else 1.
            UserError: something that the user has to mend.
        """
        from openpi_opt.engine.command import run_command_line
        from openpi_opt.space.composing import SweepCompose, plain
        from openpi_opt.space.settings import Settings

        assert self.hydra_context is not None
        assert self.config is not None
        loader = self.hydra_context.config_loader
        settings = plain(self.config, lenient=True)
        space = Settings.parse(settings).space.join(arguments, loader)
        compose = SweepCompose(loader, self.config)
        raise SystemExit(run_command_line(arguments, settings, space, compose, swept=True))
