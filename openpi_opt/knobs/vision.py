"""Knob `vision`: how cameras go through the vision tower, and whether masked ones do."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Literal

from openpi_opt.knobs.base import Configuration, Knob, Options

if TYPE_CHECKING:
    from openpi_opt.pi0.policy import Pi0Policy


class VisionOptions(Options):
    """`cameras`: all in one pass of the tower, or one pass for each."""

    cameras: Literal["batched", "separate"] = "batched"
    skip_masked: bool = False


class Vision(Knob[VisionOptions]):
    """Cameras one by one or batched, and masked ones left out. All vendors.

    `cameras` is exact because nothing in SigLIP looks across images. `skip_masked` is exact, too: a
    masked key gets the softmax weight exp(-2.4e38 - ...) = 0 exactly, so leaving it out changes no
    sum; nobody reads what a masked query computes; and positions count valid tokens only, so
    nothing shifts. It drops masked cameras before the tower and masked cameras and padding of the
    prompt before the prefix, which then is all valid and needs no mask. Which tokens these are is
    the workload's layout, declared once, not read from the masks: a batch with other masks is
    refused before it reaches the policy. In a flexible layout it drops the cameras that
    `workload.active_cameras` rules out; which of the others came is known on the device only.

    Source: sunxxuns/openpi-1 (`OPENPI_BATCH_SIGLIP`, `OPENPI_SKIP_MASKED_IMAGES`), reported on
    MI350 with batched cameras and nothing skipped.
    """

    name = "vision"
    options_type = VisionOptions
    stages: ClassVar = {"cameras": ("vision",)}

    def canonical(self, cfg: Configuration) -> VisionOptions:
        """Nothing to skip without masked tokens; one camera left is one pass either way."""
        options, workload = self.of(cfg), cfg.workload
        exact = workload.layout == "exact"
        padded = exact and workload.prompt_tokens < workload.prompt_slots
        skip = options.skip_masked and (padded or not all(workload.active_cameras))
        encoded = sum(workload.active_cameras) if skip else len(workload.active_cameras)
        cameras = "batched" if encoded == 1 else options.cameras
        return VisionOptions(cameras=cameras, skip_masked=skip)

    def transform(self, policy: Pi0Policy, cfg: Configuration) -> None:
        """Replace the stages `encode_images` and, when tokens are skipped, `prefill`."""
        options = self.canonical(cfg)
        if options == VisionOptions():
            return
        from openpi_opt.runtime import workload_of
        from openpi_opt.surgery.lean import lean

        if options.skip_masked:
            policy.declare_layout(workload_of(cfg).layout)
        lean(
            policy,
            horizon=cfg.workload.horizon,
            separate_cameras=options.cameras == "separate",
            skip_masked=options.skip_masked,
        )
