#!/usr/bin/env bash
# Make the environment with the test extras, lint, check types, run the tests; arguments go to pytest.
#   ./tests/run.sh [--fast] [...]   --fast leaves out what is marked slow: runs of the pipeline, processes, whatever takes seconds
# PYTHON=/path/to/python uses that interpreter as it is. One test process a core, four at most; -n 0: one, for --pdb.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
flags=()
[ "${1:-}" != --fast ] || { flags=(-m "not slow"); shift; }
PYTHON=$(EXTRAS='test' bash .ci/environment.sh)
"$PYTHON" -m ruff check pipeline stages tests
"$PYTHON" -m ruff format --check pipeline stages tests
# tests copy a finished run a hundred times, a thousand files each: in memory, where 4 GB are to spare and programs may run, that costs
# next to nothing
shm=$(df --output=avail -BG /dev/shm 2>/dev/null | tr -dc 0-9) || true
memory=
if [ -z "${TMPDIR:-}" ] && [ "${shm:-0}" -ge 4 ] && ! grep -q '^[^ ]* /dev/shm .*noexec' /proc/mounts \
    && [ "$(awk '/MemAvailable/ { print int($2 / 1e6) }' /proc/meminfo)" -ge 8 ]; then
    memory=$(mktemp -d /dev/shm/voco2d-tests.XXXXXX)
    export TMPDIR=$memory
    flags+=(-o tmp_path_retention_policy=failed)
fi
types=$(mktemp)
trap 'rm -rf "$types" "$memory"' EXIT
"$PYTHON" -m mypy >"$types" 2>&1 & # beside the tests: it needs one core, and they are slow to start
checker=$!
export PYTHONDONTWRITEBYTECODE= # else each of the hundreds of processes that tests start compiles the package anew
export OMP_WAIT_POLICY=${OMP_WAIT_POLICY:-PASSIVE} # threads that spin while they wait make a busy machine several times slower
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1} # every test process has a core; a second thread costs tiny networks more than it brings
# test processes of 700 MB fork for every series they convert, which large pages make a third cheaper (glibc 2.35; else nothing)
export GLIBC_TUNABLES=${GLIBC_TUNABLES:-glibc.malloc.hugetlb=1}
code=0
"$PYTHON" -m pytest -n auto --maxprocesses 4 --dist worksteal "${flags[@]}" "$@" || code=$?
wait "$checker" || code=1
cat "$types"
if [ "$code" = 1 ] && [ -n "$memory" ]; then
    trap - EXIT
    echo "tests/run.sh: what failed left its files in $memory" >&2
fi
exit "$code"
