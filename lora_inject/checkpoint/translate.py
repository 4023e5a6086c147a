"""From an adapter's names to a checkpoint's names: prefixes and renames, one rule for all.

Classes and files call the same tensor by names that differ in their beginning
(`model.layers`, `layers`, `language_model.model.layers`), so a rule is a list of prefix pairs,
applied to every name of the adapter. Whether a rule fits is decided by names *and shapes* in
`plan`; here the candidates are only listed. Sources of the pairs: transformers 5
`conversion_mapping.py` and the checkpoints that its older versions wrote.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

_HEADS = ("lm_head.", "score.", "classifier.", "qa_outputs.", "cls.", "embed_out.", "pooler.")
"""Parts that sit beside the base model, never inside it: a prefix is not added to them."""

_VISION_LANGUAGE: tuple[tuple[str, tuple[tuple[str, str], ...]], ...] = (
    # LLaVA, Gemma 3, Mistral 3, ...: files of transformers < 4.52 against its classes since.
    (
        "class names to file names of a vision-language model",
        (
            ("model.language_model.", "language_model.model."),
            ("model.vision_tower.", "vision_tower."),
            ("model.vision_model.", "vision_model."),
            ("model.multi_modal_projector.", "multi_modal_projector."),
            ("lm_head.", "language_model.lm_head."),
        ),
    ),
    (
        "file names to class names of a vision-language model",
        (
            ("language_model.model.", "model.language_model."),
            ("language_model.lm_head.", "lm_head."),
            ("vision_tower.", "model.vision_tower."),
            ("vision_model.", "model.vision_model."),
            ("multi_modal_projector.", "model.multi_modal_projector."),
        ),
    ),
    # Qwen2-VL and Qwen2.5-VL.
    (
        "class names to file names of Qwen-VL",
        (
            ("model.language_model.", "model."),
            ("model.visual.", "visual."),
            ("lm_head.", "lm_head."),
        ),
    ),
    (
        "file names to class names of Qwen-VL",
        (
            ("visual.", "model.visual."),
            ("lm_head.", "lm_head."),
            ("model.", "model.language_model."),
        ),
    ),
    # A text-only class over the checkpoint of the vision-language model, and the reverse.
    (
        "text model inside a vision-language file",
        (("model.", "language_model.model."), ("lm_head.", "language_model.lm_head.")),
    ),
    (
        "vision-language names on a text-only file",
        (("language_model.model.", "model."), ("language_model.lm_head.", "lm_head.")),
    ),
)
MAX_PREFIXES = 64
"""With more different beginnings than this a checkpoint has no prefix in any useful sense."""
_MIXTRAL = (".mlp.gate.", ".block_sparse_moe.gate.")


@dataclass(frozen=True)
class NameRule:
    """One way to rename every tensor of an adapter.

    Attributes:
        label: What it does, for messages.
        pairs: `(prefix, replacement)`; the first prefix that a name begins with is replaced.
        infix: `(old, new)` replaced anywhere in a name afterwards, or None.

    Example:
        >>> NameRule("without 'model.'", (("model.", ""), ("", "")))("model.layers.0.q.weight")
        'layers.0.q.weight'
    """

    label: str
    pairs: tuple[tuple[str, str], ...]
    infix: tuple[str, str] | None = None

    @property
    def exact(self) -> bool:
        """Whether it leaves every name as it is."""
        return self.pairs == (("", ""),) and self.infix is None

    def __call__(self, name: str) -> str | None:
        """Return the new name, None where the rule says nothing about such a name."""
        for old, new in self.pairs:
            if name.startswith(old):
                name = new + name[len(old) :]
                return name.replace(*self.infix) if self.infix else name
        return None


def candidate_rules(names: Sequence[str], there: Iterable[str]) -> list[NameRule]:
    """List the rules worth trying, the identity first, each with a different outcome.

    Args:
        names: The adapter's tensor names, as state dict keys of the model.
        there: The checkpoint's tensor names.

    Example:
        >>> rules = candidate_rules(["model.layers.0.q.weight"], ["layers.0.q.weight"])
        >>> [rule.label for rule in rules][:2]
        ['names as they are', "without 'model.'"]
    """
    there = set(there)
    beside = tuple((head, head) for head in _HEADS)
    rules = [NameRule("names as they are", (("", ""),))]
    inner = sorted({_first(n) for n in names if not n.startswith(_HEADS)})
    rules += [NameRule(f"without '{p}'", ((p, ""), ("", ""))) for p in inner]
    outer = sorted({_first(n) for n in there} - {""})
    if len(outer) <= MAX_PREFIXES:
        rules += [NameRule(f"with '{p}' before", (*beside, ("", p))) for p in outer]
    rules += [NameRule(label, pairs) for label, pairs in _VISION_LANGUAGE]
    for old, new in (_MIXTRAL, _MIXTRAL[::-1]):
        if any(old in name for name in names):
            rules += [
                NameRule(f"{r.label}, '{old}' as '{new}'", r.pairs, (old, new)) for r in rules[:]
            ]
            break
    return _distinct(rules, names)


def _first(name: str) -> str:
    """Return the first part of a dotted name, with its dot."""
    head, dot, _ = name.partition(".")
    return head + dot if dot else ""


def _distinct(rules: list[NameRule], names: Sequence[str]) -> list[NameRule]:
    """Drop rules that leave a name unsaid, and those that do what an earlier one does."""
    seen: set[tuple[str, ...]] = set()
    kept = []
    for rule in rules:
        outcome = tuple(rule(name) or "" for name in names)
        if "" in outcome or outcome in seen:
            continue
        seen.add(outcome)
        kept.append(rule)
    return kept
