#!/bin/bash
# What experiments/0007-guard-margins records: the guard's share of a trial and its margins for a model on a
# device, and beside them, on cores of the host, margins of the small models and false alarms.
#   OUT=out bash benchmarks/guard.sh        in the project's root, on a machine with a GPU, within LIMIT seconds
# Every figure is written when it is there; $OUT/host.tar.gz is made anew every 20 seconds.
set -u
MODEL=${MODEL:-pi0} PLATFORM=${PLATFORM:-cuda} PRESET=${PRESET-preset=h100} OUT=${OUT:-out} PY=${PY:-python3}
LIMIT=${LIMIT:-400} SEEDS=${SEEDS-0 1 2 3} WORKERS=${WORKERS:-8} RUNS=${RUNS:-25} WORKLOAD=${WORKLOAD:-workload=three_cameras}
end=$(($(date +%s) + LIMIT)) work=$(mktemp -d)
mkdir -p "$OUT"
left() { echo $((end - $(date +%s) > 1 ? end - $(date +%s) : 1)); }
host() { OMP_NUM_THREADS=1 nice timeout "$(left)" "$PY" -m benchmarks.guard "${@:2}" --out "$work/$1.jsonl" >"$work/$1.txt" 2>&1 & }

for seed in $SEEDS; do
  for model in pi0_mini pi05_mini; do
    for batch in 1 3; do
      host "margins-$model-$batch-$seed" margins --seeds "$seed" --models "$model" --batches "$batch"
    done
  done
done
for worker in $(seq "$WORKERS"); do
  host "honest-$worker" honest --platform cpu --runs "$RUNS" --seed "$worker"
done
(while sleep 20; do tar -C "$work" --exclude=./store -czf "$OUT/host.tar.gz" .; done) &
saver=$!

device() { timeout "$(left)" "$PY" "${@:2}" >>"$OUT/$1.txt" 2>&1; echo "$1: exit code $? with $(left) s left"; }
common="model=$MODEL platform=$PLATFORM $WORKLOAD"
device cost -m benchmarks.guard cost $common $PRESET --out "$OUT/cost.jsonl" &
device margins -m openpi_opt.guard $common --store "$work/store" --table markdown --out "$OUT/margins.jsonl"
while [ "$(jobs -rp | grep -vc "^$saver$")" -gt 0 ] && [ "$(left)" -gt 1 ]; do sleep 1; done
kill "$saver"
tar -C "$work" --exclude=./store -czf "$OUT/host.tar.gz" .
tail -qn 1 "$work"/honest-*.txt
