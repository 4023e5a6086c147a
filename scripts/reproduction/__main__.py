"""Every claim of the LoRA paper, run on real weights: one stage for each, one document.

    bash scripts/reproduce.sh                    all stages, some hours on one core
    bash scripts/reproduce.sh --stages latency   some stages; the document has all that is done
    bash scripts/reproduce.sh --stages           no stage: the document from what is done
    bash scripts/reproduce.sh --quick            tiny sizes, a minute or two: does it work at all

Every finished run is a file below `--folder`. It may be stopped at any moment, with Ctrl-C too, and
started again: finished runs are kept, and only what is missing or has other settings is run. The
document says for each claim what the paper found, what was found here, and whether it holds.

The script makes an environment with the weights; in one with the extras `bench` and `demo` and the
weights, `PYTHONPATH=scripts python -m reproduction` does the same.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType

# Before torch reads them: the profiler is loud, and no peer may ask a server for anything.
os.environ.setdefault("KINETO_LOG_LEVEL", "5")
os.environ.setdefault("TQDM_DISABLE", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # threads that spin take time from each other

import torch
from benchmarks import measure, report

from reproduction import (
    counting,
    decoder,
    directions,
    document,
    latency,
    matrices,
    memory,
    quality,
    ranks,
    rivals,
    switching,
    together,
)
from reproduction.lab import FULL, QUICK, Lab, weights_present

REPO = Path(__file__).resolve().parents[2]
STAGES: dict[str, ModuleType] = {
    "counting": counting,
    "quality": quality,
    "matrices": matrices,
    "rivals": rivals,
    "directions": directions,
    "switching": switching,
    "memory": memory,
    "latency": latency,
    "ranks": ranks,
    "together": together,
    "decoder": decoder,
}
ORDER = (
    "quality", "rivals", "decoder", "matrices", "ranks", "directions", "counting", "memory",
    "latency", "together", "switching",
)  # fmt: skip
HEAD = """\
# The paper, reproduced

This page compares the claims of "LoRA: Low-Rank Adaptation of Large Language Models" (Hu et al.,
arXiv:2106.09685) with results of this package on small pretrained models and a CPU. It is written
by `bash scripts/reproduce.sh`; do not edit it by hand.

A claim *holds* or *does not hold* if the difference is more than two standard errors from the
bound; otherwise the runs are too few to tell, and it is *undecided*. The models here have 23 and
135 million parameters and the runs are short. What holds here is shown at this scale only. What
does not hold here may still hold at the paper's scale."""
RANDOM = """

**These are tiny random models and made-up sentences: the numbers mean nothing.**"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the stages that were asked for, then write the document."""
    args = parse(argv)
    random_weights = args.random_weights
    if not random_weights and not weights_present():
        if not args.quick:
            print(
                "error: the weights are not installed. Run bash scripts/reproduce.sh",
                file=sys.stderr,
            )
            return 1
        print("the weights are not installed: tiny random models instead")
        random_weights = True
    torch.set_num_threads(args.threads)
    measure.clock("cpu" if args.threads == 1 else "wall")  # leaves out waiting for a core
    lab = Lab(args.folder, QUICK if args.quick else FULL, random_weights, say, listen())
    quiet()
    try:
        for name in args.stages:
            say(f"# {name}")
            STAGES[name].do(lab)
    except KeyboardInterrupt:
        say("stopped; what is finished is kept, and the same command goes on from there")
        return 130
    write(lab, args.output)
    return 0


def write(lab: Lab, path: Path) -> None:
    """Write the document from whatever is done."""
    sections = {name: STAGES[name].section(lab, path) for name in ORDER}
    records = lab.records()
    if not records:
        say("nothing is done yet: no document")
        return
    machine = document.where(report.machine("cpu"), records)
    document.write(path, HEAD + RANDOM * lab.random_weights, sections, machine)
    say(f"wrote {path}")


def listen() -> Callable[[], bool]:
    """Remember Ctrl-C; the function that is returned says whether there was one.

    Python drops an exception that is raised within a destructor, and with it the Ctrl-C that
    happened to come there. It is left alone where it is ignored, as in a background job.
    """
    asked: list[int] = []

    def stop(number: int, frame: object) -> None:  # noqa: ARG001 - what a handler is given
        asked.append(number)
        raise KeyboardInterrupt

    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, stop)
    return lambda: bool(asked)


def say(text: str) -> None:
    """One line, with the time."""
    print(f"{time.strftime('%H:%M:%S')} {text}", flush=True)


def quiet() -> None:
    """No progress bars for loading."""
    from transformers.utils import logging

    logging.disable_progress_bar()


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        prog="reproduce.sh",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--stages", nargs="*", choices=STAGES, default=list(STAGES), metavar="STAGE",
        help=f"which, in this order ({', '.join(STAGES)}); none: only the document",
    )  # fmt: skip
    parser.add_argument("--quick", action="store_true", help="tiny sizes: does it work at all")
    parser.add_argument(
        "--random-weights", action="store_true", help="tiny random models and made-up sentences"
    )
    parser.add_argument("--folder", type=Path, help="records (default: .reproduction)")
    parser.add_argument("--output", type=Path, help="default: the page in docs; quick: folder")
    parser.add_argument("--threads", type=int, default=1, help="of torch (default: %(default)s)")
    args = parser.parse_args(argv)
    if args.folder is None:
        args.folder = REPO / (".reproduction/quick" if args.quick else ".reproduction")
    if args.output is None:
        quick = args.folder / "reproduction.md"
        args.output = quick if args.quick else REPO / "docs" / "evidence" / "reproduction.md"
    return args


if __name__ == "__main__":
    sys.exit(main())
