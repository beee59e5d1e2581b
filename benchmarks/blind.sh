#!/bin/bash
# The search of experiments/0010 in calls of ten minutes: `benchmarks/blind.sh PART OUT [words ...]`.
# The store is kept in /tmp/blind between calls on one machine, and in OUT/store.tar.gz beyond.
set -o pipefail
part=$1 out=$2; shift 2
common=(workload=three_cameras profile.roofline=none profile.energy=false tracking=none baseline=false "$@")
keep() { tar -C /tmp -czf "$out/store.tar.gz" --exclude=caches --exclude='*.safetensors' --exclude=trace.json.gz blind; }
mkdir -p "$out"
if [ ! -d /tmp/blind ] && [ -f store.tar.gz ]; then tar -C /tmp -xzf store.tar.gz; fi
case $part in
1)
  timeout -s INT 575 python3 -m benchmarks.blind --store /tmp/blind --out "$out" --minutes 20 --stop "${STOP:-9}" \
    "${common[@]}" 2>&1 | tee "$out/part1.log"
  keep ;;
2)
  timeout -s INT 340 python3 -m benchmarks.blind --store /tmp/blind --out "$out" --minutes "${MINUTES:-5}" --stop 5.4 \
    "${common[@]}" 2>&1 | tee "$out/part2.log"
  keep
  timeout -s INT 120 python3 -m openpi_opt.sweep store=/tmp/blind study=beside "${PRESET:-preset=h100}" "${common[@]}" 2>&1 \
    | tee "$out/beside.log"
  keep ;;
3)
  timeout -s INT 100 python3 -m benchmarks.neighbours --neighbours "${NEIGHBOURS:-4}" --rounds 4 --out "$out/neighbours.json" \
    "${PRESET:-preset=h100}" workload=three_cameras compile=off "$@" 2>&1 | tee "$out/neighbours.log" ;;
esac
