"""Variants from outside the package."""

from __future__ import annotations

from lora_inject.core.adapter.known_variants import VARIANTS
from lora_inject.core.adapter.variants import Variant
from lora_inject.core.spec.sites import ROLES, Roles
from lora_inject.errors import LayerError


def register_variant(cls: type[Variant]) -> type[Variant]:
    """Add a variant.

    Args:
        cls: A class with a `name` of its own, which configs and saved adapters can then use.

    Returns:
        The class, so that this can be used as a decorator.

    Raises:
        LayerError: The class has no name of its own, or its name is taken by another class.

    Examples:
        >>> class Same(Variant):
        ...     name = "same"
        >>> _ = register_variant(Same)
        >>> del VARIANTS["same"], ROLES["same"]
    """
    asked, name = f"register_variant({cls.__name__})", cls.__dict__.get("name")
    if not name or not issubclass(cls, Variant):
        problem = "it is not a Variant with a name of its own"
        raise LayerError(asked, problem, "Derive from Variant and set name")
    if taken := {"A", "B", "A0", "B0", "b"} & cls.roles.keys():
        problem = f"its role {min(taken)!r} is that of every site"
        raise LayerError(asked, problem, "Choose another name for it")
    known = type(VARIANTS[name]) if name in VARIANTS else cls
    if (known.__module__, known.__qualname__) != (cls.__module__, cls.__qualname__):
        problem = f"variant {name!r} is {known.__module__}.{known.__qualname__}"
        raise LayerError(asked, problem, "Choose another name")
    VARIANTS[name], ROLES[name] = cls(), Roles(cls.roles, cls.gained)
    return cls
