"""The program: its commands, each from a module that is imported when it runs; its exit codes.

Exit codes are part of the interface. 0: done. 1: refused, with the message of the error and no
traceback. 2: wrong usage. 130: interrupted. A traceback is a defect of this package.
"""

from __future__ import annotations

import inspect
import logging
import os
import re
import sys
import warnings
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import fields, is_dataclass
from importlib import import_module
from pathlib import Path
from types import MappingProxyType
from typing import Annotated, Any, NamedTuple, get_args

import typer
from typer.core import TyperGroup

from lora_inject.cli.show import note, say
from lora_inject.errors import LoraInjectError
from lora_inject.version import __version__

EXIT_CODES = "Exit codes: 0 done, 1 refused, 2 wrong usage, 130 interrupted."
STYLE: Any = {"rich_markup_mode": None, "pretty_exceptions_enable": False}


class Command(NamedTuple):
    """Where a command is and what its help says first; what more it says is its docstring."""

    module: str
    about: str
    example: str


COMMANDS = MappingProxyType(
    {
        "plan": Command(
            "look",
            "List the layers of MODEL that CONFIG selects.",
            "plan lora.yaml gpt2/config.json",
        ),
        "inspect": Command(
            "look",
            "Show the sites, ranks, norms and non-finite values of ADAPTER.",
            "inspect sql-adapter",
        ),
        "analyze": Command(
            "look",
            "Show what ADAPTER has learned: spectra, the rank that it needed.",
            "analyze sql-adapter --base gpt2 --report report.html",
        ),
        "merge": Command(
            "checkpoints",
            "Fold each ADAPTER into the checkpoint BASE, without the model.",
            "merge gpt2 sql-adapter --output merged --verify",
        ),
        "verify": Command(
            "checkpoints",
            "Check that MERGED is what merging ADAPTER into BASE would write.",
            "verify gpt2 sql-adapter merged",
        ),
        "convert": Command(
            "adapters",
            "Write ADAPTER in the format of another program.",
            "convert sql-adapter served --to portable --dtype float16",
        ),
        "check": Command(
            "adapters",
            "List what a program would refuse or misread in ADAPTER.",
            "check sql-adapter --for vllm --base gpt2",
        ),
        "combine": Command(
            "adapters",
            "Combine several adapters of one base into one.",
            "combine sql style --output both --weight 0.7 --weight 0.3",
        ),
        "truncate": Command(
            "adapters",
            "Cut ADAPTER to its best approximation of a lower rank.",
            "truncate sql-adapter --output small --energy 0.99",
        ),
        "diff": Command(
            "adapters",
            "Compare the adapters ONE and TWO, site by site.",
            "diff sql-adapter small",
        ),
        "rename": Command(
            "adapters",
            "Write ADAPTER with other names of its layers.",
            "rename sql-adapter transformer=model.decoder --output renamed",
        ),
        "extract": Command(
            "checkpoints",
            "Store the difference of TUNED and BASE as a low-rank adapter.",
            "extract gpt2 gpt2-tuned --rank 16 --output adapter",
        ),
        "schema": Command(
            "look", "Print the JSON Schema of a config, for editors.", "schema > schema.json"
        ),
        "verify-served": Command(
            "servers",
            "Say whether the server at URL computes with ADAPTER.",
            "verify-served http://localhost:8000 sql-adapter --model sql",
        ),
        "doctor": Command(
            "doctor",
            "Print the system and the versions of packages, for an issue.",
            "doctor --json > environment.json",
        ),
    }
)
"""The commands in the order of the help."""


class _Commands(TyperGroup):
    """Imports a command when it is asked for, and turns our errors into an exit code."""

    def list_commands(self, ctx: Any) -> list[str]:
        """Return the commands in the order of the help."""
        del ctx
        return [*COMMANDS]

    def get_command(self, ctx: Any, name: str) -> Any:
        """Return a command: the function of its name, whose docstring is the rest of its help."""
        del ctx
        if name not in COMMANDS:
            return None
        module, about, example = COMMANDS[name]
        run = getattr(import_module(f"lora_inject.cli.{module}"), name.replace("-", "_"))
        one = typer.Typer(add_completion=False, **STYLE)
        one.command(
            name,
            help=f"{about}\n\n{inspect.getdoc(run) or ''}",
            epilog=f"\b\nExample:\n  lora-inject {example}\n\n{EXIT_CODES}",
        )(_with_fields(run))
        return typer.main.get_command(one)

    def format_commands(self, ctx: Any, formatter: Any) -> None:
        """Write each command with its first sentence, whole."""
        del ctx
        with formatter.section("Commands"):
            formatter.write_dl([(name, command.about) for name, command in COMMANDS.items()])

    def invoke(self, ctx: Any) -> Any:
        """Run a command."""
        try:
            return super().invoke(ctx)
        except LoraInjectError as error:
            command = self.get_command(ctx, ctx.invoked_subcommand)
            options = [option for param in command.params for option in param.opts]
            error.args = (*error.args[:2], in_options(error.remedy, options))
            error.remedy = error.args[2]
            note(f"Error: {error}")  # as of wrong usage
            raise typer.Exit(1) from None
        except KeyboardInterrupt as error:
            note(". ".join(["interrupted", *getattr(error, "__notes__", ())]))
            raise typer.Exit(130) from None
        except OSError as error:
            place = f"'{error.filename}'" if error.filename else "the output"
            remedy = "Check the path and the disk, and run again"
            note(f"Error: read or write {place}: {error.strerror or error}. {remedy}.")
            raise typer.Exit(1) from None


_EMPTY = "''"  # as a shell has it


def in_options(message: str, options: Iterable[str]) -> str:
    """Return a message of the package in the words of the command line, with its options.

    What begins with "(in Python," is for those who call the function, and is left out.

    Examples:
        >>> in_options("Convert it with its base (in Python, pass config=).", [])
        'Convert it with its base.'
        >>> in_options("pass allow=['x', 'y'], any_base=True or a=1", ["--allow", "--any-base"])
        'pass --allow x --allow y, --any-base or a=1'
        >>> in_options("pass component='unet' (--from-component)", [])
        'pass --from-component unet'
        >>> in_options('write format="peft"', ["--to"])  # of convert
        'write --to peft'
        >>> in_options("for a folder of this name, give ~/rank=8", ["--rank"])
        'for a folder of this name, give ~/rank=8'
    """
    message = re.sub(r" \(in Python, [^()]*\)", "", message)
    known = {opt[2:].replace("-", "_"): opt for opt in options if opt.startswith("--")}
    if "to" in known:
        known.setdefault("format", "--to")
    value = r"""(\[[^\]]*\]|"[^"]*"|'[^']*'|True|\.\.\.|[\w.]*\w)"""

    def option(match: re.Match[str]) -> str:
        opt, text = match[3] or known.get(match[1]), match[2]
        if opt is None:
            return match[0]
        if text in ("True", "..."):
            return opt
        values = re.findall(r"""['"]([^'"]*)['"]""", text) or [text]
        return " ".join(f"{opt} {each or _EMPTY}" for each in values)

    return re.sub(rf"(?<![^\s(])(\w+)={value}(?: \((--[\w-]+)\))?", option, message)


def _with_fields(run: Callable[..., Any]) -> Callable[..., Any]:
    """Return a command with one option for each field of its dataclass parameters.

    A flag has one name: `--overwrite`, without `--no-overwrite`.
    """
    groups, taken = dict[str, Any](), list[inspect.Parameter]()
    for parameter in inspect.signature(run, eval_str=True).parameters.values():
        group = parameter.annotation
        if isinstance(group, type) and is_dataclass(group):
            groups[parameter.name] = group
            taken += inspect.signature(group, eval_str=True).parameters.values()
        else:
            taken.append(parameter)
    for parameter in taken:
        kind, option = get_args(parameter.annotation)
        if kind is bool and option.default is ...:  # typer keeps a name that is given here
            option.param_decls = (f"--{parameter.name.replace('_', '-')}",)

    def command(**given: Any) -> Any:
        output = given.get("output")
        before = _inode(output)
        for name, group in groups.items():
            given[name] = group(**{f.name: given.pop(f.name) for f in fields(group)})
        try:
            return run(**given)
        except KeyboardInterrupt as error:  # an output gets its name when it is whole
            if _inode(output) not in (None, before):
                error.add_note(f"'{output}' is complete.")
            raise

    command.__signature__ = inspect.Signature(  # type: ignore[attr-defined]
        [parameter.replace(kind=parameter.KEYWORD_ONLY) for parameter in taken]
    )
    return command


def _inode(path: Path | None) -> int | None:
    """Return by what a file or a folder differs from the one that it replaces."""
    return path.stat().st_ino if path is not None and path.exists() else None


app = typer.Typer(
    cls=_Commands,
    name="lora-inject",
    help="Plan, inspect, convert and combine LoRA adapters, and merge them into checkpoints.",
    epilog=EXIT_CODES,
    no_args_is_help=True,
    context_settings={"help_option_names": ["-h", "--help"]},
    **STYLE,
)


def _version(wanted: bool) -> None:
    if wanted:
        say(f"lora-inject {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    del version  # its callback has answered


def main() -> None:
    """Run the command line and exit."""
    # Torch says so when it is imported; no command needs numpy.
    warnings.filterwarnings("ignore", "Failed to initialize NumPy")
    # transformers imports each quantizer that is installed, and they log what they lack on a CPU.
    for library in ("torchao", "bitsandbytes", "torch.utils._pytree"):
        logging.getLogger(library).setLevel(logging.ERROR)
    code: Any = 0
    try:
        app(prog_name="lora-inject")
    except SystemExit as left:
        code = left.code
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError, AttributeError):  # a full disk was told; its reader has closed it
            stream.flush()
    os._exit(code)  # torch's normal shutdown costs each command 0.3 s
