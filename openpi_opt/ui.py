"""Start MLflow's server for a store and open a study there: `python -m openpi_opt.ui [STUDY]`."""

from __future__ import annotations

import argparse
import contextlib
import os
import socket
import subprocess
import sys
import time
import webbrowser
from collections.abc import Sequence
from pathlib import Path

from openpi_opt import cli
from openpi_opt.errors import UserError
from openpi_opt.track.journal import Journal
from openpi_opt.track.link import page_of, serving
from openpi_opt.track.mlflow_log import MlflowLog, TrackingError, tracking_of
from openpi_opt.track.store import Store, sqlite_url
from openpi_opt.verbs import add_store, verb_parser

HOST = "127.0.0.1"
_START_S = 90


def main(argv: Sequence[str] | None = None) -> int:
    """Serve until Ctrl-C; delivers what MLflow lacks of the study first."""
    arguments = _parser().parse_args(argv)
    store = Store.open(arguments.store, create=False)
    port = _port(arguments.port)
    os.environ.pop("MLFLOW_TRACKING_URI", None)  # this is about the store's own database
    study_dir = store.find_study(arguments.study or _latest(store))
    _deliver(store, study_dir)
    address = f"http://{HOST}:{port}"
    command = [sys.executable, "-m", "mlflow", "server", "--host", HOST, "--port", str(port)]
    command += ["--backend-store-uri", sqlite_url(store.mlflow_db), "--workers", "1"]
    command += ["--default-artifact-root", store.artifacts.as_uri()]
    # Its processes for jobs, which nobody asks for here, would end a Ctrl-C in tracebacks.
    environment = os.environ | {
        "MLFLOW_DISABLE_TELEMETRY": "true",
        "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",
    }
    with subprocess.Popen(
        command, stdout=subprocess.DEVNULL, env=environment, start_new_session=True
    ) as server:
        try:
            _wait(server, port)
            with serving(store.path, address):
                page = f"{address}/{page_of(study_dir)}"
                print(page, flush=True)
                cli.say("serving on this host alone, until Ctrl-C")
                if arguments.browser:
                    webbrowser.open(page)
                return server.wait()
        finally:
            server.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                server.wait(10)
            server.kill()


def _latest(store: Store) -> str:
    """The study that was written to last."""
    names = store.studies()
    if not names:
        raise UserError(f"the store {store.path} holds no study yet. Run a sweep first.")
    return max(names, key=lambda name: store.study_dir(name).stat().st_mtime)


def _deliver(store: Store, study_dir: Path) -> None:
    """Let MLflow have what it lacks of a study."""
    journal = Journal.read(study_dir)
    log = MlflowLog(store, tracking_of(journal))
    try:
        log.sync(study_dir, journal)
        log.show(study_dir, journal)
    except TrackingError as error:
        raise UserError(str(error)) from error


def _port(wanted: int | None) -> int:
    with socket.socket() as probe:
        try:
            probe.bind((HOST, wanted or 0))
        except OSError as error:
            raise UserError(
                f"--port {wanted}: {error.strerror}. Leave it out, and a free one is taken."
            ) from None
        return int(probe.getsockname()[1])


def _wait(server: subprocess.Popen[bytes], port: int) -> None:
    end = time.monotonic() + _START_S
    while time.monotonic() < end and server.poll() is None:
        with socket.socket() as probe:
            if probe.connect_ex((HOST, port)) == 0:
                return
        time.sleep(0.1)
    raise UserError("MLflow's server did not start; its own message is above.")


def _parser() -> argparse.ArgumentParser:
    parser = verb_parser(
        "ui",
        description="Start MLflow's server on a free port of this host and open a study there.",
    )
    parser.add_argument("study", nargs="?", metavar="STUDY", help="default: the latest")
    add_store(parser)
    parser.add_argument("--port", type=int, metavar="N", help="instead of a free one")
    parser.add_argument(
        "--no-browser", dest="browser", action="store_false", help="print the address, open nothing"
    )
    return parser


if __name__ == "__main__":
    cli.run(main)
