"""Whether an adapter is loaded, by what is computed: on a live model, or by a server.

What computed values say about an adapter: with it, without it, scaled by k, or something else.

1. The values of a proof at its strengths, joined by straight lines, are a path from the base
   through the adapter and beyond.
2. The nearest point of that path to the values that were computed has a strength k, and a distance.
3. `with` and `without` hold within the tolerance of strength 1 and 0. Where the distance from the
   path is within it, or within a quarter of the piece of the path that k is on, the adapter is
   there scaled by about k. Anything else is neither.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from lora_inject.core.layers.survey import evaluating
from lora_inject.core.model.probing import N_TOP, run, token_values
from lora_inject.core.roots.root import root_of
from lora_inject.core.spec.names import nearest
from lora_inject.core.spec.tables import Report, wrapped
from lora_inject.errors import ServerError, StateError, user_path
from lora_inject.formats.pairs import DTYPES
from lora_inject.formats.proof import Ahead, Proof, read_proof, rms

Word = Literal["with", "without", "scaled", "neither"]
_SMALL = 10  # of the adapter's effect: what a tenth changes is no other adapter
_NEAR = 4  # of a piece of the path, which is bent where the proof has a straight line
_NO_RATINGS = "The server does not rate the tokens of a prompt (echo with logprobs); what it says "
_NO_RATINGS += "of the next token was compared"
_WHAT = "log-probabilities"


@dataclass(frozen=True)
class Verdict(Report):
    """What was computed, compared with the proof of an adapter.

    Attributes:
        word: `with`, `without`, `scaled` or `neither`.
        scale: By how much the adapter is multiplied, as far as can be told; None for `neither`.
        from_adapter: Distance of the values from those with the adapter (root of a mean square).
        from_base: Distance from those without it.
        from_path: Distance from those with the adapter at its best scale.
        effect: Distance between the two, of the same places.
        tolerance: What rounding explains.
        n: How many values were compared.
        what: What the values are.
        notes: What a server did not return, or what else limits the comparison.
    """

    word: Word
    scale: float | None
    from_adapter: float
    from_base: float
    from_path: float
    effect: float
    tolerance: float
    n: int
    what: str
    notes: tuple[str, ...] = ()

    @property
    def ok(self) -> bool:
        """Whether the adapter is there, as it was saved."""
        return self.word == "with"

    def _lines(self, width: int) -> list[str]:
        return wrapped(str(self), width)

    def __str__(self) -> str:
        """Say it in words, with the distances."""
        said = {
            "with": "with the adapter",
            "without": "without the adapter",
            "scaled": f"with the adapter scaled by about {self.scale or 0:.2g}",
            "neither": "neither with the adapter nor without it",
        }[self.word]
        distances = (
            f"{self.n} {self.what} differ by {self.from_adapter:.2g} from those with the adapter "
            f"and by {self.from_base:.2g} from those without it; the two differ by "
            f"{self.effect:.2g}, and the tolerance is {self.tolerance:.2g}"
        )
        if self.word == "neither":
            distances += f"; at its best scale the adapter differs by {self.from_path:.2g}"
        return ". ".join([f"{said}: {distances}", *self.notes])


def judge(
    proof: Proof,
    residuals: Sequence[Tensor],
    what: str,
    *,
    dtype: str | None = None,
    same_program: bool = False,
    notes: Sequence[str] = (),
) -> Verdict:
    """Compare what was computed with a proof.

    Args:
        proof: The proof of the adapter.
        residuals: For each of its strengths, the computed values less those of the proof, float64
            `(n,)`.
        what: What the values are, for the words.
        dtype: What they were computed in; by default as in the proof.
        same_program: Whether what made the proof computed this as well, so that rounding explains
            less than a tenth of the effect, by which servers may differ.
        notes: For the verdict.

    Examples:
        >>> values = [[0.0, 0.0], [1.0, 2.0], [2.0, 4.0]]
        >>> rest = {"ahead": [], "vocabulary": 9}
        >>> proof = Proof(strengths=[0.0, 1.0, 2.0], values=values, prompts=[[1, 2, 3]],
        ...     dtype="float32", size=1.0, **rest)
        >>> computed = 1.5 * proof.at(1.0)
        >>> verdict = judge(proof, [computed - proof.at(k) for k in proof.strengths], "numbers")
        >>> verdict.word, verdict.scale
        ('scaled', 1.5)
    """
    base, adapter = (residuals[proof.strengths.index(k)] for k in (0.0, 1.0))
    effect = rms(base - adapter)
    noise = proof.noise(dtype)
    tolerance = noise if same_program else max(noise, effect / _SMALL)
    if effect <= 2 * tolerance:
        raise StateError(
            "compare with the proof",
            f"with and without the adapter these {len(adapter)} {what} differ by {effect:.2g}, of "
            f"which rounding in {dtype or proof.dtype} alone explains {noise:.2g}: they tell "
            "nothing",
            "Compute in a wider dtype, or save the adapter with a probe on which it acts",
        )
    scale, off, piece = _nearest(proof.strengths, residuals)
    word: Word = "neither"
    if rms(adapter) <= tolerance:
        word, scale = "with", 1.0
    elif rms(base) <= tolerance:
        word, scale = "without", 0.0
    elif off <= max(tolerance, piece / _NEAR) and scale < proof.strengths[-1]:
        word = "scaled"
    return Verdict(
        word=word,
        scale=None if word == "neither" else scale,
        from_adapter=rms(adapter),
        from_base=rms(base),
        from_path=off,
        effect=effect,
        tolerance=tolerance,
        n=len(adapter),
        what=what,
        notes=(*notes, *_hint(word, rms(adapter), proof, dtype)),
    )


def _nearest(strengths: Sequence[float], residuals: Sequence[Tensor]) -> tuple[float, float, float]:
    """Return the strength of the path's nearest point, its distance, and its piece's length."""
    best = (0.0, float("inf"), 0.0)
    for i in range(len(strengths) - 1):
        start, step = residuals[i], residuals[i + 1] - residuals[i]
        length = float(step.square().sum())
        share = min(max(-float(start @ step) / length, 0.0), 1.0) if length else 0.0
        off = rms(start + share * step)
        if off < best[1]:
            between = strengths[i] + share * (strengths[i + 1] - strengths[i])
            best = (between, off, rms(step))
    return best


def _hint(word: Word, off: float, proof: Proof, dtype: str | None) -> Sequence[str]:
    """Say where a narrower dtype would explain the distance."""
    narrow = next((d for d in ("float16", "bfloat16") if off <= proof.noise(d)), None)
    if word != "neither" or narrow is None or narrow == (dtype or proof.dtype):
        return ()
    return (f"If it computes in {narrow}, say so: dtype={narrow!r} explains the distance",)


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
    return judge(proof, _residuals(proof, values), _WHAT, dtype=dtype, same_program=True)


def verify_served(
    url: str,
    adapter: str | PathLike[str],
    *,
    model: str | None = None,
    dtype: str | None = None,
    timeout: float = 60.0,
) -> Verdict:
    """Say whether a server computes with an adapter, by the log-probabilities that it returns.

    It needs nothing but the adapter's file. The server has the completions interface of OpenAI and
    takes token ids as a prompt, as vLLM, SGLang and llama.cpp's llama-server do. Where it asks for
    a key, `OPENAI_API_KEY` holds it; the key is not sent on where the server redirects to another.

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
        ServerError: httpx is not installed; the server does not answer, returns no
            log-probabilities, or has another vocabulary.
    """
    asked = f"verify what {url} serves"
    _check_dtype(dtype, asked)
    proof = read_proof(adapter, asked)
    place = user_path(asked, adapter)
    with _Server.at(url, timeout) as server:
        server.choose(model, near=place.stem if place.is_file() else place.name)
        rows = [server.rated_prompt(prompt) for prompt in proof.prompts]
        what, notes = _WHAT, list[str]()
        if all(rows):
            residuals = _residuals(proof, _prompt_values(proof, rows, asked))
        else:
            what, notes = f"{_WHAT} of next tokens", [_NO_RATINGS]
            parts = [_next_residuals(server, proof, ahead, asked) for ahead in proof.ahead]
            residuals = [torch.cat([*each]) for each in zip(*parts, strict=True)]
    if not len(residuals[0]):
        problem = "it rates neither the tokens of a prompt nor the next one"
        remedy = "Let the server return log-probabilities: logprobs=5 in /v1/completions"
        raise ServerError(asked, problem, remedy)
    if not bool(torch.isfinite(residuals[0]).all()):
        problem = "it returns NaN as log-probabilities"
        raise ServerError(asked, problem, "Look at its dtype and at the weights that it has loaded")
    return judge(proof, residuals, what, dtype=dtype, notes=notes)


def _residuals(proof: Proof, values: Tensor) -> list[Tensor]:
    """Return, for each strength, how far values are from the proof's."""
    return [values - proof.at(strength) for strength in proof.strengths]


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


def _prompt_values(proof: Proof, rows: Sequence[Sequence[_Rated]], asked: str) -> Tensor:
    """Return what was rated, in the order of the proof's values; refuse other tokens than its."""
    values: list[float] = []
    for number, (prompt, row) in enumerate(zip(proof.prompts, rows, strict=True), 1):
        pairs = [*zip(prompt[1:], row, strict=False)]
        if len(pairs) < len(prompt) - 1 or any(r.token not in (None, due) for due, r in pairs):
            problem = f"it makes other tokens of prompt {number} than the adapter's tokenizer"
            remedy = "Give the server of the adapter's base, with its tokenizer"
            raise ServerError(asked, f"{problem}: another vocabulary", remedy)
        values += [rated.value for _, rated in pairs]
    return torch.tensor(values, dtype=torch.float64)


def _next_residuals(server: _Server, proof: Proof, ahead: Ahead, asked: str) -> list[Tensor]:
    """Return, for each strength, how far the server's next tokens are from the proof's.

    A token that the proof does not rate is less probable than the most probable ones, all of which
    it rates: only what is above the last of those counts.
    """
    rated = server.rated_next(proof.prompts[ahead.prompt][: ahead.length])
    if any(each.token is None for each in rated):
        problem = "it rates no prompts, and says next tokens as text, which the proof does not know"
        remedy = "Let it rate prompts, or name tokens by id, as vLLM and llama-server do"
        raise ServerError(asked, problem, remedy)
    place = {token: i for i, token in enumerate(ahead.tokens)}
    residuals = []
    for row in ahead.values:
        least = sorted(row)[-min(N_TOP, len(row))]
        off = [
            each.value - row[place[each.token]]
            if each.token in place
            else max(0.0, each.value - least)
            for each in rated
        ]
        residuals.append(torch.tensor(off, dtype=torch.float64))
    return residuals


# A server ---------------------------------------------------------------------------------------

_ID = "token_id:"  # how vLLM writes a token as its id
_IDS = {"return_tokens_as_token_ids": True}


class _Rated(NamedTuple):
    """A token that a server has rated: its id, None where it says only its text."""

    token: int | None
    value: float


@dataclass
class _Server:
    """A server with the completions interface of OpenAI, asked for log-probabilities.

    It takes prompts as token ids. vLLM (0.32, entrypoints/openai/completion), SGLang (0.5.23,
    srt/entrypoints/openai) and llama.cpp's llama-server differ in what they return: the
    log-probabilities of the prompt (`echo`), or only of the next token; tokens as ids, or as text.
    """

    url: str  # without `/v1` at its end
    client: Any  # of httpx
    model: str = ""  # the name of the model, or of the adapter, on the server

    @classmethod
    @contextmanager
    def at(cls, url: str, timeout: float) -> Iterator[_Server]:
        """Open a server, or refuse what is no address."""
        asked = f"ask {url!r}"
        try:
            import httpx
        except ImportError:
            remedy = "Run pip install httpx"
            raise ServerError(asked, "httpx is not installed", remedy) from None
        try:
            address = httpx.URL(url)
        except (TypeError, httpx.InvalidURL):
            address = httpx.URL()
        if address.scheme not in ("http", "https") or not address.host:
            raise ServerError(asked, "it is no URL", "Give one, such as http://HOST:8000")
        key = os.environ.get("OPENAI_API_KEY")
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        # httpx leaves the key out of a request to another host, to which a server redirects.
        with httpx.Client(headers=headers, timeout=timeout, follow_redirects=True) as client:
            yield cls(url.rstrip("/").removesuffix("/v1"), client)

    def choose(self, model: str | None, near: str) -> None:
        """Choose what is asked: a model, else the server's only one or the one that is so called.

        Raises:
            ServerError: The model has to be named.
        """
        if model is None:
            rows = _at(self._ask("/v1/models", None), "data")
            ids = (_at(row, "id") for row in (rows if isinstance(rows, list) else ()))
            names = [str(name) for name in ids if name is not None]
            if near not in names and len(names) != 1:
                said = f"it serves {', '.join(map(repr, names[:9]))}"
                problem = said if names else "it lists no models"
                raise ServerError(f"ask {self.url}", problem, "Name the one to ask: --model NAME")
            model = near if near in names else names[0]
        self.model = model

    def rated_prompt(self, prompt: Sequence[int]) -> list[_Rated]:
        """Return each token of a prompt as the server rates it, and the one that it made after it.

        Nothing if the server does not rate each. The first token has no rating, and is left out.
        """
        said = self._logprobs(prompt, echo=True, logprobs=1)
        values, tokens = said.get("token_logprobs"), said.get("tokens")
        if not isinstance(values, list) or not isinstance(tokens, list):
            return []
        if len(values) != len(tokens) or values[:1] != [None]:  # not the prompt's
            return []
        pairs = [*zip(tokens[1:], values[1:], strict=True)]
        rates_all = all(isinstance(value, int | float) for _, value in pairs)
        return [_rated(*pair) for pair in pairs] if rates_all else []

    def rated_next(self, prompt: Sequence[int]) -> list[_Rated]:
        """Return the most probable next tokens after a prompt."""
        said = self._logprobs(prompt, logprobs=N_TOP)
        rows = _at(said, "content", 0, "top_logprobs")  # llama-server
        if isinstance(rows, list):
            rated = [row for row in rows if isinstance(_at(row, "logprob"), int | float)]
            return [_rated(row.get("token", ""), row["logprob"], row.get("id")) for row in rated]
        last = _at(said, "top_logprobs", -1)
        if not isinstance(last, Mapping):
            return []
        return [_rated(*pair) for pair in last.items() if isinstance(pair[1], int | float)]

    def _logprobs(self, prompt: Sequence[int], **more: Any) -> Mapping[str, Any]:
        """Ask for one more token after a prompt; return what the answer says of probabilities."""
        body = {"model": self.model, "prompt": [*prompt], "max_tokens": 1, "temperature": 0}
        answer = self._ask("/v1/completions", {**body, **_IDS, **more})
        said = _at(answer, "choices", 0, "logprobs")
        if not isinstance(said, Mapping):
            problem = "the server returns no log-probabilities (choices[0].logprobs)"
            remedy = "Let it return them (vLLM: --max-logprobs 5)"
            raise ServerError(f"ask {self.url}", problem, remedy)
        return said

    def _ask(self, path: str, body: Mapping[str, Any] | None) -> Any:
        import httpx

        asked, method = f"ask {self.url}{path}", "GET" if body is None else "POST"
        try:
            answer = self.client.request(method, self.url + path, json=body)
        except httpx.HTTPError as error:
            problem = f"it does not answer ({error or type(error).__name__})"
            raise ServerError(asked, problem, "Start the server, or check the URL") from error
        try:
            plain = answer.json()
        except ValueError:
            plain = None
        if answer.is_success and plain is not None:
            return plain
        if answer.is_success:
            remedy = "Give the URL of an OpenAI-compatible server"
            raise ServerError(asked, "its answer is not JSON", remedy)
        remedy = "Check --model, and that it serves the adapter's base"
        if answer.status_code in (401, 403):
            remedy = "Set OPENAI_API_KEY to the server's key"
        elif answer.status_code in (400, 422, 500):  # llama-cpp-python answers 500 to token ids
            remedy += ", and that it takes token ids as a prompt"
        fault = _at(plain, "error") or plain
        words = " ".join(str(_at(fault, "message") or fault or answer.text).split())[:300]
        raise ServerError(asked, f"it answers {answer.status_code}: {words}", remedy)


def _at(answer: Any, *path: str | int) -> Any:
    """Return what stands at a path of an answer; None where it has another form."""
    for step in path:
        try:
            answer = answer[step]
        except (LookupError, TypeError):
            return None
    return answer


def _rated(token: object, value: float, number: object = None) -> _Rated:
    """Return a token that a server names by a number, or by its id or its text."""
    if not isinstance(number, int):
        end = str(token).removeprefix(_ID)
        number = int(end) if end != token and end.isdecimal() else None
    return _Rated(number, float(value))
