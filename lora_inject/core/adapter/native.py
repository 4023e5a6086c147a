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
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from lora_inject.core.adapter.fingerprint import Fingerprint, Moved
from lora_inject.core.adapter.site_state import SiteState
from lora_inject.core.adapter.state import AdapterState
from lora_inject.core.files.strict_json import Maybe, is_positive, misfit, parse_json
from lora_inject.core.files.tensors import is_safetensors, read_names, read_tensors, serialize
from lora_inject.core.spec.sites import ROLES, SiteSpec
from lora_inject.errors import FormatError
from lora_inject.version import __version__

if TYPE_CHECKING:
    from lora_inject.core.spec.slices import Slices

FORMAT_VERSION = "1"
_PREFIX = "lora_inject."
_VERSION = _PREFIX + "format_version"
_LAYOUT = _PREFIX + "layout"
_EDITED = 'The file was edited; fetch it again, or read it as another program does: prefer="config"'

_INDEX, _COUNT = range(2**63), range(1, 2**63)  # what torch can count
_PARTS: dict[str, Any] = {
    "aliases": {...: [str]},  # of sites on layers that the model held under several names
    "config": Maybe(dict),
    "fingerprint": Maybe(
        {
            "shapes": {...: [_INDEX]},
            "samples": {...: str},
            "quantized": {...: str},
            "moved": {...: {"positions": [_INDEX], "values": str}},
        }
    ),
    "kinds": [dict],
    "sites": [(str, str, _INDEX)],  # name, weight, number of the kind
    "trained": [str],
    "rows": {...: [_INDEX]},
}


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and abs(value) < 1e300


# What sites have in common but for their names. `rule` belongs to a config: it is not written.
_KIND: dict[str, Any] = {
    "alpha": is_positive,
    "compute": ("base", "float32").__contains__,
    "derived": bool,
    "dropout": lambda value: _is_number(value) and 0 <= value < 1,
    "experts": Maybe(_COUNT),
    "in_features": _COUNT,
    "init": lambda value: isinstance(value, str) or not misfit(value, (str, _is_number)),
    "kind": str,
    "lora_bias": bool,
    "only": Maybe([_INDEX]),
    "out_features": _COUNT,
    "rank": _COUNT,
    "scaling": ("standard", "rslora").__contains__,
    "share": ("", "A", "B").__contains__,
    "slices": Maybe({"sizes": [(str, _COUNT)], "adapt": [str]}),
    "transposed": bool,
    "turned": bool,
    "update": ("forward", "weight").__contains__,
    "variant": str,
    "weight_shape": [_COUNT],
}
_FLAGS = {"derived", "turned"}


def detects(path: Path) -> bool:
    """Whether a path is such a file."""
    return is_safetensors(path) and is_native(read_names(path)[1], "native")


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
    roles = {
        name: (*spec.shapes, *(("A0", "B0") if name in said.derived else ()))
        for name, spec in said.specs.items()
    }
    due = {f"{role}/{name}" for name in roles for role in roles[name]}
    due |= {f"trained/{name}" for name in said.trained}
    if tensors.keys() != due:
        from lora_inject.core.adapter.file_keys import check_keys

        check_keys(tensors, due)
    sites = {
        name: SiteState.of(spec, {role: tensors[f"{role}/{name}"] for role in roles[name]})
        for name, spec in said.specs.items()
    }
    return said.state(sites, {name: tensors[f"trained/{name}"] for name in said.trained})


# The text ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Described:
    """The metadata of a file that this package wrote: specs are in the order of the model.

    `derived` names the sites that carry A0 and B0. `turned` names those whose A and B are exchanged
    in the file, as its format has them. `trained` names the tensors of the base that the file has
    in full, or of which it has `rows`.
    """

    specs: Mapping[str, SiteSpec]
    derived: frozenset[str]
    turned: frozenset[str]
    trained: Sequence[str]
    config: Mapping[str, Any] | None
    fingerprint: Fingerprint | None
    rows: Mapping[str, tuple[int, ...]]

    def state(self, sites: Mapping[str, SiteState], trained: Mapping[str, Tensor]) -> AdapterState:
        """Return the adapter that has these tensors."""
        return AdapterState(sites, trained, self.config, self.fingerprint, rows=self.rows)


def describe(state: AdapterState, layout: str, turned: Collection[str] = ()) -> dict[str, str]:
    """Return the text metadata of a state, for the header of a safetensors file.

    The fields that sites share are stated once, as a kind: thousands of sites have only a few
    kinds.
    """
    kinds: dict[str, int] = {}
    plain: list[dict[str, Any]] = []
    sites = []
    for name, site in state.sites.items():
        spec, slices = site.spec, site.spec.slices
        kind = {field: getattr(spec, field) for field in _KIND if field not in _FLAGS}
        kind |= {"derived": site.A0 is not None, "turned": name in turned}
        if slices is not None:
            kind["slices"] = {"sizes": slices.sizes, "adapt": slices.adapt}
        number = kinds.setdefault(repr(kind), len(kinds))
        if number == len(plain):
            plain.append(kind)
        sites.append((spec.name, spec.weight, number))
    parts = {
        "aliases": {n: site.spec.aliases for n, site in state.sites.items() if site.spec.aliases},
        "config": state.config,
        "fingerprint": _fingerprint_to_plain(state.fingerprint),
        "kinds": plain,
        "sites": sites,
        "trained": list(state.trained),
        "rows": dict(state.rows),
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
    said = {part: _part(metadata, part) for part in _PARTS}
    sites, kinds, trained, rows = (said[part] for part in ("sites", "kinds", "trained", "rows"))
    aliases: dict[str, list[str]] = said["aliases"]
    specs: dict[str, SiteSpec] = {}
    first: dict[int, SiteSpec] = {}
    for name, weight, number in sites:
        where = f"site '{name[:200]}'"
        _require(name not in specs, where, "its name is there twice")
        _require(number < len(kinds), where, f"there is no kind {number}")
        if number not in first:
            first[number] = _spec(kinds[number], where)
        specs[name] = first[number].at(name, weight, tuple(aliases.get(name, ())))
    _require(len(first) == len(kinds), "", "it states a kind of sites that no site has")
    _require(len(set(trained)) == len(trained), "", "it names a trained tensor twice")
    _require(rows.keys() <= set(trained), "", "it has rows of a tensor that is not in the file")
    return Described(
        specs=specs,
        derived=frozenset(name for name, _, number in sites if kinds[number]["derived"]),
        turned=frozenset(name for name, _, number in sites if kinds[number]["turned"]),
        trained=trained,
        config=said["config"],
        fingerprint=_fingerprint(said["fingerprint"], "fingerprint"),
        rows={name: tuple(indices) for name, indices in rows.items()},
    )


def _part(metadata: Mapping[str, str], part: str) -> Any:
    where = f"metadata '{_PREFIX}{part}'"
    _require(_PREFIX + part in metadata, where, "it is missing")
    value = parse_json(metadata[_PREFIX + part], where)
    wrong = misfit(value, _PARTS[part])
    _require(not wrong, where, wrong.lstrip(".: "))
    return value


def _spec(kind: Mapping[str, Any], where: str) -> SiteSpec:
    """Return the spec of the sites of one kind, without a name.

    What each field must be stands in `_KIND`; what they must be together, in `_reasons_against`.
    """
    wrong = misfit(kind, _KIND)
    _require(not wrong, where, wrong.lstrip("."))
    for problem in _reasons_against(kind):
        raise FormatError(where, problem, _EDITED)
    fields = {field: value for field, value in kind.items() if field not in _FLAGS}
    fields["slices"] = _slices(kind["slices"])
    for field in ("weight_shape", "init", "only"):
        fields[field] = tuple(kind[field]) if isinstance(kind[field], list) else kind[field]
    for field in ("alpha", "dropout"):
        fields[field] = float(kind[field])
    return SiteSpec(name="", **fields)


def _slices(said: Mapping[str, Any] | None) -> Slices | None:
    if said is None:
        return None
    from lora_inject.core.spec.slices import Slices

    return Slices(tuple((name, width) for name, width in said["sizes"]), tuple(said["adapt"]))


def _reasons_against(kind: Mapping[str, Any]) -> Iterator[str]:
    """Yield why the fields of a kind do not fit together."""
    if kind["variant"] not in ROLES:
        yield f"the variant '{kind['variant'][:80]}' is not registered here"
    elements = kind["in_features"] * kind["out_features"] * (kind["experts"] or 1)
    if math.prod(kind["weight_shape"]) != elements:
        yield "weight_shape does not fit in_features and out_features"
    if (slices := _slices(kind["slices"])) is not None:
        yield from slices.reasons_against(kind["out_features"])
    only = kind["only"]
    n = kind["experts"] or 0
    if only is not None and (not only or only != sorted({*only}) or only[-1] >= n):
        yield "'only' does not name experts of its stack in order"


def _to_json(value: Any) -> str:
    try:
        return json.dumps(value, sort_keys=True, allow_nan=False)
    except (TypeError, ValueError) as error:
        problem = f"it is not plain data ({error})"
        raise FormatError("its config", problem, "Pass config.to_dict()") from error


def _fingerprint_to_plain(mark: Fingerprint | None) -> dict[str, Any] | None:
    """Return a fingerprint with its samples as base64 of little-endian float32.

    As numbers they would be two thirds of a header and most of the time to parse it.
    """
    if mark is None:
        return None
    return {
        "shapes": {**mark.shapes},
        "samples": {name: _packed(name, values) for name, values in mark.samples.items()},
        "quantized": {**mark.quantized},
        "moved": {
            name: {"positions": moved.positions, "values": _packed(name, moved.values)}
            for name, moved in mark.moved.items()
        },
    }


def _packed(name: str, values: Sequence[float]) -> str:
    try:
        return base64.b64encode(struct.pack(f"<{len(values)}f", *values)).decode()
    except (OverflowError, struct.error) as error:
        problem = f"a sample is not a float32 ({error})"
        remedy = "Take it with lora_inject.core.adapter.fingerprint.samples, as float32"
        raise FormatError(f"its fingerprint of {name!r}", problem, remedy) from error


def _fingerprint(plain: Mapping[str, Any] | None, where: str) -> Fingerprint | None:
    if plain is None:
        return None
    shapes = {name: tuple(shape) for name, shape in plain["shapes"].items()}
    samples = {name: _unpacked(name, text, where) for name, text in plain["samples"].items()}
    moved = {}
    for name, said in plain["moved"].items():
        positions, values = tuple(said["positions"]), _unpacked(name, said["values"], where)
        inside = all(position < math.prod(shapes.get(name, (0,))) for position in positions)
        fits = inside and len(positions) == len(values)
        _require(fits, where, f"the positions of {name!r} are not those of its values")
        moved[name] = Moved(positions, values)
    return Fingerprint(shapes, samples, plain["quantized"], moved)


def _unpacked(name: str, text: str, where: str) -> tuple[float, ...]:
    try:
        packed = binascii.a2b_base64(text, strict_mode=True)
        return struct.unpack(f"<{len(packed) // 4}f", packed)
    except (ValueError, struct.error) as error:
        problem = f"the samples of {name!r} are not float32 in base64 ({error})"
        raise FormatError(where, problem, _EDITED) from error


def _require(holds: bool, where: str, problem: str) -> None:
    if not holds:
        raise FormatError(where, problem, _EDITED)
