"""How fast lora_inject is, compared with the frozen floor, PEFT and loralib, promise by promise.

    python scripts/bench.py                                   every row, ten minutes
    python scripts/bench.py decode merge --rounds 15          some rows
    python scripts/bench.py --quick                           tiny sizes: does it work at all
    python scripts/bench.py --device cuda                     every row on a GPU, with peak memory
    python scripts/bench.py --json results.json --write performance.md

With `--json` the rows that were measured replace their old numbers in the file, and the document
and the picture show all that it holds. Needs the `bench` extra: `pip install -e '.[bench]'`.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path

# Before torch reads them: the profiler is loud, and no peer may ask a server for anything.
os.environ.setdefault("KINETO_LOG_LEVEL", "5")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

import torch
from benchmarks import compiled, errors, exact, launches, report, serving, sharing, steps, surgery
from benchmarks.measure import Options, Result, clock

METHOD = """\
An adapter adds to a step little more than its two thin products. It is injected, loaded and
switched in a fraction of PEFT's time, and keeps fewer bytes for the backward:

<!-- result -->

![What an adapter adds to the time, beside PEFT](pictures/performance.svg)

**Every time on this page is that of a CPU.** Of a GPU, what does not depend on the machine is
counted: the kernels that each path launches and the bytes that it moves
([Launches](#launches)). What was never run on a GPU: a training step, a forward, a server. So no
time is promised there.

## How it was measured

All variants of a case run in one process, in an order that is shuffled for each round. A ratio is
formed within a round; the tables show the median of the rounds, and the JSON file their range and
number. The floor is measured twice under two names. *error* is how far these two are apart, plus
half the range of their ratio over the root of the number of rounds. Smaller differences are noise.

The *floor* of a training step is the same model with every parameter frozen and the output of its
embedding requiring a gradient: forward and the gradient of the input, without an optimizer. No
adapter can train faster. *bare operations* are the least that the mathematics needs: one thin
product each way, and the additions, in an autograd Function without a check. AdamW is the fused one
in all variants. The bounds below are for our time over another in the same run, mostly that of the
bare operations.

Launches, bytes and errors do not depend on the machine; a test checks the launches.
"""

Row = Callable[[Options], Result]

ROWS: dict[str, Row] = {
    "launches": launches.launches,
    "errors": errors.errors,
    "step-fp32": steps.step_fp32,
    "step-bf16": steps.step_bf16,
    "step-float32": steps.step_float32,
    "saved-bytes": steps.saved,
    "dropout": steps.dropout,
    "decode": serving.decode,
    "inject": surgery.injection,
    "load": surgery.load,
    "switch": serving.switch,
    "hot-swap": serving.hot_swap,
    "routed": serving.routed_batch,
    "merge": surgery.merging,
    "experts": sharing.experts,
    "train-many": sharing.train_many,
    "trials": sharing.trials,
    "compile": compiled.compiled,
    "exactness": exact.exactness,
}


def main() -> int:
    """Run the rows that were asked for."""
    args = _arguments()
    unknown = [name for name in args.rows if name not in ROWS]
    if unknown:
        print(f"error: no such row: {', '.join(unknown)}. Rows: {', '.join(ROWS)}", file=sys.stderr)
        return 2
    machine = report.machine(args.device)
    if args.json is not None and (other := report.other_machine(args.json, machine)):
        remedy = "A page is of one machine: name another file, or remove this one"
        print(f"error: {args.json} was measured on {other}. {remedy}", file=sys.stderr)
        return 2
    options = Options(args.quick, args.full, args.rounds, args.threads)
    torch.set_num_threads(args.threads or 1)
    if args.device != "cpu":
        torch.set_default_device(args.device)
    clock(args.clock)
    rows = {}
    for name in [row for row in ROWS if not args.rows or row in args.rows]:
        rows[name] = _run(name, options, args.clock)
    found = {"machine": machine, "rows": rows}
    if args.json is not None:
        found = report.merged_into(args.json, found)
        args.json.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    found["rows"] = {name: found["rows"][name] for name in ROWS if name in found["rows"]}
    print("\n" + report.plain(report.summary(rows)))
    if args.write is not None:
        text = report.document(found, args.write, METHOD.strip(), args.json)
        args.write.write_text(text, encoding="utf-8")
    if args.picture is not None:
        report.picture(found["rows"], args.picture)
    return 0


def _run(name: str, options: Options, which: str) -> dict[str, object]:
    row = ROWS[name]
    title = (row.__doc__ or "").strip().splitlines()[0]
    print(f"\n{name}: {title}", flush=True)
    began, load = time.time(), os.getloadavg()[0]
    result = row(options)
    gc.collect()
    n = options.threads or 1
    return report.as_dict(
        title,
        result,
        date=time.strftime("%Y-%m-%d %H:%M", time.gmtime(began)) + " UTC",
        seconds=round(time.time() - began, 1),
        load=load,
        threads=f"{n} thread{'s' * (n > 1)}",
        quick=options.quick,
        clock=which,
    )


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("rows", nargs="*", metavar="ROW", help=f"of {', '.join(ROWS)}")
    parser.add_argument("--threads", type=int, help="1; step-bf16 also runs with 2")
    parser.add_argument("--device", default="cpu", help="cuda: with peak memory and GPU peers")
    parser.add_argument("--clock", choices=("wall", "cpu"), default="wall", help="what is counted")
    parser.add_argument("--rounds", type=int, help="rounds of every case")
    parser.add_argument("--json", type=Path, metavar="FILE", help="add the results to this file")
    parser.add_argument("--picture", type=Path, metavar="SVG", help="draw what an adapter adds")
    parser.add_argument("--write", type=Path, metavar="FILE", help="write a document in Markdown")
    parser.add_argument("--quick", action="store_true", help="tiny sizes and two rounds")
    parser.add_argument("--full", action="store_true", help="run PEFT at 20,000 sites too")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
