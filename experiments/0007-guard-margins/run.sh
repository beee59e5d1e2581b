#!/bin/bash
# Margins of the guard for a model on a device, false alarms, and the time that it adds to a trial.
#   OUT=folder MODEL=pi0 PLATFORM=cuda PRESET=preset=h100 bash run.sh        (from the project's root)
set -u
MODEL=${MODEL:-pi0} PLATFORM=${PLATFORM:-cuda} PRESET=${PRESET:-preset=h100} OUT=${OUT:-out}
STORE=${STORE:-/tmp/guard-store} SEEDS=${SEEDS:-0 1 2 3} RUNS=${RUNS:-50}
PY=${PY:-python3}
mkdir -p "$OUT" "$STORE/cpu"
common="model=$MODEL platform=$PLATFORM workload=three_cameras"

# On cores of the host: other seeds, both small models, batch 3; and honest configurations.
small="platform=cpu workload.active_cameras=[true,true,false] workload.prompt_slots=8 \
  workload.prompt_tokens=5 workload.horizon=4 workload.steps=4"
for seed in $SEEDS; do
  for model in pi0_mini pi05_mini; do
    OMP_NUM_THREADS=1 nice timeout 400 "$PY" -m openpi_opt.guard $small model=$model \
      weights.seed=$seed workload.seed=$seed --store "$STORE/cpu/$model-$seed" --table markdown \
      --out "$STORE/cpu/$model-$seed.json" >"$STORE/cpu/$model-$seed.md" 2>&1 &
  done
  OMP_NUM_THREADS=1 nice timeout 400 "$PY" -m benchmarks.guard --platform cpu --runs "$RUNS" \
    --seed $seed --out "$STORE/cpu/honest-$seed.json" >"$STORE/cpu/honest-$seed.txt" 2>&1 &
done
OMP_NUM_THREADS=1 nice timeout 400 "$PY" -m openpi_opt.guard $small model=pi0_mini \
  workload.batch_size=3 --store "$STORE/cpu/batch-3" --table markdown \
  --out "$STORE/cpu/batch-3.json" >"$STORE/cpu/batch-3.md" 2>&1 &

# On the device: margins, then trials; `again` finds the verdict on its structure in the store.
"$PY" -m openpi_opt.guard $common --store "$STORE" --table markdown --out "$OUT/margins.json" \
  >"$OUT/margins.md" 2>"$OUT/log.txt"
trial() {
  "$PY" -m openpi_opt.sweep $common study="$1" store="$STORE" tracking=none fresh=true "${@:2}" \
    >>"$OUT/log.txt" 2>&1
}
trial preset $PRESET
trial plain
trial lossy $PRESET ${LOSSY:-blas=fp8 blas.fp8.stages=[vision,prefill] fusion.vision_mlp=false}
trial again $PRESET
kill $(jobs -p) 2>/dev/null
tar -C "$STORE" -czf "$OUT/cpu.tar.gz" $(cd "$STORE" && ls cpu/*.json cpu/*.md cpu/*.txt)
find "$STORE/studies" -name result.json | tar -czf "$OUT/trials.tar.gz" -T -
tail -n 3 "$STORE"/cpu/honest-*.txt
