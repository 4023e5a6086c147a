"""PEFT folders that others wrote: PEFT itself, transformers, unsloth, trainers.

The names of the tensors say which sites there are, their shapes the ranks and widths; the config is
asked only for what tensors cannot say (alpha, rsLoRA, and for stacked experts the rank), and must
not contradict them. A two-dimensional pair is assumed to be a linear layer's (`conv1d` where the
config says fan_in_fan_out); loading onto a model replaces the assumption by what the model has.

Source: peft 0.12 to 0.21, utils/save_and_load.py.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import torch
from torch import Tensor

from lora_inject.adapter.site_state import SiteState
from lora_inject.adapter.state import AdapterState
from lora_inject.errors import FormatError
from lora_inject.formats.checks import check_site
from lora_inject.formats.metadata import one_line
from lora_inject.formats.peft.adapter_config import Claims
from lora_inject.formats.peft.tensor_layout import PREFIX, ROWS, further_shape, owner, unpack
from lora_inject.formats.plain import check_shapes
from lora_inject.spec.sites import SiteSpec

_ENDS = {
    ".lora_A.weight": ("a", False),
    ".lora_B.weight": ("b", False),
    ".lora_A.default.weight": ("a", False),
    ".lora_B.default.weight": ("b", False),
    ".lora_embedding_A": ("a", True),
    ".lora_embedding_B": ("b", True),
    ".lora_embedding_A.default": ("a", True),
    ".lora_embedding_B.default": ("b", True),
}
# Until 0.12 the magnitude was a plain Parameter; PEFT still omits `.weight` in the file.
_FURTHER = {
    f".lora_magnitude_vector{end}": "m" for end in ("", ".weight", ".default", ".default.weight")
}
_FURTHER |= {f".lora_B{end}": "b" for end in (".bias", ".default.bias")}
_ROWS_ENDS = tuple(f".{ROWS}{end}" for end in ("", ".default"))


@dataclass
class _Pair:
    """The tensors found under one path."""

    embedding: bool = False
    tensors: dict[str, Tensor] = field(default_factory=dict)
    further: dict[str, Tensor] = field(default_factory=dict)


class _Found(NamedTuple):
    """One site: its tensors, and what the config claims of it."""

    name: str
    A: Tensor
    B: Tensor
    embedding: bool
    rank: int | None
    alpha: float
    where: str


def read_foreign(
    tensors: Mapping[str, Tensor],
    claims: Claims,
    asked: str,
    *,
    tensor_names: Sequence[str] | None = None,
    transposed_modules: Collection[str] | None = None,
    expert_major: bool = False,
) -> AdapterState:
    """Make a state of the tensors of a PEFT file; options as for `read` of the folder.

    Tensors by the file's names. The adapter's `config` and `fingerprint` are None.
    """
    pairs, rest = _split(_without_prefix(tensors, asked), asked)
    levels: dict[str, dict[int, str]] = {}
    for path in pairs:
        module = path.removesuffix(".base_layer")
        depth = 0 if module == path else 1
        while module.endswith(".base_layer"):
            module, depth = module.removesuffix(".base_layer"), depth + 1
        levels.setdefault(module, {})[depth] = path
    owners: dict[str, tuple[str, _Pair]] = {}
    called: dict[str, str] = {}  # name of a site in the config's patterns, if another
    for module, paths in levels.items():
        if module.endswith(_OUT) and module.removesuffix(_OUT) in levels:
            attention = module.removesuffix(_OUT)
            owners |= _attention(attention, paths[0], pairs, claims, asked)
            called |= {name: attention for name in owners if name.startswith(f"{attention}.")}
            continue
        if f"{module}{_OUT}" in levels:
            continue
        for name, path in _named(module, paths, claims, asked, tensor_names):
            owners[name] = module, pairs[path]
    known = claims.numbers({called.get(name, name): None for name in owners})
    numbers = {name: known[called.get(name, name)] for name in owners}
    sites = {}
    for name, (module, pair) in owners.items():
        a, b, where = pair.tensors["a"], pair.tensors["b"], f"{asked}, site '{name}'"
        check_shapes(a, b, where)
        found = _Found(name, a, b, pair.embedding, *numbers[name], where)
        if name == module:
            spec = _module(found, claims)
        else:
            spec = _parameter(found, claims, transposed_modules)
            if expert_major and spec.experts:
                found = found._replace(B=_rank_major(b, spec.experts))
        _check_further(pair, claims, where)
        sites[name] = with_further(unpack(spec, a, found.B, where), pair.further, where)
        check_site(sites[name], asked)
    rows = _take_rows(rest, claims, asked)
    trained, copies = _full_tensors(rest, sites, claims, asked)
    trained.update((name, tensor) for name, (_, tensor) in rows.items())
    numbers_of_rows = {name: numbers for name, (numbers, _) in rows.items()}
    return AdapterState(sites, trained, base_copies=copies, rows=numbers_of_rows)


_OUT = ".base_layer.out_proj"


def _attention(
    module: str, out: str, pairs: Mapping[str, _Pair], claims: Claims, asked: str
) -> dict[str, tuple[str, _Pair]]:
    """Return the two sites of a MultiheadAttention, with the scale that PEFT applies.

    PEFT 0.21 adds the update of the output projection twice in every forward
    (tuners/lora/layer.py, `MultiheadAttention.merge`): here it is added once, at double scale.
    """
    if claims.peft_version != (0, 21):
        raise FormatError(
            f"{asked}, module '{module}'",
            "PEFT 0.21 applies the update of an attention's output projection twice, and the file "
            "does not say that it was trained so ('peft_version')",
            "Save it again with PEFT 0.21.2, if its outputs there are right",
        )
    inner, projection = pairs[module], pairs[out]
    twice = {**projection.tensors, "b": 2 * projection.tensors["b"]}
    return {
        f"{module}.in_proj_weight": (module, inner),
        f"{module}.out_proj": (f"{module}.out_proj", replace(projection, tensors=twice)),
    }


def _check_further(pair: _Pair, claims: Claims, where: str) -> None:
    """Refuse a site whose further tensors differ from what the config states."""
    for role, said, field_name, what in (
        ("m", claims.dora, "use_dora", "DoRA magnitude"),
        ("b", claims.lora_bias, "lora_bias", "bias of lora_B"),
    ):
        if said != (role in pair.further):
            has = f"no {what}, which '{field_name}' asks for" if said else f"a {what}"
            raise FormatError(where, f"it has {has}", _REPAIR)


def _take_rows(
    rest: dict[str, Tensor], claims: Claims, asked: str
) -> dict[str, tuple[tuple[int, ...], Tensor]]:
    """Remove single rows from a file's other tensors; return indices and values by weight."""
    found = {}
    for key in [key for key in rest if key.endswith(_ROWS_ENDS)]:
        module, tensor = key.removesuffix(".default").removesuffix(f".{ROWS}"), rest.pop(key)
        ends = [ids for n, ids in claims.tokens.items() if not n or f".{module}".endswith(f".{n}")]
        if len(ends) != 1 or tensor.dim() != 2 or len(tensor) != len(ends[0]):
            raise FormatError(
                f"{asked}, '{key[:200]}'",
                "the config does not say which rows it replaces",
                "Restore 'trainable_token_indices' in adapter_config.json",
            )
        found[f"{module}.weight"] = ends[0], tensor
    if claims.tokens and not found:
        raise FormatError(asked, "it lacks the rows of 'trainable_token_indices'", _REPAIR)
    return found


def with_further(site: SiteState, further: Mapping[str, Tensor], where: str) -> SiteState:
    """Return a site with the further tensors of its variant, in the shapes of its spec."""
    if not further:
        return site
    spec, found = site.spec, {}
    for role, tensor in further.items():
        if role not in spec.shapes or tensor.shape != further_shape(spec, role):
            raise FormatError(where, f"its {role} has the shape {tuple(tensor.shape)}", _REPAIR)
        found[role] = tensor.reshape(spec.shapes[role])
    return replace(site, further=found)


# Keys -------------------------------------------------------------------------------------------


_WRAPPER = re.compile(r"(?<![^.])_(?:orig_mod|fsdp_wrapped_module|checkpoint_wrapped_module)\.")
"""Modules that torch.compile, FSDP and activation checkpointing put around others."""


def _without_prefix(tensors: Mapping[str, Tensor], asked: str) -> dict[str, Tensor]:
    """All keys have PEFT's prefix, or none has (transformers and diffusers leave it out)."""
    bare = {key: _WRAPPER.sub("", key) for key in tensors}
    with_prefix = [key for key in bare.values() if key.startswith(PREFIX)]
    if with_prefix and len(with_prefix) < len(tensors):
        without = next(key for key in bare.values() if not key.startswith(PREFIX))
        raise FormatError(
            asked,
            f"'{without[:200]}' does not begin with '{PREFIX}' as other tensors do",
            "The file was put together by hand; give all tensors the prefix",
        )
    found: dict[str, Tensor] = {}
    for key, tensor in tensors.items():
        name = bare[key].removeprefix(PREFIX)
        if name in found:
            raise FormatError(asked, f"the file holds '{name[:200]}' twice", _REPAIR)
        found[name] = tensor
    return found


def _split(tensors: Mapping[str, Tensor], asked: str) -> tuple[dict[str, _Pair], dict[str, Tensor]]:
    """Complete pairs by path, and the other tensors by key."""
    pairs: dict[str, _Pair] = {}
    rest = {}
    further: dict[str, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        end = next((end for end in _FURTHER if key.endswith(end)), None)
        if end is not None:
            further.setdefault(key.removesuffix(end), {})[_FURTHER[end]] = tensor
            continue
        end = next((end for end in _ENDS if key.endswith(end)), None)
        if end is None:
            rest[key] = tensor
            continue
        side, embedding = _ENDS[end]
        pair = pairs.setdefault(key.removesuffix(end), _Pair(embedding))
        if side in pair.tensors or pair.embedding != embedding:
            raise FormatError(
                asked, f"'{key[:200]}' says a second time what its site's pair is", _REPAIR
            )
        pair.tensors[side] = tensor
    for path, pair in pairs.items():
        if len(pair.tensors) == 1:
            side = "B" if "a" in pair.tensors else "A"
            raise FormatError(f"{asked}, site '{path[:200]}'", f"its {side} is missing", _REPAIR)
        pair.further = further.pop(path, {})
    for path in further:
        raise FormatError(f"{asked}, site '{path[:200]}'", "its A and B are missing", _REPAIR)
    return pairs, rest


_REPAIR = "The file is incomplete or was edited; fetch it again"


# Sites ------------------------------------------------------------------------------------------


def _named(
    module: str,
    paths: Mapping[int, str],
    claims: Claims,
    asked: str,
    tensor_names: Sequence[str] | None,
) -> Iterator[tuple[str, str]]:
    """`(site name, path)` of what is adapted on one module: itself, or some of its parameters."""
    where = f"{asked}, module '{module}'"
    if ".base_layer." in f"{module}.":
        raise FormatError(
            where,
            "it is inside another adapted module, and is not the output projection of an attention",
            "Train it again with this package",
        )
    parameters = _parameters_of(module, claims, tensor_names)
    if not parameters:
        if list(paths) != [0]:
            raise FormatError(
                where, f"{len(paths)} pairs lie on it, and it has no name for them", _REPAIR
            )
        yield module, paths[0]
        return
    if sorted(paths) != list(range(len(parameters))):
        raise FormatError(
            where, f"it has {len(paths)} pairs for its parameters {one_line(parameters)}", _REPAIR
        )
    if len(parameters) > 1 and tensor_names is None:
        raise FormatError(
            where,
            f"the file does not say which pair is whose of {one_line(parameters)}",
            "Load it onto the model, pass tensor_names=list(model.state_dict()), or name the base: "
            "lora-inject inspect ADAPTER --base BASE",
        )
    for depth, name in zip(reversed(range(len(parameters))), parameters, strict=True):
        yield f"{module}.{name}", paths[depth]


def _parameters_of(module: str, claims: Claims, tensor_names: Sequence[str] | None) -> list[str]:
    """Names of the adapted parameters of a module, in the model's order where that is known.

    A target without a module, such as PEFT writes for experts, may be a parameter of any.
    """
    if tensor_names is None and f".{module}".endswith(
        tuple(f".{target}" for target in claims.target_modules)
    ):
        return []
    names = []
    for target in claims.target_parameters:
        place, _, name = target.rpartition(".")
        if place in {"", module} or module.endswith(f".{place}"):
            names.append(name)
    names = list(dict.fromkeys(names))
    if tensor_names is None:
        return names
    position = {name: n for n, name in enumerate(tensor_names)}
    there = [name for name in names if f"{module}.{name}" in position]
    return sorted(there, key=lambda name: position[f"{module}.{name}"])


def _module(found: _Found, claims: Claims) -> SiteSpec:
    """A site on a module; its kind is read off the shapes as far as they go."""
    a, rank = found.A, int(found.A.shape[0])
    if found.rank not in {None, rank}:
        raise FormatError(
            found.where,
            f"its tensors have rank {rank}, adapter_config.json says {found.rank}",
            "Correct 'r' or 'rank_pattern' there; the scale depends on it",
        )
    n_in, n_out = a[0].numel(), int(found.B.shape[0])
    kind, shape = "linear", (n_out, n_in)
    if found.embedding:
        kind, shape = "embedding", (n_in, n_out)
    elif a.ndim > 2:
        kind, shape = "conv", (n_out, *a.shape[1:])
    elif claims.fan_in_fan_out:
        kind, shape = "conv1d", (n_in, n_out)
    return SiteSpec(
        name=found.name,
        kind=kind,
        in_features=n_in,
        out_features=n_out,
        weight_shape=shape,
        rank=rank,
        alpha=found.alpha,
        transposed=kind in {"embedding", "conv1d"},
        scaling=claims.scaling,
        dropout=claims.dropout,
        variant="dora" if claims.dora else "lora",
        lora_bias=claims.lora_bias,
        weight=f"{found.name}.weight",
    )


def _parameter(
    found: _Found, claims: Claims, transposed_modules: Collection[str] | None
) -> SiteSpec:
    """A site on a parameter: one matrix, or a stack of them for experts."""
    a, rank = found.A, found.rank
    if rank is None or a.shape[0] % rank or a.ndim != 2 or found.embedding:
        raise FormatError(
            found.where,
            f"A has {a.shape[0]} rows, which is not a multiple of the rank {rank} in the config",
            "Correct 'r' or 'rank_pattern' in adapter_config.json",
        )
    n_in, n_out, experts = int(a.shape[1]), int(found.B.shape[0]), int(a.shape[0]) // rank
    stacked = experts > 1
    transposed = stacked and _is_transposed(found, claims, transposed_modules)
    matrix = (n_in, n_out) if transposed else (n_out, n_in)
    return SiteSpec(
        name=found.name,
        kind="parameter",
        in_features=n_in,
        out_features=n_out,
        weight_shape=(experts, *matrix) if stacked else matrix,
        rank=rank,
        alpha=found.alpha,
        transposed=transposed,
        experts=experts if stacked else None,
        scaling=claims.scaling,
        weight=found.name,
    )


def _is_transposed(
    found: _Found, claims: Claims, transposed_modules: Collection[str] | None
) -> bool:
    """Whether PEFT took a stack for (experts, in, out).

    Until 0.18 it took every stack so, since then those whose module has `is_transposed`. Of a
    square matrix neither is seen in the file: it names no class, and before 0.18 no version.
    """
    if claims.peft_version is not None and claims.peft_version < (0, 19):
        return True
    width = found.B.shape[0]
    if found.A.shape[-1] == width and None in (transposed_modules, claims.peft_version):
        remedy = (
            "Add the version of PEFT that wrote it to adapter_config.json, as 'peft_version'"
            if claims.peft_version is None
            else "Load it onto the model, pass transposed_modules (the names of the modules that "
            "have is_transposed, or ()), or name the base: lora-inject analyze ADAPTER --base BASE"
        )
        raise FormatError(
            found.where,
            f"its matrices are square ({width}), and the file does not say whether the model "
            "holds them as (out, in) or, as GPT-OSS, as (in, out)",
            remedy,
        )
    return owner(found.name) in (transposed_modules or ())


def _rank_major(b: Tensor, experts: int) -> Tensor:
    """Order the columns of a B that has them by expert first as PEFT does, by rank first."""
    return b.reshape(len(b), experts, -1).permute(0, 2, 1).reshape(b.shape)


# Full tensors -----------------------------------------------------------------------------------


def _full_tensors(
    rest: Mapping[str, Tensor], sites: Mapping[str, SiteState], claims: Claims, asked: str
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Trained tensors and mere copies of the base's, by the base's names."""
    trained: dict[str, Tensor] = {}
    copies: dict[str, Tensor] = {}
    for key, tensor in rest.items():
        name, where = _base_name(key), f"{asked}, '{key[:200]}'"
        is_copy = ".original_module." in f".{key}" or (
            ".base_layer." in f".{key}" and name.rpartition(".")[2] != "bias"
        )
        if not is_copy and not _explained(name, claims):
            _refuse_unknown(key, asked)
        if owner(name) in sites and not is_copy and name == sites[owner(name)].spec.weight:
            raise FormatError(where, "its module has a site as well", _REPAIR)
        target = copies if is_copy else trained
        if name in target and not torch.equal(target[name], tensor):
            raise FormatError(where, "the file holds it twice, unequal", _REPAIR)
        target[name] = tensor
    return trained, copies


def _base_name(key: str) -> str:
    """The base's own name of a tensor: without the wrappers that PEFT puts around modules."""
    name = f".{key}".replace(".modules_to_save.default.", ".")
    for wrapper in (".base_layer.", ".original_module.", ".modules_to_save."):
        while wrapper in name:
            name = name.replace(wrapper, ".")
    return name.removeprefix(".")


def _explained(name: str, claims: Claims) -> bool:
    """Whether the config says that this tensor travels in full."""
    if claims.bias != "none" and name.rpartition(".")[2] == "bias":
        return True
    module = owner(name)
    while module:
        if module.endswith(claims.modules_to_save or ("\0",)):
            return True
        module = owner(module)
    return False


def _refuse_unknown(key: str, asked: str) -> None:
    """A plain tensor may be a resized embedding; one that looks like an adapter's may not."""
    if any(part.startswith("lora_") for part in key.split(".")):
        raise FormatError(
            asked,
            f"the tensor '{key[:200]}' is of no known kind",
            "It belongs to a variant of LoRA that cannot be read; merge it with PEFT",
        )
