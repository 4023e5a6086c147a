"""Commands on what runs: `doctor` on this environment, `verify-served` on a server."""

from __future__ import annotations

from typing import Annotated

from typer import Argument, Exit, Option

from lora_inject.cli import given, show
from lora_inject.cli.program import app


@app.command("doctor")
def doctor_command(
    *,
    imports: Annotated[
        bool, Option(help="Import each package too (seconds), and say which cannot be imported.")
    ] = False,
    output: given.Output,
) -> None:
    """List what this environment has and what it lacks.

    Packages and features by name and version, for an issue. Nothing is sent anywhere.
    """
    from lora_inject.serving.doctor import diagnose, in_words

    diagnosis = diagnose(imports=imports)
    output.show(diagnosis.to_dict(), show.say, "\n".join(in_words(diagnosis)))


@app.command("verify-served")
def verify_served_command(
    url: Annotated[
        str, Argument(metavar="URL", help="Of the server, such as http://localhost:8000.")
    ],
    adapter: given.AdapterPath,
    *,
    model: Annotated[
        str | None,
        Option(help="Name to ask for. (default: the only one, or as ADAPTER is called)"),
    ] = None,
    dtype: Annotated[
        str | None,
        Option(
            help="Dtype that the server computes in. (default: the one ADAPTER was saved in)",
            callback=given.one_of(given.DTYPES),
        ),
    ] = None,
    timeout: Annotated[float, Option(min=0.1, help="Seconds for each answer.")] = 60.0,
    output: given.Output,
) -> None:
    """Say whether the server at URL computes with ADAPTER.

    By log-probabilities of the completions interface, which vLLM, SGLang and llama.cpp have.
    ADAPTER was saved with probe=. The exit code is 1 unless it is there as it was saved.
    """
    from lora_inject.serving.verifying import verify_served

    verdict = verify_served(url, adapter, model=model, dtype=dtype, timeout=timeout)
    output.show(verdict.to_dict(), show.say_words, str(verdict))
    if not verdict.ok:
        raise Exit(1)
