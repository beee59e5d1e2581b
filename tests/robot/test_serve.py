"""The server, its encoding and the closed loop; openpi's own client in a process of its own."""

import json
import signal
import socket
import subprocess
import sys
import threading
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hosts import wait_for
from robot_samples import libero, openpi_folder, tokenizer

from openpi_opt import preset
from openpi_opt.config import Config
from openpi_opt.errors import UserError
from openpi_opt.serve import __main__ as verb
from openpi_opt.serve import fake_robot

try:
    import msgpack
    import sentencepiece  # noqa: F401
    from websockets.exceptions import ConnectionClosed, InvalidStatus
    from websockets.sync.client import ClientConnection, connect

    from openpi_opt.serve import wire
except ImportError as error:
    pytest.skip(f"the server needs openpi_opt[serve]: {error}", allow_module_level=True)

ROOT = Path(__file__).parents[2]
SMALL = ("platform=cpu", "workload.steps=2", "workload=openpi", "workload.horizon=4", "--no-verify")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path: Path = tmp_path_factory.mktemp("small")
    openpi_folder(path / "openpi")
    tokenizer(path / "tokenizer.model")
    away = {"study": "s", "machine": {"gpu": "NVIDIA H100 80GB HBM3", "driver": "580"}}
    preset.write(path / "away.yaml", Config.parse({}), away)
    return path


class Serving:
    """`python -m openpi_opt.serve` in a process of its own."""

    def __init__(self, folder: Path, *more: str) -> None:
        command = [sys.executable, "-m", "openpi_opt.serve", f"checkpoint={folder}/openpi"]
        command += ["robot=libero", f"tokenizer={folder}/tokenizer.model", *SMALL, "--port", "0"]
        self.process = subprocess.Popen(
            [*command, *more], cwd=ROOT, stderr=subprocess.PIPE, text=True
        )
        assert self.process.stderr is not None
        self.said: list[str] = []
        for line in self.process.stderr:
            self.said.append(line)
            if "listening on" in line:
                self.port = int(line.rsplit(":", 1)[1])
                break
        else:
            raise AssertionError("".join(self.said))
        lines = self.process.stderr
        self.reader = threading.Thread(target=lambda: self.said.extend(lines), daemon=True)
        self.reader.start()

    @contextmanager
    def connected(self) -> Iterator[ClientConnection]:
        uri = f"ws://127.0.0.1:{self.port}"
        with connect(uri, compression=None, max_size=None) as client:
            assert wire.unpack(client.recv(timeout=20)) == {"action_horizon": 4}
            yield client

    def ended(self, ask: bool = True) -> int:
        """The exit code; `ask` unless SIGTERM was sent already: a second one may kill."""
        if ask:
            self.process.send_signal(signal.SIGTERM)
        code = self.process.wait(60)
        self.reader.join(10)
        assert self.process.stderr is not None
        self.process.stderr.close()
        return code


@pytest.fixture(scope="module")
def serving(folder):
    server = Serving(folder, "preset=away", f"preset_dir={folder}", "--max-mib", "2")
    yield server
    assert server.ended() == 0
    assert any("requests answered" in line for line in server.said)


def asked(client: ClientConnection, message: Any) -> Any:
    client.send(message if isinstance(message, bytes | str) else wire.pack(message))
    answer = client.recv(timeout=60)
    return answer if isinstance(answer, str) else wire.unpack(answer)


def test_an_answer_has_actions_and_timing(serving):
    with serving.connected() as client:
        first, second = asked(client, libero()), asked(client, libero(1))
    assert first["actions"].shape == (4, 7)
    assert first["actions"].dtype == np.float32
    assert set(first["server_timing"]) == {"queue_ms", "decode_ms", "infer_ms"}
    assert second["server_timing"]["prev_total_ms"] >= first["server_timing"]["infer_ms"]
    assert first["policy_timing"]["model_ms"] > 0


def test_a_preset_of_another_machine_is_warned_of(serving):
    (line,) = (line for line in serving.said if line.startswith("warning: "))
    assert "preset away: promoted with gpu NVIDIA H100 80GB HBM3, here it is absent" in line


def test_openpis_own_client_is_served(serving, tmp_path):
    pytest.importorskip("openpi_client", reason="pip install --no-deps openpi-client")
    script = tmp_path / "client.py"
    script.write_text(
        "import json, sys, numpy as np\n"
        "from openpi_client.websocket_client_policy import WebsocketClientPolicy\n"
        "policy = WebsocketClientPolicy('127.0.0.1', int(sys.argv[1]))\n"
        "seen = {'observation/image': np.zeros((480, 640, 3), np.uint8),\n"
        "        'observation/wrist_image': np.zeros((224, 224, 3), np.uint8),\n"
        "        'observation/state': np.zeros(8), 'prompt': 'pick up the bowl'}\n"
        "answers = [policy.infer(seen) for _ in range(3)]\n"
        "try:\n    policy.infer({**seen, 'observation/state': np.full(8, np.nan)})\n"
        "except RuntimeError as error:\n    refused = str(error)\n"
        "after = policy.infer(seen)['actions'].shape\n"
        "print(json.dumps([policy.get_server_metadata(), answers[2]['actions'].shape,\n"
        "      sorted(answers[2]), refused, after]))\n"
    )
    command = [sys.executable, str(script), str(serving.port)]
    run = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert run.returncode == 0, run.stderr
    metadata, shape, keys, refused, after = json.loads(run.stdout)
    assert metadata == {"action_horizon": 4}
    assert shape == after == [4, 7]
    assert keys == ["actions", "policy_timing", "server_timing"]
    assert "observation/state[0] is not finite" in refused


GARBAGE: dict[str, tuple[Any, str]] = {
    "no msgpack": (b"\xc1\xff\x00", "no msgpack message"),
    "cut off": (wire.pack({"a": np.zeros(9)})[:-5], "no msgpack message"),
    "a text": ("hello", "a text instead"),
    "a list": (msgpack.packb([1, 2]), "a list instead of a map"),
    "empty": (b"", "no msgpack message"),
    "deep": (b"\x81\xa1a" * 100_000, "no msgpack message"),
    "a lying shape": (
        msgpack.packb(
            {"a": {b"__ndarray__": True, b"data": b"12", b"dtype": "<f8", b"shape": [2**60]}}
        ),
        "no array",
    ),
    "objects": (
        msgpack.packb({"a": {b"__ndarray__": True, b"data": b"", b"dtype": "|O", b"shape": [0]}}),
        "arrays of object are not read",
    ),
    "no dtype": (msgpack.packb({"a": {b"__npgeneric__": True}}), "no numpy scalar"),
    "another robot": (wire.pack({"state": np.zeros(14)}), "lacks observation/image"),
    "nothing": (wire.pack({}), "lacks observation/image; it has nothing"),
}


@pytest.mark.parametrize("name", GARBAGE)
def test_a_message_that_cannot_be_answered_costs_nothing_else(name, serving):
    message, words = GARBAGE[name]
    with serving.connected() as other, serving.connected() as client:
        answer = asked(client, message)
        assert isinstance(answer, str)
        assert words in answer
        for connection in (client, other):
            assert asked(connection, libero())["actions"].shape == (4, 7)


def test_a_huge_message_ends_its_own_connection_alone(serving):
    with serving.connected() as other:
        with serving.connected() as client, pytest.raises(ConnectionClosed) as end:
            asked(client, b"\x00" * (3 * 2**20))
        assert end.value.rcvd is not None
        assert end.value.rcvd.code == 1009
        assert asked(other, libero())["actions"].shape == (4, 7)


def test_clients_that_say_nothing_or_half_of_it_hold_up_nobody(serving):
    slow = [socket.create_connection(("127.0.0.1", serving.port)) for _ in range(20)]
    for number, connection in enumerate(slow):
        connection.sendall((b"", b"GET / HT", b"\x00\xff\x13garbage\r\n\r\n")[number % 3])
    with serving.connected() as silent, serving.connected() as client:
        assert asked(client, libero())["actions"].shape == (4, 7)
        silent.send(wire.pack(libero()))  # and never read
        assert asked(client, libero())["actions"].shape == (4, 7)
    for connection in slow:
        connection.close()


def test_health_is_told_and_pages_of_a_browser_are_refused(serving):
    url = f"http://127.0.0.1:{serving.port}/healthz"
    with urllib.request.urlopen(url, timeout=10) as answer:
        assert (answer.status, answer.read()) == (200, b"OK\n")
    uri, page = f"ws://127.0.0.1:{serving.port}", "https://example.org"
    with pytest.raises(InvalidStatus, match="403"), connect(uri, origin=page):
        pass


def test_many_clients_get_their_own_answers(serving):
    wrong = [{**libero(), "observation/state": np.full(8, np.nan)}, libero()]
    found: list[bool] = []

    def robot(index: int) -> None:
        with serving.connected() as client:
            for turn in range(4):
                failing = (index + turn) % 2 == 0
                answer = asked(client, wrong[0 if failing else 1])
                found.append(isinstance(answer, str) is failing)

    threads = [threading.Thread(target=robot, args=(index,)) for index in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [True] * 16


def test_a_full_queue_refuses_and_the_end_answers_what_was_asked(folder):
    """Nine ask one server at once whose queue has one place; SIGTERM comes meanwhile."""
    server = Serving(folder, "--queue", "1", "workload.steps=40")
    with ExitStack() as stack:
        *clients, idle = (stack.enter_context(server.connected()) for _ in range(10))
        server.process.send_signal(signal.SIGSTOP)  # they ask at once, however busy the machine
        for client in clients:
            client.send(wire.pack(libero()))
        server.process.send_signal(signal.SIGCONT)
        pool = stack.enter_context(ThreadPoolExecutor(len(clients)))
        asked = [pool.submit(client.recv, timeout=60) for client in clients]
        wait_for(lambda: sum(future.done() for future in asked) >= 7)
        server.process.send_signal(signal.SIGTERM)
        answers = [future.result() for future in asked]
        with pytest.raises(ConnectionClosed) as end:
            idle.recv(timeout=60)
    assert end.value.rcvd is not None
    assert end.value.rcvd.code == 1001
    busy = [answer for answer in answers if isinstance(answer, str)]
    assert len(busy) == 7
    assert all("busy: 1 requests wait already" in text for text in busy)
    assert all(wire.unpack(a)["actions"].shape == (4, 7) for a in answers if a not in busy)
    assert server.ended(ask=False) == 0
    assert "2 requests answered, 7 refused\n" in server.said


def test_a_fake_robot_tells_where_the_time_goes(folder, tmp_path):
    command = [sys.executable, "-m", "openpi_opt.serve", f"checkpoint={folder}/openpi"]
    command += ["robot=libero", f"tokenizer={folder}/tokenizer.model", *SMALL, "--port", "0"]
    command += ["--fake-robot", "2", "--seconds", "3", "--clients", "2", "--out", str(tmp_path)]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=180)
    assert run.returncode == 0, run.stderr
    for word in ("p99", "jitter", "late of", "network", "transform", "upload", "model", "download"):
        assert word in run.stdout
    assert (tmp_path / "fake_robot.png").stat().st_size > 10_000
    runs = json.loads((tmp_path / "fake_robot.json").read_text())
    assert len(runs) == 2
    for sample in runs[0]["samples"]:
        assert sum(sample[part] for part in fake_robot.PARTS) == pytest.approx(sample["total"])


def test_late_answers_and_skipped_ticks_are_counted(monkeypatch):
    """At 10 Hz: answers after 50, 250 and 50 ms; the second is late and skips two ticks."""
    now, delays = [0.0], iter([0.05, 0.25, 0.05])

    def sleep(seconds: float) -> None:
        now[0] += seconds

    def ask(message: Any) -> dict[str, Any]:
        sleep(next(delays))
        names = ("model", "transform", "upload", "download")
        server = {"infer_ms": 4.0, "queue_ms": 1.0}
        return {"server_timing": server, "policy_timing": {f"{n}_ms": 1.0 for n in names}}

    monkeypatch.setattr(fake_robot.time, "sleep", sleep)
    monkeypatch.setattr(fake_robot.time, "perf_counter", lambda: now[0])
    run = fake_robot.loop(ask, dict, hz=10.0, seconds=0.45)
    assert [round(sample["at_s"], 6) for sample in run["samples"]] == [0.0, 0.1, 0.4]
    assert (run["late"], run["skipped"]) == (1, 2)
    assert run["samples"][1]["network"] == pytest.approx(245.0)
    assert "1 late of 3 at 10 Hz, 2 ticks skipped" in fake_robot.report([run])


def test_what_is_packed_comes_back():
    message = {
        "a": np.arange(6, dtype=np.int16).reshape(2, 3)[:, ::-1], "b": np.float32(2.5),
        "c": np.str_("text"), "d": {"e": [1, None, True]}, "f": np.zeros((0, 3), np.uint8),
    }  # fmt: skip
    back = wire.unpack(wire.pack(message))
    assert np.array_equal(back["a"], message["a"])
    assert back["b"].dtype == np.float32
    assert (back["c"], back["d"], back["f"].shape) == ("text", {"e": [1, None, True]}, (0, 3))
    assert not back["a"].flags.writeable
    with pytest.raises(wire.WireError, match="complex128 cannot be sent"):
        wire.pack({"a": np.zeros(2, complex)})


def test_the_bytes_are_openpis():
    """As openpi-client 0.1.2 packs {"x": float32 [0, 1]}."""
    head = b"\x81\xa1x\x84\xc4\x0b__ndarray__\xc3\xc4\x04data\xc4\x08"
    tail = b"\xc4\x05dtype\xa3<f4\xc4\x05shape\x91\x02"
    values = np.array([0, 1], np.float32)
    assert wire.pack({"x": values}) == head + values.tobytes() + tail


def test_what_cannot_be_served_says_why():
    with pytest.raises(UserError, match="serve needs robot=NAME"):
        verb.main(["preset=h100"])
    with pytest.raises(UserError, match="robot=spot is not known"):
        verb.main(["robot=spot", "model=pi0_mini"])


def test_a_port_that_is_taken_is_said(folder, serving):
    keys = [f"checkpoint={folder}/openpi", "robot=libero", *SMALL]
    keys += [f"tokenizer={folder}/tokenizer.model", "--port", str(serving.port)]
    with pytest.raises(UserError, match=f"cannot listen on 127.0.0.1:{serving.port}"):
        verb.main(keys)
