"""The model that mlx-lm makes for a base: its modules and their names, asked of its own classes.

Its names are transformers' for most decoders, and others for some. MLX's arrays are lazy, so that a
model of any size is made without computing or holding a value.

Source: mlx-lm 0.32.2, utils.py (`load_model`), tuner/utils.py (`linear_to_lora_layers`).
"""

from __future__ import annotations

from collections.abc import Mapping
from importlib import import_module
from typing import Any, NamedTuple

from lora_inject.errors import FormatError
from lora_inject.private import needed


class MlxModule(NamedTuple):
    """A module of mlx-lm's model.

    Attributes:
        kind: The name of its class.
        adaptable: Whether mlx-lm can put LoRA onto it.
        sizes: Of a linear layer its inputs and outputs, of an embedding its tokens and width; None
            for others.
    """

    kind: str
    adaptable: bool
    sizes: tuple[int, int] | None


def is_installed() -> bool:
    """Return whether mlx-lm can be imported."""
    try:
        import_module("mlx_lm.utils")
    except ImportError:
        return False
    return True


def layers_of(config: Mapping[str, Any]) -> dict[str, MlxModule]:
    """Return the modules of the model for a config.json, by name.

    Raises:
        FormatError: mlx-lm has no model of this type, or cannot read the config.
    """
    from mlx_lm.models.switch_layers import SwitchLinear

    classes_of = needed("mlx_lm.utils._get_classes", "mlx-lm's own model of a base")
    nn: Any = import_module("mlx.nn")
    try:
        model_class, of_args = classes_of(dict(config))
        model = model_class(of_args.from_dict(dict(config)))
    except Exception as error:  # whatever its classes raise, it would raise for the base
        problem = f"mlx-lm does not load this base ({error})"[:300]
        raise FormatError(
            "", problem, "Use a base that mlx-lm loads, and name its folder"
        ) from error

    def layer(module: Any) -> MlxModule:
        plain = isinstance(module, (nn.Linear, nn.Embedding))
        adaptable = plain or isinstance(module, SwitchLinear) or hasattr(module, "to_lora")
        rows, width = module.weight.shape if plain else (0, 0)
        sizes = (width, rows) if isinstance(module, nn.Linear) else (rows, width)
        return MlxModule(type(module).__name__, adaptable, sizes if plain else None)

    return {name: layer(module) for name, module in model.named_modules() if name}
