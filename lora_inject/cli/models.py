"""Commands that run a model, or ask a server: `search`, `profile`, `verify-served`."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import torch
from typer import Argument, BadParameter, Exit, Option

from lora_inject.cli import data as rows_of
from lora_inject.cli import options
from lora_inject.cli.show import is_live, note, say, width
from lora_inject.errors import FormatError
from lora_inject.experts.profile import profile_experts
from lora_inject.formats.exchange import write_adapter
from lora_inject.formats.pairs import DTYPES
from lora_inject.serving import verifying
from lora_inject.trials.search import Search
from lora_inject.trials.search import search as searched
from lora_inject.trials.space import Space

RESULTS = ("config.yaml", "adapter")
SHARES = (0.25, 0.5)
ROWS = ".jsonl with text, or prompt and completion; or text."
MODEL = Argument(metavar="MODEL", help="Folder or name of a causal language model.")
Device = Annotated[str, Option(help="Where to run.")]


def search(
    model: Annotated[Path, MODEL],
    space: Annotated[Path, Argument(metavar="SPACE", help="What to try, a YAML file.")],
    *,
    data: Annotated[Path, Option(help=f"Rows to train on: {ROWS}")],
    held_out: Annotated[
        Path | None, Option(help="Rows to judge by. (default: a tenth of --data)")
    ] = None,
    folder: Annotated[  # not `output`, which would be whole once it is there
        Path,
        Option(
            "--output", "-o", file_okay=False, help="Folder of the results and of what is saved."
        ),
    ],
    batch: Annotated[int, Option(min=1, help="Rows of a step.")] = 8,
    length: Annotated[int, Option(min=2, help="Tokens of a row, at most.")] = 128,
    device: Device = "cpu",
    seed: Annotated[
        int | None, Option(min=0, help="Seed of draws, A and batches. (default: of SPACE)")
    ] = None,
    printing: options.Output,
) -> None:
    """Writes config.yaml and the adapter. After Ctrl-C the same command goes on."""
    wanted = Space.from_yaml(space)
    if seed is not None:
        wanted = wanted.model_copy(update={"seed": seed})
    _check(folder, device)
    rows = rows_of.rows_of_file(data)
    if held_out is None:
        rows, judged = rows_of.split(rows, batch, data, wanted.seed)
    else:
        judged = rows_of.rows_of_file(held_out)
    base, tokenizer = rows_of.loaded_model(options.model_folder(model), device)
    parts = [
        rows_of.batches(rows_of.encoded(tokenizer, part, length, path), batch, path, device)
        for path, part in ((data, rows), (held_out or data, judged))
    ]
    with _live() as watch:
        result = searched(base, wanted, *parts, folder=folder, watch=watch)
    (folder / "config.yaml").write_text(result.to_yaml(), encoding="utf-8")
    assert result.adapter is not None
    write_adapter(result.adapter, folder / "adapter", format="peft", overwrite=True)
    printing.show(result)
    for name in RESULTS:
        note(f"wrote {folder / name}")


def _check(output: Path, device: str) -> None:
    """Refuse a device that does not work, and a folder with files that results would replace."""
    try:
        torch.ones(1, device=device).item()
    except (RuntimeError, AssertionError) as error:
        problem = f"{device!r} does not work here: {str(error).splitlines()[0]}"
        raise BadParameter(problem, param_hint="--device") from None
    if not (output / "search.json").exists():
        for name in RESULTS:
            if (output / name).exists():
                problem = f"it has '{name}', which is not of a search"
                raise FormatError(f"write to '{output}'", problem, "Give another --output")


@contextmanager
def _live() -> Iterator[Callable[[Search], None]]:
    """Show a live table if stderr is a terminal; else print a line for each rung."""
    if not is_live():
        yield _line
        return
    from rich.console import Console
    from rich.live import Live
    from rich.text import Text

    with Live(console=Console(stderr=True), transient=True, refresh_per_second=4) as live:
        yield lambda search: live.update(Text(search.text(width())))


def _line(search: Search) -> None:
    rung = search.rungs[-1]
    if max(map(len, rung.losses.values())) == 1:
        size, steps = search.plan[len(search.rungs) - 1]
        note(f"rung {len(search.rungs)} of {len(search.plan)}: {size} trials, {steps} steps")


def profile(
    model: Annotated[Path, MODEL],
    *,
    data: Annotated[Path, Option(help=f"Rows: {ROWS}")],
    output: Annotated[
        Path, Option("--output", "-o", dir_okay=False, help="The profile, a YAML file.")
    ],
    length: Annotated[int, Option(min=2, help="Tokens of a row, at most.")] = 512,
    device: Device = "cpu",
) -> None:
    """Each row runs alone, so no padding is counted."""
    rows = rows_of.rows_of_file(data)
    base, tokenizer = rows_of.loaded_model(options.model_folder(model), device)
    tokens = rows_of.encoded(tokenizer, rows, length, data)
    inputs = ({"input_ids": torch.tensor([ids], device=device)} for ids, _ in tokens)
    counts = profile_experts(base, inputs)
    for share in SHARES:
        covered = 100 * counts.covered(share)
        say(f"top: {share:g} of each stack gets {covered:.0f} % of the choices")
    note(f"wrote {counts.write(output)}")


def verify_served(
    url: Annotated[
        str, Argument(metavar="URL", help="Of the server, such as http://localhost:8000.")
    ],
    adapter: options.AdapterPath,
    *,
    model: Annotated[
        str | None,
        Option(help="Name to ask for. (default: the only one, or as ADAPTER is called)"),
    ] = None,
    dtype: Annotated[
        str | None,
        Option(
            help="Dtype that the server computes in. (default: the one ADAPTER was saved in)",
            callback=options.one_of(DTYPES),
        ),
    ] = None,
    timeout: Annotated[float, Option(min=0.1, help="Seconds for each answer.")] = 60.0,
    output: options.Output,
) -> None:
    """By log-probabilities of the completions interface, which vLLM, SGLang and llama.cpp have.

    ADAPTER was saved with probe=. The exit code is 1 unless it is there as it was saved.
    """
    verdict = verifying.verify_served(url, adapter, model=model, dtype=dtype, timeout=timeout)
    output.show(verdict)
    if not verdict.ok:
        raise Exit(1)
