from __future__ import annotations

import os
import stat
import time
from contextlib import ExitStack
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from process_samples import gpu, machine
from search_samples import CPU

from openpi_opt.config import Config
from openpi_opt.errors import UserError
from openpi_opt.machine import Gpu
from openpi_opt.process import devices, locks
from openpi_opt.process.devices import LEASES_VARIABLE, Devices, Slot, lease
from openpi_opt.space.settings import Settings

CORES = list(range(16))


def found(given: object, *gpus: Gpu) -> Devices:
    given = given if isinstance(given, dict) else {"gpus": given}
    settings = Settings.parse({"devices": given}).devices
    return Devices(settings, machine(*(gpus or tuple(map(gpu, range(4))))))


@pytest.fixture(autouse=True)
def _sixteen_cores(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(devices, "usable_cores", lambda: CORES)
    monkeypatch.setenv(LEASES_VARIABLE, str(tmp_path / "leases"))


@pytest.mark.parametrize(
    ("given", "indices"),
    [
        ("all", [0, 1, 2, 3]),
        ([2, 0], [0, 2]),
        (["GPU-1"], [1]),
        ({"gpus": [1, "GPU-3a"]}, [1, 3]),
        ({"cpu_slots": 2}, [0, 1, 2, 3]),
    ],
)
def test_gpus_by_index_and_uuid(given: object, indices: list[int]) -> None:
    slots = found(given).slots("cuda")
    assert [slot.gpu and slot.gpu.index for slot in slots] == indices


def test_a_gpu_has_the_same_cores_whoever_else_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    (alone,) = found([2]).slots("cuda")
    together = found("all").slots("cuda")
    assert alone in together
    assert [slot.cores for slot in together] == [tuple(CORES[n : n + 4]) for n in (0, 4, 8, 12)]
    monkeypatch.setattr(devices, "usable_cores", lambda: [5, 7])
    assert [slot.cores for slot in found("all").slots("cuda")] == [(5,), (7,), (5,), (7,)]


@pytest.mark.parametrize(
    ("given", "problem"),
    [
        ([7], "no such GPU as 7"),
        ([-1], "no such GPU as -1"),
        ([0, -4], "no such GPU as -4"),
        (["GPU-9"], "no such GPU as GPU-9"),
        (["1"], "no such GPU as 1"),  # in quotes it is no index
        (["GPU-1A"], "no such GPU as GPU-1A"),
        ([2**70], "no such GPU as"),
        ([0, 0], "0 and 0 are the same GPU"),
        ([1, "GPU-1"], "1 and GPU-1 are the same GPU"),
        (["GPU-"], "GPU- is the beginning of 4 UUIDs"),
    ],
)
def test_a_gpu_that_cannot_be_told_is_refused(given: list[object], problem: str) -> None:
    for use in (lambda at_hand: at_hand.slots("cuda"), lambda at_hand: at_hand.check([on("cuda")])):
        with pytest.raises(UserError, match=problem) as error:
            use(found(given))
        assert str(error.value).startswith(f"devices=[{','.join(map(str, given))}]: ")
        assert "3 (GPU-3a)" in str(error.value)
        assert "devices=[0,1], or devices=all" in str(error.value)


def on(device: str, gpu: int | None = None) -> Config:
    return Config.parse({"platform": {"device": device, "gpu": gpu}})


def test_gpus_that_are_named_without_any_are_refused() -> None:
    with pytest.raises(UserError, match=r"devices=\[7\]: this machine has no GPU") as error:
        Devices(Settings.parse({"devices": {"gpus": [7]}}).devices, CPU).check([on("cpu")])
    assert "cpu_slots" in str(error.value)
    with pytest.raises(UserError, match=r"devices=\[0\] names GPUs, but .* on the CPU"):
        found([0]).check([on("cpu")])
    found([0]).check([on("cpu"), on("cuda")])
    found("all").check([on("cpu")])


def test_a_configuration_whose_gpu_is_not_used_is_refused() -> None:
    """No slot would ever suit it, and the sweep would wait for ever."""
    found([0, 2]).check([on("cuda", 2), on("cuda")])
    with pytest.raises(UserError, match=r"platform.gpu=1: .*GPU 0, GPU 2") as error:
        found([0, 2]).check([on("cuda", 2), on("cuda", 1)])
    assert "devices=[1]" in str(error.value)
    with pytest.raises(UserError, match=r"platform.gpu=1: that GPU \(A100\)"):
        found("all", gpu(0), gpu(1, "A100")).check([on("cuda", 1)])


names = st.one_of(st.integers(-9, 9), st.text(max_size=8), st.floats(), st.booleans(), st.none())


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.one_of(names, st.lists(names, max_size=4)))
def test_wild_names_end_in_slots_or_a_user_error(given: object) -> None:
    try:
        slots = found(given).slots("cuda")
    except UserError:
        return
    assert slots
    assert len({slot.name for slot in slots}) == len(slots)
    assert len(slots) == (4 if given == "all" else len(given))


@pytest.mark.parametrize(
    "given", [[], "", [""], {"cpu_slots": 0}, {"gpu": 1}, True, 1.5, [True], [0.0], [None], [[0]]]
)
def test_wrong_values_are_refused(given: object) -> None:
    with pytest.raises(UserError, match="devices"):
        found(given)


def test_models_are_not_mixed() -> None:
    mixed = gpu(0), gpu(1, "A100"), gpu(2)
    by_default = found("all", *mixed)
    assert [slot.name for slot in by_default.slots("cuda")] == ["GPU 0", "GPU 2"]
    assert "A100" in by_default.notes[0]
    with pytest.raises(UserError, match="H100 and A100"):
        found([0, 1], *mixed).slots("cuda")


def test_cpu_slots_share_the_cores_and_are_at_most_as_many() -> None:
    slots = found({"cpu_slots": 3}).slots("cpu")
    assert [len(slot.cores) for slot in slots] == [5, 5, 5]
    assert len({core for slot in slots for core in slot.cores}) == 15
    with pytest.raises(UserError, match=r"cpu_slots=17.*16 core"):
        found({"cpu_slots": 17}).slots("cpu")


def test_overlapping_cpu_slots_exclude_one_another() -> None:
    one, (first, second) = found({"cpu_slots": 1}), found({"cpu_slots": 2}).slots("cpu")
    (whole,) = one.slots("cpu")
    held = lease(first)
    assert held is not None
    assert lease(whole) is None
    other = lease(second)  # the failed attempt above left nothing behind
    assert other is not None
    for taken in (held, other):
        taken.release()
    again = lease(whole)
    assert again is not None
    again.release()


def test_leases_are_for_all_users(tmp_path: Path) -> None:
    before = os.umask(0o077)
    try:
        held = lease(Slot("GPU 0", "cuda", gpu(0), (0,)))
        assert held is not None
        folder = (tmp_path / "leases").stat()
        file = (tmp_path / "leases" / "GPU-0a.lock").stat()
        assert stat.S_IMODE(folder.st_mode) == 0o1777
        assert stat.S_IMODE(file.st_mode) == 0o666
        assert f"process {os.getpid()} of user" in devices.holder(held.slot)
    finally:
        os.umask(before)
        if held is not None:
            held.release()
    assert devices.holder(held.slot) == "nobody"


def test_a_folder_that_somebody_prepared_is_refused(tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "leases").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(UserError, match="link"):
        lease(Slot("GPU 0", "cuda", gpu(0), (0,)))
    (tmp_path / "leases").unlink()
    (tmp_path / "leases").mkdir()
    (tmp_path / "leases").chmod(0o777)
    with pytest.raises(UserError, match="sticky"):
        lease(Slot("GPU 0", "cuda", gpu(0), (0,)))


def test_who_waits_for_a_lock_says_once_who_has_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(locks, "SAID_AFTER_SECONDS", 0.1)
    path, said = tmp_path / "plan.lock", list[str]()
    with ExitStack() as first:
        first.enter_context(locks.having(path, pytest.fail))

        def say(text: str) -> None:
            said.append(text)
            time.sleep(0.3)
            first.close()

        with locks.having(path, say):
            pass
    (line,) = said
    assert line.startswith(f"waiting for plan.lock, which process {os.getpid()} of user")
