"""How an analysis looks on a terminal: one line for each block, and what deserves attention.

A table says what was found, the findings say what to make of it.
"""

from __future__ import annotations

from statistics import median

import typer

from lora_inject.analysis import SHARES, Analysis, BlockFigures, Comparison, Rounded, findings
from lora_inject.cli.show import count, number, print_table
from lora_inject.spec.names import templates

MOST_NAMES = 6


def print_analysis(found: Analysis, compared: Comparison | None) -> None:
    """Print the figures of an adapter."""
    shares = [f"{share * 100:.0f} %" for share in SHARES]
    heads = ["block", "rank", "|D|", "first", "stable", "effective", *shares]
    print_table([_block_row(block) for block in found.blocks], heads, n_left=1)
    if found.weights:
        typer.echo()
        _print_weights(found)
    if compared is not None:
        typer.echo()
        _print_comparison(compared)
    typer.echo()
    for finding in findings(found):
        names = list(templates(finding.names))
        more = f", and {len(names) - MOST_NAMES} more" if len(names) > MOST_NAMES else ""
        typer.echo(f"{finding.code}: {finding.text}")
        typer.echo(f"  {len(finding.names):,}: {', '.join(names[:MOST_NAMES])}{more}")
    needed = median(block.spectrum.rank_for(0.99) for block in found.blocks)
    n_sites = len({block.site for block in found.blocks})
    blocks = count(len(found.blocks), "block")
    typer.echo(f"{count(n_sites, 'site')}, {blocks}; rank {needed:g} holds 99 % (median)")


def _block_row(block: BlockFigures) -> tuple[str, ...]:
    s = block.spectrum
    return (
        block.name,
        str(block.rank),
        number(s.norm),
        f"{block.first_share:.3f}",
        number(s.stable_rank),
        number(s.effective_rank),
        *(str(s.rank_for(share)) for share in SHARES),
    )


def _print_weights(found: Analysis) -> None:
    rows = [
        (
            block.tensor + (f" [{block.label}]" if block.label else ""),
            number(block.norms.weight_norm),
            number(block.norms.relative),
            str(block.norms.rank),
            number(block.norms.of_delta),
            number(block.norms.of_weight),
            number(block.norms.of_random_expected),
            number(block.norms.factor),
        )
        for _, _, block in found.on_weight
    ]
    heads = ["tensor", "|W|", "|D|/|W|", "r", "|U'WV|", "W's own", "random", "amplification"]
    print_table(rows, heads, n_left=1)
    typer.echo()
    formats = list(next(iter(found.weights.values())).rounded)
    kept = [
        (site, beside.stored, *(_kept(rounded) for rounded in beside.rounded.values()))
        for site, beside in found.weights.items()
    ]
    print_table(kept, ["kept (error) after merging in", "stored", *formats], n_left=2)


def _kept(rounded: Rounded) -> str:
    return f"{number(rounded.kept)} ({number(rounded.error)})"


def _print_comparison(compared: Comparison) -> None:
    rows = [
        (
            pair.name,
            f"{pair.ranks[0]}, {pair.ranks[1]}",
            *(number(value) for side in (pair.right, pair.left)
              for value in (side.first, side.whole, side.whole_by_chance)),
        )
        for pair in compared.pairs
    ]  # fmt: skip
    sides = [f"{side}: {what}" for side in "AB" for what in ("phi(1,1)", "whole", "chance")]
    print_table(rows, ["block", "ranks", *sides], n_left=1)
    for which, names in (("first", compared.only_first), ("second", compared.only_second)):
        if names:
            typer.echo(f"only in the {which}: {', '.join(templates(names))}")
