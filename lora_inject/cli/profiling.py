"""`profile`: how often each expert of a model is chosen on your data."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from lora_inject.cli import given
from lora_inject.cli.program import app
from lora_inject.cli.searching import encoded_rows, loaded_model, rows_of_file
from lora_inject.cli.show import note, say

SHARES = (0.25, 0.5)


@app.command("profile")
def profile_command(
    model: Annotated[
        Path, typer.Argument(metavar="MODEL", help="Folder or name of a causal language model.")
    ],
    *,
    data: Annotated[
        Path, typer.Option(help="Rows: .jsonl with text, or prompt and completion; or text.")
    ],
    output: Annotated[
        Path, typer.Option("--output", "-o", dir_okay=False, help="The profile, a YAML file.")
    ],
    length: Annotated[int, typer.Option(min=2, help="Tokens of a row, at most.")] = 512,
    device: Annotated[str, typer.Option(help="Where to run.")] = "cpu",
) -> None:
    """Count how often each expert of MODEL is chosen on your data, for only: and top: of a rule.

    Each row runs alone, so no padding is counted. Prints a line of bars for each stack.
    """
    import torch

    from lora_inject.experts.profile import profile_experts

    rows = rows_of_file(data)
    base, tokenizer = loaded_model(given.model_folder(model), device)
    tokens = [ids for ids, _ in encoded_rows(tokenizer, rows, length)]
    batches = ({"input_ids": torch.tensor([ids], device=device)} for ids in tokens)
    profile = profile_experts(base, batches)
    say(profile.picture())
    for share in SHARES:
        say(
            f"top: {share:g} of each stack gets {100 * profile.covered(share):.0f} % of the choices"
        )
    note(f"wrote {profile.write(output)}")
