"""Commands on adapters alone: `combine`, `truncate`, `diff`, `rename`, `convert`, `check`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from typer import Argument, BadParameter, Exit, Option

from lora_inject.cli import given, show
from lora_inject.cli.program import app
from lora_inject.core.spec.names import templates
from lora_inject.core.spec.tables import Listing, span

if TYPE_CHECKING:
    from lora_inject.algebra.combine_files import Difference
    from lora_inject.core.adapter.state import AdapterState
    from lora_inject.formats.clients import Objection

WriteDtype = Annotated[given.Dtype | None, Option(help="Dtype to write. (default: the adapters')")]
Base = Annotated[
    Path | None,
    Option(help="Folder of the base, for names, heads and ties; config.json may be enough."),
]


@app.command("combine")
def combine_command(
    adapters: given.AdapterPaths,
    *,
    writing: given.Writing,
    weight: given.Weights = None,
    method: Annotated[
        str,
        Option(
            help="cat: the exact sum, ranks add up. svd: the sum cut to --rank. Or linear, ties, "
            "dare_linear, dare_ties, magnitude_prune on A and B, with _svd on the deltas.",
            callback=given.one_of(given.METHODS),
        ),
    ] = "cat",
    rank: Annotated[
        int | None, Option(min=1, help="svd, _svd: rank of each site. (default: the largest)")
    ] = None,
    density: Annotated[
        float | None, Option(min=0, max=1, help="Share of the values to keep.")
    ] = None,
    majority_sign: Annotated[
        str,
        Option(help="ties: total or frequency.", callback=given.one_of(("total", "frequency"))),
    ] = "total",
    seed: Annotated[int, Option(help="Seed of dare's masks.")] = 0,
    any_base: Annotated[
        bool,
        Option(help="Add what was trained after the first was merged, for the first one's base."),
    ] = False,
    dtype: WriteDtype = None,
    reading: given.ReadOptions,
    output: given.Output,
) -> None:
    """Combine several adapters of one base into one."""
    from lora_inject.algebra.combine_files import combine as combined

    how: dict[str, Any] = {"density": density, "majority_sign": majority_sign, "seed": seed}
    how["any_base"] = any_base
    weights = weight and given.weights_for(adapters, weight)
    states = reading.read(adapters)
    _write(combined(states, weights, method=method, rank=rank, **how), writing, output, dtype)


@app.command("truncate")
def truncate_command(
    adapter: given.AdapterPath,
    *,
    writing: given.Writing,
    keeping: given.Keeping,
    dtype: WriteDtype = None,
    reading: given.ReadOptions,
    listing: given.ListOutput,
) -> None:
    """Cut ADAPTER to its best approximation of a lower rank.

    The error of a site is |D - D_cut| / |D|, in Frobenius norm.
    """
    from lora_inject.algebra.combine_files import truncate as truncated

    [state] = reading.read([adapter])
    made, cuts = truncated(state, rank=keeping.rank, energy=keeping.energy)
    cells = tuple((name, cut.before, float(cut.rank), cut.error) for name, cut in cuts.items())
    rows = Listing(("site", "rank", "now", "error"), cells, {"now": span, "error": max})
    sites = {name: cut._asdict() for name, cut in cuts.items()}
    _write(made, writing, listing, dtype, partial(show.print_rows, rows), sites=sites)


@app.command("diff")
def diff_command(
    one: Annotated[Path, Argument(metavar="ONE", help="A PEFT folder or an adapter file.")],
    two: Annotated[Path, Argument(metavar="TWO", help="Another adapter of the same base.")],
    reading: given.ReadOptions,
    listing: given.ListOutput,
) -> None:
    """Compare the adapters ONE and TWO, site by site."""
    from lora_inject.algebra.combine_files import diff as compared

    difference = compared(*reading.read([one, two]))
    listing.show(difference.to_dict(), _print_difference, difference)


@app.command("rename")
def rename_command(
    adapter: given.AdapterPath,
    names: Annotated[
        list[str],
        Argument(
            metavar="OLD=NEW",
            help="A regex of whole segments of names, and their replacement: \\1 is its first "
            "group, an empty one removes them.",
        ),
    ],
    writing: given.Writing,
    reading: given.ReadOptions,
    output: given.Output,
) -> None:
    """Write ADAPTER with other names of its layers."""
    from lora_inject.algebra.other_shapes import rename
    from lora_inject.core.adapter.file_keys import one_line

    pairs = given.pairs_from(names, "OLD=NEW", "transformer=model.decoder", whole="old")
    [state] = reading.read([adapter])
    made = rename(state, pairs)
    old, new = ([*s.sites, *s.trained, *s.base_copies] for s in (state, made))
    words = f"its names are now {one_line(templates(new), 6)}"
    now = dict(zip(old, new, strict=True))
    _write(made, writing, output, tell=lambda **_: show.say_words(words), names=now)


def _write(
    state: AdapterState,
    writing: given.Writing,
    output: given.Output,
    dtype: given.Dtype | None = None,
    tell: Callable[..., None] | None = None,
    **figures: Any,
) -> None:
    """Write the new adapter atomically, and print what `tell` does, its path and its size."""
    import torch

    from lora_inject.algebra.other_shapes import as_dtype
    from lora_inject.formats.exchange import write_adapter

    if dtype is not None:
        state = as_dtype(state, getattr(torch, dtype))
    path = write_adapter(state, writing.output, writing.adapter_format, overwrite=writing.overwrite)
    ranks = {name: site.spec.rank for name, site in state.sites.items()}
    text = str(state).removeprefix("AdapterState(").removesuffix(")")
    data = {"output": str(path), "ranks": ranks, **figures}

    def show_it(**options: bool) -> None:
        if tell is not None:
            tell(**options)
        show.say(f"wrote {path}: {text}")

    output.show(data, show_it)


def _print_difference(difference: Difference, *, everything: bool) -> None:
    heads = ("site", "ranks", "|one|", "|two|", "|one - two|", "cosine")
    cells = tuple(
        (name, "{} and {}".format(*site.ranks), *site.norms, site.distance, site.cosine)
        for name, site in difference.sites.items()
    )
    show.print_rows(Listing(heads, cells), everything=everything)
    for name, distance in difference.trained.items():
        where = "in only one of them" if distance is None else f"|one - two| = {distance:.3g}"
        show.say(f"trained {name}: {where}")
    cosine = "-" if difference.cosine is None else f"{difference.cosine:.6f}"
    apart = f"|one - two| = {difference.distance:.6g}"
    show.say_words(f"{_likeness(difference)}; {apart}, cosine {cosine}, over all sites")


def _likeness(difference: Difference) -> str:
    if difference.equal:
        return "equal in every bit"
    if difference.distance == 0 and all(distance == 0 for distance in difference.trained.values()):
        return "equal values; the configs or fingerprints differ"
    return "not equal"


@app.command("convert")
def convert_command(
    adapter: given.AdapterPath,
    output: Annotated[Path, Argument(metavar="OUT", help="Where to write.")],
    *,
    to: Annotated[
        str,
        Option(
            "--to",
            metavar="FORMAT",
            help=f"Format to write: {', '.join(given.FORMATS)}.",
            callback=given.one_of(given.FORMATS),
        ),
    ],
    base: Base = None,
    dtype: Annotated[
        str | None,
        Option(
            help="Dtype to write, such as float16. (default: as it is)",
            callback=given.one_of(given.DTYPES),
        ),
    ] = None,
    rank: Annotated[
        int | None, Option(min=1, help="portable: one rank for all. (default: the largest)")
    ] = None,
    to_component: Annotated[
        str | None,
        Option(
            "--component",
            help="kohya, diffusers: the part of a pipeline, such as unet or te1; "
            "'' for a diffusers file of one model.",
            callback=given.one_of(given.COMPONENTS),
        ),
    ] = None,
    overwrite: given.Overwrite = False,
    reading: given.ReadOptions,
    out: given.Output,
) -> None:
    """Write ADAPTER in the format of another program.

    Prints what the format cannot express; refuses what would change the outputs.
    """
    from lora_inject.checkpoint.conversion import convert as converted
    from lora_inject.formats.exchange import FORMATS, format_of, options_of

    [how] = reading.options([adapter])
    options = {"dtype": dtype, "rank": rank, "component": to_component}
    chosen = {key: value for key, value in options.items() if value is not None}
    lost: list[str] = []
    for name in chosen:
        takers = [key for key in FORMATS if name in options_of(format_of(key).write)]
        if to not in takers:
            problem = f"the format {to!r} does not have it; these do: {', '.join(takers)}"
            raise BadParameter(problem, param_hint=f"--{name}")
    if "component" in options_of(format_of(to).write) and to_component is None:
        problem = f"a file of {to} has to name the part of a pipeline; give one, such as unet"
        raise BadParameter(problem, param_hint="--component")

    def tell(words: str) -> None:
        lost.append(words)
        show.note(f"{to}: {words}")

    path = converted(
        adapter,
        output,
        to,
        base=base and given.model_folder(base),
        reading=how,
        tell=tell,
        overwrite=overwrite,
        **chosen,
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
            callback=given.one_of(given.CLIENTS),
        ),
    ],
    base: Base = None,
    *,
    output: given.Output,
) -> None:
    """List what a program would refuse or misread in ADAPTER.

    The exit code is 1 if the program refuses the adapter, ignores a part of it or applies another
    scale, or if the adapter holds NaN.
    """
    from dataclasses import asdict

    from lora_inject.checkpoint.conversion import check_adapter

    objections = check_adapter(adapter, client, base=base and given.model_folder(base))
    stopped = any(finding.stops for finding in objections)
    data = {"client": client, "accepted": not stopped, "findings": [*map(asdict, objections)]}
    output.show(data, _print_findings, client, objections, stopped)
    if stopped:
        raise Exit(1)


def _print_findings(client: str, objections: Sequence[Objection], stopped: bool) -> None:
    answer = "does not take it as it is" if stopped else "takes it"
    show.say(f"{client}: {answer}", color=show.BAD if stopped else show.GOOD)
    for finding in objections:
        show.say_words(f"{'stop' if finding.stops else 'note'}: {finding.problem}. {finding.fix}.")
