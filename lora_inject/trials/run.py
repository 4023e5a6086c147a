"""One trial on a model: how its adapter joins, its tensors, its optimizer, and what it has done.

An adapter that is injected becomes the only one that is active and trains; those of trials join.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from lora_inject.core.layers.attached import held_by
from lora_inject.core.layers.snapshot import all_or_nothing
from lora_inject.core.layers.survey import Carried, Survey
from lora_inject.core.layers.weight_kinds import sharded_by
from lora_inject.core.model.inject import put_config
from lora_inject.core.model.read_off import adapter_state
from lora_inject.core.model.training import train_only
from lora_inject.core.roots.root import entries, find_root
from lora_inject.errors import StateError
from lora_inject.rows.kept import random_kept
from lora_inject.trials.trial import Trial

Sites = frozenset[tuple[nn.Module, str, str]]
"""Where tensors are: module, parameter and role of each."""
RECENT = 10
"""Steps over which the training loss in the table is averaged."""
KEPT = ("n_steps", "n_passes", "losses", "pending", "held_out", "stopped")
"""What a file holds of a run besides its tensors and its optimizer's."""


class Run:
    """One trial on a model.

    Attributes:
        trial: Its settings.
        parameters: Its trained tensors.
        sites: Where these are.
        optimizer: Its own AdamW.
        losses: Its training loss at each step.
        n_steps: Steps done.
        n_passes: Passes done: dropout follows from their number.
        pending: The loss of gradients that no step has taken; None where there are none.
        held_out: Its last held-out loss.
        stopped: Why it was stopped.
    """

    def __init__(self, trial: Trial, carried: Iterable[Carried]) -> None:
        self.trial = trial
        self._held: dict[tuple[nn.Module, str], nn.Parameter] = {}
        sites, of_B = set(), dict[nn.Parameter, None]()
        for _, module, entry in carried:
            for role, flat in entry.names.items():
                if entry.trains(role):
                    parameter = self._held[module, flat] = held_by(module)[flat]
                    sites.add((module, entry.param, role))
                    of_B |= {parameter: None} if role == "B" else {}
        self.sites: Sites = frozenset(sites)
        # By identity: the copy of a tied tensor is at each of its places.
        self.parameters = [*dict.fromkeys(self._held.values())]
        self._kinds = [(p.dtype, p.device) for p in self.parameters]
        rest = [p for p in self.parameters if p not in of_B]
        groups = ((rest, 1.0), ([*of_B], trial.b_lr_ratio))
        self.optimizer = torch.optim.AdamW(
            [{"params": params, "ratio": ratio} for params, ratio in groups if params],
            betas=trial.betas,
            weight_decay=trial.weight_decay,
            fused=True,
        )
        self.losses: list[float] = []
        self.n_steps = self.n_passes = 0
        self.pending: float | None = None
        self.held_out: float | None = None
        self.stopped = ""

    @property
    def n_parameters(self) -> int:
        """How many numbers train."""
        return sum(p.numel() for p in self.parameters)

    def changed(self) -> tuple[str, str] | None:
        """Return what has become of the tensors, and what to do; None if they are as they were."""
        now = [(p.dtype, p.device) for p in self.parameters]
        there = all(module._parameters.get(at) is p for (module, at), p in self._held.items())
        if now != self._kinds or not there:
            problem = "its tensors were moved, cast or sharded since the trials were made"
            return problem, "Do that before, or save the trials and resume on that model"
        if not all(p.requires_grad for p in self.parameters):
            return "its tensors were frozen since", "Let them train again: li.train_only"
        return None

    @property
    def has_gradient(self) -> bool:
        """Whether a gradient has reached one of its tensors."""
        return any(p.grad is not None for p in self.parameters)

    def norm(self) -> Tensor:
        """Return the norm of the gradient."""
        grads = [p.grad for p in self.parameters if p.grad is not None]
        return nn.utils.get_total_norm(grads) if grads else torch.zeros(())

    def forget_gradient(self) -> None:
        """Have no gradient: `zero_grad` of an optimizer takes as long as its step."""
        for parameter in self.parameters:
            parameter.grad = None

    def step(self, norm: Tensor, lr: float | None) -> None:
        """Step by the gradients that wait, of this norm."""
        if self.trial.clip is not None:
            nn.utils.clip_grads_with_norm_(self.parameters, self.trial.clip, norm)
        rate = self.trial.lr * self.trial.factor(self.n_steps) if lr is None else lr
        for group in self.optimizer.param_groups:
            group["lr"] = rate * group["ratio"]
        self.optimizer.step()
        self.forget_gradient()
        self.losses.append(self.pending or 0.0)
        self.n_steps, self.pending = self.n_steps + 1, None

    def stop(self, why: str, loss: float) -> None:
        """Train no more."""
        self.stopped, self.pending = why, None
        self.losses.append(loss)
        self.forget_gradient()
        for parameter in self.parameters:
            parameter.requires_grad_(False)

    def undo(self) -> Callable[[], None]:
        """Return what puts all but values back. Gradients are kept, not copied."""
        kept = {key: getattr(self, key) for key in KEPT}
        n_losses, grads = len(self.losses), [(p, p.grad, p.requires_grad) for p in self.parameters]

        def put_back() -> None:
            for key, value in kept.items():
                setattr(self, key, value)
            del self.losses[n_losses:]
            for parameter, grad, trains in grads:
                parameter.requires_grad_(trains).grad = grad

        return put_back

    def undo_values(self) -> Callable[[], None]:
        """Return what puts back all that a step changes in place, from one copy of each dtype."""
        state = self.optimizer.state
        known = [*state]
        changed = [*self.parameters, *(t for held in state.values() for t in held.values())]
        if self.trial.clip is not None:
            changed += [p.grad for p in self.parameters if p.grad is not None]
        alike: dict[Any, list[Tensor]] = {}
        for tensor in changed:
            alike.setdefault((tensor.dtype, tensor.device), []).append(tensor.detach())
        copies = [(each, torch.cat([t.flatten() for t in each])) for each in alike.values()]
        rates = [group["lr"] for group in self.optimizer.param_groups]

        def put_back() -> None:
            for each, copy in copies:
                parts = torch.split(copy, [t.numel() for t in each])
                for tensor, part in zip(each, parts, strict=True):
                    tensor.copy_(part.view_as(tensor))
            for parameter in state.keys() - known:
                del state[parameter]
            for group, rate in zip(self.optimizer.param_groups, rates, strict=True):
                group["lr"] = rate

        return put_back

    def to_row(self, name: str) -> tuple[str, str, str, str, str, str]:
        """Return a line of the table."""
        recent, held_out = self.losses[-RECENT:], self.held_out
        return (
            name,
            f"{self.trial.lr:g}",
            f"{self.n_parameters:,}",
            f"{sum(recent) / len(recent):.4f}" if recent else "",
            "" if held_out is None else f"{held_out:.4f}",
            self.stopped,
        )

    def held(self) -> dict[str, Any]:
        """Return what a file holds of the run."""
        return {
            "trial": self.trial.to_dict(),
            "values": [p.detach() for p in self.parameters],
            "gradients": [p.grad for p in self.parameters],
            "optimizer": self.optimizer.state_dict(),
            **{key: getattr(self, key) for key in KEPT},
        }

    def restore(self, held: Mapping[str, Any]) -> None:
        """Go on where a file's run was."""
        with torch.no_grad():
            for parameter, value in zip(self.parameters, held["values"], strict=True):
                parameter.copy_(value)
        for parameter, grad in zip(self.parameters, held["gradients"], strict=True):
            parameter.grad = None if grad is None else grad.to(parameter.device)
        self.optimizer.load_state_dict(held["optimizer"])
        for key in KEPT:
            setattr(self, key, held[key])
        if self.stopped:
            for parameter in self.parameters:
                parameter.requires_grad_(False)


def put_on(
    model: nn.Module,
    trials: Mapping[str, Trial],
    beside: Iterable[str],
    *,
    leave_new: bool,
) -> dict[str, Run]:
    """Inject the adapters of trials, and return their runs.

    They train, and so do the running trials `beside` them.

    Raises:
        ConfigError: A config is not valid.
        MatchError: A config's pattern matches nothing.
        LayerError: A site cannot be adapted.
        StateError: A name is in use, or the model is sharded. The model is then as it was.
    """
    _refuse_sharded(model)
    found = find_root(model, "Trials")
    known = () if found is None else (found[1], found[1].selection)
    grads = [(p, p.grad) for p in model.parameters()]
    try:
        with all_or_nothing(model.modules(), known):
            for name, trial in trials.items():
                with random_kept(model, trial.seed):
                    put_config(model, trial.config, name, leave_new=leave_new, alone=False)
            _refuse_dropout(model, trials)
            survey = Survey(model)
            runs = {name: Run(trial, entries(survey, name)) for name, trial in trials.items()}
            train_only(model, [*beside, *trials])
    finally:
        for parameter, grad in grads:
            parameter.grad = grad
    return runs


def _refuse_sharded(model: nn.Module) -> None:
    """Refuse a model of which this process has a part: a pass would need the others' batches."""
    for name, tensor in model.named_parameters():
        if (how := sharded_by(tensor)) is not None:
            raise StateError(
                "Trials",
                f"this process has a part of {name!r}: {how}",
                "Give each process the whole model, or train the adapters one by one",
            )


def _refuse_dropout(model: nn.Module, names: Iterable[str]) -> None:
    """Refuse dropout on embeddings and convolutions, which do not draw it by trial."""
    for name in names:
        for site, state in adapter_state(model, name).sites.items():
            if state.spec.dropout and state.spec.kind not in {"linear", "conv1d"}:
                raise StateError(
                    f"Trials, {name!r}",
                    f"site {site!r} ({state.spec.kind}) has dropout, which is not drawn by trial",
                    "Give its rule dropout 0",
                )
