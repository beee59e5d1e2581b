"""A guest in another program: what the caller switched in torch does not reach the policy."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import torch

# One policy computes at a time in a process. Dynamo, captures and torch's default dtype belong to
# the process; and two captures, or a capture beside another call, spoil each other.
_ALONE = threading.RLock()


@contextmanager
def as_measured() -> Iterator[None]:
    """Torch as a trial has it, for one thread of the process at a time. The default dtype is
    float32, the default device the CPU; autocast and inference mode are off. All is as it was
    afterwards."""
    with _ALONE, ExitStack() as stack:
        before = torch.get_default_dtype()
        if before != torch.float32:
            torch.set_default_dtype(torch.float32)
            stack.callback(torch.set_default_dtype, before)
        if torch.get_default_device().type != "cpu":
            stack.enter_context(torch.device("cpu"))
        for device in ("cpu", "cuda"):
            if torch.is_autocast_enabled(device):
                stack.enter_context(torch.autocast(device, enabled=False))
        if torch.is_inference_mode_enabled():
            stack.enter_context(torch.inference_mode(False))
        yield
