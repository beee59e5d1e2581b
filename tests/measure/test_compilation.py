"""Counted in a process of its own, as in a trial: Dynamo's counters are the process's."""

import json
import os
import subprocess
import sys

CODE = """
import json, sys
from openpi_opt.measure import compilation
found = [compilation.found(late=0)]
import torch
compilation.observe()
found.append(compilation.found(late=0))

@torch.compile(dynamic=False, backend="eager")
def twice(x):
    return x * 2

@torch.compile(backend="eager")
def speaking(x):
    print("said", file=sys.stderr)
    return x + 1

twice(torch.ones(3))
before = compilation.graphs()
twice(torch.ones(4))
speaking(torch.ones(3))
found.append(compilation.found(late=compilation.graphs() - before))
print(json.dumps([item and item.model_dump() for item in found]))
"""


def test_graphs_recompilations_and_breaks():
    done = subprocess.run(
        [sys.executable, "-c", CODE], capture_output=True, text=True, check=False, timeout=300
    )
    assert done.returncode == 0, done.stderr
    without_torch, without_compile, found = json.loads(done.stdout)
    assert without_torch is None
    assert without_compile is None
    assert found["graphs"] == 3
    assert found["recompilations"] == 1
    assert found["late"] == 2
    assert sum(found["graph_breaks"].values()) == 1
    (reason,) = found["graph_breaks"]
    assert "\n" not in reason


CACHED = """
import json
import torch
from openpi_opt.measure import compilation
states = [compilation.cache_state(compilation.cache_entries())]
torch.compile(lambda x: torch.sin(x) + 1)(torch.ones(8))
states.append(compilation.cache_state(compilation.cache_entries()))
states.append(compilation.cache_state(compilation.cache_entries(5, 0)))
states.append(compilation.cache_state(compilation.cache_entries(0, 1)))
print(json.dumps(states))
"""


def test_the_first_process_is_cold_and_the_next_warm(tmp_path):
    places = {"TORCHINDUCTOR_CACHE_DIR": "inductor", "TRITON_CACHE_DIR": "triton"}
    env = os.environ | {name: str(tmp_path / part) for name, part in places.items()}
    # Without these it compiles a program for each set of instructions, and headers.
    env |= {"TORCHINDUCTOR_VEC_ISA_OK": "1", "TORCHINDUCTOR_CPP_CACHE_PRECOMPILE_HEADERS": "0"}
    first, second = (
        json.loads(
            subprocess.run(
                [sys.executable, "-c", CACHED],
                capture_output=True,
                text=True,
                check=True,
                env=env,
                timeout=300,
            ).stdout
        )
        for _ in range(2)
    )
    assert first == [None, "cold", "partly", "cold"]
    assert second == [None, "warm", "warm", "partly"]
