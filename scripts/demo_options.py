"""The main job on real input: plan, inject, train, save, load, merge, and check every step.

A pretrained decoder (SmolLM2-135M) learns to say in one line what a Python function does, from the
docstrings of the installed Python, and is measured on modules that training never sees.
"""

from __future__ import annotations

import argparse
from pathlib import Path

CONFIG = Path(__file__).resolve().parents[1] / "configs/smollm2_135m.yaml"


def parse() -> argparse.Namespace:
    """Read the command line of the demo."""
    parser = argparse.ArgumentParser(prog="demo.sh", description=__doc__)
    add = parser.add_argument
    add("--steps", type=int, default=64, help="training steps of 8 pairs (%(default)s)")
    add("--pairs", type=int, default=96, help="held-out pairs to measure on (%(default)s)")
    add("--lr", type=float, default=3e-3, help="peak learning rate (%(default)s)")
    add("--config", type=Path, default=CONFIG, help="adapter config")
    add("--out", type=Path, default=Path(".demo"), help="work folder (%(default)s)")
    add("--measure", nargs=2, type=Path, help=argparse.SUPPRESS)
    return parser.parse_args()


if __name__ == "__main__":
    parse()  # --help for demo.sh, by any Python: nothing here needs the environment
