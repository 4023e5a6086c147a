"""What tests need of libraries that older versions do not have: marks that skip with the reason.

`scripts/sets.txt` has the versions that the core tests run on.
"""

import pytest
import torch
import transformers


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
