"""Proofs of behavior: `prove` stores one in an adapter, `verify-served` holds a server to it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from typer import Argument, BadParameter, Exit, Option

from lora_inject.cli import given, show
from lora_inject.cli.program import app
from lora_inject.core.spec.names import counted

if TYPE_CHECKING:
    from lora_inject.serving.storing import Stored


@app.command("prove")
def prove_command(
    adapter: given.AdapterPath,
    *,
    base: Annotated[
        Path, Option(help="Folder or name of ADAPTER's base, a causal language model.")
    ],
    probe: Annotated[
        list[str] | None,
        Option(metavar="TEXT", help="A short text on which ADAPTER acts; may be repeated."),
    ] = None,
    data: Annotated[
        Path | None,
        Option(help="Or rows: .jsonl with text, or prompt and completion; or text."),
    ] = None,
    dtype: Annotated[
        given.Dtype | None, Option(help="Dtype to compute in. (default: as the base's files)")
    ] = None,
    device: Annotated[str, Option(help="Where to run.")] = "cpu",
    reading: given.ReadOptions,
    output: given.Output,
) -> None:
    """Store in ADAPTER what it does to a few texts, for verify-served.

    The first 32 tokens of 8 texts are used. The tensors stay as they are, and other programs read
    ADAPTER as before.
    """
    from lora_inject.cli.searching import loaded_model
    from lora_inject.serving.storing import check_room, store_proof

    texts = _texts(probe, data)
    [how] = reading.options([adapter])
    check_room(adapter)
    model, tokenizer = loaded_model(given.model_folder(base), device, dtype or "auto")
    stored = store_proof(adapter, model, (texts, tokenizer), **how)
    output.show(stored.to_dict(), _print_stored, stored, adapter)


def _texts(probe: list[str] | None, data: Path | None) -> list[str]:
    """Return the texts that were given, by one of two options."""
    from lora_inject.cli.searching import rows_of_file

    if (probe is None) == (data is None):
        raise BadParameter("say on which texts: --probe TEXT, or --data FILE")
    if data is not None:
        return [prompt + completion for prompt, completion in rows_of_file(data)]
    for text in probe or ():
        if len(text) < 256 and Path(text).is_file():
            problem = f"'{text}' is a file, and a text is due; give its rows as --data {text}"
            raise BadParameter(problem, param_hint="--probe")
    return [*(probe or ())]


def _print_stored(stored: Stored, adapter: Path) -> None:
    proof = stored.proof
    show.say_words(
        f"stored: {len(proof.values[0]):,} log-probabilities of "
        f"{counted(len(proof.prompts), 'text')}, which the adapter moves by {proof.effect:.2g} "
        f"(rounding in {proof.dtype}: {proof.noise():.2g}), in '{stored.file}'"
    )
    if stored.replaced:
        show.note("it replaced a proof that was there")
    if not stored.knows_base:
        show.note("the file does not say on which base it was made: --base was taken for it")
    show.say(f"to verify: lora-inject verify-served URL {adapter}")


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
