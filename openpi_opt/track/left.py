"""What verbs leave in a study's folder for MLflow: tags and verdicts, as JSON lines."""

from __future__ import annotations

import json
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

TAGS_FILE = "tags.jsonl"
VERDICTS_FILE = "verdicts.jsonl"


def leave_verdict(
    study_dir: Path, uid: str, preset: str, figures: Mapping[str, float], text: str
) -> None:
    """Have the outcome of a promotion shown on the run above its processes. `uid` is of one of
    them, `figures` become metrics, `text` (Markdown) the description."""
    line = {"uid": uid, "preset": preset, "figures": json.dumps(dict(figures)), "text": text}
    append_line(study_dir / VERDICTS_FILE, line)


def leave_tag(study_dir: Path, uid: str, key: str, value: str) -> None:
    """Have a tag set on the run of a record, when MLflow has it."""
    append_line(study_dir / TAGS_FILE, {"uid": uid, "key": key, "value": value})


def append_line(path: Path, line: Mapping[str, Any]) -> None:
    """Begins with a newline, so that a torn line before it does no harm."""
    with path.open("a", encoding="utf-8") as file:
        file.write("\n" + json.dumps(line))


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The objects of a file of JSON lines; a line that cannot be read is none."""
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines() if path.exists() else []
    found: list[dict[str, Any]] = []
    for line in lines:
        with suppress(ValueError):
            parsed = json.loads(line)
            if isinstance(parsed, dict):
                found.append(parsed)
    return found
