"""Rows of text for `lora-inject search`: files to batches of a causal language model."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lora_inject.errors import ConfigError

IGNORED = -100  # the label that cross entropy leaves out
Row = tuple[str, str]
Tokens = tuple[list[int], int]


def read_rows(path: Path) -> list[Row]:
    """Read prompt and completion of each row.

    Each line of a `.jsonl` file is `{"text": ...}` or `{"prompt": ..., "completion": ...}`. Each
    line of any other file is a text.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, ValueError) as error:
        found = getattr(error, "strerror", None) or str(error)
        raise ConfigError(f"data '{path}'", found, "Give a file of UTF-8 text") from None
    filled = [(number, line) for number, line in enumerate(lines, 1) if line.strip()]
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
        raise ConfigError(asked, f"its keys are {sorted(row)}", remedy)
    return prompt, completion


def encode(tokenizer: Any, rows: Sequence[Row], most: int) -> list[Tokens]:
    """Return each row's first `most` tokens and its prompt's count; skip rows without more."""
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    found = []
    for prompt, completion in rows:
        start = tokenizer.encode(prompt) if prompt else []
        rest = tokenizer.encode(completion, add_special_tokens=not prompt)
        tokens = (start + rest + end)[:most]
        if len(tokens) > max(len(start), 1):
            found.append((tokens, len(start)))
    return found


def split(rows: Sequence[Row], n: int, seed: int) -> tuple[list[Row], list[Row]]:
    """Hold out a tenth of the rows, but at least one batch of `n`; the seed draws them."""
    mixed = random.Random(seed).sample(list(rows), len(rows))  # noqa: S311  (no secrets)
    held_out = max(n, len(rows) // 10)
    return mixed[held_out:], mixed[:held_out]


def batches(rows: Sequence[Tokens], n: int, path: Path, device: str) -> list[dict[str, Any]]:
    """Cut rows into batches of `n`, padded on the right, which no earlier token attends to."""
    import torch

    if len(rows) < n:
        found = f"it has {len(rows)} rows, and a batch takes {n}"
        raise ConfigError(f"data '{path}'", found, "Give more rows, or a smaller --batch")
    made = []
    for start in range(0, len(rows) - n + 1, n):
        cut = rows[start : start + n]
        ids = torch.zeros(n, max(len(tokens) for tokens, _ in cut), dtype=torch.long)
        labels = torch.full_like(ids, IGNORED)
        for i, (tokens, n_prompt) in enumerate(cut):
            ids[i, : len(tokens)] = torch.tensor(tokens)
            labels[i, n_prompt : len(tokens)] = ids[i, n_prompt : len(tokens)]
        made.append({"input_ids": ids.to(device), "labels": labels.to(device)})
    return made
