"""The command that asks a server: `verify-served`."""

from __future__ import annotations

from typing import Annotated

from typer import Argument, Exit, Option

from lora_inject.cli import options
from lora_inject.formats.pairs import DTYPES
from lora_inject.serving import verifying


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
