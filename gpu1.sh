# First call: bash gpu1.sh 1 | 2 | 3 ; each figure goes to $OUT as it comes.
step() { local limit=$1 name=$2; shift 2; local began=$SECONDS; echo "== $name"; timeout -k 5 "$limit" "$@" >"$OUT/$name.txt" 2>&1; echo "rc $? $((SECONDS - began)) s"; tail -n "${SHOW:-12}" "$OUT/$name.txt"; }
old="tree=../.. preset=h100"
case $1 in
1)
  nvidia-smi --query-gpu=name,clocks.sm,power.limit --format=csv
  step 70 cublaslt python3 -m pytest -q -x tests/gpu/test_cublaslt_gpu.py -m gpu -p no:cacheprovider
  step 290 tune python3 -m benchmarks.tune --out $OUT/tune.json --rows 51,11,pi05:50 --seconds 110,60,35 --flash 15
  cp $OUT/tune.json /tmp/tune.json
  ;;
2)
  t="tables=/tmp/tune.json"
  fast="$t fusion.vision_patches=true elementwise.rotary=triton blas.algorithm=searched"
  more="$fast fusion.residuals=true"
  all="$more elementwise.norms=triton"
  p="preset=h100 workload=three_cameras"
  step 230 h10 python3 -m benchmarks.contenders --rounds 4 --out $OUT/h10.json "old: $old workload=three_cameras" "searched: $p $fast" "residuals: $p $more" "norms: $p $all" "fp8: $p $t fusion.vision_patches=true elementwise.rotary=triton fusion.vision_mlp=false blas=fp8 blas.fp8.stages=[vision,prefill]"
  ;;
3)
  t="tables=/tmp/tune.json"
  all="$t fusion.vision_patches=true elementwise.rotary=triton blas.algorithm=searched fusion.residuals=true elementwise.norms=triton"
  p="preset=h100 vision=skip_masked workload=openpi"
  step 230 h50 python3 -m benchmarks.contenders --rounds 4 --out $OUT/h50.json "old: $old workload=openpi vision=skip_masked" "tables: $p $t" "all: $p $all" "pi05: preset=h100 model=pi05 workload=openpi_pi05 vision=skip_masked $all" "seed_b1: preset=h100 vision=skip_masked workload=seed_b1 $all"
  ;;
esac
