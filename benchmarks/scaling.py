"""Latency of presets against horizon, cameras and batch, in whole captured calls.

    python -m benchmarks.scaling --out FILE.json [--rounds 3] [--only horizon,cameras,batch]
    python -m benchmarks.scaling --plot FILE.json

Each point is a contender of `benchmarks.contenders`: a process of its own. Points of one group are
interleaved, and the first point of every group is the same, so that a clock that moves is seen.
The file is written after each group. `--plot` draws one figure for each axis beside the file.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from benchmarks.contenders import Contender, contest, report

GROUP = 6
"""processes at a time: each keeps 8 GB of GPU memory and more for batches"""
BASE = "preset=h100 workload=any_prompt"
LOSSY = "fusion.vision_mlp=false blas.backend=fp8 blas.fp8.stages=[vision,prefill]"
CAMERAS = ("[true,false,false]", "[true,true,false]", "[true,true,true]")


def points(axis: str, lossy: Sequence[int]) -> Iterator[tuple[str, str]]:
    """Name and overrides of the points of an axis; batches of `lossy` are measured in FP8, too."""
    if axis == "horizon":
        for horizon in (10, 20, 30, 40, 50):
            yield f"horizon {horizon}", f"{BASE} workload.horizon={horizon}"
    elif axis == "cameras":
        for count, active in enumerate(CAMERAS, 1):
            words = f"{BASE} vision=skip_masked workload.active_cameras={active}"
            yield f"cameras {count}", words
    else:
        for batch in (1, 2, 4, 8, 16, 32, 64):
            yield f"batch {batch}", f"{BASE} workload.batch_size={batch}"
        for batch in lossy:
            yield f"fp8 {batch}", f"{BASE} {LOSSY} workload.batch_size={batch}"


def run(axes: Sequence[str], rounds: int, lossy: Sequence[int], out: Path) -> None:
    """Measure every point in groups, and write what is known after each of them."""
    wanted = [point for axis in axes for point in points(axis, lossy)]
    first, rows = ("first", BASE), []
    for start in range(0, len(wanted), GROUP - 1):
        group = [first, *wanted[start : start + GROUP - 1]]
        with tempfile.TemporaryDirectory() as folder:
            contenders = [Contender(name, words, Path(folder)) for name, words in group]
            contest(contenders, rounds)
            rows += report(contenders)
            for one in contenders:
                one.process.kill()
                one.process.wait()
        out.write_text(json.dumps(rows, indent=1))


def plot(file: Path) -> None:
    """One figure for each axis: milliseconds of a call, and for batches samples a second."""
    import matplotlib.pyplot as plt

    rows: list[dict[str, Any]] = [r for r in json.loads(file.read_text()) if r.get("ms")]
    for axis in ("horizon", "cameras", "batch"):
        figure, axes = plt.subplots(figsize=(6, 4))
        for name, label in ((axis, "bf16"), ("fp8" if axis == "batch" else "", "fp8, lossy")):
            found = [
                (int(r["name"].split()[1]), r["ms"])
                for r in rows
                if r["name"].startswith(name + " ")
            ]
            if not found:
                continue
            x, ms = zip(*sorted(found), strict=True)
            y = [1000 * n / t for n, t in found] if axis == "batch" else ms
            axes.plot(x, y, marker="o", label=label)
            for point in zip(x, y, strict=True):
                axes.annotate(f"{point[1]:.4g}", point, textcoords="offset points", xytext=(0, 6))
        if not axes.lines:  # the file holds no point of this axis
            plt.close(figure)
            continue
        axes.set_xlabel(axis)
        axes.set_ylabel("samples/s" if axis == "batch" else "ms a call")
        if axis == "batch":
            axes.set_xscale("log", base=2)
        axes.set_ylim(bottom=0)
        axes.legend()
        figure.tight_layout()
        figure.savefig(file.with_name(f"{file.stem}_{axis}.png"), dpi=120)


def main() -> None:
    """Measure, or plot what was measured."""
    parser = argparse.ArgumentParser(description="Latency against horizon, cameras and batch.")
    parser.add_argument("--out", type=Path, help="JSON file of all points")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="draw a file that was written")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--only", default="horizon,cameras,batch")
    parser.add_argument("--fp8", default="1,16,64", help="batches that are measured in FP8, too")
    options = parser.parse_args()
    if options.plot is not None:
        plot(options.plot)
        return
    if options.out is None:
        parser.error("give --out FILE.json, or --plot FILE.json")
    lossy = [int(text) for text in options.fp8.split(",") if text]
    run(options.only.split(","), options.rounds, lossy, options.out)


if __name__ == "__main__":
    main()
