"""Context-target pairs from the Python that runs this: a function's code and what it does.

Every Python installation holds thousands of functions with a one-line summary written by
a person, so code summarization, one of the conditional generation tasks that the LoRA paper names
(section 2), needs no download. `collect` reads the sources with `ast`, keeps the summaries that are
full sentences about code worth reading, and splits them by module; `encode` and `collate` turn them
into tensors in which only the target's tokens carry a label, which is what eq. (2) of the paper
asks for.
"""

from __future__ import annotations

import ast
import importlib.util
import re
import sysconfig
import warnings
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from data.packaged import number_of

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel
    from transformers import PreTrainedTokenizerBase as Tokenizer


# What the demo's own environment installs anyway, by name; one that is missing is left out.
PACKAGES = ("huggingface_hub", "networkx", "numpy", "pydantic", "rich", "sympy")
SKIPPED_FOLDERS = frozenset(
    {"_vendor", "dist-packages", "idlelib", "lib2to3", "site-packages", "test", "testing", "tests"}
    | {"turtledemo"}
)

IGNORED = -100  # the label that cross entropy leaves out
SENTENCE = re.compile(r"[A-Z][a-z]+ [ -~]*[A-Za-z0-9)'\"]\.")  # one line of plain ASCII, full stop
EMPTY_TALK = re.compile(
    r"^(see|alias|same as|override|internal|deprecated|todo|wrapper)\b|:class:|:func:|>>>",
    re.IGNORECASE,
)
SUMMARY_CHARS = (24, 88)
CODE_CHARS = (80, 420)
HELD_OUT_SHARE = 0.2


@dataclass(frozen=True, slots=True)
class Pair:
    """One function and the first line of its docstring.

    Attributes:
        module: Dotted name of the module that it is from.
        name: Name of the function within the module, with its classes.
        code: Signature and body as `ast.unparse` writes them: no docstring, no comments.
        summary: The first line of the docstring, a sentence that ends with a full stop.
    """

    module: str
    name: str
    code: str
    summary: str


@dataclass(frozen=True, slots=True)
class Split:
    """Pairs to train on, and pairs of modules that training never sees."""

    train: list[Pair]
    held_out: list[Pair]


@dataclass(frozen=True, slots=True)
class Example:
    """One pair as tokens.

    Attributes:
        tokens: The prompt's tokens, then the target's, then the one that ends a turn.
        n_prompt: How many of them are the prompt's.
    """

    tokens: list[int]
    n_prompt: int


# --------------------------------------------------------------------------------------- reading


def collect(packages: Sequence[str] = PACKAGES) -> Split:
    """Read the standard library and `packages`, and split what is found by module.

    Args:
        packages: Top-level packages to read besides the standard library. They are not imported.

    Returns:
        The same pairs in the same order wherever the same versions are installed.
    """
    pairs: list[Pair] = []
    for root, top in _roots(packages):
        for path in sorted(root.rglob("*.py")):
            parts = path.relative_to(root).with_suffix("").parts
            if SKIPPED_FOLDERS.isdisjoint(parts):
                pairs += pairs_in(path.read_bytes(), ".".join((*top, *parts)))
    return split_by_module(pairs)


def _roots(packages: Sequence[str]) -> Iterator[tuple[Path, tuple[str, ...]]]:
    """Folders to read, each with the dotted prefix of the modules in it."""
    yield Path(sysconfig.get_path("stdlib")), ()
    for name in packages:
        spec = importlib.util.find_spec(name)
        if spec is not None and spec.submodule_search_locations:
            yield Path(next(iter(spec.submodule_search_locations))), (name,)


def pairs_in(source: bytes | str, module: str) -> list[Pair]:
    """Return the pairs of one source file, in the order of the file.

    Args:
        source: Python source. One that this Python cannot parse has no pairs.
        module: Dotted name to note in each pair.

    Example:
        >>> code = 'def area(width, height):\\n    "Return the area of a rectangle of known sides."'
        >>> [pair.name for pair in pairs_in(code + "\\n    return width * height + 0 * width", "m")]
        ['area']
    """
    with warnings.catch_warnings(action="ignore"):  # other people's escape sequences
        try:
            tree = ast.parse(source)
        except (SyntaxError, ValueError):  # templates, files of other Pythons, null bytes
            return []
    return [pair for name, node in _functions(tree) if (pair := _pair(node, name, module))]


def _functions(
    node: ast.AST, prefix: str = ""
) -> Iterator[tuple[str, ast.FunctionDef | ast.AsyncFunctionDef]]:
    """Functions and methods below `node` by qualified name; those inside functions are left out."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.ClassDef):
            yield from _functions(child, f"{prefix}{child.name}.")
        elif isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef):
            yield prefix + child.name, child
        elif isinstance(child, ast.If | ast.Try):
            yield from _functions(child, prefix)


def _pair(node: ast.FunctionDef | ast.AsyncFunctionDef, name: str, module: str) -> Pair | None:
    """The pair of one function, or None where there is nothing to learn from it."""
    summary = (ast.get_docstring(node) or "").split("\n", 1)[0].strip()
    special = node.name.startswith("__") or node.name.startswith("test")
    if special or not _worth_saying(summary) or not _worth_reading(node.body[1:]):
        return None
    bare = type(node)(**{**dict(ast.iter_fields(node)), "body": node.body[1:]})
    code = ast.unparse(ast.copy_location(bare, node))
    inside = CODE_CHARS[0] <= len(code) <= CODE_CHARS[1] and code.isascii()
    return Pair(module, name, code, summary) if inside and summary not in code else None


def _worth_saying(summary: str) -> bool:
    """Whether `summary` is one plain sentence of four words or more."""
    inside = SUMMARY_CHARS[0] <= len(summary) <= SUMMARY_CHARS[1]
    plain = SENTENCE.fullmatch(summary) and not EMPTY_TALK.search(summary)
    return bool(inside and plain and len(summary.split()) >= 4)


def _worth_reading(body: Sequence[ast.stmt]) -> bool:
    """Whether a function does something: stubs and abstract methods only pass or raise."""
    return any(not isinstance(statement, ast.Pass | ast.Raise | ast.Expr) for statement in body)


def split_by_module(pairs: Iterable[Pair], share: float = HELD_OUT_SHARE) -> Split:
    """Hold out about `share` of the modules, and whatever they have in common with the rest.

    A summary or a code that occurs twice counts once; a function whose bare name is also in the
    training part leaves the held-out part (copies of one idea carry the same name).

    Args:
        pairs: Pairs of any modules.
        share: Share of the modules to hold out, in [0, 1].

    Returns:
        Both parts, in an order that depends on nothing but the names (a shuffle that everyone
        gets alike).
    """
    split = Split([], [])
    seen: set[str] = set()
    for pair in sorted(pairs, key=lambda pair: number_of(f"{pair.module}:{pair.name}")):
        keys = {pair.code, pair.summary.lower()}
        if seen.isdisjoint(keys):
            seen |= keys
            side = split.held_out if number_of(pair.module) < share else split.train
            side.append(pair)
    names = {pair.name.rpartition(".")[2] for pair in split.train}
    kept = [pair for pair in split.held_out if pair.name.rpartition(".")[2] not in names]
    return Split(split.train, kept)


# --------------------------------------------------------------------------------------- tensors


def prompt_of(code: str) -> str:
    """The prompt for one function: its code, and a comment that asks for a summary.

    Of the dozen wordings tried on training pairs, chat templates with an instruction among them,
    this is one of the two best for the untrained model, and the one that gains most from examples
    ahead of it: a fair start to compare with.
    """
    return f"{code}\n\n# Summary:"


def target_of(summary: str) -> str:
    """The target, with the blank that parts it from the prompt (it belongs to the first word)."""
    return f" {summary}"


def encode(tokenizer: Tokenizer, pair: Pair, ended: bool) -> Example:
    """Tokenise a pair; prompt and target apart, so that their border never moves.

    Args:
        tokenizer: A transformers tokenizer.
        pair: The pair.
        ended: Whether the target includes the token that ends a turn. Training wants it, so that
            generation stops; perplexity is measured without, as a base that was never told how to
            end would be charged for it.
    """
    prompt = tokenizer.encode(prompt_of(pair.code))
    target = tokenizer.encode(target_of(pair.summary)) + [tokenizer.eos_token_id] * ended
    return Example(prompt + target, len(prompt))


def batches(examples: Sequence[Example], size: int) -> list[list[Example]]:
    """Cut `examples` into batches of like length, in an order that does not depend on length.

    Args:
        examples: Any number of examples; what does not fill a batch makes a smaller last one.
        size: Examples in a batch.
    """
    by_length = sorted(examples, key=lambda example: len(example.tokens))
    cut = [by_length[start : start + size] for start in range(0, len(by_length), size)]
    return sorted(cut, key=lambda batch: number_of(repr(batch[0].tokens)))


def collate(batch: Sequence[Example], pad: int) -> tuple[Tensor, Tensor]:
    """Pad a batch on the right and label its targets.

    No attention mask is needed: causal attention never looks to the right, so padding there
    changes no token before it.

    Args:
        batch: The examples.
        pad: Token to pad with.

    Returns:
        tokens: (n_examples, length), int64.
        labels: likewise; the token itself where it is part of a target, else `IGNORED`.
    """
    import torch

    length = max(len(example.tokens) for example in batch)
    tokens = torch.full((len(batch), length), pad)
    labels = torch.full((len(batch), length), IGNORED)
    for row, example in enumerate(batch):
        end = len(example.tokens)
        tokens[row, :end] = torch.tensor(example.tokens)
        labels[row, example.n_prompt : end] = tokens[row, example.n_prompt : end]
    return tokens, labels


def target_log_probs(
    model: PreTrainedModel, tokens: Tensor, labels: Tensor, **kwargs: Any
) -> Tensor:
    """Log-probability of each target token, given all tokens before it.

    Args:
        model: A causal language model of transformers (a decoder with a head).
        tokens: (n, length).
        labels: (n, length), `IGNORED` outside the targets, as `pairs.collate` makes them.
        **kwargs: Passed on to the decoder, such as `past_key_values`.

    Returns:
        (n_target_tokens,) float32, row by row. The loss is the negative of its mean.
    """
    hidden = model.get_decoder()(tokens, **kwargs).last_hidden_state  # (n, length, dim)
    predicts = labels[:, 1:] != IGNORED  # the state at i predicts the token at i + 1
    logits = model.get_output_embeddings()(hidden[:, :-1][predicts]).float()  # (n_target, vocab)
    wanted = labels[:, 1:][predicts]
    return logits.log_softmax(-1).gather(1, wanted[:, None]).squeeze(1)
