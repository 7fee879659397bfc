#!/usr/bin/env bash
# Make the environment with the test extras, lint, run the tests. PYTHON=/path/to/python uses that interpreter as it is.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
PYTHON=$(EXTRAS='test' bash .ci/environment.sh)
"$PYTHON" -m ruff check pipeline stages tests
export OMP_WAIT_POLICY=${OMP_WAIT_POLICY:-PASSIVE} # threads that spin while they wait make a busy machine several times slower
exec "$PYTHON" -m pytest "$@"
