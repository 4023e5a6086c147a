"""`save_pretrained` of a model that carries adapters writes the adapters, as PEFT's does.

Transformers and diffusers would write the base with extra keys, which `from_pretrained` drops.
Trainer's `save_model` and `push_to_hub` call this method, so they write the adapters as well.
"""

from __future__ import annotations

import os
import tempfile
import weakref
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from lora_inject.errors import StateError
from lora_inject.formats import write_adapter
from lora_inject.layers.survey import Survey
from lora_inject.model.carried import reach
from lora_inject.model.save import format_options, read_off

METHOD = "save_pretrained"


class _SaveAdapters:
    """Stands in for the method on the instance; copies and pickles of the model keep it."""

    def __init__(self, model: nn.Module) -> None:
        self._model = weakref.ref(model)  # else the model would hold itself

    def __getstate__(self) -> dict[str, Any]:
        return {"model": self._model()}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self._model = weakref.ref(state["model"])

    def __call__(
        self,
        save_directory: str | os.PathLike[str],
        is_main_process: bool = True,
        state_dict: Mapping[str, Tensor] | None = None,
        push_to_hub: bool = False,
        **_: Any,
    ) -> None:
        """Write each adapter as a PEFT folder.

        Args:
            save_directory: Where to. The only adapter, or else the one named `default`, is written
                there, and every other into a folder of its name inside, as with PEFT.
            is_main_process: Whether this process writes.
            state_dict: Gathered tensors, which stand in for those of which this process holds a
                shard.
            push_to_hub: Not supported here.

        Raises:
            StateError: The adapters are merged into the weights, or `push_to_hub` was asked for.
            FormatError: An adapter cannot be expressed as a PEFT folder.
        """
        model = self._model()
        assert model is not None
        survey = Survey(model)
        if push_to_hub:
            found = "an adapted model takes no push_to_hub=True"
            raise StateError(METHOD, found, "Call model.push_to_hub(repo_id)")
        there = reach(model, survey)
        if any(selection.merged is not None for selection in there.selections):
            raise StateError(
                METHOD,
                "an adapter is merged into the weights",
                "Call eject(model) first to write the merged model, or unmerge(model) to write the "
                "adapters",
            )
        names = sorted(there.names)
        for name in names if len(names) > 1 else ():
            if Path(name).name != name:
                found = f"the adapter's name {name!r} is not that of a folder"
                raise StateError(METHOD, found, "Call save_adapter(model, path, name)")
        states = {name: read_off(survey, name, state_dict or {}) for name in names}
        for name, state in states.items() if is_main_process else ():
            alone = len(names) == 1 or name == "default"
            folder = Path(save_directory) if alone else Path(save_directory, name)
            with tempfile.TemporaryDirectory() as place:
                made = write_adapter(
                    state, Path(place, "adapter"), **format_options(survey, "peft")
                )
                _put_into(made, folder)


def _put_into(made: Path, folder: Path) -> None:
    """Copy files into a folder that may hold others, each in one step."""
    folder.mkdir(parents=True, exist_ok=True)
    for path in sorted(made.iterdir()):
        temporary = folder / f".{path.name}.tmp"
        temporary.write_bytes(path.read_bytes())
        temporary.replace(folder / path.name)


def save_adapters_instead(modules: Iterable[nn.Module]) -> None:
    """Let `save_pretrained` of every model among the modules write its adapters."""
    for module in modules:
        has_method = callable(getattr(type(module), METHOD, None))
        if has_method and METHOD not in module.__dict__ and reach(module).names:
            module.__dict__[METHOD] = _SaveAdapters(module)


def save_models_again(modules: Iterable[nn.Module]) -> None:
    """Give models without adapters their own `save_pretrained` back."""
    for module in modules:
        if isinstance(module.__dict__.get(METHOD), _SaveAdapters) and not reach(module).names:
            del module.__dict__[METHOD]
