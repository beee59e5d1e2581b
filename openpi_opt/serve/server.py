"""openpi's policy server: metadata first, then requests and answers, on a websocket.

One policy answers all clients, in the order of their requests, on a thread of its own: pings and
the health check are answered meanwhile. A message that cannot be answered gets an error (a text,
which openpi's client raises), and the connection goes on.
"""

from __future__ import annotations

import asyncio
import http
import logging
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

from websockets.asyncio.server import Server, ServerConnection, serve
from websockets.exceptions import ConnectionClosed
from websockets.frames import CloseCode
from websockets.http11 import Request, Response

from openpi_opt.errors import UserError
from openpi_opt.serve import wire

_LOG = logging.getLogger(__name__)
_DRAIN_SECONDS = 30.0

# An observation -> an answer with `actions` and `policy_timing`.
Infer = Callable[[Mapping[str, Any]], dict[str, Any]]


@dataclass
class PolicyServer:
    """Serves `infer` on `host:port` until `stop` is set. `queue`: at most so many requests wait; a
    further one is refused, not delayed. `max_bytes` is the largest message; a client that sends
    more is disconnected (close code 1009)."""

    infer: Infer
    metadata: Mapping[str, Any]
    host: str = "127.0.0.1"
    port: int = 8000
    queue: int = 8
    max_bytes: int = 64 * 2**20
    answered: int = 0
    refused: int = 0
    stop: asyncio.Event = field(default_factory=asyncio.Event)

    def __post_init__(self) -> None:
        self._worker = ThreadPoolExecutor(1, thread_name_prefix="policy")
        self._waiting = 0
        self._handlers: set[asyncio.Task[Any]] = set()

    async def run(self, ready: Callable[[int], None]) -> None:
        """Listen, call `ready` with the port, serve; drain when `stop` is set. Raises UserError:
        the address is taken, or not this machine's."""
        try:
            server = await serve(
                self._handle,
                self.host,
                self.port,
                compression=None,
                max_size=self.max_bytes,
                process_request=_health,
                # A browser names the page that connects. No page may command a robot.
                origins=[None],
            )
        except OSError as error:
            raise UserError(
                f"cannot listen on {self.host}:{self.port}: {error.strerror}. Choose another "
                "--port or --host."
            ) from error
        ready(next(iter(server.sockets)).getsockname()[1])
        await self.stop.wait()
        await self._drain(server)
        self._worker.shutdown()

    async def _drain(self, server: Server) -> None:
        """Take no new clients, answer what was asked, say goodbye."""
        server.close(close_connections=False)
        if self._handlers:
            await asyncio.wait(self._handlers, timeout=_DRAIN_SECONDS)
        server.close()
        await server.wait_closed()

    async def _handle(self, client: ServerConnection) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._handlers.add(task)
        _LOG.info("client %s connected", client.remote_address)
        try:
            await client.send(wire.pack(dict(self.metadata)))
            previous: float | None = None
            while (message := await self._next(client)) is not None:
                start = time.perf_counter()
                await client.send(await self._answer(message, previous))
                previous = time.perf_counter() - start
            await client.close(CloseCode.GOING_AWAY, "the server stops")
        except ConnectionClosed as end:
            _LOG.info("client %s left: %s", client.remote_address, end)
        finally:
            self._handlers.discard(task)

    async def _next(self, client: ServerConnection) -> bytes | str | None:
        """The next message, or None once the server is to stop."""
        message = asyncio.ensure_future(client.recv())
        stopped = asyncio.ensure_future(self.stop.wait())
        done, _ = await asyncio.wait({message, stopped}, return_when=asyncio.FIRST_COMPLETED)
        stopped.cancel()
        if message in done:
            return message.result()
        message.cancel()
        return None

    async def _answer(self, message: bytes | str, previous: float | None) -> bytes | str:
        """An answer, or a text that says why there is none."""
        if self._waiting > self.queue:
            self.refused += 1
            return f"busy: {self.queue} requests wait already; ask again later"
        self._waiting += 1
        try:
            loop = asyncio.get_running_loop()
            asked = time.perf_counter()
            return await loop.run_in_executor(self._worker, self._work, message, asked, previous)
        finally:
            self._waiting -= 1

    def _work(self, message: bytes | str, asked: float, previous: float | None) -> bytes | str:
        start = time.perf_counter()
        try:
            observation = wire.unpack(message)
            decoded = time.perf_counter()
            answer = self.infer(observation)
        except (wire.WireError, ValueError, UserError) as error:
            self.refused += 1
            return f"{type(error).__name__}: {error}"
        except Exception as error:  # noqa: BLE001
            # One request must not end the others' server; the log has the traceback.
            self.refused += 1
            _LOG.exception("a request failed")
            return f"{type(error).__name__}: {error}"
        done = time.perf_counter()
        timing = {
            "queue_ms": start - asked,
            "decode_ms": decoded - start,
            "infer_ms": done - decoded,
        }
        if previous is not None:
            timing["prev_total_ms"] = previous
        answer["server_timing"] = {name: 1e3 * seconds for name, seconds in timing.items()}
        self.answered += 1
        return wire.pack(answer)


def _health(client: ServerConnection, request: Request) -> Response | None:
    if request.path == "/healthz":
        return client.respond(http.HTTPStatus.OK, "OK\n")
    return None
