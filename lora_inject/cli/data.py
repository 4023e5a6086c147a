"""What commands that run a model read: rows of text, as tokens in batches, and the model itself."""

from __future__ import annotations

import json
import random
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch.nn.utils.rnn import pad_sequence

from lora_inject.cli.show import note
from lora_inject.core.spec.names import counted
from lora_inject.errors import CheckpointError, ConfigError, user_path

IGNORED = -100  # the label that cross entropy leaves out
TOKENIZER_FILE = re.compile(r"token|vocab|\.(model|spm|bpe)$")
Row = tuple[str, str]
"""A prompt, or nothing, and its completion."""
Tokens = tuple[list[int], int]
"""The tokens of a row, and how many of them are its prompt's."""


def rows_of_file(path: Path) -> list[Row]:
    """Read prompt and completion of each row.

    Each line of a `.jsonl` file is `{"text": ...}` or `{"prompt": ..., "completion": ...}`. Each
    line of any other file is a text.
    """
    try:
        text = user_path("read data", path, ConfigError).read_bytes().decode("utf-8")
    except (OSError, ValueError) as error:
        problem = getattr(error, "strerror", None) or str(error)
        raise ConfigError(f"data '{path}'", problem, "Give a file of UTF-8 text") from None
    # At newlines alone: `splitlines` also splits at characters that may stand in a text.
    lines = enumerate(text.replace("\r\n", "\n").split("\n"), 1)
    filled = [(number, line) for number, line in lines if line.strip()]
    if path.suffix != ".jsonl":
        return [("", line) for _, line in filled]
    return [_row(line, f"data '{path}', line {number}") for number, line in filled]


def _row(line: str, asked: str) -> Row:
    remedy = 'Write {"text": "..."} or {"prompt": "...", "completion": "..."}'
    try:
        data = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise ConfigError(asked, f"it is not JSON: {error}", remedy) from None
    row = data if isinstance(data, dict) else {}
    prompt, completion = row.get("prompt", ""), row.get("completion", row.get("text"))
    if not isinstance(prompt, str) or not isinstance(completion, str):
        keys = ", ".join(f"{key!r}: {type(value).__name__}" for key, value in sorted(row.items()))
        raise ConfigError(asked, f"it holds {{{keys}}}", remedy)
    return prompt, completion


def split(rows: Sequence[Row], n: int, path: Path, seed: int) -> tuple[list[Row], list[Row]]:
    """Hold out a tenth of the rows, but at least one batch of `n`; the seed draws them."""
    if len(rows) < 2 * n:
        problem = f"it has {counted(len(rows), 'row')}, and two batches take {2 * n}, one held out"
        raise ConfigError(f"data '{path}'", problem, "Give more rows, or a smaller --batch")
    mixed = random.Random(seed).sample(list(rows), len(rows))  # noqa: S311  (no secrets)
    held_out = max(n, len(rows) // 10)
    return mixed[held_out:], mixed[:held_out]


def encoded(tokenizer: Any, rows: Sequence[Row], most: int, path: Path) -> list[Tokens]:
    """Return each row's first `most` tokens; rows that end before their completion are left out."""
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    examples = []
    for prompt, completion in rows:
        start = tokenizer.encode(prompt) if prompt else []
        rest = tokenizer.encode(completion, add_special_tokens=not prompt)
        tokens = (start + rest + end)[:most]
        if len(tokens) > max(len(start), 1):
            examples.append((tokens, len(start)))
    if len(examples) < len(rows):
        note(f"'{path}': {len(rows) - len(examples)} rows have no completion within --length")
    return examples


def batches(rows: Sequence[Tokens], n: int, path: Path, device: str) -> list[dict[str, Any]]:
    """Cut rows into batches of `n`, padded on the right, which no earlier token attends to."""
    if len(rows) < n:
        problem = f"it has {counted(len(rows), 'row')}, and a batch takes {n}"
        raise ConfigError(f"data '{path}'", problem, "Give more rows, or a smaller --batch")
    if rest := len(rows) % n:
        note(f"'{path}': the last {counted(rest, 'row')} are left out, as a batch takes {n}")
    made = []
    for start in range(0, len(rows) - n + 1, n):
        cut = rows[start : start + n]
        ids = pad_sequence([torch.tensor(tokens) for tokens, _ in cut], batch_first=True)
        due = [torch.tensor([IGNORED] * n_prompt + tokens[n_prompt:]) for tokens, n_prompt in cut]
        labels = pad_sequence(due, batch_first=True, padding_value=IGNORED)
        made.append({"input_ids": ids.to(device), "labels": labels.to(device)})
    return made


def loaded_model(model: Path, device: str, dtype: str = "auto") -> tuple[Any, Any]:
    """Return a causal language model in eval mode, and its tokenizer.

    The dtype "auto" is that of its files.
    """
    asked = f"load '{model}'"
    if not model.exists():
        raise CheckpointError(asked, "there is no such file or folder", "Check the path")
    try:
        from transformers import AutoModelForCausalLM, AutoTokenizer
    except ImportError:
        remedy = "Run pip install transformers accelerate"
        raise CheckpointError(asked, "transformers is not installed", remedy) from None
    try:
        base: Any = AutoModelForCausalLM.from_pretrained(model, dtype=dtype)
        # Of a folder without one transformers 5 makes an empty one, 4 fails in other words.
        if model.is_dir() and not any(TOKENIZER_FILE.search(path.name) for path in model.iterdir()):
            remedy = "Save the tokenizer beside the model: tokenizer.save_pretrained(FOLDER)"
            raise CheckpointError(asked, "it has no tokenizer", remedy)
        tokenizer = AutoTokenizer.from_pretrained(model)
    except (OSError, ValueError, RuntimeError) as error:
        problem = " ".join(str(error).split())[:300].rstrip(".")
        remedy = "Give the folder of a causal language model with its tokenizer"
        raise CheckpointError(asked, problem, remedy) from error
    return base.to(device).eval(), tokenizer
