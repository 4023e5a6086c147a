"""The curves of several fine-tuning runs in one picture.

    python scripts/compare.py LoRA=out/lora full=out/full --output curves.png

Each run is a name and the output folder of `scripts/finetune.py`, of which `results.json` is read.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from training.curves import draw


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("runs", nargs="+", metavar="NAME=FOLDER")
    parser.add_argument("--metric", default="eval_nll", help="beside the loss (default: eval_nll)")
    parser.add_argument("--output", type=Path, default=Path("curves.png"))
    arguments = parser.parse_args()
    runs = {}
    for run in arguments.runs:
        name, sign, folder = run.partition("=")
        results = Path(folder) / "results.json"
        if not sign or not results.is_file():
            parser.error(f"'{run}': say NAME=FOLDER, with a folder that holds a results.json")
        runs[name] = json.loads(results.read_text(encoding="utf-8"))["log"]
    if draw(runs, arguments.metric, arguments.output) is None:
        parser.error("matplotlib is not installed: pip install '.[train]'")
    print(arguments.output)


if __name__ == "__main__":
    main()
