#!/bin/bash
# What experiments/0007-guard-margins records of a GPU; each figure is written as it comes.
#   OUT=out bash benchmarks/guard.sh own          FP8 by itself: 150 s at most
#   OUT=out bash benchmarks/guard.sh cost margins what the guard adds to a trial; all margins: 15 minutes
set -u
MODEL=${MODEL:-pi0} PLATFORM=${PLATFORM:-cuda} PRESET=${PRESET-preset=h100} OUT=${OUT:-out} PY=${PY:-python3}
common="model=$MODEL platform=$PLATFORM ${WORKLOAD-workload=three_cameras}" store=$(mktemp -d)
mkdir -p "$OUT"
step() {
  timeout "$2" "$PY" -m "${@:3}" --out "$OUT/$1.jsonl" >"$OUT/$1.txt" 2>&1
  echo "$1: exit code $? after $SECONDS s"
}
for name in "$@"; do
  case $name in
    own) step own "${LIMIT:-150}" benchmarks.guard own fp8 $common ;;
    cost) step cost "${LIMIT:-300}" benchmarks.guard cost $common $PRESET ;;
    margins) step margins "${LIMIT:-600}" openpi_opt.guard $common --store "$store" --table markdown ;;
  esac
done
