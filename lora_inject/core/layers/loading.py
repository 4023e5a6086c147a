"""When a state dict is looked at: before `load_state_dict` writes anything.

What it must tell is in `layers.forms`, which is imported with the first dict.
"""

from __future__ import annotations

import functools
from typing import Any

from torch import nn


@functools.cache
def watch_loading() -> None:
    """Compare, from now on, before `load_state_dict` of modules with adapters writes anything.

    A module's own hook is called too late, after its predecessors in the parent were written, and
    no module knows its parents. So torch's function is wrapped with the first swapped class.
    """
    load = nn.Module.load_state_dict

    @functools.wraps(load)
    def asked_first(self: nn.Module, state_dict: Any, *args: Any, **kwargs: Any) -> Any:
        if any("_lora" in module.__dict__ for module in self.modules()):
            from lora_inject.core.layers.forms import check_forms

            check_forms(self, state_dict)
        return load(self, state_dict, *args, **kwargs)

    nn.Module.load_state_dict = asked_first  # type: ignore[method-assign]
