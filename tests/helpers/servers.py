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


def ids_of(text: str) -> list[int]:
    """What a tokenizer makes of a text that has a token for each character."""
    return [ord(letter) - 32 for letter in text]


def letter(token: int) -> str:
    return chr(token + 32)


class Served:
    """A model behind an address.

    `kind` is whose answers it gives: `vllm` rates a prompt and names tokens by id, `texts` names
    them as text, `llama.cpp` rates the next token only, `next, as text` does it without ids,
    `llama-cpp-python` takes no ids, `silent` returns no log-probabilities.
    """

    def __init__(self, model: Any, kind: str, names: tuple[str, ...] = ("base", "sql")) -> None:
        self.model, self.kind, self.names = model, kind, names
        self.asked: list[dict[str, Any]] = []

    def complete(self, body: dict[str, Any]) -> dict[str, Any]:
        self.asked.append(body)
        prompt = body["prompt"]
        if self.kind == "llama-cpp-python":
            raise ValueError("prompt: Input should be a valid string")
        if max(prompt) >= self.model.config.vocab_size:
            raise ValueError(f"Token id {max(prompt)} is out of vocabulary")
        with torch.no_grad():
            rows = self.model(torch.tensor([prompt])).logits[0].log_softmax(-1)
        return {"choices": [{"text": "", "logprobs": self._said(prompt, rows, body)}]}

    def _said(self, prompt: list[int], rows: Any, body: dict[str, Any]) -> Any:
        pairs = best(rows[-1], body)
        if self.kind == "silent":
            return None
        if self.kind == "llama.cpp":
            tops = [{"id": t, "token": letter(t), "logprob": v} for t, v in pairs]
            return {"content": [{**tops[0], "top_logprobs": tops}]}

        def named(token: int) -> str:
            return letter(token) if "text" in self.kind else f"token_id:{token}"

        tokens, values = [named(pairs[0][0])], [pairs[0][1]]
        if body.get("echo") and self.kind != "next, as text":
            rated = [float(rows[i, token]) for i, token in enumerate(prompt[1:])]
            tokens, values = [*map(named, prompt), *tokens], [None, *rated, *values]
        tops = [None] * (len(tokens) - 1) + [{named(t): v for t, v in pairs}]
        return {"tokens": tokens, "token_logprobs": values, "top_logprobs": tops}


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
