"""What the class of a checkpoint says about its tensors: names, ties, kinds and orientations.

The class is built on the meta device, on first use. Ties are the parameters that are one object
there; names are those that transformers gives to a file's tensors when it loads them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch import nn

from lora_inject.checkpoint.index import Checkpoint, changed_config
from lora_inject.core.files.safetensors_file import TensorEntry
from lora_inject.core.layers.kinds import kind_of
from lora_inject.core.spec.inventory import LINEAR_KINDS
from lora_inject.core.spec.names import leaf, parent
from lora_inject.core.spec.sites import Geometry
from lora_inject.errors import CheckpointError
from lora_inject.formats.checkpoint_names import names_on_disk
from lora_inject.formats.live_models import facts_of_model, is_transformers_4
from lora_inject.formats.model_facts import ModelFacts
from lora_inject.formats.older_names import PlaceInClass, places_in_class

UNTIED = {"tie_word_embeddings": False}
"""What `config.json` must contain so that a class loads tied tensors separately."""
MAX_SAID = 300  # characters of another library's message

# What a wrong or unknown config can make a constructor of transformers raise.
_BUILD_ERRORS = (
    *(ArithmeticError, AttributeError, ImportError, LookupError, NotImplementedError),
    *(OSError, RuntimeError, TypeError, ValueError),
)
_REMEDY = "say which tensors are one and the same: --tie ABSENT=STORED, or --tie none"


@dataclass
class BaseClass:
    """The class of a checkpoint, built on first use."""

    checkpoint: Checkpoint
    # ties that the user gives: name of a tensor that the file lacks to the stored one that it
    # equals; None to take those of the class
    given_ties: Mapping[str, str] | None = None

    @property
    def known(self) -> bool:
        """Whether the base says which class it has; a single file without a config is complete."""
        return bool(self.checkpoint.config.get("model_type"))

    @property
    def model(self) -> Any:
        """The class on the meta device; raises `CheckpointError` if it cannot be built."""
        if isinstance(self._built, CheckpointError):
            raise self._built
        return self._built

    @cached_property
    def _built(self) -> Any:
        asked = f"ask the class of '{self.checkpoint.folder}' what its tensors are"
        try:
            return meta_model(self.checkpoint.config, asked, _REMEDY)
        except CheckpointError as error:
            return error

    def __call__(self, name: str) -> str:
        """Return the file's name of a tensor, given any name of it that the class knows.

        A tensor that the file lacks has the name of the class, under which the class loads it.
        """
        place = self.place_of(name)
        if place is not None and place in self._table:
            return self._table[place]
        is_whole = place is not None and place.expert is None and place.name in self._shapes
        return place.name if place is not None and is_whole else name

    def place_of(self, name: str) -> PlaceInClass | None:
        """Return where a tensor is in the class, by its name in a file of any age."""
        return PlaceInClass(name) if name in self._shapes else self._places(name)

    def has(self, name: str) -> bool:
        """Whether the class has a tensor, whole or as a part of a stack; False if none is built."""
        if not self.known or isinstance(self._built, CheckpointError):
            return False
        place = self.place_of(name)
        return place is not None and place.name in self._shapes

    def separate(self, name: str) -> list[list[str]]:
        """Return the file's names of the matrices of a stack that it stores separately.

        For each expert these are the names whose rows follow each other; empty if there are none.
        """
        mine = self.place_of(name)
        parts_of = {} if mine is None else self._stacks.get(mine.name, {})
        return [[of[part] for part in sorted(of)] for _, of in sorted(parts_of.items())]

    def facts(self, *, bare: bool = False) -> ModelFacts:
        """Return what formats need to know; without a class what the files say, or the config.

        Where there are no files, they are those that the class would write. `bare` adds the names
        without the class's prefix, as an adapter may have them.
        """
        if not self.known or isinstance(self._built, CheckpointError):
            config = ModelFacts(config=self.checkpoint.config or None)
            return self.checkpoint.facts if self.checkpoint.shards else config
        if not self.checkpoint.shards:
            tensors = names_on_disk(self.model).items()
            shown = {name: TensorEntry(name, "F32", shape, 0, 0) for name, shape in tensors}
            self.checkpoint = replace(self.checkpoint, shown=shown)
        inner, modules = f"{self.model.base_model_prefix}.", self.model.named_modules
        named: list[dict[str, Any]] = [dict(modules(remove_duplicate=False)), {**self._shapes}]
        for each in named if bare else ():
            each |= {n.removeprefix(inner): v for n, v in each.items() if n.startswith(inner)}
        return replace(facts_of_model(self.model, *named), separate=self.separate)

    @cached_property
    def ties(self) -> tuple[frozenset[str], ...]:
        """Groups of tensors that are one tensor, by their names in the file."""
        if self.given_ties is not None:
            return tuple(frozenset(pair) for pair in self.given_ties.items())
        return tuple(_groups(self.model, self)) if self.known else ()

    @cached_property
    def inseparable(self) -> frozenset[str]:
        """Tensors that stay tied whatever the config says, such as those of T5.

        On transformers 4 those of every encoder-decoder: the same entry scales the outputs of T5,
        and leaves the embeddings of Bart's encoder and decoder without values.
        """
        if self.given_ties is not None or not self.known:
            return frozenset()
        if is_transformers_4() and self.model.config.is_encoder_decoder:
            return frozenset().union(*self.ties)
        apart = changed_config(self.checkpoint.config, UNTIED)
        model = meta_model(apart, f"untie tensors of '{self.checkpoint.folder}'", _REMEDY)
        return frozenset(name for group in _groups(model, self) for name in group)

    def tie_of(self, name: str) -> frozenset[str]:
        """Return the names of the tensors that are tied to this one; empty if there are none."""
        return next((group for group in self.ties if name in group), frozenset())

    def source_of(self, name: str) -> str | None:
        """Return the stored tensor that an absent tensor equals, or None."""
        there = self.checkpoint.tensors
        return next((other for other in sorted(self.tie_of(name)) if other in there), None)

    @property
    def ends(self) -> frozenset[str]:
        """The file's names of the word embeddings and of the output head."""
        model = self.model
        modules = [model.get_input_embeddings(), model.get_output_embeddings()]
        weights = {id(m.weight) for m in modules if m is not None and hasattr(m, "weight")}
        names = model.named_parameters(remove_duplicate=False)
        return frozenset(self(name) for name, p in names if id(p) in weights)

    def module_of(self, name: str) -> nn.Module | None:
        """Return the module that holds a tensor of the file; None if the class has none."""
        return self._modules.get(parent(self._mine.get(name, name)))

    def layer_of(self, name: str) -> tuple[str, Geometry] | None:
        """Return the kind of layer whose weight a tensor is, and its shapes, as `inject` has them.

        None for what is no layer's weight, such as a router's or a stack of experts.
        """
        module = self.module_of(name)
        kind = None if module is None else kind_of(type(module))
        mine = leaf(self._mine.get(name, name))
        if module is None or kind is None or mine != kind.weight_of(type(module)):
            return None
        return kind.kind, kind.geometry(module)

    def transposed(self, name: str) -> bool | None:
        """Return whether a matrix is stored as `(in, out)`; None if the class does not say."""
        layer, module = self.layer_of(name), self.module_of(name)
        if layer is not None:
            return layer[1].transposed if layer[0] in LINEAR_KINDS else None
        stated = getattr(module, "is_transposed", None)  # of transformers' stacks of experts
        return None if stated is None else bool(stated)

    def stack_transposed(self, name: str) -> bool:
        """Return whether experts are stored as `(in, out)`; not if their class is silent.

        Every class of transformers 4 is, and then it is an error.
        """
        said = self.transposed(name)
        if said is None and is_transformers_4():
            problem = "transformers 4 does not say which side of experts is the input"
            raise CheckpointError(f"ask how '{name}' is stored", problem, "Upgrade it to 5")
        return bool(said)

    @cached_property
    def _modules(self) -> dict[str, nn.Module]:
        return dict(self.model.named_modules(remove_duplicate=False))

    @cached_property
    def _shapes(self) -> dict[str, Any]:
        return dict(self.model.state_dict())

    @cached_property
    def _places(self) -> Callable[[str], PlaceInClass | None]:
        return places_in_class(self.model, self._shapes)

    @cached_property
    def _table(self) -> dict[PlaceInClass, str]:
        """Place in the class to the name in the file, for every tensor that both have."""
        table = {}
        for name in self.checkpoint.tensors:
            place = self._places(name)
            if place is not None and place.name in self._shapes:
                table[place] = name
            elif name in self._shapes:
                table[PlaceInClass(name)] = name
        return table

    @cached_property
    def _stacks(self) -> dict[str, dict[int, dict[int, str]]]:
        """Name of a stack in the class to its experts to their parts: the names in the files."""
        stacks: dict[str, dict[int, dict[int, str]]] = {}
        for place, theirs in self._table.items():
            if place.expert is not None:
                stacks.setdefault(place.name, {}).setdefault(place.expert, {})[place.part] = theirs
        return stacks

    @cached_property
    def _mine(self) -> dict[str, str]:
        names = self._table.items()  # one expert of a stack is no module's
        return {theirs: place.name for place, theirs in names if place.expert is None}


def _groups(model: nn.Module, rule: BaseClass) -> Iterator[frozenset[str]]:
    """Yield the file's names of tensors that are one object in a model."""
    groups: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        groups.setdefault(id(parameter), []).append(name)
    yield from (frozenset(map(rule, names)) for names in groups.values() if len(names) > 1)


def meta_model(config: Mapping[str, Any], asked: str, remedy: str) -> nn.Module:
    """Build a model of transformers without its weights, of a `config.json` as parsed.

    The class is the one that the config names, else the one for its `model_type`. The error says
    what the class was needed for (`asked`) and what to do (`remedy`).
    """
    try:
        import transformers as library
        from huggingface_hub import errors
    except ImportError:
        problem = "transformers is not installed"
        raise CheckpointError(
            asked, problem, f"Run pip install transformers, or {remedy}"
        ) from None
    transformers: Any = library
    refused: Any = errors.StrictDataclassError
    verbosity = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_error()
    # Private keys of a downloaded config made older versions fetch and run code.
    plain = {key: value for key, value in config.items() if not key.startswith("_")}
    plain.pop("quantization_config", None)
    try:
        known = _architecture(transformers, plain)
        made = _config_class(transformers, known, str(plain.get("model_type"))).from_dict(plain)
        with torch.device("meta"):
            if known is None:
                model = transformers.AutoModel.from_config(made, trust_remote_code=False)
            else:
                build = getattr(known, "_from_config", None)
                eager = {"attn_implementation": "eager"}
                model = known(made) if build is None else build(made, **eager)
    except (*_BUILD_ERRORS, refused) as error:
        said = " ".join(str(error).split()) or type(error).__name__
        said = said if len(said) <= MAX_SAID else f"{said[:MAX_SAID]}..."
        problem = f"transformers {transformers.__version__} cannot build it: {said.rstrip('.')}"
        raise CheckpointError(asked, problem, f"Upgrade transformers, or {remedy}") from error
    finally:
        transformers.logging.set_verbosity(verbosity)
    model.tie_weights()  # transformers 5.0 leaves that out on the meta device
    assert isinstance(model, nn.Module)
    return model


def _config_class(transformers: Any, known: Any, model_type: str) -> Any:
    """Return the class of a config: of its `model_type`, or the one that the architecture says.

    A part of a larger model, such as Bark's, has a type that is in no list.
    """
    if model_type in transformers.CONFIG_MAPPING:
        return transformers.CONFIG_MAPPING[model_type]
    if known is None or known.config_class.model_type != model_type:
        raise ValueError(f"it does not know the model type {model_type!r}")
    return known.config_class


def _architecture(transformers: Any, config: Mapping[str, Any]) -> Any:
    """Return the first class of transformers that the config names, else None."""
    names = config.get("architectures")
    for name in names if isinstance(names, list) else ():
        known = getattr(transformers, str(name), None)
        if isinstance(known, type) and issubclass(known, transformers.PreTrainedModel):
            return known
    return None
