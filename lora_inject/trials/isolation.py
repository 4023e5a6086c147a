"""Checks that a forward keeps trials apart, before the first step.

They run the forward with other values where a trial, or padding, must have no influence. All other
outputs must then stay the same bit for bit, and up to rounding where a stack of experts sorts the
tokens of all trials: products of other sizes round differently.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from lora_inject.adapter.generators import generators_of
from lora_inject.errors import StateError
from lora_inject.trials.batches import Joined, joined, parted
from lora_inject.trials.flat import Flat

Run = Callable[[Joined], Any]
"""Runs the base on a joined batch, without dropout."""


@torch.no_grad()
def check_apart(
    run: Run, of: Joined, flat: Flat, layers: Sequence[nn.Module], *, exact: bool
) -> None:
    """Check that no trial's rows change another's outputs, and that the base draws no numbers.

    The A of the first trial, in `flat`, is set to NaN. Packed, 1 is added to the outputs of its
    tokens, because a masked attention multiplies them by 0.
    """
    name, *others = of.sizes
    sources = generators_of(p.device for layer in layers for p in layer.parameters())
    before = [source.get_state() for source in sources]
    plain = parted(run(of), of)
    after = [source.get_state() for source in sources]
    if not all(map(torch.equal, after, before)):
        for source, state in zip(sources, before, strict=True):
            source.set_state(state)
        raise StateError(
            "step",
            "the forward of the base draws random numbers, one stream for all trials",
            "Set the base's own dropout to 0, or train in eval mode",
        )
    if not others:
        return
    where = torch.arange(sum(of.sizes.values())) < of.sizes[name]
    with _changed(layers, where[None]) if of.packed else flat.broken():
        broken = parted(run(of), of)
    for other in others:
        if not _same(plain[other], broken[other], exact):
            mixes = "mixes rows (BatchNorm in training, negatives within the batch)"
            remedy = "Use a forward that treats rows independently, or BatchNorm in eval mode"
            if of.packed:
                mixes = "does not keep packed sequences apart"
                remedy = (
                    "Give position_ids that start at 0 in each sequence; transformers reads them "
                    "so without attention_mask and with model.config.use_cache = False only"
                )
            found = f"the rows of {name!r} change the outputs of {other!r}: the forward {mixes}"
            raise StateError("step", found, remedy)
    if _same(plain[name], broken[name], True):
        raise StateError(
            "step", f"the adapter of {name!r} takes no part in the forward", "See li.unreached"
        )


@torch.no_grad()
def check_padding(
    run: Run,
    batches: Mapping[str, Any],
    of: Joined,
    layers: Sequence[nn.Module],
    *,
    exact: bool,
) -> list[bool]:
    """Check that padding changes no output.

    The shortest rows must give the outputs that they give alone. Other values of the padding, in
    the outputs of adapted layers, must not change them by a bit.

    Returns:
        For each tensor of the outputs, whether its second dimension is the rows' positions.
    """
    assert of.lengths is not None
    lengths = of.lengths
    short, long = min(lengths, key=lengths.__getitem__), max(lengths, key=lengths.__getitem__)
    both = joined({name: batches[name] for name in batches if name in (short, long)})
    one = joined({short: batches[short]})
    alone = [t for t in tree_leaves(run(one)) if isinstance(t, Tensor)]
    outputs = run(both)
    tensors = [t for t in tree_leaves(outputs) if isinstance(t, Tensor)]
    differs = StateError(
        f"step, rows of {lengths[short]} and {lengths[long]} positions",
        f"padding to one length changes the outputs of {short!r}",
        "Give a mask of padding (attention_mask) that the model uses, or rows of one length",
    )
    if len(alone) != len(tensors):
        raise differs
    positions = [
        a.shape[1:2] == (lengths[short],) and t.shape[1:2] == (lengths[long],)
        for a, t in zip(alone, tensors, strict=True)
    ]
    each = [lengths[name] for name, size in both.sizes.items() for _ in range(size)]
    padded = torch.arange(lengths[long]) >= torch.tensor(each)[:, None]
    with _changed(layers, padded):
        other = parted(run(both), both, positions)[short]
    found = parted(outputs, both, positions)[short]
    if not _same(found, other, exact) or not _close(tree_leaves(found), alone):
        raise differs
    return positions


@contextmanager
def _changed(layers: Iterable[nn.Module], tokens: Tensor) -> Iterator[None]:
    """Add 1 to the outputs of layers where `tokens`, bool `(rows, positions)`, is true."""

    def add(_: nn.Module, __: Any, out: Any) -> Any:
        if not isinstance(out, Tensor) or out.dim() < 2:
            return out
        where = tokens.to(out.device)
        if out.shape[:2] == where.shape:
            return out + where.view(*where.shape, *[1] * (out.dim() - 2)).to(out.dtype)
        flat = len(out) == where.numel()
        return out + where.flatten()[:, None].to(out.dtype) if flat else out

    handles = [layer.register_forward_hook(add) for layer in layers]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _same(first: Any, second: Any, exact: bool) -> bool:
    pairs = zip(tree_leaves(first), tree_leaves(second), strict=True)
    tensors = [(a, b) for a, b in pairs if isinstance(a, Tensor)]
    if exact:
        return all(bool(((a == b) | (a.isnan() & b.isnan())).all()) for a, b in tensors)
    alike = all(torch.equal(a.isnan(), b.isnan()) for a, b in tensors)
    return alike and _close(
        [a.nan_to_num() for a, _ in tensors], [b.nan_to_num() for _, b in tensors]
    )


def _close(found: Iterable[Any], wanted: Iterable[Tensor]) -> bool:
    """Whether tensors are equal but for what rounding may do."""
    for a, b in zip((t for t in found if isinstance(t, Tensor)), wanted, strict=True):
        if a.shape != b.shape:
            continue  # positions in another dimension: no loss of this package reads it
        if a.is_floating_point():
            off = (a.double() - b.double()).norm() > 8 * torch.finfo(
                a.dtype
            ).eps ** 0.5 * b.double().norm()
            if off:
                return False
    return True
