"""The program itself: the order of its commands, its help, its exit codes.

Exit codes are part of the interface. 0: done. 1: refused, with the message of the error and no
traceback. 2: wrong usage. 130: interrupted. A traceback is a defect of this package.
"""

from __future__ import annotations

import gc
import inspect
import logging
import os
import re
import sys
import warnings
from collections.abc import Callable, Iterable
from dataclasses import fields, is_dataclass
from types import MappingProxyType
from typing import Annotated, Any, NoReturn, TypeVar, get_args

import typer
from typer.core import TyperArgument, TyperCommand, TyperGroup

from lora_inject.cli.show import BAD, not_one_of, note, say
from lora_inject.errors import LoraInjectError
from lora_inject.version import __version__

EXAMPLES = MappingProxyType(
    {
        "plan": "lora-inject plan lora.yaml gpt2/config.json",
        "advise": "lora-inject advise gpt2 --budget 170k",
        "search": "lora-inject search gpt2 space.yaml --data rows.jsonl --output found",
        "profile": "lora-inject profile olmoe --data rows.jsonl --output profile.yaml",
        "inspect": "lora-inject inspect sql-adapter",
        "analyze": "lora-inject analyze sql-adapter --base gpt2 --report report.html",
        "merge": "lora-inject merge gpt2 sql-adapter --output merged --verify",
        "verify": "lora-inject verify gpt2 sql-adapter merged",
        "convert": "lora-inject convert sql-adapter served --to portable --dtype float16",
        "check": "lora-inject check sql-adapter --for vllm --base gpt2",
        "combine": "lora-inject combine sql style --output both --weight 0.7 --weight 0.3",
        "truncate": "lora-inject truncate sql-adapter --output small --energy 0.99",
        "diff": "lora-inject diff sql-adapter small",
        "rename": "lora-inject rename sql-adapter transformer=model.decoder --output renamed",
        "extract": "lora-inject extract gpt2 gpt2-tuned --rank 16 --output adapter",
        "schema": "lora-inject schema > schema.json",
        "prove": "lora-inject prove sql-adapter --base gpt2 --probe 'SELECT name FROM users'",
        "verify-served": "lora-inject verify-served http://localhost:8000 sql-adapter --model sql",
        "doctor": "lora-inject doctor --json > environment.json",
    }
)
"""An example of every command, in the order in which the help lists them."""
EXIT_CODES = "Exit codes: 0 done, 1 refused, 2 wrong usage, 130 interrupted."
LIMITS = re.compile(r"(?:([\d.]+)<=)?x[<>]=([\d.]+)")
F = TypeVar("F", bound=Callable[..., Any])
VALUES = MappingProxyType(
    {"path": "PATH", "dir": "PATH", "str": "TEXT", "float": "NUMBER", "int": "N"}
)


class _Command(TyperCommand):
    """A command whose help has an example, the exit codes, and no types of Python."""

    def invoke(self, ctx: Any) -> Any:
        """Run the command; with click 8.3, typer before 0.18 passes a missing argument as None."""
        params: list[Any] = self.params
        for param in params:
            if param.required and ctx.params.get(param.name) is None:
                ctx.fail(f"Missing {param.param_type_name} {param.get_error_hint(ctx)}.")
        return super().invoke(ctx)

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Read the arguments; a value that is wrong is said in one wording, whatever the typer."""
        try:
            return super().parse_args(ctx, args)
        except typer.BadParameter as error:
            error.message = _wrong_value(error, ctx)
            raise

    def collect_usage_pieces(self, ctx: Any) -> list[str]:
        """Return the arguments without braces and double dots."""
        pieces = super().collect_usage_pieces(ctx)
        return [re.sub(r"[{}]", "", piece).replace("......", "...") for piece in pieces]

    def format_options(self, ctx: Any, formatter: Any) -> None:
        """Write arguments and options."""
        records: dict[str, list[tuple[str, str]]] = {"Arguments": [], "Options": []}
        for param in self.get_params(ctx):
            record = param.get_help_record(ctx)
            if record is None:
                continue
            if isinstance(param, TyperArgument):
                name = record[0].split()[0]
                records["Arguments"].append((name, record[1].replace("  [required]", "")))
            else:
                option = re.sub(r"<([^>]*)>", _value, record[0])
                text = re.sub(r"  [\[(](.*?)[\])]", r" (\1)", LIMITS.sub(_limits, record[1]))
                records["Options"].append((option, text))
        for title, rows in records.items():
            if rows:
                with formatter.section(title):
                    formatter.write_dl(rows)

    def format_epilog(self, ctx: Any, formatter: Any) -> None:
        """Write the example and the exit codes."""
        del ctx
        if example := EXAMPLES.get(self.name or ""):
            formatter.write(f"\nExample:\n  {example}\n")
        formatter.write(f"\n{EXIT_CODES}\n")


def _value(kind: re.Match[str]) -> str:
    """Return how the help writes a value: `<list[float]>` as NUMBER, choices as they are."""
    name = kind[1].removeprefix("list[").removesuffix("]").split(" ")[0]
    return VALUES.get(name.lower(), name)


def _wrong_value(error: typer.BadParameter, ctx: Any) -> str:
    """Return what is wrong with a value, in place of what typer, click or pydantic say."""
    message = error.message.removeprefix("Value error, ")
    if choices := re.fullmatch(r"'(.*)' is not one of (.*?)\.?", message):
        return not_one_of(choices[1], re.findall(r"'([^']+)'", choices[2]))
    if not re.search(r"^Input should|not a valid|not in the range", message):
        return error.message
    record: Any = error.param and error.param.get_help_record(ctx)  # type: ignore[arg-type]
    kind, text = record or ("", "")
    number = "a whole number" if re.search(r"\bint", kind, re.IGNORECASE) else "a number"
    bounds = LIMITS.search(text)
    return f"give {number}, {_limits(bounds)}" if bounds else f"give {number}"


def _limits(bounds: re.Match[str]) -> str:
    """Return how the help writes limits: `0<=x<=1` as `0 to 1`, `x>=1` as `at least 1`."""
    low, high = bounds.groups()
    return f"{low} to {high}" if low else f"at least {high}"


class _Commands(TyperGroup):
    """Turns the errors of this package into a message and an exit code."""

    def list_commands(self, ctx: Any) -> list[str]:
        """Return the commands in the order of the help."""
        del ctx
        return [name for name in EXAMPLES if name in self.commands]

    def format_commands(self, ctx: Any, formatter: Any) -> None:
        """Write each command with its first sentence, whole."""
        names = self.list_commands(ctx)
        rows = [(name, self.commands[name].get_short_help_str(limit=999)) for name in names]
        with formatter.section("Commands"):
            formatter.write_dl(rows)

    def format_epilog(self, ctx: Any, formatter: Any) -> None:
        """Write the exit codes."""
        del ctx
        formatter.write(f"\n{EXIT_CODES}\n")

    def invoke(self, ctx: Any) -> Any:
        """Run a command."""
        try:
            return super().invoke(ctx)
        except LoraInjectError as error:
            command = self.commands.get(ctx.invoked_subcommand or "")
            options = [opt for param in command.params for opt in param.opts] if command else []
            note(f"Error: {in_options(str(error), options)}", color=BAD)  # as of wrong usage
            raise typer.Exit(1) from None
        except KeyboardInterrupt as error:
            note(". ".join(["interrupted", *getattr(error, "__notes__", ())]))
            raise typer.Exit(130) from None
        except OSError as error:
            from lora_inject.core.spec.words import system_words

            place = f"'{error.filename}'" if error.filename else "the output"
            remedy = "Check the path and the disk, and run again"
            note(f"Error: read or write {place}: {system_words(error)}. {remedy}.", color=BAD)
            raise typer.Exit(1) from None


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
        return " ".join(f"{opt} {each}" for each in values)

    return re.sub(rf"\b(\w+)={value}(?: \((--[\w-]+)\))?", option, message)


class _Program(typer.Typer):
    """The program: commands with the help above, which may share options."""

    def command(self, name: str | None = None, **options: Any) -> Callable[[F], F]:
        """Register a command; the fields of a dataclass parameter become options."""
        register = super().command

        def registered(run: F) -> F:
            register(name or run.__name__, cls=_Command, **options)(_with_fields(run))
            return run

        return registered


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
        for name, group in groups.items():
            given[name] = group(**{f.name: given.pop(f.name) for f in fields(group)})
        return run(**given)

    command.__name__, command.__doc__ = run.__name__, run.__doc__
    command.__signature__ = inspect.Signature(  # type: ignore[attr-defined]
        [parameter.replace(kind=parameter.KEYWORD_ONLY) for parameter in taken]
    )
    return command


app = _Program(
    cls=_Commands,
    name="lora-inject",
    help="Plan, inspect, convert and combine LoRA adapters, and merge them into checkpoints.",
    invoke_without_command=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _version(wanted: bool) -> None:
    if wanted:
        say(f"lora-inject {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    ctx: typer.Context,
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    del version  # its callback has answered
    if ctx.invoked_subcommand is None:
        say(ctx.get_help())
        raise typer.Exit(2)


def main() -> None:
    """Run the command line and exit."""
    # Importing torch makes 250,000 objects that stay: collecting garbage meanwhile costs 0.15 s.
    gc.set_threshold(400_000)
    # Torch says so when it is imported; no command needs numpy.
    warnings.filterwarnings("ignore", "Failed to initialize NumPy")
    # transformers imports each quantizer that is installed, and they log what they lack on a CPU.
    for library in ("torchao", "bitsandbytes", "torch.utils._pytree"):
        logging.getLogger(library).setLevel(logging.ERROR)
    try:
        app(prog_name="lora-inject")
    except SystemExit as left:
        _leave(left.code if isinstance(left.code, int) else 0)


def _leave(code: int) -> NoReturn:
    """Exit without torch's normal shutdown, which costs each command 0.3 s."""
    for stream in (sys.stdout, sys.stderr):
        try:
            if stream is not None:  # closed by the parent process
                stream.flush()
        except BrokenPipeError:  # the reader of our output has closed it
            pass
        except OSError:
            code = code or 1
    os._exit(code)
