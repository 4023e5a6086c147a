"""One safetensors file with the tensors as this package holds them.

No other program reads this file, so tensors keep their form and every adapter can be written: sites
that PEFT cannot express (a MultiheadAttention's output projection, convolutions in groups,
parameters of the root) are saved by the same call.

Keys: `ROLE/SITE` (`A/SITE`, `B/SITE`, ...), `trained/NAME`. The numbers are in the metadata.
"""

from __future__ import annotations

from pathlib import Path

from lora_inject.adapter.site_state import SiteState
from lora_inject.adapter.state import AdapterState
from lora_inject.errors import FormatError
from lora_inject.formats import metadata as words
from lora_inject.formats.checks import check_keys, check_state
from lora_inject.formats.model_facts import ModelFacts
from lora_inject.storage.atomic import write_file
from lora_inject.storage.tensors import read_names, read_tensors, serialize


def detects(path: Path) -> bool:
    """Whether a path is such a file."""
    if not path.is_file() or path.suffix != ".safetensors":
        return False
    return words.is_native(read_names(path)[1], "native")


def write(state: AdapterState, path: Path, _facts: ModelFacts, *, overwrite: bool = False) -> Path:
    """Write an adapter as one file, whose name ends in `.safetensors`."""
    asked = f"write adapter to '{path}'"
    if Path(path).suffix != ".safetensors":
        raise FormatError(asked, "its name does not end in .safetensors", "Rename it")
    sites = check_state(state, asked).sites
    tensors = {f"{role}/{n}": t for n, site in sites.items() for role, t in site.tensors.items()}
    tensors |= {f"trained/{name}": tensor for name, tensor in state.trained.items()}
    content = serialize(tensors, words.describe(state, "native"))
    return write_file(path, content, overwrite=overwrite)


def read(path: Path, _facts: ModelFacts, *, on_disk: bool = False) -> AdapterState:
    """Read what `write` wrote, bit for bit; `on_disk` as in `storage.tensors.read_tensors`."""
    asked = f"read adapter '{path}'"
    tensors, text = read_tensors(path, on_disk=on_disk)
    if not words.is_native(text, "native"):
        raise FormatError(asked, "it is not a file of this format", "Leave format out")
    said = words.parse(text, asked)
    roles = {
        name: (*spec.shapes, *(("A0", "B0") if name in said.derived else ()))
        for name, spec in said.specs.items()
    }
    due = {f"{role}/{name}" for name in roles for role in roles[name]}
    check_keys(tensors, due | {f"trained/{name}" for name in said.trained}, asked)
    sites = {
        name: SiteState.of(spec, {role: tensors[f"{role}/{name}"] for role in roles[name]})
        for name, spec in said.specs.items()
    }
    trained = {name: tensors[f"trained/{name}"] for name in said.trained}
    return check_state(said.state(sites, trained), asked)
