"""Methods of a model of transformers or diffusers that mean something else while it has adapters.

`save_pretrained` writes the adapters, as PEFT's does: the library would write the base with extra
keys, which `from_pretrained` drops. Trainer's `save_model` and `push_to_hub` call this method, so
they write the adapters as well. Methods that would drop adapters with the layers that they replace
are refused: `resize_token_embeddings` where it meets one, and `dequantize`. So are methods that
look for layers of PEFT: they would do nothing, or put a second adapter over ours.
What stands in for a method is an attribute of the instance; copies and pickles keep it. So is
`_hf_peft_config_loaded`, without which Trainer refuses a quantized model: what transformers' own
adapter mixin sets (`transformers/trainer_utils.py: validate_quantization_for_training`).
"""

from __future__ import annotations

import os
import re
import weakref
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, NoReturn

import safetensors.torch
from torch import Tensor, nn

from lora_inject.core.files.atomic import explained, replace_file
from lora_inject.core.layers.attached import attached_to
from lora_inject.core.layers.library import Library, loaded_libraries
from lora_inject.core.layers.selection import ENTERED
from lora_inject.core.layers.state_dict import FORMS
from lora_inject.core.layers.survey import Survey, base_parameters, table_of
from lora_inject.core.model.save import saved_state
from lora_inject.core.roots.root import Injected, adapted_modules, root_of
from lora_inject.core.spec.names import leaf
from lora_inject.errors import LayerError, LoraInjectError, StateError, user_path
from lora_inject.formats.card import joined_cards
from lora_inject.formats.exchange import content_of
from lora_inject.integrations.peft_names import OURS_FOR

SAVE, RESIZE, DEQUANTIZE = "save_pretrained", "resize_token_embeddings", "dequantize"
CARD = "create_or_update_model_card"
THREAD = "init_continuous_batching"  # transformers' generate_batch
LOADED = "_hf_peft_config_loaded"
_README = "README.md"
# As true as True, and says whose it is: what transformers' own mixin has set is left alone.
OURS = "lora_inject"
CHECKPOINT = re.compile(r"checkpoint-\d+")  # transformers.trainer_utils.PREFIX_CHECKPOINT_DIR
# What transformers and diffusers ask of the files of a base; those of an adapter have no choice.
_OF_A_BASE = {"distributed_checkpoint", "max_shard_size", "safe_serialization", "save_function"}
_OF_A_BASE |= {"save_original_format", "save_peft_format", "token", "use_flashpack", "variant"}


class _StandIn:
    """Stands in for a method of a model, without holding the model, which holds it."""

    def __init__(self, model: nn.Module, method: str) -> None:
        self._model, self.method = weakref.ref(model), method

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_model": self._model()}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, _model=weakref.ref(state["_model"]))

    @property
    def model(self) -> nn.Module:
        """The model.

        Raises:
            StateError: It is gone, as in `load_adapter(make(), path).save_pretrained(out)`.
        """
        if (model := self._model()) is None:
            problem = "the model is no longer in memory"
            raise StateError(self.method, problem, "Keep it in a variable")
        return model


class _SaveAdapters(_StandIn):
    """The replacement of `save_pretrained`.

    `format` is a row of `formats.FORMATS`, `unused` as in `save_adapter`.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__(model, SAVE)
        self.format, self.unused = "peft", ()

    def __call__(
        self,
        save_directory: str | os.PathLike[str],
        is_main_process: bool = True,
        state_dict: Mapping[str, Tensor] | None = None,
        push_to_hub: bool = False,
        **options: Any,
    ) -> None:
        """Write each adapter as a PEFT folder.

        The only adapter, or else the one named `default`, is written to `save_directory`, every
        other into a folder of its name inside, as with PEFT. The tensors of `state_dict` stand in
        for those of which this process holds a shard. A README.md of somebody else stays.

        In a folder named `checkpoint-N` they are also written in the form that Trainer resumes
        from; it would silently ignore others (`Trainer._load_from_checkpoint`).
        """
        if push_to_hub:
            problem = "an adapted model takes no push_to_hub=True"
            raise StateError(SAVE, problem, "Call model.push_to_hub(repo_id)")
        if unknown := sorted(options.keys() - _OF_A_BASE):
            problem = f"an adapted model takes no {unknown[0]}"
            raise StateError(SAVE, problem, "Call save_adapter(model, path, name)")
        place = user_path(SAVE, save_directory)
        survey, given = Injected(self.model, SAVE), state_dict or {}
        files = adapter_files(survey, self.format, self.unused, given)
        if not is_main_process:
            return
        write_files(place, files)
        if CHECKPOINT.fullmatch(place.name):
            tensors = {
                key: given.get(key, tensor).detach().to("cpu", copy=True).contiguous()
                for key, tensor in adapter_tensors(survey).items()
            }
            data = safetensors.torch.save(tensors, {"format": "pt"})
            replace_file(place / "model.safetensors", data)

    def card(self, output_dir: str | os.PathLike[str]) -> None:
        """Merge our card into the one that Trainer wrote over it, as PEFT's models do.

        Trainer calls it by this name if the card of a folder names PEFT as its library
        (`Trainer.create_model_card`).
        """
        path = Path(output_dir, _README)
        ours = adapter_files(Injected(self.model, SAVE), "peft", self.unused)[_README]
        replace_file(path, joined_cards(path.read_text("utf-8"), ours.decode()).encode())


def folders_of(survey: Injected) -> dict[str, str]:
    """Return the folder of each adapter inside the one that a model is saved to.

    Raises:
        StateError: The name of an adapter is not that of a folder.
    """
    names = sorted(survey.root.adapters)
    folders = {name: "" if len(names) == 1 or name == "default" else name for name in names}
    for name, folder in folders.items():
        if Path(folder).name != folder or folder == ".." or not folder.isprintable():
            problem = f"the adapter's name {name!r} is not that of a folder"
            raise StateError(SAVE, problem, "Call save_adapter(model, path, name)")
    return folders


def adapter_files(
    survey: Injected,
    format: str,  # noqa: A002
    unused: Sequence[str],
    given: Mapping[str, Tensor] = MappingProxyType({}),
) -> dict[str, bytes]:
    """Return the files of all adapters by their paths in a folder; all processes must call it."""
    if survey.root.selection.merged:
        problem = "an adapter is merged into the weights"
        remedy = (
            "Call eject(model) first to write the merged model, or unmerge(model) to write the "
        )
        raise StateError(SAVE, problem, f"{remedy}adapters")
    files: dict[str, bytes] = {}
    for name, folder in folders_of(survey).items():
        state, facts = saved_state(survey, name, format, unused, given)
        path, content = content_of(state, Path(folder, "adapter"), format, facts=facts)
        made = {path.name: content} if isinstance(content, bytes) else content
        files |= {str(Path(folder, each)): data for each, data in made.items()}
    return files


def write_files(place: Path, files: Mapping[str, bytes]) -> None:
    """Write files beside what else stands in a folder; a card that is not one of ours stays."""
    for name, data in files.items():
        path = place / name
        with explained(path.parent):
            path.parent.mkdir(parents=True, exist_ok=True)
            of_others = path.name == _README and path.exists()
            if not of_others or b"lora-inject" in path.read_bytes():  # a tag of all of ours
                replace_file(path, data)


def adapter_tensors(survey: Survey) -> dict[str, Tensor]:
    """Return what the state dict of a model has more than that of its base.

    The tensors of all adapters, frozen starts included, and what they mean. The keys include the
    names of wrappers inside the model.
    """
    for library in loaded_libraries():
        library.before_read(survey)
    carried = adapted_modules(survey)
    ours = {id(m._parameters[name]) for _, m, attached in carried for name in attached.flat}
    state = survey.model.state_dict(keep_vars=True)
    return {key: t for key, t in state.items() if id(t) in ours or leaf(key) == FORMS}


class _Refusal:
    """Stands in for a method that would drop adapters, or knows those of PEFT only."""

    def __init__(self, error: type[LoraInjectError], *words: str) -> None:
        self.error, self.words = error, words

    def __call__(self, *_: Any, **__: Any) -> NoReturn:
        raise self.error(*self.words)


class _InThread(_StandIn):
    """Stands in for a method that computes in a thread of its own, without contexts."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        _, root = root_of(self.model, self.method)
        if any(root.selection in context.selected for context in ENTERED.get()):
            problem = "it computes in a thread of its own, in which routed() or disabled() is not"
            remedy = "Call activate(model, which) before it, outside of the context"
            raise StateError(self.method, problem, remedy)
        return getattr(type(self.model), self.method)(self.model, *args, **kwargs)


class Methods(Library):
    """Methods of a model that stand for something else while it has adapters."""

    modules = ("transformers", "diffusers", "huggingface_hub")

    def after_load(self, survey: Survey, name: str) -> None:
        """Put what stands in for their methods onto models with adapters."""
        del name
        carrying = [module for _, module, _ in adapted_modules(survey)]
        classes = {type(module) for _, module in survey.modules}
        models = {cls for cls in classes if any(hasattr(cls, name) for name in _REPLACED)}
        for module in (module for _, module in survey.modules if type(module) in models):
            if getattr(module, "is_quantized", False) and getattr(module, LOADED, None) is False:
                module.__dict__[LOADED] = OURS
            if _has(module, RESIZE) and (vocabulary := _vocabulary_on(module, carrying)):
                problem = (
                    f"{vocabulary!r} carries an adapter, which would not fit the resized layer"
                )
                remedy = "Eject first, resize, then inject again"
                module.__dict__[RESIZE] = _Refusal(LayerError, RESIZE, problem, remedy)
            methods = [m for m in _METHODS if _has(module, m)]
            if methods and any(attached_to(part) for part in module.modules()):
                for method in methods:
                    _stand_in(module, method)

    def after_eject(self, modules: Iterable[nn.Module]) -> None:
        """Give models their own methods back where no adapter forbids it any more."""
        listed = list(modules)
        carrying = [module for module in listed if attached_to(module) is not None]
        for module in listed:
            own = module.__dict__
            if isinstance(own.get(RESIZE), _Refusal) and _vocabulary_on(module, carrying) is None:
                del own[RESIZE]
            mine = [key for key, value in own.items() if isinstance(value, _StandIn | _Refusal)]
            mine += [CARD] * (SAVE in mine) + [LOADED] * (own.get(LOADED) == OURS)
            if mine and not any(attached_to(part) for part in module.modules()):
                for key in mine:
                    own.pop(key, None)


_METHODS = (SAVE, THREAD, DEQUANTIZE, *OURS_FOR)
_REPLACED = (RESIZE, LOADED, *_METHODS)


def _has(module: nn.Module, method: str) -> bool:
    """Whether a model has a method, of its class and not replaced yet."""
    return method not in module.__dict__ and callable(getattr(type(module), method, None))


def _stand_in(module: nn.Module, method: str) -> None:
    """Put what stands in for a method onto a model with adapters."""
    own = module.__dict__
    if method == SAVE:
        own[method] = saving = _SaveAdapters(module)
        own[CARD] = saving.card
    elif method == THREAD:
        own[method] = _InThread(module, method)
    elif method == DEQUANTIZE:
        if getattr(module, "hf_quantizer", None):
            problem = "it replaces layers, whose adapters would be gone"
            remedy = 'Call merge(model, dequantize="bfloat16"), or eject first'
            own[method] = _Refusal(LayerError, method, problem, remedy)
    elif getattr(type(module), method).__module__.startswith(("diffusers.", "transformers.")):
        problem = "it knows adapters of PEFT only, and those of this model are lora_inject's"
        own[method] = _Refusal(StateError, method, problem, f"Call lora_inject.{OURS_FOR[method]}")


def _vocabulary_on(model: nn.Module, carrying: Sequence[nn.Module]) -> str | None:
    """Return the name of an embedding or head that holds a tensor of these modules, tied or not."""
    for getter in ("get_input_embeddings", "get_output_embeddings"):
        table = table_of(model, getter)
        if table is None:
            continue
        inside = {id(module) for module in table.modules()}
        tensors = {id(p) for module in table.modules() for p in base_parameters(module).values()}
        for module in carrying:
            held = map(id, base_parameters(module).values())
            if id(module) in inside or not tensors.isdisjoint(held):
                return next(str(name) for name, part in model.named_modules() if part is table)
    return None
