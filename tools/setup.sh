#!/bin/sh
# Create .venv and install the project into it with its development tools.
#
# A machine whose Python already has torch (a ROCm or CUDA build of its vendor) keeps it: the
# environment then sees the machine's packages, and torch and triton are left alone. Otherwise the
# pinned torch of constraints.txt is installed.
set -eu
python="${PYTHON:-python3}"
"$python" - <<'PY'
import sys
if not (3, 10) <= sys.version_info[:2] <= (3, 13):
    sys.exit(f"openpi_opt needs Python 3.10 to 3.13, this is {sys.version.split()[0]}; "
             "call make with PYTHON=python3.12 or the like.")
PY
pip=".venv/bin/python -m pip --disable-pip-version-check"
own=$("$python" -c 'import importlib.metadata as m; print(m.version("torch"))' 2>/dev/null || true)
if [ -n "$own" ]; then
    echo "== keeping this machine's torch $own"
    "$python" -m venv --system-site-packages .venv
    # PyPI's triton would shadow the one that belongs to this torch.
    .venv/bin/python - >.venv/requirements.txt <<'PY'
import re, pathlib
text = pathlib.Path("pyproject.toml").read_text()
for block in re.findall(r"^(?:dependencies|dev) = \[(.*?)\]$", text, re.M | re.S):
    for line in re.findall(r'"([^"]+)"', block):
        if not re.match(r"(torch|triton)\b", line):
            print(line)
PY
    grep -Ev '^(torch|triton)==' constraints.txt >.venv/constraints.txt
    $pip install -q -c .venv/constraints.txt -r .venv/requirements.txt
    $pip install -q --no-deps -e .
else
    "$python" -m venv .venv
    $pip install -q -c constraints.txt -e '.[dev]'
fi
# openpi's client, for the server's tests. It asks for numpy < 2, and works with newer ones.
$pip install -q --no-deps openpi-client==0.1.2 || echo "== without openpi-client: one test is skipped"
echo "== installed into .venv: $(.venv/bin/python -c 'import torch; print("torch", torch.__version__)')"
