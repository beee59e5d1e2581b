"""Programs that measure the project or break it on purpose; run as `python -m benchmarks.NAME`."""

from openpi_opt import interrupt

interrupt.arm_at_start(__name__)
