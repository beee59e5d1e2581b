"""Where trials run: one slot for each GPU, or slots of cores on a CPU, leased host-wide.

A lease is a lock in a folder that all users of the host share, one file for each GPU (by its UUID)
and for each core of a CPU slot. Trials and their watchers inherit it, so a device is free only when
what ran on it is gone, also when the controller was killed. A sweep keeps its lease as long as it
has trials on the device; when another process waits, it starts no more, so that both take turns.

All that asks for a lock here raises UserError when the folder of leases cannot be used.
"""

from __future__ import annotations

import os
import stat
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from operator import attrgetter
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, StrictInt, field_validator

from openpi_opt.config import Config
from openpi_opt.errors import UserError
from openpi_opt.machine import Device, Gpu, Machine
from openpi_opt.process import locks
from openpi_opt.process.locks import Held

if TYPE_CHECKING:
    from openpi_opt.track.journal import Record

# Not the user's own temporary folder: the users of a host have to meet here.
LEASES = Path("/tmp/openpi_opt-leases")
LEASES_VARIABLE = "OPENPI_OPT_LEASES"
_FOLDER_MODE = 0o1777
_FILE_MODE = 0o666
_TOPOLOGY = Path("/sys/devices/system/cpu")
_WAIT_SECONDS = 0.25
PATIENCE_SECONDS = 2.0  # who waits looks four times a second
DEVICE_HELP = (
    "the GPU for all processes, by index or UUID (default: the one of the study's newest "
    "confirmation, which may have to be continued, else a free one)"
)
# Trials that prepare beside each other have at least so many cores each, and are at most so many.
_CORES_EACH = 2
_MOST_PREPARED = 8
_MIB_A_SEAT = 40_000


class DeviceSettings(BaseModel):
    """Which devices a sweep may use, and how many trials prepare on each while one measures.

    `gpus` names them by index or by the start of the UUID. `prepare` is bounded by memory, too.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    gpus: Literal["all"] | list[StrictInt | str] = "all"
    cpu_slots: int = Field(1, ge=1)
    prepare: Literal["auto"] | Annotated[int, Field(ge=1, le=64)] = "auto"

    @field_validator("gpus")
    @classmethod
    def _at_least_one(cls, value: Any) -> Any:
        if not value or (isinstance(value, list) and "" in value):
            raise ValueError("name at least one GPU, or all")
        return value


@dataclass(frozen=True)
class Slot:
    """Room for one trial: a GPU with its share of the cores, or cores alone."""

    name: str
    device: Device
    gpu: Gpu | None
    cores: tuple[int, ...]

    @property
    def keys(self) -> tuple[str, ...]:
        """Names of the locks that together are the lease."""
        if self.gpu is not None:
            return (self.gpu.uuid,)
        return tuple(f"core-{core}" for core in self.cores)


@dataclass
class Lease:
    """A slot that this process may use until `release`; without locks, where a node leases it."""

    slot: Slot
    locks: list[Held] = field(default_factory=list)
    held: bool = True

    @property
    def fds(self) -> tuple[int, ...]:
        """Descriptors for the trial to inherit."""
        return tuple(held.fd for held in self.locks)

    def share(self, slot: Slot) -> Lease:
        """A lease of another part of the same device: that is free when both are released."""
        return Lease(slot, [held.share() for held in self.locks])

    def release(self) -> None:
        """Give the slot back. Calling it twice has no effect."""
        self.held = False
        for held in self.locks:
            held.release()

    close = release


@dataclass
class Devices:
    """The slots of a sweep, by kind of device."""

    settings: DeviceSettings
    machine: Machine
    notes: list[str] = field(default_factory=list)
    _slots: dict[Device, list[Slot]] = field(default_factory=dict)

    def check(self, configs: Iterable[Config]) -> None:
        """Refuse what `configs` could never run on, before anything begins: raises UserError."""
        wanted = list(configs)
        if self.settings.gpus != "all" and {cfg.device for cfg in wanted} == {"cpu"}:
            raise UserError(f"{_as_typed(self.settings.gpus)}{self._no_use()}")
        for cfg in sorted(wanted, key=lambda cfg: cfg.device):
            used, number = self.slots(cfg.device), cfg.platform.gpu
            if cfg.device == "cpu" or number is None:
                continue
            gpu = self.machine.gpus_for(cfg.device)[number]
            if all(slot.gpu != gpu for slot in used):
                raise UserError(
                    f"platform.gpu={number}: that GPU ({gpu.name}) is not among those to be used: "
                    f"{', '.join(slot.name for slot in used)}.\n"
                    f"Name it with devices=[{number}], or leave platform.gpu out."
                )

    def slots(self, device: Device) -> list[Slot]:
        """Slots of one kind, made when first asked for; a UserError says what cannot be had."""
        if device not in self._slots:
            made = self._cpu_slots() if device == "cpu" else self._gpu_slots(device)
            self._slots[device] = made
        return self._slots[device]

    def all(self) -> list[Slot]:
        """Every slot that was made so far."""
        return [slot for slots in self._slots.values() for slot in slots]

    def places(self, slot: Slot) -> tuple[Slot, ...]:
        """Where trials prepare on a slot (`schedule`): each has a share of a GPU's cores.

        On a CPU the cores are what is measured, so each has all of them; one at a time runs then.
        """
        asked = self.settings.prepare
        count = prepared(slot) if asked == "auto" else asked
        if count == 1:
            return (slot,)
        shares = [slot.cores] * count if slot.gpu is None else _shares(list(slot.cores), count)
        return tuple(
            replace(slot, name=f"{slot.name}, place {number}", cores=share)
            for number, share in enumerate(shares, start=1)
        )

    def gpu_index(self, device: Device) -> int:
        """Index of a GPU that stands for all that are used: they are of one model."""
        gpu = self.slots(device)[0].gpu
        return 0 if gpu is None else self.machine.gpus_for(device).index(gpu)

    def _cpu_slots(self) -> list[Slot]:
        cores, count = usable_cores(), self.settings.cpu_slots
        most = self.machine.threads(len(cores))
        if count > most:
            raise UserError(
                f"devices.cpu_slots={count}: this process may use {most} core(s), and every "
                f"slot needs one of its own.\nUse devices.cpu_slots=1 to {most}."
            )
        shares = _shares(cores, count)
        return [Slot(f"CPU slot {n}", "cpu", None, share) for n, share in enumerate(shares)]

    def _gpu_slots(self, device: Device) -> list[Slot]:
        gpus = self.machine.gpus_for(device)
        chosen = self._chosen(gpus)
        if not chosen:
            return []
        first, model = chosen[0], attrgetter("name", "arch", "driver")
        same = [gpu for gpu in chosen if model(gpu) == model(first)]
        if len(same) < len(chosen):
            other = next(gpu for gpu in chosen if gpu not in same)
            text = f"{first.name} and {other.name} cannot be compared with one another"
            if self.settings.gpus != "all":
                raise UserError(f"devices: {text}.\nName GPUs of one model with devices=[...].")
            self.notes.append(f"{text}: only the {len(same)} of the first kind are used")
        # Shares of all GPUs of the host, not of those chosen: a trial has the same surroundings
        # whoever else is sweeping.
        shares = _shares(usable_cores(), len(gpus))
        return [Slot(f"GPU {gpu.index}", device, gpu, shares[gpus.index(gpu)]) for gpu in same]

    def _chosen(self, gpus: tuple[Gpu, ...]) -> list[Gpu]:
        """The GPUs that `devices` names, in the order of the machine."""
        if self.settings.gpus == "all":
            return list(gpus)
        named: dict[str, int | str] = {}
        for wanted in self.settings.gpus:
            if isinstance(wanted, int):
                found = [gpus[wanted]] if 0 <= wanted < len(gpus) else []
            else:
                found = [gpu for gpu in gpus if gpu.uuid.startswith(wanted)]
            if len(found) == 1 and found[0].uuid not in named:
                named[found[0].uuid] = wanted
                continue
            problem = f"there is no such GPU as {wanted}"
            if len(found) > 1:
                problem = f"{wanted} is the beginning of {len(found)} UUIDs"
            elif found:
                problem = f"{named[found[0].uuid]} and {wanted} are the same GPU"
            there = ", ".join(f"{n} ({gpu.uuid})" for n, gpu in enumerate(gpus))
            raise UserError(
                f"{_as_typed(self.settings.gpus)}: {problem}. There is "
                f"{there or 'none of its kind'}.\n"
                "Give each GPU once, by index or UUID: devices=[0,1], or devices=all."
            )
        return [gpu for gpu in gpus if gpu.uuid in named]

    def _no_use(self) -> str:
        """Why no GPU can be named here, behind what was typed."""
        if not self.machine.gpus:
            return (
                ": this machine has no GPU that is visible.\nLeave it out to "
                "run on the CPU (devices.cpu_slots=N trials at a time), or check the driver and "
                "*_VISIBLE_DEVICES; python -m openpi_opt.doctor looks."
            )
        return (
            " names GPUs, but every configuration here runs on the CPU.\n"
            "Leave it out, or use platform=cuda or platform=rocm with a torch that was built for "
            "it."
        )


def _as_typed(gpus: str | list[int | str]) -> str:
    return "devices=" + (gpus if isinstance(gpus, str) else f"[{','.join(map(str, gpus))}]")


def lease(slot: Slot) -> Lease | None:
    """Take a slot, or None while any part of it is in use."""
    taken: list[Held] = []
    with ExitStack() as given_back:
        for key in slot.keys:
            held = _take(f"{key}.lock")
            if held is None:
                return None
            taken.append(held)
            given_back.callback(held.release)
        given_back.pop_all()
    return Lease(slot, taken)


class Queue:
    """This process among those who want a device: every sweep, confirmation and node has one.

    Who finds a device in use holds its `next` lock until it has the device. So whoever has it sees
    that it is wanted, gives it up when its trials have ended, and does not get it back before.
    Who is next and leaves a free device alone, because it was stopped perhaps, is passed by.
    """

    def __init__(self) -> None:
        self._next: dict[str, Held] = {}
        self._idle: dict[str, float] = {}  # slots that are free for another, since when

    def lease(self, slot: Slot) -> Lease | None:
        """Take a slot; None while any part of it is in use, or somebody else is next."""
        for key in slot.keys:  # all processes ask in the same order
            if key not in self._next:
                held = _take(f"{key}.next.lock")
                if held is None:
                    return self._pass_by(slot)
                self._next[key] = held
        taken = lease(slot)
        if taken is not None:
            self.leave([slot])
        return taken

    def _pass_by(self, slot: Slot) -> Lease | None:
        if any(_is_held(f"{key}.lock") for key in slot.keys):
            self._idle.pop(slot.name, None)
            return None
        since = self._idle.setdefault(slot.name, time.monotonic())
        return None if time.monotonic() - since < PATIENCE_SECONDS else lease(slot)

    def leave(self, slots: Iterable[Slot]) -> None:
        """Wait for these no more. Calling it twice has no effect."""
        for key in {key for slot in slots for key in slot.keys}:
            held = self._next.pop(key, None)
            if held is not None:
                held.release()

    def is_wanted(self, slot: Slot) -> bool:
        """Whether another process waits for the slot."""
        return any(_is_held(f"{key}.next.lock") for key in slot.keys if key not in self._next)


def wait_for(slots: Sequence[Slot], busy: Callable[[], None]) -> Lease:
    """Take one of these slots; `busy` is called whenever none is free, and pauses or raises."""
    queue = Queue()
    try:
        while True:
            for slot in slots:
                taken = queue.lease(slot)
                if taken is not None:
                    return taken
            busy()
    finally:
        queue.leave(slots)


def measure_lock() -> Held | None:
    """The lock of those who want to measure alone on this host, or None while another has it."""
    return _take("measure.lock")


def float32_seats(memory_mib: float | None) -> int:
    """How many trials may hold a float32 policy on a GPU at once: 14 GB, and what it computes."""
    return max(1, int((memory_mib or 0) // _MIB_A_SEAT))


def float32_seat(gpu: Gpu) -> Held | None:
    """The lock of one of them, or None while all are taken."""
    names = (f"{gpu.uuid}.float32-{n}.lock" for n in range(float32_seats(gpu.memory_mib)))
    return next((held for name in names if (held := _take(name)) is not None), None)


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
    Raises UserError when there is no such GPU, or `cfg` names another.
    """
    names = _wanted(cfg, machine, wanted, records)
    found = Devices(DeviceSettings(gpus=names), machine)
    found.check([cfg])
    slots, told = found.slots(cfg.device), False

    def busy() -> None:
        nonlocal told
        if not told:
            told = True
            fixed = wanted is None and len(slots) == 1 and slots[0].gpu is not None
            hint = "\n--device names another GPU, on which everything is measured anew"
            say(f"{in_use(slots)}{hint if fixed else ''}")
        pause(_WAIT_SECONDS)

    return wait_for(slots, busy)


def _wanted(
    cfg: Config, machine: Machine, wanted: int | str | None, records: Sequence[Record]
) -> Any:
    """The GPUs of which one is to be taken, as in `devices=`; a CPU is one slot."""
    for name in (wanted, cfg.platform.gpu):
        if name is not None:
            return [name]
    here = {gpu.uuid: gpu for gpu in machine.gpus_for(cfg.device)} if cfg.device != "cpu" else {}
    gpus = [(record.role, record.result.fingerprint.get("gpu")) for record in records]
    seen = [(role, here[gpu["uuid"]]) for role, gpu in gpus if gpu and gpu["uuid"] in here]
    confirmed = [gpu.uuid for role, gpu in seen if role == "confirm"]
    same = dict.fromkeys(gpu.uuid for _, gpu in seen if gpu.name == seen[-1][1].name)
    return confirmed[-1:] or list(same) or "all"


def in_use(slots: Iterable[Slot]) -> str:
    """That all of these are in use, and by whom, for people."""
    names = "; ".join(f"{slot.name} by {holder(slot)}" for slot in slots)
    return f"waiting for a device: in use are {names}"


def holder(slot: Slot) -> str:
    """Who has a slot, for people."""
    with _errors() as folder:
        paths = [folder / f"{key}.lock" for key in slot.keys]
        held = next((path for path in paths if locks.is_held(path)), None)
        return "nobody" if held is None else locks.note(held) or "another process"


def leases_folder() -> Path:
    """The folder that all users of this host share, made when absent; OSError if it cannot be."""
    folder = Path(os.environ.get(LEASES_VARIABLE) or LEASES)
    try:
        folder.mkdir(mode=_FOLDER_MODE)
    except FileExistsError:
        pass
    else:
        folder.chmod(_FOLDER_MODE)  # whatever the umask is
    found = folder.lstat()
    if not stat.S_ISDIR(found.st_mode):
        raise NotADirectoryError(f"{folder} is a link or a file, not a folder")
    if found.st_mode & stat.S_IWOTH and not found.st_mode & stat.S_ISVTX:
        raise PermissionError(f"{folder} lets users remove each other's files (no sticky bit)")
    return folder


def _take(name: str) -> Held | None:
    with _errors() as folder:
        return locks.take(folder / name, locks.this_process(), _FILE_MODE)


def _is_held(name: str) -> bool:
    with _errors() as folder:
        return locks.is_held(folder / name)


@contextmanager
def _errors() -> Iterator[Path]:
    try:
        yield leases_folder()
    except OSError as error:
        raise UserError(
            f"the folder of device leases cannot be used: {error}.\n"
            f"All users of the host need one that they can write; give it in {LEASES_VARIABLE}, "
            "the same for all."
        ) from error


def prepared(slot: Slot) -> int:
    """How many trials prepare beside each other when nobody says: by the cores."""
    each = _CORES_EACH if slot.gpu is not None else 2 * _CORES_EACH
    return max(1, min(_MOST_PREPARED, len(slot.cores) // each))


def usable_cores() -> list[int]:
    """The cores that this process may use, hardware threads of one core beside each other."""
    return sorted(os.sched_getaffinity(0), key=_place_of)


def _place_of(core: int) -> tuple[int, int, int]:
    folder = _TOPOLOGY / f"cpu{core}" / "topology"
    try:
        package, number = ((folder / n).read_text() for n in ("physical_package_id", "core_id"))
        return int(package), int(number), core
    except (OSError, ValueError):  # hidden by a sandbox: in the order of their numbers
        return 0, core, core


def _shares(cores: list[int], count: int) -> list[tuple[int, ...]]:
    """The cores in `count` equal parts; with fewer cores than parts, one core for several."""
    size = len(cores) // count
    if size == 0:
        return [(cores[number % len(cores)],) for number in range(count)]
    return [tuple(cores[number * size : (number + 1) * size]) for number in range(count)]
