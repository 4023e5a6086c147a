"""What the forward of a module does with its children, by the source of its class.

A child may be called, or an attribute of it may be read (`self.conv1.stride`). Nothing is run. What
the source does not show (`getattr(self, name)`, a class without source) is not known here.
"""

from __future__ import annotations

import ast
import inspect
import textwrap
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import cache
from typing import Any, NamedTuple

from torch import nn

from lora_inject.core.layers.adapted import plain_class

ENTRIES = ("forward", "generate")
EACH = "*"  # the step to a member of a list, whatever its index
Steps = tuple[str, ...]
"""One use of something under `self`: `self.layers[0].fc.weight` has four steps."""


class Uses(NamedTuple):
    """What is done with one child.

    Attributes:
        called: Whether it may be called: it is, or is given to something else as a whole.
        read: The attributes that are read, each with the step after it, or "".
    """

    called: bool
    read: frozenset[tuple[str, str]]


def uses(modules: Mapping[str, nn.Module], name: str) -> Uses:
    """Return what the modules around one do with it, by their sources; all names are the model's.

    Examples:
        >>> class Net(nn.Module):
        ...     def forward(self, x):
        ...         return x @ self.fc.weight.T
        >>> net = Net()
        >>> net.fc = nn.Linear(4, 4)
        >>> uses({"": net, "fc": net.fc}, "fc").called  # a class in a doctest has no source
        False
    """
    around, _, child = name.rpartition(".")
    return _of_child(_under(modules, around), child)


def _under(modules: Mapping[str, nn.Module], name: str) -> frozenset[Steps]:
    """Return the steps from a module on, of its own forward and of those around it."""
    module = modules.get(name)
    own = frozenset[Steps]() if module is None else _uses_of(plain_class(type(module)))
    if not name:
        return own
    around, _, child = name.rpartition(".")
    return _joined(own, _under(modules, around), child)


@cache  # the layers of a model are alike
def _joined(own: frozenset[Steps], around: frozenset[Steps], child: str) -> frozenset[Steps]:
    return own.union(_after(around, child))


@cache
def _of_child(around: frozenset[Steps], child: str) -> Uses:
    rests = _after(around, child)
    read = frozenset((rest[0], rest[1] if len(rest) > 1 else "") for rest in rests if rest)
    return Uses(() in rests, read)


def _after(around: Iterable[Steps], child: str) -> set[Steps]:
    """Return what is left of steps that begin with a child; one of a list has any index."""
    first = {child, EACH} if child.isdecimal() else {child}
    return {steps[1:] for steps in around if steps and steps[0] in first}


@cache
def _uses_of(cls: type) -> frozenset[Steps]:
    """Return the uses in all methods that a class's forward can reach."""
    uses: set[Steps] = set()
    waiting, done = list(ENTRIES), set[str]()
    while waiting:
        name = waiting.pop()
        if name in done:
            continue
        done.add(name)
        for function in _definitions(cls, name):
            source = _read(function)
            uses |= source.uses
            waiting += [steps[0] for steps in source.uses if len(steps) == 1]
    return frozenset(uses)


def _definitions(cls: type, name: str) -> Iterator[Callable[..., Any]]:
    """Yield the method that a call runs, and those that it runs by `super()`."""
    for base in cls.__mro__:
        if base is nn.Module or name not in vars(base):
            continue
        function = vars(base)[name]
        function = getattr(function, "fget", None) or getattr(function, "__func__", function)
        function = inspect.unwrap(function)
        if not inspect.isfunction(function):
            return
        yield function
        if name not in _read(function).supers:
            return


class _Source(NamedTuple):
    uses: frozenset[Steps]
    supers: frozenset[str]


@cache
def _read(function: Callable[..., Any]) -> _Source:
    """Return the uses in one function, and the methods that it calls by `super()`."""
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(function)))
    except (OSError, TypeError, SyntaxError):
        return _Source(frozenset(), frozenset())
    [definition] = tree.body
    arguments = getattr(definition, "args", None)
    if arguments is None or not arguments.args:
        return _Source(frozenset(), frozenset())
    visitor = _Visitor(arguments.args[0].arg)
    visitor.visit(definition)
    return _Source(frozenset(visitor.uses), frozenset(visitor.supers))


class _Visitor(ast.NodeVisitor):
    """Collects uses; local names that stand for something under `self` are followed."""

    def __init__(self, owner: str) -> None:
        self.known: dict[str, Steps] = {owner: ()}
        self.uses: set[Steps] = set()
        self.supers: set[str] = set()

    def steps_of(self, node: ast.AST) -> Steps | None:
        """Return the steps from `self` to an expression, None for another expression."""
        if isinstance(node, ast.Name):
            return self.known.get(node.id)
        if isinstance(node, ast.Attribute):
            before, step = self.steps_of(node.value), node.attr
        elif isinstance(node, ast.Subscript):
            before, step = self.steps_of(node.value), EACH
        else:
            return None
        return None if before is None else (*before, step)

    def visit_Assign(self, node: ast.Assign) -> None:
        steps, [target] = self.steps_of(node.value), node.targets[:1]
        if steps and isinstance(target, ast.Name):
            self.known[target.id] = steps
        else:
            self.generic_visit(node)

    def visit_For(self, node: ast.For) -> None:
        self._members(node.target, node.iter)
        self.generic_visit(node)

    def visit_comprehension(self, node: ast.comprehension) -> None:
        self._members(node.target, node.iter)
        self.generic_visit(node)

    def _members(self, target: ast.expr, iterated: ast.expr) -> None:
        """Note the names that a loop gives to the members of lists under `self`."""
        lists: Iterable[ast.expr] = [iterated]
        names: list[ast.expr] = [target]
        if isinstance(iterated, ast.Call) and isinstance(iterated.func, ast.Name):
            lists = iterated.args
            names = target.elts if isinstance(target, ast.Tuple) else [target]
            names = names[1:] if iterated.func.id == "enumerate" else names
        for name, member_of in zip(names, lists, strict=False):
            steps = self.steps_of(member_of)
            if steps and isinstance(name, ast.Name):
                self.known[name.id] = (*steps, EACH)

    def visit_Call(self, node: ast.Call) -> None:
        steps = self.steps_of(node.func)
        if steps:
            self.uses.add(steps)
        elif _is_super(node.func):
            self.supers.add(node.func.attr)  # type: ignore[attr-defined]
        else:
            self.visit(node.func)
        for inner in (*node.args, *node.keywords):
            self.visit(inner)

    def visit_Attribute(self, node: ast.Attribute) -> None:
        self._used(node)

    def visit_Subscript(self, node: ast.Subscript) -> None:
        self._used(node)
        self.visit(node.slice)

    def visit_Name(self, node: ast.Name) -> None:
        if isinstance(node.ctx, ast.Load):
            self._used(node)

    def _used(self, node: ast.Attribute | ast.Subscript | ast.Name) -> None:
        steps = self.steps_of(node)
        if steps:
            self.uses.add(steps)
        elif not isinstance(node, ast.Name):
            self.visit(node.value)


def _is_super(node: ast.expr) -> bool:
    """Return whether an expression is `super().name`."""
    inner = node.value if isinstance(node, ast.Attribute) else None
    return isinstance(inner, ast.Call) and getattr(inner.func, "id", None) == "super"
