"""A server with the completions interface, which computes with a model of the test."""

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import torch


class Answering(BaseHTTPRequestHandler):
    """Answers in JSON, or with the bytes of a file."""

    def log_message(self, *_: Any) -> None:
        pass

    def body(self) -> bytes:
        return self.rfile.read(int(self.headers.get("Content-Length") or 0))

    def answer(self, value: Any, status: int = 200, **headers: str) -> None:
        data = value if isinstance(value, bytes) else json.dumps(value).encode()
        self.send_response(status)
        for key, text in {"Content-Length": str(len(data)), **headers}.items():
            self.send_header(key, text)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)


@contextmanager
def running(handler: type[Answering]) -> Iterator[str]:
    """Serve on a free port of this machine; gives the URL."""
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, args=(0.02,)).start()
        try:
            yield f"http://127.0.0.1:{server.server_port}"
        finally:
            server.shutdown()


class Letters:
    """A tokenizer: a token for each character."""

    def __call__(self, text: str) -> dict[str, list[int]]:
        return {"input_ids": [ord(letter) - 32 for letter in text]}

    def decode(self, ids: list[int]) -> str:
        return "".join(map(letter, ids))


def letter(token: int) -> str:
    return chr(token + 32)


class Served:
    """A model behind an address.

    `kind` is whose answers it gives: `vllm` rates a prompt and names tokens by id, `texts` takes
    and gives text only, `llama.cpp` rates the next token only, `llama-cpp-python` takes and gives
    text and rates a prompt one place late unless `first` begins it, `silent` returns no
    log-probabilities.
    """

    first: int | None = None
    """The token that begins every text."""

    def __init__(self, model: Any, kind: str, names: tuple[str, ...] = ("base", "sql")) -> None:
        self.model, self.kind, self.names = model, kind, names
        self.asked: list[dict[str, Any]] = []

    def complete(self, body: dict[str, Any]) -> dict[str, Any]:
        self.asked.append(body)
        prompt = body["prompt"]
        if self.kind in ("texts", "llama-cpp-python") and not isinstance(prompt, str):
            raise ValueError("prompt: Input should be a valid string")
        if isinstance(prompt, str):
            start = [] if self.first is None else [self.first]
            prompt = start + Letters()(prompt)["input_ids"]
        if max(prompt) >= self.model.config.vocab_size:
            raise ValueError(f"Token id {max(prompt)} is out of vocabulary")
        with torch.no_grad():
            rows = self.model(torch.tensor([prompt])).logits[0].log_softmax(-1)
        choice = {"text": "", "logprobs": self._said(prompt, rows, body)}
        return {"choices": [choice], "usage": {"prompt_tokens": len(prompt)}}

    def _said(self, prompt: list[int], rows: Any, body: dict[str, Any]) -> Any:
        pairs = best(rows[-1], body)
        if self.kind == "silent":
            return None
        if self.kind == "llama.cpp":
            tops = [{"id": t, "token": letter(t), "logprob": v} for t, v in pairs]
            return {"content": [{**tops[0], "top_logprobs": tops}]}
        if self.kind == "llama-cpp-python":
            return self._late(prompt, rows, body)

        def named(token: int) -> str:
            return letter(token) if self.kind == "texts" else f"token_id:{token}"

        tokens, values = [named(pairs[0][0])], [pairs[0][1]]
        if body.get("echo"):
            rated = [float(rows[i, token]) for i, token in enumerate(prompt[1:])]
            tokens, values = [*map(named, prompt), *tokens], [None, *rated, *values]
        tops = [None] * (len(tokens) - 1) + [{named(t): v for t, v in pairs}]
        return {"tokens": tokens, "token_logprobs": values, "top_logprobs": tops}

    def _late(self, prompt: list[int], rows: Any, body: dict[str, Any]) -> dict[str, Any]:
        """As `Llama._create_completion` of llama-cpp-python 0.3.36 pairs tokens and rows."""
        tokens, offset = [int(rows[-1].argmax())], len(prompt) - 1
        if body.get("echo"):
            tokens, offset = prompt[prompt[0] == self.first :] + tokens, 0
        rated = list(zip(tokens, rows[offset:], strict=False))
        values: list[Any] = [float(row[token]) for token, row in rated]
        tops: list[Any] = [
            {letter(t): v for t, v in [*best(row, body), (token, float(row[token]))]}
            for token, row in rated
        ]
        if body.get("echo"):
            values[0] = tops[0] = None
        named = [letter(token) for token, _ in rated]
        return {"tokens": named, "token_logprobs": values, "top_logprobs": tops}


def best(row: Any, body: dict[str, Any]) -> list[tuple[int, float]]:
    """The tokens that a row rates highest, as many as are asked for, with their ratings."""
    top = row.topk(body["logprobs"])
    return list(zip(top.indices.tolist(), top.values.tolist(), strict=True))


def serving(served: Served) -> Any:
    """Serve a model; a context that gives the URL."""

    class Handler(Answering):
        def do_GET(self) -> None:
            self.answer({"data": [{"id": name} for name in served.names]})

        def do_POST(self) -> None:
            try:
                self.answer(served.complete(json.loads(self.body())))
            except ValueError as error:
                status = 500 if served.kind == "llama-cpp-python" else 400
                self.answer({"error": {"message": str(error)}}, status)

    return running(Handler)
