"""Losses, gradients and steps of several trials, with one pass of the base for all, or few.

A batch is the concatenation of the trials' rows, and each row uses the adapter of its own trial,
so each trial gets the same gradient as alone.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from functools import partial
from typing import Any, NamedTuple, NoReturn

import torch
from torch import Tensor, nn

from lora_inject.core.roots.disabling import selecting
from lora_inject.errors import StateError
from lora_inject.trials.batches import Forward, Joined, n_tokens, parted, plain_forward
from lora_inject.trials.flat import Buffer, Flat, Gradient, Optimizer, Setting, clip, norms
from lora_inject.trials.in_pass import InPass
from lora_inject.trials.isolation import Checks
from lora_inject.trials.losses import (
    Loss,
    Losses,
    causal_loss,
    causal_losses,
    default_loss,
    ends_of,
    refuse_unlabeled,
    scalar_loss,
)
from lora_inject.trials.passes import Pass
from lora_inject.trials.written import shared_by_trials, unwritten


class Asked(NamedTuple):
    """What a pass is to compute.

    Attributes:
        batches: By trial.
        forward: Runs the model on a joined batch.
        loss: Takes a trial's outputs and its batch; or that of each trial, by name.
        sharing: The trials whose batch lies in memory that another's uses as well.
    """

    batches: Mapping[str, Any]
    forward: Forward
    loss: Losses
    sharing: frozenset[str]

    @classmethod
    def of(
        cls,
        model: nn.Module,
        batches: Mapping[str, Any],
        forward: Forward | None,
        loss: Losses | None,
    ) -> Asked:
        """Return what is asked for, with the defaults of a model.

        Raises:
            StateError: There are losses by name, and a batch has none.
        """
        forward = forward or plain_forward(model)
        loss = default_loss(model) if loss is None else loss
        if isinstance(loss, Mapping):
            for name in batches.keys() - loss.keys():
                remedy = "Give one for each batch, or one function for all"
                raise StateError(f"loss of trial {name!r}", "there is none of that name", remedy)
        return cls(batches, forward, loss, shared_by_trials(batches))

    def loss_of(self, name: str) -> Loss:
        """Return the loss of a trial."""
        return self.loss[name] if isinstance(self.loss, Mapping) else self.loss


class Together:
    """The tensors of all trials of one model, and what computes their gradients and steps.

    Args:
        model: The model, with the adapters of the trials.
        max_tokens: As for `Trials`.
        packed: As for `Trials`.

    Attributes:
        flats: The tensors of each trial.
        random: State of the generator of each trial.
        pending: The loss of each trial whose gradients no step has taken yet.
        checks: What was checked of the forward.
        buffer: The memory of the trials' tensors.
        optimizer: The optimizer of all trials.
    """

    def __init__(self, model: nn.Module, *, max_tokens: int | None, packed: bool) -> None:
        self.model = model
        self.max_tokens = max_tokens
        self.packed = packed
        self.flats: dict[str, Flat] = {}
        self.random: dict[str, Tensor] = {}
        self.pending: dict[str, float] = {}
        self.checks = Checks(model)
        self.optimizer = Optimizer()
        self.buffer = Buffer(torch.empty(0), 0)

    def settle(self) -> None:
        """Move the tensors of all trials that train into one buffer, as large as they are."""
        flats = [flat for flat in self.flats.values() if not flat.is_frozen]
        like = flats[0].example if flats else torch.empty(0)
        self.buffer = Buffer(like, sum(flat.n_parameters for flat in flats))
        for flat in flats:
            flat.move(self.buffer)

    def forget(self, name: str) -> None:
        """Forget a trial."""
        for mapping in (self.random, self.pending):
            mapping.pop(name, None)
        self.checks.forget(name)
        flat = self.flats.pop(name)
        flat.release()
        self.optimizer.drop(flat)

    # --------------------------------------------------------------------------------- gradients

    def add_gradients(self, asked: Asked) -> dict[str, float]:
        """Add the gradients of some trials to those that no step has taken; return the losses.

        A loss that is not finite has no gradient. Whatever raises leaves all gradients as they
        were.
        """
        names = [*asked.batches]
        before = {name: self.flats[name].gradient() for name in names if name in self.pending}
        random = dict(self.random)
        self._begin(names)
        try:
            losses = self._gradients(self._groups(asked.batches), asked)
            if self.packed and not self._are_finite(losses):
                # A masked attention multiplies the NaN of one trial by 0, so it is in others, too.
                self._put_back(names, before, random)
                one_by_one = ({name: own} for name, own in asked.batches.items())
                losses = self._gradients(one_by_one, asked)
        except BaseException:
            self._put_back(names, before, random)
            raise
        for name, value in losses.items():
            self.pending[name] = self.pending.get(name, 0.0) + value
        return losses

    def _put_back(
        self, names: Iterable[str], before: Mapping[str, Gradient], random: Mapping[str, Tensor]
    ) -> None:
        """Put gradients and random numbers back."""
        self.random.update(random)
        self._begin(names)
        for name, gradient in before.items():
            self.flats[name].set_gradient(gradient)

    def _begin(self, names: Iterable[str]) -> None:
        """Let gradients begin at zero, or add to those that no step has taken."""
        self.optimizer.zero([self.flats[name] for name in names if name not in self.pending])
        for name in names:
            self.flats[name].collect()

    def _are_finite(self, losses: Mapping[str, float]) -> bool:
        each = norms([self.flats[name] for name in losses])
        return all(map(math.isfinite, (*losses.values(), *each)))

    def _gradients(self, groups: Iterable[Mapping[str, Any]], asked: Asked) -> dict[str, float]:
        losses: dict[str, float] = {}
        for group in groups:
            losses |= self._backward(group, asked)
        return losses

    def _groups(self, batches: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
        """Yield groups of batches with at most `max_tokens`; each has one trial at least."""
        group: dict[str, Any] = {}
        tokens = 0
        for name, batch in batches.items():
            size = n_tokens(batch)
            if group and self.max_tokens is not None and tokens + size > self.max_tokens:
                yield group
                group, tokens = {}, 0
            group[name] = batch
            tokens += size
        yield group

    def _backward(self, batches: Mapping[str, Any], asked: Asked) -> dict[str, float]:
        """Run forward and backward of some trials, without losses that are not finite."""
        of = self._joined(batches, asked.forward)
        outputs = self._outputs(of, asked.forward, self.random)
        parts = parted(outputs, of)
        if asked.loss is causal_loss:
            losses = dict(zip(batches, causal_losses(outputs, batches, of), strict=True))
        else:
            losses = {n: _loss(asked, parts[n], batch, n) for n, batch in batches.items()}
        if constant := [name for name, one_loss in losses.items() if not one_loss.requires_grad]:
            _refuse_untrained(constant[0])
        numbers = torch.stack([one_loss.detach() for one_loss in losses.values()]).tolist()
        values = dict(zip(losses, numbers, strict=True))
        if asked.loss is causal_loss:
            refuse_unlabeled(values, batches)
        # A loss that leads to other outputs than another one may leave layers out.
        alike: dict[Any, list[str]] = {}
        for name in filter(lambda name: math.isfinite(values[name]), values):
            ends = None if asked.loss is causal_loss else ends_of(losses[name], outputs)
            alike.setdefault(ends, []).append(name)
        del outputs, parts  # of the size of the logits
        self._backward_of(losses, list(alike.values()))
        return values

    def _backward_of(self, losses: Mapping[str, Tensor], alike: Sequence[Sequence[str]]) -> None:
        """Run the backward of each group of losses that lead to the same outputs."""
        for i, names in enumerate(alike, 1):
            starts = {name: self.flats[name].starts for name in names}
            self.buffer.counted = frozenset[int]().union(*starts.values())
            total = torch.stack([losses[name] for name in names]).sum()
            total.backward(retain_graph=i < len(alike))  # type: ignore[no-untyped-call]
            for name in names:
                if self.buffer.reached.isdisjoint(starts[name]):
                    _refuse_untrained(name)

    # ------------------------------------------------------------------------------------- steps

    def step(self, n_steps: Mapping[str, int], lr: float | None) -> dict[str, float]:
        """Step some trials by their gradients, after as many steps of each.

        Returns:
            The norm of each gradient before clipping. A trial whose norm is not finite is not
            stepped.
        """
        flats = {name: self.flats[name] for name in n_steps}
        if not flats:
            return {}
        norm_of = dict(zip(flats, norms([*flats.values()]), strict=True))
        stepped = {name: flats[name] for name, norm in norm_of.items() if math.isfinite(norm)}
        limits = [flat.trial.clip for flat in stepped.values()]
        clip([*stepped.values()], [norm_of[name] for name in stepped], limits)
        settings: list[tuple[nn.Parameter, Setting]] = []
        for name, flat in stepped.items():
            used = flat.used(self.optimizer)
            each = flat.settings(n_steps[name], lr)
            settings += [(vector, setting) for vector, setting in each if vector in used]
        self.optimizer.step(settings)
        for name in flats:
            self.pending.pop(name)
        return norm_of

    def stop(self, name: str) -> None:
        """Let a trial train no more."""
        self.pending.pop(name, None)
        self.flats[name].freeze()
        self.buffer.forget()

    # ------------------------------------------------------------------------------------ losses

    def losses(self, asked: Asked) -> dict[str, float]:
        """Return the loss of each trial without gradients and without dropout."""
        losses = self._evaluated(self._groups(asked.batches), asked)
        if self.packed and not all(map(math.isfinite, losses.values())):  # as for gradients
            one_by_one = ({name: batch} for name, batch in asked.batches.items())
            losses = self._evaluated(one_by_one, asked)
        if asked.loss is causal_loss:
            refuse_unlabeled(losses, asked.batches)
        return losses

    def _evaluated(self, groups: Iterable[Mapping[str, Any]], asked: Asked) -> dict[str, float]:
        losses: dict[str, float] = {}
        for group in groups:
            of = self._joined(group, asked.forward)
            outputs = parted(self._outputs(of, asked.forward), of)
            for name, one in group.items():
                losses[name] = _loss(asked, outputs[name], one, name).item()
        return losses

    # -------------------------------------------------------------------------------------- runs

    def _outputs(
        self, of: Joined, forward: Forward, random: dict[str, Tensor] | None = None
    ) -> Any:
        """Run the base once; without dropout if `random` is None."""
        each = tuple(name for name, n in of.sizes.items() for _ in range(n))
        rows = InPass(Pass(of, self.buffer, random), each)
        self.buffer.refresh()
        with selecting(self.model, rows, "Trials.step"):
            return forward(of.batch)

    def _joined(self, batches: Mapping[str, Any], forward: Forward) -> Joined:
        """Join batches, and check once that nothing would leak from one to another."""
        run = partial(self._outputs, forward=forward)
        return self.checks.joined(batches, self.flats, run, forward, packed=self.packed)


def _loss(asked: Asked, outputs: Any, batch: Any, name: str) -> Tensor:
    """Return a trial's loss, which must not change what other trials read."""
    alone = name not in asked.sharing
    with nullcontext() if alone else unwritten(batch, f"loss of trial {name!r}"):
        return scalar_loss(asked.loss_of(name), outputs, batch, name)


def _refuse_untrained(name: str) -> NoReturn:
    what = "no gradient leads from it to A and B"
    remedy = "Compute it from the outputs; li.unreached lists layers that take no part in a forward"
    raise StateError(f"loss of trial {name!r}", what, remedy)
