#!/usr/bin/env bash
# Make .venv once per content of the dependency lists, install the project editable with $EXTRAS, print its interpreter.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
extras=${EXTRAS:-}
python=.venv/bin/python
stamp=".venv/.installed${extras:+-$extras}"
if ! "$python" -m pip --version >/dev/null 2>&1 || ! cmp -s <(cat requirements.txt pyproject.toml) "$stamp"; then
    base=""
    for candidate in python3.12 python3.11 python3.13 python3.10 python3; do
        if command -v "$candidate" >/dev/null && "$candidate" -c 'import sys; sys.exit(not (3, 10) <= sys.version_info[:2] <= (3, 13))' 2>/dev/null; then
            base=$candidate
            break
        fi
    done
    [ -n "$base" ] || { echo "error: no Python 3.10 to 3.13, PATH, install one or set PYTHON=/path/to/python" >&2; exit 2; }
    echo "Installing into .venv ($("$base" --version); about 6 GB, some minutes)" >&2
    "$python" -m pip --version >/dev/null 2>&1 || "$base" -m venv --clear .venv >&2 # also where a stop left half of one
    "$python" -m pip install --quiet --disable-pip-version-check --editable ".${extras:+[$extras]}" >&2
    cat requirements.txt pyproject.toml >"$stamp"
fi
echo "$PWD/$python"
