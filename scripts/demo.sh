#!/usr/bin/env bash
# The main job on real input, from nothing: a pretrained decoder (SmolLM2-135M) learns to say in one line
# what a Python function does, is merged, and every step is checked. Some six minutes on two cores.
#
#   bash scripts/demo.sh [--steps 64] [--pairs 96] [--lr 3e-3] [--config FILE] [--out .demo]
#
# --steps: of 8 pairs; --pairs: held-out ones to measure on. Needs Python 3.11 or newer and pip. When it
# is started again, the environment .venv, which all scripts share, and the base are used again.
set -euo pipefail
# shellcheck source=scripts/environment.sh
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
make_environment
exec "$venv/bin/python" scripts/demo.py "$@"
