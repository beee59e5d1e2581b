"""One device for a whole series of fresh processes: a confirmation is not spread over GPUs.

Two GPUs of one model differ by more than many a gain, so promotions, ladders and ablations run all
their processes on one, with the cores that a sweep gives it, leased as a sweep leases it.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

from openpi_opt.config import Config
from openpi_opt.machine import Gpu, Machine
from openpi_opt.process import devices
from openpi_opt.process.devices import Devices, Lease, Slot
from openpi_opt.space.settings import Settings
from openpi_opt.track.journal import Record

_POLL_SECONDS = 0.25
DEVICE_HELP = (
    "the GPU for all processes, by index or UUID (default: the one of the study's newest "
    "confirmation, which may have to be continued, else a free one)"
)


def gpu_name(text: str) -> int | str:
    """A GPU on a command line, as in `devices=`: an index or the beginning of a UUID."""
    return int(text) if text.lstrip("-").isdecimal() else text


def reserve(
    cfg: Config,
    machine: Machine,
    wanted: int | str | None,
    records: Sequence[Record],
    say: Callable[[str], None],
    pause: Callable[[float], None] = time.sleep,
) -> Lease:
    """Lease the device for all processes of `cfg` and its variants; waits until one is free.

    `wanted` names a GPU as `devices=` does. Without it, and without `platform.gpu`, it is the GPU
    of the newest confirmation in `records`, which may have to be continued; else one of those that
    the study ran on; else any of the first model.

    Raises:
        UserError: there is no such GPU, `cfg` names another, or the folder of leases cannot be
            used.
    """
    slots = _admitted(cfg, machine, wanted, records)
    told = False

    def busy() -> None:
        nonlocal told
        if not told:
            told = True
            say(f"{devices.in_use(slots)}{_hint(slots, wanted)}")
        pause(_POLL_SECONDS)

    return devices.wait_for(slots, busy)


def _hint(slots: Sequence[Slot], wanted: int | str | None) -> str:
    if wanted is not None or len(slots) > 1 or slots[0].gpu is None:
        return ""
    return "\n--device names another GPU, on which everything is measured anew"


def _admitted(
    cfg: Config, machine: Machine, wanted: int | str | None, records: Sequence[Record]
) -> list[Slot]:
    """The slots of which one is to be taken; a CPU is one slot."""
    number = cfg.platform.gpu
    if wanted is not None:
        return _slots(machine, wanted, cfg)
    if number is not None:
        return _slots(machine, number, cfg)
    if cfg.device == "cpu":
        return _slots(machine, "all", cfg)
    here = {gpu.uuid: gpu for gpu in machine.gpus_for(cfg.device)}
    confirmed = _seen([r for r in records if r.role == "confirm"], here)
    if confirmed:
        return _slots(machine, confirmed[-1].uuid, cfg)
    seen = _seen(records, here)
    same = [gpu for gpu in seen if gpu.name == seen[-1].name]
    chosen = [uuid for uuid, gpu in here.items() if gpu in same]
    return _slots(machine, chosen or "all", cfg)


def _seen(records: Sequence[Record], here: dict[str, Gpu]) -> list[Gpu]:
    """The GPUs of this machine that records name, oldest first."""
    named = [record.result.fingerprint.get("gpu") for record in records]
    return [here[gpu["uuid"]] for gpu in named if gpu and gpu["uuid"] in here]


def _slots(machine: Machine, names: int | str | list[str], cfg: Config) -> list[Slot]:
    found = Devices(Settings.parse({"devices": names}).devices, machine)
    found.check([cfg])
    return found.slots(cfg.device)
