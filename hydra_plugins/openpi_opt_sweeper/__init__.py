"""What Hydra's plugin discovery requires, and no more: the sweeper under a name it accepts.

Hydra imports this in every program that uses it, so it must stay cheap.
"""

from __future__ import annotations

from hydra.core.config_store import ConfigStore

from openpi_opt.engine import sweeper


class OpenpiOptSweeper(sweeper.OpenpiOptSweeper):
    """The sweeper of `openpi_opt.engine.sweeper`; Hydra instantiates no class from elsewhere."""


# The option `hydra/sweeper: openpi_opt`. Its settings are keys of `conf/sweep.yaml`.
ConfigStore.instance().store(
    group="hydra/sweeper",
    name="openpi_opt",
    node={"_target_": "hydra_plugins.openpi_opt_sweeper.OpenpiOptSweeper"},
    provider="openpi_opt",
)
