#!/usr/bin/env bash
# Every claim of the LoRA paper on real weights, from nothing: own environment, weights, all stages.
#
#   bash scripts/reproduce.sh [STAGE ...] [--quick] [--folder RECORDS] [--threads N]
#
# Some hours on one core; may be stopped at any moment and started again. Prints the tables that
# docs/evidence/reproduction.md has. Needs Python 3.11 or newer and pip.
set -euo pipefail
# shellcheck source=scripts/environment.sh
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
make_environment
PYTHONPATH=scripts exec "$venv/bin/python" -m reproduction "$@"
