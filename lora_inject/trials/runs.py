"""Many training runs at once on one base, each with the same results as alone.

Each trial has its own optimizer state, clipping, schedule, and random numbers for its start and its
dropout. Trials step together, or each on its own clock; they join and leave between steps.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Iterable, Mapping
from functools import wraps
from numbers import Real
from os import PathLike
from pathlib import Path
from typing import Any, Concatenate, ParamSpec, Self, TypeVar

import torch
from torch import nn

from lora_inject.core.files.atomic import write_file
from lora_inject.core.model.eject import eject
from lora_inject.errors import StateError, check_type, user_path
from lora_inject.trials import saved
from lora_inject.trials.batches import Forward, evaluating, in_one_order
from lora_inject.trials.flat import Flat
from lora_inject.trials.gradients import Asked, Together
from lora_inject.trials.joining import put_on
from lora_inject.trials.losses import Losses
from lora_inject.trials.passes import seeded
from lora_inject.trials.torch_engine import check_engine_tells
from lora_inject.trials.trial import Trial

P = ParamSpec("P")
R = TypeVar("R")

RECENT = 10
"""Steps over which the training loss in the table is averaged."""

_OPTIONS = ("max_tokens", "packed", "leave_new")


def _one_at_a_time(
    verb: Callable[Concatenate[Trials, P], R],
) -> Callable[Concatenate[Trials, P], R]:
    """Let a verb of one thread wait for that of another."""

    @wraps(verb)
    def waiting(trials: Trials, /, *args: P.args, **kwargs: P.kwargs) -> R:
        with trials._turn:
            return verb(trials, *args, **kwargs)

    return waiting


class Trials:
    """Several adapters on one model that train together, with the same results as each alone.

    They step together, or each on its own clock (`forward_backward`, `optimizer_step`), and join
    and leave between steps (`add`, `drop`). Calls from several threads wait for each other.

    Args:
        model: The model. Injected, not copied; without adapters of the trials' names.
        trials: Name to trial; further ones may join later.
        max_tokens: Largest number of tokens (rows times positions) of one pass. With more, the
            trials run in groups.
        packed: Whether batches are packed: all tensors are `(1, tokens, ...)`, and those of all
            trials are concatenated to one row. The forward must keep sequences apart, for example
            by `position_ids`.
        leave_new: As for `inject`: leave weights out that the model's checkpoint lacked.

    Raises:
        ConfigError: A config is not valid.
        MatchError: A config's pattern matches nothing.
        LayerError: A site cannot be adapted.
        StateError: There are no trials, a name is in use, the model is sharded, or rows cannot
            differ in a weight: the forward that reads it takes more than one tensor, and is no
            stack of experts of transformers. The model is then unchanged.

    Attributes:
        model: The model.
        trials: Name to trial; without dropped trials.
        n_steps: Name to steps done.
        losses: Name to the training loss at each step.
        held_out: Name to the last held-out loss.
        stopped: Name to reason, for each trial whose loss or gradient was not finite.

    Examples:
        >>> model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
        >>> rules = {"rank": 2, "targets": ["all-linear"]}
        >>> trials = Trials(model, {f"lr-{lr}": Trial(rules, lr=lr) for lr in (1e-3, 1e-2)})
        >>> x, y = torch.ones(3, 4), torch.zeros(3, 2)
        >>> losses = trials.step((x, y), forward=lambda b: model(b[0]),
        ...     loss=lambda out, b: nn.functional.mse_loss(out, b[1]))
        >>> sorted(losses)
        ['lr-0.001', 'lr-0.01']
    """

    def __init__(
        self,
        model: nn.Module,
        trials: Mapping[str, Trial],
        *,
        max_tokens: int | None = None,
        packed: bool = False,
        leave_new: bool = False,
    ) -> None:
        check_type("Trials, trials", trials, Mapping, "Give a mapping of names to Trial")
        if not trials:
            raise StateError("Trials", "no trial is given", "Give a mapping of names to Trial")
        if max_tokens is not None:
            check_type("Trials, max_tokens", max_tokens, int, "Give a whole number, or None")
        check_engine_tells()
        self.model = model
        self.max_tokens = max_tokens
        self.packed = packed
        self.leave_new = leave_new
        self.trials: dict[str, Trial] = {}
        self.n_steps: dict[str, int] = {}
        self.losses: dict[str, list[float]] = {}
        self.held_out: dict[str, float] = {}
        self.stopped: dict[str, str] = {}
        self.together = Together(model, max_tokens=max_tokens, packed=packed)
        self._turn = threading.RLock()
        self._put_on(trials)

    # ------------------------------------------------------------------------ joining and leaving

    @_one_at_a_time
    def add(self, name: str, trial: Trial) -> None:
        """Let a trial join, with steps of its own from 0.

        Values and optimizer state of the others are copied once, bit for bit, and gradients that
        no step has taken stay. What is active on the model stays active.

        Args:
            name: Of the trial, and of its adapter. `swap_adapter` gives it the values of another.
            trial: The trial.

        Raises:
            ConfigError: The config is not valid.
            MatchError: A pattern of the config matches nothing.
            LayerError: A site cannot be adapted.
            StateError: As for `Trials`. Everything is then as it was.
        """
        self._put_on({name: trial})

    def _put_on(self, trials: Mapping[str, Trial]) -> None:
        """Put trials onto the model, all or none."""
        for name, trial in trials.items():
            check_type(f"trial {name!r}", trial, Trial, "Give Trial(config, lr=1e-3)")
        self._check_unchanged(self.running)
        flats = self.together.flats
        like = next((flat.example for flat in flats.values()), None)
        places = put_on(self.model, trials, self.running, like, leave_new=self.leave_new)
        for name, trial in trials.items():
            flats[name] = Flat(places[name], trial)
            self.together.random[name] = seeded(trial.seed, flats[name].example.device)
            self.trials[name] = trial
            self.n_steps[name] = 0
            self.losses[name] = []
        self.together.settle()

    @_one_at_a_time
    def drop(self, name: str) -> None:
        """Eject a trial's adapter from the model and remove the trial. Its memory is free then.

        Raises:
            StateError: There is no such trial.
        """
        self._check_known([name], f"drop {name!r}")
        flats = [self.together.flats[one] for one in self.running]
        are_there = all(flat.changed() is None for flat in flats)
        eject(self.model, name)
        self.together.forget(name)
        for mapping in (self.trials, self.n_steps, self.losses, self.held_out, self.stopped):
            mapping.pop(name, None)
        if are_there:  # else their memory is not what the model computes with
            self.together.settle()

    # ----------------------------------------------------------------------------------- a step

    @_one_at_a_time
    def step(
        self,
        batch: Any,
        *,
        forward: Forward | None = None,
        loss: Losses | None = None,
        by_name: bool | None = None,
    ) -> dict[str, float]:
        """Train every running trial for one step.

        Args:
            batch: One batch for all trials, or a dict from each running trial's name to its batch.
                A batch is a tensor, or a dict or tuple of tensors, with one row for each example.
                The trials' rows may differ in length: shorter ones are padded with zeros at their
                end, and `loss` gets the outputs without padding.
            forward: Runs the model on a joined batch and returns outputs with the same rows. By
                default the model is called with the batch, without `labels`.
            loss: Takes a trial's outputs and its batch and returns a scalar; or a dict from each
                name to its own. By default it is the loss of the next token, from `logits` and
                `labels`.
            by_name: Whether `batch` is a dict from names to batches. None: it is, if its entries
                are dicts or tuples; tensors whose keys are names of trials are refused.

        Returns:
            Name to loss. A trial whose loss or gradient is not finite is not stepped and is in
            `stopped` afterwards; the gradients of the other trials are not affected.

        Raises:
            StateError: A batch is missing or does not fit, or trials would affect each other:
                the forward mixes rows, returns a mean over them, or draws random numbers; the
                loss writes into a batch that others read; or padding changes outputs.
        """
        batches = self._by_trial(batch, by_name)
        losses = self._add_gradients(Asked.of(self.model, batches, forward, loss))
        self._update([name for name in batches if name not in self.stopped], None)
        return losses

    @_one_at_a_time
    def forward_backward(
        self,
        batches: Mapping[str, Any],
        *,
        forward: Forward | None = None,
        loss: Losses | None = None,
    ) -> dict[str, float]:
        """Add to the gradients of some trials, in one pass of the base, and take no step.

        Args:
            batches: Name to batch, for one trial or several; see `step`.
            forward: As for `step`.
            loss: As for `step`. The gradients of several calls add up, as those of `backward` do.

        Returns:
            Name to loss. A trial whose loss is not finite is in `stopped` afterwards.

        Raises:
            StateError: There is no such trial, it was stopped, or as for `step`. All gradients are
                then as they were.
        """
        asked = "forward_backward"
        check_type(asked, batches, Mapping, "Give a dict from names to batches")
        self._check_running(batches, asked)
        given = in_one_order(dict(batches))
        return self._add_gradients(Asked.of(self.model, given, forward, loss))

    @_one_at_a_time
    def optimizer_step(
        self, names: str | Iterable[str], *, lr: float | None = None
    ) -> dict[str, float]:
        """Step some trials by the gradients of `forward_backward`; others stay as they are.

        Args:
            names: One trial, or several.
            lr: The learning rate of A in this step, in place of the trial's schedule.

        Returns:
            Name to the norm of the gradient before clipping. A trial whose norm is not finite is
            not stepped and is in `stopped` afterwards.

        Raises:
            StateError: There is no such trial, it was stopped, it has no gradient since its last
                step, or the rate is no number above 0.
        """
        asked = "optimizer_step"
        named = [names] if isinstance(names, str) else names
        check_type(asked, named, Iterable, "Give a name, or several")
        listed = [*dict.fromkeys(named)]
        self._check_running(listed, asked)
        if lr is not None:
            check_type(f"{asked}, lr", lr, Real, "Give a positive number, such as 1e-3")
            if not 0 < lr < math.inf:
                raise StateError(f"{asked}, lr", f"it is {lr}", "Give a positive number")
        for name in listed:
            if name not in self.together.pending:
                problem = "it has no gradient since its last step"
                raise StateError(f"{asked} {name!r}", problem, "Call forward_backward first")
        self._check_unchanged(listed)
        return self._update(listed, lr)

    def _add_gradients(self, asked: Asked) -> dict[str, float]:
        """Add to the gradients of some trials, and stop those without a finite loss."""
        self._check_unchanged(asked.batches)
        losses = self.together.add_gradients(asked)
        for name, value in losses.items():
            if not math.isfinite(value):
                self._stop(name, f"its loss is {value} at step {self.n_steps[name]}", value)
        return losses

    def _update(self, names: Iterable[str], lr: float | None) -> dict[str, float]:
        """Step some trials, and stop those without a finite gradient."""
        n_steps = {name: self.n_steps[name] for name in names}
        totals = {name: self.together.pending[name] for name in n_steps}
        norm_of = self.together.step(n_steps, lr)
        for name, norm in norm_of.items():
            if not math.isfinite(norm):
                why = f"its gradient has the norm {norm} at step {n_steps[name]}"
                self._stop(name, why, totals[name])
                continue
            self.losses[name].append(totals[name])
            self.n_steps[name] += 1
        return norm_of

    def _stop(self, name: str, why: str, loss: float) -> None:
        self.stopped[name] = why
        self.losses[name].append(loss)
        self.together.stop(name)

    # ---------------------------------------------------------------------------------- checks

    def _by_trial(
        self, batch: Any, by_name: bool | None, *, all_of_them: bool = True
    ) -> dict[str, Any]:
        """Return the batch of each running trial, or of those that a dict names."""
        running = self.running
        if not running:
            raise StateError("step", "no trial is running", "See trials.stopped for the reasons")
        if by_name is None:
            by_name = self._is_by_name(batch)
        if not by_name:
            return in_one_order(dict.fromkeys(running, batch))
        return in_one_order(self._named(batch, all_of_them=all_of_them))

    def _named(self, batch: Any, *, all_of_them: bool) -> dict[str, Any]:
        """Return the batches of the running trials that a dict names."""
        running = self.running
        check_type("step, by_name=True", batch, Mapping, "Give a dict from names to batches")
        if unknown := [name for name in batch if name not in self.trials]:
            remedy = f"Known are {running}; of one batch for all, each entry is a tensor"
            raise StateError("step", f"there is no trial {unknown[0]!r}", remedy)
        given = [name for name in running if name in batch]
        missing = [name for name in running if name not in batch]
        if missing and (all_of_them or not given):
            problem = f"there is no batch for {missing[0]!r}"
            remedy = "Give one for each running trial; forward_backward takes some"
            raise StateError("step", problem, remedy)
        return {name: batch[name] for name in given}

    def _is_by_name(self, batch: Any) -> bool:
        """Return whether a batch is a dict of batches, as far as its values tell."""
        if not isinstance(batch, Mapping):
            return False
        if any(isinstance(each, Mapping | tuple | list) for each in batch.values()):
            return True
        names = [name for name in batch if name in self.trials]
        if names:
            shown = " and ".join(map(repr, names))
            raise StateError(
                "step",
                f"{shown} are tensors, which may be the entries of one batch or a batch for each "
                "trial of that name",
                "Pass by_name=True for a batch for each trial, or by_name=False for one for all",
            )
        return False

    def _check_known(self, names: Iterable[str], asked: str) -> None:
        for name in names:
            if name not in self.trials:
                problem = f"there is no trial {name!r}"
                raise StateError(asked, problem, f"Known are {[*self.trials]}")

    def _check_running(self, names: Iterable[str], asked: str) -> None:
        """Refuse names of which one cannot train now."""
        self._check_known(names, asked)
        if not [*names]:
            raise StateError(asked, "no trial is named", f"Running are {self.running}")
        for name in names:
            if name in self.stopped:
                problem = f"it was stopped: {self.stopped[name]}"
                raise StateError(f"{asked} {name!r}", problem, "Drop it, and start it anew")

    def _check_unchanged(self, names: Iterable[str]) -> None:
        """Refuse a model on which the tensors of some trials are others than they were."""
        for name in names:
            if (changed := self.together.flats[name].changed()) is not None:
                raise StateError(f"step, trial {name!r}", *changed)

    # -------------------------------------------------------------------------------- the runs

    @property
    def running(self) -> list[str]:
        """Names of the trials that were not stopped or dropped."""
        return [name for name in self.trials if name not in self.stopped]

    @_one_at_a_time
    @torch.no_grad()
    def evaluate(
        self,
        batch: Any,
        *,
        forward: Forward | None = None,
        loss: Losses | None = None,
        by_name: bool | None = None,
    ) -> dict[str, float]:
        """Return and store each running trial's loss on held-out rows, without dropout.

        Args:
            batch: As for `step`; a dict from names to batches may leave trials out.
            forward: As for `step`.
            loss: As for `step`.
            by_name: As for `step`.

        Returns:
            Name to loss, which `best` and `table` also use.
        """
        batches = self._by_trial(batch, by_name, all_of_them=False)
        asked = Asked.of(self.model, batches, forward, loss)
        with evaluating(self.model):
            losses = self.together.losses(asked)
        self.held_out |= losses
        return losses

    def best(self) -> str:
        """Return the running trial with the lowest held-out loss.

        Raises:
            StateError: Nothing was evaluated.
        """
        known = {n: v for n, v in self.held_out.items() if n in self.running and v == v}
        if not known:
            raise StateError("best", "no running trial was evaluated", "Call evaluate first")
        return min(known, key=known.__getitem__)

    def table(self) -> str:
        """Return a table: each trial's learning rate, parameters, losses and state."""
        rows = [("trial", "lr", "parameters", "loss", "held out", "")]
        for name, trial in self.trials.items():
            recent = self.losses[name][-RECENT:]
            rows.append(
                (
                    name,
                    f"{trial.lr:g}",
                    f"{self.together.flats[name].n_parameters:,}",
                    f"{sum(recent) / len(recent):.4f}" if recent else "",
                    f"{self.held_out[name]:.4f}" if name in self.held_out else "",
                    self.stopped.get(name, ""),
                )
            )
        widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
        lines = ("  ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)) for row in rows)
        return "\n".join(line.rstrip() for line in lines)

    # ------------------------------------------------------------------------------ save, resume

    @_one_at_a_time
    def save(self, path: str | PathLike[str], names: str | Iterable[str] | None = None) -> Path:
        """Write everything that a resumed run needs into one file, atomically.

        Args:
            path: The file. An existing file is replaced.
            names: One trial, or several; all by default.

        Returns:
            The path.

        Raises:
            StateError: There is no such trial.
        """
        named = self.trials if names is None else names
        listed = [named] if isinstance(named, str) else [*named]
        self._check_known(listed, "save trials")
        options = {option: getattr(self, option) for option in _OPTIONS}
        some = {name: self.trials[name] for name in listed}
        content = saved.content_of(some, options, self._notes(), self.together)
        return write_file(user_path("save trials", path), content, overwrite=True)

    @_one_at_a_time
    def load(self, path: str | PathLike[str]) -> list[str]:
        """Let saved trials join. Each continues bit for bit where it is stepped alone.

        Args:
            path: A file that `save` wrote.

        Returns:
            Their names.

        Raises:
            FormatError: `save` did not write the file, or wrote it with another base.
            StateError: A name is in use, or as for `Trials`. Everything is then as it was.
        """
        held = saved.held_in(path)
        self._put_on(held.trials)
        try:
            held.check_base(self.model)
        except BaseException:
            for name in held.trials:
                self.drop(name)
            raise
        saved.restore(held, self._notes(), self.together)
        return [*held.trials]

    def _notes(self) -> dict[str, dict[str, Any]]:
        """Return what is known of each trial, by what it is."""
        return {
            "n_steps": self.n_steps,
            "losses": self.losses,
            "held_out": self.held_out,
            "stopped": self.stopped,
        }

    @classmethod
    def resume(cls, model: nn.Module, path: str | PathLike[str]) -> Self:
        """Put saved trials onto a model. Training continues bit for bit.

        Args:
            model: The base, as it was before the trials.
            path: A file that `save` wrote.

        Raises:
            FormatError: `save` did not write the file, or wrote it with another base.
        """
        held = saved.held_in(path)
        options = {option: held.about[option] for option in _OPTIONS}
        new = cls(model, held.trials, **options)
        try:
            held.check_base(model)
        except BaseException:
            for name in held.trials:
                eject(model, name)
            raise
        saved.restore(held, new._notes(), new.together)
        return new
