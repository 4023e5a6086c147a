"""LoRA adapters on any torch module: inject, train, switch, save, load, merge, exactly.

The verbs are functions on the model, and the model is the only state. Importing this package does
not import transformers or peft, nor any file of its own before a name from it is asked for: the
commands on checkpoints start without what only models need. `__init__.pyi`, which editors and type
checkers read, is the list of the names; editors list what has no underscore.
"""

import ast as _ast
import importlib as _importlib
from importlib.util import find_spec as _find_spec
from pathlib import Path as _Path
from types import ModuleType as _ModuleType

from lora_inject.version import __version__ as __version__

_HOMES = {
    alias.name: str(node.module)
    for node in _ast.parse(_Path(__file__).with_suffix(".pyi").read_text(encoding="utf-8")).body
    if isinstance(node, _ast.ImportFrom)
    for alias in node.names
}
_MODULES = [name for name, home in _HOMES.items() if home == __name__]
__all__ = sorted(_HOMES)  # noqa: PLE0605  (a list, made of the table)


def _module(name: str) -> _ModuleType:
    return _importlib.import_module(f"{__name__}.{name}")


def _names_in(module: str) -> list[str]:
    """Return the names that a module lists, read off its source: to import it takes seconds."""
    [spec] = filter(None, [_find_spec(f"{__name__}.{module}")])
    tree = _ast.parse(_Path(str(spec.origin)).read_text(encoding="utf-8"))
    assigned = [node for node in tree.body if isinstance(node, _ast.Assign)]
    [listed] = [node.value for node in assigned if _ast.unparse(node.targets[0]) == "__all__"]
    return [f"{module}.{name}" for name in _ast.literal_eval(listed)]


def __getattr__(name: str) -> object:
    """Import the file that a public name comes from when it is first asked for (PEP 562)."""
    if name not in _HOMES:
        modules = [] if name.startswith("_") else _MODULES
        public = [*_HOMES, *(inner for module in modules for inner in _names_in(module))]
        raise _module("integrations.peft_names").lacking(name, public)
    if name in _MODULES:  # its import sets it here
        return _module(name)
    value = getattr(_importlib.import_module(_HOMES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    """Return the public names, for completion."""
    return [*__all__, "__doc__", "__file__", "__path__"]
