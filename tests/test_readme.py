"""What the README says of the registry is what the registry says."""

from pathlib import Path

from openpi_opt.knobs.__main__ import table

README = Path(__file__).parent.parent / "README.md"


def test_the_table_of_knobs_is_the_registry() -> None:
    assert table() in README.read_text(encoding="utf-8"), "paste `python -m openpi_opt.knobs`"


def test_the_table_has_a_row_per_knob_with_its_options() -> None:
    rows = table().splitlines()[2:]
    assert len(rows) == len({row.split("|")[1] for row in rows})
    assert all("``" not in row and row.count("|") == 5 for row in rows)
