"""Words of the command line for trials as small as they can be: what tests of plumbing run."""

# One camera of three, one step: most of the time is that of starting.
ONE_CAMERA = "workload.active_cameras=[true]"
SMALL = ("model=pi0_mini", "platform=cpu", "workload.steps=1", "workload.horizon=2", ONE_CAMERA)
MEASURE = (
    "measure.iterations=10",
    "measure.warmup=3",
    "measure.rel_ci=null",
    "guard.inputs=2",
    "guard.seconds=0",
)
QUICK = (*SMALL, *MEASURE, "profile=none")
