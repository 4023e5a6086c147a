"""Every claim of the LoRA paper, run on real weights: a function for each stage, tables at the end.

    bash scripts/reproduce.sh                    all stages, some hours on one core
    bash scripts/reproduce.sh latency ranks      some stages
    bash scripts/reproduce.sh --quick            tiny random models: does it work at all

Every finished run is a file below `--folder`. It may be stopped at any moment, with Ctrl-C too, and
started again: only what is missing or has other sizes is run.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

# Before torch reads them: the profiler is loud, and no peer may ask a server for anything.
os.environ |= {"KINETO_LOG_LEVEL": "5", "TQDM_DISABLE": "1", "HF_HUB_OFFLINE": "1"}
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # threads that spin take time from each other

import torch
from benchmarks import measure
from transformers.utils import logging

from reproduction import costs, sentences
from reproduction.decoder import decoder
from reproduction.directions import directions
from reproduction.lab import QUICK, Lab, Sizes, table

REPO = Path(__file__).parents[2]
PAGE = REPO / "docs" / "evidence" / "reproduction.md"  # its claims are in the order of the stages
N_CLAIMS = {
    sentences.quality: 3, decoder: 3, sentences.matrices: 4, sentences.ranks: 4, directions: 5,
    costs.counting: 3, costs.memory: 2, costs.latency: 3, costs.together: 3, costs.switching: 4,
}  # fmt: skip
STAGES = {stage.__name__: stage for stage in N_CLAIMS}


def papers_claims() -> dict[str, list[list[str]]]:
    """By stage, the first two cells of the page's claims: a claim, and the paper's own figures."""
    lines = iter(PAGE.read_text(encoding="utf-8").partition("| :-- |")[2].splitlines()[1:])
    return {
        stage.__name__: [next(lines).removeprefix("| ").split(" | ")[:2] for _ in range(n)]
        for stage, n in N_CLAIMS.items()
    }


def main(argv: Sequence[str] | None = None) -> int:
    """Run the stages that were asked for, and print their tables."""
    parser = argparse.ArgumentParser(
        prog="reproduce.sh", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("stages", nargs="*", metavar="STAGE", help=f"of {', '.join(STAGES)}")
    parser.add_argument("--quick", action="store_true", help="tiny random models")
    parser.add_argument("--folder", type=Path, help="records (default: .reproduction)")
    parser.add_argument("--threads", type=int, default=1, help="of torch (default: %(default)s)")
    args = parser.parse_args(argv)
    if unknown := {*args.stages} - {*STAGES}:
        parser.error(f"no such stage: {', '.join(unknown)}")
    folder = args.folder or REPO / (".reproduction/quick" if args.quick else ".reproduction")
    torch.set_num_threads(args.threads)
    measure.clock("cpu" if args.threads == 1 else "wall")  # leaves out waiting for a core
    lab = Lab(folder, QUICK if args.quick else Sizes(), args.quick)
    logging.disable_progress_bar()
    papers = papers_claims()
    claims = []
    try:
        for name in args.stages or STAGES:
            found, answers = STAGES[name](lab)
            claims += [(*claim, *a) for claim, a in zip(papers[name], answers, strict=True)]
            if found:
                print(f"\n## {name}\n\n\n{found}", flush=True)
    except KeyboardInterrupt:
        print("stopped; what is finished is kept, and the same command goes on from there")
        return 130
    print("\n## All claims\n", table(("claim", "in the paper", "here", ""), claims, words=4))
    return 0


if __name__ == "__main__":
    sys.exit(main())
