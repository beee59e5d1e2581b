"""What the documents say of the registries is what those say; links lead somewhere."""

import re
from pathlib import Path

from openpi_opt.knobs.__main__ import files, table
from openpi_opt.verbs import VERBS

ROOT = Path(__file__).parent.parent
PAGE = ROOT / "docs" / "sweeping.md"


def test_what_follows_from_the_registry_is_up_to_date():
    assert table() in PAGE.read_text(encoding="utf-8")
    for path, text in files().items():
        assert path.read_text(encoding="utf-8") == text, "python -m openpi_opt.knobs --write"


def test_the_table_has_a_row_per_knob_with_its_options():
    rows = table().splitlines()[2:]
    assert len(rows) == len({row.split("|")[1] for row in rows})
    assert all("``" not in row and row.count("|") == 5 for row in rows)


def test_the_readme_is_short_and_names_every_verb():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 150
    for verb in VERBS:
        assert re.search(rf"`{verb}[` ]", text), verb


def test_links_lead_somewhere():
    pages = [ROOT / "README.md", *ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")]
    for page in pages:
        for target in re.findall(r"\]\(([^)#\s]+)", page.read_text(encoding="utf-8")):
            if not target.startswith("http"):
                assert (page.parent / target).exists(), f"{page.name}: {target}"
