"""The model card of an adapter: README.md with the front matter that model hubs read.

The card says what the adapter is, for which base and task, and how to load it with this package and
PEFT. It states only what the adapter or its author states.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from typing import Any

import yaml

from lora_inject.core.adapter.state import AdapterState
from lora_inject.formats.model_facts import ModelFacts
from lora_inject.version import __version__


def joined_cards(theirs: str, ours: str) -> str:
    r"""Merge two cards; where fields of the front matter differ, `ours` wins.

    Examples:
        >>> joined_cards("---\na: 1\nb: 1\n---\nhis", "---\nb: 2\n---\nhers")
        '---\na: 1\nb: 2\n---\nhis\n\nhers'
    """
    front: dict[str, Any] = {}
    bodies = []
    for card in (theirs, ours):
        _, said, body = card.split("---\n", 2)
        front |= yaml.safe_load(said) or {}
        bodies.append(body.strip())
    return "\n".join(["---", yaml.safe_dump(front).rstrip(), "---", "\n\n".join(bodies)])


# PEFT's task types, to the hub's tags and to the class that loads a base.
_TASKS = {
    "CAUSAL_LM": ("text-generation", "AutoModelForCausalLM"),
    "SEQ_2_SEQ_LM": ("text2text-generation", "AutoModelForSeq2SeqLM"),
    "SEQ_CLS": ("text-classification", "AutoModelForSequenceClassification"),
    "TOKEN_CLS": ("token-classification", "AutoModelForTokenClassification"),
    "QUESTION_ANS": ("question-answering", "AutoModelForQuestionAnswering"),
}
_FOLDER = "path/to/this/folder"
_DATASET = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?", re.ASCII)


def model_card(
    state: AdapterState,
    facts: ModelFacts,
    *,
    trained_on: str | None = None,
    published_as: str | None = None,
    proves: bool = False,
) -> str:
    """Return the text of README.md: YAML front matter and Markdown.

    `trained_on` is a data set of the hub or a description of the data. `published_as` is where
    readers find the adapter; by default a placeholder path. `proves` says that its file
    holds what it computes, see `save_adapter(probe=)`.
    """
    base_model = facts.base_model
    tag, cls = _TASKS.get(facts.task_type or "", (None, None))
    front: dict[str, Any] = {"library_name": "peft", "tags": ["lora", "lora-inject"]}
    if base_model:
        front |= {"base_model": base_model, "base_model_relation": "adapter"}
    if tag:
        front["pipeline_tag"] = tag
    if trained_on and _DATASET.fullmatch(trained_on):
        front["datasets"] = [trained_on]
    n_parameters = sum(site.spec.n_parameters for site in state.sites.values())
    ranks = sorted({site.spec.rank for site in state.sites.values()})
    counts = f"{len(state.sites):,} sites, {n_parameters:,} parameters"
    counts += f", rank {', '.join(map(str, ranks))}" if ranks else ""
    on = f" on {_inline(base_model)}" if base_model else ""
    data = f" Trained on {_inline(trained_on)}." if trained_on else ""
    numel = sum(tensor.numel() for tensor in state.trained.values())
    trained = f"{len(state.trained):,} tensors of the base travel in full ({numel:,} values)."
    paragraphs = [
        f"---\n{yaml.safe_dump(front, sort_keys=True, allow_unicode=True)}---",
        "# LoRA adapter",
        f"{counts}{on}, written by lora-inject {__version__}.{data}",
        trained if state.trained else "",
        _idle(facts.idle),
        *(f"{note[:1].upper()}{note[1:]}." for note in facts.notes),
        "## Use",
        *_commands(base_model, cls, published_as or _FOLDER),
        _CHECKS if proves else "",
    ]
    return "\n\n".join(filter(None, paragraphs)) + "\n"


def _code(language: str, *lines: str) -> str:
    return "\n".join([f"```{language}", *lines, "```"])


_CHECKS = f"""\
The file holds what the adapter computes for a few inputs. To see that a model, or a server, has it:

```python
print(li.verify_loaded(model))
```

```console
lora-inject verify-served http://localhost:8000 {_FOLDER} --model adapter
```"""


def _commands(base_model: str | None, cls: str | None, path: str) -> Iterator[str]:
    """Yield code that loads it here, and with PEFT."""
    base, there = json.dumps(base_model or "path/to/the/base"), json.dumps(path)
    load = [f"model = ...  # {base}"]
    if cls:
        load = [f"from transformers import {cls}", "", f"model = {cls}.from_pretrained({base})"]
    source = (
        "# lora_inject: pip install lora-inject; before its release, from a checkout: pip install ."
    )
    ours = f"li.load_adapter(model, {there})"
    yield _code("python", source, "import lora_inject as li", *load, ours)
    theirs = f"model = PeftModel.from_pretrained(model, {there})"
    yield _code("python", "from peft import PeftModel", *load, theirs)


def _inline(text: str) -> str:
    """Return text as inline code of Markdown."""
    return "`" + text.replace("`", "'").replace("\n", " ") + "`"


def _idle(names: Sequence[str]) -> str:
    if not names:
        return ""
    some = ", ".join(map(_inline, names[:3])) + (", ..." if len(names) > 3 else "")
    problem = f"No forward of the model had used {len(names):,} of them when it was saved: {some}."
    return f"{problem} An adapter that is never used changes nothing."
