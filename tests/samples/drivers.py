"""The libraries of drivers, as they answer on machines that are not here."""

import os
import types
from importlib.machinery import ModuleSpec
from typing import Any

import pynvml


class FakeNvml(types.ModuleType):
    """`pynvml` with its own constants and errors, of `count` H100s.

    It refuses the functions in `silent`; the GPUs in `lost` do not answer; those in `mig` show two
    instances each.
    """

    def __init__(self, count: int = 8, silent: str = "", lost: tuple[int, ...] = ()) -> None:
        super().__init__("pynvml")
        self.__spec__ = ModuleSpec("pynvml", None)
        self.count, self.silent, self.lost = count, silent.split(), lost
        self.mig: tuple[int, ...] = ()
        self.pids: list[int] = []
        self.limit_w, self.reasons = 700.0, 0
        self.init_error: int | None = None

    def __getattr__(self, name: str) -> Any:
        real = getattr(pynvml, name)  # AttributeError: the library has no such function
        if not name.startswith("nvml") or isinstance(real, int | type):
            return real

        def call(*arguments: Any) -> Any:
            answers = self.answers()
            if name in self.silent or name not in answers:
                raise pynvml.NVMLError(pynvml.NVML_ERROR_NOT_SUPPORTED)
            return answers[name](*arguments)

        return call

    def answers(self) -> dict[str, Any]:
        """What each function returns."""
        some = types.SimpleNamespace
        clocks = {pynvml.NVML_CLOCK_SM: 1755, pynvml.NVML_CLOCK_MEM: 2619}
        answers = {
            "Init": self._initialise,
            "Shutdown": lambda: None,
            "SystemGetDriverVersion": lambda: "580.1",
            "DeviceGetCount": lambda: self.count,
            "DeviceGetHandleByIndex": self._handle,
            "DeviceGetHandleByUUID": lambda uuid: f"handle of {uuid}",
            "DeviceGetCudaComputeCapability": lambda gpu: (9, 0),
            "DeviceGetUUID": lambda gpu: f"{'MIG' if '/' in gpu else 'GPU'}-abc{gpu}",
            "DeviceGetName": lambda gpu: "NVIDIA H100",
            "DeviceGetMemoryInfo": lambda gpu: some(total=80 * 2**30),
            "DeviceGetPciInfo": lambda gpu: some(busId=f"0000:0{gpu}:00.0"),
            "DeviceGetMigMode": lambda gpu: (int(int(gpu) in self.mig), 0),
            "DeviceGetMaxMigDeviceCount": lambda gpu: 7,
            "DeviceGetMigDeviceHandleByIndex": self._instance,
            "DeviceGetClockInfo": lambda _, kind: clocks[kind],
            "DeviceGetMaxClockInfo": lambda _, kind: 1980,
            "DeviceGetTemperature": lambda _, sensor: 61,
            "DeviceGetPowerUsage": lambda _: 652_300,
            "DeviceGetEnforcedPowerLimit": lambda _: 1e3 * self.limit_w,
            "DeviceGetPowerManagementLimit": lambda _: 1e3 * self.limit_w,
            "DeviceGetPowerManagementDefaultLimit": lambda _: 700_000,
            "DeviceGetCurrentClocksEventReasons": lambda _: self.reasons,
            "DeviceGetComputeRunningProcesses": lambda _: [some(pid=pid) for pid in self.pids],
            "DeviceGetViolationStatus": lambda _, policy: some(
                violationTime=2_500_000 * (policy + 1)
            ),
        }
        return {f"nvml{name}": answer for name, answer in answers.items()}

    def _initialise(self) -> None:
        if self.init_error is not None:
            raise pynvml.NVMLError(self.init_error)

    def _handle(self, index: int) -> str:
        if index in self.lost:
            raise pynvml.NVMLError(pynvml.NVML_ERROR_GPU_IS_LOST)
        return str(index)

    def _instance(self, handle: str, number: int) -> str:
        if number > 1:
            raise pynvml.NVMLError(pynvml.NVML_ERROR_NOT_FOUND)
        return f"{handle}/{number}"


class FakeAmdSmi(types.ModuleType):
    """The functions of ROCm's `amdsmi` that are used, with what its interface documents."""

    class AmdSmiException(Exception):  # noqa: N818, amdsmi's name
        """Its error."""

    AmdSmiClkType = types.SimpleNamespace(GFX="gfx", MEM="mem")
    AmdSmiTemperatureType = types.SimpleNamespace(HOTSPOT="hotspot")
    AmdSmiTemperatureMetric = types.SimpleNamespace(CURRENT="current")

    def __init__(self) -> None:
        super().__init__("amdsmi")
        self.log: list[str] = []
        self.socket_power: Any = 540
        clocks = {"gfx": {"clk": 2100, "max_clk": 2100}, "mem": {"clk": 1300, "max_clk": 1300}}
        serials = [{"asic_serial": serial} for serial in ("N/A", "0x00000000000000FF")]
        own = {"pid": os.getpid(), "name": "python"}
        caps = {"power_cap": 750_000_000, "default_power_cap": 750_000_000}
        self.__dict__.update({
            "amdsmi_init": lambda: self.log.append("init"),
            "amdsmi_shut_down": lambda: self.log.append("shut down"),
            "amdsmi_get_processor_handles": lambda: [0, 1],
            "amdsmi_get_gpu_asic_info": lambda gpu: serials[gpu],
            "amdsmi_get_clock_info": lambda gpu, kind: [{}, clocks][gpu][kind],
            "amdsmi_get_temp_metric": lambda gpu, sensor, metric: 55,
            "amdsmi_get_power_info": lambda gpu: {
                "current_socket_power": self.socket_power,
                "average_socket_power": 530,
            },
            "amdsmi_get_power_cap_info": lambda gpu: caps,
            "amdsmi_get_violation_status": lambda gpu: {
                "active_ppt_pwr": True, "active_socket_thrm": False, "active_hbm_thrm": "N/A"
            },
            "amdsmi_get_gpu_process_list": lambda gpu: [own, {"pid": 7, "name": "other"}],
        })  # fmt: skip
