#!/usr/bin/env bash
# Everything that must hold: ruff, formatting, who imports whom, mypy, the site and all tests, in some five
# minutes on two cores. From nothing: own environment, made once.
#
#   bash scripts/test.sh [OPTIONS OF PYTEST]             for instance: -k peft, tests/contract/test_cli.py, -m zoo
#   bash scripts/test.sh --newest [OPTIONS OF PYTEST]    on the newest version of everything
#   bash scripts/test.sh --set 2.6 [OPTIONS OF PYTEST]   core tests on older versions, of scripts/sets.txt
#
# Needs Python 3.11 or newer and pip. Tests marked `zoo` are left out unless -m says otherwise. If all
# passes with --newest and no other option, it writes scripts/constraints.txt anew.
set -euo pipefail
# shellcheck source=scripts/environment.sh
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
# One thread for each of the two test processes: tiny models gain nothing from more, and lose much.
export OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 NO_MKDOCS_2_WARNING=1
tests=(-m pytest -n 2 --dist worksteal)
newest=

case ${1:-} in
    --set)
        make_environment "${2:?a set of scripts/sets.txt}"
        exec "$venv/bin/python" "${tests[@]}" -m "not zoo and not recent" tests/contract tests/house/test_{patches,platforms}.py "${@:3}"
        ;;
    --newest)
        newest=yes
        shift
        make_environment newest
        ;;
    *) make_environment ;;
esac

status=0
check() {
    echo "\$ $*"
    "$venv/bin/$1" "${@:2}" || status=1
}
check ruff check lora_inject tests scripts
check ruff format --check lora_inject tests scripts
check lint-imports --no-cache
check mypy -p lora_inject --no-warn-unused-ignores # which it needs depends on the version of torch
[[ ! -e $venv/bin/mkdocs ]] || check mkdocs build --quiet --strict
check python "${tests[@]}" --durations=15 -rfE -m "not zoo" "$@"

# For all platforms: without a build's label, and without what torch for CUDA brings along in its own versions.
if [[ $newest ]] && ((status == 0 && $# == 0)) && [[ $("$venv/bin/python" --version) == *" 3.11."* ]]; then
    {
        sed '/^#/!d' scripts/constraints.txt
        "$venv/bin/python" -m pip list --format freeze | tr A-Z_ a-z- | sed 's/+.*//' |
            grep -Ev '^(nvidia-|cuda-|triton=|lora-inject=|pip=|setuptools=|uv=|llm-smol|gt-all-)' | LC_ALL=C sort -t= -k1,1
    } >constraints.new
    mv constraints.new scripts/constraints.txt
fi
exit "$status"
