"""Private names of other libraries: each is there in the versions that are said to have it."""

import re
from importlib.metadata import version
from pathlib import Path

import pytest
from helpers.versions import at_least

import lora_inject as li
from lora_inject.private import look_up

NAMED = re.compile(
    r'(?:look_up\(|^_\w+ = )\s*"((?:torch|transformers|bitsandbytes|mlx_lm)(?:\.\w+)+)"',
    re.MULTILINE,
)
ASKING = [path.read_text(encoding="utf-8") for path in Path(li.__file__).parent.rglob("*.py")]
NAMES = {name for text in ASKING if "lora_inject.private" in text for name in NAMED.findall(text)}
NAMES.add("bitsandbytes.functional._convert_weight_packed_for_cpu_inverse")  # in a function

# The oldest version of its library that was seen to have a name; all others were in torch 2.6,
# transformers 5.0 and the oldest version of each other library that is admitted.
SINCE = {
    "torch._C._autograd._top_saved_tensors_default_hooks": "2.8",
    "torch._grouped_mm": "2.8",
    "torch.fx._symbolic_trace.is_fx_symbolic_tracing": "2.9",
    "transformers.conversion_mapping._MODEL_TO_CONVERSION_PATTERN": "5.0",
}


@pytest.mark.parametrize("name", sorted(NAMES))
def test_each_name_is_in_the_versions_that_are_said_to_have_it(name: str) -> None:
    """A name that leaves a library fails here first, on the version that lacks it."""
    library = name.partition(".")[0]
    pytest.importorskip(library)
    numbers = [int(n) for n in SINCE.get(name, "0").split(".")]
    if at_least(version(library.replace("_", "-")), *numbers):
        assert look_up(name) is not None
