"""How an analysis looks on a terminal: tables, and what deserves attention."""

from __future__ import annotations

from statistics import median

from lora_inject.analysis import Analysis, Comparison, findings
from lora_inject.analysis.tables import (
    block_rows,
    comparison_rows,
    rounding_rows,
    weight_rows,
)
from lora_inject.cli.show import count, print_rows, say, say_list, say_words
from lora_inject.spec.names import templates


def print_analysis(
    found: Analysis, compared: Comparison | None, *, everything: bool = False
) -> None:
    """Print the figures of an adapter, by kind of site unless everything is asked for."""
    tables = [block_rows(found)]
    if found.weights:
        tables += [weight_rows(found), rounding_rows(found)]
    if compared is not None:
        tables.append(comparison_rows(compared))
    for rows in tables:
        print_rows(rows, everything=everything)
        say()
    if not everything and len(found.blocks) > len(block_rows(found).by_kind().cells):
        say("Numbers of several blocks are medians; --all lists each block.")
    if compared is not None:
        for which, names in (("first", compared.only_first), ("second", compared.only_second)):
            if names:
                say_list(f"only in the {which}:", templates(names), everything=everything)
    for finding in findings(found):
        say_words(f"{finding.code}: {finding.text}")
        head = f"  {len(finding.names):,}:"
        say_list(head, templates(finding.names), everything=everything)
    needed = median(block.spectrum.rank_for(0.99) for block in found.blocks)
    n_sites = len({block.site for block in found.blocks})
    blocks = count(len(found.blocks), "block")
    say(f"{count(n_sites, 'site')}, {blocks}; rank {needed:g} holds 99% (median)")
