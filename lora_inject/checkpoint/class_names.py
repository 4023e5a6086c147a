"""The exact renames between a transformers class and its files, where transformers is installed.

Transformers 5 knows how to turn every name in a file into a name of the class. The class
is built on the meta device, where it weighs nothing, every name of the checkpoint is sent through
that machinery once, and the table is read backwards.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from lora_inject.checkpoint.index import Checkpoint
from lora_inject.formats.older_names import places
from lora_inject.formats.peft import options_for_reading


@dataclass(frozen=True)
class TableRule:
    """A rename that is looked up.

    Attributes:
        label: Where it comes from, for messages.
        table: The class's name to the file's.
        pairs: `(prefix, replacement)`, longest first, for names that the table lacks.
    """

    label: str
    table: Mapping[str, str]
    pairs: tuple[tuple[str, str], ...] = ()
    exact: bool = False

    def __call__(self, name: str) -> str | None:
        """Return the file's name of a tensor."""
        if name in self.table:
            return self.table[name]
        for old, new in self.pairs:
            if name.startswith(old):
                return new + name[len(old) :]
        return name


def class_rule(checkpoint: Checkpoint) -> TableRule | None:
    """Return the renames of the class that a checkpoint is of.

    Args:
        checkpoint: The base.

    Returns:
        The rule; None without transformers, or where the config names no class of it.
    """
    try:
        model = _class_of(checkpoint)
        table = dict(_backwards(model, checkpoint))
    except _UNBUILDABLE:
        # The rules without the class have had their say already, and the adapter is refused with
        # its list.
        return None
    pairs = Counter(_prefixes(mine, theirs) for mine, theirs in table.items())
    ordered = sorted(pairs, key=lambda pair: (-len(pair[0]), -pairs[pair]))
    return TableRule(f"names of {type(model).__name__}", table, tuple(ordered))


def options_for_stacks(checkpoint: Checkpoint) -> dict[str, Any]:
    """Return what a checkpoint's class says of stacked experts, as options for `formats.peft.read`.

    Args:
        checkpoint: The base.

    Returns:
        The options, names with and without the prefix of the base model; empty where the class
        cannot be built.
    """
    try:
        model = _class_of(checkpoint)
    except _UNBUILDABLE:
        return {}
    inner = f"{model.base_model_prefix}."
    found = options_for_reading(dict(model.named_modules()), model.state_dict())
    return {
        option: (*names, *(name.removeprefix(inner) for name in names if name.startswith(inner)))
        for option, names in found.items()
    }


_UNBUILDABLE = (
    ImportError,
    AttributeError,
    LookupError,
    TypeError,
    ValueError,
    OSError,
    RuntimeError,
    NotImplementedError,
)
"""What building a class raises: another version of transformers, or a config of another class."""


def _class_of(checkpoint: Checkpoint) -> Any:
    """Build the class that a checkpoint's config names, without weights."""
    architectures = checkpoint.config.get("architectures")
    if not isinstance(architectures, list) or not architectures:
        raise LookupError("the config names no class")
    return _on_meta(str(architectures[0]), checkpoint.config)


def _on_meta(architecture: str, config: Mapping[str, Any]) -> Any:
    """Build a class of transformers without its weights."""
    import transformers

    known = getattr(transformers, architecture)
    if not issubclass(known, transformers.PreTrainedModel):
        raise TypeError
    # Private keys of a downloaded config have made older versions fetch and run code.
    plain = {key: value for key, value in config.items() if not key.startswith("_")}
    plain.pop("quantization_config", None)
    made = transformers.CONFIG_MAPPING[str(config["model_type"])].from_dict(plain)
    with torch.device("meta"):
        return known._from_config(made, attn_implementation="eager")


def _backwards(model: Any, checkpoint: Checkpoint) -> Iterator[tuple[str, str]]:
    """Yield `(class's name, file's name)` of every tensor that is one and the same in both."""
    there = model.state_dict()
    place = places(model, there)
    for name in checkpoint.tensors:
        found = place(name)
        if found is not None and found.expert is None and found.name in there:
            yield found.name, name
        elif name in there:
            yield name, name


def _prefixes(mine: str, theirs: str) -> tuple[str, str]:
    """Return the beginnings of two names that end alike: what is before the shared end."""
    a, b = mine.split("."), theirs.split(".")
    while a and b and a[-1] == b[-1]:
        a, b = a[:-1], b[:-1]
    return ".".join([*a, ""]), ".".join([*b, ""])
