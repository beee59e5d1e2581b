"""Latency by prompt length and camera, the exact layout beside the flexible one, first answers.

    python experiments/0008-robot/measure.py OUT.json [--mini]

Both policies live in one process and take turns, block by block. --mini: pi0_mini on a CPU.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

import openpi_opt
from openpi_opt import runtime
from openpi_opt.guest import as_measured
from openpi_opt.pi0.inputs import Inputs
from openpi_opt.pi0.precision import cast
from openpi_opt.pi0.workload import make_inputs

FAST = ["workload=any_prompt"]
MINI = ["model=pi0_mini", "platform=cpu", "attention=sdpa", "workload.steps=2"]
LENGTHS = (1, 6, 12, 20, 24, 30, 36, 42, 48)
CAMERAS = ([1, 1, 1], [1, 1, 0], [0, 1, 1], [1, 0, 0])


def timed(call: Callable[[], object], count: int, device: torch.device) -> float:
    """Milliseconds per call over `count` calls: device time on a GPU."""
    if device.type == "cpu":
        start = time.perf_counter()
        for _ in range(count):
            call()
        return 1e3 * (time.perf_counter() - start) / count
    first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    first.record()
    for _ in range(count):
        call()
    last.record()
    last.synchronize()
    return first.elapsed_time(last) / count


def blocks(calls: dict[str, Callable[[], object]], rounds: int, count: int, device: torch.device):
    """Milliseconds of each call in `rounds` blocks, the calls in turn."""
    found: dict[str, list[float]] = {name: [] for name in calls}
    for number in range(rounds):
        order = list(calls) if number % 2 == 0 else list(calls)[::-1]
        for name in order:
            found[name].append(timed(calls[name], count, device))
    return found


def distance(actual: torch.Tensor, expected: torch.Tensor) -> float:
    difference = (actual.double() - expected.double()).norm()
    return float(difference / expected.double().norm())


def kernels(call: Callable[[], object], count: int = 3) -> dict[str, float]:
    """Microseconds of each kernel in one call."""
    kinds = [torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=kinds) as profile:
        for _ in range(count):
            call()
        torch.cuda.synchronize()
    times = {e.key: e.self_device_time_total / count for e in profile.key_averages()}
    return dict(sorted(times.items(), key=lambda item: -item[1])[:30])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path)
    parser.add_argument("--mini", action="store_true")
    arguments = parser.parse_args()
    preset, overrides = ("h100", FAST) if not arguments.mini else (None, [*FAST, *MINI])
    rounds, count = (24, 20) if not arguments.mini else (2, 1)
    record: dict[str, object] = {}

    def loaded(*more: str) -> openpi_opt.ReadyPolicy:
        return openpi_opt.load_policy(preset, overrides=[*overrides, *more])

    flexible = loaded()
    record["cold"] = {"load_s": flexible.load_seconds, "first_answer_s": flexible.warm_up()}
    exact = loaded("workload.layout=exact")
    record["second"] = {"load_s": exact.load_seconds, "first_answer_s": exact.warm_up()}
    print({key: record[key] for key in ("cold", "second")}, flush=True)
    policy = flexible._prepared.policy
    device, workload = policy.device, runtime.workload_of(flexible.config)
    base = make_inputs(workload, policy.config, 1, device)

    def masked(tokens: int, cameras: list[int]) -> Inputs:
        token_mask = (torch.arange(workload.prompt_slots) < tokens)[None].to(device)
        image_mask = torch.tensor([cameras], device=device).bool()
        return base._replace(token_mask=token_mask, image_mask=image_mask)

    def call(ready: openpi_opt.ReadyPolicy, inputs: Inputs) -> Callable[[], torch.Tensor]:
        return lambda: ready.call(inputs)

    with as_measured():
        full = masked(48, [1, 1, 1])
        plain = runtime.build_policy(flexible.config, device)
        single = plain
        wide = [single.sample_actions(masked(n, c)) for n, c in ((48, CAMERAS[0]), (7, CAMERAS[2]))]
        cast(plain, policy.dtype)
        found = {}
        for wanted, (tokens, cameras) in zip(
            wide, ((48, CAMERAS[0]), (7, CAMERAS[2])), strict=True
        ):
            inputs = masked(tokens, cameras)
            found[f"{tokens} {cameras}"] = {
                "plain": distance(plain.sample_actions(inputs), wanted),
                "flexible": distance(flexible.call(inputs), wanted),
            }
        found["48 [1, 1, 1]"]["exact"] = distance(exact.call(full), wide[0])
        record["distance_from_float32"] = found
        del plain, single
        print(found, flush=True)
        pair = {"flexible": call(flexible, full), "exact": call(exact, full)}
        for ready in pair.values():
            timed(ready, 2 * count, device)
        record["pair_ms"] = blocks(pair, rounds, count, device)
        lengths = {str(n): call(flexible, masked(n, CAMERAS[0])) for n in LENGTHS}
        record["length_ms"] = blocks(lengths, max(2, rounds // 3), count, device)
        cameras = {str(c): call(flexible, masked(48, c)) for c in CAMERAS}
        record["camera_ms"] = blocks(cameras, max(2, rounds // 3), count, device)
        if device.type == "cuda":
            record["kernels_us"] = {name: kernels(ready) for name, ready in pair.items()}
            record["gpu"] = torch.cuda.get_device_name()
    arguments.out.write_text(json.dumps(record, indent=1))
    first, second = (np.array(record["pair_ms"][name]) for name in ("flexible", "exact"))
    print(f"flexible {np.median(first):.3f} ms, exact {np.median(second):.3f} ms, ratio "
          f"{np.median(first / second):.4f}")  # fmt: skip
    for name in ("length_ms", "camera_ms"):
        print(name, {key: round(float(np.median(v)), 3) for key, v in record[name].items()})


if __name__ == "__main__":
    with torch.no_grad():
        main()
