"""llama.cpp's runtime (llama-cpp-python), with files by llama.cpp's own converters and by us.

pip install llama-cpp-python sentencepiece   # builds it: half an hour on one core
python scripts/interop/clients.py llama_cpp --sources UNPACKED_SDIST/vendor/llama.cpp
"""

from __future__ import annotations

import importlib.metadata
import multiprocessing
import os
import subprocess
import sys
from pathlib import Path

import torch

import programs
from programs import IDS, Outputs

CHECK = "llama.cpp"
FILES = ("gguf", "peft", "portable", "merged")
F32 = 0  # ggml's number of the type; the cache of keys and values is float16 by default


def version() -> str:
    os.environ["GGML_NO_BACKTRACE"] = "1"
    return "llama-cpp-python " + importlib.metadata.version("llama-cpp-python")


def start(base: Path) -> Outputs:
    def converted(script: str, folder: Path, *more: str) -> Path:
        target = folder.with_name(folder.name + ".converted.gguf")
        command = [
            sys.executable,
            str(programs.SOURCES / script),
            str(folder),
            "--outfile",
            str(target),
        ]
        command += ["--outtype", "f32", *more]
        run = subprocess.run(command, check=False, capture_output=True, text=True)
        if run.returncode != 0:
            raise ValueError(run.stderr.strip().splitlines()[-1])
        return target

    if not (base / "tokenizer.json").exists():
        write_tokenizer(base)
    model = converted("convert_hf_to_gguf.py", base)

    def run(path: Path | None) -> torch.Tensor:
        if path is not None and path.is_dir():
            path = converted("convert_lora_to_gguf.py", path, "--base", str(base))
        result = model.with_suffix(".result")
        result.unlink(missing_ok=True)
        child = multiprocessing.get_context("fork").Process(  # the runtime may abort its process
            target=evaluate, args=(model, path, result)
        )
        child.start()
        child.join()
        if not result.exists():
            raise ValueError(f"the process ended with {child.exitcode}")
        return torch.load(result).log_softmax(-1)

    return run


def evaluate(model: Path, adapter: Path | None, result: Path) -> None:
    """Save the logits of `IDS`."""
    import llama_cpp

    llm = llama_cpp.Llama(
        str(model), lora_path=adapter and str(adapter), n_ctx=64, n_threads=1, type_k=F32,
        type_v=F32, logits_all=True, verbose=False,
    )  # fmt: skip
    rows = []
    for tokens in IDS.tolist():
        llm.reset()
        llm.eval(tokens)
        rows.append(torch.tensor(llm.scores[: len(tokens)].copy()))
    torch.save(torch.stack(rows), result)


def write_tokenizer(base: Path) -> None:
    """Train a sentencepiece model of the vocabulary's size, which the converter asks for."""
    import sentencepiece

    words = [f"{n} {n * n:x}" for n in range(4000)]
    (base / "words.txt").write_text("\n".join(words))
    sentencepiece.SentencePieceTrainer.train(
        input=str(base / "words.txt"), model_prefix=str(base / "tokenizer"), vocab_size=320,
        byte_fallback=True, hard_vocab_limit=False, minloglevel=2, bos_id=1, eos_id=2, unk_id=0,
    )  # fmt: skip
