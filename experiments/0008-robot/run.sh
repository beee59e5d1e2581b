# sh experiments/0008-robot/run.sh OUT [mini]: everything of this experiment, in some 150 s of a GPU.
out=$1
py=${PY:-python3}
keys="preset=h100 workload=any_prompt"
hz=50; seconds=60; two=10
if [ "$2" = mini ]; then
    keys="model=pi0_mini platform=cpu attention=sdpa workload=any_prompt workload.steps=2"
    hz=2; seconds=3; two=2; mini=--mini
fi
mkdir -p "$out"
$py - "$out" <<'PY'
import json, sys
from pathlib import Path
sys.path.insert(0, "tests/samples")
from robot_samples import norm_stats, tokenizer
out = Path(sys.argv[1])
(out / "norm_stats.json").write_text(json.dumps(norm_stats()))
tokenizer(out / "tokenizer.model")
PY
start=$(date +%s)
$py experiments/0008-robot/measure.py "$out/latency.json" $mini 2>&1 | tee "$out/latency.txt"
echo "measure.py took $(($(date +%s) - start)) s"
$py -m openpi_opt.serve $keys robot=libero norm_stats="$out/norm_stats.json" \
    tokenizer="$out/tokenizer.model" --port 8123 2> "$out/server.txt" &
server=$!
for second in $(seq 120); do
    if grep -q listening "$out/server.txt"; then break; fi
    if ! kill -0 $server; then break; fi
    sleep 0.5
done
robot="$py -m openpi_opt.serve.fake_robot libero --port 8123"
$robot --hz $hz --seconds $seconds --out "$out/one.json"
$robot --hz 25 --seconds $two --out "$out/two-0.json" &
$robot --hz 25 --seconds $two --seed 1 --out "$out/two-1.json"
sleep 1
kill -TERM $server
wait $server
echo "server ended with $?" | tee -a "$out/server.txt"
cat "$out/server.txt"
$py - "$out" <<'PY'
import json, sys
from pathlib import Path
from openpi_opt.serve.fake_robot import report
out = Path(sys.argv[1])
print(report([json.loads((out / "one.json").read_text())]))
print(report([json.loads((out / f"two-{i}.json").read_text()) for i in (0, 1)]))
PY
rm -f "$out/tokenizer.model" "$out/norm_stats.json"
