"""Counted in a process of its own, as in a trial: Dynamo's counters are the process's."""

import json
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


def test_graphs_recompilations_and_breaks() -> None:
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
