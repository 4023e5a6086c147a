"""transformers' plans for tensor and expert parallelism: forwards around those of classes.

`from_pretrained(tp_plan="auto")` and `distributed_config=` make weights DTensors, and put a forward
onto each module that the plan has a style for (`transformers.distributed`, since 5.21). That
forward brings inputs and outputs into their layouts, and calls the forward that the module had
before. It does so in two ways:

1. With DTensors: the layer's own operations know what a process has only a part of.
2. With the parts of this process as plain tensors: all styles of experts, and linear layers
   without gradients. What is the same in several processes then meets a part of what is not, and
   its gradient is a part of a sum (`parts_of_gradients`).

Experts that are apart get tokens of other processes. Where these have other batches (`fsdp_size`),
a gradient is a sum over all batches: transformers divides it by their number, as the gradients of
the other layers are means.

A forward of such a style calls a method of the class that a variable of its closure holds. So this
variable is given what calls the class that the module has by then.
"""

from __future__ import annotations

import functools
import types
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from lora_inject.core.layers.attached import attached_to
from lora_inject.core.layers.library import Library
from lora_inject.core.layers.survey import Carried, Survey
from lora_inject.errors import LayerError

_PLACE = "transformers.distributed."

KNOWN = {
    "ColwiseParallel",
    "EmbeddingParallel",
    "EpDispatchExpertsParallel",
    "LocalParamsParallel",
    "MlaKvAProjParallel",
    "MoeExpertsParallel",
    "PackedColwiseParallel",
    "ReplicatedWithGradAllReduce",
    "RowwiseParallel",
    "SequenceParallel",
    "TensorParallelLayer",
}
"""Styles of modules that adapters take part in; `AllReduceParallel` says that all of a module's
parameters have parts of gradients, and `MoeIdentityParallel` is for modules without any."""


class Plans(Library):
    """The forwards that a plan has put onto modules."""

    modules = ("transformers.distributed.tensor_parallel",)

    def kept(self, module: nn.Module) -> Any:
        """Return the forward that the style of a module calls."""
        called = _called(_given(module))
        if isinstance(called, _OfClass):
            return types.MethodType(type(module).forward, module)
        return called

    def keep(self, module: nn.Module, forward: Callable[..., Any]) -> None:
        """Let the style of a module call the forward of its class, whichever it has by then.

        An adapted one computes within `parts_of_gradients`.
        """
        given = _given(module)
        called = _called(given)
        if not isinstance(called, _OfClass):
            called = _OfClass(module, called)
            _let_call(given, called)
        plain = getattr(called.before, "__func__", None) is getattr(forward, "__func__", None)
        module.__dict__["forward"] = given if plain else _styled(module, given)

    def calls_class(self, module: nn.Module) -> bool:
        """Return whether the style calls the forward of the module's class."""
        return getattr(self.kept(module), "__self__", None) is module

    def before_load(self, survey: Survey, name: str, wanted: Sequence[Carried]) -> None:
        """Refuse an adapter where the style of its module computes what the adapter cannot."""
        del survey
        for place in wanted:
            if problem := self._against(place):
                remedy = "Leave it out, or inject first and call parallelize_module then"
                raise LayerError(f"adapter {name!r}, {place.name!r}", problem, remedy)

    def _against(self, place: Carried) -> str:
        """Return why the style of a module does not fit an entry, or ""."""
        given = _given(place.module)
        if given is None:
            return ""
        style = _style(given)
        if style not in KNOWN:
            return f"its style in transformers' plan is {style}, which adapters do not take part in"
        if not self.calls_class(place.module):
            return f"the forward that {style} calls is not that of its class"
        if style == "RowwiseParallel" and place.entry.param == "bias":
            return "rowwise adds the bias outside of the layer, where no adapter is"
        is_part = hasattr(place.weight, "full_tensor") and not _is_whole(place.weight)
        if computes_locally(place.module) and not is_part:
            return (
                f"{style} computes with parts of other weights, but each process has this one whole"
            )
        return ""

    def sums_gradients(self, module: nn.Module) -> bool:
        """Return whether a module has experts that are apart, with tokens of other processes."""
        given = _given(module)
        return given is not None and "implementation" in _variables(given)


def computes_locally(module: nn.Module) -> bool:
    """Return whether the style of a module gives it plain tensors while gradients are computed."""
    given = _given(module)
    style = None if given is None else _variables(given).get("self")
    with torch.enable_grad():
        return style is not None and bool(style.should_use_local_tensors(module))


@contextmanager
def parts_of_gradients(module: nn.Module, n_batches: int) -> Iterator[None]:
    """Let adapter tensors that several processes have be plain, and their gradients be summed.

    Where a style gives a module the parts of this process as plain tensors, it takes the gradient
    of what is whole for whole as well. Gradients are divided by the number of batches.
    """
    from torch.distributed.tensor import Partial

    attached, held = attached_to(module), module._parameters
    names = attached.flat if attached is not None else ()
    spread: dict[str, Any] = {name: held[name] for name in names if _is_spread(held[name])}
    for name, tensor in spread.items():
        parts = [Partial() if p.is_replicate() else p for p in tensor.placements]
        local = held[name] = tensor.to_local(grad_placements=parts)
        if n_batches > 1 and local.requires_grad:
            local.register_hook(lambda gradient: gradient / n_batches)
    try:
        yield
    finally:
        held.update(spread)


def _is_spread(tensor: Any) -> bool:
    return hasattr(tensor, "placements")


def _n_batches(experts: Any, module: nn.Module) -> int:
    """Return over how many batches the gradients of experts are summed: 1 but with `fsdp_size`."""
    if experts is None:
        return 1
    held: Any = module._parameters.values()
    meshes = [tensor.device_mesh for tensor in held if _is_spread(tensor)]
    copies = max((mesh.size() // mesh.size(mesh.ndim - 1) for mesh in meshes), default=1)
    return int(experts.ep_mesh.size() // experts.tp_mesh.size() * copies)


def _is_whole(tensor: Any) -> bool:
    """Return whether a tensor is a DTensor that each process has whole."""
    placements = getattr(tensor, "placements", ())
    return bool(placements) and all(placement.is_replicate() for placement in placements)


def _given(module: nn.Module) -> Any:
    """Return the forward that transformers has put onto a module; None if it has not."""
    forward = module.__dict__.get("forward")
    forward = getattr(forward, "lora_given", forward)
    ours = isinstance(forward, types.FunctionType) and forward.__module__.startswith(_PLACE)
    return forward if ours and _called(forward) is not None else None


def _variables(given: Any) -> dict[str, Any]:
    """Return the variables of a closure."""
    pairs = zip(given.__code__.co_freevars, given.__closure__ or (), strict=True)
    return {name: cell.cell_contents for name, cell in pairs}


def _style(given: Any) -> str:
    """Return the name of the class of a style; one of them is a function without itself."""
    style = _variables(given).get("self")
    return "ReplicatedWithGradAllReduce" if style is None else type(style).__name__


def _called(given: Any) -> Any:
    """Return the forward that a style calls: its variable, or an attribute of one for experts."""
    variables = {} if given is None else _variables(given)
    experts = variables.get("implementation")
    return variables.get("original_forward", getattr(experts, "experts_forward", None))


class _OfClass:
    """The forward of a module's class: it stands for the one that a style has saved, `before`."""

    def __init__(self, module: nn.Module, before: Any) -> None:
        self.module, self.before = module, before

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return type(self.module).forward(self.module, *args, **kwargs)


def _let_call(given: Any, forward: _OfClass) -> None:
    """Let a style call another forward, also one whose `auto` has others inside of it."""
    for name, cell in zip(given.__code__.co_freevars, given.__closure__, strict=True):
        if name == "original_forward":
            cell.cell_contents = forward
    pending: list[Any] = [_variables(given).get("implementation")]
    while pending:
        experts = pending.pop()
        if hasattr(experts, "experts_forward"):
            pending += vars(experts).values()
            experts.experts_forward = forward


def _styled(module: nn.Module, given: Any) -> Callable[..., Any]:
    """Return the forward of a style around an adapted class."""
    variables = _variables(given)
    style, experts = variables.get("self"), variables.get("implementation")

    @functools.wraps(given)
    def styled(*args: Any, **kwargs: Any) -> Any:
        if style is None or not torch.is_grad_enabled():
            return given(*args, **kwargs)
        if not style.should_use_local_tensors(module):
            return given(*args, **kwargs)
        with parts_of_gradients(module, _n_batches(experts, module)):
            return given(*args, **kwargs)

    styled.lora_given = given  # type: ignore[attr-defined]
    return styled
