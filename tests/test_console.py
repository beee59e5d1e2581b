"""The console script: its verbs, its errors, its completion."""

import os
import pkgutil
import subprocess
import sys

import pytest

import openpi_opt
from openpi_opt.__main__ import bash, candidates
from openpi_opt.paths import package_dir
from openpi_opt.verbs import VERBS

# Run by other verbs, or by themselves to be started anew.
NO_VERBS = {"trial", "experiment", "instances"}  # run by others


def console(*words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "openpi_opt", *words],
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": str(package_dir().parent)},
    )


def test_every_verb_is_listed():
    found = set()
    for module in pkgutil.iter_modules(openpi_opt.__path__):
        path = package_dir() / module.name
        source = path / "__main__.py" if module.ispkg else path.with_suffix(".py")
        if source.exists() and "cli.run(" in source.read_text(encoding="utf-8"):
            found.add(module.name)
    assert found - NO_VERBS <= set(VERBS), "add it to openpi_opt/verbs.py"
    listing = console().stdout
    for verb in VERBS.values():
        assert f"  {verb.name} " in listing
        assert (package_dir() / verb.name).with_suffix(".py").exists() or (
            package_dir() / verb.name / "__main__.py"
        ).exists(), verb.name


def test_a_verb_runs_as_it_does_alone():
    done = console("compare", "absent", "--store", "/nowhere")
    assert done.returncode == 2
    assert done.stderr.startswith("error: store=/nowhere: does not exist")
    assert "usage: python -m openpi_opt.compare" in console("compare", "--help").stdout


def test_an_unknown_verb_names_the_nearest():
    done = console("swep")
    assert done.returncode == 2
    assert "no verb 'swep'. Did you mean sweep?" in done.stderr


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("openpi-opt swe", ["sweep "]),
        ("openpi-opt sweep -m gra", ["graph="]),
        ("openpi-opt sweep -m graph=ma", ["manual"]),
        ("openpi-opt sweep -m graph=none,ma", ["none,manual"]),
        ("openpi-opt sweep preset=h1", None),
        ("openpi-opt doctor x", []),
        ("openpi-opt sweep ../../etc=", []),
    ],
)
def test_completion(line, expected):
    found = candidates([line])
    assert (found == expected) if expected is not None else ("h100" in found)


def test_completion_of_studies(tmp_path, monkeypatch):
    (tmp_path / "mlruns" / "studies" / "first").mkdir(parents=True)
    (tmp_path / "mlruns" / "studies" / "first" / "study.json").write_text("{}")
    monkeypatch.chdir(tmp_path)
    assert candidates(["openpi-opt compare fi"]) == ["first "]
    assert "complete -o nospace" in bash("openpi-opt")


PROGRAM = """
import sys
from openpi_opt import cli
def main():
    print("5.0 \u00b1 0.1 \u2502 \u250f\u2501 \u2588 \u00fc \u00d7 \u03bb")
    print("Z\u00fcrich \u2192", file=sys.stderr)
    return 0
cli.run(main)
"""


def program(redirect: str, **env: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["sh", "-c", f'"$0" -c "$1" {redirect}', sys.executable, PROGRAM],
        capture_output=True,
        text=True,
        encoding="utf-8",
        env=os.environ | {"PYTHONPATH": str(package_dir().parent)} | env,
    )


def test_a_stream_that_is_ascii_gets_plain_characters():
    done = program("", PYTHONIOENCODING="ascii")
    assert (done.returncode, done.stdout) == (0, "5.0 +- 0.1 | +- # u x ?\n")
    assert done.stderr == "Zurich ->\n"
    assert "\u00b1" in program("", PYTHONIOENCODING="utf-8").stdout


def test_stdout_may_be_closed_or_full():
    assert program(">&-").returncode == program(">&- 2>&-").returncode == 0
    full = program(">/dev/full")
    assert full.returncode == 2
    assert full.stderr.endswith(
        "error: stdout takes no more: No space left on device. What is recorded is kept.\n"
    )
