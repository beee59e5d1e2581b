#!/bin/sh
# Try every promised Python that this machine has: install with the pins and run a few tests.
#
# PYTHONS="python3.10 /opt/python3.13/bin/python" names them; otherwise those of PATH and of pyenv.
# RESOLVE=1 asks pip alone which versions it would install: a minute each, and little disk.
# What it made stays in build/versions. Exit code 1 when one fails; a version that is absent is said.
set -u
export PYTHONPATH=.
root="${PYENV_ROOT:-$HOME/.pyenv}"
failed=""
tried=""
for version in 3.10 3.11 3.12 3.13; do
    found=""
    for python in ${PYTHONS:-python$version "$root"/versions/$version.*/bin/python}; do
        is=$("$python" -c 'import sys; print("%d.%d" % sys.version_info[:2])' 2>/dev/null) || continue
        [ "$is" = "$version" ] && found="$python"
    done
    if [ -z "$found" ]; then
        echo "== Python $version: not on this machine"
        continue
    fi
    home="build/versions/$version"
    echo "== Python $version: $("$found" -c 'import sys; print(sys.version.split()[0])')"
    tried="$tried $version"
    "$found" -m venv --clear "$home" || { failed="$failed $version"; continue; }
    pip="$home/bin/python -m pip --disable-pip-version-check install -q -c constraints.txt"
    if [ -n "${RESOLVE:-}" ]; then
        $pip --dry-run --report "$home/report.json" -e '.[dev]' || failed="$failed $version"
        continue
    fi
    $pip -e '.[dev]' &&
        OMP_NUM_THREADS=1 "$home/bin/python" -m pytest -q -m "not gpu" \
            ${TESTS:-tests/test_config.py tests/test_trial.py tests/knobs/test_compile.py} ||
        failed="$failed $version"
done
[ -n "$tried" ] || { echo "== none of the promised versions is on this machine"; exit 1; }
[ -z "$failed" ] || { echo "== failed:$failed"; exit 1; }
echo "== passed:$tried"
