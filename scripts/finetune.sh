#!/usr/bin/env bash
# Fine-tune a model of transformers, from nothing: own environment, then scripts/finetuning/finetune.py.
#
#   bash scripts/finetune.sh --model smollm2 --train docstrings --max-steps 64 --output out
#   PROCESSES=2 bash scripts/finetune.sh ...        (by torchrun, with DDP)
#
# Needs Python 3.11 or newer and pip. --help lists the options. The environment .venv is shared with
# the other scripts; it has the pretrained weights `smollm2` and `minilm`.
set -euo pipefail

# shellcheck source=scripts/environment.sh
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
program=$scripts/finetuning/finetune.py
if asks_for_help "$@"; then
    exec "$(find_python)" "$scripts/finetuning/options.py"
fi
make_environment

if ((${PROCESSES:-1} > 1)); then
    exec "$venv/bin/torchrun" --standalone --nproc_per_node "$PROCESSES" "$program" "$@"
fi
exec "$venv/bin/python" "$program" "$@"
