"""The log of a child: its beginning and its end, whatever it prints between them."""

from __future__ import annotations

import os
from collections import deque
from pathlib import Path
from typing import BinaryIO

# Of what a child prints, so much is kept from the beginning, and so much from the end.
HEAD_BYTES = 4 * 2**20
TAIL_BYTES = 2**20
_CHUNK = 65_536


class BoundedLog:
    """What a child prints: the beginning goes to disk at once, of the rest the end is kept.

    A pipe and not the file itself, or a child in a loop would fill the disk.
    """

    def __init__(self, path: Path):
        self._file: BinaryIO = path.open("wb", buffering=0)
        self._read_fd, self.write_fd = os.pipe()
        os.set_blocking(self._read_fd, False)
        self._room = HEAD_BYTES
        self._tail: deque[bytes] = deque()
        self._tail_bytes = self._left_out = 0

    def __enter__(self) -> BoundedLog:
        return self

    def __exit__(self, *_: object) -> None:
        try:
            if self._left_out:
                self._file.write(b"\n[... %d bytes left out ...]\n" % self._left_out)
            for chunk in self._tail:
                self._file.write(chunk)
        finally:
            self.close_write_end()
            os.close(self._read_fd)
            self._file.close()

    def fileno(self) -> int:
        """A descriptor that can be read from when the child has printed something."""
        return self._read_fd

    def close_write_end(self) -> None:
        """The child has its own copy."""
        if self.write_fd >= 0:
            os.close(self.write_fd)
            self.write_fd = -1

    def read(self) -> bool:
        """Take some of what there is; False at its end."""
        try:
            chunk = os.read(self._read_fd, _CHUNK)
        except BlockingIOError:
            return True
        self._keep(chunk)
        return bool(chunk)

    def drain(self) -> None:
        """Take what is left in the pipe. Whoever still writes to it does not hold this up."""
        for _ in range(TAIL_BYTES // _CHUNK):
            if not self.read():
                return

    def _keep(self, chunk: bytes) -> None:
        head, rest = chunk[: self._room], chunk[self._room :]
        self._room -= len(head)
        if head:
            self._file.write(head)
        if rest:
            self._tail.append(rest)
            self._tail_bytes += len(rest)
        while self._tail_bytes - len(self._tail[0] if self._tail else b"") > TAIL_BYTES:
            dropped = len(self._tail.popleft())
            self._tail_bytes -= dropped
            self._left_out += dropped
