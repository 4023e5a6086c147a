"""An adapter in memory as PEFT has it: tensors and config, without files.

This is what engines that run beside a trainer take. vLLM: `LoRAModel.from_lora_tensors(tensors=,
peft_helper=PEFTHelper.from_dict(config))` (vLLM 0.32, lora/lora_model.py, lora/peft_helper.py),
which verl's `TensorLoRARequest(peft_config=, lora_tensors=)` calls. SGLang:
`load_lora_adapter_from_tensors(config_dict=, serialized tensors)` (SGLang 0.5.23,
srt/managers/io_struct.py; srt/lora/lora_config.py, `LoRAConfig.from_dict`). PEFT:
`LoraConfig(**config)` and `set_peft_model_state_dict`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lora_inject.core.adapter.other_tensors import with_every_expert
from lora_inject.core.adapter.site_state import FLOATS
from lora_inject.core.functional.finite import lost_by_cast
from lora_inject.core.layers.library import this_process_writes
from lora_inject.core.model.save import saved_state
from lora_inject.core.roots.root import Injected
from lora_inject.errors import FormatError, check_type, within
from lora_inject.formats.peft.folder import contents
from lora_inject.formats.servers import plain_facts, plain_state


def peft_state(
    model: nn.Module,
    name: str = "default",
    *,
    portable: bool = False,
    device: str | torch.device | None = None,
    dtype: torch.dtype | None = None,
    first_only: bool = False,
    unused: Sequence[str] = (),
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return an adapter in memory as PEFT has it: its tensors and its config.

    Equal to PEFT's `get_peft_model_state_dict` and `adapter_config.json`, and to what
    `save_adapter` would write, which also refuses the same. Shards are gathered, so that with
    shards every process has to call it.

    Args:
        model: The root, or a module that holds it.
        name: The adapter.
        portable: One rank for all sites, scale 1, names without patterns: for engines that read
            little of the config, such as SGLang.
        device: Where the tensors are to be; by default where the adapter is.
        dtype: Their floating point dtype; by default that of the adapter, float32 over a 16-bit
            base. Each value is rounded once.
        first_only: Of several processes with shards only that of rank 0 gets the tensors; the
            others get none, and the same config.
        unused: As for `save_adapter`: patterns of sites that may be without use.

    Returns:
        The tensors by PEFT's keys (`base_model.model.LAYER.lora_A.weight`), contiguous, in memory
        of their own, without a gradient; and the config as plain data.

    Raises:
        StateError: There is no such adapter, a site of it is inert, or it is merged.
        FormatError: It holds NaN or Inf, also after rounding, or PEFT cannot express it.

    Examples:
        >>> from lora_inject.core.model.inject import inject
        >>> net = nn.Sequential(nn.Linear(4, 6))
        >>> _ = inject(net, {"rank": 2, "alpha": 4, "targets": ["0"]})
        >>> tensors, config = peft_state(net, dtype=torch.bfloat16)
        >>> {key: tuple(tensor.shape) for key, tensor in tensors.items()}
        {'base_model.model.0.lora_A.weight': (2, 4), 'base_model.model.0.lora_B.weight': (6, 2)}
        >>> config["r"], config["lora_alpha"], config["target_modules"]
        (2, 4, ['0'])
    """
    asked = f"peft_state of {name!r}"
    _check_form(device, dtype, asked)
    survey = Injected(model, asked)
    state, facts = saved_state(survey, name, "portable" if portable else "peft", unused)
    state = with_every_expert(state)
    with within(asked):
        stated = facts()
        shape = (plain_state(state), plain_facts(stated)) if portable else (state, stated)
        made = contents(*shape)
        given = made.tensors if this_process_writes(survey) or not first_only else {}
        tensors = {key: _sent(tensor, device, dtype) for key, tensor in given.items()}
        for key, tensor in tensors.items():
            if not tensor.is_meta and lost_by_cast(given[key], tensor.to(given[key].device)):
                problem = f"its values are not finite in {tensor.dtype}, or become 0"
                raise FormatError(f"tensor {key!r}", problem, "Give a wider dtype")
    return tensors, made.config


def _check_form(device: str | torch.device | None, dtype: torch.dtype | None, asked: str) -> None:
    """Refuse a device or a dtype that tensors cannot be sent in."""
    if dtype is not None:
        check_type(f"{asked}, dtype", dtype, torch.dtype, "Give torch.bfloat16", FormatError)
        if dtype not in FLOATS:
            raise FormatError(f"{asked}, dtype", f"it is {dtype}", "Give a floating point dtype")
    if device is not None:
        try:
            torch.empty(0, device=device)
        except (AssertionError, NotImplementedError, RuntimeError, TypeError) as error:
            problem = str(error).splitlines()[0]
            remedy = "Give one, such as 'cpu' or 'cuda:0'"
            raise FormatError(f"{asked}, device {device!r}", problem, remedy) from None


def _sent(tensor: Tensor, device: str | torch.device | None, dtype: torch.dtype | None) -> Tensor:
    """Return a tensor for somebody else, in memory of its own."""
    values = tensor.detach()
    kind = dtype if values.is_floating_point() else None
    own = values.to(device=device, dtype=kind, copy=True)
    return own.contiguous()
