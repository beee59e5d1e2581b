"""Reading the events of a Chrome trace file one by one, gzipped or not.

The standard library's decoder gets one value at a time from a buffer that slides over the file.
What is held is one event, whose size and depth are bounded; streaming parsers bound neither.
"""

from __future__ import annotations

import codecs
import gzip
import io
import json
import re
import sys
import time
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from openpi_opt.analysis import formats
from openpi_opt.measure.trace import ProfileError, Recording

MAX_FILE_MIB = 1024
"""Text of a trace that is read, unpacked: what is kept of it grows with its events."""
MAX_RATIO, _RATIO_MIB = 64, 16
"""Packed text may be so many times larger, from so many MiB on: real traces are 15 to 30 times."""
MAX_VALUE_MIB = 16
"""One event, or one entry beside the events: kineto's largest have some ten KiB."""

CHUNK = 2**20
_PATIENCE_SECONDS = 5.0
_HEAD = 2**16
SDK_MIB = 48  # rocprofv3 writes all of a process as one value; decoded it takes 8 times as much
_GZIP_MAGIC = b"\x1f\x8b"
_NO_SPACE = re.compile(r"[^ \t\n\r]")
_EVENTS = "traceEvents"


def read_trace(path: Path) -> Recording:
    """Everything that counts in a trace file. Raises ProfileError: it cannot be read, is not JSON
    to its end, is no Chrome trace, is larger than `MAX_FILE_MIB`, unpacks to far more than traces
    do, or has a damaged event."""
    try:
        with _opened(path) as file:
            head = file.read(_HEAD)
        if head.startswith(formats.SQLITE_MAGIC):
            return Recording.of(formats.database_events(path))
        what = formats.named(head)
        if what is not None:
            raise ProfileError(what)
        with _opened(path) as file:
            limited = _Limited(file)
            if formats.is_csv(head):
                return Recording.of(formats.csv_events(io.BufferedReader(limited)))
            return Recording.of(formats.rocprof_kernels(_events(_Text(limited))))
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise ProfileError(f"damaged or truncated gzip: {error}") from error
    except OSError as error:
        raise ProfileError(error.strerror or str(error)) from error


def _opened(path: Path) -> IO[bytes] | gzip.GzipFile:
    """By content and not by name: a trace is often renamed after it was packed or unpacked."""
    with path.open("rb") as file:
        packed = file.read(2) == _GZIP_MAGIC
    return gzip.open(path, "rb") if packed else path.open("rb")


def _events(text: _Text) -> Iterator[Any]:
    """The events of `{..., "traceEvents": [...], ...}` or of a bare list."""
    first = text.peek()
    if first == "[":
        yield from text.items()
    elif first == "{":
        found = False
        for key in text.entries():
            if key == _EVENTS and text.peek() == "[":
                found = True
                yield from text.items()
            elif key == _EVENTS:
                raise ProfileError(f'"{_EVENTS}" is not a list')
            elif key == formats.SDK_TOOL and text.peek() == "[":
                found = True
                for tool in text.items(SDK_MIB):
                    yield from formats.sdk_events(tool)
            else:
                text.value()
        if not found:
            raise ProfileError(f'no Chrome trace: there is no "{_EVENTS}" in it')
    elif not first:
        raise ProfileError("the file is empty")
    else:
        raise ProfileError(f"no JSON: it begins with {text.shown()}")
    if text.peek():
        raise ProfileError(f"there is something after the end of the trace: {text.shown()}")


class _Limited(io.RawIOBase):
    """A file of which `MAX_FILE_MIB` are read at most: gzip may unpack to terabytes. Says how far
    it is where that takes long."""

    def __init__(self, file: IO[bytes] | gzip.GzipFile) -> None:
        self._file, self._read = file, 0
        self._said = time.monotonic()

    def readable(self) -> bool:
        """Yes."""
        return True

    def readinto(self, buffer: Any) -> int:
        """Read on. Raises ProfileError: it is more text than a trace has."""
        data = self._file.read(len(buffer))
        buffer[: len(data)] = data
        self._read += len(data)
        if self._read > MAX_FILE_MIB * 2**20:
            raise ProfileError(f"more than {MAX_FILE_MIB} MiB of text; record a shorter time")
        if isinstance(self._file, gzip.GzipFile) and self._read >= _RATIO_MIB * 2**20:
            raw: Any = self._file.fileobj
            packed = max(raw.tell(), 1)
            if self._read > MAX_RATIO * packed:
                raise ProfileError(
                    f"it unpacks to more than {MAX_RATIO} times its size ({packed >> 10} KiB to "
                    f"{self._read >> 20} MiB and more): no profiler writes such a trace; unpack it "
                    "yourself if it is one"
                )
        if time.monotonic() > self._said + _PATIENCE_SECONDS:
            self._said = time.monotonic()
            print(f"reading, {self._read >> 20} MiB so far", file=sys.stderr)
        return len(data)


class _Text:
    """A file as text, decoded into JSON values from a position that only moves forward."""

    def __init__(self, file: io.RawIOBase) -> None:
        self._file = file
        # Names of kernels may hold anything; what is no UTF-8 in them must not lose the trace.
        self._characters = codecs.getincrementaldecoder("utf-8-sig")("replace")
        self._decoder = json.JSONDecoder()
        self._buffer = ""
        self._at = 0
        self._ended = False

    def peek(self) -> str:
        """The next character that is no space, or "" at the end."""
        while True:
            found = _NO_SPACE.search(self._buffer, self._at)
            self._at = found.start() if found else len(self._buffer)
            if self._at < len(self._buffer) or self._ended:
                return self._buffer[self._at : self._at + 1]
            self._fill()

    def items(self, most_mib: int | None = None) -> Iterator[Any]:
        """The values of the list that begins here, of at most `most_mib` MiB each (16)."""
        yield from self._sequence("[", "]", lambda: self.value(most_mib))

    def entries(self) -> Iterator[str]:
        """The keys of the object that begins here; the caller takes each value before going on."""
        yield from self._sequence("{", "}", self._key)

    def value(self, most_mib: int | None = None) -> Any:
        """The value that begins here."""
        if not self.peek():
            raise ProfileError("truncated: it ends in the middle")
        while True:
            try:
                value, end = self._decoder.raw_decode(self._buffer, self._at)
            except RecursionError as error:
                raise ProfileError("values are nested too deeply") from error
            except ValueError as error:  # broken, or cut by the end of the buffer
                self._more(error, most_mib or MAX_VALUE_MIB)
                continue
            if end == len(self._buffer) and not self._ended:  # a number may go on
                self._fill()
                continue
            self._at = end
            return value

    def shown(self) -> str:
        """A few characters from here, for a message."""
        return repr(self._buffer[self._at : self._at + 20])

    def _sequence(self, opening: str, closing: str, element: Any) -> Iterator[Any]:
        self._expect(opening)
        if self.peek() == closing:
            self._at += 1
            return
        while True:
            yield element()
            if self.peek() == closing:
                self._at += 1
                return
            self._expect(",")

    def _key(self) -> str:
        key = self.value()
        if not isinstance(key, str):
            raise ProfileError(f"no JSON: a key is {key!r}")
        self._expect(":")
        return key

    def _expect(self, character: str) -> None:
        found = self.peek()
        if not found:
            raise ProfileError("truncated: it ends in the middle")
        if found != character:
            raise ProfileError(f"no JSON: {character!r} was expected at {self.shown()}")
        self._at += 1

    def _more(self, error: ValueError, most_mib: int) -> None:
        """Read on, as much again as is held: a value of n characters is tried log n times."""
        held = len(self._buffer) - self._at
        if self._ended:
            reason = error.msg if isinstance(error, json.JSONDecodeError) else str(error)
            raise ProfileError(f"truncated, or no JSON, at {self.shown()}: {reason}") from error
        if held > most_mib * 2**20:
            raise ProfileError(
                f"no JSON at {self.shown()}, or one value of more than {most_mib} MiB (with "
                "rocprofv3 record --output-format csv, which is read row by row)"
            ) from error
        self._fill(max(CHUNK, held))

    def _fill(self, size: int = CHUNK) -> None:
        data = self._file.read(size)
        self._ended = not data
        self._buffer = self._buffer[self._at :] + self._characters.decode(data, final=not data)
        self._at = 0
