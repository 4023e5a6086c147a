"""One HTML page that needs nothing but itself: elements, style, and no script.

Text becomes HTML in one place, where it is escaped; what is HTML already is of the type
`Html` and passes. Colours are variables, so that light and dark are two lists.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape

from lora_inject.analysis.report.svg import LEVELS


class Html(str):
    """Text that is HTML already."""

    __slots__ = ()


def element(tag: str, *inside: str, **attributes: str) -> Html:
    """Return an element; plain text inside it and all attributes are escaped.

    Args:
        tag: Its name.
        inside: Text or `Html`.
        attributes: `class_` stands for `class`.

    Example:
        >>> element("p", "a < b", element("b", "&"), class_="note")
        '<p class="note">a &lt; b<b>&amp;</b></p>'
    """
    given = "".join(f' {key.rstrip("_")}="{escape(value)}"' for key, value in attributes.items())
    return Html(f"<{tag}{given}>{join(inside)}</{tag}>")


def join(parts: Iterable[str]) -> Html:
    """Put text and HTML one after the other."""
    return Html("".join(part if isinstance(part, Html) else escape(part) for part in parts))


def section(title: str, about: str, *inside: str) -> Html:
    """Return a section of the page."""
    return element("section", element("h2", title), element("p", about, class_="about"), *inside)


def card(title: str, *inside: str) -> Html:
    """Return a box with a title."""
    return element("div", element("h3", title), *inside, class_="card")


def grid(cards: Iterable[str], class_: str = "grid") -> Html:
    """Return boxes side by side, as many as there is room for."""
    return element("div", *cards, class_=class_)


def table(heads: Sequence[str], rows: Iterable[Sequence[str]]) -> Html:
    """Return a table whose first column is a name; it scrolls by itself where it is too wide."""
    head = element("thead", element("tr", *(element("th", text, scope="col") for text in heads)))
    lines = (
        element("tr", element("th", row[0], scope="row"), *(element("td", c) for c in row[1:]))
        for row in rows
    )
    body = element("tbody", *lines)
    return element("div", element("table", head, body), class_="scroll", tabindex="0")


def folded(summary: str, inside: str) -> Html:
    """Return what is shown only when it is asked for."""
    return element("details", element("summary", summary), inside)


def page(title: str, *inside: str) -> str:
    """Return the whole page.

    Args:
        title: Of the window.
        inside: What it holds.
    """
    style = element("style", Html(_STYLE + _levels("", _LIGHT) + _dark()))
    head = (
        Html('<meta charset="utf-8">'),
        Html('<meta name="viewport" content="width=device-width, initial-scale=1">'),
        Html('<meta name="color-scheme" content="light dark">'),
        element("title", title),
        style,
    )
    body = element("body", element("main", *inside))
    whole = element("html", element("head", *head), body, lang="en")
    return f"<!DOCTYPE html>\n{whole}\n"


_LIGHT = ("e9eef7", "a9c0ea", "4a76d0", "14316b")
_DARK = ("262d3a", "2f4f8f", "6f9bec", "dbe7ff")


def _levels(indent: str, stops: Sequence[str]) -> str:
    """Return the rules of the scale of colour, faintest first."""
    rules = []
    for i in range(LEVELS):
        at = i * (len(stops) - 1) / (LEVELS - 1)
        low = min(int(at), len(stops) - 2)
        ends = (bytes.fromhex(stops[low]), bytes.fromhex(stops[low + 1]))
        mix = bytes(round(a + (b - a) * (at - low)) for a, b in zip(*ends, strict=True)).hex()
        rules.append(f"{indent}.h{i}{{fill:#{mix}}}.sh{i}{{stroke:#{mix}}}")
    return "\n".join(rules) + "\n"


def _dark() -> str:
    variables = (
        "--ground:#14161a;--box:#1c1f25;--ink:#e8e9eb;--faint:#a2a8b1;--line:#31363f;"
        "--accent:#8ab0ff;--bad:#ff8f85;--note:#e7bd6a"
    )
    rules = _levels("  ", _DARK)
    return f"@media (prefers-color-scheme: dark) {{\n  :root{{{variables}}}\n{rules}}}\n"


_STYLE = """
:root{--ground:#f7f7f5;--box:#fff;--ink:#1b1d21;--faint:#5c626b;--line:#dfe1e4;
--accent:#2d5fc4;--bad:#b3261e;--note:#8a5a00}
*{box-sizing:border-box}
html{-webkit-text-size-adjust:100%}
body{margin:0;background:var(--ground);color:var(--ink);
font:15px/1.5 system-ui,-apple-system,"Segoe UI",Roboto,"Liberation Sans",sans-serif}
main{max-width:1180px;margin:0 auto;padding:28px 20px 60px}
h1{font-size:1.7rem;line-height:1.2;margin:0 0 4px;overflow-wrap:anywhere}
h2{font-size:1.2rem;margin:44px 0 2px}
h3{font-size:.86rem;line-height:1.35;margin:0 0 8px;font-weight:600;overflow-wrap:anywhere}
.about{color:var(--faint);margin:0 0 14px;max-width:75ch}
.grid,.tiles,.small{display:grid;gap:14px}
.grid{grid-template-columns:repeat(auto-fill,minmax(min(100%,340px),1fr))}
.tiles{grid-template-columns:repeat(auto-fill,minmax(150px,1fr));margin-top:18px}
.small{grid-template-columns:repeat(auto-fill,minmax(150px,1fr))}
.grid+h3{margin-top:22px}
.card,.tile,.finding{background:var(--box);border:1px solid var(--line);border-radius:10px;
padding:14px;min-width:0}
.tile b{display:block;font-size:1.45rem;line-height:1.2;font-variant-numeric:tabular-nums}
.tile span,.scale,.axis,.caption{color:var(--faint);font-size:.8rem}
.finding{border-left:4px solid var(--note);margin-bottom:10px}
.finding.bad{border-left-color:var(--bad)}
.finding.good{border-left-color:var(--accent)}
.finding p{margin:0 0 6px}
.names{font-size:.8rem;color:var(--faint);overflow-wrap:anywhere;
font-family:ui-monospace,"Liberation Mono",monospace}
.kind{font-size:.78rem;margin:7px 0 2px;overflow-wrap:anywhere;color:var(--faint);
font-family:ui-monospace,"Liberation Mono",monospace}
.kind b{color:var(--ink);font-weight:600}
svg{display:block;width:100%}
.strip{height:20px;border-radius:3px}
.strip rect{stroke:var(--box);stroke-width:.06}
.chart{height:auto}
.chart text{font-size:10.5px;fill:var(--faint)}
.rule{stroke:var(--line);stroke-width:1}
.bar{fill:var(--accent)}
polyline{fill:none;stroke-width:1.4;stroke-linejoin:round}
.hx{fill:none}
.axis,.scale{display:flex;justify-content:space-between;gap:8px;margin-top:4px}
.scale svg{height:10px;width:120px;flex:none;align-self:center}
.scale{justify-content:flex-start}
.phi{display:block;width:100%;aspect-ratio:1;image-rendering:pixelated;border-radius:3px;
background:var(--line)}
.scroll{overflow-x:auto;background:var(--box);border:1px solid var(--line);border-radius:10px}
table{border-collapse:collapse;width:100%;font-size:.82rem;font-variant-numeric:tabular-nums}
th,td{padding:5px 10px;text-align:right;white-space:nowrap;border-bottom:1px solid var(--line)}
tbody tr:last-child>*{border-bottom:0}
th:first-child{text-align:left}
thead th{color:var(--faint);font-weight:600}
tbody th{font-weight:400;font-family:ui-monospace,"Liberation Mono",monospace;font-size:.78rem}
summary{cursor:pointer;padding:6px 0;color:var(--accent)}
dt{font-weight:600;margin-top:8px}
dd{margin:0;color:var(--faint);max-width:75ch}
footer{margin-top:44px;color:var(--faint);font-size:.8rem}
@media (max-width:520px){main{padding:20px 14px 40px}h1{font-size:1.35rem}
.tiles{grid-template-columns:1fr 1fr}.small{grid-template-columns:1fr 1fr}}
"""
