"""The verbs, each with one line and an example. A test keeps the list complete."""

from __future__ import annotations

from argparse import ArgumentParser
from dataclasses import dataclass
from typing import Any

from openpi_opt.track.store import DEFAULT_STORE


@dataclass(frozen=True)
class Verb:
    """One verb: `openpi_opt/NAME.py`, or the folder of that name with a `__main__`."""

    name: str
    text: str
    example: str
    takes_overrides: bool = False  # Hydra's `group=option` words
    takes_study: bool = False


_ALL = (
    Verb(
        "sweep", "try configurations, one fresh process each", "-m attention=eager,sdpa",
        takes_overrides=True,
    ),
    Verb(
        "compare", "studies as a table, JSON or CSV", "first --columns p95_ms,p99_ms",
        takes_study=True,
    ),
    Verb("report", "studies as one HTML file", "first --out first.html", takes_study=True),
    Verb("ui", "MLflow's server, open on a study", "first", takes_study=True),
    Verb(
        "promote", "confirm the best of a study as a preset",
        "first --name fast --minutes 30", takes_study=True,
    ),
    Verb("ladder", "build a configuration up, a knob at a time", "preset=h100", True, True),
    Verb("ablate", "take a configuration apart, a knob at a time", "preset=h100", True, True),
    Verb(
        "pairs", "compare two configurations in rounds of fresh processes",
        "graph=manual --a attention=sdpa --b attention=triton", takes_overrides=True,
    ),
    Verb("guard", "what the check of the actions can and cannot see", "model=pi0_mini", True),
    Verb(
        "serve", "a preset behind openpi's websocket protocol",
        "preset=h100 checkpoint=FOLDER robot=libero tokenizer=FILE", takes_overrides=True,
    ),
    Verb("analyze", "where the time goes in a profiler's trace", "trace.json.gz"),
    Verb("kernels", "registers, spills and instructions of the own kernels", "--arch gfx942,sm90"),
    Verb(
        "tune", "matrix products for AMD's tuners",
        "gemm preset=mi350_runbook --out tuned --gpu gfx950:256", True, True,
    ),
    Verb("doctor", "what this machine has and lacks", ""),
    Verb("track", "deliver to MLflow what it lacks", "sync"),
)  # fmt: skip
VERBS = {verb.name: verb for verb in _ALL}


def verb_parser(name: str, description: str, epilog: str = "", **more: Any) -> ArgumentParser:
    """The parser of a verb's command line; its help ends with the verb's example."""
    example = f"example: python -m openpi_opt.{name} {VERBS[name].example}".rstrip()
    return ArgumentParser(
        prog=f"python -m openpi_opt.{name}",
        description=description,
        epilog=f"{epilog}\n{example}".strip(),
        **more,
    )


def add_store(parser: ArgumentParser) -> None:
    """`--store DIR`, of verbs that read studies."""
    parser.add_argument(
        "--store", default=DEFAULT_STORE, metavar="DIR", help="the sweep's store (default: mlruns)"
    )


def add_studies(parser: ArgumentParser) -> None:
    """STUDY [STUDY ...] and `--store`, of verbs that show several studies."""
    parser.add_argument(
        "study",
        nargs="+",
        metavar="STUDY",
        help="name, or the folder of a study of another store (STORE/studies/NAME)",
    )
    add_store(parser)
