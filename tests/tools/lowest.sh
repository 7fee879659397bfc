#!/usr/bin/env bash
# The lowest versions that requirements.txt declares, on the lowest Python: the fast tests and a smoke run on both.
#   tests/tools/lowest.sh [FOLDER]   FOLDER gets the environment (5 GB) and is kept; without it a temporary one
# Needs uv, which finds or fetches Python 3.10; PYTHON=/path/to/python3.10 names one. No lint and no types here: those are
# for the versions that are developed with.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
command -v uv >/dev/null || { echo "error: no uv, PATH, pip install uv" >&2; exit 2; }
folder=${1:-}
if [ -z "$folder" ]; then
    folder=$(mktemp -d)
    trap 'rm -rf "$folder"' EXIT
fi
uv venv --quiet --clear --python "${PYTHON:-3.10}" "$folder/env"
export PYTHON="$folder/env/bin/python" OMP_WAIT_POLICY=PASSIVE
uv pip install --quiet --compile-bytecode --python "$PYTHON" --resolution lowest-direct --editable ".[test]"
uv pip freeze --quiet --python "$PYTHON" | grep -iE '^(torch|timm|numpy|polars|scipy|pydicom)==' | paste -sd ' '
"$PYTHON" -m pytest -m "not slow"
./run_all.sh --config smoke --out "$folder/smoke"
./run_all.sh --config smoke --out "$folder/smoke" --verify
