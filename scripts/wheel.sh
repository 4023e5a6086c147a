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
"$python" -m venv "$place/tools" && "$place/tools/bin/python" -m pip install --quiet build twine
rm -rf "$out"
"$place/tools/bin/python" -m build --outdir "$out" . >"$place/build.log" || { tail "$place/build.log" && exit 1; }
"$place/tools/bin/python" -m twine check --strict "$out"/*

"$python" -m venv "$place/empty" && "$place/empty/bin/python" -m pip install --quiet "$out"/*.whl
cd "$place"
empty/bin/lora-inject doctor
empty/bin/python - <<'END'
import torch
import lora_inject as li

net = li.inject(torch.nn.Sequential(torch.nn.Linear(4, 6)), {"rank": 2, "targets": ["0"]})
li.save_adapter(net, "adapter")
li.load_adapter(li.eject(net), "adapter")
tree = {"model.layers.0.self_attn.q_proj.weight": torch.zeros(8, 8)}
torch.save(tree, "base.pt")
END
empty/bin/lora-inject inspect adapter
echo "the wheel works: $(ls "$out"/*.whl)"
