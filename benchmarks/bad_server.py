"""A tracking server that misbehaves, on loopback; prints its port.

    python -m benchmarks.bad_server MODE

hang: accepts and never replies. busy: 429, come back in an hour. drip: one byte every 3 s.
"""

from __future__ import annotations

import http.server
import socket
import sys
import time

MODES = ("hang", "busy", "drip")


class Handler(http.server.BaseHTTPRequestHandler):
    """Too busy, or slow."""

    mode = "busy"

    def answer(self) -> None:
        """Any request."""
        self.rfile.read(int(self.headers.get("Content-Length") or 0))
        self.send_response(429 if self.mode == "busy" else 200)
        if self.mode == "busy":
            self.send_header("Retry-After", "3600")
        else:
            self.send_header("Content-Length", "100000")
        self.end_headers()
        while self.mode == "drip":
            self.wfile.write(b" ")
            self.wfile.flush()
            time.sleep(3)

    do_GET = do_POST = do_PUT = do_PATCH = do_DELETE = answer  # noqa: N815

    def log_message(self, *args: object) -> None:
        """Nothing."""


class Server(http.server.ThreadingHTTPServer):
    """Says nothing of clients that lose patience."""

    def handle_error(self, request: object, client_address: object) -> None:
        """Nothing."""


def main() -> None:
    """Print the port and serve until killed."""
    if sys.argv[1] == "hang":
        listener = socket.create_server(("127.0.0.1", 0), backlog=128)
        print(listener.getsockname()[1], flush=True)
        kept = []
        while True:
            kept.append(listener.accept())
    Handler.mode = sys.argv[1]
    server = Server(("127.0.0.1", 0), Handler)
    print(server.server_address[1], flush=True)
    server.serve_forever()


if __name__ == "__main__":
    main()
