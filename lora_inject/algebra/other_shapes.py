"""The same update in other shapes: other names and dtypes, slices apart or joined."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from numbers import Integral
from typing import NamedTuple

import regex
import torch
from torch import Tensor

from lora_inject.algebra.combining import Adapter, state_of
from lora_inject.algebra.one_site import plain
from lora_inject.core.adapter import reshape
from lora_inject.core.adapter.fingerprint import without_weights
from lora_inject.core.adapter.other_tensors import (
    distinct,
    only,
    under_names,
    with_every_expert,
)
from lora_inject.core.adapter.site_state import FLOATS, SiteState
from lora_inject.core.adapter.state import AdapterState
from lora_inject.core.functional.finite import lost_by_cast
from lora_inject.core.spec.names import joined
from lora_inject.core.spec.patterns import named
from lora_inject.core.spec.regexes import MATCH_SECONDS, NOT_A_REGEX, stoppable
from lora_inject.errors import StateError, check_type


def subset(adapter: Adapter, *patterns: str) -> AdapterState:
    """Return the sites and trained tensors that patterns, as in a config, match.

    Args:
        adapter: A value, or the path of its files.
        patterns: Each must match something.

    Raises:
        StateError: A pattern matches nothing.

    Examples:
        >>> from lora_inject.core.spec.sites import SiteSpec
        >>> spec = SiteSpec("h.0.q", "linear", 4, 6, (6, 4), 2, 4.0)
        >>> q = SiteState(spec, torch.ones(2, 4), torch.ones(6, 2))
        >>> a = AdapterState({"h.0.q": q, "h.0.k": q.at(spec.at("h.0.k", "h.0.k.weight"))})
        >>> list(subset(a, "k").sites)
        ['h.0.k']
    """
    state = state_of(adapter, "subset")
    chosen = named([*state.sites, *state.trained], patterns, "subset")
    return replace(only(state, chosen), config=None)


def as_dtype(adapter: Adapter, dtype: torch.dtype) -> AdapterState:
    """Return an adapter with its floating point tensors in another dtype.

    Args:
        adapter: A value, or the path of its files.
        dtype: float16, bfloat16, float32 or float64.

    Raises:
        StateError: `dtype` is another one, or values are too large or too small for it.

    Examples:
        >>> a = AdapterState({}, trained={"head.weight": torch.ones(2, 4)})
        >>> as_dtype(a, torch.bfloat16).trained["head.weight"].dtype
        torch.bfloat16
    """
    asked = f"as_dtype {dtype}"
    state = state_of(adapter, asked)
    check_type(asked, dtype, torch.dtype, "Give torch.bfloat16")
    if dtype not in FLOATS:
        problem = "an adapter's tensors are of float16, bfloat16, float32 or float64"
        raise StateError(asked, problem, "Give torch.bfloat16")

    def cast(name: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {key: _cast(t, dtype, f"{asked}, '{name or key}'") for key, t in tensors.items()}

    sites = {n: site.of(site.spec, cast(n, site.tensors)) for n, site in state.sites.items()}
    trained = cast("", state.trained)
    return replace(state, sites=sites, trained=trained)


def _cast(tensor: Tensor, dtype: torch.dtype, where: str) -> Tensor:
    """Return a floating point tensor in another dtype, which can hold its values."""
    if not tensor.is_floating_point():
        return tensor
    made = tensor.to(dtype)
    if lost_by_cast(tensor, made):
        problem = "it holds values that would become infinite, or so small that they become 0"
        raise StateError(where, problem, "Give torch.bfloat16")
    return made


def rename(adapter: Adapter, new: Mapping[str, str] | Callable[[str], str]) -> AdapterState:
    r"""Return the adapter with other names of sites, trained tensors and the fingerprint.

    Args:
        adapter: A value, or the path of its files.
        new: Regexes of whole segments and their replacements (`\1` for a group, empty to
            remove them), applied in order to every name, but not to what one before has made; or a
            function of a name.

    Raises:
        StateError: A regex is not valid or matches no name, two names would become one, or a
            new name is empty or has spaces or slashes.

    Examples:
        >>> from lora_inject.core.spec.sites import SiteSpec
        >>> spec = SiteSpec("h.0.q", "linear", 4, 6, (6, 4), 2, 4.0)
        >>> a = AdapterState({"h.0.q": SiteState(spec, torch.ones(2, 4), torch.ones(6, 2))})
        >>> sites = rename(a, {"h": "model.layers", "q": "self_attn.q_proj"}).sites
        >>> [site.spec.weight for site in sites.values()]
        ['model.layers.0.self_attn.q_proj.weight']
    """
    state = _given(adapter, "rename")
    specs = [site.spec for site in state.sites.values()]
    sites = {name: s.weight.removeprefix(s.name) for s in specs for name in (s.name, *s.aliases)}
    change = _renaming(new, [*sites, *state.trained])
    weights = {name + end: change(name) + end for name, end in sites.items()}
    made = under_names(state, lambda name: weights.get(name) or change(name), StateError)
    return replace(made, config=None)


def _renaming(
    new: Mapping[str, str] | Callable[[str], str], names: Sequence[str]
) -> Callable[[str], str]:
    """Return the change of a name; it refuses names that no module can be saved and loaded under.

    `new` is as in `rename`; each of its regexes must occur in one of `names`.
    """
    if callable(new):
        change = new
    else:
        check_type("rename", new, Mapping, "Give a dict, such as {'old': 'new'}, or a function")
        change = _substitution(new, names)

    def checked(name: str) -> str:
        made = change(name)
        if made != name and not re.fullmatch(r"[^\s./\\]+(\.[^\s./\\]+)*", made):
            remedy = "Give segments joined by dots, without spaces and slashes"
            raise StateError(f"rename '{name}'", f"its new name would be {made!r}", remedy)
        return made

    return checked


def _rule(old: str, text: str) -> regex.Pattern[str]:
    """Compile the regex of whole segments."""
    for part in (old, text):
        check_type(f"rename {old!r}", part, str, "Give the new name as text")
    try:
        return stoppable(rf"(?<![^.])(?:{old})(?![^.])")
    except NOT_A_REGEX as error:
        remedy = "Escape literal characters with a backslash"
        raise StateError(f"rename {old!r}", f"it is not a regex ({error})", remedy) from None


def _substitution(new: Mapping[str, str], names: Sequence[str]) -> Callable[[str], str]:
    """Return the function that replaces segments of a name, checked on all names."""
    rules = {old: _rule(old, text) for old, text in new.items()}
    used = set()

    def change(name: str) -> str:
        pieces = [_Piece(name)]
        for old, rule in rules.items():
            try:
                changed = [made for piece in pieces for made in _replaced(piece, rule, new[old])]
            except TimeoutError:
                problem = f"it takes more than {MATCH_SECONDS:g} s to match, such as '{name[:60]}'"
                remedy = "Write it without repetition inside repetition, such as (a+)+"
                raise StateError(f"rename {old!r}", problem, remedy) from None
            except (regex.error, IndexError) as error:
                problem, remedy = f"{new[old]!r} does not fit it ({error})", "Write \\1 for a group"
                raise StateError(f"rename {old!r}", problem, remedy) from None
            if changed != pieces:
                used.add(old)
            pieces = _without_gaps(changed)
        return re.sub(r"\.{2,}", ".", "".join(piece.text for piece in pieces)).strip(".")

    for name in names:
        change(name)
    if unused := [old for old in new if old not in used]:
        remedy = f"Give whole segments of names such as {_some_of(names)}"
        raise StateError(f"rename {unused[0]!r}", "it occurs in no name of the adapter", remedy)
    return change


class _Piece(NamedTuple):
    """A part of a name, which begins and ends at a dot or at an end, and whether a rule made it."""

    text: str
    is_made: bool = False


def _replaced(piece: _Piece, rule: regex.Pattern[str], text: str) -> Iterator[_Piece]:
    """Yield a piece with what a rule makes of it; what one before has made stays."""
    if piece.is_made:
        yield piece
        return
    end = 0
    for match in rule.finditer(piece.text, timeout=MATCH_SECONDS):
        yield _Piece(piece.text[end : match.start()])
        yield _Piece(match.expand(text), is_made=True)
        end = match.end()
    yield piece._replace(text=piece.text[end:])


def _without_gaps(pieces: Iterable[_Piece]) -> list[_Piece]:
    """Return pieces without the empty ones; those that nothing parts any more are one."""
    whole: list[_Piece] = []
    for piece in pieces:
        if piece.text and whole and not (piece.is_made or whole[-1].is_made):
            whole[-1] = _Piece(re.sub(r"\.{2,}", ".", whole[-1].text + piece.text))
        elif piece.text:
            whole.append(piece)
    if whole and not whole[0].is_made:
        whole[0] = _Piece(whole[0].text.lstrip("."))
    return whole


def _some_of(names: Iterable[str]) -> str:
    """Return the first three names, for a message."""
    return ", ".join(repr(name) for name, _ in zip(names, range(3), strict=False)) or "none"


def split(adapter: Adapter, pattern: str, sizes: Mapping[str, int] | None = None) -> AdapterState:
    """Split fused projections: `attn.qkv` becomes `attn.q`, `attn.k` and `attn.v`.

    Args:
        adapter: A value, or the path of its files.
        pattern: Which sites, as in a config.
        sizes: Width of each part along the output, in order; those of its slices by default.

    Returns:
        A site for each adapted part, under the parent of the fused one.

    Raises:
        StateError: The pattern matches nothing, or the widths do not fit the site.
    """
    asked, sizes = f"split {pattern!r}", {} if sizes is None else sizes
    state = _given(adapter, asked)
    _check_sizes(asked, sizes)
    chosen = named(state.sites, [pattern], asked)
    sites = {name: plain(state.sites[name], asked) for name in chosen}
    return _with(state, {n: reshape.split_site(s, sizes, asked) for n, s in sites.items()})


def join(adapter: Adapter, name: str, sizes: Mapping[str, int]) -> AdapterState:
    """Join sites of one parent to sites on fused projections.

    Args:
        adapter: A value, or the path of its files.
        name: Name of the fused layer, such as `qkv_proj`.
        sizes: Name and width of each of its parts, in order: `{"q_proj": 8, "k_proj": 4}`.

    Returns:
        One site with slices for each module that holds some of the parts. Ranks are padded with
        zeros to the largest.

    Raises:
        StateError: No site is such a part, or a width does not fit.
    """
    asked = f"join {name!r}"
    state = _given(adapter, asked)
    check_type(f"{asked}, name", name, str, "Give the name of the fused layer")
    _check_sizes(asked, sizes)
    groups: dict[str, dict[str, str]] = {}
    for site in state.sites:
        for part in sizes:
            if f".{site}".endswith(f".{part}"):
                head = site.removesuffix(part).rstrip(".")
                groups.setdefault(joined(head, name), {})[part] = site
    put = partial(reshape.join_sites, sizes=sizes, asked=asked)
    return _joined(state, groups, put, asked, f"no site ends in {' or '.join(sizes)}")


def _joined(
    state: AdapterState,
    groups: Mapping[str, Mapping[str, str]],
    put: Callable[[str, Mapping[str, SiteState]], SiteState],
    asked: str,
    why: str,
) -> AdapterState:
    """Return the adapter with one site, under its name in `groups`, for each group."""
    if not groups:
        raise StateError(asked, why, f"Its sites are such as {_some_of(state.sites)}")
    new: dict[str, Mapping[str, SiteState]] = {}
    for name, group in groups.items():
        first, *others = group.values()
        members = {part: plain(state.sites[old], asked) for part, old in group.items()}
        new |= {first: {name: put(name, members)}, **{old: {} for old in others}}
    return _with(state, new)


def _with(state: AdapterState, new: Mapping[str, Mapping[str, SiteState]]) -> AdapterState:
    """Return the adapter with new sites in the place of some, whose fingerprints go."""
    sites = [
        item for name, site in state.sites.items() for item in new.get(name, {name: site}).items()
    ]
    gone = {state.sites[name].spec.weight for name in new}
    marks = without_weights(state.fingerprint or {}, gone) or None
    return replace(state, sites=distinct(sites, StateError), fingerprint=marks, config=None)


def _given(adapter: Adapter, asked: str) -> AdapterState:
    """Return a value, or that of a file, with A and B of every expert."""
    return with_every_expert(state_of(adapter, asked))


def _check_sizes(asked: str, sizes: Mapping[str, int]) -> None:
    remedy = "Give a dict from the name of each part to its width"
    check_type(f"{asked}, sizes", sizes, Mapping, remedy)
    for part, width in sizes.items():
        check_type(f"{asked}, the width of {part!r}", width, Integral, remedy)
        if width < 1:
            raise StateError(asked, f"the width of {part!r} is {width}", "Give 1 or more")
