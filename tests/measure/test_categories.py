from pathlib import Path

import pytest

from openpi_opt.measure.categories import CATEGORIES, RULES, categorise

LINES = (Path(__file__).parent / "kernel_names.tsv").read_text(encoding="utf-8").splitlines()
NAMED = [tuple(line.split("\t")) for line in LINES if not line.startswith("#")]


@pytest.mark.parametrize(("category", "name"), NAMED)
def test_names(category, name):
    assert categorise(name) == category


def test_case_does_not_matter():
    for category, name in NAMED:
        if category != "other":
            assert categorise(name.upper()) == category, name


def test_the_suffix_of_rocprof_does_not_matter():
    for category, name in NAMED:
        if not name.startswith("aten::"):
            assert categorise(name.removesuffix(".kd") + ".kd") == category, name


def test_each_rule_decides_for_a_listed_name():
    used = {
        next(i for i, (_, rule) in enumerate(RULES) if rule.search(name))
        for _, name in NAMED
        if any(rule.search(name) for _, rule in RULES)
    }
    assert [RULES[i] for i in range(len(RULES)) if i not in used] == []


def test_every_category_has_names():
    assert {category for category, _ in NAMED} == set(CATEGORIES)
