"""A robot that only asks: a closed loop at a fixed rate, and where the time of its answers goes.

Every 1/HZ seconds it sends an observation and waits for the actions. An answer after the next tick
is a missed deadline; ticks that pass meanwhile are skipped, as a robot's are.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from openpi_opt.robot.spec import Robot

PARTS = ("network", "queue", "transform", "upload", "model", "download", "rest")


def observation(robot: Robot, rng: np.random.Generator, size: int = 224) -> dict[str, Any]:
    """A random observation of the robot, its images [size, size, 3] uint8."""
    seen: dict[str, Any] = {robot.prompt: "pick up the black bowl"}
    for key in robot.cameras.values():
        seen[key] = rng.integers(0, 256, (size, size, 3), dtype=np.uint8)
    for key, dims in robot.state.items():
        seen[key] = rng.uniform(0.1, 0.9, dims).astype(np.float32)
    return seen


def loop(
    ask: Callable[[Mapping[str, Any]], Mapping[str, Any]],
    seen: Callable[[], Mapping[str, Any]],
    hz: float,
    seconds: float,
) -> dict[str, Any]:
    """Ask at `hz` for `seconds` -> the samples: milliseconds by part, late answers, skipped ticks.
    `ask` sends an observation and returns the answer with the server's timing."""
    period, start = 1.0 / hz, time.perf_counter()
    tick, late, skipped = 0, 0, 0
    samples: list[dict[str, float]] = []
    while tick * period < seconds:
        due = start + tick * period
        time.sleep(max(0.0, due - time.perf_counter()))
        message = seen()
        sent = time.perf_counter()
        answer = ask(message)
        done = time.perf_counter()
        samples.append({"at_s": sent - start, "late_start": 1e3 * (sent - due)})
        samples[-1] |= parts(1e3 * (done - sent), answer)
        passed = int((done - start) / period)
        late += done > due + period
        skipped += passed - tick
        tick = max(tick, passed) + 1
    return {"hz": hz, "seconds": seconds, "samples": samples, "late": late, "skipped": skipped}


def parts(total: float, answer: Mapping[str, Any]) -> dict[str, float]:
    """Milliseconds of a round trip by part; coding of messages counts to the network."""
    server, policy = answer["server_timing"], answer["policy_timing"]
    own = {name: float(policy[f"{name}_ms"]) for name in PARTS[2:6]}
    infer, queue = float(server["infer_ms"]), float(server["queue_ms"])
    rest = infer - sum(own.values())
    return {"total": total, "network": total - infer - queue, "queue": queue, **own, "rest": rest}


def report(runs: Sequence[Mapping[str, Any]]) -> str:
    """A table of the round trips of each robot, and where the time goes."""
    head = " ".join(f"{name:>7}" for name in ("p50", "p95", "p99", "max", "jitter"))
    lines = [f"{'robot':<6} {'asked':>6} {head}  ms"]
    for index, run in enumerate(runs):
        total = np.array([sample["total"] for sample in run["samples"]])
        p50, p95, p99 = np.percentile(total, (50, 95, 99))
        figures = (p50, p95, p99, total.max(), total.std())
        text = " ".join(f"{figure:7.2f}" for figure in figures)
        lines.append(
            f"{index:<6} {len(total):>6} {text}  {run['late']} late of {len(total)} at "
            f"{run['hz']:g} Hz, {run['skipped']} ticks skipped"
        )
    lines.append(f"{'part':<10} {'mean':>7} {'p99':>7}  ms")
    every = [sample for run in runs for sample in run["samples"]]
    for part in PARTS:
        values = np.array([sample[part] for sample in every])
        lines.append(f"{part:<10} {values.mean():7.2f} {np.percentile(values, 99):7.2f}")
    return "\n".join(lines)


def plot(runs: Sequence[Mapping[str, Any]], file: Path) -> None:
    """Round trips over time beside the deadline, and the mean of each part, as a PNG."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4), layout="constrained")
    trips, shares = figure.subplots(1, 2, width_ratios=(3, 1))
    for index, run in enumerate(runs):
        at, total = ([s[key] for s in run["samples"]] for key in ("at_s", "total"))
        trips.plot(at, total, ".", markersize=3, label=f"robot {index}")
    trips.axhline(1e3 / runs[0]["hz"], color="0.5", linestyle="--", label="deadline")
    trips.set(xlabel="s", ylabel="round trip, ms", ylim=(0, None))
    trips.legend()
    every, bottom = [sample for run in runs for sample in run["samples"]], 0.0
    for part in PARTS:
        mean = float(np.mean([sample[part] for sample in every]))
        shares.bar(["mean"], [mean], bottom=bottom, label=part)
        bottom += mean
    shares.legend(fontsize="small")
    figure.savefig(file, dpi=120)


def main(argv: Sequence[str] | None = None) -> int:
    """One robot against a running server; its samples go to a file, or their table to stdout."""
    from websockets.sync.client import connect

    from openpi_opt.robot.spec import load
    from openpi_opt.serve import wire

    parser = argparse.ArgumentParser(
        prog="python -m openpi_opt.serve.fake_robot", description=main.__doc__
    )
    parser.add_argument("robot", help="name or YAML file, as the server's")
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=8000)
    parser.add_argument("--hz", type=float, default=50.0)
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--size", type=int, default=224, help="height and width of the images")
    parser.add_argument("--out", type=Path, help="write the samples as JSON")
    arguments = parser.parse_args(argv)
    robot, rng = load(arguments.robot), np.random.default_rng(arguments.seed)
    pool = [observation(robot, rng, arguments.size) for _ in range(8)]
    uri = f"ws://{arguments.host}:{arguments.port}"
    with connect(uri, compression=None, max_size=None) as server:
        wire.unpack(server.recv())

        def ask(message: Mapping[str, Any]) -> Mapping[str, Any]:
            server.send(wire.pack(message))
            answer = server.recv()
            if isinstance(answer, str):
                raise RuntimeError(f"the server answered: {answer}")
            return wire.unpack(answer)

        ask(pool[0])
        numbers = rng.integers(len(pool), size=int(arguments.hz * arguments.seconds) + 2)
        order = iter(numbers)
        run = loop(ask, lambda: pool[next(order)], arguments.hz, arguments.seconds)
    if arguments.out is None:
        print(report([run]))
    else:
        arguments.out.write_text(json.dumps(run))
    return 0


if __name__ == "__main__":
    sys.exit(main())
