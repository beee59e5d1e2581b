import json, sys

for path in sys.argv[1:]:
    try:
        d = json.load(open(path))
    except OSError:
        continue
    for r in d["results"]:
        for e in r["entries"]:
            key = e.split("):")[0]
            mod = "triton_decode" if key.count(",") == 1 else "triton_skinny_gemm"
            open(f"openpi_opt/kernels/{mod}.py", "a").write(f"\nTABLE.update({{{e}}})\n")
