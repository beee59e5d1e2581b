C="preset=h100 workload=three_cameras"
F="blas=fp8 fusion.vision_mlp=false"
S="vision=skip_masked"
(timeout -s INT 230 python3 -m benchmarks.contenders --out $OUT/a.json --rounds 3 "today: $C" "suffix: $C fusion.suffix=true" "h50 suffix: preset=h100 workload=openpi $S fusion.suffix=true"  > $OUT/a.txt 2>&1)
cat $OUT/a.txt; date
timeout -s INT 150 python3 -m benchmarks.tune --out $OUT/tune.json --rows 11,fp8:11,51 --seconds 20 > $OUT/tune.txt 2>&1
grep -v "^  *[0-9.]*  {" $OUT/tune.txt | grep Work | tail -40; date
(timeout -s INT 200 python3 -m benchmarks.contenders --out $OUT/b.json --rounds 3 "fp8 all suffix: $C $F fusion.suffix=true" "pi05 suffix: preset=h100 model=pi05 workload=openpi_pi05 $S fusion.suffix=true" "seed: preset=h100 workload=seed_b1 $S fusion.suffix=true" > $OUT/b.txt 2>&1)
cat $OUT/b.txt; date
