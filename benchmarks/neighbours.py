"""A trial alone and beside neighbours that are stopped: what these do to its latency.

    python -m benchmarks.neighbours [--neighbours 6] [--rounds 4] [--running] [group=option ...]

One process builds the policy of the configuration and measures blocks of calls; neighbours build
the same policy and call it without end. In each round they are stopped, as `process.schedule` stops
them, for a block; with --running there is one beside them while they run, too. Then they are ended
and as many blocks are measured alone. Printed are means, p50 and p99 in ms, and the difference of
the means with stopped neighbours and alone, with its 95% interval.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.table import Table

from openpi_opt import cli
from openpi_opt.config import Config
from openpi_opt.machine import probe
from openpi_opt.paths import package_dir
from openpi_opt.process import watcher
from openpi_opt.process.environment import child_environment
from openpi_opt.session import composed

STOP_SECONDS, SETTLE_SECONDS = 10.0, 0.1


def build(cfg: Config):
    """The call of a configuration, once compiled and warm, and its inputs."""
    import torch

    from openpi_opt import runtime
    from openpi_opt.measure import clock
    from openpi_opt.pi0.workload import make_inputs

    device = runtime.torch_device(cfg)
    policy = runtime.build_policy(cfg, device)
    observation = make_inputs(runtime.workload_of(cfg), policy.config, cfg.workload.seed, "cpu")
    inputs = clock.upload(observation, device)
    prepared = runtime.apply_knobs(policy, cfg)
    del policy
    gc.collect()
    if device.type == "cuda":  # float32 was cast; six processes have no room for both
        torch.cuda.empty_cache()
    for _ in range(3):
        prepared.call(inputs).cpu()
    return prepared.call, observation, inputs


def neighbour(cfg: Config) -> None:
    """Call without end, and say when that begins."""
    call, _, inputs = build(cfg)
    os.write(1, b"ready\n")
    while True:
        call(inputs).cpu()


class Blocks:
    """Blocks of timed calls of one policy in this process."""

    def __init__(self, cfg: Config, iterations: int):
        self.cfg, self.iterations = cfg, iterations
        self.call, self.observation, self.inputs = build(cfg)

    def block(self) -> list[float]:
        """Milliseconds of each call."""
        from openpi_opt.measure import clock

        return clock.time_calls(self.call, self, 10, self.iterations, self.cfg.device).samples_ms

    def upload(self):
        """The same inputs in fresh memory, for `clock.Feed`."""
        from openpi_opt import runtime
        from openpi_opt.measure import clock

        return clock.upload(self.observation, runtime.torch_device(self.cfg))

    def renew(self, inputs) -> None:
        """Nothing: the inputs stay as they are."""

    def keep(self, inputs, output) -> None:
        """Nothing is looked at."""

    def warm(self, seconds: float) -> None:
        """Load, before the first block."""
        until = time.monotonic() + seconds
        while time.monotonic() < until:
            self.call(self.inputs).cpu()


def start(cfg: Config, count: int) -> list[subprocess.Popen[str]]:
    """Neighbours that are calling."""
    words = [sys.executable, "-m", "benchmarks.neighbours", "--neighbour", json.dumps(cfg.dump())]
    env = child_environment(cfg, probe()) | {"PYTHONPATH": os.pathsep.join(sys.path)}
    begun = []
    for _ in range(count):  # one by one: each holds a float32 policy at its beginning
        each = subprocess.Popen(words, stdout=subprocess.PIPE, text=True, env=env)
        begun.append(each)
        assert each.stdout is not None
        if each.stdout.readline() != "ready\n":
            raise SystemExit("a neighbour did not come up")
    return begun


def measure(cfg: Config, own: argparse.Namespace) -> dict[str, list[list[float]]]:
    """Blocks by situation."""
    found: dict[str, list[list[float]]] = {"stopped": [], "running": [], "alone": []}
    blocks = Blocks(cfg, own.iterations)
    others = start(cfg, own.neighbours)
    blocks.warm(own.warm)
    try:
        for _ in range(own.rounds):
            if left := watcher.stop_below(os.getpid(), STOP_SECONDS):
                raise SystemExit(f"not stopped: {left}")
            time.sleep(SETTLE_SECONDS)
            found["stopped"] += [blocks.block()]
            watcher.continue_below(os.getpid())
            time.sleep(0.5)
            if own.running:
                found["running"] += [blocks.block()]
    finally:
        for each in others:
            each.kill()
            each.wait()
    time.sleep(0.5)
    blocks.warm(own.warm)
    found["alone"] = [blocks.block() for _ in range(own.rounds)]
    return found


def table(found: dict[str, list[list[float]]], cfg: Config, neighbours: int) -> Table:
    """Figures of each situation, block by block and all together."""
    title = f"{cfg.model.name} on {cfg.device}: alone, and beside {neighbours} neighbours"
    made = Table("neighbours", "blocks' means, ms", "mean", "p50", "p99", title=title)
    for name, blocks in found.items():
        if blocks:
            whole = np.concatenate([np.asarray(block) for block in blocks])
            means = " ".join(f"{np.mean(block):.3f}" for block in blocks)
            figures = [whole.mean(), *np.percentile(whole, (50, 99))]
            made.add_row(name, means, *(f"{value:.3f}" for value in figures))
    return made


def difference(found: dict[str, list[list[float]]]) -> str:
    """Stopped against alone: relative difference of the blocks' means, Welch's interval."""
    from scipy import stats

    stopped, alone = ([np.mean(block) for block in found[k]] for k in ("stopped", "alone"))
    interval = stats.ttest_ind(stopped, alone, equal_var=False).confidence_interval(0.95)
    low, middle, high = (
        value / np.mean(alone)
        for value in (interval.low, np.mean(stopped) - np.mean(alone), interval.high)
    )
    return f"stopped against alone: {middle:+.3%} (95% interval {low:+.3%} to {high:+.3%})"


def main(words: Sequence[str] | None = None) -> int:
    """Measure and print; with --out the samples as JSON, too."""
    options = argparse.ArgumentParser(prog="python -m benchmarks.neighbours")
    options.add_argument("--neighbours", type=int, default=6)
    options.add_argument("--rounds", type=int, default=4)
    options.add_argument("--iterations", type=int, default=100, help="calls of a block")
    options.add_argument("--warm", type=float, default=3.0, help="seconds of load before blocks")
    options.add_argument("--running", action="store_true", help="also beside running ones")
    options.add_argument("--out", type=Path, help="file for all samples")
    options.add_argument("--neighbour", help=argparse.SUPPRESS)
    options.add_argument("overrides", nargs="*", help="as of a sweep: model=pi0_mini platform=cpu")
    own = options.parse_args(words)
    if own.neighbour:
        neighbour(Config.load(json.loads(own.neighbour)))
    cfg = composed(own.overrides, None).resolved(probe())
    found = measure(cfg, own)
    console = Console(soft_wrap=True)
    console.print(table(found, cfg, own.neighbours))
    console.print(difference(found))
    if own.out:
        own.out.write_text(json.dumps({"config": cfg.dump(), "samples_ms": found}))
    return 0


if __name__ == "__main__":
    sys.path.insert(0, str(package_dir().parent))
    cli.run(main)
