"""Puts a search, its curves and its evidence into a page."""

from __future__ import annotations

import datetime as dt
from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import Any

from lora_inject.analysis.drawings import lines_figure, svg
from lora_inject.analysis.report.write_page import template
from lora_inject.core.spec.tables import Listing
from lora_inject.trials.rungs import behind, ranked
from lora_inject.trials.search import Search
from lora_inject.version import __version__

SMOOTH = 4
"""One point of a curve is the mean over this share of the steps of a rung."""


def search_report(search: Search, title: str, *, date: dt.date | None = None) -> str:
    """Write the page about a search.

    Args:
        search: A search that has ended.
        title: What to call it.
        date: The date at the top; today by default.

    Returns:
        HTML that loads nothing; every name in it is escaped.

    Raises:
        StateError: jinja2 or matplotlib is not installed.
    """
    page = template("search.html.j2")
    last, best = search.rungs[-1], search.best
    by_rate = [_by_rate(search, rung.held_out) for rung in search.rungs]
    losses = [_smooth(rung.losses) for rung in search.rungs]
    loss, base = fmean(last.held_out[best]), fmean(search.base)
    return str(
        page.render(
            title=title,
            facts=[
                ("trials", f"{len(search.candidates)}; {len(search.over_budget)} over the budget"),
                ("rungs", ", ".join(f"{n} for {steps} steps" for n, steps in search.plan)),
                ("seed", str(search.space.seed)),
                ("date", (date or dt.date.today()).isoformat()),
            ],
            tiles=[
                (f"{loss:.4f}", f"held-out loss of {best}"),
                (f"{base:.4f}", "of the base"),
                (f"{search.candidates[best].parameters:,}", "parameters"),
                (f"{search.seconds:.0f} s", "of training"),
            ],
            config=search.to_yaml(),
            rates=[_card(i, svg(lines_figure(lines, "learning rate", "held-out loss",
                                             logarithmic=True, among=by_rate[0]), "loss by rate"))
                   for i, lines in enumerate(by_rate)],
            curves=[_card(i, svg(lines_figure(lines, "step", "training loss", among=losses[0]),
                                 "training loss by step"))
                    for i, lines in enumerate(losses)],
            trials=trial_rows(search),
            version=__version__,
        )
    )  # fmt: skip


def trial_rows(search: Search) -> Listing:
    """Return a row for each trial, the best of the last rung first."""
    order = dict.fromkeys(n for rung in reversed(search.rungs) for n in ranked(rung.held_out))
    order |= dict.fromkeys(search.candidates)
    rows = [
        (name, f"{search.candidates[name].lr:g}", f"{search.candidates[name].parameters:,}",
         *(_judged(rung, name) for rung in search.rungs))
        for name in order
    ]  # fmt: skip
    heads = (f"after {steps} steps" for _, steps in search.plan)
    return Listing(("trial", "lr", "parameters", *heads), tuple(rows))


def _judged(rung: Any, name: str) -> str:
    if name in rung.stopped:
        return "stopped"
    if name not in rung.held_out:
        return "-"
    best = ranked(rung.held_out)[0]
    apart = "" if name == best else f" {behind(rung.held_out[name], rung.held_out[best])}"
    return f"{fmean(rung.held_out[name]):.4f}{apart}"


def _card(i: int, drawing: str) -> tuple[str, str]:
    return f"rung {i + 1}", drawing


def _by_rate(
    search: Search, held_out: Mapping[str, Sequence[float]]
) -> dict[str, list[tuple[float, float]]]:
    """Return learning rate and loss by the rest of the trial's name."""
    lines: dict[str, list[tuple[float, float]]] = {}
    for name in held_out:
        config = name.partition("lr ")[0].strip() or "all"
        lines.setdefault(config, []).append((search.candidates[name].lr, fmean(held_out[name])))
    return {config: sorted(points) for config, points in lines.items()}


def _smooth(losses: Mapping[str, Sequence[float]]) -> dict[str, list[tuple[float, float]]]:
    width = max(1, max(map(len, losses.values())) // SMOOTH)
    return {
        name: [(i + 1, fmean(values[max(0, i + 1 - width) : i + 1])) for i in range(len(values))]
        for name, values in losses.items()
        if values
    }
