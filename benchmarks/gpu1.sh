set -x
C="preset=h100 workload=three_cameras"
F="blas=fp8 fusion.vision_mlp=false"
time timeout 200 python3 -m benchmarks.contenders --out $OUT/a.json --rounds 5 "today: $C" "suffix: $C fusion.suffix=true" \
 "fp8 vision prefill: $C $F blas.fp8.stages=[vision,prefill]" "fp8 all suffix: $C $F fusion.suffix=true" \
 "h50: preset=h100 workload=openpi" "h50 suffix: preset=h100 workload=openpi fusion.suffix=true" 2>&1 | tail -12 | tee $OUT/a.txt
time timeout 150 python3 -m benchmarks.contenders --out $OUT/b.json --rounds 4 "pi05: preset=h100 model=pi05 workload=openpi_pi05 fusion.expert_layer=false" \
 "pi05 fused: preset=h100 model=pi05 workload=openpi_pi05 fusion.suffix=true" "cdt: $C fusion.suffix=true compile.inductor.coordinate_descent_tuning=true" 2>&1 | tail -12 | tee $OUT/b.txt
time timeout 250 python3 -m benchmarks.tune --out $OUT/tune.json --rows 51,fp8:11,pi05:50 --seconds ${1:-55} 2>&1 | tee $OUT/tune.txt | tail -60
cat $OUT/a.txt $OUT/b.txt
