"""A search that knows nothing, and what each minute of it brings: `python -m benchmarks.blind`.

Sweeps `space=full` without starting points or a preset for so many minutes and leaves journal,
table, curve and its plot in a folder. Run again with the same store it goes on: the second call of
a budget carries what the first one found. `--beside` measures a preset in the same store
afterwards, to compare with. `--sampler tpe` searches in another way, as a study of its own, and
`--start` begins with the space's starting points: the informed search.
"""

from __future__ import annotations

import argparse
import gzip
import json
import shutil
import subprocess
import sys
import time
from pathlib import Path

from openpi_opt.criteria import Criteria
from openpi_opt.result import Ok
from openpi_opt.track import curve
from openpi_opt.track.journal import Journal


def main(argv: list[str] | None = None) -> int:
    """Run the sweeps one after the other; 0 when all of them had an ok trial."""
    own, words = _parser().parse_known_args(argv)
    own.out.mkdir(parents=True, exist_ok=True)
    worst = 0
    for sampler in own.sampler or ["stages"]:
        study = f"{'informed' if own.start else 'blind'}-{sampler}"
        command = ["space=full", f"sampler={sampler}", f"minutes={own.minutes:g}", *words]
        command += [] if own.start else ["start=[]"]
        worst = max(worst, _sweep(own.store, study, command))
        _report(own.store, study, own.out)
    if own.beside:
        fixed = [word for word in words if "glob(" not in word]
        worst = max(worst, _sweep(own.store, "beside", [f"preset={own.beside}", *fixed]))
        _report(own.store, "beside", own.out)
    return worst


def _sweep(store: Path, study: str, words: list[str]) -> int:
    command = [sys.executable, "-m", "openpi_opt.sweep", f"store={store}", f"study={study}", *words]
    print("+", " ".join(command[1:]), flush=True)
    began = time.monotonic()
    code = subprocess.call(command)
    print(f"exit {code} after {time.monotonic() - began:.0f} s", flush=True)
    return code


def _report(store: Path, study: str, out: Path) -> None:
    """Copy what there is of a study, and print it in short."""
    folder = store / "studies" / study
    if not (folder / "journal.jsonl").exists():
        print(f"{study}: nothing was recorded")
        return
    records = Journal.read(folder).records()
    with (
        (folder / "journal.jsonl").open("rb") as plain,
        gzip.open(out / f"{study}.jsonl.gz", "wb") as packed,
    ):
        shutil.copyfileobj(plain, packed)
    criteria = Criteria.load(folder) or Criteria()
    found = curve.steps(records, criteria)
    outcomes = [record.result.outcome for record in records]
    waited = sum(r.result.phase_seconds.get("wait", 0.0) for r in records)
    phases: dict[str, float] = {}
    for record in records:
        for phase, seconds in record.result.phase_seconds.items():
            phases[phase] = phases.get(phase, 0.0) + seconds
    summary = {
        "trials": len(records),
        "outcomes": {name: outcomes.count(name) for name in dict.fromkeys(outcomes)},
        "curve": [step._asdict() for step in found],
        "phase_seconds": {name: round(seconds, 1) for name, seconds in phases.items()},
        "waited_seconds": round(waited, 1),
        "best": min(
            (record for record in records if isinstance(record.result, Ok)),
            key=lambda record: record.result.latency.mean_ms,  # type: ignore[union-attr]
        ).labels
        if "ok" in outcomes
        else None,
    }
    (out / f"{study}.json").write_text(json.dumps(summary, indent=1) + "\n")
    print(f"{study}: {len(records)} trials, {summary['outcomes']}")
    for step in found:
        print(f"  {step.minutes:6.2f} min  trial {step.number:>4}  {step.best_ms:9.3f} ms")


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
    parser.add_argument("--start", action="store_true", help="begin with the space's known points")
    parser.add_argument("--beside", metavar="PRESET", help="measure this preset afterwards")
    return parser


if __name__ == "__main__":
    raise SystemExit(main())
