"""The model card of an adapter: README.md with the front matter that model hubs read.

It says what the adapter is, for which base, and how to load it; no more than the adapter or its
author states.
"""

from __future__ import annotations

import re
from typing import Any

import yaml

from lora_inject.core.adapter.state import AdapterState
from lora_inject.formats.model_facts import ModelFacts
from lora_inject.version import __version__


def joined_cards(theirs: str, ours: str) -> str:
    r"""Merge two cards; where fields of the front matter differ, `ours` wins; one may have none.

    Examples:
        >>> joined_cards("---\na: 1\nb: 1\n---\nhis", "---\nb: 2\n---\nhers")
        '---\na: 1\nb: 2\n---\nhis\n\nhers'
        >>> joined_cards("his", "---\nb: 2\n---\nhers")
        '---\nb: 2\n---\nhis\n\nhers'
    """
    front: dict[str, Any] = {}
    bodies = []
    for card in (theirs, ours):
        parts = card.split("---\n", 2)
        has_front = len(parts) == 3 and not parts[0].strip()
        front |= (yaml.safe_load(parts[1]) or {}) if has_front else {}
        bodies.append((parts[2] if has_front else card).strip())
    return "\n".join(["---", yaml.safe_dump(front).rstrip(), "---", "\n\n".join(bodies)])


# PEFT's task types, to the hub's tags and to the class that loads a base.
_TASKS = {
    "CAUSAL_LM": ("text-generation", "AutoModelForCausalLM"),
    "SEQ_2_SEQ_LM": ("text2text-generation", "AutoModelForSeq2SeqLM"),
    "SEQ_CLS": ("text-classification", "AutoModelForSequenceClassification"),
    "TOKEN_CLS": ("token-classification", "AutoModelForTokenClassification"),
    "QUESTION_ANS": ("question-answering", "AutoModelForQuestionAnswering"),
}
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
    tag, cls = _TASKS.get(facts.task_type or "", (None, None))
    front: dict[str, Any] = {"library_name": "peft", "tags": ["lora", "lora-inject"]}
    if facts.base_model:
        front |= {"base_model": facts.base_model, "base_model_relation": "adapter"}
    if tag:
        front["pipeline_tag"] = tag
    if trained_on and _DATASET.fullmatch(trained_on):
        front["datasets"] = [trained_on]
    n_parameters = sum(site.spec.n_parameters for site in state.sites.values())
    ranks = sorted({site.spec.rank for site in state.sites.values()})
    counts = f"{len(state.sites):,} sites, {n_parameters:,} parameters"
    counts += f", rank {', '.join(map(str, ranks))}" if ranks else ""
    counts += f", {len(state.trained):,} tensors of the base in full" if state.trained else ""
    on = f" on {_inline(facts.base_model)}" if facts.base_model else ""
    data = f" Trained on {_inline(trained_on)}." if trained_on else ""
    notes = [f"{note[:1].upper()}{note[1:]}." for note in facts.notes]
    if facts.idle:
        named = ", ".join(map(_inline, facts.idle[:3])) + (", ..." if len(facts.idle) > 3 else "")
        notes.append(f"No forward had used {len(facts.idle):,} of them when it was saved: {named}.")
    base = f"{cls or 'YourModel'}.from_pretrained({facts.base_model or 'path/to/the/base'!r})"
    place = repr(published_as or "path/to/this/folder")
    use = [
        *([f"from transformers import {cls}"] if cls else []),
        "import lora_inject as li  # pip install lora-inject",
        "",
        f"model = {base}",
        f"li.load_adapter(model, {place})  # with PEFT: PeftModel.from_pretrained(model, {place})",
        *(["print(li.verify_loaded(model))  # as when it was saved"] if proves else []),
    ]
    paragraphs = [
        f"---\n{yaml.safe_dump(front, sort_keys=True, allow_unicode=True)}---",
        "# LoRA adapter",
        f"{counts}{on}, written by lora-inject {__version__}.{data}",
        *notes,
        "\n".join(["```python", *use, "```"]),
    ]
    return "\n\n".join(paragraphs) + "\n"


def _inline(text: str) -> str:
    """Return text as inline code of Markdown."""
    return "`" + text.replace("`", "'").replace("\n", " ") + "`"
