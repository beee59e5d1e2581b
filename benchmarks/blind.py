"""A search that knows nothing, and what each minute of it brings: `python -m benchmarks.blind`.

Sweeps `space=full` without starting points or a preset for so many minutes and leaves journal and
curve in a folder, brought up to date while it runs. Run again with the same store it goes on.
`--beside preset=h100` measures a preset as one of its trials, to compare with. `--sampler tpe`
searches in another way, as a study of its own, and `--start` begins with the space's starting
points: the informed search.
"""

from __future__ import annotations

import argparse
import gzip
import json
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

from openpi_opt.criteria import Criteria
from openpi_opt.result import Ok
from openpi_opt.track import study_plots
from openpi_opt.track.journal import Journal

_EVERY_SECONDS = 10.0
_ALONE = ("warmup", "guard", "measure", "profile", "energy")  # phases that have the device


def main(argv: list[str] | None = None) -> int:
    """Run the sweeps one after the other; 0 when all of them had an ok trial."""
    own, words = _parser().parse_known_args(argv)
    own.out.mkdir(parents=True, exist_ok=True)
    worst = 0
    for sampler in own.sampler or ["stages"]:
        study = f"{'informed' if own.start else 'blind'}-{sampler}"
        command = ["space=full", f"sampler={sampler}", f"minutes={own.minutes:g}", *words]
        command += [] if own.start else ["start=[]"]
        if own.carry:
            command += ["--known", str(own.carry)]
        if own.beside:
            command += ["--beside", " ".join([own.beside, *words])]
        worst = max(worst, _sweep(own, study, command))
    return worst


def _sweep(own: argparse.Namespace, study: str, words: list[str]) -> int:
    """One sweep, reported while it runs."""
    command = [sys.executable, "-m", "benchmarks.carried", f"store={own.store}", f"study={study}"]
    print("+", " ".join([*command[1:], *words]), flush=True)
    began = time.monotonic()
    sweep = subprocess.Popen([*command, *words])
    try:
        while sweep.poll() is None:
            time.sleep(_EVERY_SECONDS)
            _report(own.store, study, own.out, time.monotonic() - began)
    except KeyboardInterrupt:
        sweep.send_signal(signal.SIGINT)
        sweep.wait()
    seconds = time.monotonic() - began
    print(f"exit {sweep.returncode} after {seconds:.0f} s", flush=True)
    print("\n".join(_report(own.store, study, own.out, seconds)), flush=True)
    return sweep.returncode


def _report(store: Path, study: str, out: Path, seconds: float) -> list[str]:
    """Copy what there is of a study, and describe it in lines."""
    folder = store / "studies" / study
    if not (folder / "journal.jsonl").exists():
        return [f"{study}: nothing was recorded"]
    records = Journal.read(folder).records()
    with (
        (folder / "journal.jsonl").open("rb") as plain,
        gzip.open(out / f"{study}.jsonl.gz", "wb") as packed,
    ):
        shutil.copyfileobj(plain, packed)
    found = study_plots.steps(records, Criteria.load(folder) or Criteria())
    outcomes = Counter(record.result.outcome for record in records)
    phases: Counter[str] = Counter()
    for record in records:
        phases.update(record.result.phase_seconds)
    timed = [r for r in records if isinstance(r.result, Ok)]
    summary = {
        "trials": len(records),
        "outcomes": dict(outcomes),
        "sweep_seconds": round(seconds, 1),
        "alone_on_device_seconds": round(sum(phases[name] for name in _ALONE), 1),
        "curve": [step._asdict() for step in found],
        "phase_seconds": {name: round(spent, 1) for name, spent in phases.items()},
        "best": min(timed, key=lambda r: r.result.latency.mean_ms).labels if timed else None,  # type: ignore[union-attr]
    }
    (out / f"{study}.json").write_text(json.dumps(summary, indent=1) + "\n")
    lines = [f"{study}: {len(records)} trials, {dict(outcomes)}, phases {summary['phase_seconds']}"]
    lines += [f"  {s.minutes:6.2f} min  trial {s.number:>4}  {s.best_ms:9.3f} ms" for s in found]
    return lines


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.blind",
        description="Search space=full from nothing for some minutes; other words go to the sweep.",
    )
    parser.add_argument("--minutes", type=float, default=30.0, help="of each sweep (default: 30)")
    parser.add_argument("--store", type=Path, default=Path("mlruns"), help="default: mlruns")
    parser.add_argument("--out", type=Path, default=Path("blind"), help="default: blind")
    parser.add_argument(
        "--sampler", action="append", default=[], help="stages (default), tpe, ...; may be repeated"
    )
    parser.add_argument("--carry", type=Path, metavar="JOURNAL", help="see benchmarks.carried")
    parser.add_argument("--start", action="store_true", help="begin with the space's known points")
    parser.add_argument("--beside", metavar="WORD", help="preset=h100: see benchmarks.carried")
    return parser


if __name__ == "__main__":
    raise SystemExit(main())
