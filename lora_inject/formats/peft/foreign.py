"""PEFT folders that others wrote: PEFT itself, transformers, unsloth, trainers.

The names of the tensors say which sites there are, their shapes the ranks and widths; the config is
asked only for what tensors cannot say (alpha, rsLoRA, and for stacked experts the rank), and must
not contradict them. A two-dimensional pair is assumed to be a linear layer's (`conv1d` where the
config says fan_in_fan_out); loading onto a model replaces the assumption by what the model has.

Source: peft 0.12 to 0.21, utils/save_and_load.py.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor

from lora_inject.core.adapter.file_keys import one_line
from lora_inject.core.adapter.site_state import SiteState
from lora_inject.core.adapter.state import AdapterState
from lora_inject.core.spec.names import around, canonical, first_number, joined, leaf, parent
from lora_inject.core.spec.sites import SiteSpec
from lora_inject.errors import FormatError, within
from lora_inject.formats.model_facts import CONVERT, ModelFacts, NotKnownError
from lora_inject.formats.pairs import by_module, check_shapes, plain_site
from lora_inject.formats.peft.fields import LAYOUTS_OF_B, LoraFields
from lora_inject.formats.peft.name_patterns import ends
from lora_inject.formats.peft.tensor_layout import PREFIX, ROWS, parsed, unpack

_MERGE = "Merge it with PEFT, or train it again with this package"
_REPAIR = "The file is incomplete or was edited; fetch it again"

# The adapter's name, which some programs leave in.
_DEFAULT = re.compile(
    r"((?<![^.])(?:lora_(?:embedding_)?[AB]|lora_magnitude_vector|trainable_tokens_delta"
    r"|modules_to_save))\.default(?![^.])"
)
# What PEFT puts around a module: the original inside its wrapper, or next to a trained copy.
_AROUND = re.compile(r"(?<![^.])(?:base_layer|original_module|modules_to_save)\.")
_OUT_PROJ = ".base_layer.out_proj"  # of an nn.MultiheadAttention


class _Place(NamedTuple):
    """A site as the names say it, a module or a parameter of one, and its path in the file.

    The config speaks of it as `called`: of both projections of an nn.MultiheadAttention by its
    name, else by the site's.
    """

    name: str
    module: str
    path: str
    called: str


@dataclass(frozen=True)
class Foreign:
    """How to read a PEFT file of others: the config's fields, and what `folder.read` is told."""

    fields: LoraFields
    facts: ModelFacts
    any_target: bool = False
    of_unsloth: bool = False

    def read(self, tensors: Mapping[str, Tensor]) -> AdapterState:
        """Return the adapter of a file's tensors, without a config and a fingerprint."""
        rest = _with_plain_keys(tensors)
        roles = {key: found for key in rest if (found := parsed(key))}
        of_sites = {key: rest.pop(key) for key in roles}
        parts = by_module(of_sites, roles.__getitem__) if of_sites else {}
        embeddings = _embeddings(roles)
        rows = self._rows(rest)
        places = [*self._places(parts)]
        self._check_targets([p.called for p in places if p.called == p.module])
        numbers = self.fields.numbers([place.called for place in places])
        sites: dict[str, SiteState] = {}
        for place in places:
            if place.name in sites:
                raise _error(f"site '{place.name}'", "two of its pairs are of this one")
            embeds, of = place.path in embeddings, parts[place.path]
            sites[place.name] = self._site(place, of, *numbers[place.called], embeds)
        trained, copies = self._full_tensors(rest, sites)
        trained |= {name: tensor for name, (tensor, _) in rows.items()}
        self._check_saved(trained)
        numbers_of_rows = {name: indices for name, (_, indices) in rows.items()}
        return AdapterState(sites, trained, base_copies=copies, rows=numbers_of_rows, layers="PEFT")

    def _check_targets(self, modules: Collection[str]) -> None:
        """Refuse tensors of modules that the config does not target, which PEFT ignores.

        With `ensure_weight_tying` it adapts the other end of a tie, too, which is in no list of
        layers, and which the config need not name.
        """
        for name, said in self.fields.left_out(() if self.any_target else modules):
            is_an_end = self.fields.ensure_weight_tying and first_number(name) is None
            if said == "target_modules" and is_an_end:
                continue
            problem = f"PEFT ignores its tensors: {said!r} of adapter_config.json leaves it out"
            remedy = "Restore that field, or read them all the same: allow=['target_modules']"
            raise _error(f"module '{name[:200]}'", problem, remedy)

    def _check_saved(self, trained: Collection[str]) -> None:
        """Refuse modules that the config keeps whole, and of which the file has nothing."""
        there, known = around(trained), around(self.facts.tensor_names or ())
        for saved in self.fields.modules_to_save:
            missing = [module for module in known if module.endswith(saved)]
            if missing and not any(module.endswith(saved) for module in there):
                problem = f"the file lacks its tensors, and 'modules_to_save' has {saved!r}"
                raise _error(f"module '{missing[0]}'", problem)

    # Names ------------------------------------------------------------------------------------

    def _places(self, paths: Collection[str]) -> Iterator[_Place]:
        """Yield what is adapted on each module: itself, or some of its parameters.

        A module with several adapted parameters has a wrapper for each, of which the first
        parameter's is the innermost, so that its path has the most `.base_layer`.
        """
        paths_of: dict[str, list[str]] = defaultdict(list)
        for path in paths:
            module = path
            while module.endswith(".base_layer") and module not in self._modules:
                module = module.removesuffix(".base_layer")
            paths_of[module].append(path)
        for module, given in paths_of.items():
            if (attention := self._attention_of(module, paths_of)) and len(given) == 1:
                part = "in_proj_weight" if module == attention else "out_proj"
                yield _Place(joined(attention, part), attention, given[0], attention)
                continue
            names = self._names(module)
            wrappers = [module + ".base_layer" * depth for depth in reversed(range(len(names)))]
            if {*wrappers} != {*given}:
                problem = f"its pairs at {one_line(given)} are not those of {one_line(names)}"
                raise _error(f"module '{module[:200]}'", problem)
            for name, path in zip(names, wrappers, strict=True):
                yield _Place(name, module, path, name)

    def _attention_of(self, module: str, modules: Collection[str]) -> str | None:
        """Return the nn.MultiheadAttention that PEFT adapts at a module: by both projections."""
        attention = module.removesuffix(_OUT_PROJ)
        if attention not in modules or attention + _OUT_PROJ not in modules:
            return None
        if any(leaf(target) == "in_proj_weight" for target in self.fields.target_parameters):
            return None
        if (self.fields.version or (0, 0)) > (0, 21):
            problem = "PEFT up to 0.21 computes with W + 2 delta of an attention's output "
            problem += "projection, and the file is of a later one ('peft_version')"
            raise _error(f"module '{attention[:200]}'", problem, "Save it again with PEFT 0.21.2")
        return attention

    def _names(self, module: str) -> list[str]:
        """The sites of a module: its own name, or those of its parameters in the model's order."""
        where, known = f"module '{module[:200]}'", self.facts.tensor_names
        if ".base_layer." in module and module not in self._modules:
            problem = "it is inside another adapted module, which is no nn.MultiheadAttention"
            raise _error(where, problem, _MERGE)
        listed = self.fields.target_modules
        if known is None and isinstance(listed, list) and not {*listed}.isdisjoint(ends(module)):
            return [module]
        # A target without a module, such as PEFT writes for experts, may be a parameter of any.
        names = list(dict.fromkeys(
            joined(module, leaf(target))
            for target in self.fields.target_parameters
            if not parent(target) or parent(target) in ends(module)
        ))  # fmt: skip
        if known is not None:
            names = sorted((n for n in names if n in self._position), key=self._position.get)  # type: ignore[arg-type]
        elif len(names) > 1:
            problem = f"the file does not say which pair is whose of {one_line(map(leaf, names))}"
            remedy = f"{CONVERT} (in Python, load it onto the model, or pass its tensor_names=)"
            raise NotKnownError(where, problem, remedy)
        return names or [module]

    @cached_property
    def _modules(self) -> frozenset[str]:
        return frozenset(self.facts.module_names or ())

    @cached_property
    def _position(self) -> dict[str, int]:
        return {name: place for place, name in enumerate(self.facts.tensor_names or ())}

    # Sites ------------------------------------------------------------------------------------

    def _site(
        self, place: _Place, of: Mapping[str, Tensor], rank: int | None, alpha: float, embeds: bool
    ) -> SiteState:
        """Return a site with the numbers that the config claims; shapes say the rest."""
        where, fields, a, b = f"site '{place.name}'", self.fields, of["A"], of["B"]
        of_module, of_attention = place.called == place.module, place.called != place.name
        with within(where):
            self._check_further(of)
            check_shapes(a, b)
            rank = len(a) if rank is None and of_module else rank
            if rank is None or (len(a) != rank if of_module else len(a) % rank):
                problem = f"its tensors have rank {len(a)}, adapter_config.json says rank {rank}"
                remedy = "Correct 'r' or 'rank_pattern' there; the scale depends on it"
                raise _error("", problem, remedy)
            if not of_module and (a.ndim != 2 or embeds):
                raise _error("", "its pair is not of a parameter, which the config says it is")
            if of_attention and fields.lora_bias:
                problem = "PEFT ignores a bias of lora_B in an nn.MultiheadAttention"
                raise _error("", problem, _MERGE)
            if not of_module or (of_attention and leaf(place.name) == "in_proj_weight"):
                return self._parameter(place.name, a, b, rank, alpha)
        kind = "conv1d" if fields.fan_in_fan_out and not of_attention else "linear"
        spec = replace(
            plain_site(place.name, a, b, alpha, "embedding" if embeds else kind).spec,
            scaling=fields.scaling,
            dropout=fields.lora_dropout,
            variant="dora" if fields.use_dora else "lora",
            lora_bias=fields.lora_bias,
            update="weight" if of_attention else "forward",
        )
        # PEFT computes with W + 2 delta of an attention's output projection.
        return unpack(spec, {**of, "B": 2 * b} if of_attention else of)

    def _check_further(self, of: Mapping[str, Tensor]) -> None:
        for role, said, claim, what in (
            ("m", self.fields.use_dora, "use_dora", "DoRA magnitude"),
            ("b", self.fields.lora_bias, "lora_bias", "bias of lora_B"),
        ):
            if said != (role in of):
                has = f"no {what}, which '{claim}' asks for" if said else f"a {what}"
                raise _error("", f"it has {has}")

    def _parameter(self, name: str, a: Tensor, b: Tensor, rank: int, alpha: float) -> SiteState:
        """Return a site on a parameter: one matrix, or a stack of them for experts."""
        n_in, n_out = a.shape[1], len(b)
        experts = len(a) // rank if len(a) > rank else None
        transposed = experts is not None and self._is_transposed(name, n_in, n_out)
        matrix = (n_in, n_out) if transposed else (n_out, n_in)
        spec = SiteSpec(
            name=name,
            kind="parameter",
            in_features=n_in,
            out_features=n_out,
            weight_shape=matrix if experts is None else (experts, *matrix),
            rank=rank,
            alpha=alpha,
            transposed=transposed,
            experts=experts,
            scaling=self.fields.scaling,
            weight=name,
        )
        if experts and self._by_expert():  # PEFT orders the columns by rank first
            b = b.reshape(n_out, experts, -1).permute(0, 2, 1).reshape(b.shape)
        return unpack(spec, {"A": a, "B": b})

    def _by_expert(self) -> bool:
        """Whether a stacked B has its columns by expert, as the file says."""
        said = self.fields.lora_B_layout
        if said is None and self.of_unsloth:
            problem = "its file is of unsloth and does not say how the columns of B are ordered"
            remedy = "Add 'lora_B_layout' to adapter_config.json: 'grouped_by_expert' if it was "
            remedy += "written before 2026-09-17, else 'rank_major'"
            raise _error("", problem, remedy)
        return said == LAYOUTS_OF_B[1]

    def _is_transposed(self, name: str, n_in: int, n_out: int) -> bool:
        """Whether PEFT took a stack for (experts, in, out).

        Of a square matrix it is not seen in the file: it names no class, and before 0.18 no
        version.
        """
        version = self.fields.version
        modules = self.facts.transposed_modules if self.facts.orientation_known else None
        if self.fields.takes_every_stack_turned:
            return True
        if n_in == n_out and None in (modules, version):
            problem = f"its matrices are square ({n_in}), and the file does not say whether the "
            problem += "model holds them as (out, in) or, as GPT-OSS, as (in, out)"
            remedy = "Add the version of PEFT that wrote it there, as 'peft_version'"
            if version is not None:
                remedy = f"{CONVERT} (in Python, load it onto the model, or pass "
                remedy += "transposed_modules=, the names of the modules that have is_transposed)"
            raise NotKnownError("", problem, remedy)
        return parent(name) in (modules or ())

    # Full tensors -----------------------------------------------------------------------------

    def _rows(self, rest: dict[str, Tensor]) -> dict[str, tuple[Tensor, tuple[int, ...]]]:
        """Take the tensors that replace rows of the base out of others, by the base's names."""
        said = self.fields.trainable_token_indices
        claimed = said if isinstance(said, dict) else {"": said}
        found: dict[str, tuple[Tensor, tuple[int, ...]]] = {}
        for key in [key for key in rest if key.endswith(f".{ROWS}")]:
            tensor, path = rest.pop(key), key.removesuffix(f".{ROWS}")
            known = {"", *ends(path)}
            rows_of_end = [rows for end, rows in claimed.items() if end in known]
            if len(rows_of_end) != 1 or tensor.dim() != 2 or len(tensor) != len(rows_of_end[0]):
                what = "the config does not say which rows it replaces"
                remedy = "Restore 'trainable_token_indices' in adapter_config.json"
                raise _error(f"'{key[:200]}'", what, remedy)
            found[f"{path}.weight"] = tensor, tuple(rows_of_end[0])
        if said and not found:
            raise _error("", "it lacks the rows of 'trainable_token_indices'")
        return found

    def _full_tensors(
        self, rest: Mapping[str, Tensor], sites: Mapping[str, SiteState]
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Return trained tensors and mere copies of the base's, by the base's names."""
        trained: dict[str, Tensor] = {}
        copies: dict[str, Tensor] = {}
        for key, tensor in rest.items():
            name, where = _AROUND.sub("", key), f"'{key[:200]}'"
            *outer, last = key.split(".")
            is_copy = "original_module" in outer or ("base_layer" in outer and last != "bias")
            # A plain tensor may be a resized embedding; one that looks like an adapter's may not.
            if not is_copy and self._of_adapter(key):
                remedy = "It belongs to a variant of LoRA that cannot be read; merge it with PEFT"
                raise _error("", f"the tensor {where} is of no known kind", remedy)
            site = None if is_copy else sites.get(parent(name))
            if site is not None and name == site.spec.weight:
                raise _error(where, "its module has a site as well")
            target = copies if is_copy else trained
            if name in target and not torch.equal(target[name], tensor):
                raise _error(where, "the file holds it twice, unequal")
            target[name] = tensor
        return trained, copies

    def _of_adapter(self, key: str) -> bool:
        """Whether a tensor looks like an adapter's, and the config does not keep it in full."""
        name, saved = _AROUND.sub("", key), tuple(self.fields.modules_to_save)
        of_bias = self.fields.bias != "none" and leaf(name) == "bias"
        kept = of_bias or any(module.endswith(saved) for module in around([name]))
        return not kept and any(part.startswith("lora_") for part in key.split("."))


def _embeddings(roles: Mapping[str, tuple[str, str]]) -> set[str]:
    """Return the paths whose A and B are an embedding's, which have keys of their own."""
    factors = {key: path for key, (path, role) in roles.items() if role in "AB"}
    embeds = {path for key, path in factors.items() if leaf(key).startswith("lora_embedding_")}
    for key, path in factors.items():
        if path in embeds and leaf(key) == "weight":
            raise _error(f"module '{path[:200]}'", "its pairs are of a layer and of an embedding")
    return embeds


def _with_plain_keys(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return tensors by keys without PEFT's prefix and the adapter's name.

    All keys have the prefix, or none has: transformers and diffusers leave it out.
    """
    plain: dict[str, Tensor] = {}
    bare = {key: canonical(key) for key in tensors}
    without = [key for key in bare.values() if not key.startswith(PREFIX)]
    if without and len(without) < len(tensors):
        what = f"'{without[0][:200]}' does not begin with '{PREFIX}' as other tensors do"
        remedy = "The file was put together by hand; give all tensors the prefix"
        raise _error("", what, remedy)
    for key, tensor in tensors.items():
        name = bare[key].removeprefix(PREFIX)
        name = _DEFAULT.sub(r"\1", name) if ".default" in name else name
        # PEFT omits this end: until 0.12 a magnitude was a plain Parameter.
        if name.endswith(".lora_magnitude_vector.weight"):
            name = name.removesuffix(".weight")
        if name in plain:
            raise _error("", f"the file holds '{name[:200]}' a second time")
        plain[name] = tensor
    return plain


def _error(place: str, problem: str, remedy: str = _REPAIR) -> FormatError:
    return FormatError(place, problem, remedy)
