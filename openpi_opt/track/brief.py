"""Lines of a journal without what a table never shows, so that 10,000 of them take a second.

Two thirds of a line are samples, kernel tables and names of files. They are cut out of its text
before it is read; what many lines share (machine, files) is read once.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any

from openpi_opt.result import Ceilings, Check, Ok, TrialResult

# What opens a part, what follows it (JSON escapes quotes inside texts, so neither is in one), and
# what stands in its place. In the order of a line.
_CUT = (
    (b'"config":{', b'},"config_hash":', b"{}"),
    (b'"fingerprint":{', b'},"files":', b"{}"),
    (b'"files":{', b'},"started_at":', b"{}"),
    *((b'%ssamples_ms":{' % name, b"}", b"[]") for name in (b'"', b'"wall_', b'"upload_')),
    (b'"planning_samples_ms":{', b"}", b"[]"),
    (b'"kernel_table":[', b'],"launch_overhead_ms":', b"[]"),
)
_KEPT = ("config", "fingerprint", "files")
# Lines of earlier formats are few, and their hashes are made from the whole configuration.
_FORMAT = b'"result":{"schema_version":3,'


class Later(Mapping[str, Any]):
    """A JSON object as text, read at each look: thousands of them are kept, few are looked at."""

    def __init__(self, text: bytes):
        self._text = text

    def __getitem__(self, key: str) -> Any:
        return json.loads(self._text)[key]

    def __iter__(self) -> Iterator[str]:
        return iter(json.loads(self._text))

    def __len__(self) -> int:
        return len(json.loads(self._text))


class Brief:
    """Shortens lines, and gives back what was cut out and is needed all the same."""

    def __init__(self) -> None:
        self._shared: dict[bytes, dict[str, Any]] = {}
        self._checks: dict[tuple[str, str, str], Check] = {}
        self._ceilings: dict[tuple[str, float], Ceilings] = {}

    def shortened(self, line: bytes) -> tuple[bytes, dict[str, Any]]:
        """The line without its long parts; of the result `config`, `fingerprint`, `files`."""
        if _FORMAT not in line:
            return line, {}
        parts, cut, at = [], [], 0
        for opens, follows, instead in _CUT:
            begin = line.find(opens, at)
            end = line.find(follows, begin) if begin >= 0 else -1
            if end < 0:
                continue
            begin += len(opens) - 1
            cut.append(line[begin : end + 1])
            parts += [line[at:begin], instead]
            at = end + 1
        if len(cut) < len(_KEPT):
            return line, {}
        config, *shared = cut[: len(_KEPT)]
        kept = [Later(config), *map(self._read, shared)]
        return b"".join([*parts, line[at:]]), dict(zip(_KEPT, kept, strict=True))

    def give_back(self, result: TrialResult, kept: dict[str, Any]) -> None:
        """Put `config`, `fingerprint` and `files` in their places; share checks and ceilings.
        `result` is frozen, but nobody has it yet, and to copy it takes its time."""
        result.__dict__.update(kept)
        if isinstance(result, Ok):
            shared = self._checks.setdefault
            result.checks[:] = [shared((c.name, c.status, c.detail), c) for c in result.checks]
            if result.roofline and (own := result.roofline.ceilings):
                key = own.device, own.bandwidth_gb_s  # measured: no two are alike by chance
                result.roofline.__dict__["ceilings"] = self._ceilings.setdefault(key, own)

    def _read(self, text: bytes) -> dict[str, Any]:
        if text not in self._shared:
            self._shared[text] = json.loads(text)
        return self._shared[text]
