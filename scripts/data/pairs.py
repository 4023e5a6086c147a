"""Context-target pairs from the Python that runs this: a function's code, and what it does.

Every installation of Python holds thousands of functions with a one-line summary by a person. So
code summarization, a generation task that the LoRA paper names, needs no download. `collect` keeps
the summaries that are full sentences, and holds out some modules; `collate` labels the tokens of
the target only, as eq. (2) of the paper asks.
"""

from __future__ import annotations

import ast
import functools
import importlib.util
import re
import sysconfig
import warnings
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from data.packaged import number_of

PACKAGES = ("huggingface_hub", "networkx", "numpy", "pydantic", "rich", "sympy")
SKIPPED = {"_vendor", "dist-packages", "idlelib", "lib2to3", "site-packages", "test", "testing"}
SKIPPED |= {"tests", "turtledemo"}
IGNORED = -100  # the label that cross entropy leaves out
SENTENCE = re.compile(r"[A-Z][a-z]+ [ -~]*[A-Za-z0-9)'\"]\.")  # one line of plain ASCII, full stop
EMPTY_TALK = re.compile(
    r"^(see|alias|same as|override|internal|deprecated|todo|wrapper)\b|:class:|:func:|>>>",
    re.IGNORECASE,
)
HELD_OUT_SHARE = 0.2


class Pair(NamedTuple):
    """A function without its docstring, and the docstring's first line."""

    module: str
    name: str
    code: str
    summary: str


class Split(NamedTuple):
    """Pairs to train on, and pairs of modules that training never sees."""

    train: list[Pair]
    held_out: list[Pair]


class Example(NamedTuple):
    """The tokens of a prompt and its target, and how many are the prompt's."""

    tokens: list[int]
    n_prompt: int


@functools.cache
def collect() -> Split:
    """Read the sources of the standard library and of packages, which are not imported."""
    roots = [(Path(sysconfig.get_path("stdlib")), "")]
    specs = {name: importlib.util.find_spec(name) for name in PACKAGES}
    roots += [(Path(s.submodule_search_locations[0]), f"{n}.") for n, s in specs.items() if s]
    pairs: list[Pair] = []
    for root, top in roots:
        for path in sorted(root.rglob("*.py")):
            parts = path.relative_to(root).with_suffix("").parts
            if SKIPPED.isdisjoint(parts):
                pairs += pairs_in(path.read_bytes(), top + ".".join(parts))
    return split_by_module(pairs)


def pairs_in(source: bytes, module: str) -> Iterator[Pair]:
    """Yield the pairs of one source file; one that this Python cannot parse has none."""
    with warnings.catch_warnings(action="ignore"):  # other people's escape sequences
        try:
            tree = ast.parse(source)
        except (SyntaxError, ValueError):
            return
    for name, node in _functions(tree):
        summary = (ast.get_docstring(node) or "").split("\n", 1)[0].strip()
        sentence = SENTENCE.fullmatch(summary) and not EMPTY_TALK.search(summary)
        does = not all(isinstance(s, ast.Pass | ast.Raise | ast.Expr) for s in node.body[1:])
        told = sentence and 24 <= len(summary) <= 88 and len(summary.split()) >= 4
        if not told or not does or node.name.startswith(("__", "test")):
            continue
        bare = type(node)(**{**dict(ast.iter_fields(node)), "body": node.body[1:]})
        code = ast.unparse(ast.copy_location(bare, node))
        if 80 <= len(code) <= 420 and code.isascii() and summary not in code:
            yield Pair(module, name, code, summary)


def _functions(
    node: ast.AST, prefix: str = ""
) -> Iterator[tuple[str, ast.FunctionDef | ast.AsyncFunctionDef]]:
    """Functions and methods by qualified name; those inside functions are left out."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.ClassDef):
            yield from _functions(child, f"{prefix}{child.name}.")
        elif isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef):
            yield prefix + child.name, child
        elif isinstance(child, ast.If | ast.Try):
            yield from _functions(child, prefix)


def split_by_module(pairs: Iterable[Pair], share: float = HELD_OUT_SHARE) -> Split:
    """Hold out about a share of the modules, without what they have in common with the rest.

    A summary or a code that occurs twice counts once. A function whose bare name is also in the
    training part leaves the held-out part. The order depends on nothing but the names.
    """
    split = Split([], [])
    seen: set[str] = set()
    for pair in sorted(pairs, key=lambda pair: number_of(f"{pair.module}:{pair.name}")):
        keys = {pair.code, pair.summary.lower()}
        if seen.isdisjoint(keys):
            seen |= keys
            (split.held_out if number_of(pair.module) < share else split.train).append(pair)
    names = {pair.name.rpartition(".")[2] for pair in split.train}
    kept = [pair for pair in split.held_out if pair.name.rpartition(".")[2] not in names]
    return Split(split.train, kept)


def prompt_of(code: str) -> str:
    """The prompt for a function, one of the two best of a dozen for the untrained model."""
    return f"{code}\n\n# Summary:"


def examples(
    tokenizer: Any, pairs: Iterable[Pair], n: int, most: int, ended: bool
) -> list[Example]:
    """The first n pairs of at most so many tokens; prompt and target are tokenized apart.

    `ended` puts the token that ends a turn into the target: in training, so that generation stops.
    A base that was never told how to end would be charged for it in a perplexity.
    """
    short: list[Example] = []
    for pair in pairs:
        prompt = tokenizer.encode(prompt_of(pair.code))
        target = tokenizer.encode(f" {pair.summary}") + [tokenizer.eos_token_id] * ended
        if len(prompt + target) <= most:
            short.append(Example(prompt + target, len(prompt)))
        if len(short) == n:
            return short
    raise SystemExit(f"error: {n} pairs: only {len(short)} were found. Ask for fewer.")


def batches(examples: Sequence[Example], size: int) -> list[list[Example]]:
    """Cut into batches of like length, in an order that does not depend on length."""
    by_length = sorted(examples, key=lambda example: len(example.tokens))
    cut = [by_length[start : start + size] for start in range(0, len(by_length), size)]
    return sorted(cut, key=lambda batch: number_of(repr(batch[0].tokens)))


def collate(batch: Sequence[Example], pad: int) -> tuple[Tensor, Tensor]:
    """Return tokens and labels, (n, length), padded right: causal attention needs no mask."""
    length = max(len(example.tokens) for example in batch)
    tokens = torch.full((len(batch), length), pad)
    labels = torch.full((len(batch), length), IGNORED)
    for row, (ids, n_prompt) in enumerate(batch):
        tokens[row, : len(ids)] = torch.tensor(ids)
        labels[row, n_prompt : len(ids)] = tokens[row, n_prompt : len(ids)]
    return tokens, labels


def target_log_probs(model: Any, tokens: Tensor, labels: Tensor) -> Tensor:
    """Log-probability of each target token given all before it, (n_target_tokens,) in float32."""
    hidden = model.base_model(tokens).last_hidden_state  # (n, length, dim)
    predicts = labels[:, 1:] != IGNORED  # the state at i predicts the token at i + 1
    logits = model.get_output_embeddings()(hidden[:, :-1][predicts]).float()  # (n_target, vocab)
    return logits.log_softmax(-1).gather(1, labels[:, 1:][predicts][:, None]).squeeze(1)
