"""The public names and what they take are those of `fixtures/public_api.txt`.

Whoever changes a signature sees it there: `python tests/test_public_api.py` writes the file anew.
It is compared with a file and not with a tag, as a shallow clone has no tags.
"""

import inspect
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import lora_inject as li

TOLD = Path(__file__).parent / "fixtures" / "public_api.txt"


def public_api() -> str:
    """Return a line for each public function, class, method, field and value."""
    front = {name: getattr(li, name) for name in li.__all__ if name != "__version__"}
    names = {f"li.{name}": value for name, value in front.items() if not inspect.ismodule(value)}
    for module in (name for name, value in front.items() if inspect.ismodule(value)):
        names |= {f"li.{module}.{n}": getattr(front[module], n) for n in front[module].__all__}
    return "\n".join(line for name in sorted(names) for line in lines(name, names[name])) + "\n"


def lines(name: str, value: Any) -> Iterator[str]:
    """Yield what a name says of itself, and for a class what its members say."""
    if not inspect.isclass(value):
        yield f"{name}{inspect.signature(value)}" if callable(value) else name
        return
    yield f"class {name}"
    fields: dict[str, Any] = {}
    members: dict[str, Any] = {}
    for cls in reversed([cls for cls in value.__mro__ if cls.__module__.startswith(li.__name__)]):
        fields |= inspect.get_annotations(cls)
        members |= vars(cls)
    for field in sorted(f for f in fields if f[0] != "_"):
        yield f"{name}.{field}: {getattr(fields[field], '__forward_arg__', fields[field])}"
    for member in sorted(m for m in members if m[0] != "_"):
        function = getattr(members[member], "__func__", members[member])
        if isinstance(function, property):
            yield f"{name}.{member}: property"
        elif inspect.isfunction(function):
            yield f"{name}.{member}{inspect.signature(function)}"


def test_the_public_api_is_the_one_that_is_told() -> None:
    assert public_api() == TOLD.read_text(encoding="utf-8")


if __name__ == "__main__":
    TOLD.write_text(public_api(), encoding="utf-8")
