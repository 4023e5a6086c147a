"""Stacked experts whose tokens have adapters of their own: each pair of expert and adapter is one.

transformers sorts the tokens by the number of their expert, and multiplies each group by a matrix
of the stack. We give its own forward a number for each pair instead, `expert * n + adapter`, and a
stack with a matrix for each pair. With two experts, and adapters a and b of two tokens each:

    token     a0  a1  b0  b1
    expert     0   1   1   0        from the router
    adapter    0   0   1   1
    pair       0   2   3   1        expert * 2 + adapter

    stack     [E0 + a,  E0 + b,  E1 + a,  E1 + b]

So b1, of pair 1, is multiplied by E0 + b. The stack is lazy (`lazy_stack`): E0 and E1 are
multiplied once for the tokens of all adapters, and only the low-rank terms are those of a pair.

Gain: with 8 trials of 8, 32 and 128 tokens a step takes 0.63, 0.63 and 0.80 of the time of running
the stack for each (2 layers, 8 experts of 512 to 1,024, float32, one CPU thread).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lora_inject.core.layers.attached import Entry, attached_to, held_by
from lora_inject.core.layers.sending import sent_once
from lora_inject.errors import LayerError
from lora_inject.experts.by_adapter import lazy_stack

# Forwards that only pick matrices and multiply; kernels would get the stack formed.
_FORWARDS = {"eager", "batched_mm", "grouped_mm"}


def sorts_tokens(module: nn.Module) -> bool:
    """Whether a module is a stack of experts that takes the tokens and the experts of each."""
    return hasattr(module, "_is_expert_parallel")  # by transformers' use_experts_implementation


def by_expert(
    module: Any,
    names: Sequence[str | None],
    of_token: Tensor,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
) -> Tensor | None:
    """Return the output of a stack for tokens of several adapters; None if it must run for each.

    Args:
        module: The stack.
        names: The adapters, None for the base.
        of_token: `(tokens,)`, the place in `names` of each token's adapter.
        args: What the forward takes, among it the experts of each token `(tokens, k)`.
        kwargs: Likewise, by name.
    """
    attached = attached_to(module)
    assert attached is not None
    entries = [e for table in attached.reads.values() for n in names if (e := table.get(n or ""))]
    arguments: dict[Any, Any] = {**dict(enumerate(args)), **kwargs}
    key = _key_of_experts(arguments)
    if key is None or not _picks_and_multiplies(module) or not all(map(_is_plain, entries)):
        return None
    attached.used(entries)
    module._lora_check_vain(t for e in entries for t in e.tensors(module).values())
    arguments[key] = arguments[key] * len(names) + of_token[:, None]
    args = tuple(arguments.pop(i) for i in range(len(args)))
    # The forward of transformers' class, as a function of a stack that is none of its instances.
    output: Tensor = type(module)._lora_plain.forward(_Pairs(module, names), *args, **arguments)
    return output


def _key_of_experts(arguments: Mapping[Any, Any]) -> Any:
    """Return the key of the one argument with whole numbers, the experts; None if not one."""
    tensors = {key: t for key, t in arguments.items() if isinstance(t, Tensor)}
    whole = [key for key, t in tensors.items() if not t.is_floating_point()]
    return whole[0] if len(whole) == 1 else None


def places_of_runs(sizes: Sequence[int], device: torch.device) -> Tensor:
    """Return the number of the run that each token is in, of runs of so many tokens."""
    return torch.arange(len(sizes), device=device).repeat_interleave(
        sent_once(tuple(sizes), device),
        output_size=sum(sizes),  # else the host waits for the device
    )


def check_tokens(module: nn.Module, x: Tensor, n_rows: int) -> None:
    """Refuse tokens of a stack that are not as many for each row.

    Raises:
        LayerError: Their number is no multiple of that of the rows.
    """
    if x.shape[0] % n_rows:
        raise LayerError(
            f"routed() with {n_rows} rows",
            f"a {type(module).__name__} got {x.shape[0]:,} tokens, which is no multiple of that",
            "Give one adapter for each row of the batch, and pad rows to one length",
        )


def _picks_and_multiplies(module: Any) -> bool:
    """Whether a stack's forward only picks matrices by number and multiplies with them.

    Its matrices are then plain parameters, and no layer inside has an adapter of its own.
    """
    if getattr(module.config, "_experts_implementation", "") not in _FORWARDS:
        return False
    attached = attached_to(module)
    assert attached is not None
    if not all(type(p) is nn.Parameter for p in attached.base(module._parameters).values()):
        return False
    return not any(attached_to(part) for part in module.modules() if part is not module)


def _is_plain(entry: Entry) -> bool:
    """Whether an entry is an update of stacked matrices, in the dtype of the products."""
    spec = entry.spec
    return spec is not None and spec.experts is not None and spec.compute == "base"


class _Pairs:
    """What a forward of experts sees as its `self`: a stack with one expert for each pair.

    Its stacked matrices have an expert's matrix once for each adapter, with the adapter's updates;
    its biases have an expert's bias as often. All else is the module's.
    """

    def __init__(self, module: Any, names: Sequence[str | None]) -> None:
        self._module, self._names = module, names
        self.num_experts = module.num_experts * len(names)

    def __getattr__(self, name: str) -> Any:
        module = self._module
        raw = module._parameters.get(name)
        if raw is None or raw.shape[:1] != (module.num_experts,):
            return getattr(module, name)
        if raw.dim() != 3:
            return raw.repeat_interleave(len(self._names), 0)
        table, held = module._lora.reads.get(name, {}), held_by(module)
        updates = []
        for adapter in self._names:
            entry = table.get(adapter or "")
            updates.append([] if entry is None else entry.patches(held, 1.0))
        return lazy_stack(raw, updates)
