"""Commands on adapters alone: `combine`, `truncate`, `diff`, `rename`, `convert`, `check`."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any, get_args

import torch
from typer import Argument, Exit, Option

from lora_inject.algebra import combining, other_shapes
from lora_inject.algebra.combining import METHODS
from lora_inject.checkpoint import conversion
from lora_inject.cli import options
from lora_inject.cli.options import one_of
from lora_inject.cli.show import note, width
from lora_inject.core.adapter.file_keys import one_line
from lora_inject.core.adapter.state import AdapterState
from lora_inject.core.spec.names import templates
from lora_inject.core.spec.tables import Listing, span, wrapped
from lora_inject.formats.clients import CLIENTS
from lora_inject.formats.exchange import FORMATS, write_adapter
from lora_inject.formats.pairs import DTYPES

WriteDtype = Annotated[
    options.Dtype | None, Option(help="Dtype to write. (default: the adapters')")
]
Base = Annotated[
    Path | None,
    Option(help="Folder of the base, for names, heads and ties; config.json may be enough."),
]


def combine(
    adapters: options.AdapterPaths,
    *,
    writing: options.Writing,
    weight: options.Weights = None,
    method: Annotated[
        str,
        Option(
            help="cat: the exact sum, ranks add up. svd: the sum cut to --rank. Or linear, ties, "
            "dare_linear, dare_ties, magnitude_prune on A and B, with _svd on the deltas.",
            callback=one_of(METHODS),
        ),
    ] = "cat",
    rank: Annotated[
        int | None, Option(min=1, help="svd, _svd: rank of each site. (default: the largest)")
    ] = None,
    density: Annotated[
        float | None, Option(min=0, max=1, help="Share of the values to keep.")
    ] = None,
    majority_sign: Annotated[
        str, Option(help="ties: total or frequency.", callback=one_of(get_args(combining.Sign)))
    ] = "total",
    seed: Annotated[int, Option(help="Seed of dare's masks.")] = 0,
    any_base: Annotated[
        bool,
        Option(help="Add what was trained after the first was merged, for the first one's base."),
    ] = False,
    dtype: WriteDtype = None,
    reading: options.ReadOptions,
    output: options.Output,
) -> None:
    weights = weight and options.weights_for(adapters, weight)
    how: dict[str, Any] = {"density": density, "majority_sign": majority_sign, "seed": seed}
    how |= {"method": method, "rank": rank, "any_base": any_base}
    combined = combining.combine(reading.read(adapters), weights, **how)
    _write(combined, writing, output, dtype)


def truncate(
    adapter: options.AdapterPath,
    *,
    writing: options.Writing,
    keeping: options.Keeping,
    dtype: WriteDtype = None,
    reading: options.ReadOptions,
    listing: options.ListOutput,
) -> None:
    """The error of a site is |D - D_cut| / |D|, in Frobenius norm."""
    [state] = reading.read([adapter])
    cut, cuts = combining.truncate(state, rank=keeping.rank, energy=keeping.energy)
    cells = tuple((name, site.before, float(site.rank), site.error) for name, site in cuts.items())
    rows = Listing(("site", "rank", "now", "error"), cells, {"now": span, "error": max})
    lines = rows.lines(width(), everything=listing.everything)
    sites = {name: site._asdict() for name, site in cuts.items()}
    _write(cut, writing, listing, dtype, lines, sites=sites)


def diff(
    one: Annotated[Path, Argument(metavar="ONE", help="A PEFT folder or an adapter file.")],
    two: Annotated[Path, Argument(metavar="TWO", help="Another adapter of the same base.")],
    reading: options.ReadOptions,
    listing: options.ListOutput,
) -> None:
    listing.show(combining.diff(*reading.read([one, two])))


def rename(
    adapter: options.AdapterPath,
    names: Annotated[
        list[str],
        Argument(
            metavar="OLD=NEW",
            help="A regex of whole segments of names, and their replacement: \\1 is its first "
            "group, an empty one removes them.",
        ),
    ],
    writing: options.Writing,
    reading: options.ReadOptions,
    output: options.Output,
) -> None:
    pairs = options.pairs_from(names, "OLD=NEW", "transformer=model.decoder", whole="old")
    [state] = reading.read([adapter])
    renamed = other_shapes.rename(state, pairs)
    old, new = ([*s.sites, *s.trained, *s.base_copies] for s in (state, renamed))
    lines = wrapped(f"its names are now {one_line(templates(new), 6)}", width())
    _write(renamed, writing, output, lines=lines, names=dict(zip(old, new, strict=True)))


def _write(
    state: AdapterState,
    writing: options.Writing,
    output: options.Printing,
    dtype: options.Dtype | None = None,
    lines: Iterable[str] = (),
    **figures: Any,
) -> None:
    """Write the new adapter atomically, and print `lines`, its path and its size."""
    if dtype is not None:
        state = other_shapes.as_dtype(state, getattr(torch, dtype))
    path = write_adapter(state, writing.output, writing.adapter_format, overwrite=writing.overwrite)
    ranks = {name: site.spec.rank for name, site in state.sites.items()}
    size = str(state).removeprefix("AdapterState(").removesuffix(")")
    text = "\n".join([*lines, f"wrote {path}: {size}"])
    output.print({"output": str(path), "ranks": ranks, **figures}, text)


def convert(
    adapter: options.AdapterPath,
    output: Annotated[Path, Argument(metavar="OUT", help="Where to write.")],
    *,
    to: Annotated[
        str, Option("--to", metavar="FORMAT", help=options.FORMAT, callback=one_of(FORMATS))
    ],
    base: Base = None,
    dtype: Annotated[
        str | None,
        Option(
            help="Dtype to write, such as float16. (default: as it is)",
            callback=one_of(DTYPES),
        ),
    ] = None,
    rank: Annotated[
        int | None, Option(min=1, help="portable: one rank for all. (default: the largest)")
    ] = None,
    to_component: Annotated[  # reading has a component too
        str | None,
        Option(
            "--component",
            help="kohya, diffusers: the part of a pipeline, such as unet or te1; "
            "'' for a diffusers file of one model.",
        ),
    ] = None,
    overwrite: options.Overwrite = False,
    reading: options.ReadOptions,
    out: options.Output,
) -> None:
    """Prints what the format cannot express; refuses what would change the outputs."""
    [how] = reading.options([adapter])
    given = {"dtype": dtype, "rank": rank, "component": to_component}
    chosen = {key: value for key, value in given.items() if value is not None}
    lost: list[str] = []

    def tell(words: str) -> None:
        lost.append(words)
        note(f"{to}: {words}")

    path = conversion.convert(
        adapter,
        output,
        to,
        base=base and options.model_folder(base),
        reading=how,
        tell=tell,
        overwrite=overwrite,
        **chosen,
    )
    out.print({"output": str(path), "format": to, "lost": lost}, f"wrote {path}")


def _program(value: str) -> str:
    one_of(CLIENTS)(value.partition("==")[0])
    return value


def check(
    adapter: options.AdapterPath,
    client: Annotated[
        str,
        Option(
            "--for",
            metavar="PROGRAM",
            help=f"{', '.join(CLIENTS)}; or one with its version, such as vllm==0.32.",
            callback=_program,
        ),
    ],
    base: Base = None,
    *,
    output: options.Output,
) -> None:
    """The exit code is 1 if it refuses ADAPTER, ignores a part of it or applies another scale.

    So it is if ADAPTER holds NaN.
    """
    found = conversion.check_adapter(adapter, client, base=base and options.model_folder(base))
    stopped = any(objection.stops for objection in found)
    lines = [f"{client}: {'does not take it as it is' if stopped else 'takes it'}"]
    for each in found:
        lines += wrapped(
            f"{'stop' if each.stops else 'note'}: {each.problem}. {each.fix}.", width()
        )
    data = {"client": client, "accepted": not stopped, "findings": [*map(asdict, found)]}
    output.print(data, "\n".join(lines))
    if stopped:
        raise Exit(1)
