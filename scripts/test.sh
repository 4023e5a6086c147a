#!/usr/bin/env bash
# Everything that must hold: ruff, formatting, who imports whom, mypy, the documentation and all tests. From nothing: own environment.
#
#   bash scripts/test.sh [OPTIONS OF PYTEST]      for instance: -k peft, tests/contract/test_cli.py, -m zoo
#   bash scripts/test.sh --newest [OPTIONS OF PYTEST]
#   bash scripts/test.sh --set 2.6 [OPTIONS OF PYTEST]
#
# Needs Python 3.11 or newer and pip. The environment .venv is made once, with the versions of
# scripts/constraints.txt. Tests marked `zoo` are left out unless -m says otherwise.
#
# --newest runs on the newest version of everything, in an environment that is made each time, and
# says what broke in a line for each cause. If nothing did and no test was left out by an option, it
# writes scripts/constraints.txt anew.
#
# --set runs the core tests on an older set of versions, of scripts/sets.txt, in .venv-2.6 or the like.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

sources=(lora_inject tests scripts)
# What must hold on every set, but for the tests marked `recent`: of torch, transformers and files.
core_tests=(tests/contract
    tests/house/test_{patches,platforms}.py)

# shellcheck source=scripts/environment.sh
source scripts/environment.sh
if asks_for_help "$@"; then
    usage "${BASH_SOURCE[0]}"
    exit
fi
newest=
if [[ ${1:-} == --set ]]; then
    make_set "${2:-}"
    export OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1
    exec "$venv/bin/python" -m pytest -n 2 --dist worksteal -m "not zoo and not recent" "${core_tests[@]}" "${@:3}"
elif [[ ${1:-} == --newest ]]; then
    newest=yes
    shift
    make_newest
else
    make_environment
fi

# One thread for each of the two test processes: tiny models gain nothing from more, and lose much.
export OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1

logs=$(mktemp -d)
trap 'rm -r "$logs"' EXIT
status=0
check() {
    local log=$logs/$1-$2.log
    echo "\$ $*"
    if "$venv/bin/$1" "${@:2}" 2>&1 | tee "$log"; then
        rm "$log"
    else
        status=1
    fi
}
check ruff check "${sources[@]}"
check ruff format --check "${sources[@]}"
check lint-imports --no-cache
# Which `type: ignore` is needed depends on the version of torch.
check mypy -p lora_inject --no-warn-unused-ignores
if "$venv/bin/python" -c 'import mkdocs' 2>/dev/null; then
    NO_MKDOCS_2_WARNING=1 check mkdocs build --quiet --strict
else
    echo "mkdocs is left out: it needs Python 3.11.5"
fi

echo "\$ pytest $*"
"$venv/bin/python" -m pytest -n 2 --dist worksteal --durations=15 -m "not zoo" --junit-xml "$logs/junit.xml" "$@" || status=1
echo
"$venv/bin/python" scripts/causes.py "$logs" || status=1
if [[ $newest ]]; then
    "$venv/bin/python" scripts/versions.py show
    if ((status == 0 && $# == 0)); then
        "$venv/bin/python" scripts/versions.py renew
    fi
fi
exit "$status"
