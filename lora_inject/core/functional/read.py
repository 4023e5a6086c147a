"""One reading of a weight with adapters, and what a view of it is worth.

No tensor that a program gets: that is `lazy.LazyWeight`, which has a `View` of a `Read`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from lora_inject.core.functional.factors import Patch, cast_stack
from lora_inject.core.functional.gain import Gain
from lora_inject.core.functional.torch_inside import version_of
from lora_inject.core.functional.weight import LowRank, low_rank
from lora_inject.errors import LayerError


class Read:
    """One reading of a weight, shared by all lazy weights that come from it.

    Attributes:
        leaves: The weight, and every tensor of its updates and of its gain.
        shape: That of the value.
        is_stack: Whether the weight is a stack, of which matrices are picked.
        is_thin: Whether products are thin. A gain applies to the sum, not to its terms, and a
            kernel is not a factor of a product.
    """

    def __init__(
        self,
        weight: Tensor,
        patches: Sequence[Patch],
        gain: Gain | None,
        used: Callable[[], None],
        looks: bool,
    ) -> None:
        stacked = patches[0].spec.experts is not None if patches else weight.dim() == 3
        matrices = weight.dim() == (3 if stacked else 2)
        self.weight, self.patches, self.gain, self.shape = weight, patches, gain, weight.shape
        factors = [t for patch in patches for t in (patch.A, patch.B)]
        self.leaves = [weight, *factors, *(gain.tensors.values() if gain is not None else ())]
        self.is_stack = matrices and weight.dim() == 3
        self.is_thin = matrices and gain is None
        self._used: Callable[[], None] | None = used
        self._looks = looks
        self._versions = self._versions_now()
        self._whole: tuple[bool, LowRank] | None = None
        self._matrices: dict[bool, list[LowRank]] = {}  # by whether factors stay wide

    def _versions_now(self) -> list[int]:
        return list(map(version_of, self.leaves))

    def check(self, *, look: bool = False) -> None:
        """Raise if the weight or its adapter has changed since; report the first use.

        A `look` only shows or copies the value.
        """
        if self._versions_now() != self._versions:
            raise LayerError(
                "using what was read of a weight with an adapter",
                "its adapter, or the weight itself, was changed since",
                "Read the weight again from its module, or keep a .clone() of it; change what "
                "trains after the backward",
            )
        if self._used is not None and not (look and self._looks):
            self._used()
            self._used = None

    def sum(self) -> LowRank:
        """Return the weight and its updates, with the graph of the caller, none below autograd."""
        return low_rank(self.weight, self.patches, self.gain)

    def formed(self) -> Tensor:
        """Return the same as one tensor in the weight's shape."""
        return self.sum().formed(self.weight.dtype).reshape(self.shape)

    def whole(self) -> LowRank:
        """Return the sum for products, which share it, with a graph where gradients are enabled."""
        mode = torch.is_grad_enabled()
        if self._whole is None or mode > self._whole[0]:
            self._whole = mode, self.sum()
        return self._whole[1]

    def matrix(self, index: int) -> LowRank:
        """Return one matrix of a stack for products.

        In training all matrices are cast to the dtype of the products and unbound together, so the
        gradient of A is joined and cast once. In inference each matrix is taken separately, because
        few of many experts may be used.
        """
        if not torch.is_grad_enabled():
            return self.whole().at(index)
        base, terms, float32, _ = self.whole()
        wide = float32 or is_autocast(base)
        if wide not in self._matrices:

            def cut(stack: Tensor) -> tuple[Tensor, ...]:
                return _cut(stack if wide else cast_stack(stack, base.dtype))

            each = [(cut(left), cut(right), s) for left, right, s in terms]
            self._matrices[wide] = [
                LowRank(one, tuple((left[i], right[i], s) for left, right, s in each), float32)
                for i, one in enumerate(base.unbind())
            ]
        return self._matrices[wide][index]


class View:
    """What a lazy weight is of its read: all of it, some of its matrices, or any other view.

    Attributes:
        read: The reading.
        index: The matrices of a stack that were picked: one, some, or None for all.
        is_turned: Whether these are transposed.
        is_cut: Whether no gradient reaches A and B: it is detached, or a view under `no_grad`.
        step: How any other view is made of the view before it; products with it are not thin.
        layout: A tensor on meta with the view's shape and strides.
    """

    __slots__ = ("_beneath", "_formed", "index", "is_cut", "is_turned", "layout", "read", "step")

    def __init__(
        self,
        read: Read,
        index: int | Tensor | None = None,
        is_turned: bool = False,
        is_cut: bool = False,
        step: tuple[View, Callable[[Tensor], Tensor]] | None = None,
        layout: Tensor | None = None,
    ) -> None:
        self.read, self.index, self.is_turned, self.is_cut = read, index, is_turned, is_cut
        self.step, self.layout = step, layout
        self._formed: Tensor | None = None
        self._beneath: Tensor | None = None

    @property
    def is_stack(self) -> bool:
        """Whether it is a whole stack, of which matrices can be picked."""
        return self.read.is_stack and self.index is None and self.step is None

    def value(self) -> LowRank:
        """Return the sum that it represents, for products."""
        read, index = self.read, self.index
        read.check()
        if isinstance(index, int):
            weight = read.matrix(index)
        else:
            weight = read.whole() if index is None else read.whole().at(index)
        weight = weight.turned() if self.is_turned else weight
        return weight.detached() if self.is_cut and torch.is_grad_enabled() else weight

    def formed(self, *, look: bool = False) -> Tensor:
        """Return the effective weight as a plain tensor with a graph, formed once."""
        if self.is_cut or not torch.is_grad_enabled():
            return self.beneath(look=look)
        if self._formed is None or not look:
            self.read.check(look=look)
        if self._formed is None:
            self._formed = self._form(View.formed, look)
        return self._formed

    def beneath(self, *, look: bool = False) -> Tensor:
        """Return the effective weight without a graph, formed once."""
        if self._beneath is None or not look:
            self.read.check(look=look)
        if self._beneath is None:
            self._beneath = self._form(View.beneath, look).detach()
        return self._beneath

    def _form(self, form: Callable[..., Tensor], look: bool) -> Tensor:
        if self.step is not None:
            before, step = self.step
            formed, layout = form(before, look=look), before.layout
            if layout is not None and formed.stride() != layout.stride():  # W is not contiguous
                like = torch.empty_strided(layout.shape, layout.stride(), dtype=formed.dtype)
                formed = like.to(formed.device).copy_(formed)
            return step(formed)
        read, index = self.read, self.index
        formed = read.formed() if index is None else read.sum().at(index).formed(read.weight.dtype)
        return formed.mT if self.is_turned else formed


def is_autocast(t: Tensor) -> bool:
    """Whether autocast changes the dtypes of products on the device of a tensor."""
    kind = t.device.type
    return kind != "meta" and torch.is_autocast_enabled(kind)


def _cut(stack: Tensor) -> tuple[Tensor, ...]:
    matrices: tuple[Tensor, ...] = _Cut.apply(stack)  # type: ignore[no-untyped-call]
    return matrices


class _Cut(torch.autograd.Function):
    """`stack.unbind()`; its backward makes one zero tensor for all matrices that were not used.

    Of 128 experts a batch may use eight: torch's own would launch 120 zeros for each factor.
    """

    @staticmethod
    def forward(ctx: Any, stack: Tensor) -> tuple[Tensor, ...]:
        ctx.set_materialize_grads(False)
        return stack.detach().unbind()

    @staticmethod
    def backward(_: Any, *grads: Tensor | None) -> Tensor:
        some = next(g for g in grads if g is not None)
        zero = some.new_zeros(()).expand_as(some)
        return torch.stack([zero if g is None else g for g in grads])
