"""What a sweep survives, with real processes: interruptions, MLflow, disks, clocks, company."""

import contextlib
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import optuna
import pytest
from hosts import Host, wait_for
from mlflow_server import Server
from quick import QUICK
from search_samples import CPU
from terminal_samples import ROOT, Shell, held, trials_of

from openpi_opt.config import Config
from openpi_opt.process.run import run_trial
from openpi_opt.result import Failed
from openpi_opt.track.journal import Journal

pytestmark = pytest.mark.filterwarnings("ignore:The ``noload`` loader strategy:DeprecationWarning")


def sweep_in(folder: Path, *words: str, **env: str) -> Shell:
    path = os.pathsep.join(filter(None, [env.pop("site", ""), str(ROOT)]))
    argv = ["-m", "openpi_opt.sweep", *words, *QUICK, "study=s", "baseline=false"]
    return Shell(folder, argv, PYTHONPATH=path, OPENPI_OPT_LEASES=str(folder / "leases"), **env)


def open_runs(uri: str) -> tuple[int, list[str]]:
    """How many runs MLflow has, and the names of those that are still running."""
    from mlflow import MlflowClient

    client = MlflowClient(uri)
    experiments = [e.experiment_id for e in client.search_experiments()]
    runs = client.search_runs(experiments)
    return len(runs), [run.info.run_name for run in runs if run.info.status == "RUNNING"]


def sync(store: Path, env: dict[str, str]) -> int:
    """Deliver to MLflow what it lacks; returns how many records that were."""
    command = [sys.executable, "-m", "openpi_opt.track", "sync", "--store", str(store)]
    done = subprocess.run(command, env=env, cwd=ROOT, capture_output=True, text=True, timeout=180)
    assert done.returncode == 0, done.stderr
    return int(done.stdout.split()[1])


def test_one_ctrl_c_ends_gracefully_and_the_same_command_goes_on(tmp_path):
    words = ["-m", "attention=aiter,sdpa"]  # the first has a result at once
    shell = sweep_in(tmp_path, *words, **HIDDEN)
    journal = tmp_path / "mlruns" / "studies" / "s" / "journal.jsonl"
    shell.wait_for(lambda: list(trials_of(tmp_path)))
    shell.press_ctrl_c()
    said = shell.end()
    assert shell.code == 130
    assert "interrupted: the 1 finished trial(s) are kept, and 1 running ended" in said
    assert "run the same command with study=s" in said
    assert "Traceback" not in said
    wait_for(lambda: not list(trials_of(tmp_path)))
    assert held(tmp_path) == []
    uri = f"sqlite:///{tmp_path}/mlruns/mlflow.db"
    if "track sync" in said:  # a busy host is late, and says so
        sync(tmp_path / "mlruns", dict(os.environ))
    assert open_runs(uri) == (1 + 1, [])
    before = journal.read_bytes()

    shell = sweep_in(tmp_path, *words, **HIDDEN)
    said = shell.end()
    assert shell.code == 0, said
    assert "attention=aiter unavailable" in said
    assert "known, not run again" in said
    assert journal.read_bytes().startswith(before)
    records = Journal.read(journal.parent).records()
    assert [(r.number, r.result.outcome) for r in records] == [(0, "unavailable"), (1, "ok")]
    assert open_runs(uri) == (2 + 1, [])
    assert_nothing_hidden_is_written(tmp_path, said)


# Also in the environment of the sweep above.
HIDDEN = {
    "HF_TOKEN": "hidden-1",
    "AWS_SECRET_ACCESS_KEY": "hidden-2",
    "DATABASE_URL": "postgresql://me:hidden-3@db/x",
    "FAVOURITE_COLOUR": "hidden-4",
}


def assert_nothing_hidden_is_written(folder: Path, said: str) -> None:
    """Neither in journal, logs and configurations, nor in Optuna's and MLflow's databases."""
    files = [path for path in folder.rglob("*") if path.is_file()]
    assert {"journal.jsonl", "mlflow.db", "optuna.db", "log.txt"} <= {path.name for path in files}
    assert list((folder / "mlruns" / "artifacts").rglob("log.txt"))
    assert [path for path in files if b"hidden-" in path.read_bytes()] == []
    assert "hidden-" not in said


# A trial that does not heed SIGTERM, and a sweep that would wait for it for minutes.
DEAF = """
import signal, sys
if any("trial" in word for word in sys.orig_argv):
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
else:
    from openpi_opt.process import child
    child.GRACE_SECONDS = 600.0
"""


def test_two_ctrl_c_end_now(tmp_path):
    site = tmp_path / "site"
    site.mkdir()
    (site / "sitecustomize.py").write_text(DEAF)
    shell = sweep_in(tmp_path, "-m", "weights.seed=0,1", "tracking=none", site=str(site))
    shell.wait_for(lambda: list(trials_of(tmp_path)))
    (trial,) = trials_of(tmp_path)
    shell.wait_for(lambda: ignores_sigterm(trial))
    shell.press_ctrl_c()
    shell.wait_for(lambda: "Ctrl-C again" in " ".join(shell.shown.split()))
    assert list(trials_of(tmp_path)) == [trial], "it has its grace"
    shell.press_ctrl_c()
    said = shell.end(60)
    assert shell.code == 130, said
    assert "Traceback" not in said
    wait_for(lambda: not list(trials_of(tmp_path)) and held(tmp_path) == [])


def ignores_sigterm(pid: int) -> bool:
    status = Path(f"/proc/{pid}/status").read_text()
    ignored = re.search(r"SigIgn:\s*(\w+)", status)
    return ignored is not None and bool(int(ignored[1], 16) >> (signal.SIGTERM - 1) & 1)


def test_a_server_that_hangs_dies_and_comes_back(host, mlflow_server):
    """No sweep stops for it; what it missed is delivered afterwards, once."""
    server = mlflow_server
    open_runs(server.uri)  # the first request makes its database
    host.env |= {"MLFLOW_TRACKING_URI": server.uri, "MLFLOW_HTTP_REQUEST_TIMEOUT": "4"}
    host.env |= {"MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0"}
    sweep = host.start("--seeds", "6", "--seconds", "0.5", "--mlflow", "--wait", "8")
    wait_for(lambda: len(list(host.study.glob("delivered.jsonl"))) == 1)
    server.signal(signal.SIGSTOP)  # accepts connections, and never answers
    wait_for(lambda: len(host.started()) == 6)
    server.signal(signal.SIGKILL)
    _, said = sweep.communicate(timeout=90)
    assert sweep.returncode == 0, said
    assert said.count("warning: MLflow at") == 1
    assert sorted(host.seeds()) == list(range(6)) == sorted(host.started())
    server.start()
    assert 2 <= sync(host.store, host.env) <= 6
    assert sync(host.store, host.env) == 0
    assert open_runs(server.uri) == (6 + 1, [])
    host.assert_tidy()
    interrupted_twice(host, server)


def interrupted_twice(host: Host, server: Server) -> None:
    """The first Ctrl-C waits for a trial alone, and the second one for nothing."""
    host.env |= {"MLFLOW_HTTP_REQUEST_TIMEOUT": "600"}
    (host.folder / "sitecustomize.py").write_text(DEAF)
    host.env["PYTHONPATH"] = os.pathsep.join([str(host.folder), host.env["PYTHONPATH"]])
    sweep = host.start("--seeds", "7", "--seconds", "600", "--mlflow")
    wait_for(lambda: any(map(ignores_sigterm, host.processes())))
    server.signal(signal.SIGSTOP)
    sweep.send_signal(signal.SIGINT)
    assert sweep.stderr is not None
    said = next(line for line in sweep.stderr if line.startswith("interrupted"))
    assert "6 finished trial(s) are kept, and 1 running ended" in said
    time.sleep(0.2)
    assert sweep.poll() is None, "the first one waits for the trial"
    assert host.processes()
    sweep.send_signal(signal.SIGINT)
    sweep.communicate(timeout=60)
    assert sweep.returncode == 130
    wait_for(lambda: not host.processes() and held(host.folder) == [])
    server.signal(signal.SIGCONT)


SEEDS = 8


def assert_clear_end(host: Host, sweep: subprocess.Popen[str]) -> str:
    """A sweep that meets the end of its disk; what it says."""
    _, said = sweep.communicate(timeout=90)
    assert sweep.returncode == 2, said
    assert said.count("error: ") == 1
    assert "Traceback" not in said
    assert 1 <= len(said.partition("error: ")[2].strip().splitlines()) <= 3, said
    wait_for(lambda: not host.processes())
    return said


def finish(host: Host, *words: str) -> None:
    """The same command with room: nothing was lost, broken or done twice but what was running."""
    before = host.records
    host.run("--seeds", str(SEEDS), *words)
    assert host.records[: len(before)] == before
    assert sorted(host.seeds()) == list(range(SEEDS))
    assert [record.number for record in host.records] == list(range(SEEDS))
    assert SEEDS <= len(host.started()) <= SEEDS + 2
    host.assert_tidy()
    storage = f"sqlite:///{host.store}/optuna.db"
    (name,) = optuna.get_all_study_names(storage)
    assert len(optuna.load_study(study_name=name, storage=storage).get_trials()) == SEEDS


def test_a_full_disk_is_a_clear_end_and_corrupts_nothing(host):
    """A small disk of its own that fills up amid the trials; mounting one takes root."""
    host.store.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=24m", "none", str(host.store)]
    done = subprocess.run(mount, capture_output=True)
    if done.returncode != 0:
        pytest.skip(f"no file system can be mounted here: {done.stderr.decode().strip()}")
    try:
        sweep = host.start("--seeds", str(SEEDS), "--seconds", "0.1", "--mlflow")
        wait_for(lambda: host.starts.exists() and len(host.started()) > 4)
        filler = host.store / "filler"
        with contextlib.suppress(OSError), filler.open("wb", buffering=0) as file:
            while file.write(bytes(4096)):
                pass
        said = assert_clear_end(host, sweep)
        assert "space" in said or "full" in said, said
        assert len(host.records) >= 3
        filler.unlink()
        finish(host, "--mlflow")
        assert open_runs(f"sqlite:///{host.store}/mlflow.db") == (SEEDS + 1, [])
    finally:
        subprocess.run(["umount", "-l", str(host.store)], check=True)


def test_a_file_that_may_not_grow_is_a_clear_end(host, monkeypatch):
    """A quota in small, met by Optuna's database."""

    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (40 * 1024, 40 * 1024))

    with monkeypatch.context() as patch:
        patch.setattr(subprocess, "Popen", partial(subprocess.Popen, preexec_fn=limit))
        sweep = host.start("--seeds", str(SEEDS))
    assert_clear_end(host, sweep)
    finish(host)


JUMPS = """
#define _GNU_SOURCE
#include <stdlib.h>
#include <sys/syscall.h>
#include <sys/time.h>
#include <time.h>
#include <unistd.h>
int clock_gettime(clockid_t id, struct timespec *t) {
    int failed = syscall(SYS_clock_gettime, id, t);
    if (!failed && id == CLOCK_REALTIME) t->tv_sec += (rand() % 21 - 10) * 86400;
    return failed;
}
int gettimeofday(struct timeval *restrict t, void *restrict zone) {
    struct timespec now;
    int failed = clock_gettime(CLOCK_REALTIME, &now);
    t->tv_sec = now.tv_sec;
    t->tv_usec = now.tv_nsec / 1000;
    return failed;
}
time_t time(time_t *t) {
    struct timespec now;
    clock_gettime(CLOCK_REALTIME, &now);
    if (t) *t = now.tv_sec;
    return now.tv_sec;
}
"""


def test_clock_jumps_do_not_matter(host):
    """By up to ten days, to and fro, at every look; leases, limits and liveness know no clock."""
    compiler = shutil.which("cc") or shutil.which("gcc")
    if compiler is None:
        pytest.skip("no C compiler for a clock that jumps")
    source, library = host.folder / "jumps.c", host.folder / "jumps.so"
    source.write_text(JUMPS)
    subprocess.run([compiler, "-shared", "-fPIC", "-o", str(library), str(source)], check=True)
    host.env["LD_PRELOAD"] = str(library)
    sweeps = [host.start("--seeds", "8", "--seconds", "0.1", "--mlflow") for _ in range(2)]
    for sweep in sweeps:
        _, said = sweep.communicate(timeout=90)
        assert sweep.returncode == 0, said
    assert sorted(host.seeds()) == list(range(8)) == sorted(host.started())
    assert [record.number for record in host.records] == list(range(8))
    times = [record.created_at for record in host.records]
    assert times != sorted(times), "the clock did jump"
    assert open_runs(f"sqlite:///{host.store}/mlflow.db") == (8 + 1, [])
    host.assert_tidy()


@contextlib.contextmanager
def memory_group(mib: int) -> Iterator[Path]:
    """A cgroup of at most so much memory inside of this process's own; skips where not allowed."""
    lines = [line.split(":", 2) for line in Path("/proc/self/cgroup").read_text().splitlines()]
    own = {kind: path for _, kind, path in lines}
    root = Path("/sys/fs/cgroup")
    old = "memory" in own
    parent = root / ("memory" if old else "") / own["memory" if old else ""].lstrip("/")
    group = parent / f"openpi_opt-test-{os.getpid()}"
    limit = "memory.limit_in_bytes" if old else "memory.max"
    try:
        group.mkdir()
        (group / limit).write_text(str(mib * 2**20))
    except OSError as error:
        with contextlib.suppress(OSError):
            group.rmdir()
        pytest.skip(f"no memory cgroup can be made here: {error}")
    try:
        yield group
    finally:
        wait_for(lambda: not (group / "cgroup.procs").read_text())
        group.rmdir()


def test_the_kernels_oom_killer_is_an_outcome_of_its_own(tmp_path):
    code = (
        "import os, sys\n"
        "open(sys.argv[1], 'w').write(str(os.getpid()))\n"
        "blocks = [b'x' * (8 << 20) for _ in range(64)]\n"
    )
    cfg = Config.parse({"platform": {"device": "cpu"}})
    with memory_group(100) as group:
        command = [sys.executable, "-c", code, str(group / "cgroup.procs")]
        result = run_trial(cfg, tmp_path / "t", tmp_path, print, CPU, command=command)
    assert isinstance(result, Failed)
    assert result.outcome == "oom"
    assert "out-of-memory killer" in result.reason
