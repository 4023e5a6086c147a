"""What a forward changes besides its outputs: buffers, attributes of modules, generators.

Attributes are noted with what lists, dicts and plain objects in them hold, as references; tensors
by their version, and buffers by a copy where they are to be put back.
"""

from __future__ import annotations

import types
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from lora_inject.core.functional.torch_inside import version_of

PLAIN = (bool, int, float, complex, str, bytes, type(None))
_OF_TORCH = frozenset(nn.Module().__dict__)
_HOOKS = [key for key in nn.Module().__dict__ if key.startswith("_forward_")]
_CODE = (type, types.FunctionType, types.MethodType, types.ModuleType, nn.Module)
_DEPTH = 6
"""So deep an object in an attribute is looked into: a cache, its layers, the keys of each."""
_ROUNDING = {8: 1e-7, 4: 1e-3}
"""Share of the largest number by which outputs differ that are computed in another order, by the
bytes of a number."""


class _Table(NamedTuple):
    name: str
    table: dict[Any, Any] | list[Any]
    before: dict[Any, Any] | list[Any]

    def places(self) -> list[Any]:
        """Return the keys that it had or has; of a module's attributes those of its own."""
        if isinstance(self.table, list):
            return [*range(max(len(self.table), len(self.before)))]
        return [*filter(_is_own, {**dict.fromkeys(self.before), **dict.fromkeys(self.table)})]


class Kept:
    """What a model holds at a time, besides its parameters.

    Args:
        model: The model.
        buffers: Whether buffers are copied, to be put back.
    """

    def __init__(self, model: nn.Module, *, buffers: bool = False) -> None:
        self._tables: list[_Table] = []
        self._tensors: dict[int, tuple[str, Tensor, int]] = {}
        self._buffers: dict[str, tuple[Tensor, Tensor]] = {}
        self._seen: set[int] = set()
        for name, module in model.named_modules():
            start = f"{name}." if name else ""
            own = {key: value for key, value in module.__dict__.items() if _is_own(key)}
            self._tables.append(_Table(start, module.__dict__, own))
            # transformers sets an attribute where it has registered hooks, in a first forward.
            for table in (module._buffers, *(module.__dict__[key] for key in _HOOKS)):
                self._tables.append(_Table(start, table, table.copy()))
            for key, buffer in module._buffers.items():
                if buffer is None:
                    continue
                if buffers:
                    self._buffers[f"{start}{key}"] = buffer, buffer.detach().clone()
                else:
                    self._note(f"{start}{key}", buffer)
            for key, value in own.items():
                self._note(f"{start}{key}", value)

    def _note(self, name: str, value: Any, depth: int = _DEPTH) -> None:
        """Note a value of an attribute, and what it holds."""
        if not depth or isinstance(value, PLAIN) or id(value) in self._seen:
            return
        self._seen.add(id(value))
        if isinstance(value, Tensor):
            if not isinstance(value, nn.Parameter):
                self._tensors[id(value)] = name, value, version_of(value)
            return
        held = contents(value)
        if held is not None and not isinstance(value, tuple):
            self._tables.append(_Table(f"{name}.", held, held.copy()))
        for key, each in items(held):
            self._note(f"{name}.{key}", each, depth - 1)

    def moved_buffers(self) -> list[str]:
        """Return the names of the copied buffers that hold other values now."""
        each = self._buffers.items()
        return [name for name, (now, before) in each if not torch.equal(now, before)]

    def moved(self) -> str:
        """Return the name of what holds another value now; "" if nothing does."""
        if name := self.written():
            return name
        for of in self._tables:
            for key in of.places():
                if not alike(_at(of.table, key), _at(of.before, key)):
                    return f"{of.name}{key}"
        return ""

    def written(self) -> str:
        """Return the name of a tensor of an attribute that was written to, as none is copied."""
        written = (name for name, t, version in self._tensors.values() if version_of(t) != version)
        return next(written, "")

    def put_back(self) -> None:
        """Let all be as it was, but for tensors of attributes that were written to."""
        for of in self._tables:
            if isinstance(of.table, list):
                of.table[:] = of.before
                continue
            for key in of.places():
                if key not in of.before:
                    del of.table[key]
                elif of.table.get(key, of) is not of.before[key]:
                    of.table[key] = of.before[key]
        with torch.no_grad():
            for now, before in self._buffers.values():
                if not torch.equal(now, before):
                    now.copy_(before)


def _is_own(key: Any) -> bool:
    """Whether a key of a module's attributes is none of torch's, nor of this package."""
    ours = isinstance(key, str) and (key in _OF_TORCH or key.startswith(("_lora", "lora_inject")))
    return not ours


_MISSING = object()


def _at(table: Any, key: Any) -> Any:
    """Return what a list or a dict has at a key."""
    if isinstance(table, list):
        return table[key] if key < len(table) else _MISSING
    return table.get(key, _MISSING)


def contents(value: Any) -> Any:
    """Return the list, tuple or dict of what a value holds; None if nothing can be put into it."""
    if type(value) in (list, tuple, dict):
        return value
    held = getattr(value, "__dict__", None)
    return held if type(held) is dict and not isinstance(value, _CODE) else None


def items(held: Any) -> list[tuple[Any, Any]]:
    """Return what a list or a dict holds, with the place of each."""
    return [*held.items()] if isinstance(held, dict) else [*enumerate(held or ())]


def alike(one: Any, other: Any, depth: int = _DEPTH) -> bool:
    """Whether two values are the same, or hold the same but for rounding."""
    if one is other or not depth:
        return True
    if isinstance(one, Tensor) and isinstance(other, Tensor):
        return one.shape == other.shape and one.dtype == other.dtype and rows_alike(one, other)
    if type(one) is not type(other):
        return False
    if isinstance(one, PLAIN):
        return bool(one == other)
    mine, its = contents(one), contents(other)
    if mine is None or its is None or len(mine) != len(its):
        return False
    if isinstance(mine, dict):
        same = mine.keys() == its.keys()
        return same and all(alike(value, its[key], depth - 1) for key, value in mine.items())
    return all(alike(a, b, depth - 1) for a, b in zip(mine, its, strict=True))


def rows_alike(one: Tensor, other: Tensor) -> bool:
    """Whether tensors are equal but for what rounding may do."""
    if one.is_complex() and other.is_complex():
        one, other = torch.view_as_real(one), torch.view_as_real(other)
    if not one.is_floating_point():
        return torch.equal(one, other)
    wide = torch.promote_types(one.dtype, torch.float32)  # MPS has no float64
    a, b = one.detach().to(wide), other.detach().to(wide)
    finite = b.isfinite()
    size = b[finite].abs().max() if finite.any() else b.new_ones(())
    share = _ROUNDING.get(one.element_size(), 0.05)
    off = ((a - b).abs() > share * size) & finite
    return not bool((off | (a.isfinite() != finite)).any())


@contextmanager
def random_kept(model: nn.Module, seed: int | None = None) -> Iterator[None]:
    """Put torch's generators back where they were; no other device's is touched.

    With a seed, so that a base that draws does it for a trial alone as it does beside others.
    """
    placed = {p.device for p in model.parameters()}
    devices = [device for device in placed if device.type not in ("cpu", "meta")]
    kind = devices[0].type if devices else "cuda"
    with torch.random.fork_rng(devices, device_type=kind):
        for device in devices if seed is not None else ():
            module = torch.get_device_module(device)
            with module.device(device) if hasattr(module, "device") else nullcontext():
                module.manual_seed(seed)
        if seed is not None:
            torch.default_generator.manual_seed(seed)
        yield


class Versions:
    """By which it is told whether a forward has written to buffers, or put others in their place.

    Args:
        modules: All modules, by name.
    """

    def __init__(self, modules: Iterable[tuple[str, nn.Module]]) -> None:
        self._places = [
            (f"{name}.{key}" if name else key, module._buffers, key)
            for name, module in modules
            for key in module._buffers
        ]

    def now(self) -> list[tuple[Tensor | None, int]]:
        """Return each buffer and its version."""
        buffers = (table.get(key) for _, table, key in self._places)
        return [(t, 0 if t is None else version_of(t)) for t in buffers]

    def moved(self, before: list[tuple[Tensor | None, int]]) -> str:
        """Return the name of a buffer that has moved since; "" if none has."""
        for (name, *_), (now, after), (then, version) in zip(
            self._places, self.now(), before, strict=True
        ):
            if now is not then or after != version:
                return name
        return ""
