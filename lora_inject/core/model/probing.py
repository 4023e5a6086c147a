"""Running a few short inputs through a live model: as it is, or at strengths of an adapter."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from lora_inject.core.functional.finite import all_finite
from lora_inject.core.layers.selection import Mix
from lora_inject.core.layers.survey import evaluating, table_of
from lora_inject.core.roots.root import Injected
from lora_inject.core.roots.selecting import selecting
from lora_inject.errors import FormatError, StateError, article
from lora_inject.formats.exchange import format_of, options_of
from lora_inject.formats.proof import KEY, STRENGTHS, Ahead, Proof

N_PROMPTS, N_TOKENS = 8, 32
"""More rows, and longer ones, are left out: a file is no data set."""

N_AHEAD, N_TOP = 3, 5
"""Prefixes of each prompt after which tokens are rated, and how many of each distribution: those
that servers return."""

Prompts = Sequence[Sequence[int]]
_REMEDY = "Give rows of token ids: a tensor, or lists such as tokenizer(texts)['input_ids']"


def take_proof(survey: Injected, name: str, probe: Any, format: str) -> dict[str, str]:  # noqa: A002
    """Return the proof of an adapter's behavior, as text for the header of a file.

    Args:
        survey: Of the model that carries it.
        name: The adapter, which need not be active.
        probe: See `save_adapter`.
        format: What is written, whose files have to take such text.

    Raises:
        StateError: The probe is none, has tokens that the model lacks, or is not changed by the
            adapter.
        FormatError: Files of the format hold no proof.
    """
    asked = f"save adapter {name!r}, probe"
    if "proof" not in options_of(format_of(format, asked).write):
        problem = f"files of the format {format!r} hold no proof"
        raise FormatError(
            asked, problem, "Save it as 'peft', 'portable' or 'native' too, and keep that"
        )
    proof = _measured(survey, name, _prompts_of(probe, asked), asked)
    if proof.effect < 4 * proof.noise():
        problem = f"the adapter changes its outputs by {proof.effect:.2g}, and rounding in "
        problem += f"{proof.dtype} by {proof.noise():.2g}: they prove nothing"
        remedy = "Give inputs that it was trained for, or more of them; or leave the probe out"
        raise StateError(asked, problem, remedy)
    return {KEY: proof.to_text()}


def _measured(survey: Injected, name: str, prompts: Prompts, asked: str) -> Proof:
    """Return what a model computes at each strength of an adapter."""
    gained = survey.root.adapters[name].gained  # a mix may not weigh it
    strengths = (0.0, 1.0) if gained else STRENGTHS
    values, ahead = [], []
    with torch.no_grad(), evaluating(survey.model):
        for strength in strengths:  # one at a time: outputs are of the vocabulary's size
            outputs = _run_at(survey, name, strength, prompts, asked)
            values.append(token_values(outputs, prompts))
            ahead.append(_next_tokens(outputs, prompts))
            if not strength:
                largest = torch.stack([each.float().abs().amax() for each in outputs])
                first = outputs[0][-1:].clone()
            del outputs
    return Proof(
        strengths=[*strengths],
        values=[_rounded(row) for row in values],
        prompts=[[*prompt] for prompt in prompts],
        ahead=_ahead(ahead, prompts),
        vocabulary=first.shape[-1],
        dtype=str(first.dtype).removeprefix("torch."),
        size=float(largest.mean()),
    )


def _run_at(
    survey: Injected, name: str, strength: float, prompts: Prompts, asked: str
) -> list[Tensor]:
    """Run a model with one adapter, multiplied; 0 is the base."""
    mix = Mix({name: strength} if strength else {})
    with selecting(survey.model, mix, asked):
        made = run(survey.model, prompts, asked)
    if not all_finite(*made):
        problem = f"the model's outputs are not finite, with the adapter times {strength:g}"
        raise StateError(asked, problem, "Give inputs on which they are")
    return made


def _prompts_of(probe: Any, asked: str) -> Prompts:
    """Return what a model is to be asked: the first tokens of the first rows, checked."""
    rows = probe.tolist() if isinstance(probe, Tensor) and not probe.is_floating_point() else probe
    if not isinstance(rows, list):
        problem = f"it is {article(type(probe).__name__)} without token ids"
        raise StateError(asked, problem, f"{_REMEDY}; other models prove nothing")
    try:
        prompts = tuple(tuple(map(int, row[:N_TOKENS])) for row in rows[:N_PROMPTS])
    except (TypeError, ValueError):
        raise StateError(asked, "its rows are not token ids", _REMEDY) from None
    if not any(prompts):
        raise StateError(asked, "it is empty", _REMEDY)
    short = any(len(prompt) < 2 for prompt in prompts)
    if short or any(token < 0 for prompt in prompts for token in prompt):
        raise StateError(asked, "a row has fewer than two tokens, or a negative one", _REMEDY)
    return prompts


def run(model: nn.Module, prompts: Prompts, asked: str) -> list[Tensor]:
    """Return the logits of each prompt, `(tokens, vocabulary)`."""
    _check_vocabulary(model, prompts, asked)
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    rated = []
    for prompt in prompts:
        with _said(asked):
            made = model(torch.tensor([prompt], device=device))
        rated.append(_logits(made, prompt, asked))
    return rated


@contextmanager
def _said(asked: str) -> Iterator[None]:
    """Say what a model raises that is given a probe."""
    try:
        yield
    except (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError) as e:
        words = " ".join(str(e).split())[:200]
        problem = f"with these inputs the model raises {type(e).__name__}: {words}"
        raise StateError(asked, problem, _REMEDY) from e


def _check_vocabulary(model: nn.Module, prompts: Prompts, asked: str) -> None:
    """Refuse a probe of another tokenizer, which an embedding would fail on."""
    table = getattr(table_of(model, "get_input_embeddings"), "num_embeddings", None)
    largest = max(max(prompt) for prompt in prompts)
    if table is not None and largest >= table:
        problem = f"it has the token {largest}, and the model has {table:,} tokens"
        raise StateError(asked, problem, "Give tokens of the model's own tokenizer")


def _logits(made: Any, prompt: Sequence[int], asked: str) -> Tensor:
    logits = getattr(made, "logits", made)
    fits = isinstance(logits, Tensor) and logits.is_floating_point() and logits.dim() == 3
    if not fits or logits.shape[:2] != (1, len(prompt)) or logits.shape[-1] <= max(prompt):
        shape = tuple(logits.shape) if isinstance(logits, Tensor) else type(made).__name__
        problem = f"for {len(prompt)} tokens the model returns {shape}, which rates no next token"
        raise StateError(
            asked, problem, "Leave the probe out: only models that predict tokens prove"
        )
    return logits.detach()[0]  # type: ignore[no-any-return]


def token_values(logits: Sequence[Tensor], prompts: Prompts) -> Tensor:
    """Return the log-probability of each token but the first of each prompt, `(n,)`."""
    rated = []
    for each, prompt in zip(logits, prompts, strict=True):
        tokens = torch.tensor(prompt[1:], device=each.device)[:, None]
        rated.append(_log_probabilities(each[:-1]).gather(1, tokens)[:, 0])
    return torch.cat(rated).cpu()


def _log_probabilities(logits: Tensor) -> Tensor:
    return logits.double().log_softmax(-1).clamp(min=-1e4)


def _prefixes(prompts: Prompts) -> list[tuple[int, int]]:
    """Return the number and the length of each prefix of a prompt after which tokens are rated."""
    return [
        (number, length)
        for number, prompt in enumerate(prompts)
        for length in sorted({round(len(prompt) * (n + 1) / N_AHEAD) for n in range(N_AHEAD)} - {0})
    ]


def _next_tokens(outputs: Sequence[Tensor], prompts: Prompts) -> list[Tensor]:
    """Return the logits after each prefix, in memory of their own."""
    return [outputs[number][length - 1].clone() for number, length in _prefixes(prompts)]


def _ahead(logits: Sequence[Sequence[Tensor]], prompts: Prompts) -> list[Ahead]:
    """Return the probable tokens after some prefixes, with their values at each strength."""
    ahead = []
    for (number, length), at in zip(_prefixes(prompts), zip(*logits, strict=True), strict=True):
        rows = [*map(_log_probabilities, at)]
        tops = [row.topk(min(N_TOP, len(row))).indices.tolist() for row in rows]
        tokens = sorted({token for top in tops for token in top})
        values = [_rounded(row[tokens]) for row in rows]
        ahead.append(Ahead(prompt=number, length=length, tokens=tokens, values=values))
    return ahead


def _rounded(values: Tensor) -> list[float]:
    """Return numbers of six digits: more are noise, and make the file longer."""
    return [float(f"{value:.6g}") for value in values.tolist()]
