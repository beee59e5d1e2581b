"""Every test that a document names is there."""

import re
from pathlib import Path

import pytest

TESTS = Path(__file__).parent
DOCS = TESTS.parent / "docs"


@pytest.mark.parametrize(("document", "least"), [("engine.md", 50), ("measurement.md", 90)])
def test_every_test_that_is_named_exists(document, least):
    text = (DOCS / document).read_text(encoding="utf-8")
    source, named = "", 0
    for file, test in re.findall(r"`(test_\w+\.py)?(?:::(test_\w+))?`", text):
        if not file and not test:
            continue
        if file:
            source = "".join(path.read_text(encoding="utf-8") for path in TESTS.rglob(file))
            assert source, file
        assert f"def {test}(" in source or not test, f"{file}::{test}"
        named += 1
    assert named >= least
