"""`doctor`: what this environment has."""

from __future__ import annotations

from typing import Annotated

from typer import Option

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
