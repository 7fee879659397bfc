#!/usr/bin/env bash
# Make .venv once per content of the dependency lists, install the project editable with $EXTRAS, print its interpreter.
# With PYTHON=/path/to/python that one is printed and nothing is installed. uv installs where it can be had, else pip.
set -euo pipefail
system=$(uname -s)
if [ "$system" != Linux ]; then
    echo "error: VoCo2D runs on Linux and WSL, this is $system, use one of those or a container" >&2
    exit 2
fi
[ -z "${PYTHON:-}" ] || { echo "$PYTHON"; exit 0; }

cd "$(dirname "${BASH_SOURCE[0]}")/.."
extras=${EXTRAS:-}
python=.venv/bin/python
stamp=".venv/.installed-$extras"
begun=.venv/.begun # there while something is being installed: a stop can leave a package that only looks whole

usable() { [ ! -e "$begun" ] && "$python" -m pip --version >/dev/null 2>&1; }
lists() { cat requirements.txt pyproject.toml; }
up_to_date() { # what was installed with extras serves without them too
    local one
    if [ -e "$begun" ] || ! "$python" -c '' 2>/dev/null; then return 1; fi
    for one in "$stamp" .venv/.installed-*; do
        if [ "$one" = "$stamp" ] || [ -z "$extras" ]; then cmp -s <(lists) "$one" && return; fi
    done
    return 1
}

find_base() { # the name of a Python that the project supports
    for candidate in python3.12 python3.11 python3.13 python3.10 python3; do
        if "$candidate" -c 'import sys; sys.exit(not (3, 10) <= sys.version_info[:2] <= (3, 13))' 2>/dev/null; then
            echo "$candidate"
            return
        fi
    done
    echo "error: no Python 3.10 to 3.13, PATH, install one or set PYTHON=/path/to/python" >&2
    return 2
}

uv_install() { # fails where there is no uv, and where uv cannot install: it does not read pip's configuration
    local uv=(uv)
    if ! command -v uv >/dev/null; then
        "$python" -m pip install --quiet --disable-pip-version-check uv 2>/dev/null || return
        uv=("$python" -m uv)
    fi
    "${uv[@]}" pip install --quiet --python "$python" --compile-bytecode "$@" && return
    echo "uv could not install, pip is tried" >&2
    return 1
}

pip_install() { # compiles bytecode by itself
    "$python" -m pip install --quiet --disable-pip-version-check "$@"
}

if ! up_to_date; then
    exec 9<requirements.txt
    ! command -v flock >/dev/null || flock 9 # of two runs started at once the second waits and finds the work done
fi
if ! up_to_date; then
    if ! usable; then
        base=$(find_base)
        if ! "$base" -m venv --clear .venv >&2; then
            echo "error: $base cannot make .venv, $PWD, install its module venv (Debian: apt install python3-venv)" >&2
            exit 2
        fi
    fi
    echo "Installing into .venv ($("$python" --version); about 6 GB, some minutes)" >&2
    touch "$begun"
    project=(--editable ".${extras:+[$extras]}")
    if ! uv_install "${project[@]}" >&2 && ! pip_install "${project[@]}" >&2; then
        echo "error: the installation failed, $PWD/.venv, see above, mend it and run the same command again" >&2
        exit 2
    fi
    rm -f .venv/.installed-*
    lists >"$stamp"
    rm "$begun"
fi
echo "$PWD/$python"
