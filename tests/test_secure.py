"""What the source never does, and what of the user's environment is never written down.

A real sweep with tokens in its environment is in `process/test_survives.py`.
"""

import json
import re
import subprocess
import sys

from openpi_opt import ui
from openpi_opt.config import Config
from openpi_opt.machine import Machine, TorchBuild
from openpi_opt.paths import package_dir
from openpi_opt.process.environment import PASS_VARIABLE, child_environment
from openpi_opt.process.run import run_trial
from openpi_opt.track.journal import Journal

ROOT = package_dir().parent
DANGERS = [
    "import pickle",
    "from pickle import loads",
    "import os.path, dill",
    "eval('1')",
    "exec(text)",
    "import yaml; yaml.load(text)",
    "import yaml; yaml.unsafe_load(text)",
    "from yaml import unsafe_load",
    "import torch; torch.load(path)",
    "import torch as t; t.load(path, weights_only=False)",
    "import numpy as np; np.load(path, allow_pickle=True)",
    "import subprocess; subprocess.run(line, shell=True)",
    "import subprocess; subprocess.Popen(line, shell=True)",
    "import os; os.system(line)",
    "import os; os.popen(line)",
    "import hydra; hydra.utils.instantiate(cfg)",
]
FINE = "import yaml, subprocess; yaml.safe_load(t); subprocess.run([a], shell=False); m.eval()"


def found_by_ruff(*words: str, source: str = "") -> set[int]:
    """The lines for which the project's rules about running what is read are broken."""
    command = [sys.executable, "-m", "ruff", "check", "--ignore-noqa", "--output-format", "json"]
    done = subprocess.run(
        [*command, *words], input=source, cwd=ROOT, capture_output=True, text=True
    )
    found = [each for each in json.loads(done.stdout) if re.match(r"S\d|TID", each["code"])]
    return {each["location"]["row"] for each in found}


def test_no_source_runs_what_it_reads():
    assert found_by_ruff("openpi_opt", "benchmarks") == set()
    lines = "\n".join([*DANGERS, FINE])
    found = found_by_ruff("--stdin-filename", "openpi_opt/x.py", "-", source=lines)
    assert found == set(range(1, len(DANGERS) + 1))


def test_the_ui_binds_to_loopback():
    assert ui.HOST == "127.0.0.1"
    text = (ROOT / "openpi_opt" / "ui.py").read_text(encoding="utf-8")
    assert '"--host", HOST' in text
    assert "allowed-hosts" not in text


HIDDEN = {
    "HF_TOKEN": "hidden-1",
    "AWS_SECRET_ACCESS_KEY": "hidden-2",
    "OPENAI_API_KEY": "hidden-3",
    "PGPASSWORD": "hidden-4",
    "DATABASE_URL": "postgresql://me:hidden-5@db/x",
    "FAVOURITE_COLOUR": "hidden-6",
    "SLURM_JWT": "hidden-7",
    "CUDA_REGISTRY_PASSWORD": "hidden-8",
    "MY_SECRET_PATH": "hidden-9",
    "PYTHON_INDEX": "https://me:hidden-10@index/simple",
    "http_proxy": "http://me:hidden-11@proxy:1",
    "DATA_PATH": "https://blob/x?se=2027&sig=hidden-12",
    "CFLAGS": "-DURL=me:hidden-13@host",
    "XDG_EXTRA": "password=hidden-14",
    "SLURM_NOTE": "Authorization: Bearer hidden-15",
    "TMPDIR": "ftp://me:hidden-16@host/tmp",
}
NEEDED = {"LD_LIBRARY_PATH": "/lib", "CUDA_HOME": "/cuda", "OMP_NUM_THREADS": "1", "LC_ALL": "C"}
CPU = Machine((), TorchBuild("2.13.0", None, None), "test cpu", cores=2, memory_mib=8000)


def test_a_trial_gets_what_it_needs_and_no_token():
    cfg = Config.parse({"platform": {"device": "cpu"}})
    env = child_environment(cfg, CPU, HIDDEN | NEEDED)
    assert NEEDED.items() <= env.items()
    assert not [name for name, value in env.items() if "hidden" in value]
    more = child_environment(cfg, CPU, HIDDEN | {PASS_VARIABLE: "FAVOURITE_COLOUR,HF_TOKEN"})
    assert sorted(v for v in more.values() if "hidden" in v) == ["hidden-1", "hidden-6"]
    again = child_environment(cfg, CPU, more)  # a process that a trial starts
    assert "FAVOURITE_COLOUR" in again


def test_a_trial_that_prints_all_it_knows_knows_no_token(tmp_path, monkeypatch):
    for name, value in HIDDEN.items():
        monkeypatch.setenv(name, value)
    cfg = Config.parse({"platform": {"device": "cpu"}})
    command = [sys.executable, "-c", "import os, sys; print(dict(os.environ)); sys.exit(3)"]
    result = run_trial(cfg, tmp_path / "t", tmp_path, lambda phase: None, CPU, command=command)
    assert result.outcome == "crashed"
    log = (tmp_path / "t" / "log.txt").read_text()
    assert "PATH" in log
    assert "hidden" not in log + result.model_dump_json()


def test_a_command_is_recorded_without_its_passwords(tmp_path):
    Journal.open(tmp_path / "s", ["-m", "storage=postgresql://me:hidden-1@db/x", "attention=sdpa"])
    text = (tmp_path / "s" / "study.json").read_text()
    assert "hidden" not in text
    assert "storage=postgresql://***@db/x" in text
