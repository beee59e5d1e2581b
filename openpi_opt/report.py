"""Write a study, or several, as one HTML file: `python -m openpi_opt.report STUDY [STUDY ...]`."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from openpi_opt import cli
from openpi_opt.errors import UserError
from openpi_opt.result import write_atomic
from openpi_opt.track.store import find_studies
from openpi_opt.verbs import add_studies, verb_parser


def main(argv: Sequence[str] | None = None) -> int:
    """Write the file and print its path."""
    arguments = _parser().parse_args(argv)
    print(write(find_studies(arguments.store, arguments.study), arguments.out))
    return 0


def write(folders: Sequence[Path], out: Path | None = None) -> Path:
    """Write the report of studies, given by their folders; without `out` into the first one. Raises
    UserError: a damaged study, or a file that cannot be written."""
    from openpi_opt.track.html_report import html

    path = out or folders[0] / "report" / "report.html"
    text = html(folders)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(path, text)
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror or error}.") from error
    return path


def _parser() -> argparse.ArgumentParser:
    parser = verb_parser(
        "report",
        description=(
            "Write one self-contained HTML file: the best, a table with intervals, stages against "
            "their floors, importance of knobs, kernel categories, ladder, flags, how to "
            "reproduce. Several studies share a table where machine, software and workload are "
            "equal, and stand side by side where they are not."
        ),
    )
    add_studies(parser)
    parser.add_argument(
        "--out", type=Path, metavar="FILE", help="default: report/report.html of the first study"
    )
    return parser


if __name__ == "__main__":
    cli.run(main)
