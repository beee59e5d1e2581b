"""MLflow's own server application, run by Flask: `mlflow server` takes 15 s to start here."""

import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

from hosts import wait_for


class Server:
    """On a port that stays the same."""

    def __init__(self, folder: Path):
        self.folder = folder
        with socket.socket() as unused:
            unused.bind(("127.0.0.1", 0))
            self.port = unused.getsockname()[1]
        self.uri = f"http://127.0.0.1:{self.port}"

    def start(self) -> None:
        environment = {
            **os.environ,
            "_MLFLOW_SERVER_FILE_STORE": f"sqlite:///{self.folder}/server.db",
            "_MLFLOW_SERVER_ARTIFACT_ROOT": "mlflow-artifacts:/",
            "_MLFLOW_SERVER_ARTIFACT_DESTINATION": str(self.folder / "served"),
            "_MLFLOW_SERVER_SERVE_ARTIFACTS": "true",
        }
        command = [sys.executable, "-m", "flask", "--app", "mlflow.server:app", "run", "--port"]
        with (self.folder / "server.log").open("a") as out:
            self._process = subprocess.Popen(
                [*command, str(self.port)], stdout=out, stderr=out, cwd=self.folder, env=environment
            )
        wait_for(self._answers)

    def _answers(self) -> bool:
        assert self._process.poll() is None, (self.folder / "server.log").read_text()
        with socket.socket() as probe:
            return probe.connect_ex(("127.0.0.1", self.port)) == 0

    def signal(self, number: signal.Signals) -> None:
        self._process.send_signal(number)
        if number == signal.SIGKILL:
            self._process.wait()
