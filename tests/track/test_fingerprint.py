import dataclasses
import json
import platform as python_platform
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
from track_samples import CPU, H100

from openpi_opt import machine
from openpi_opt.config import Platform
from openpi_opt.paths import package_dir
from openpi_opt.track import fingerprint as module
from openpi_opt.track.fingerprint import differences, fingerprint, fingerprint_hash


def test_says_which_gpu_runs():
    fp = fingerprint(H100)
    assert fp["gpu"]["name"] == "NVIDIA H100"
    assert fp["gpu"]["driver"] == "570.1"
    assert fingerprint(H100, Platform(device="cpu"))["gpu"] is None
    assert fingerprint(CPU)["gpu"] is None
    second = dataclasses.replace(H100.gpus[0], index=1, name="other")
    both = dataclasses.replace(H100, gpus=(*H100.gpus, second))
    assert fingerprint(both, Platform(device="cuda", gpu=1))["gpu"]["name"] == "other"


def test_is_plain_data_without_host_or_user():
    text = json.dumps(fingerprint(machine.probe()))
    assert python_platform.node() not in text
    assert str(Path.home()) not in text


def test_imports_nothing_heavy_and_is_fast():
    code = (
        "import sys; from openpi_opt import machine; from openpi_opt.track import fingerprint as f;"
        "f.fingerprint_hash(f.fingerprint(machine.probe()));"
        "print([m for m in ('torch', 'mlflow', 'optuna', 'triton') if m in sys.modules])"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]"
    found = machine.probe()
    times = []
    for _ in range(5):
        start = time.process_time()
        fingerprint(found)
        times.append(time.process_time() - start)
    assert min(times) < 0.1


@pytest.mark.parametrize(
    ("key", "value", "same"),
    [
        ("cpu", "other", False),
        ("triton", "9.9", False),
        ("source_hash", "other", True),
        ("torch", {"version": "9", "cuda": None, "hip": None}, False),
        ("aiter", {"kind": "amd", "version": "1"}, False),
        ("gpu", {"name": "x", "uuid": "u", "arch": "sm90", "driver": "1"}, False),
        ("git", "other-dirty", True),
        ("memory_mib", 1, True),
        ("cores", 1, True),
        ("mlflow", "0", True),
        ("os", "other", True),
    ],
)
def test_hash_covers_what_changes_numbers(key, value, same):
    fp = fingerprint(CPU)
    changed = {**fp, key: value}
    assert (fingerprint_hash(changed) == fingerprint_hash(fp)) is same
    assert bool(differences(fp, changed)) is not same
    assert all(text.startswith(key.split("_")[0]) for text in differences(fp, changed))


def test_equal_gpus_share_a_hash():
    other = dataclasses.replace(H100, gpus=(dataclasses.replace(H100.gpus[0], uuid="GPU-zzz"),))
    assert fingerprint_hash(fingerprint(other)) == fingerprint_hash(fingerprint(H100))
    driver = dataclasses.replace(H100, gpus=(dataclasses.replace(H100.gpus[0], driver="580"),))
    assert fingerprint_hash(fingerprint(driver)) != fingerprint_hash(fingerprint(H100))
    assert len(fingerprint_hash(fingerprint(H100))) == 12


def test_hash_survives_json():
    fp = fingerprint(H100)
    assert fingerprint_hash(json.loads(json.dumps(fp))) == fingerprint_hash(fp)


def test_source_hash_follows_edits_and_git_only_ones_own(tmp_path, monkeypatch):
    copy = tmp_path / "repo" / "openpi_opt"
    shutil.copytree(package_dir(), copy, ignore=shutil.ignore_patterns("__pycache__"))
    monkeypatch.setattr(module, "package_dir", lambda: copy)
    before = module.source_hash()
    (copy / "errors.py").write_text("# edited\n")
    assert module.source_hash() != before
    git = ["git", "-C", str(copy.parent), "-c", "user.name=t", "-c", "user.email=t@t"]
    subprocess.run(["git", "init", "-q", str(tmp_path)], check=True)
    subprocess.run([*git, "add", "."], check=True)
    subprocess.run([*git, "commit", "-qm", "x"], check=True)
    assert module.git_revision() is None  # somebody else's repository, further up
    subprocess.run([*git, "init", "-q", str(copy.parent)], check=True)
    subprocess.run([*git, "add", "."], check=True)
    subprocess.run([*git, "commit", "-qm", "x"], check=True)
    clean = module.git_revision()
    assert clean is not None
    assert len(clean) == 40
    (copy / "errors.py").write_text("# again\n")
    assert module.git_revision() == f"{clean}-dirty"
    monkeypatch.setenv("PATH", "/nonexistent")
    assert module.git_revision() is None
