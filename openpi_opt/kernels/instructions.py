"""The instruction mix of a kernel compiled for AMD: how wide it loads, and what it multiplies with.

AMD's workload tuning guide for MI300X reads a kernel's assembly so: `global_load_dwordx4` (or
`buffer_load_dwordx4`) and `ds_read_b128` move 16 bytes per lane, the most that there is; MFMA of
16x16 rather than 32x32; no spills; few waits. Narrow loads spend an instruction on a few bytes.
"""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass

# Bytes per lane by the end of the name: LLVM, AMDGPUAsmGFX940.
_BYTES = {
    "dwordx4": 16, "dwordx3": 12, "dwordx2": 8, "dword": 4, "b128": 16, "b96": 12, "b64": 8,
    "b32": 4, "u16": 2, "i16": 2, "ushort": 2, "sshort": 2, "short": 2, "b16": 2, "u8": 1, "i8": 1,
    "ubyte": 1, "sbyte": 1, "byte": 1, "b8": 1,
}  # fmt: skip
_MEMORY = re.compile(r"^\s+((?:global|buffer)_load|ds_read(?:2(?:st64)?)?)_(\w+)", re.MULTILINE)
_MFMA = re.compile(r"^\s+v_mfma_(\w+)", re.MULTILINE)
_FEW = 8
_WAIT = re.compile(r"^\s+s_waitcnt", re.MULTILINE)


@dataclass(frozen=True)
class Instructions:
    """`loads` and `lds_reads` count by bytes per lane, `mfma` by shape and type.

    `narrow` names the loads that are judged too narrow, with their number: from memory those below
    4 bytes that are at least an eighth, and those of 4 that are at least half; from LDS more than a
    few below 8, for sums over waves read single words.
    """

    loads: dict[int, int]
    lds_reads: dict[int, int]
    mfma: dict[str, int]
    waits: int
    narrow: dict[str, int]

    def text(self) -> str:
        """One line for people."""
        parts = [_widths("loads", self.loads), _widths("LDS", self.lds_reads)]
        parts += [f"mfma {', '.join(self.mfma)}"] if self.mfma else []
        parts += [f"{self.waits} waits"]
        if self.narrow:
            listed = ", ".join(f"{count} {name}" for name, count in self.narrow.items())
            parts.append(f"NARROW: {listed}")
        return "; ".join(part for part in parts if part)


def instructions(amdgcn: str) -> Instructions:
    """Count the instructions in the assembly of a kernel, each place of the text once."""
    loads: Counter[int] = Counter()
    reads: Counter[int] = Counter()
    names: Counter[tuple[str, int, bool]] = Counter()
    for kind, rest in _MEMORY.findall(amdgcn):
        # The width stands in front of what else a name says: u16_d16_hi, dword_lds.
        size = _BYTES.get(rest.split("_")[0])
        if size is None:
            continue
        in_lds, pair = kind.startswith("ds_"), kind.startswith("ds_read2")
        size = 2 * size if pair else size
        (reads if in_lds else loads)[size] += 1
        names[f"{kind}_{rest.split('_')[0]}", size, in_lds] += 1
    narrow = {
        name: count
        for (name, size, in_lds), count in sorted(names.items())
        if (count > _FEW and size < 8 if in_lds else _much(count, size, loads))
    }
    return Instructions(
        loads=dict(sorted(loads.items(), reverse=True)),
        lds_reads=dict(sorted(reads.items(), reverse=True)),
        mfma=dict(Counter(_MFMA.findall(amdgcn))),
        waits=len(_WAIT.findall(amdgcn)),
        narrow=narrow,
    )


def _much(count: int, size: int, loads: Counter[int]) -> bool:
    return size <= 4 and (2 if size == 4 else 8) * count >= loads.total()


def _widths(what: str, counts: dict[int, int]) -> str:
    listed = ", ".join(f"{count} of {size} B" for size, count in counts.items())
    return f"{what} {listed}" if listed else ""
