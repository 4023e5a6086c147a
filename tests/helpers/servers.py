"""A server with the completions interface, which computes with a model of the test."""

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import torch


class Letters:
    """A tokenizer: a token for each character."""

    def __call__(self, text: str) -> dict[str, list[int]]:
        return {"input_ids": [ord(letter) - 32 for letter in text]}

    def decode(self, ids: list[int]) -> str:
        return "".join(chr(token + 32) for token in ids)


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

    def models(self) -> dict[str, Any]:
        return {"data": [{"id": name} for name in self.names]}

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
        top = rows[-1].topk(body["logprobs"])
        pairs = list(zip(top.indices.tolist(), top.values.tolist(), strict=True))
        if self.kind == "silent":
            return None
        if self.kind == "llama.cpp":
            best = [{"id": t, "token": Letters().decode([t]), "logprob": v} for t, v in pairs]
            return {"content": [{**best[0], "top_logprobs": best}]}
        if self.kind == "llama-cpp-python":
            return self._late(prompt, rows, body)

        def named(token: int) -> str:
            return Letters().decode([token]) if self.kind == "texts" else f"token_id:{token}"

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
        values: list[Any] = []
        tops: list[Any] = []
        for token, row in zip(tokens, rows[offset:], strict=False):
            best = row.topk(body["logprobs"])
            pairs = [*zip(best.indices.tolist(), best.values.tolist(), strict=True)]
            values.append(float(row[token]))
            tops.append({Letters().decode([t]): v for t, v in [*pairs, (token, values[-1])]})
        if body.get("echo"):
            values[0] = tops[0] = None
        named = [Letters().decode([token]) for token in tokens[: len(values)]]
        return {"tokens": named, "token_logprobs": values, "top_logprobs": tops}


@contextmanager
def serving(served: Served) -> Iterator[str]:
    """Serve on a free port of this machine; gives the URL."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            try:
                self._answer(200, served.models())
            except PermissionError:
                self._answer(401, {"error": "Unauthorized"})

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            try:
                self._answer(200, served.complete(body))
            except ValueError as error:
                self._answer(
                    500 if served.kind == "llama-cpp-python" else 400,
                    {"error": {"message": str(error)}},
                )

        def _answer(self, code: int, data: Any) -> None:
            text = json.dumps(data).encode()
            self.send_response(code)
            self.send_header("Content-Length", str(len(text)))
            self.end_headers()
            self.wfile.write(text)

        def log_message(self, *_: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
