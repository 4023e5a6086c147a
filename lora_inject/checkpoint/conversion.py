"""Convert adapter files for other programs, and check them, with the help of the base's files."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from lora_inject.checkpoint.base_class import BaseClass
from lora_inject.checkpoint.index import Checkpoint, has_weights, read_config
from lora_inject.core.adapter.file_keys import one_line
from lora_inject.core.adapter.state import AdapterState
from lora_inject.core.files.atomic import check_free
from lora_inject.core.files.strict_json import parse_table
from lora_inject.core.spec.names import nearest
from lora_inject.errors import CheckpointError, FormatError, user_path
from lora_inject.formats.clients import Objection, objections
from lora_inject.formats.exchange import losses_of, read_adapter, write_adapter
from lora_inject.formats.hub import located
from lora_inject.formats.model_facts import ModelFacts


def convert(
    adapter: str | os.PathLike[str] | AdapterState,
    output: str | os.PathLike[str],
    to: str,
    *,
    base: str | os.PathLike[str] | None = None,
    reading: Mapping[str, Any] | None = None,
    tell: Callable[[str], None] | None = None,
    **options: Any,
) -> Path:
    """Write an adapter in another format, with the same deltas to float precision.

    Args:
        adapter: Files in any format that can be read, or an `AdapterState`.
        output: Where to write.
        to: Name of the format, a row of `formats.FORMATS`.
        base: Folder of the base, for the names, heads and ties that some formats need. For models
            of transformers its config.json is enough.
        reading: Options for reading the adapter.
        tell: Called once it is written, with one sentence for each loss in the target format.
        **options: Options for writing: those of the format, and `overwrite=True`.

    Returns:
        The path that was written.

    Raises:
        FormatError: The adapter cannot be read, the format cannot express it, or it has sites that
            the base lacks.
        CheckpointError: The base cannot be read.

    Examples:
        >>> import tempfile, torch
        >>> from torch import nn
        >>> import lora_inject as li
        >>> net = li.inject(nn.Sequential(nn.Linear(4, 6)), {"rank": 2, "targets": ["0"]})
        >>> with tempfile.TemporaryDirectory() as parent:
        ...     _ = li.save_adapter(net, f"{parent}/a")
        ...     made = li.convert(f"{parent}/a", f"{parent}/b", "portable", dtype="float16")
        ...     li.read_adapter(made).sites["0"].scale
        1.0
    """
    check_free(user_path("convert, output", output), overwrite=options.get("overwrite", False))
    of = None if base is None else class_of(base)
    facts = ModelFacts() if of is None else of.facts()
    if isinstance(adapter, AdapterState):
        state = adapter
    else:
        files = located(adapter, "convert")
        state = read_adapter(files, facts=facts, **(reading or {}))
        facts = _completed(facts, files)
    if of is not None:
        _check_in_base(state, of, facts)
    path = write_adapter(state, output, to, facts=facts, **options)
    if tell is not None:
        for words in losses_of(state, to):
            tell(words)
    return path


def class_of(base: str | os.PathLike[str]) -> BaseClass:
    """Return the class of a base, by its files; its config.json is enough for some formats."""
    base = user_path("read a base", base, CheckpointError)
    config = read_config(base)
    if config and not has_weights(base):
        return BaseClass(Checkpoint(base, {}, None, None, config))
    return BaseClass(Checkpoint.open(base))


def _check_in_base(state: AdapterState, of: BaseClass, facts: ModelFacts) -> None:
    """Refuse sites that the base does not have: nobody who loads both would use their updates."""
    known = {*(facts.modules_in_files() or ()), *(facts.tensor_names or ())}
    specs = [site.spec for site in state.sites.values()]
    lost = [
        spec.name
        for spec in specs
        if known.isdisjoint((spec.name, spec.weight, *spec.aliases)) and not of.has(spec.weight)
    ]
    if lost and known:
        near = one_line(nearest(lost[0], sorted(known), 1)) or "none"
        problem = f"the base has no module {one_line(lost)}"
        remedy = "Give the adapter's own base, or rename its sites (lora-inject rename); "
        asked = f"convert for the base '{of.checkpoint.folder}'"
        raise FormatError(asked, problem, f"{remedy}nearest to the first: {near}")


def _completed(facts: ModelFacts, path: Path) -> ModelFacts:
    """Return facts, with the base and the task of a PEFT folder if they are not known."""
    file = path / "adapter_config.json"
    if not file.is_file():
        return facts
    said = parse_table(file.read_bytes(), f"read '{file}'")
    base, task = (
        field if isinstance(field := said.get(name), str) else None
        for name in ("base_model_name_or_path", "task_type")
    )
    return replace(facts, base_model=facts.base_model or base, task_type=facts.task_type or task)


def check_adapter(
    adapter: str | os.PathLike[str], client: str, *, base: str | os.PathLike[str] | None = None
) -> list[Objection]:
    """Return what a program that loads adapters would refuse or misread in an adapter.

    Args:
        adapter: The adapter's files.
        client: `vllm`, `sglang`, `llama.cpp`, `diffusers`, `mlx`, `comfyui` or `peft`; or one with
            its version, `vllm==0.32`. Without one, what any version does that is known is found.
        base: Folder of the base, to compare names, ties and layers too.

    Returns:
        Findings, each with a remedy. If no finding `stops`, the program takes the adapter.

    Raises:
        FormatError: The program, or what its version does, is unknown, or the files are damaged.

    Examples:
        >>> import tempfile
        >>> from torch import nn
        >>> import lora_inject as li
        >>> rule = {"rank": 2, "alpha": 3, "scaling": "rslora", "targets": ["0"]}
        >>> net = li.inject(nn.Sequential(nn.Linear(4, 6)), rule)
        >>> with tempfile.TemporaryDirectory() as parent:
        ...     _ = li.save_adapter(net, f"{parent}/a")
        ...     [finding.problem for finding in li.check_adapter(f"{parent}/a", "sglang")]
        ["SGLang would apply another scale to '0 (1.5 for 2.121)'"]
    """
    facts = ModelFacts() if base is None else class_of(base).facts()
    return objections(located(adapter, "check"), client, facts)
