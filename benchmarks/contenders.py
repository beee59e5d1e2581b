"""Whole captured calls of several configurations, interleaved, each in a process of its own.

    python -m benchmarks.contenders --out FILE.json [--rounds 12] \
        "today: preset=h100 workload=openpi" "new: preset=h100 workload=openpi fusion.suffix=true"

Every process compiles and captures once, beside the others, and then waits; the controller lets
them measure one after the other, round after round, so that a clock that moves moves all alike. A
process that waits does not disturb. `tree=FOLDER` runs another checkout, with this file in it;
`tables=FILE` takes the launches that `benchmarks.tune` wrote. The
distance is that of the actions from the plain eager policy in float32. For a quick decision: what
is claimed is confirmed by `openpi_opt.promote`.
"""

from __future__ import annotations

import argparse
import faulthandler
import json
import os
import select
import statistics
import subprocess
import sys
import tempfile
import time
import traceback
from pathlib import Path
from typing import Any, TextIO

import torch
from filelock import FileLock
from safetensors.torch import load_file, save_file

from benchmarks import tune
from openpi_opt import runtime
from openpi_opt.config import Config
from openpi_opt.knobs import KNOBS
from openpi_opt.machine import probe
from openpi_opt.pi0.inputs import Inputs
from openpi_opt.pi0.workload import make_inputs
from openpi_opt.space.compose import compose

REPLAYS = 30
WARM_S = 0.5
MOST_S = 2.0
"""for the calls of a round; five are made in any case"""
LIMIT_S = 150
"""to the first actions; then a process says where it is and fails"""


def _config(words: str) -> tuple[Config, str | None]:
    """The configuration of a command line, and why it cannot run."""
    given = words.split()
    preset = next((w.removeprefix("preset=") for w in given if w.startswith("preset=")), None)
    cfg = compose([w for w in given if not w.startswith("preset=")], preset=preset)
    machine = probe()
    cfg = cfg.resolved(machine)
    refusals = [knob.check(cfg, machine) for knob in KNOBS]
    return cfg, next((r.reason for r in refusals if r is not None), None)


def _reference(cfg: Config, folder: Path, inputs: Inputs) -> torch.Tensor:
    """Actions of the plain eager float32 policy, once for each model and workload."""
    load = cfg.workload
    file = folder / f"{cfg.model.name}-{load.name}-{load.batch_size}-{load.horizon}.pt"
    if not file.exists():
        policy = runtime.build_policy(cfg, runtime.torch_device(cfg))
        with torch.no_grad():
            save_file({"actions": policy.sample_actions(inputs).cpu().contiguous()}, file)
        del policy
        torch.cuda.empty_cache()
    return load_file(file)["actions"]


def contend(words: str, folder: Path, out: TextIO) -> None:
    """A contender: prepares, says so on `out`, and measures for each line it is sent."""
    began = time.monotonic()
    faulthandler.dump_traceback_later(LIMIT_S, exit=True)
    given = words.split()
    for word in given:
        if word.startswith("tables="):
            tune.read(Path(word.removeprefix("tables=")))
    cfg, refusal = _config(" ".join(word for word in given if not word.startswith("tables=")))
    if refusal is not None:
        print(json.dumps({"failed": refusal}), file=out, flush=True)
        return
    device = runtime.torch_device(cfg)
    with FileLock(folder / f"memory{os.getpid() % 2}.lock"):  # in float32 a policy takes 14 GB
        policy = runtime.build_policy(cfg, device)
        call = runtime.apply_knobs(policy, cfg).call
        torch.cuda.empty_cache()
    inputs = make_inputs(runtime.workload_of(cfg), policy.config, 0, device)
    actions = call(inputs).cpu()
    faulthandler.cancel_dump_traceback_later()
    print(json.dumps({"ready_s": time.monotonic() - began}), file=out, flush=True)
    for line in sys.stdin:
        if line.startswith("reference"):
            torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
            expected = _reference(cfg, folder, inputs)
            error = (actions.double() - expected.double()).norm() / expected.double().norm()
            print(json.dumps({"error": float(error)}), file=out, flush=True)
            continue
        print(json.dumps({"ms": _measure(call, inputs)}), file=out, flush=True)


def _measure(call: Any, inputs: Inputs) -> list[float]:
    """Milliseconds of `REPLAYS` calls, after half a second of the same load."""
    wait = torch.cuda.synchronize if inputs.images.is_cuda else lambda: None
    until, times = time.monotonic() + WARM_S, []
    while len(times) < REPLAYS and (len(times) < 5 or time.monotonic() < until + MOST_S):
        began = time.perf_counter()
        call(inputs)
        wait()
        if time.monotonic() > until:
            times.append((time.perf_counter() - began) * 1000)
    return times


class Contender:
    """One process."""

    def __init__(self, name: str, words: str, folder: Path) -> None:
        self.name, self.words = name, words
        self.medians: list[float] = []
        self.facts: dict[str, Any] = {}
        self.log = folder / f"{name}.log"
        tree = next((w.removeprefix("tree=") for w in words.split() if w.startswith("tree=")), ".")
        variables = {"TORCHINDUCTOR_COMPILE_THREADS": "4", **os.environ}
        variables["PYTHONPATH"] = f"{Path(tree).resolve()}:{os.environ.get('PYTHONPATH', '')}"
        words = " ".join(w for w in words.split() if not w.startswith("tree="))
        self.process = subprocess.Popen(
            [sys.executable, "-m", "benchmarks.contenders", "--contend", words, "--folder", folder],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self.log.open("w"), text=True,
            env=variables, cwd=tree,
        )  # fmt: skip

    def read(self, seconds: float | None = None) -> bool:
        """The next answer; False when none comes in time or it says that the process failed."""
        assert self.process.stdout is not None
        if not select.select([self.process.stdout], [], [], seconds)[0]:
            self.facts["failed"] = "not ready in time"
            self.process.kill()
            return False
        line = self.process.stdout.readline()
        self.facts |= json.loads(line) if line else {"failed": self.log.read_text()[-3000:]}
        return "failed" not in self.facts

    def ask(self, what: str) -> bool:
        """Send a line and read the answer."""
        assert self.process.stdin is not None
        print(what, file=self.process.stdin, flush=True)
        return self.read()


def contest(contenders: list[Contender], rounds: int, seconds: float = LIMIT_S) -> None:
    """Wait for all, `seconds` at most, then measure those in turn that are ready."""
    alive, until = [], time.monotonic() + seconds
    for contender in contenders:
        if contender.read(max(0.0, until - time.monotonic())):
            alive.append(contender)
        took = contender.facts.get("ready_s") or contender.facts.get("failed")
        print(f"{contender.name}: {took}", file=sys.stderr, flush=True)
    for number in range(rounds):
        for contender in alive if number % 2 == 0 else reversed(alive):
            if contender.ask("measure"):
                contender.medians.append(statistics.median(contender.facts["ms"]))
        print([round(c.medians[-1], 3) for c in alive if c.medians], file=sys.stderr, flush=True)


def report(contenders: list[Contender]) -> list[dict[str, Any]]:
    """A line for each, the difference from the first within the rounds."""
    rows = []
    for one in contenders:
        row: dict[str, Any] = {"name": one.name, "words": one.words, "medians": one.medians}
        row |= {k: one.facts.get(k) for k in ("ready_s", "error", "failed")}
        if one.medians:
            first = contenders[0].medians
            differences = [a - b for a, b in zip(one.medians, first, strict=False)]
            row["ms"] = statistics.median(one.medians)
            row["difference"] = statistics.median(differences) if differences else None
            spread = f"{min(differences):+.3f} to {max(differences):+.3f}" if differences else ""
            print(f"{one.name:28} {row['ms']:8.3f} ms  {spread:20} error {row['error']}")
        else:
            print(f"{one.name:28} failed: {row['failed']}")
        rows.append(row)
    return rows


def main() -> None:
    """Start the contenders, let them contend, print and write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("contenders", nargs="*", metavar="'NAME: OVERRIDES'")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--ready", type=float, default=LIMIT_S, metavar="SECONDS",
                        help="who is not ready then does not take part")  # fmt: skip
    parser.add_argument("--contend", help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.contend is not None:
        out, sys.stdout = sys.stdout, sys.stderr
        try:
            contend(options.contend, options.folder, out)
        except BaseException:
            print(json.dumps({"failed": traceback.format_exc()[-1500:]}), file=out, flush=True)
            raise
        finally:
            os._exit(0)  # workers of the compiler may keep a failed process from ending
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        given = [text.partition(":")[::2] for text in options.contenders]
        contenders = [Contender(n.strip(), words.strip(), folder) for n, words in given]
        contest(contenders, options.rounds, options.ready)
        for one in (None, *contenders):
            if one is None or (one.medians and one.ask("reference")):
                rows = report(contenders)
                if options.out is not None:
                    options.out.write_text(json.dumps(rows, indent=1))
        for one in contenders:
            one.process.kill()


if __name__ == "__main__":
    main()
