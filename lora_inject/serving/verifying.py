"""Whether an adapter is loaded, by what is computed: on a live model, or by a server."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lora_inject.core.layers.survey import Survey
from lora_inject.core.model.carried import roots_of
from lora_inject.core.spec.spellings import nearest
from lora_inject.errors import FormatError, ServerError, StateError, user_path
from lora_inject.serving.completions import Rated, Server
from lora_inject.serving.probing import (
    Inputs,
    digest_of_inputs,
    in_evaluation,
    inputs_of,
    output_samples,
    run,
    token_values,
)
from lora_inject.serving.proof import Ahead, Proof, read_proof
from lora_inject.serving.verdict import Verdict, judge

_UNNAMED = "it says tokens as text, and the proof knows only their ids"
_WITH_TEXTS = "Save the adapter with a pair of texts and their tokenizer as probe"
DTYPES = ("float16", "bfloat16", "float32", "float64")


def verify_loaded(
    model: nn.Module,
    name: str = "default",
    *,
    source: str | PathLike[str] | None = None,
    probe: Any = None,
    dtype: str | None = None,
) -> Verdict:
    """Say whether a model computes with an adapter, by its outputs and not by what it holds.

    The model runs as it is: with what is active, or what was merged into it. It may be any model,
    one of PEFT among them, if `source` is given.

    Args:
        model: The model.
        name: The adapter.
        source: Files that `save_adapter(probe=)` wrote; by default those that the adapter on the
            model was loaded from, or saved to, last.
        probe: For a model that does not predict tokens: the inputs that it was saved with.
        dtype: What the model computes in, such as `bfloat16`, where that is not the dtype of the
            proof.

    Returns:
        The verdict: `.ok`, `.word` (`with`, `without`, `scaled`, `neither`), `.scale` and the
        distances. `print` shows it as a sentence.

    Raises:
        FormatError: The files are not there, or hold no proof.
        StateError: No files are known for the adapter, or the probe is another one.
    """
    asked = f"verify_loaded({name!r})"
    _check_dtype(dtype, asked)
    proof = read_proof(_source_on(model, name, asked) if source is None else source, asked)
    inputs = _inputs(proof, probe, asked)
    with torch.no_grad(), in_evaluation(model):
        outputs = run(model, inputs, asked)
    values = token_values(outputs, inputs) if proof.prompts else output_samples(outputs)
    if len(values) != len(proof.values[0]):
        problem = f"it returns {len(values)} values, and the adapter's model {len(proof.values[0])}"
        raise StateError(asked, problem, "Give the model that the adapter was made for")
    residuals = [values.double() - proof.at(strength) for strength in proof.strengths]
    return judge(proof, residuals, _what(proof), dtype=dtype)


def verify_served(
    url: str,
    adapter: str | PathLike[str],
    *,
    model: str | None = None,
    dtype: str | None = None,
    timeout: float = 60.0,
) -> Verdict:
    """Say whether a server computes with an adapter, by the log-probabilities that it returns.

    It needs nothing but the adapter's file. The server has the completions interface of OpenAI, as
    vLLM, SGLang and llama.cpp's servers have. Where it asks for a key, `OPENAI_API_KEY` holds it.

    Args:
        url: Of the server, such as `http://localhost:8000`.
        adapter: What `save_adapter(probe=)` wrote.
        model: The name to ask for; by default the server's only one, or the one that is called as
            the adapter's folder.
        dtype: What the server computes in; by default the dtype that the adapter was saved in.
        timeout: Seconds that each answer may take.

    Returns:
        The verdict, as of `verify_loaded`.

    Raises:
        FormatError: The file is not there, or holds no proof over tokens.
        ServerError: The server does not answer, returns no log-probabilities, or has another
            vocabulary.
    """
    asked = f"verify what {url} serves"
    _check_dtype(dtype, asked)
    proof = read_proof(adapter, asked)
    if not proof.prompts:
        remedy = "Save the adapter of a model that predicts tokens, with token ids as probe"
        raise FormatError(asked, "the adapter's proof is not over tokens", remedy)
    place = user_path(asked, adapter)
    server = Server.at(url, model, place.stem if place.is_file() else place.name, timeout)
    rated = [server.rated_prompt(prompt) for prompt in _sendable(server, proof)]
    if all(whole for _, whole in rated):
        return _judged_by_prompts(proof, [row for row, _ in rated], asked, dtype)
    return _judged_by_next_tokens(server, proof, asked, dtype)


def _judged_by_prompts(
    proof: Proof, rows: Sequence[Sequence[Rated]], asked: str, dtype: str | None
) -> Verdict:
    """Return the verdict on a server that rates the tokens of prompts."""
    values = torch.cat([*_prompt_values(proof, rows, asked)])
    _refuse_nan(values, asked)
    residuals = [values - proof.at(strength) for strength in proof.strengths]
    verdict = judge(proof, residuals, _what(proof), dtype=dtype)
    named = proof.pieces or all(each.token is not None for row in rows for each in row)
    if verdict.word == "neither" and not named:  # maybe it made other tokens
        raise ServerError(asked, f"it computes neither, and {_UNNAMED}", _WITH_TEXTS)
    return verdict


def _refuse_nan(values: Tensor, asked: str) -> None:
    if not bool(torch.isfinite(values).all()):
        problem = "it returns NaN as log-probabilities"
        raise ServerError(asked, problem, "Look at its dtype and at the weights that it has loaded")


def _judged_by_next_tokens(server: Server, proof: Proof, asked: str, dtype: str | None) -> Verdict:
    """Return the verdict on a server that does not rate the tokens of a prompt."""
    parts = [_next_residuals(server, proof, ahead, asked) for ahead in proof.ahead]
    residuals = [torch.cat([*each]) for each in zip(*parts, strict=True)]
    _refuse_nan(residuals[0], asked)
    if not len(residuals[0]):
        problem = "it rates neither the tokens of a prompt nor the next one"
        remedy = "Let the server return log-probabilities: logprobs=5 in /v1/completions"
        raise ServerError(asked, problem, remedy)
    note = "The server does not rate the tokens of a prompt (echo with logprobs); what it says of "
    note += "the next token was compared"
    what = "log-probabilities of next tokens"
    return judge(proof, residuals, what, dtype=dtype, notes=[note])


def _check_dtype(dtype: str | None, asked: str) -> None:
    if dtype is not None and dtype not in DTYPES:
        near = ", ".join(nearest(str(dtype), DTYPES) or DTYPES)
        raise StateError(f"{asked}, dtype", f"it is {dtype!r}", f"Give one of {near}")


def _source_on(model: nn.Module, name: str, asked: str) -> Path:
    """Return the files that an adapter on a model was loaded from, or saved to, last."""
    known = {
        key: path for root in roots_of(Survey(model)).values() for key, path in root.files.items()
    }
    if name not in known:
        problem = "no files are known of it"
        raise StateError(asked, problem, "Pass source=, what save_adapter(probe=) wrote")
    return Path(known[name])


def _inputs(proof: Proof, probe: Any, asked: str) -> Inputs:
    if proof.prompts:
        return Inputs(tuple(map(tuple, proof.prompts)))
    if probe is None:
        problem = "the file has outputs of its model, but not the inputs"
        raise StateError(asked, problem, "Pass probe=, the inputs that it was saved with")
    inputs = inputs_of(probe, f"{asked}, probe")
    if digest_of_inputs(inputs.arguments) != proof.digest:
        problem = "these are not the inputs that the adapter was saved with"
        raise StateError(f"{asked}, probe", problem, "Pass those, value for value")
    return inputs


def _what(proof: Proof) -> str:
    return "log-probabilities" if proof.prompts else "outputs"


def _sendable(server: Server, proof: Proof) -> Sequence[Sequence[int] | str]:
    """Return the prompts as ids; as text for a server that takes only those."""
    try:
        server.rated_prompt(proof.prompts[0])
    except ServerError as refused:
        if not proof.texts or not any(f"answers {code}" in refused.found for code in (400, 422)):
            raise
        try:
            server.rated_prompt(proof.texts[0])
        except ServerError:
            raise refused from None
        return proof.texts
    return proof.prompts


def _prompt_values(proof: Proof, rows: Sequence[Sequence[Rated]], asked: str) -> Iterator[Tensor]:
    """Yield the values of each prompt; refuse those of other tokens than the proof's."""
    for number, (prompt, row) in enumerate(zip(proof.prompts, rows, strict=True)):
        pieces = proof.pieces[number] if proof.pieces else []
        due = prompt[1:]
        rated = row[: len(due)]
        same = len(rated) == len(due) and all(
            _is_token(each, token, pieces[place + 1] if pieces else None)
            for place, (each, token) in enumerate(zip(rated, due, strict=True))
        )
        if not same:
            problem = f"it makes other tokens of prompt {number + 1} than the adapter's tokenizer"
            remedy = "Give the server of the adapter's base, with its tokenizer"
            raise ServerError(asked, f"{problem}: another vocabulary", remedy)
        yield torch.tensor([each.value for each in rated], dtype=torch.float64)


def _is_token(rated: Rated, token: int, text: str | None) -> bool:
    """Whether a token is the one that is due, as far as the server and the proof say."""
    if rated.token is not None:
        return rated.token == token
    return text is None or rated.text.strip(" ▁Ġ") == text.strip(" ▁Ġ")


def _next_residuals(server: Server, proof: Proof, ahead: Ahead, asked: str) -> list[Tensor]:
    """Return, for each strength, how far the server's next tokens are from the proof's.

    A token that the proof does not rate is less probable than any that it rates: only what is above
    those counts.
    """
    rated = server.rated_next(proof.prompts[ahead.prompt][: ahead.length])
    if not ahead.texts and any(each.token is None for each in rated):
        raise ServerError(asked, _UNNAMED, _WITH_TEXTS)
    place = _places(ahead)
    at = [place(each) for each in rated]
    residuals = []
    for row in ahead.values:
        least = min(row)
        off = [
            each.value - row[i] if i is not None else max(0.0, each.value - least)
            for each, i in zip(rated, at, strict=True)
        ]
        residuals.append(torch.tensor(off, dtype=torch.float64))
    return residuals


def _places(ahead: Ahead) -> Callable[[Rated], int | None]:
    """Return what finds a server's token among those that a proof rates."""
    ids = {token: i for i, token in enumerate(ahead.tokens)}
    texts = {text: i for i, text in enumerate(ahead.texts)}

    def place(rated: Rated) -> int | None:
        return ids.get(rated.token) if rated.token is not None else texts.get(rated.text)

    return place
