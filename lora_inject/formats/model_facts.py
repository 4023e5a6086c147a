"""Facts about an adapter's model that files depend on, as one value for all formats."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from lora_inject.core.spec.names import leaf, parent
from lora_inject.errors import FormatError

CONVERT = "Convert it with its base: lora-inject convert ADAPTER OUT --to FORMAT --base BASE"

_NO_CONFIG = f"{CONVERT} (in Python, pass config=, what its config.json holds)"


class NotKnownError(FormatError):
    """A fact of the model decides what a file means, and it is not known."""


class Heads(NamedTuple):
    """Sizes of a decoder: q has the rows of `n_heads` heads, k and v of `n_kv_heads`."""

    n_heads: int
    n_kv_heads: int
    head_dim: int


@dataclass(frozen=True)
class ModelFacts:
    """Facts about a model; None is an unknown fact, and each format uses those that it needs.

    Every function that reads or writes adapters also takes each fact as a keyword.

    Attributes:
        module_names: Names of all modules. In kohya's names dots are lost; PEFT would take some
            names for other modules too, which is then avoided by one anchored expression.
        tensor_names: Names of the state dict, in order. Files of others with two adapted
            parameters on one module do not hold their names; trained tensors that make up whole
            modules are PEFT's `modules_to_save`.
        transposed_modules: Names of the modules that have transformers' `is_transposed`, which hold
            their experts as (experts, in, out): needed to read stacks of square experts in files of
            others, whose class the file does not name. In writing None means: as the sites say.
        orientation_known: Whether the model's classes say so, which those of transformers 4 do not.
        expert_names: Last parts of names that PEFT takes for experts in this model; linear layers
            called so are written as `target_parameters`, with the same tensors.
        config: The contents of its config.json: kind, heads, ties.
        language_model: Names of the language model inside one of several parts, and of its head;
            None if there is no other part, or it is not known.
        base_model: Its name or path, for the config and the model card.
        task_type: PEFT's task type, such as `CAUSAL_LM`.
        idle: For the card: sites and trained tensors of the adapter that no forward had used.
        notes: For the card: what a reader should know of the choice of sites, in sentences.
        unfit: For the name of a module: why PEFT's layers cannot stand in its place, or "".
        separate: For the name of a stack of experts that the base's files hold apart: for each
            expert the names of its matrices there.
    """

    module_names: Collection[str] | None = None
    tensor_names: Sequence[str] | None = None
    transposed_modules: Collection[str] | None = None
    orientation_known: bool = True
    expert_names: Collection[str] = ()
    config: Mapping[str, Any] | None = None
    language_model: Collection[str] | None = None
    base_model: str | None = None
    task_type: str | None = None
    idle: Sequence[str] = ()
    notes: Sequence[str] = ()
    unfit: Callable[[str], str] | None = None
    separate: Callable[[str], Sequence[Sequence[str]]] | None = None

    def modules_in_files(self) -> Collection[str] | None:
        """Return the names of all modules, and those of single experts in the base's files."""
        if self.module_names is None or self.separate is None:
            return self.module_names
        stacks = [name for name in self.tensor_names or () if leaf(parent(name)) == "experts"]
        parts = (part for stack in stacks for parts in self.separate(stack) for part in parts)
        return {*self.module_names, *(part.removesuffix(".weight") for part in parts)}

    def text_config(self, why: str) -> Mapping[str, Any]:
        """Return the config of the language model, which may be nested; `why` it is needed."""
        if not self.config:
            problem = f"the base's config is not given, and it decides {why}"
            raise NotKnownError("", problem, _NO_CONFIG)
        inner = self.config.get("text_config")
        return {**self.config, **inner} if isinstance(inner, Mapping) else self.config

    def model_type(self, known: Collection[str], why: str, others: str = "") -> str:
        """Return the `model_type`, one of `known`; `others` is the remedy for others."""
        kind = str(self.text_config(why).get("model_type"))
        if kind not in known:
            problem = f"the base's model_type is {kind[:40]!r}"
            raise FormatError("", problem, f"Supported are {', '.join(known)}{others}")
        return kind

    def heads(self, why: str) -> Heads:
        """Return the sizes that permutations depend on."""
        config = self.text_config(why)

        def size(field: str) -> int:
            value = config.get(field)
            if type(value) is not int or not 0 < value < 1 << 30:
                problem = f"{field!r} of the base's config is {str(value)[:40]!r}"
                raise FormatError("", problem, _NO_CONFIG)
            return value

        n_heads = size("num_attention_heads")
        grouped = config.get("num_key_value_heads") is not None
        given = config.get("head_dim") is not None
        head_dim = size("head_dim") if given else size("hidden_size") // n_heads
        return Heads(n_heads, size("num_key_value_heads") if grouped else n_heads, head_dim)

    def refuse_tied(self, name: str, client: str) -> None:
        """Refuse a site on an embedding or a head that the client holds as one tensor.

        In that client the update of one would change the other as well.
        """
        config = self.text_config("whether the embedding and the head are tied")
        tied, where = config.get("tie_word_embeddings"), f"site '{name}'"
        if tied:
            problem = f"{client} holds the embedding and the head of this base as one tensor"
            remedy = "Merge the adapter into the base (lora-inject merge), or leave that site out"
            raise FormatError(where, problem, remedy)
        if tied is not False:
            problem = "the config does not say whether the embedding and the head are tied"
            raise FormatError(where, problem, _NO_CONFIG)


Stated = ModelFacts | Callable[[], ModelFacts] | None
"""Facts, or a function that says them where a format asks."""
