#!/bin/sh
# The study of this folder. STORE=DIR chooses where it is recorded; running it again continues it.
set -eu
store="${STORE:-mlruns}"
python3 -m openpi_opt.sweep -m study=first-sweep store="$store" workload=three_cameras \
    attention=eager,sdpa,aiter compile=off,default graph=none,manual
