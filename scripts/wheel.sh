#!/usr/bin/env bash
# The wheel as a user gets it: built, checked, installed into an empty environment, and used there.
#
#   bash scripts/wheel.sh [FOLDER]    build into FOLDER (default: dist)
#
# Needs Python 3.11 or newer, pip, and an index. A release builds and checks with it.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
# shellcheck source=scripts/environment.sh
source scripts/environment.sh
case " $* " in *" --help "* | *" -h "*) usage && exit ;; esac
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
import json
import torch
import lora_inject as li

net = li.inject(torch.nn.Sequential(torch.nn.Linear(4, 6)), {"rank": 2, "targets": ["0"]})
li.save_adapter(net, "adapter")
li.load_adapter(li.eject(net), "adapter")

names = ("model.layers.0.self_attn.q_proj.weight", "model.layers.0.mlp.up_proj.weight")  # a checkpoint
about = {n: {"dtype": "F32", "shape": [8, 8], "data_offsets": [256 * i, 256 * i + 256]} for i, n in enumerate(names)}
header = json.dumps(about).encode()
open("model.safetensors", "wb").write(len(header).to_bytes(8, "little") + header + bytes(512))
END
empty/bin/lora-inject inspect adapter
empty/bin/lora-inject plan llama model.safetensors # a config of a family, out of the wheel
echo "the wheel works: $(ls "$out"/*.whl)"
