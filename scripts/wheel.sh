#!/usr/bin/env bash
# The wheel as a user gets it: built, checked, installed into an empty environment, and used there; then
# with transformers, for the plan of a family's config.
#
#   bash scripts/wheel.sh [FOLDER]    build into FOLDER (default: dist)
#
# Needs Python 3.11 or newer, pip, and an index. A release builds and checks with it.
set -euo pipefail
# shellcheck source=scripts/environment.sh
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
out=$(realpath -m "${1:-dist}")
place=$(mktemp -d)
trap 'rm -r "$place"' EXIT

python=$(find_python)
venv=$place/tools
"$python" -m venv "$venv" && install --quiet build twine
rm -rf "$out"
"$place/tools/bin/python" -m build --outdir "$out" . >"$place/build.log" || { tail "$place/build.log" && exit 1; }
"$place/tools/bin/python" -m twine check --strict "$out"/*

venv=$place/empty
"$python" -m venv "$venv" && install --quiet "$out"/*.whl
cd "$place"
empty/bin/lora-inject doctor
empty/bin/python - <<'END'
import torch
import lora_inject as li

net = li.inject(torch.nn.Sequential(torch.nn.Linear(4, 6)), {"rank": 2, "targets": ["0"]})
li.save_adapter(net, "adapter")
li.load_adapter(li.eject(net), "adapter")
END
empty/bin/lora-inject inspect adapter

install --quiet "$(ls "$out"/*.whl)[transformers]"
empty/bin/python - <<'END'
from transformers import LlamaConfig

LlamaConfig(hidden_size=64, intermediate_size=128, num_hidden_layers=2).save_pretrained("model")
END
empty/bin/lora-inject plan llama model # a config of a family, out of the wheel
echo "the wheel works: $(ls "$out"/*.whl)"
