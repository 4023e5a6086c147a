"""Many training runs at once on one base, each with the same results as alone.

Each trial has its own optimizer state, clipping, schedule, and random numbers for its start and its
dropout. Trials step together, or each on its own clock; they join and leave between steps.
"""

from __future__ import annotations

import io
import math
import sys
import threading
from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack
from functools import wraps
from numbers import Real
from os import PathLike
from pathlib import Path
from typing import Any, Concatenate, ParamSpec, Self, TypeVar

import torch
from torch import Tensor, nn

from lora_inject.core.adapter.fingerprint import sample_positions
from lora_inject.core.files.atomic import write_file
from lora_inject.core.layers.survey import evaluating
from lora_inject.core.model.eject import eject
from lora_inject.core.model.read_off import adapter_state
from lora_inject.core.spec.tables import columns
from lora_inject.errors import FormatError, StateError, article, check_type, user_path
from lora_inject.formats.pickles import DAMAGE
from lora_inject.trials.batches import Forward, copied, in_one_order, plain_forward
from lora_inject.trials.losses import Loss, Losses, default_loss, ends_of, scalar_loss
from lora_inject.trials.run import Run, put_on
from lora_inject.trials.shared import Passes
from lora_inject.trials.trial import Trial

P = ParamSpec("P")
R = TypeVar("R")

_OPTIONS = ("max_tokens", "leave_new")


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

    One pass of the base runs the rows of all trials, if the first one shows that each gets what it
    gets alone. Else they run in turn, and one warning says why.

    Args:
        model: The model. Injected, not copied; without adapters of the trials' names.
        trials: Name to trial; further ones may join later.
        forward: Runs the model on a joined batch and returns outputs with the same rows. What it
            computes follows from the batch and from the modes of the model alone: that it gives
            each trial what it gets alone is seen once for each form of a batch. By default the
            model is called with the batch, without `labels`.
        loss: Takes a trial's outputs and its batch and returns a scalar; or a dict from each name
            to its own. By default it is the loss of the next token, from `logits` and `labels`.
        max_tokens: Largest number of tokens (rows times positions) of one pass. With more, the
            trials run in groups.
        leave_new: As for `inject`: leave weights out that the model's checkpoint lacked.

    Raises:
        ConfigError: A config is not valid.
        MatchError: A config's pattern matches nothing.
        LayerError: A site cannot be adapted.
        StateError: There are no trials, a name is in use, a trial has no loss, or the model is
            sharded. The model is then unchanged.

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
        >>> trials = Trials(model, {f"lr-{lr}": Trial(rules, lr=lr) for lr in (1e-3, 1e-2)},
        ...     forward=lambda b: model(b[0]),
        ...     loss=lambda out, b: nn.functional.mse_loss(out, b[1]))
        >>> losses = trials.step((torch.ones(3, 4), torch.zeros(3, 2)))
        >>> sorted(losses)
        ['lr-0.001', 'lr-0.01']
    """

    def __init__(
        self,
        model: nn.Module,
        trials: Mapping[str, Trial],
        *,
        forward: Forward | None = None,
        loss: Losses | None = None,
        max_tokens: int | None = None,
        leave_new: bool = False,
    ) -> None:
        check_type("Trials, trials", trials, Mapping, "Give a mapping of names to Trial")
        if not trials:
            raise StateError("Trials", "no trial is given", "Give a mapping of names to Trial")
        if max_tokens is not None:
            check_type("Trials, max_tokens", max_tokens, int, "Give a whole number, or None")
        for what, given, fits in (
            ("forward", forward, callable(forward)),
            ("loss", loss, callable(loss) or isinstance(loss, Mapping)),
        ):
            if given is not None and not fits:
                problem = f"it is {article(type(given).__name__)}"
                raise StateError(f"Trials, {what}", problem, "Give a function; see help(Trials)")
        self.model = model
        self.max_tokens = max_tokens
        self.leave_new = leave_new
        self._runs: dict[str, Run] = {}
        self._turn = threading.RLock()
        self._forward, self._loss = forward or plain_forward(model), loss
        self._loss_by_name: dict[str, Loss] = {}
        self._put_on(trials)

    @property
    def trials(self) -> dict[str, Trial]:
        """Name to trial, without dropped trials."""
        return {name: run.trial for name, run in self._runs.items()}

    @property
    def n_steps(self) -> dict[str, int]:
        """Name to steps done."""
        return {name: run.n_steps for name, run in self._runs.items()}

    @property
    def losses(self) -> dict[str, list[float]]:
        """Name to the training loss at each step."""
        return {name: run.losses for name, run in self._runs.items()}

    @property
    def held_out(self) -> dict[str, float]:
        """Name to the last held-out loss."""
        return {n: run.held_out for n, run in self._runs.items() if run.held_out is not None}

    @property
    def stopped(self) -> dict[str, str]:
        """Name to reason, for each trial whose loss or gradient was not finite."""
        return {name: run.stopped for name, run in self._runs.items() if run.stopped}

    @property
    def running(self) -> list[str]:
        """Names of the trials that were not stopped or dropped."""
        return [name for name, run in self._runs.items() if not run.stopped]

    # ------------------------------------------------------------------------ joining and leaving

    @_one_at_a_time
    def add(self, name: str, trial: Trial, *, loss: Loss | None = None) -> None:
        """Let a trial join, with steps of its own from 0.

        Gradients of the others that no step has taken stay. What is active on the model stays
        active.

        Args:
            name: Of the trial, and of its adapter. `swap_adapter` gives it the values of another.
            trial: The trial.
            loss: Of this trial; by default as it was given to `Trials`.

        Raises:
            ConfigError: The config is not valid.
            MatchError: A pattern of the config matches nothing.
            LayerError: A site cannot be adapted.
            StateError: As for `Trials`. Everything is then as it was.
        """
        self._put_on({name: trial}, loss)

    def _put_on(self, trials: Mapping[str, Trial], loss: Losses | None = None) -> None:
        """Put trials onto the model, all or none."""
        losses = {name: self._loss_of(name, loss) for name in trials}
        for name, trial in trials.items():
            check_type(f"trial {name!r}", trial, Trial, "Give Trial(config, lr=1e-3)")
        self._check_unchanged(self.running)
        self._runs |= put_on(self.model, trials, self.running, leave_new=self.leave_new)
        self._loss_by_name |= losses
        # The forward is seen anew: there are other adapters.
        self._passes = Passes(self.model, self._runs, self._forward, self.max_tokens)

    def _loss_of(self, name: str, loss: Losses | None) -> Loss:
        """Return the loss of a trial that joins."""
        loss = self._loss if loss is None else loss
        if loss is None:
            return default_loss(self.model)
        if not isinstance(loss, Mapping):
            return loss
        if name not in loss:
            remedy = "Give one for each trial, or one function for all"
            raise StateError(f"loss of trial {name!r}", "there is none of that name", remedy)
        return loss[name]

    @_one_at_a_time
    def drop(self, name: str) -> None:
        """Eject a trial's adapter from the model and remove the trial.

        Raises:
            StateError: There is no such trial.
        """
        self._check_known([name], f"drop {name!r}")
        eject(self.model, name)
        del self._runs[name], self._loss_by_name[name]

    # ----------------------------------------------------------------------------------- a step

    @_one_at_a_time
    def step(self, batch: Any) -> dict[str, float]:
        """Train every running trial for one step.

        Args:
            batch: One batch for all trials, or a dict from each running trial's name to its batch.
                A batch is a tensor, or a dict or tuple of tensors, with one row for each example;
                a dict with the name of a trial, or in which there are dicts or tuples, is by name.
                The trials' rows may differ in length: shorter ones are padded with zeros at their
                end, and the loss gets the outputs without padding.

        Returns:
            Name to loss. A trial whose loss or gradient is not finite is not stepped and is in
            `stopped` afterwards; the gradients of the other trials are not affected.

        Raises:
            StateError: A batch is missing or does not fit, or the forward returns a mean over the
                rows.
        """
        with ExitStack() as undo:
            losses = self._add_gradients(self._by_trial(batch), undo)
            self._update([n for n in losses if not self._runs[n].stopped], None, undo)
            undo.pop_all()
        return losses

    @_one_at_a_time
    def forward_backward(self, batches: Mapping[str, Any]) -> dict[str, float]:
        """Add to the gradients of some trials, in one pass of the base, and take no step.

        The gradients of several calls add up, as those of `backward` do.

        Args:
            batches: Name to batch, for one trial or several; see `step`.

        Returns:
            Name to loss. A trial whose loss is not finite is in `stopped` afterwards.

        Raises:
            StateError: There is no such trial, it was stopped, or as for `step`. All gradients are
                then as they were.
        """
        asked = "forward_backward"
        check_type(asked, batches, Mapping, "Give a dict from names to batches")
        self._check_running(batches, asked)
        with ExitStack() as undo:
            losses = self._add_gradients(in_one_order(batches), undo)
            undo.pop_all()
        return losses

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
            if self._runs[name].pending is None:
                problem = "it has no gradient since its last step"
                raise StateError(f"{asked} {name!r}", problem, "Call forward_backward first")
        self._check_unchanged(listed)
        with ExitStack() as undo:
            norms = self._update(listed, lr, undo)
            undo.pop_all()
        return norms

    def _add_gradients(self, batches: Mapping[str, Any], undo: ExitStack) -> dict[str, float]:
        """Add to the gradients of some trials, and stop those without a finite loss.

        What is put on `undo` leaves all as it was.
        """
        self._check_unchanged(batches)
        runs = [self._runs[name] for name in batches]
        for run in runs:
            undo.callback(run.undo())
        before = [(p, p.grad) for run in runs for p in run.parameters]
        for run in runs:
            run.forget_gradient()
        values = self._gradients(batches)
        for parameter, grad in before:
            if grad is not None:
                parameter.grad = grad if parameter.grad is None else parameter.grad.add_(grad)
        for name, value in values.items():
            run = self._runs[name]
            run.pending, run.n_passes = (run.pending or 0.0) + value, run.n_passes + 1
            if not math.isfinite(value):
                run.stop(f"its loss is {value} at step {run.n_steps}", value)
        return values

    def _gradients(self, batches: Mapping[str, Any]) -> dict[str, float]:
        """Compute the gradients of some trials; a loss that is not finite has none.

        Where the losses of a pass lead to different outputs, such as two heads, its trials run in
        turn: what only another's loss leads to would have a gradient of zeros, by which weight
        decay moves it.
        """
        values: dict[str, float] = {}
        for outputs in self._passes.outputs(batches, drops=True):
            losses = {n: self._value(n, mine, batches[n]) for n, mine in outputs.items()}
            if len({ends_of(value, outputs) for value in losses.values()}) > 1:
                names = [*losses]
                del outputs, losses
                for name in names:
                    values |= self._gradients({name: batches[name]})
                continue
            del outputs  # of the size of the logits
            values |= zip(losses, _numbers(losses.values()), strict=True)
            finite = {name: losses[name] for name in losses if math.isfinite(values[name])}
            untrained = [name for name in finite if not finite[name].requires_grad]
            if finite and not untrained:
                torch.stack([*finite.values()]).sum().backward()  # type: ignore[no-untyped-call]
                untrained = [name for name in finite if not self._runs[name].has_gradient]
            for name in untrained:
                what = "no gradient leads from it to A and B"
                remedy = "Compute it from the outputs; li.unreached lists layers without a part"
                raise StateError(f"loss of trial {name!r}", what, remedy)
        return values

    def _value(self, name: str, outputs: Any, batch: Any) -> Tensor:
        """Return the loss of a trial, by its outputs."""
        return scalar_loss(self._loss_by_name[name], outputs, copied(batch), name)

    def _update(self, names: Iterable[str], lr: float | None, undo: ExitStack) -> dict[str, float]:
        """Step some trials, and stop those without a finite gradient.

        What is put on `undo` leaves all as it was: it holds their values and AdamW's state.
        """
        runs = {name: self._runs[name] for name in names}
        if not runs:
            return {}
        each = {name: run.norm() for name, run in runs.items()}
        norms = dict(zip(runs, _numbers(each.values()), strict=True))
        for run in runs.values():
            undo.callback(run.undo())
            undo.callback(run.undo_values())
        for name, run in runs.items():
            if math.isfinite(norms[name]):
                run.step(each[name], lr)
            else:
                why = f"its gradient has the norm {norms[name]} at step {run.n_steps}"
                run.stop(why, run.pending or 0.0)
        return norms

    # ---------------------------------------------------------------------------------- checks

    def _by_trial(self, batch: Any, *, all_of_them: bool = True) -> dict[str, Any]:
        """Return the batch of each running trial, or of those that a dict names."""
        running = self.running
        if not running:
            raise StateError("step", "no trial is running", "See trials.stopped for the reasons")
        if not isinstance(batch, Mapping) or not any(
            name in self._runs or isinstance(each, Mapping | tuple | list)
            for name, each in batch.items()
        ):
            return in_one_order(dict.fromkeys(running, batch))
        self._check_known(batch, "step, batches by name")
        given = {name: batch[name] for name in running if name in batch}
        missing = [name for name in running if name not in batch]
        if missing and (all_of_them or not given):
            problem = f"there is no batch for {missing[0]!r}"
            remedy = "Give one for each running trial; forward_backward takes some"
            raise StateError("step", problem, remedy)
        return in_one_order(given)

    def _check_known(self, names: Iterable[str], asked: str) -> None:
        for name in names:
            if name not in self._runs:
                problem = f"there is no trial {name!r}"
                raise StateError(asked, problem, f"Known are {[*self._runs]}")

    def _check_running(self, names: Iterable[str], asked: str) -> None:
        """Refuse names of which one cannot train now."""
        self._check_known(names, asked)
        if not [*names]:
            raise StateError(asked, "no trial is named", f"Running are {self.running}")
        for name in names:
            if self._runs[name].stopped:
                problem = f"it was stopped: {self._runs[name].stopped}"
                raise StateError(f"{asked} {name!r}", problem, "Drop it, and start it anew")

    def _check_unchanged(self, names: Iterable[str]) -> None:
        """Refuse a model on which the tensors of some trials are others than they were."""
        for name in names:
            if (changed := self._runs[name].changed()) is not None:
                raise StateError(f"step, trial {name!r}", *changed)

    # --------------------------------------------------------------------------------- results

    @_one_at_a_time
    @torch.no_grad()
    def evaluate(self, batch: Any) -> dict[str, float]:
        """Return and store each running trial's loss on held-out rows, without dropout.

        Args:
            batch: As for `step`; a dict from names to batches may leave trials out.

        Returns:
            Name to loss, which `best` and `table` also use.
        """
        batches = self._by_trial(batch, all_of_them=False)
        losses: dict[str, float] = {}
        with evaluating(self.model):
            for outputs in self._passes.outputs(batches, drops=False):
                each = [self._value(n, mine, batches[n]) for n, mine in outputs.items()]
                losses |= zip(outputs, _numbers(each), strict=True)
        for name, value in losses.items():
            self._runs[name].held_out = value
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
        rows += [run.to_row(name) for name, run in self._runs.items()]
        return "\n".join(columns(rows, len(rows[0]), sys.maxsize, indent=""))

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
        named = self._runs if names is None else names
        listed = [named] if isinstance(named, str) else [*named]
        self._check_known(listed, "save trials")
        held = {
            "options": {option: getattr(self, option) for option in _OPTIONS},
            "runs": {name: self._runs[name].held() for name in listed},
            "base": {name: _base_of(self.model, name) for name in listed},
        }
        content = io.BytesIO()
        torch.save(held, content)
        return write_file(user_path("save trials", path), content.getvalue(), overwrite=True)

    @_one_at_a_time
    def load(self, path: str | PathLike[str], *, loss: Losses | None = None) -> list[str]:
        """Let saved trials join. Each continues bit for bit where it is stepped alone.

        Args:
            path: A file that `save` wrote.
            loss: As for `add`, or a dict from each name to its own.

        Returns:
            Their names.

        Raises:
            FormatError: `save` did not write the file, or wrote it with another base.
            StateError: A name is in use, or as for `Trials`. Everything is then as it was.
        """
        held = _held_in(path)
        self._put_on(_trials_of(held), loss)
        self._restore(held, path)
        return [*held["runs"]]

    def _restore(self, held: Mapping[str, Any], path: str | PathLike[str]) -> None:
        """Give trials that were put on what a file holds; take them off if the base is another."""
        try:
            for name, base in held["base"].items():
                if _base_of(self.model, name) != base:
                    problem = f"the base of trial {name!r} has other values"
                    remedy = "Give the model as it was before"
                    raise FormatError(f"resume {str(path)!r}", problem, remedy)
            for name, kept in held["runs"].items():
                self._runs[name].restore(kept)
        except BaseException:
            for name in held["runs"]:
                self.drop(name)
            raise

    @classmethod
    def resume(
        cls,
        model: nn.Module,
        path: str | PathLike[str],
        *,
        forward: Forward | None = None,
        loss: Losses | None = None,
    ) -> Self:
        """Put saved trials onto a model. Training continues bit for bit.

        Args:
            model: The base, as it was before the trials.
            path: A file that `save` wrote.
            forward: As for `Trials`; a file holds none.
            loss: As for `Trials`; a file holds none.

        Raises:
            FormatError: `save` did not write the file, or wrote it with another base.
        """
        held = _held_in(path)
        options = {option: held["options"][option] for option in _OPTIONS}
        new = cls(model, _trials_of(held), forward=forward, loss=loss, **options)
        new._restore(held, path)
        return new


def _numbers(scalars: Iterable[Tensor]) -> list[float]:
    """Return what scalars hold, with one wait for the device."""
    each = [*scalars]
    return torch.stack([one.detach().to(each[0].device) for one in each]).tolist()  # type: ignore[no-any-return]


def _held_in(path: str | PathLike[str]) -> dict[str, Any]:
    """Read a file of trials."""
    file = user_path("resume trials", path)
    try:
        held: dict[str, Any] = torch.load(file, weights_only=True, map_location="cpu")
        if {*held} != {"options", "runs", "base"}:
            raise KeyError("runs")
    except DAMAGE as error:
        problem = f"it cannot be read: {error}"
        raise FormatError(f"resume {str(path)!r}", problem, "Give what save wrote") from error
    return held


def _trials_of(held: Mapping[str, Any]) -> dict[str, Trial]:
    return {name: Trial(**kept["trial"]) for name, kept in held["runs"].items()}


def _base_of(model: nn.Module, name: str) -> dict[str, list[float]]:
    """Return the fingerprint's samples of an adapter's base, as plain data."""
    mark = adapter_state(model, name).fingerprint or {}
    return {  # not where an adapter moves it, which changes with the adapter
        key: list(known.values[: len(sample_positions(known.shape))])
        for key, known in mark.items()
        if known.values is not None
    }
