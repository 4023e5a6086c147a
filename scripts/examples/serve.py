"""A server with an adapter for each user: one base, requests on threads, hot reload.

    python scripts/examples/serve.py --model MODEL --adapters FOLDER     (needs fastapi and uvicorn)

    curl -X POST localhost:8000/generate -H 'content-type: application/json' \
        -d '{"user": "ann", "prompt": "Hello"}'
    curl -X POST localhost:8000/reload/ann      # FOLDER/ann was written anew

`routed` belongs to the thread that enters it, so requests cannot see each other's adapters. A
reload waits until the requests in flight have ended, since it writes into A and B.
"""

import argparse
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from fastapi import FastAPI, HTTPException
from pydantic import BaseModel
from transformers import AutoModelForCausalLM, AutoTokenizer

import lora_inject as li


class Gate:
    """Many readers or one writer."""

    def __init__(self) -> None:
        self._change, self._inside = threading.Condition(), 0

    @contextmanager
    def reading(self) -> Iterator[None]:
        with self._change:
            self._inside += 1
        try:
            yield
        finally:
            with self._change:
                self._inside -= 1
                self._change.notify_all()

    @contextmanager
    def writing(self) -> Iterator[None]:
        with self._change:  # no reader enters while this is held
            self._change.wait_for(lambda: not self._inside)
            yield


class Request(BaseModel):
    """What a client sends."""

    user: str
    prompt: str
    max_new_tokens: int = 32


def build(model: Any, tokenizer: Any, folder: Path) -> FastAPI:
    """The application for a model, with each subfolder of `folder` as a user's adapter."""
    app, gate = FastAPI(), Gate()
    for path in sorted(p for p in folder.iterdir() if p.is_dir()):
        li.load_adapter(model, path, path.name)

    @app.post("/generate")
    def generate(request: Request) -> dict[str, str]:  # not async: FastAPI runs it on a thread
        with gate.reading(), torch.inference_mode():
            if request.user not in li.adapters(model):
                raise HTTPException(404, f"no adapter of {request.user!r}")
            inputs = tokenizer(request.prompt, return_tensors="pt", return_token_type_ids=False)
            with li.routed(model, [request.user]):
                length = request.max_new_tokens
                out = model.generate(**inputs, max_new_tokens=length, do_sample=False)
        return {"text": tokenizer.decode(out[0], skip_special_tokens=True)}

    @app.post("/reload/{user}")
    def reload(user: str) -> dict[str, str]:
        if user not in {p.name for p in folder.iterdir() if p.is_dir()}:  # never a path of theirs
            raise HTTPException(404, f"no folder of {user!r}")
        with gate.writing():
            if user in li.adapters(model):
                li.swap_adapter(model, folder / user, user)
            else:
                li.load_adapter(model, folder / user, user)
        return {"user": user}

    return app


if __name__ == "__main__":
    import uvicorn

    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", required=True)
    parser.add_argument("--adapters", required=True, type=Path)
    asked = parser.parse_args()
    base = AutoModelForCausalLM.from_pretrained(asked.model).eval()
    uvicorn.run(build(base, AutoTokenizer.from_pretrained(asked.model), asked.adapters))
