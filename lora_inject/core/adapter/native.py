"""One safetensors file with the tensors as this package holds them, and what it says about them.

No other program reads this file, so tensors keep their form and every adapter can be written: sites
that other files cannot express (a MultiheadAttention's output projection alone, convolutions in
groups, parameters of the root) are saved by the same call.

Keys: `ROLE/SITE` (`A/SITE`, `B/SITE`, ...), `trained/NAME`. What the tensors do not say (alpha,
slices, kinds, the config, the base's fingerprint) is stored as text in the header, so it cannot be
lost or mixed up with another adapter's. Folders that this package writes for other programs have
the same text. Reading is strict: an unknown field, a wrong type or an impossible number is an
error.
"""

from __future__ import annotations

import base64
import binascii
import json
import math
import struct
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from lora_inject.core.adapter.file_keys import check_keys
from lora_inject.core.adapter.fingerprint import N_SAMPLES, Fingerprint, Sampled
from lora_inject.core.adapter.site_state import SiteState
from lora_inject.core.adapter.state import AdapterState
from lora_inject.core.files.strict_json import Maybe, is_positive, misfit, parse_json
from lora_inject.core.files.tensors import read_tensors, serialize
from lora_inject.core.spec.sites import ROLES, SiteSpec, Slices
from lora_inject.errors import FormatError
from lora_inject.version import __version__

FORMAT_VERSION = "1"
_PREFIX = "lora_inject."
_VERSION = _PREFIX + "format_version"
_LAYOUT = _PREFIX + "layout"
_EDITED = "The file was edited; fetch it again"

_INDEX, _COUNT = range(2**63), range(1, 2**63)  # what torch can count


# What sites have in common but for their names. `rule` belongs to a config: it is not written.
_KIND: dict[str, Any] = {
    "alpha": is_positive,
    "compute": ("base", "float32").__contains__,
    "dropout": lambda value: type(value) in (int, float) and 0 <= value < 1,
    "experts": Maybe(_COUNT),
    "in_features": _COUNT,
    "init": lambda value: isinstance(value, str) or not misfit(value, (str, is_positive)),
    "kind": str,
    "lora_bias": bool,
    "only": Maybe([_INDEX]),
    "out_features": _COUNT,
    "rank": _COUNT,
    "scaling": ("standard", "rslora").__contains__,
    "share": ("", "A", "B").__contains__,
    "slices": Maybe({"sizes": [(str, _COUNT)], "adapt": [str]}),
    "transposed": bool,
    "update": ("forward", "weight").__contains__,
    "variant": str,
    "weight_shape": [_COUNT],
}
_PARTS: dict[str, Any] = {
    "config": Maybe(dict),
    # Of each weight what is `Sampled`: its shape, values, packing, and where the adapter moves it.
    "fingerprint": Maybe({...: ([_INDEX], Maybe(str), str, [_INDEX])}),
    "kinds": [_KIND],
    "sites": {...: (str, _INDEX, [str])},  # weight, number of the kind, aliases
    "trained": {...: Maybe([_INDEX])},  # the rows that it is of, null for all
}


def write(
    state: AdapterState, _path: Path, _facts: object, *, proof: Mapping[str, str] | None = None
) -> bytes:
    """Write any adapter as one file; `proof` is further text of its header."""
    sites = state.sites.items()
    tensors = {f"{role}/{n}": t for n, site in sites for role, t in site.tensors.items()}
    tensors |= {f"trained/{name}": tensor for name, tensor in state.trained.items()}
    return serialize(tensors, describe(state, "native") | {**(proof or {})})


def read(path: Path, _facts: object) -> AdapterState:
    """Read what `write` wrote, bit for bit."""
    tensors, text = read_tensors(path)
    if not is_native(text, "native"):
        raise FormatError("", "it is not a file of this format", "Leave format out")
    said = parse(text)
    trained = {name: f"trained/{name}" for name in said.trained}
    due = {f"{role}/{name}" for name, spec in said.specs.items() for role in spec.roles}
    due |= {*trained.values()}
    if tensors.keys() != due:
        check_keys(tensors, due)
    sites = {
        name: SiteState.of(spec, {role: tensors[f"{role}/{name}"] for role in spec.roles})
        for name, spec in said.specs.items()
    }
    return said.state(sites, {name: tensors[key] for name, key in trained.items()})


# The text ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Described:
    """The metadata of a file that this package wrote: an adapter without its tensors.

    Specs are in the order of the model. `trained` names the tensors of the base that the file has
    in full, or of which it has `rows`.
    """

    specs: Mapping[str, SiteSpec]
    trained: Sequence[str]
    config: Mapping[str, Any] | None
    fingerprint: Fingerprint | None
    rows: Mapping[str, tuple[int, ...]]

    def state(self, sites: Mapping[str, SiteState], trained: Mapping[str, Tensor]) -> AdapterState:
        """Return the adapter that has these tensors."""
        return AdapterState(sites, trained, self.config, self.fingerprint, rows=self.rows)


def describe(state: AdapterState, layout: str) -> dict[str, str]:
    """Return the text metadata of a state, for the header of a safetensors file.

    The fields that sites share are stated once, as a kind: thousands of sites have only a few
    kinds.
    """
    kinds: dict[str, int] = {}
    plain: list[dict[str, Any]] = []
    sites: dict[str, Any] = {}
    for site in state.sites.values():
        spec, slices = site.spec, site.spec.slices
        kind = {field: getattr(spec, field) for field in _KIND}
        if slices is not None:
            kind["slices"] = {"sizes": slices.sizes, "adapt": slices.adapt}
        number = kinds.setdefault(repr(kind), len(kinds))
        if number == len(plain):
            plain.append(kind)
        sites[spec.name] = (spec.weight, number, spec.aliases)
    mark = None
    if state.fingerprint is not None:
        mark = {name: _plain(known) for name, known in state.fingerprint.items()}
    parts = {
        "config": state.config,
        "fingerprint": mark,
        "kinds": plain,
        "sites": sites,
        "trained": {name: state.rows.get(name) for name in state.trained},
    }
    said = {_VERSION: FORMAT_VERSION, _PREFIX + "version": __version__, _LAYOUT: layout}
    said |= {_PREFIX + part: _to_json(value) for part, value in parts.items()}
    return {"format": "pt", **said}


def is_native(metadata: Mapping[str, str], layout: str) -> bool:
    """Whether a file was written by this package in the given layout."""
    return _VERSION in metadata and metadata.get(_LAYOUT) == layout


def parse(metadata: Mapping[str, str]) -> Described:
    """Read what `describe` wrote, strictly, because users edit files."""
    version = metadata[_VERSION]
    if version != FORMAT_VERSION:
        problem = f"its format version is '{version[:20]}', and this package reads {FORMAT_VERSION}"
        raise FormatError("", problem, "Install a newer lora-inject")
    texts = {part: metadata.get(_PREFIX + part) for part in _PARTS}
    said = {part: parse_json(text, part) for part, text in texts.items() if text is not None}
    wrong = misfit(said, _PARTS)
    _require(not wrong, "its metadata", wrong.lstrip("."))
    mark = said["fingerprint"]
    kinds = [_spec(kind, f"kinds.{number}") for number, kind in enumerate(said["kinds"])]
    specs: dict[str, SiteSpec] = {}
    for name, (weight, number, aliases) in said["sites"].items():
        _require(number < len(kinds), f"site '{name[:200]}'", f"there is no kind {number}")
        specs[name] = kinds[number].at(name, weight, tuple(aliases))
    return Described(
        specs=specs,
        trained=[*said["trained"]],
        config=said["config"],
        fingerprint=mark and {name: _sampled(name, *known) for name, known in mark.items()},
        rows={name: tuple(rows) for name, rows in said["trained"].items() if rows is not None},
    )


def _spec(kind: Mapping[str, Any], where: str) -> SiteSpec:
    """Return the spec of the sites of one kind, without a name.

    What each field must be stands in `_KIND`; what they must be together, in `_reasons_against`.
    """
    fields: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in kind.items()}
    fields |= {"alpha": float(kind["alpha"]), "dropout": float(kind["dropout"])}
    if (said := kind["slices"]) is not None:
        sizes = tuple((name, width) for name, width in said["sizes"])
        fields["slices"] = Slices(sizes, tuple(said["adapt"]))
    for problem in _reasons_against(fields):
        raise FormatError(where, problem, _EDITED)
    return SiteSpec(name="", **fields)


def _reasons_against(kind: Mapping[str, Any]) -> Iterator[str]:
    """Yield why the fields of a kind do not fit together."""
    if kind["variant"] not in ROLES:
        yield f"the variant '{kind['variant'][:80]}' is not registered here"
    elements = kind["in_features"] * kind["out_features"] * (kind["experts"] or 1)
    if math.prod(kind["weight_shape"]) != elements:
        yield "weight_shape does not fit in_features and out_features"
    if kind["slices"] is not None:
        yield from kind["slices"].reasons_against(kind["out_features"])
    only = kind["only"]
    n = kind["experts"] or 0
    if only is not None and (not only or [*only] != sorted({*only}) or only[-1] >= n):
        yield "'only' does not name experts of its stack in order"


def _to_json(value: Any) -> str:
    try:
        return json.dumps(value, allow_nan=False)
    except (TypeError, ValueError) as error:
        problem = f"it is not plain data ({error})"
        raise FormatError("its config", problem, "Pass config.to_dict()") from error


# Samples are base64 of little-endian float32: as numbers they would be two thirds of a header and
# most of the time to parse it.


def _plain(known: Sampled) -> tuple[Any, ...]:
    shape, values, packed, moved = known
    if values is None:
        return shape, None, packed, moved
    packed_values = struct.pack(f"<{len(values)}f", *values)
    return shape, base64.b64encode(packed_values).decode(), packed, moved


def _sampled(
    name: str, shape: list[int], text: str | None, packed: str, moved: list[int]
) -> Sampled:
    """Return what is said of one weight of the base; it has a value for each position."""
    numel = math.prod(shape)
    n = min(numel, N_SAMPLES) + len(moved)
    inside = max(moved, default=-1) < numel
    _require(inside, "fingerprint", f"the positions of {name!r} are not all inside of it")
    if text is None:
        return Sampled(tuple(shape), None, packed, tuple(moved))
    try:
        values = struct.unpack(f"<{n}f", binascii.a2b_base64(text, strict_mode=True))
    except (ValueError, struct.error) as error:
        problem = f"the samples of {name!r} are not {n} float32 in base64 ({error})"
        raise FormatError("fingerprint", problem, _EDITED) from error
    return Sampled(tuple(shape), values, packed, tuple(moved))


def _require(holds: bool, where: str, problem: str) -> None:
    if not holds:
        raise FormatError(where, problem, _EDITED)
