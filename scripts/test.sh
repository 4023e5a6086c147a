#!/usr/bin/env bash
# Everything that must hold: ruff, formatting, mypy, and all tests. From nothing: own environment.
#
#   bash scripts/test.sh [OPTIONS OF PYTEST]      for instance: -k peft, tests/test_cli.py, -m zoo
#
# Needs Python 3.11 or newer and pip. The environment .venv-test is made once, and again when
# pyproject.toml changes. Tests marked `zoo` are left out unless -m says otherwise.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

venv=.venv-test
sources=(lora_inject tests scripts)

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
mark="$(cksum <pyproject.toml)"
if [[ "$(cat "$venv/complete" 2>/dev/null)" != "$mark" ]] || ! new_enough "$venv/bin/python"; then
    python="$(find_python)"
    echo "making the environment $venv with $("$python" --version) (once; a few minutes)"
    rm -rf "$venv"
    "$python" -m venv "$venv"
    "$venv/bin/python" -m pip install --quiet --disable-pip-version-check --editable '.[test,lint]'
    echo "$mark" >"$venv/complete"
fi

# One thread for each of the two test processes: tiny models gain nothing from more, and lose much.
export OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1

failed=()
check() {
    echo "\$ $*"
    "$venv/bin/python" -m "$@" || failed+=("$1 $2")
}
check ruff check "${sources[@]}"
check ruff format --check "${sources[@]}"
check mypy -p lora_inject

echo "\$ pytest $*"
status=0
"$venv/bin/python" -m pytest -n 2 --durations=15 -m "not zoo" "$@" || status=$?
if ((${#failed[@]})); then
    printf 'error: %s failed, see above\n' "${failed[@]}" >&2
    exit 1
fi
exit "$status"
