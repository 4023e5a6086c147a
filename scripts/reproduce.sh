#!/usr/bin/env bash
# Every claim of the LoRA paper on real weights, from nothing: own environment, weights, all stages.
#
#   bash scripts/reproduce.sh [--stages STAGE ...] [--quick] [--threads N] [--random-weights]
#                             [--folder RECORDS] [--output DOCUMENT]
#
# Needs Python 3.11 or newer and pip; the environment .venv is shared with the other scripts. Takes
# some hours on one core; may be stopped at any moment and started again. Writes
# docs/evidence/reproduction.md and docs/pictures.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

# shellcheck source=scripts/environment.sh
source scripts/environment.sh
if asks_for_help "$@"; then
    usage "${BASH_SOURCE[0]}"
    exit
fi
make_environment

PYTHONPATH=scripts exec "$venv/bin/python" -m reproduction "$@"
