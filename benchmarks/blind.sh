#!/bin/bash
# The search of experiments/0010 on a machine that is reached in calls of minutes:
#   benchmarks/blind.sh search OUT [words ...]   begin it, or wait for the one that runs; WAIT seconds at most
#   benchmarks/blind.sh beside OUT [words ...]   a trial alone and with stopped neighbours
#   benchmarks/blind.sh informed OUT [words ...] the search that begins with the fastest known points
# A search goes on when a call ends. The store is in /tmp/blind and in OUT/store.tar.gz, which another
# machine goes on with when it lies in the working folder. MINUTES, PRESET, NEIGHBOURS: other than 20,
# preset=h100, 4. KNOWN: a journal that the sampler learns from.
set -o pipefail
part=$1 out=$2; shift 2
common=(workload=three_cameras profile.roofline=none profile.energy=false tracking=none baseline=false measure.max_seconds=4 limits.compile=240 "$@")
mkdir -p "$out" /tmp/blind-out
if [ ! -d /tmp/blind ] && [ -f store.tar.gz ]; then tar -C /tmp -xzf store.tar.gz; fi
keep() {
  cp /tmp/blind-out/* "$out"/
  tar -C /tmp -czf "$out/store.tar.gz" --exclude=caches --exclude='*.safetensors' --exclude=trace.json.gz blind
}
running() { [ -f /tmp/blind.pid ] && kill -0 "$(cat /tmp/blind.pid)" 2>/dev/null; }
case $part in
search | informed)
  more=(--beside "${PRESET:-preset=h100}" ${KNOWN:+--carry "$KNOWN"})
  if [ "$part" = informed ]; then more=(--start); fi
  if ! running; then
    setsid python3 -m benchmarks.blind --store /tmp/blind --out /tmp/blind-out --minutes "${MINUTES:-20}" \
      "${more[@]}" "${common[@]}" >"/tmp/blind-out/$part-$(date +%H%M%S).log" 2>&1 &
    echo $! >/tmp/blind.pid
  fi
  end=$((SECONDS + ${WAIT:-560}))
  while [ $SECONDS -lt $end ] && running; do sleep 1; done
  running && echo "still running"
  keep
  tail -n 40 "$(ls -t /tmp/blind-out/*.log | head -n 1)" | cut -c1-400 ;;
beside)
  timeout -s INT 150 python3 -m benchmarks.neighbours --neighbours "${NEIGHBOURS:-4}" --rounds 4 --out "$out/neighbours.json" \
    "${PRESET:-preset=h100}" workload=three_cameras compile=off "$@" 2>&1 | tee "$out/neighbours.log" ;;
esac
