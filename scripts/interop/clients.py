"""What other programs make of this package's files, and whether `lora-inject check` foretells it.

    python scripts/interop/clients.py peft mlx                # installed beside this package
    python scripts/interop/clients.py comfyui --sources DIR     # from the program's sources
    python scripts/interop/clients.py vllm --only slices      # cases, or a base, with this word

Each case is an adapter on a tiny model with random weights in float32. The outputs of the program
with our file are compared with those of this package; `check` must accept a file exactly if the
program takes it and computes the same. The last table is that of docs/evidence/clients.md. The
exit code is 1 if a verdict of `check` is wrong. `merged` is a checkpoint that `merge_checkpoint`
wrote.
"""

from __future__ import annotations

import argparse
import importlib
import logging
import re
import shutil
import sys
import tempfile
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import programs
import transformers
from programs import base_model, outputs
from programs.cases import CASES, Case, adapted, make_base
from torch import Tensor

import lora_inject as li

EQUAL = 1e-3  # of log-probabilities, or of the outputs of an image model
SUFFIX = {"gguf": ".gguf", "kohya": ".safetensors"}
COMPONENT = {"unet": "unet", "flux": "transformer", "sd3": "transformer", "clip": "text_encoder"}
MERGED = ("plain", "unequal ranks and alphas", "tied: head", "tied: embeddings", "slices")
MERGED += ("SmolLM2: plain",)


@dataclass(frozen=True)
class Result:
    """What became of one file; `check` is None if it was not asked, '' if it accepts the file."""

    program: str
    layout: str
    case: str
    effect: float = 0.0
    off: float | None = None
    problem: str = ""
    check: str | None = None

    @property
    def equal(self) -> bool:
        return self.off is not None and self.off < EQUAL

    @property
    def wrong(self) -> bool:
        if self.check is None:
            return self.off is not None and not self.equal
        return self.equal is bool(self.check)

    def __str__(self) -> str:
        did = self.problem if self.off is None else f"{self.off:.1e}"
        said = {None: "-", "": "takes it"}.get(self.check, self.check)
        verdict = f"**WRONG**: {said}" if self.wrong else said
        start = f"| {self.program} | `{self.layout}` | {self.case} | {self.effect:.2f}"
        return f"{start} | {did} | {verdict} |"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("programs", nargs="+", help="names of files in scripts/interop/programs")
    parser.add_argument("--sources", type=Path, help="sources of a program that is not installed")
    parser.add_argument("--only", default="", help="run cases, or a base, with this word")
    asked = parser.parse_args()
    programs.SOURCES = asked.sources
    logging.disable(logging.WARNING)
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    found = []
    print("| program | file | adapter | effect | program | check |\n|---|---|---|---|---|---|")
    for name in asked.programs:
        program = importlib.import_module(f"programs.{name}")
        for result in results(program, asked.only):
            found.append(result)
            print(result, flush=True)
    print_summary(found)
    return 1 if any(result.wrong for result in found) else 0


def results(program: Any, only: str) -> Iterator[Result]:
    title = program.version()
    known = getattr(program, "CASES", CASES)
    cases = {n: case for n, case in known.items() if only in f"{case.base}: {n}"}
    for name in dict.fromkeys(case.base for case in cases.values()):
        with tempfile.TemporaryDirectory() as place:
            base = make_base(name, Path(place))
            alone = Result(title, "base", name)
            try:
                run = program.start(base)
                yield replace(alone, off=difference(run(None), outputs(base_model(base))))
            except Exception as error:  # noqa: BLE001
                yield replace(alone, problem=f"does not start: {first_line(error)}")
                continue
            here = {n: case for n, case in cases.items() if case.base == name}
            for n, case in here.items():
                yield from of_case(program, run, base, replace(alone, case=n), case)
            for n in [n for n in here if n in MERGED and "merged" in program.FILES]:
                merged = replace(alone, layout="merged", case=n)
                yield replace(merged, off=of_merged(program, base, here[n]))


def of_case(program: Any, run: Any, base: Path, alone: Result, case: Case) -> Iterator[Result]:
    """Yield a result for each format that the program is given."""
    model = adapted(case, base)
    state, ours = li.algebra.as_dtype(li.adapter_state(model), case.dtype), outputs(model)
    effect = difference(ours, outputs(base_model(base)))
    for layout in [layout for layout in program.FILES if layout != "merged"]:
        result = replace(alone, layout=layout, effect=effect)
        path = base.parent / f"{alone.case} {layout}{SUFFIX.get(layout, '')}".replace(":", "")
        part = None if layout == "peft" else COMPONENT.get(base.name)
        part = "te" if (part, layout) == ("text_encoder", "kohya") else part
        try:
            li.convert(state, path, layout, base=base, **({"component": part} if part else {}))
        except li.FormatError as error:
            yield replace(result, problem=f"not written: {first_line(error)}")
            continue
        try:
            result = replace(result, off=difference(run(path), ours))
        except Exception as error:  # noqa: BLE001
            result = replace(result, problem=f"refused: {first_line(error)}")
        if program.CHECK is not None:
            client = program.versioned() if hasattr(program, "versioned") else program.CHECK
            stops = [f for f in li.check_adapter(path, client, base=base) if f.stops]
            result = replace(result, check=stops[0].problem if stops else "")
        yield result


def of_merged(program: Any, base: Path, case: Case) -> float:
    """Return how far off the program is that serves the merged checkpoint as a base."""
    model = adapted(case, base)
    path = base.with_name("merged")
    shutil.rmtree(path, ignore_errors=True)
    adapter = li.save_adapter(model, base.with_name("adapter"), overwrite=True)
    li.merge_checkpoint(base, [adapter], path)
    return difference(program.start(path)(None), outputs(model))


def print_summary(found: list[Result]) -> None:
    """Print a row for each program and format: what is equal, and what becomes of the others."""
    print("\n| program | file | equal | largest difference | not equal |\n|---|---|---|---|---|")
    for program, layout in dict.fromkeys((result.program, result.layout) for result in found):
        rows = [r for r in found if (r.program, r.layout) == (program, layout)]
        equal = [result.off for result in rows if result.equal and result.off is not None]
        others: dict[str, list[str]] = {}
        for result in rows:
            if not result.equal:
                kind = result.problem.partition(":")[0] or "computed otherwise"
                shown = "" if result.off is None else f" ({result.off:.2g})"
                others.setdefault(kind, []).append(result.case + shown)
        said = "; ".join(f"{kind}: {', '.join(cases)}" for kind, cases in others.items())
        worst = f"{max(equal):.1e}" if equal else "-"
        print(f"| {program} | `{layout}` | {len(equal)} of {len(rows)} | {worst} | {said} |")


def first_line(error: BaseException) -> str:
    text = next(iter(str(error).strip().splitlines()), "") or type(error).__name__
    return re.sub(r"(to|of) '[^']*/", r"\1 '", text).replace("|", "/")[:140]


def difference(one: Tensor, two: Tensor) -> float:
    return float((one.double() - two.double()).abs().max())


if __name__ == "__main__":
    sys.exit(main())
