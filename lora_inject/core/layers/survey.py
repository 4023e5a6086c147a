"""One walk over a model: its modules and base parameters, their names, and who shares what.

A verb makes one `Survey` and passes it along. It holds while no module and no base parameter comes
or goes; adapters may.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator
from contextlib import contextmanager
from functools import cached_property
from typing import Any, NamedTuple

from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from lora_inject.core.layers.attached import Entry, attached_to
from lora_inject.core.spec.names import WRAPPERS, joined
from lora_inject.errors import LayerError, article

_WRAPPERS = (nn.parallel.DistributedDataParallel, nn.DataParallel, AveragedModel)

# Deeper than torch's own train() and eval() get before Python's limit on recursion.
MAX_DEPTH = 1000


def unwrapped(model: nn.Module) -> nn.Module:
    """Return the user's model inside torch.compile's, DistributedDataParallel's and like wrappers.

    Adapters live on the model itself, so every verb means the same on a wrapped model.
    """
    if isinstance(model, type):
        name = model.__name__
        raise LayerError("the model", f"it is the class {name}", f"Give an instance: {name}(...)")
    if not isinstance(model, nn.Module):
        problem = f"it is {article(type(model).__name__)}"
        raise LayerError("the model", problem, "Give the torch.nn.Module first")
    while True:
        if isinstance(model, _WRAPPERS):
            model = model.module
        elif len(model._modules) == 1 and (inner := model._modules.get("_orig_mod")) is not None:
            model = inner
        else:
            return model


class Holder(NamedTuple):
    """A base parameter, or the buffer of a packed one, in its place."""

    name: str
    module: nn.Module
    param: str

    @property
    def tensor(self) -> nn.Parameter:
        """What stands there now."""
        return base_tensor(self.module, self.param)


class Carried(NamedTuple):
    """One entry of an adapter: the name of its module, the module, the entry."""

    path: str
    module: nn.Module
    entry: Entry

    @property
    def name(self) -> str:
        """Name of the site, or of the tensor that the entry has a copy of or adds to."""
        spec = self.entry.spec
        return joined(self.path, self.entry.param) if spec is None else spec.name

    @property
    def weight(self) -> nn.Parameter:
        """The frozen tensor."""
        return base_tensor(self.module, self.entry.param)


def base_tensor(module: nn.Module, key: str) -> nn.Parameter:
    """Return what stands for a weight in its module: a parameter, or the buffer of a packed one."""
    parameters: Any = module._parameters
    buffers: Any = module._buffers
    tensor: nn.Parameter = (parameters if key in parameters else buffers)[key]
    return tensor


class Survey:
    """The modules and base parameters of a model, read off it once.

    Attributes:
        given: The model as the caller has it, maybe in a wrapper.
        model: The model without the wrappers around it.
        named: `(canonical name, module)` in the order of the model, the model itself as `""`, a
            shared module under each of its names.
        modules: The same with each module once, under its first name. A wrapper and what it wraps
            have the same canonical name.
    """

    def __init__(self, model: nn.Module) -> None:
        self.given, self.model = model, unwrapped(model)
        self.named = list(_walk(self.model))
        first: dict[int, tuple[str, nn.Module]] = {}
        for pair in self.named:
            first.setdefault(id(pair[1]), pair)
        self.modules = list(first.values())

    @cached_property
    def by_name(self) -> dict[str, nn.Module]:
        """Every name with its module; of a wrapper and what it wraps, the latter."""
        return dict(self.named)

    @cached_property
    def paths(self) -> dict[int, str]:
        """The first name of each module, by the module's id."""
        return {id(module): name for name, module in self.modules}

    @cached_property
    def further(self) -> dict[int, tuple[str, ...]]:
        """All names but the first of modules that have several, by the module's id."""
        names: dict[int, tuple[str, ...]] = {}
        for name, module in self.named if len(self.modules) < len(self.named) else ():
            if name != self.paths[id(module)]:
                names[id(module)] = (*names.get(id(module), ()), name)
        return names

    @cached_property
    def own(self) -> dict[int, dict[str, nn.Parameter]]:
        """The base parameters of each module, without its children's, by the module's id."""
        return {id(module): base_parameters(module) for _, module in self.modules}

    @cached_property
    def weights(self) -> dict[str, nn.Parameter]:
        """Every base parameter, under each of its names."""
        return {
            f"{path}.{key}" if path else key: parameter
            for path, module in self.named
            for key, parameter in self.own[id(module)].items()
        }

    @cached_property
    def holders(self) -> list[Holder]:
        """Every base parameter of every module, by the first name of the module."""
        own = ((name, module, self.own[id(module)]) for name, module in self.modules)
        return [Holder(joined(name, key), m, key) for name, m, held in own for key in held]

    @cached_property
    def tensors(self) -> list[nn.Parameter]:
        """The tensor of each of `holders`."""
        return [p for _, module in self.modules for p in self.own[id(module)].values()]

    @cached_property
    def _by_memory(self) -> dict[Hashable, list[Holder]]:
        sharers: dict[Hashable, list[Holder]] = {}
        for holder, tensor in zip(self.holders, self.tensors, strict=True):
            sharers.setdefault(memory_of(tensor), []).append(holder)
        return sharers

    def sharing(self, tensor: Tensor) -> list[Holder]:
        """Return who holds a base parameter, or one of the same memory; if several, it is tied."""
        return self._by_memory.get(memory_of(tensor), [])  # none of a packed buffer

    @cached_property
    def tied(self) -> dict[Hashable, list[str]]:
        """All names of each base tensor in several modules, by its memory."""
        if len(set(map(_start, self.tensors))) == len(self.tensors):
            return {}  # as in most models, at half the cost
        several = ((memory, held) for memory, held in self._by_memory.items() if len(held) > 1)
        return {memory: [holder.name for holder in held] for memory, held in several}

    def tables(self, *getters: str) -> list[nn.Module]:
        """Return the tables over a vocabulary that the model and its parts name; see `table_of`."""
        tables: dict[nn.Module, None] = {}
        classes = {type(module) for _, module in self.modules}
        for getter in getters:
            stating = {cls for cls in classes if hasattr(cls, getter)}
            for _, module in self.modules:
                if type(module) in stating or getter in module.__dict__:
                    table = table_of(module, getter)
                    if table is not None and id(table) in self.paths:
                        tables[table] = None
        return list(tables)

    def at(self, name: str) -> Holder:
        """Return the place of a base tensor by any of its names."""
        owner, _, key = name.rpartition(".")
        module = self.by_name[owner]
        return Holder(joined(self.paths[id(module)], key), module, key)

    def tensor(self, name: str) -> nn.Parameter:
        """Return a base tensor by any of its names."""
        owner, _, key = name.rpartition(".")
        return base_tensor(self.by_name[owner], key)

    def names_of(self, name: str) -> list[str]:
        """Return every name of the tensor that a base parameter's name stands for."""
        return [holder.name for holder in self.sharing(self.tensor(name))]


def memory_of(parameter: Tensor) -> Hashable:
    """Return a key that is equal for parameters that are one tensor.

    That is one Parameter under several names, or several Parameters over the same elements, as
    `load_state_dict(assign=True)` of a tied checkpoint leaves them.
    """
    start = _start(parameter)
    if start == id(parameter):
        return start
    return start, parameter.shape, parameter.stride(), parameter.dtype, parameter.device


def _start(parameter: Tensor) -> int:
    """Return where the elements of a parameter begin; its own identity where there are none."""
    if type(parameter) is nn.Parameter and not parameter.is_meta:
        return parameter.data_ptr() or id(parameter)
    return id(parameter)


def _walk(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    pending: list[tuple[str, nn.Module, int]] = [("", model, 0)]
    while pending:
        name, module, depth = pending.pop()
        yield name, module
        if children := module._modules:
            if depth == MAX_DEPTH:
                raise RecursionError(f"a module holds one that holds it: '{name[:80]}...'")
            around = joined(name, "")
            for key, child in reversed(children.items()):
                if child is not None:
                    inside = name if key in WRAPPERS else around + key
                    pending.append((inside, child, depth + 1))


def base_parameters(module: nn.Module) -> dict[str, nn.Parameter]:
    """Return a module's own parameters, without its children's and without adapters."""
    if (attached := attached_to(module)) is not None:
        return attached.base(module._parameters)
    return {key: p for key, p in module._parameters.items() if p is not None}


def table_of(model: nn.Module, getter: str) -> nn.Module | None:
    """Return the embedding or the head over a vocabulary that a model names itself, if it does.

    `getter` is `get_input_embeddings` or `get_output_embeddings`, as models of transformers have.
    """
    ask = getattr(model, getter, None)
    try:
        table = ask() if callable(ask) else None
    except (AttributeError, NotImplementedError):
        return None
    return table if isinstance(table, nn.Module) else None


@contextmanager
def evaluating(model: nn.Module) -> Iterator[bool]:
    """Run the body in evaluation mode; yield whether that is another one than before."""
    training = [module for module in model.modules() if module.training]
    for module in training:
        module.training = False
    try:
        yield bool(training)
    finally:
        for module in training:
            module.training = True
