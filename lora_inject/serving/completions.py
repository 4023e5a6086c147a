"""A server with the completions interface of OpenAI, asked for log-probabilities.

It takes prompts as token ids. vLLM (0.32, entrypoints/openai/completion), SGLang (0.5.23,
srt/entrypoints/openai) and llama.cpp's llama-server differ in what they return: the
log-probabilities of the prompt (`echo`), or only of the next token; tokens as ids, or as text.
"""

from __future__ import annotations

import json
import os
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from http.client import HTTPException
from typing import Any, NamedTuple

from lora_inject.core.model.probing import N_TOP
from lora_inject.errors import ServerError

_ID = "token_id:"  # how vLLM writes a token as its id
_IDS = {"return_tokens_as_token_ids": True}
_ECHO = {"echo": True, **_IDS}


class Rated(NamedTuple):
    """A token that a server has rated: its id, None where it says only its text."""

    token: int | None
    value: float


@dataclass(frozen=True)
class Server:
    """A server, and the model on it that is asked.

    Attributes:
        url: Without `/v1` at its end.
        model: The name of the model, or of the adapter, on the server.
        timeout: Seconds that each answer may take.
    """

    url: str
    model: str
    timeout: float = 60.0

    @classmethod
    def at(cls, url: str, model: str | None, near: str, timeout: float = 60.0) -> Server:
        """Return a server; without a model, its only one or the one called as the adapter.

        Raises:
            ServerError: The URL is none, nobody answers, or the model has to be named.
        """
        if not _is_address(url):
            raise ServerError(f"ask {url!r}", "it is no URL", "Give one, such as http://HOST:8000")
        plain = cls(url.rstrip("/").removesuffix("/v1"), model or "", timeout)
        return plain if model else cls(plain.url, plain.only_model(near), timeout)

    def only_model(self, near: str) -> str:
        """Return the name that the server has for what is asked for, as far as it tells."""
        rows = _at(self._ask("/v1/models", None), "data")
        ids = (_at(row, "id") for row in (rows if isinstance(rows, list) else ()))
        names = [str(name) for name in ids if name is not None]
        if near in names:
            return near
        if len(names) == 1:
            return names[0]
        problem = f"it serves {', '.join(map(repr, names[:9]))}" if names else "it lists no models"
        raise ServerError(f"ask {self.url}", problem, "Name the one to ask: --model NAME")

    def rated_prompt(self, prompt: Sequence[int]) -> list[Rated]:
        """Return each token of a prompt as the server rates it, and the one that it made after it.

        Nothing if the server does not rate prompts. The first token has no rating, and is left out.
        """
        said = self._logprobs(prompt, {**_ECHO, "logprobs": 1})
        values = said.get("token_logprobs")
        tokens = said.get("tokens")
        if not isinstance(values, list) or not isinstance(tokens, list) or len(values) < 2:
            return []
        if len(values) != len(tokens) or values[0] is not None:  # not the prompt's
            return []
        pairs = zip(tokens[1:], values[1:], strict=True)
        return [_rated(token, value) for token, value in pairs if isinstance(value, int | float)]

    def rated_next(self, prompt: Sequence[int]) -> list[Rated]:
        """Return the most probable next tokens after a prompt."""
        said = self._logprobs(prompt, {**_IDS, "logprobs": N_TOP})
        rows = _at(said, "content", 0, "top_logprobs")  # llama-server
        if isinstance(rows, list):
            return [_of_row(row) for row in rows if isinstance(_at(row, "logprob"), int | float)]
        last = _at(said, "top_logprobs", -1)
        if not isinstance(last, Mapping):
            return []
        return [_rated(*pair) for pair in last.items() if isinstance(pair[1], int | float)]

    def _logprobs(self, prompt: Sequence[int], more: Mapping[str, Any]) -> Mapping[str, Any]:
        """Ask for one more token after a prompt; return what the answer says of probabilities."""
        body = {"model": self.model, "prompt": [*prompt], "max_tokens": 1, "temperature": 0, **more}
        said = _at(self._ask("/v1/completions", body), "choices", 0, "logprobs")
        if not isinstance(said, Mapping):
            problem = "the server returns no log-probabilities (choices[0].logprobs)"
            remedy = "Let it return them (vLLM: --max-logprobs 5)"
            raise ServerError(f"ask {self.url}", problem, remedy)
        return said

    def _ask(self, path: str, body: Mapping[str, Any] | None) -> Any:
        asked = f"ask {self.url}{path}"
        headers = {"Content-Type": "application/json"}
        if key := os.environ.get("OPENAI_API_KEY"):
            headers["Authorization"] = f"Bearer {key}"
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(self.url + path, data, headers)  # noqa: S310
        try:
            with urllib.request.urlopen(request, timeout=self.timeout) as answer:  # noqa: S310
                text = answer.read(1 << 24)
        except urllib.error.HTTPError as error:
            words = error.read(2000).decode(errors="replace")
            remedy = "Check --model, and that it serves the adapter's base"
            if error.code in (401, 403):
                remedy = "Set OPENAI_API_KEY to the server's key"
            elif error.code in (400, 422, 500):  # llama-cpp-python's answers 500 to token ids
                remedy += ", and that it takes token ids as a prompt"
            problem = f"it answers {error.code}: {_said(words)}"
            raise ServerError(asked, problem, remedy) from error
        except (OSError, HTTPException) as error:
            reason = getattr(error, "reason", None) or error
            remedy = "Start the server, or check the URL"
            raise ServerError(asked, f"it does not answer ({reason})", remedy) from error
        try:
            return json.loads(text)
        except ValueError as error:
            remedy = "Give the URL of an OpenAI-compatible server"
            raise ServerError(asked, "its answer is not JSON", remedy) from error


def _is_address(url: object) -> bool:
    """Whether a URL names a host; whether its port is a number is seen when it is asked."""
    if not isinstance(url, str) or not url.startswith(("http://", "https://")):
        return False
    try:
        host = urllib.parse.urlsplit(url).hostname
    except ValueError:
        return False
    return bool(host) and not any(letter.isspace() for letter in url)


def _at(answer: Any, *path: str | int) -> Any:
    """Return what stands at a path of an answer; None where it has another form."""
    for step in path:
        try:
            answer = answer[step]
        except (LookupError, TypeError):
            return None
    return answer


def _rated(token: object, value: float) -> Rated:
    number = str(token).removeprefix(_ID)
    is_id = number != token and number.isdecimal()
    return Rated(int(number) if is_id else None, float(value))


def _of_row(row: Mapping[str, Any]) -> Rated:
    token = row.get("id")
    plain = _rated(row.get("token", ""), row["logprob"])
    return plain._replace(token=token) if isinstance(token, int) else plain


def _said(words: str) -> str:
    """Return the message in the body of an error, in one line."""
    with suppress(ValueError):
        plain = json.loads(words)
        error = _at(plain, "error") or plain
        words = str(_at(error, "message") or error)
    return " ".join(words.split())[:300]
