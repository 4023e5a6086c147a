"""How fast lora_inject is, compared with the frozen floor, the bare operations and PEFT.

    python scripts/bench.py                                 every row, some ten minutes
    python scripts/bench.py decode merge --rounds 15        some rows
    python scripts/bench.py --quick                         tiny sizes: does it work at all
    python scripts/bench.py --device cuda                   on a GPU, with peak memory
    python scripts/bench.py --json results.json             keep the numbers, beside those of others
    python scripts/bench.py none --json results.json        the table, of what the file has

At the end it prints the table of docs/evidence/performance.md; `--picture FILE.svg` draws its
picture. Needs the `bench` extra: `pip install -e '.[bench]'`.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import tempfile
import time
from pathlib import Path

# Before torch reads them: the profiler is loud, and no peer may ask a server for anything.
os.environ.setdefault("KINETO_LOG_LEVEL", "5")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

import torch
from benchmarks import report
from benchmarks.measure import Options, clock
from benchmarks.rows import ROWS


def main() -> None:
    """Run the rows that were asked for, and print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    choices = [*ROWS, "none"]
    parser.add_argument("rows", nargs="*", metavar="ROW", help=f"of {', '.join(choices)}")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--clock", choices=("wall", "cpu"), default="wall", help="what is counted")
    parser.add_argument("--rounds", type=int, help="rounds of every case")
    parser.add_argument("--json", type=Path, metavar="FILE", help="add the results to this file")
    parser.add_argument("--picture", type=Path, metavar="SVG", help="draw what an adapter adds")
    parser.add_argument("--quick", action="store_true", help="tiny sizes and two rounds")
    args = parser.parse_args()
    if unknown := [name for name in args.rows if name not in choices]:
        parser.error(f"no such row: {', '.join(unknown)}. Rows: {', '.join(ROWS)}")
    torch.set_num_threads(args.threads)
    clock(args.clock)
    path = args.json or Path(tempfile.mkdtemp()) / "results.json"
    here = report.machine(args.device)
    with torch.device(args.device):
        for name in args.rows or ROWS:
            if name == "none":
                continue
            title = (ROWS[name].__doc__ or "").strip()
            print(f"\n{name}: {title}", flush=True)
            about = {"title": title, "date": time.strftime("%Y-%m-%d"), "load": os.getloadavg()[0]}
            result = ROWS[name](Options(args.quick, args.rounds))
            gc.collect()
            report.add(path, here, name, result, {**about, "quick": args.quick})
    found = json.loads(path.read_text(encoding="utf-8"))
    print("\n" + report.table(found))
    if args.picture is not None:
        report.picture(found, args.picture)


if __name__ == "__main__":
    main()
