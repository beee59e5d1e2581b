"""The command line in this process, and presets for it, most of which are refused."""

from pathlib import Path

import pytest

from openpi_opt import sweep
from openpi_opt.errors import UserError

HEAD = "# @package _global_\n"
PRESETS = {
    "good": HEAD + "defaults:\n- override /attention: sdpa\nprovenance: {study: x}\n",
    "body": HEAD + "attention: {vision: sdpa, prefill: eager, denoise: sdpa}\n",
    "above": HEAD + "defaults:\n- body\n- override /compile: default\n",
    "unknown_key": HEAD + "warp: {x: 1}\n",
    "unknown_field": HEAD + "attention: {speed: 1}\n",
    "unknown_knob": HEAD + "defaults:\n- override /warp: x\n",
    "unknown_option": HEAD + "defaults:\n- override /attention: fast\n",
    "broken": HEAD + "a: [\n",
    "no_head": "attention: {vision: sdpa}\n",
    "off": "\ufeff" + HEAD + "defaults:\n- override /compile: off\n- override /attention: sdpa\n",
    "number": HEAD + "defaults:\n- override /compile: 016\n",
    "twice": HEAD + "attention: {vision: sdpa, vision: eager}\n",
    "words": HEAD + "compile: {mode: off}\nprovenance: {a: 1e-3, b: 016, c: on, d: 1:30}\n",
    "store": HEAD + "store: elsewhere\n",
    "guard": HEAD + "guard: {cap: 1.0e+30}\n",
    "workload": HEAD + "defaults:\n- override /workload: openpi\n",
    "deep": HEAD + "provenance: " + "[" * 20_000,
    "itself": HEAD + "provenance: &a {x: *a}\n",
    "many": HEAD + "".join(f"k{i}: {i}\n" for i in range(60_000)),
}


class CommandLine:
    def __init__(self, folder: Path):
        self.folder = folder

    def __call__(self, *words: str) -> int:
        return sweep.main(words)

    def error(self, *words: str) -> str:
        with pytest.raises(UserError) as caught:
            self(*words)
        message = str(caught.value)
        assert 1 <= len(message.splitlines()) <= 3, message
        return message
