C="preset=h100 workload=three_cameras"
F="blas=fp8 fusion.vision_mlp=false"
timeout -s INT 270 python3 -m benchmarks.tune --out $OUT/tune.json --rows 51,fp8:11,pi05:50 --seconds 50 > $OUT/tune.txt 2>&1
grep -v "^  *[0-9.]*  {" $OUT/tune.txt | tail -40
cp $OUT/tune.json /tmp/tune.json; python3 benchmarks/apply.py $OUT/tune.json
date
timeout -s INT 290 python3 -m benchmarks.contenders --out $OUT/a.json --rounds 4 "today: $C" "suffix: $C fusion.suffix=true" \
 "fp8 all suffix: $C $F fusion.suffix=true" "h50 suffix: preset=h100 workload=openpi fusion.suffix=true" \
 "pi05 suffix: preset=h100 model=pi05 workload=openpi_pi05 fusion.suffix=true" > $OUT/a.txt 2>&1
cat $OUT/a.txt; date
