"""`search`: the trials of a space on a causal language model, with a live table."""

from __future__ import annotations

import json
import random
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Annotated, Any

import typer

from lora_inject.cli import given
from lora_inject.cli.program import app
from lora_inject.cli.show import is_live, note, print_rows, say
from lora_inject.core.spec.names import counted
from lora_inject.errors import CheckpointError, ConfigError, FormatError

if TYPE_CHECKING:
    from lora_inject.trials.search import Search

RESULTS = ("config.yaml", "adapter", "search.html")
BARS = "▁▂▃▄▅▆▇█"
CURVE = 24  # characters
RECENT = 8  # steps over which the loss in the table is averaged
IGNORED = -100  # the label that cross entropy leaves out
TOKENIZER_FILE = re.compile(r"token|vocab|\.(model|spm|bpe)$")
Row = tuple[str, str]
Tokens = tuple[list[int], int]


@app.command("search")
def search_command(
    model: Annotated[
        str, typer.Argument(metavar="MODEL", help="Folder or name of a causal language model.")
    ],
    space: Annotated[Path, typer.Argument(metavar="SPACE", help="What to try, a YAML file.")],
    *,
    data: Annotated[
        Path,
        typer.Option(help="Rows to train on: .jsonl with text, or prompt and completion; or text."),
    ],
    held_out: Annotated[
        Path | None, typer.Option(help="Rows to judge by. (default: a tenth of --data)")
    ] = None,
    output: Annotated[
        Path,
        typer.Option(
            "--output", "-o", file_okay=False, help="Folder of the results and of what is saved."
        ),
    ],
    batch: Annotated[int, typer.Option(min=1, help="Rows of a step.")] = 8,
    length: Annotated[int, typer.Option(min=2, help="Tokens of a row, at most.")] = 128,
    device: Annotated[str, typer.Option(help="Where to run.")] = "cpu",
    seed: Annotated[
        int | None, typer.Option(min=0, help="Seed of draws, A and batches. (default: of SPACE)")
    ] = None,
    printing: given.Output,
) -> None:
    """Find config and learning rate of SPACE for MODEL and your data.

    Writes config.yaml, the adapter and search.html. After Ctrl-C the same command goes on.
    """
    from lora_inject.analysis.report.search_page import search_report
    from lora_inject.analysis.report.write_page import template, write_report
    from lora_inject.formats.exchange import write_adapter
    from lora_inject.trials.search import search as run
    from lora_inject.trials.space import Space

    template("search.html.j2")  # raises if a package is missing
    wanted = Space.from_yaml(space)
    if seed is not None:
        wanted = wanted.model_copy(update={"seed": seed})
    _check(output, device)
    rows = rows_of_file(data)
    judged = [] if held_out is None else rows_of_file(held_out)
    if held_out is None:
        rows, judged = _split(rows, batch, data, wanted.seed)
    base, tokenizer = loaded_model(given.model_folder(Path(model)), device)
    parts = []
    for path, part in ((data, rows), (held_out or data, judged)):
        encoded = encoded_rows(tokenizer, part, length)
        if len(encoded) < len(part):
            note(f"'{path}': {len(part) - len(encoded)} rows have no completion within --length")
        parts.append(_batches(encoded, batch, path, device))
    with _live() as watch:
        result = run(base, wanted, *parts, folder=output, watch=watch)
    (output / "config.yaml").write_text(result.to_yaml(), encoding="utf-8")
    assert result.adapter is not None
    write_adapter(result.adapter, output / "adapter", format="peft", overwrite=True)
    write_report(output / "search.html", search_report(result, f"Search on {model}"))
    printing.show(result.to_dict(), _print_result, result)
    for name in RESULTS:
        note(f"wrote {output / name}")


def _print_result(search: Search) -> None:
    from lora_inject.analysis.report.search_page import trial_rows

    print_rows(trial_rows(search), everything=True)
    say(f"best: {search.best}; {search.seconds:.0f} s of training")


def _check(output: Path, device: str) -> None:
    """Refuse a device that does not work, and a folder with files that results would replace."""
    import torch

    try:
        torch.ones(1, device=device).item()
    except (RuntimeError, AssertionError) as error:
        problem = f"{device!r} does not work here: {str(error).splitlines()[0]}"
        raise typer.BadParameter(problem, param_hint="--device") from None
    if not (output / "search.json").exists():
        for name in RESULTS:
            if (output / name).exists():
                problem = f"it has '{name}', which is not of a search"
                raise FormatError(f"write to '{output}'", problem, "Give another --output")


def rows_of_file(path: Path) -> list[Row]:
    """Read prompt and completion of each row.

    Each line of a `.jsonl` file is `{"text": ...}` or `{"prompt": ..., "completion": ...}`. Each
    line of any other file is a text.
    """
    try:
        text = path.read_bytes().decode("utf-8")
    except (OSError, ValueError) as error:
        from lora_inject.core.spec.words import system_words

        problem = system_words(error) if isinstance(error, OSError) else str(error)
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


def encoded_rows(tokenizer: Any, rows: Sequence[Row], most: int) -> list[Tokens]:
    """Return each row's first `most` tokens and its prompt's count; skip rows without more."""
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    examples = []
    for prompt, completion in rows:
        start = tokenizer.encode(prompt) if prompt else []
        rest = tokenizer.encode(completion, add_special_tokens=not prompt)
        tokens = (start + rest + end)[:most]
        if len(tokens) > max(len(start), 1):
            examples.append((tokens, len(start)))
    return examples


def _split(rows: Sequence[Row], n: int, path: Path, seed: int) -> tuple[list[Row], list[Row]]:
    """Hold out a tenth of the rows, but at least one batch of `n`; the seed draws them."""
    if len(rows) < 2 * n:
        problem = f"it has {counted(len(rows), 'row')}, and two batches take {2 * n}, one held out"
        raise ConfigError(f"data '{path}'", problem, "Give more rows, or a smaller --batch")
    mixed = random.Random(seed).sample(list(rows), len(rows))  # noqa: S311  (no secrets)
    held_out = max(n, len(rows) // 10)
    return mixed[held_out:], mixed[:held_out]


def _batches(rows: Sequence[Tokens], n: int, path: Path, device: str) -> list[dict[str, Any]]:
    """Cut rows into batches of `n`, padded on the right, which no earlier token attends to."""
    import torch

    if len(rows) < n:
        problem = f"it has {counted(len(rows), 'row')}, and a batch takes {n}"
        raise ConfigError(f"data '{path}'", problem, "Give more rows, or a smaller --batch")
    if rest := len(rows) % n:
        note(f"'{path}': the last {counted(rest, 'row')} are left out, as a batch takes {n}")
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
        _check_tokenizer(model, asked)
        tokenizer = AutoTokenizer.from_pretrained(model)
    except (OSError, ValueError, RuntimeError) as error:
        problem = " ".join(str(error).split())[:300].rstrip(".")
        remedy = "Give the folder of a causal language model with its tokenizer"
        raise CheckpointError(asked, problem, remedy) from error
    return base.to(device).eval(), tokenizer


def _check_tokenizer(model: Path, asked: str) -> None:
    """Refuse a folder without one: transformers 5 makes an empty one, 4 fails in other words."""
    if model.is_dir() and not any(TOKENIZER_FILE.search(path.name) for path in model.iterdir()):
        remedy = "Save the tokenizer beside the model: tokenizer.save_pretrained(FOLDER)"
        raise CheckpointError(asked, "it has no tokenizer", remedy)


@contextmanager
def _live() -> Iterator[Callable[[Search], None]]:
    """Show a live table if stderr is a terminal; else print a line for each rung."""
    if not is_live():
        yield _line
        return
    from rich.console import Console
    from rich.live import Live

    with Live(console=Console(stderr=True), transient=True, refresh_per_second=4) as live:
        yield lambda search: live.update(table(search))


def _line(search: Search) -> None:
    rung = search.rungs[-1]
    if max(map(len, rung.losses.values())) == 1:
        size, steps = search.plan[len(search.rungs) - 1]
        note(f"rung {len(search.rungs)} of {len(search.plan)}: {size} trials, {steps} steps")


def table(search: Search) -> Any:
    """Return the running rung as a table of rich: losses, curves, and earlier held-out losses."""
    from rich.table import Table

    rung, n = search.rungs[-1], len(search.rungs)
    step = max(map(len, rung.losses.values()), default=0)
    title = f"rung {n} of {len(search.plan)}, step {step} of {rung.steps}, {search.seconds:.0f} s"
    shown = Table("trial", "parameters", "loss", "curve", title=title)
    for i in range(n - 1):
        shown.add_column(f"held out, rung {i + 1}", justify="right")
    recent = {name: fmean(v[-RECENT:]) for name, v in rung.losses.items() if v}
    for name in sorted(recent, key=recent.__getitem__):
        before = (f"{fmean(r.held_out[name]):.4f}" for r in search.rungs[:-1])
        loss = "stopped" if name in rung.stopped else f"{recent[name]:.4f}"
        count = f"{search.candidates[name].parameters:,}"
        shown.add_row(name, count, loss, curve(rung.losses[name], rung.steps), *before)
    return shown


def curve(losses: list[float], steps: int) -> str:
    """Return losses as a line of bars; its length is the share of the steps that is done.

    Examples:
        >>> curve([4.0, 3.0, 2.0, 1.0], 48)
        '█▁'
    """
    width = min(len(losses), max(1, round(CURVE * len(losses) / steps)))
    ends = [i * len(losses) // width for i in range(width + 1)]
    means = [fmean(losses[start:end]) for start, end in pairwise(ends)]
    low, high = min(means), max(means)
    span = (high - low) or 1.0
    return "".join(BARS[round((mean - low) / span * (len(BARS) - 1))] for mean in means)
