#!/usr/bin/env bash
# Raw DICOM to report and submission: every stage in order, up-to-date ones skipped. Flags are those of the stages:
#   ./run_all.sh [--config FILE] [--data DIR] [--out DIR] [--jobs N] [--device auto|cpu|cuda] [--force] [key=value ...]
#   ./run_all.sh --verify [--config FILE] [--out DIR] checks sizes and checksums of a finished run's files and changes nothing
# PYTHON=/path/to/python ./run_all.sh uses that interpreter as it is and installs nothing.
set -euo pipefail
case " $* " in *" --help "* | *" -h "*) sed -n '2,5s/^# //p' "${BASH_SOURCE[0]}" && exit 0 ;; esac
root=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
PYTHON=$(bash "$root/.ci/environment.sh")
export PYTHONPATH="$root${PYTHONPATH:+:$PYTHONPATH}"
case " $* " in *" --verify "*) exec "$PYTHON" -m pipeline.run.verify "$@" ;; esac
child=
stop() { # a signal to this script alone reaches the stage too
    trap '' INT TERM
    [ -z "$child" ] || { kill -TERM "$child" 2>/dev/null && wait "$child"; } || true
    exit "$1"
}
trap 'stop 130' INT
trap 'stop 143' TERM
run() { # name, command
    local name=$1
    shift
    "$@" &
    child=$!
    wait "$child" || {
        code=$?
        echo "run_all.sh: stopped at $name (exit code $code)" >&2
        exit "$code"
    }
    child=
}
run preflight "$PYTHON" -m pipeline.preflight "$@"
for stage in "$root"/stages/0[0-9]_*.py; do
    run "$(basename "$stage")" "$PYTHON" "$stage" "$@"
done
