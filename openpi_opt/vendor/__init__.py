"""Vendors of devices: everything that differs between them. `VENDORS` is where one is registered.

Adding a vendor: a module with a subclass of `base.Vendor`, its line below, and
`conf/platform/DEVICE.yaml`, which a test asks for.
"""

from __future__ import annotations

from openpi_opt.vendor.amd import Amd
from openpi_opt.vendor.base import Vendor
from openpi_opt.vendor.cpu import Cpu
from openpi_opt.vendor.nvidia import Nvidia

# In the order in which `platform=auto` takes them.
VENDORS: tuple[Vendor, ...] = (Nvidia(), Amd(), Cpu())
BY_DEVICE = {vendor.device: vendor for vendor in VENDORS}
BY_NAME = {vendor.name: vendor for vendor in VENDORS}
GPU_VENDORS = tuple(vendor for vendor in VENDORS if vendor.is_gpu)
DEVICES = tuple(BY_DEVICE)
# Throttle reasons that slow a GPU against its operator's will, of any vendor.
HOLDING = frozenset().union(*(vendor.holding for vendor in VENDORS))
