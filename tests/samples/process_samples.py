"""Small scripts in the place of a trial, and machines with GPUs that nobody asks."""

import dataclasses

from search_samples import CPU

from openpi_opt.machine import Gpu, Machine, TorchBuild

LIMITS = {"start": 20.0, "load": 20.0, "measure": 20.0}
SAY = """
import json, os, sys, time, signal
def say(text): os.write(int(sys.argv[-1]), (text + "\\n").encode())
def phase(name): say(json.dumps({"phase": name}))
"""


def gpu(index: int, name: str = "H100") -> Gpu:
    return Gpu(index, f"GPU-{index}a", name, "nvidia", "sm90", 80_000, "1")


def machine(*gpus: Gpu) -> Machine:
    return dataclasses.replace(CPU, gpus=gpus, torch=TorchBuild("2.13", "13.0", None))
