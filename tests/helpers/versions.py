"""Whether this is what the tests passed on, and marks that skip what older versions do not have.

`scripts/constraints.txt` has the tested versions, `scripts/sets.txt` older ones for the core tests.
"""

import platform
import re
from importlib.metadata import distributions
from pathlib import Path

import pytest
import torch
import transformers

CONSTRAINTS = Path(__file__).parents[2] / "scripts" / "constraints.txt"


def differences() -> dict[str, tuple[str, str]]:
    """Of Python and packages that are here in another version: the tested one, and that here.

    A build's label, as in 2.13.0+cpu, does not count.
    """
    lines = CONSTRAINTS.read_text(encoding="utf-8").splitlines()
    tested = [line.split("==") for line in lines if not line.startswith("#")]
    tested += [["Python", "3.11"]]
    here = {_name(d.metadata["Name"]): d.version.partition("+")[0] for d in distributions()}
    here["python"] = ".".join(platform.python_version_tuple()[:2])
    pairs = {name: (due, here.get(_name(name), due)) for name, due in tested}
    return {name: (due, got) for name, (due, got) in pairs.items() if due != got}


def _name(package: str) -> str:
    return re.sub(r"[-_.]+", "-", package).lower()


def at_least(library: str, *wanted: int) -> bool:
    """Whether a version, as in "2.13.0+cpu", has these first numbers or greater ones."""
    return tuple(int(n) for n in library.split(".")[: len(wanted)]) >= wanted


TRANSFORMERS_5 = at_least(transformers.__version__, 5)
needs_transformers_5 = pytest.mark.skipif(
    not TRANSFORMERS_5, reason="experts are modules of their own in transformers 4"
)

# PEFT 0.21 calls a conversion of transformers with an argument that came after 5.0.
needs_peft_reads_experts = pytest.mark.skipif(
    not at_least(transformers.__version__, 5, 1), reason="PEFT reads no experts on transformers 5.0"
)

# Its streams of a CPU have no events before torch 2.8.
FSDP2_ON_CPU = hasattr(torch.cpu.Stream, "record_event")
needs_fsdp2 = pytest.mark.skipif(not FSDP2_ON_CPU, reason="FSDP2 of this torch runs on a GPU only")

# FSDP2 asks gloo for the mean of gradients in 32 and 16 bits; that of torch 2.8 gives the sum.
GLOO_TAKES_MEANS = at_least(torch.__version__, 2, 9)
