"""Adapters with a gain (DoRA): on a layer, in a forward, and in a mix, where each is alone.

`core/functional/gain.py` has the arithmetic.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lora_inject.core.adapter.variants import VARIANTS
from lora_inject.core.functional.factors import Update
from lora_inject.core.functional.gain import Gain, gained, norms_of, updated_norms
from lora_inject.core.functional.plain_operations import add_updates
from lora_inject.core.layers.attached import Attached, Entry, Recipe, factors_of, held_by
from lora_inject.core.layers.packed_weights import dense, is_known
from lora_inject.core.layers.plain_tensors import PLAIN, is_quantized
from lora_inject.core.layers.selected import Selected
from lora_inject.core.layers.unusual_linear import with_whole_weight
from lora_inject.core.spec.sites import SiteSpec
from lora_inject.errors import LayerError, article


def gain_of(entry: Entry, held: Mapping[str, Any]) -> Gain | None:
    """Return the gain of an entry's outputs, None if its variant has none."""
    spec = entry.spec
    if spec is None or not entry.gained:
        return None
    variant = VARIANTS[spec.variant]
    tensors = {role: held[entry.names[role]] for role in variant.roles}
    return Gain(variant.gain, tensors, spec.spans)


def check_mixed(taking: Sequence[tuple[Entry, float]]) -> None:
    """Raise if an adapter with a gain is not alone on a tensor, or not with weight 1."""
    alone = next((entry for entry, _ in taking if entry.gained), None)
    if alone is None or (len(taking) == 1 and taking[0][1] == 1.0):
        return
    assert alone.spec is not None
    mix = ", ".join(f"{entry.adapter!r} x {weight:g}" for entry, weight in taking)
    raise LayerError(
        f"site {alone.spec.name!r} with {mix}",
        f"the {alone.spec.variant} of {alone.adapter!r} scales what W and all updates give "
        "together: it is not defined with another adapter, or with another weight",
        f"Activate {alone.adapter!r} alone, with weight 1",
    )


def first_norms(module: nn.Module, spec: SiteSpec, weight: Tensor) -> Tensor:
    """Return the norms of the adapted outputs of W, equal in every bit to the first forward's."""
    if is_quantized(weight):
        weight = dense(module, weight)
    matrix = weight.detach().reshape(spec.matrix_shape)
    if spec.update == "weight":
        matrix = matrix.to(torch.promote_types(weight.dtype, torch.float32))
    norms = norms_of(matrix, spec.transposed)
    return torch.cat([norms[start:stop] for start, stop in spec.spans])


# -------------------------------------------------------------------------------------- forwards


def with_gain(
    layer: Any,
    mix: Selected,
    recipes: Sequence[Recipe],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    updates: Sequence[Update],
) -> Any:
    """Compute a layer with the updates of a mix, and the gain that one of its adapters may have."""
    alone = gained_entry(layer._lora, mix)
    if alone is None:
        return layer._lora_with_updates(args, kwargs, updates)
    gain = gain_in_forward(layer, alone, recipes)
    return layer._lora_with_gain(args, kwargs, updates, gain)


def gained_entry(attached: Attached, mix: Selected) -> Entry | None:
    """Return the entry on the output that has a gain under a mix; it is the only one."""
    on_output = attached.forward
    taking = [(on_output[n], w) for n, w in mix.names.items() if n in on_output]
    alone = next((entry for entry, _ in taking if entry.gained), None)
    if alone is not None:
        copies = attached.reads.get(alone.param, {})
        taking += [(copies[n], w) for n, w in mix.names.items() if n in copies]
        check_mixed(taking)
    return alone


def gain_in_forward(layer: Any, entry: Entry, recipes: Iterable[Recipe]) -> Tensor:
    """Return the gains of an adapter's outputs `(out,)`, with a gradient to its magnitude."""
    of_kind = layer.weight_name if layer._lora_stock else layer.weight_of(type(layer))
    weight = layer._lora_own(of_kind)
    if is_quantized(weight) and is_known(layer, weight):
        weight = dense(layer, weight)
    elif type(weight) not in PLAIN:
        raise LayerError(
            f"a forward of site {entry.spec.name!r}",  # type: ignore[union-attr]
            f"its gain needs the norms of W, which is {article(type(weight).__name__)} here",
            "Shard with fully_shard, or train this layer with variant: lora",
        )
    gain = gain_of(entry, held_by(layer))
    assert gain is not None
    updates = factors_of(recipes, held_by(layer), training=False)
    return gain.of(updated_norms(weight, updates, layer.geometry(layer).transposed))


def linear_with_gain(
    layer: Any,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    updates: Sequence[Update],
    gain: Tensor,
) -> Any:
    """Compute a linear layer with a sum of updates u, and multiply by a gain g.

    `g (W x + u) + b = (W x + b + u) + (g - 1) (W x + u)`, which is the plain output to the bit
    where g is 1 and u is 0. With dropout the second W x uses the dropped x, too.
    """
    x = layer._lora_input(args, kwargs)
    if x.is_nested:
        raise LayerError(
            "an adapter with a gain", f"a {type(layer).__name__} got a nested tensor",
            "Pad the batch",
        )  # fmt: skip
    if layer._lora_stock and x.layout is not torch.strided:
        return with_whole_weight(layer, x)
    if not updates[0].dropout:
        y = base = layer._lora_with_updates(args, kwargs, updates)
    else:
        float32 = layer._lora.float32
        kept = F.dropout(x, updates[0].dropout)
        updates = [update._replace(dropout=0.0) for update in updates]
        plain = layer._lora_without_updates(args, kwargs)
        y = add_updates(plain, kept, updates, float32=float32)
        base = layer._lora_with_updates((kept,), {}, updates)
    bias = layer._lora_own("bias")
    return gained(y, base if bias is None else base - bias.to(base.dtype), gain)
