"""Commands for adapter files of other programs: `convert`, `check`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from typer import Argument, BadParameter, Exit, Option

from lora_inject.cli import given, show
from lora_inject.cli.program import app

if TYPE_CHECKING:
    from lora_inject.formats.clients import Finding

Base = Annotated[
    Path | None,
    Option(help="Folder of the base, for names, heads and ties; config.json may be enough."),
]


@app.command()
def convert(
    adapter: given.AdapterPath,
    output: Annotated[Path, Argument(metavar="OUT", help="Where to write.")],
    *,
    to: Annotated[str, Option("--to", metavar="FORMAT", help="Format to write.")],
    base: Base = None,
    dtype: Annotated[
        str | None, Option(help="Dtype to write, such as float16. (default: as it is)")
    ] = None,
    rank: Annotated[
        int | None, Option(min=1, help="portable: one rank for all. (default: the largest)")
    ] = None,
    to_component: Annotated[
        str | None,
        Option(
            "--component", help="kohya, diffusers: the part of a pipeline, such as unet or te1."
        ),
    ] = None,
    overwrite: given.Overwrite = False,
    reading: given.Reading,
    out: given.Output,
) -> None:
    """Write ADAPTER in the format of another program.

    Prints what the format cannot express; refuses what would change the outputs.
    """
    from lora_inject.checkpoint.conversion import convert as converted
    from lora_inject.formats import FORMATS, options_of

    [how] = reading.options([adapter])
    options = {"dtype": dtype, "rank": rank, "component": to_component}
    chosen = {key: value for key, value in options.items() if value is not None}
    lost: list[str] = []
    for name in chosen:
        takers = [key for key, row in FORMATS.items() if name in options_of(row.write)]
        if to in FORMATS and to not in takers:
            found = f"the format {to!r} does not have it; these do: {', '.join(takers)}"
            raise BadParameter(found, param_hint=f"--{name}")
    if to in FORMATS and "component" in options_of(FORMATS[to].write) and to_component is None:
        found = f"a file of {to} has to name the part of a pipeline; give one, such as unet"
        raise BadParameter(found, param_hint="--component")

    def tell(words: str) -> None:
        lost.append(words)
        show.note(f"{to}: {words}")

    path = converted(
        adapter, output, to, base=base, reading=how, tell=tell, overwrite=overwrite, **chosen
    )
    data = {"output": str(path), "format": to, "lost": lost}
    out.show(data, show.say, f"wrote {path}")


@app.command()
def check(
    adapter: given.AdapterPath,
    client: Annotated[
        str,
        Option(
            "--for",
            metavar="PROGRAM",
            help="vllm, sglang, llama.cpp, lorax, diffusers, mlx, comfyui or peft.",
        ),
    ],
    base: Base = None,
    *,
    output: given.Output,
) -> None:
    """List what a program would refuse or misread in ADAPTER.

    Reads no values. The exit code is 1 if the program refuses the adapter, ignores a part of it or
    applies another scale.
    """
    from dataclasses import asdict

    from lora_inject.checkpoint.conversion import check_adapter

    found = check_adapter(adapter, client, base=base)
    stopped = any(finding.stops for finding in found)
    data = {"client": client, "accepted": not stopped, "findings": [*map(asdict, found)]}
    output.show(data, _print_findings, client, found, stopped)
    if stopped:
        raise Exit(1)


def _print_findings(client: str, found: Sequence[Finding], stopped: bool) -> None:
    show.say(f"{client}: {'does not take it as it is' if stopped else 'takes it'}")
    for finding in found:
        show.say_words(f"{'stop' if finding.stops else 'note'}: {finding.problem}. {finding.fix}.")
