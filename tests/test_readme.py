"""What the README says of the registry is what the registry says."""

from pathlib import Path

from openpi_opt.knobs.__main__ import files, table

README = Path(__file__).parent.parent / "README.md"


def test_what_follows_from_the_registry_is_up_to_date() -> None:
    assert table() in README.read_text(encoding="utf-8")
    for path, text in files().items():
        assert path.read_text(encoding="utf-8") == text, "python -m openpi_opt.knobs --write"


def test_the_table_has_a_row_per_knob_with_its_options() -> None:
    rows = table().splitlines()[2:]
    assert len(rows) == len({row.split("|")[1] for row in rows})
    assert all("``" not in row and row.count("|") == 5 for row in rows)
