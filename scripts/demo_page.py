"""The demo's result as a page: before and after in words, in numbers, and what was learned."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jinja2
from matplotlib.figure import Figure

PAGE = """<!DOCTYPE html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>What the demo's adapter learned</title>
<style>
body{max-width:60rem;margin:0 auto;padding:1.5rem 1rem 4rem;font:16px/1.5 system-ui,sans-serif}
pre{font-size:.8rem;overflow-x:auto;padding:.7rem;border:1px solid #8886;border-radius:8px}
dl{display:grid;grid-template-columns:max-content 1fr;gap:.1rem 1rem}
dt{color:#777}
dd{margin:0}
.after{font-weight:600}
img{max-width:100%;background:#fff;border-radius:8px}
.tiles{display:flex;flex-wrap:wrap;gap:1rem}
.tiles div{flex:1 1 9rem;border:1px solid #8886;border-radius:8px;padding:.6rem}
.tiles b{display:block;font-size:1.5rem}
</style>
<h1>What the demo's adapter learned</h1>
<p>SmolLM2-135M was trained for {{ steps }} steps to say in one line what a Python function does.
It was measured on modules of Python that it has not seen in this training.</p>
<div class="tiles">{% for value, what in tiles %}
<div><b>{{ value }}</b>{{ what }}</div>{% endfor %}
</div>
<h2>Before and after, in words</h2>
<p>Of {{ n_asked }} short functions these are the ones where the adapted model came nearest to what
the human wrote.</p>
{% for row in said %}
<pre>{{ row.code }}</pre>
<dl><dt>human</dt><dd>{{ row.human }}</dd><dt>before</dt><dd>{{ row.before }}</dd>
<dt>after</dt><dd class="after">{{ row.after }}</dd></dl>
{% endfor %}
<h2>How it learned</h2>
<p>Loss of the targets' tokens, the mean of each 8 steps.</p>
<img src="pictures/loss.png" alt="the loss, falling over the steps">
<h2>What each layer learned</h2>
<p>The size of each layer's update beside its weight.</p>
<img src="pictures/layers.png" alt="the size of the update by layer">
<p>The singular values of the updates in the middle of the model, over the largest. Where a line
falls fast, few directions do the work: a smaller rank would do.</p>
{% for kind in "qv" %}
<img src="pictures/spectra-model-layers-self_attn-{{ kind }}_proj.png" alt="singular values">
{% endfor %}
<p>All numbers of every layer, and what merging in 16, 8 and 4 bits would keep, are in
<a href="analysis.html">the adapter's own report</a>.</p>
</html>
"""


COMMON = {"a", "an", "the", "of", "to", "in", "for", "from"}


class Said(NamedTuple):
    """A function in code, and in one line by a human, the base and the adapted model."""

    code: str
    human: str
    before: str
    after: str

    def shared(self) -> float:
        """Return the part of the words of the human and of the adapted model that both have.

        Words that stand in every sentence do not count.
        """
        texts = (self.human, self.after)
        human, after = ({*text.lower().strip(".").split()} - COMMON for text in texts)
        return len(human & after) / max(1, len(human | after))


def nearest(said: Sequence[Said], n: int = 3) -> list[Said]:
    """Return the rows whose adapted sentence is nearest to the human's, the nearest first."""
    return sorted(said, key=Said.shared, reverse=True)[:n]


def draw_loss(losses: Sequence[float], file: Path, every: int = 8) -> None:
    """Draw the mean loss of each `every` steps."""
    file.parent.mkdir(parents=True, exist_ok=True)
    ends = [*range(every, len(losses), every), len(losses)]
    means = [sum(losses[max(0, end - every) : end]) / min(every, end) for end in ends]
    _draw({"": (ends, means)}, "step", "loss in nats a token", file)


def draw_sizes(sizes: Mapping[str, Sequence[float]], file: Path) -> None:
    """Draw the size of each layer's update, a line for each kind of layer."""
    lines = {kind: (range(len(values)), values) for kind, values in sizes.items()}
    _draw(lines, "layer", "|D| / |W|", file)


def _draw(
    lines: Mapping[str, tuple[Sequence[int], Sequence[float]]], across: str, up: str, file: Path
) -> None:
    figure = Figure(figsize=(6, 2.6), layout="constrained")
    axes = figure.subplots()
    for label, (xs, ys) in lines.items():
        axes.plot(xs, ys, marker="o", markersize=4, label=label)
    axes.set(xlabel=across, ylabel=up)
    axes.set_ylim(bottom=0)
    if len(lines) > 1:
        axes.legend()
    figure.savefig(file, dpi=120)


def write_page(
    file: Path,
    *,
    steps: int,
    tiles: Sequence[tuple[str, str]],
    said: Sequence[Said],
    n_asked: int,
) -> None:
    """Write the page; its pictures and the adapter's report lie beside it."""
    template = jinja2.Environment(autoescape=True).from_string(PAGE)
    facts: dict[str, Any] = {"steps": steps, "tiles": tiles, "said": said, "n_asked": n_asked}
    file.write_text(template.render(facts), encoding="utf-8")
