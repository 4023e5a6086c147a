"""Whether an adapter is loaded, by what is computed: on a live model, or by a server."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from os import PathLike
from pathlib import Path

import torch
from torch import Tensor, nn

from lora_inject.core.layers.survey import evaluating
from lora_inject.core.model.probing import N_TOP, run, token_values
from lora_inject.core.roots.root import root_of
from lora_inject.core.spec.names import nearest
from lora_inject.errors import ServerError, StateError, user_path
from lora_inject.formats.proof import Ahead, Proof, read_proof
from lora_inject.serving.completions import Rated, RefusedError, Server
from lora_inject.serving.verdict import Verdict, judge

_SPACES = " ▁Ġ"  # as tokenizers write the space before a word
_NO_RATINGS = "The server does not rate the tokens of a prompt (echo with logprobs); what it says "
_NO_RATINGS += "of the next token was compared"
_MISPLACED = "The server rates each token of a prompt by a text that holds it already; what it "
_MISPLACED += "says of the next token was compared"
_WHAT = "log-probabilities"
_UNNAMED = "it says tokens as text, and the proof knows only their ids"
_WITH_TEXTS = "Save the adapter with a pair of texts and their tokenizer as probe"
DTYPES = ("float16", "bfloat16", "float32", "float64")


def verify_loaded(
    model: nn.Module,
    name: str = "default",
    *,
    source: str | PathLike[str] | None = None,
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
        dtype: What the model computes in, such as `bfloat16`, where that is not the dtype of the
            proof.

    Returns:
        The verdict: `.ok`, `.word` (`with`, `without`, `scaled`, `neither`), `.scale` and the
        distances. `print` shows it as a sentence.

    Raises:
        FormatError: The files are not there, or hold no proof.
        StateError: No files are known for the adapter, or the model has another vocabulary.
    """
    asked = f"verify_loaded({name!r})"
    _check_dtype(dtype, asked)
    proof = read_proof(_source_on(model, name, asked) if source is None else source, asked)
    with torch.no_grad(), evaluating(model):
        values = token_values(run(model, proof.prompts, asked), proof.prompts).double()
    residuals = [values - proof.at(strength) for strength in proof.strengths]
    return judge(proof, residuals, _WHAT, dtype=dtype, same_program=True)


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
        FormatError: The file is not there, or holds no proof.
        ServerError: The server does not answer, returns no log-probabilities, or has another
            vocabulary.
    """
    asked = f"verify what {url} serves"
    _check_dtype(dtype, asked)
    proof = read_proof(adapter, asked)
    place = user_path(asked, adapter)
    server = Server.at(url, model, place.stem if place.is_file() else place.name, timeout)
    prompts = _sendable(server, proof)
    rows = [server.rated_prompt(prompt) for prompt in prompts]
    if all(rows) and _are_in_place(server, prompts, rows):
        return _judged_by_prompts(proof, rows, asked, dtype)
    note = _NO_RATINGS if not all(rows) else _MISPLACED
    by_text = prompts is proof.texts
    return _judged_by_next_tokens(server, proof, asked, dtype, note=note, by_text=by_text)


def _are_in_place(
    server: Server, prompts: Sequence[Sequence[int] | str], rows: Sequence[Sequence[Rated]]
) -> bool:
    """Whether each token of a prompt is rated by what stands before it.

    llama-cpp-python rates it by what it is a part of, unless a token that begins texts stands
    first. It shows at the end: there the token that was made is due, as without the prompt.
    """
    made = [server.rated_made(prompt) for prompt in prompts]
    known = [(one, row[-1]) for one, row in zip(made, rows, strict=True) if one is not None]
    return bool(known) and all(one[:2] == last[:2] for one, last in known)


def _judged_by_prompts(
    proof: Proof, rows: Sequence[Sequence[Rated]], asked: str, dtype: str | None
) -> Verdict:
    """Return the verdict on a server that rates the tokens of prompts."""
    rated = _prompt_values(proof, rows, asked)
    values = torch.tensor([*rated.values()], dtype=torch.float64)
    _refuse_nan(values, asked)
    residuals = [values - proof.at(strength)[[*rated]] for strength in proof.strengths]
    verdict = judge(proof, residuals, _WHAT, dtype=dtype)
    named = proof.pieces or all(each.token is not None for row in rows for each in row)
    if verdict.word == "neither" and not named:  # maybe it made other tokens
        raise ServerError(asked, f"it computes neither, and {_UNNAMED}", _WITH_TEXTS)
    return verdict


def _refuse_nan(values: Tensor, asked: str) -> None:
    if not bool(torch.isfinite(values).all()):
        problem = "it returns NaN as log-probabilities"
        raise ServerError(asked, problem, "Look at its dtype and at the weights that it has loaded")


def _judged_by_next_tokens(
    server: Server, proof: Proof, asked: str, dtype: str | None, *, note: str, by_text: bool
) -> Verdict:
    """Return the verdict on a server that does not rate the tokens of a prompt."""
    parts = [_next_residuals(server, proof, ahead, asked, by_text) for ahead in proof.ahead]
    residuals = [torch.cat([*each]) for each in zip(*parts, strict=True)]
    _refuse_nan(residuals[0], asked)
    if not len(residuals[0]):
        problem = "it rates neither the tokens of a prompt nor the next one"
        remedy = "Let the server return log-probabilities: logprobs=5 in /v1/completions"
        raise ServerError(asked, problem, remedy)
    what = "log-probabilities of next tokens"
    return judge(proof, residuals, what, dtype=dtype, notes=[note])


def _check_dtype(dtype: str | None, asked: str) -> None:
    if dtype is not None and dtype not in DTYPES:
        near = ", ".join(nearest(str(dtype), DTYPES) or DTYPES)
        raise StateError(f"{asked}, dtype", f"it is {dtype!r}", f"Give one of {near}")


def _source_on(model: nn.Module, name: str, asked: str) -> Path:
    """Return the files that an adapter on a model was loaded from, or saved to, last."""
    _, root = root_of(model, asked)
    files = root.adapters[name].files if name in root.adapters else None
    if files is None:
        problem = "no files are known of it"
        raise StateError(asked, problem, "Pass source=, what save_adapter(probe=) wrote")
    return files


def _sendable(server: Server, proof: Proof) -> Sequence[Sequence[int] | str]:
    """Return the prompts as ids; as text for a server that takes only those."""
    try:
        server.rated_prompt(proof.prompts[0])
    except RefusedError as refused:
        if not proof.texts:
            remedy = (
                f"{refused.remedy}. If it takes only text, the proof has only ids: {_WITH_TEXTS}"
            )
            raise ServerError(refused.asked, refused.found, remedy) from None
        try:
            server.rated_prompt(proof.texts[0])
        except ServerError:
            raise refused from None
        return proof.texts
    return proof.prompts


def _prompt_values(proof: Proof, rows: Sequence[Sequence[Rated]], asked: str) -> dict[int, float]:
    """Return what was rated, by the place among the proof's values; refuse other tokens than its.

    A server may leave the token out that begins a text, and then does not rate the one after it.
    """
    start, values = 0, dict[int, float]()
    for number, (prompt, row) in enumerate(zip(proof.prompts, rows, strict=True)):
        pieces = proof.pieces[number] if proof.pieces else [None] * len(prompt)
        tokens = [*zip(prompt, pieces, strict=True)]
        fitting = [left for left in (1, 2) if _are_tokens(row, tokens[left:])]
        if not fitting:
            problem = f"it makes other tokens of prompt {number + 1} than the adapter's tokenizer"
            remedy = "Give the server of the adapter's base, with its tokenizer"
            raise ServerError(asked, f"{problem}: another vocabulary", remedy)
        places = range(start + fitting[0] - 1, start + len(prompt) - 1)
        values |= {place: each.value for place, each in zip(places, row, strict=False)}
        start += len(prompt) - 1
    return values


def _are_tokens(row: Sequence[Rated], due: Sequence[tuple[int, str | None]]) -> bool:
    """Whether a row begins with the tokens that are due, as far as is known."""
    pairs = [*zip(row, due, strict=False)]
    return len(pairs) == len(due) > 0 and all(_is_token(rated, *one) for rated, one in pairs)


def _is_token(rated: Rated, token: int, text: str | None) -> bool:
    """Whether a token is the one that is due, as far as the server and the proof say."""
    if rated.token is not None:
        return rated.token == token
    return text is None or rated.text.strip(_SPACES) == text.strip(_SPACES)


def _next_residuals(
    server: Server, proof: Proof, ahead: Ahead, asked: str, by_text: bool
) -> list[Tensor]:
    """Return, for each strength, how far the server's next tokens are from the proof's.

    A token that the proof does not rate is less probable than the most probable ones, all of which
    it rates: only what is above the last of those counts.
    """
    rated = _rated_after(server, proof, ahead, by_text)
    if not ahead.texts and any(each.token is None for each in rated):
        raise ServerError(asked, _UNNAMED, _WITH_TEXTS)
    place = _places(ahead, strip=_first_of_text(proof, ahead) is None)
    at = [place(each) for each in rated]
    residuals = []
    for row in ahead.values:
        least = sorted(row)[-min(N_TOP, len(row))]
        off = [
            each.value - row[i] if i is not None else max(0.0, each.value - least)
            for each, i in zip(rated, at, strict=True)
        ]
        residuals.append(torch.tensor(off, dtype=torch.float64))
    return residuals


def _rated_after(server: Server, proof: Proof, ahead: Ahead, by_text: bool) -> list[Rated]:
    """Return the next tokens after a prefix; none where the server cuts it into other tokens."""
    if not by_text:
        rated, _ = server.rated_next(proof.prompts[ahead.prompt][: ahead.length])
    elif text := _prefix_text(proof, ahead):
        rated, n_tokens = server.rated_next(text)
        if n_tokens not in (None, ahead.length):
            return []
    else:
        return []
    return [each for each in rated if each.token is not None or each.text]


def _prefix_text(proof: Proof, ahead: Ahead) -> str:
    """Return the text of a prefix, "" if it is not known."""
    if ahead.length == len(proof.prompts[ahead.prompt]):
        return proof.texts[ahead.prompt]
    start = _first_of_text(proof, ahead)
    return "" if start is None else "".join(proof.pieces[ahead.prompt][start : ahead.length])


def _first_of_text(proof: Proof, ahead: Ahead) -> int | None:
    """Return the piece with which the text begins; None if the pieces do not make up the text."""
    if not proof.texts or not proof.pieces:
        return None
    pieces, text = proof.pieces[ahead.prompt], proof.texts[ahead.prompt]
    return next((start for start in (0, 1) if "".join(pieces[start:]) == text), None)


def _places(ahead: Ahead, *, strip: bool) -> Callable[[Rated], int | None]:
    """Return what finds a server's token among those that a proof rates.

    `strip`: the proof's texts of single tokens lack the space before a word, as some tokenizers
    decode them.
    """

    def plain(text: str) -> str:
        return text.strip(_SPACES) if strip else text

    ids = {token: i for i, token in enumerate(ahead.tokens)}
    texts = {plain(text): i for i, text in enumerate(ahead.texts)}

    def place(rated: Rated) -> int | None:
        return ids.get(rated.token) if rated.token is not None else texts.get(plain(rated.text))

    return place
