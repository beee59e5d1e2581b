"""Every test that docs/measurement.md names is there."""

from __future__ import annotations

import re
from pathlib import Path

TESTS = Path(__file__).parent
DOCUMENT = TESTS.parent / "docs" / "measurement.md"
# Where the names of a part's files begin, and the file of names without one.
PARTS = {"Sure": "measure", "Confirmed": ".", "Explains": "."}
DEFAULT = {"Confirmed": "test_confirm.py"}


def test_every_test_that_is_named_exists() -> None:
    parts = re.split(r"^## (.+)$", DOCUMENT.read_text(encoding="utf-8"), flags=re.MULTILINE)
    titles, texts = parts[1::2], parts[2::2]
    assert titles == list(PARTS)
    named = 0
    for title, text in zip(titles, texts, strict=True):
        for row in (line for line in text.splitlines() if line.startswith("| ")):
            file = DEFAULT.get(title, "")
            for name in re.findall(r"`([^`]*)`", row.split(" | ")[1]):
                path, _, test = name.rpartition("::")
                if not (test.startswith("test_") or test.endswith(".py")):
                    continue
                file = path or (test if test.endswith(".py") else file)
                source = (TESTS / PARTS[title] / file).read_text(encoding="utf-8")
                assert test.endswith(".py") or f"def {test}(" in source, name
                named += 1
    assert named > 90
