"""No resizing of an embedding or a head that carries an adapter.

Transformers' `resize_token_embeddings` replaces the head by a new layer and refills the
embedding, and either would leave the adapter behind in silence. While such a site exists the model
answers that call with an error.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NoReturn

from torch import nn

from lora_inject.errors import LayerError

METHOD = "resize_token_embeddings"


class _Refusal:
    """Stands in for the method on the instance; a class, so that copies and pickles keep it."""

    def __init__(self, site: str) -> None:
        self.site = site

    def __call__(self, *_: Any, **__: Any) -> NoReturn:
        raise LayerError(
            METHOD,
            f"{self.site!r} carries an adapter, which would not fit the resized layer",
            "Eject first, resize, then inject again",
        )


def refuse_resizing(modules: Iterable[nn.Module], carrying: Iterable[nn.Module]) -> None:
    """Refuse resizing on every model inside whose embedding or head carries an adapter."""
    listed = list(modules)
    resizing = {c for c in set(map(type, listed)) if callable(getattr(c, METHOD, None))}
    models = [m for m in listed if type(m) in resizing and METHOD not in m.__dict__]
    adapted_modules = _tensors(carrying) if models else set()
    for model in models:
        name = _carrying_name(model, adapted_modules)
        if name is not None:
            model.__dict__[METHOD] = _Refusal(name)


def allow_resizing(modules: Iterable[nn.Module], carrying: Iterable[nn.Module]) -> None:
    """Take the refusal away where no embedding or head carries an adapter any more."""
    models = [m for m in modules if isinstance(m.__dict__.get(METHOD), _Refusal)]
    adapted_modules = _tensors(carrying) if models else set()
    for model in models:
        if _carrying_name(model, adapted_modules) is None:
            del model.__dict__[METHOD]


def _tensors(modules: Iterable[nn.Module]) -> set[int]:
    return {id(p) for module in modules for p in module._parameters.values() if p is not None}


def _carrying_name(model: nn.Module, adapted_modules: set[int]) -> str | None:
    """Return the name of the embedding or head that holds one of these tensors, tied ones too."""
    for getter in ("get_input_embeddings", "get_output_embeddings"):
        try:
            found = getattr(model, getter)()
        except (AttributeError, NotImplementedError):
            continue
        if found is not None and any(id(p) in adapted_modules for p in found.parameters()):
            return next(str(name) for name, module in model.named_modules() if module is found)
    return None
