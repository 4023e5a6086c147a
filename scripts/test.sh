#!/usr/bin/env bash
# Everything that must hold: ruff, formatting, mypy, the documentation and all tests. From nothing: own environment.
#
#   bash scripts/test.sh [OPTIONS OF PYTEST]      for instance: -k peft, tests/test_cli.py, -m zoo
#
# Needs Python 3.11 or newer and pip. The environment .venv-test is made once, and again when
# pyproject.toml changes. Tests marked `zoo` are left out unless -m says otherwise.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

venv=.venv-test
sources=(lora_inject tests scripts)

# shellcheck source=scripts/environment.sh
source scripts/environment.sh
make_environment "$venv" tests --editable '.[test,lint,docs]'

# One thread for each of the two test processes: tiny models gain nothing from more, and lose much.
export OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1

failed=()
check() {
    echo "\$ $*"
    "$venv/bin/python" -m "$@" || failed+=("$1 $2")
}
check ruff check "${sources[@]}"
check ruff format --check "${sources[@]}"
# Which `type: ignore` is needed depends on the version of torch.
check mypy --no-warn-unused-ignores -p lora_inject
NO_MKDOCS_2_WARNING=1 check mkdocs build --quiet --strict

echo "\$ pytest $*"
status=0
"$venv/bin/python" -m pytest -n 2 --dist worksteal --durations=15 -m "not zoo" "$@" || status=$?
if ((${#failed[@]})); then
    printf 'error: %s failed, see above\n' "${failed[@]}" >&2
    exit 1
fi
exit "$status"
