"""One safetensors file with the tensors as this package holds them.

No other program reads this file, so tensors keep their form and every adapter can be written: sites
that PEFT cannot express (a MultiheadAttention's output projection alone, convolutions in groups,
parameters of the root) are saved by the same call.

Keys: `ROLE/SITE` (`A/SITE`, `B/SITE`, ...), `trained/NAME`. The numbers are in the metadata.
"""

from __future__ import annotations

from pathlib import Path

from lora_inject.adapter.site_state import SiteState
from lora_inject.adapter.state import AdapterState
from lora_inject.errors import FormatError
from lora_inject.formats.checks import check_keys
from lora_inject.formats.metadata import describe, is_native, parse
from lora_inject.formats.model_facts import ModelFacts
from lora_inject.storage.tensors import is_safetensors, read_names, read_tensors, serialize


def detects(path: Path) -> bool:
    """Whether a path is such a file."""
    return is_safetensors(path) and is_native(read_names(path)[1], "native")


def write(state: AdapterState, _path: Path, _facts: ModelFacts) -> bytes:
    """Write any adapter as one file."""
    sites = state.sites.items()
    tensors = {f"{role}/{n}": t for n, site in sites for role, t in site.tensors.items()}
    tensors |= {f"trained/{name}": tensor for name, tensor in state.trained.items()}
    return serialize(tensors, describe(state, "native"))


def read(path: Path, _facts: ModelFacts) -> AdapterState:
    """Read what `write` wrote, bit for bit."""
    tensors, text = read_tensors(path)
    if not is_native(text, "native"):
        raise FormatError("", "it is not a file of this format", "Leave format out")
    said = parse(text)
    roles = {
        name: (*spec.shapes, *(("A0", "B0") if name in said.derived else ()))
        for name, spec in said.specs.items()
    }
    due = {f"{role}/{name}" for name in roles for role in roles[name]}
    check_keys(tensors, due | {f"trained/{name}" for name in said.trained})
    sites = {
        name: SiteState.of(spec, {role: tensors[f"{role}/{name}"] for role in roles[name]})
        for name, spec in said.specs.items()
    }
    return said.state(sites, {name: tensors[f"trained/{name}"] for name in said.trained})
