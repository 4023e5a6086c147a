#!/usr/bin/env bash
# The main job on real input, from nothing: own environment, real weights, train, merge, check.
#
#   bash scripts/demo.sh [--steps N] [--pairs N] [--out DIR] ...    (--help lists them all)
#
# Needs Python 3.11 or newer and pip. Takes some minutes. It can be started again: the environment
# .venv, which all scripts share, and the base are used again, everything else is done again.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

# shellcheck source=scripts/environment.sh
source scripts/environment.sh
if asks_for_help "$@"; then
    exec "$(find_python)" scripts/demo_options.py --help
fi
make_environment

exec "$venv/bin/python" scripts/demo.py "$@"
