"""Many training runs at once: every step is one pass of the base for all of them.

A batch is the concatenation of the trials' rows, and each row uses the adapter of its own trial
(`routed`), so each trial gets the same gradient as alone. Each trial has its own optimizer state,
clipping, schedule, and random numbers for its start and its dropout.
"""

from __future__ import annotations

import io
import json
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from functools import partial
from os import PathLike
from pathlib import Path
from typing import Any, NoReturn, Self

import torch
from torch import Tensor, nn

from lora_inject.core.files.atomic import write_file
from lora_inject.core.layers.survey import Survey
from lora_inject.core.model.carried import adapted_modules
from lora_inject.core.model.disabling import selecting
from lora_inject.core.model.eject import eject
from lora_inject.core.model.inject import inject
from lora_inject.core.model.parameters import adapter_parameters
from lora_inject.core.model.read_off import adapter_state
from lora_inject.core.model.train import train_only
from lora_inject.core.spec.names import joined as joined_name
from lora_inject.errors import FormatError, StateError, check_type, user_path
from lora_inject.formats.pickles import DAMAGE
from lora_inject.private import needed
from lora_inject.rows.kept import routes_rows
from lora_inject.trials.batches import (
    Forward,
    Joined,
    evaluating,
    in_one_order,
    n_tokens,
    parted,
    plain_forward,
)
from lora_inject.trials.flat import Buffer, Flat, Optimizer, clip, norms
from lora_inject.trials.in_pass import InPass, runs_apart
from lora_inject.trials.isolation import Checks
from lora_inject.trials.losses import (
    Loss,
    causal_loss,
    causal_losses,
    default_loss,
    ends_of,
    refuse_unlabeled,
    scalar_loss,
)
from lora_inject.trials.passes import Pass, seeded
from lora_inject.trials.trial import Trial
from lora_inject.trials.written import shared_by_trials, unwritten

RECENT = 10
"""Steps over which the training loss in the table is averaged."""


class Trials:
    """Several adapters on one model that train together, with the same results as each alone.

    Args:
        model: The model. Injected, not copied; without adapters of the trials' names.
        trials: Name to trial.
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
        StateError: There are no trials, a name is in use, or rows cannot differ in a weight: the
            forward that reads it takes more than one tensor, and is no stack of experts of
            transformers. The model is then unchanged.

    Attributes:
        model: The model.
        trials: Name to trial; without dropped trials.
        n_steps: Steps done.
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
        for name, trial in trials.items():
            check_type(f"trial {name!r}", trial, Trial, "Give Trial(config, lr=1e-3)")
        if not trials:
            raise StateError("Trials", "no trial is given", "Give a mapping of names to Trial")
        if max_tokens is not None:
            check_type("Trials, max_tokens", max_tokens, int, "Give a whole number, or None")
        needed("torch._C._will_engine_execute_node", "Trials")
        self.model, self.trials = model, dict(trials)
        self.max_tokens, self.packed, self.n_steps = max_tokens, packed, 0
        self._leave_new = leave_new
        self.stopped: dict[str, str] = {}
        self._losses: dict[str, list[float]] = {name: [] for name in trials}
        self._held_out: dict[str, float] = {}
        self._flats: dict[str, Flat] = {}
        self._checks = Checks(model)
        self._sharing = frozenset[str]()
        done = []
        try:
            for name, trial in self.trials.items():
                with torch.random.fork_rng():
                    torch.manual_seed(trial.seed)
                    inject(model, trial.config, name, leave_new=leave_new)
                done.append(name)
            _refuse_shared(model, list(trials))
            _refuse_dropout(model, list(trials))
            train_only(model, list(trials))
            self._put_in_buffer()
        except BaseException:
            for name in done:
                eject(model, name)
            raise

    def _put_in_buffer(self) -> None:
        """Move the tensors of all trials into one buffer."""
        parameters = {name: adapter_parameters(self.model, name) for name in self.trials}
        members = [p for tensors in parameters.values() for p in tensors.values()]
        if len(kinds := {f"{p.dtype} on {p.device}" for p in members}) > 1:
            problem = f"their tensors are {' and '.join(sorted(kinds))}"
            raise StateError("Trials", problem, "Adapt layers of one dtype on one device")
        self._buffer = Buffer(members)
        for name, trial in self.trials.items():
            self._flats[name] = Flat(parameters[name], trial, self._buffer)
        self._optimizer = Optimizer(self._flats.values())
        device = self._buffer.anchor.device
        self._random = {name: seeded(trial.seed, device) for name, trial in self.trials.items()}

    # ----------------------------------------------------------------------------------- a step

    def step(
        self,
        batch: Any,
        *,
        forward: Forward | None = None,
        loss: Loss | None = None,
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
            loss: Takes a trial's outputs and its batch and returns a scalar. By default it is the
                loss of the next token, from `logits` and `labels`.
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
        forward, loss = forward or plain_forward(self.model), loss or default_loss(self.model)
        batches = self._by_trial(batch, by_name)
        for name in batches:
            if (changed := self._flats[name].changed()) is not None:
                raise StateError(f"step, trial {name!r}", *changed)
        random, groups = dict(self._random), self._groups(batches)
        losses, norm_of = self._gradients(groups, forward, loss)
        if self.packed and not all(map(math.isfinite, (*losses.values(), *norm_of.values()))):
            # A masked attention multiplies the NaN of one trial by 0, so it is in the others, too.
            self._random.update(random)
            one_by_one = ({name: own} for name, own in batches.items())
            losses, norm_of = self._gradients(one_by_one, forward, loss)
        self._stop_diverged(losses, norm_of)
        self._update(norm_of)
        for name, value in losses.items():
            self._losses[name].append(value)
        self.n_steps += 1
        return losses

    def _stop_diverged(self, losses: Mapping[str, float], norm_of: Mapping[str, float]) -> None:
        """Stop the trials whose loss or gradient is not finite."""
        for name, value in losses.items():
            norm = norm_of.get(name, math.nan)
            if not math.isfinite(value):
                self._stop(name, f"its loss is {value} at step {self.n_steps}")
            elif not math.isfinite(norm):
                self._stop(name, f"its gradient has the norm {norm} at step {self.n_steps}")

    def _update(self, norm_of: Mapping[str, float]) -> None:
        """Clip the gradients of the running trials, and step what a backward reached."""
        flats = {name: self._flats[name] for name in self.running}
        clip([*flats.values()], [norm_of[n] for n in flats], [self.trials[n].clip for n in flats])
        reached, optimizer = self._buffer.reached, self._optimizer
        idle = [vector for flat in flats.values() for vector in flat.idle(reached, optimizer)]
        optimizer.step(self.n_steps, idle)

    def _gradients(
        self, groups: Iterable[Mapping[str, Any]], forward: Forward, loss: Loss
    ) -> tuple[dict[str, float], dict[str, float]]:
        """Compute all gradients; return the loss of each trial, and the norm of its gradient."""
        losses: dict[str, float] = {}
        self._buffer.zero_grad()
        for group in groups:
            losses |= self._backward(group, forward, loss)
        each = norms([self._flats[name] for name in losses])
        return losses, dict(zip(losses, each, strict=True))

    def _backward(
        self, batches: Mapping[str, Any], forward: Forward, loss: Loss
    ) -> dict[str, float]:
        """Run forward and backward of some trials, without losses that are not finite."""
        of = self._joined(batches, forward)
        outputs = self._outputs(of, forward, self._random)
        parts = parted(outputs, of)
        if loss is causal_loss:
            losses = dict(zip(batches, causal_losses(outputs, batches, of), strict=True))
        else:
            losses = {n: self._loss(loss, parts[n], batch, n) for n, batch in batches.items()}
        if constant := [name for name, one_loss in losses.items() if not one_loss.requires_grad]:
            _refuse_untrained(constant[0])
        numbers = torch.stack([one_loss.detach() for one_loss in losses.values()]).tolist()
        values = dict(zip(losses, numbers, strict=True))
        if loss is causal_loss:
            refuse_unlabeled(values, batches)
        # A loss that leads to other outputs than another one may leave layers out.
        alike: dict[Any, list[str]] = {}
        for name in filter(lambda name: math.isfinite(values[name]), values):
            ends = None if loss is causal_loss else ends_of(losses[name], outputs)
            alike.setdefault(ends, []).append(name)
        del outputs, parts  # of the size of the logits
        self._backward_of(losses, list(alike.values()))
        return values

    def _backward_of(self, losses: Mapping[str, Tensor], alike: Sequence[Sequence[str]]) -> None:
        """Run the backward of each group of losses that lead to the same outputs."""
        for i, names in enumerate(alike, 1):
            starts = {name: self._flats[name].starts for name in names}
            self._buffer.counted = frozenset[int]().union(*starts.values())
            total = torch.stack([losses[name] for name in names]).sum()
            total.backward(retain_graph=i < len(alike))  # type: ignore[no-untyped-call]
            for name in names:
                if self._buffer.reached.isdisjoint(starts[name]):
                    _refuse_untrained(name)

    def _outputs(
        self, of: Joined, forward: Forward, random: dict[str, Tensor] | None = None
    ) -> Any:
        """Run the base once; without dropout if `random` is None."""
        each = tuple(name for name, n in of.sizes.items() for _ in range(n))
        rows = InPass(Pass(of, self._buffer, random), each)
        self._buffer.refresh()
        with selecting(self.model, rows, "Trials.step"):
            return forward(of.batch)

    def _joined(self, batches: Mapping[str, Any], forward: Forward) -> Joined:
        """Join batches, and check once that nothing would leak from one to another."""
        run = partial(self._outputs, forward=forward)
        return self._checks.joined(batches, self._flats, run, forward, packed=self.packed)

    def _by_trial(self, batch: Any, by_name: bool | None) -> dict[str, Any]:
        """Return the batch of each running trial, and note which of them share memory."""
        running = self.running
        if not running:
            raise StateError("step", "no trial is running", "See trials.stopped for the reasons")
        if by_name is None:
            by_name = self._is_by_name(batch)
        if not by_name:
            self._sharing = frozenset(running if len(running) > 1 else ())
            return in_one_order(dict.fromkeys(running, batch))
        check_type("step, by_name=True", batch, Mapping, "Give a dict from names to batches")
        if unknown := [name for name in batch if name not in self.trials]:
            remedy = f"Known are {running}; of one batch for all, each entry is a tensor"
            raise StateError("step", f"there is no trial {unknown[0]!r}", remedy)
        if missing := [name for name in running if name not in batch]:
            raise StateError(
                "step", f"there is no batch for {missing[0]!r}", "Give one for each running trial"
            )
        batches = in_one_order({name: batch[name] for name in running})
        self._sharing = shared_by_trials(batches)
        return batches

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

    def _stop(self, name: str, why: str) -> None:
        self.stopped[name] = why
        self._flats[name].freeze()
        self._buffer.forget()

    # -------------------------------------------------------------------------------- the runs

    @property
    def running(self) -> list[str]:
        """Names of the trials that were not stopped or dropped."""
        return [name for name in self.trials if name not in self.stopped]

    @torch.no_grad()
    def evaluate(
        self,
        batch: Any,
        *,
        forward: Forward | None = None,
        loss: Loss | None = None,
        by_name: bool | None = None,
    ) -> dict[str, float]:
        """Return and store each running trial's loss on held-out rows, without dropout.

        Args:
            batch: As for `step`.
            forward: As for `step`.
            loss: As for `step`.
            by_name: As for `step`.

        Returns:
            Name to loss, which `best` and `table` also use.
        """
        forward, loss = forward or plain_forward(self.model), loss or default_loss(self.model)
        batches = self._by_trial(batch, by_name)
        with evaluating(self.model):
            losses = self._evaluated(self._groups(batches), forward, loss)
            if self.packed and not all(map(math.isfinite, losses.values())):  # as in `step`
                losses = self._evaluated(({n: b} for n, b in batches.items()), forward, loss)
        if loss is causal_loss:
            refuse_unlabeled(losses, batches)
        self._held_out |= losses
        return losses

    def _evaluated(
        self, groups: Iterable[Mapping[str, Any]], forward: Forward, loss: Loss
    ) -> dict[str, float]:
        """Return the loss of each trial without gradients."""
        losses: dict[str, float] = {}
        for group in groups:
            of = self._joined(group, forward)
            outputs = parted(self._outputs(of, forward), of)
            for name, one in group.items():
                losses[name] = self._loss(loss, outputs[name], one, name).item()
        return losses

    def _loss(self, loss: Loss, outputs: Any, batch: Any, name: str) -> Tensor:
        """Return a trial's loss, which must not change what other trials read."""
        alone = name not in self._sharing
        with nullcontext() if alone else unwritten(batch, f"loss of trial {name!r}"):
            return scalar_loss(loss, outputs, batch, name)

    @property
    def losses(self) -> dict[str, list[float]]:
        """Training loss of each trial at each of its steps."""
        return {name: list(values) for name, values in self._losses.items()}

    def best(self) -> str:
        """Return the running trial with the lowest held-out loss.

        Raises:
            StateError: Nothing was evaluated.
        """
        known = {n: v for n, v in self._held_out.items() if n in self.running and v == v}
        if not known:
            raise StateError("best", "no running trial was evaluated", "Call evaluate first")
        return min(known, key=known.__getitem__)

    def drop(self, name: str) -> None:
        """Eject a trial's adapter from the model and remove the trial.

        Raises:
            StateError: There is no such trial.
        """
        if name not in self.trials:
            raise StateError(f"drop {name!r}", "there is no such trial", f"Known: {self.running}")
        eject(self.model, name)
        self._buffer.forget()
        self._optimizer.drop(self._flats.pop(name))
        for mapping in (self.trials, self.stopped, self._losses, self._held_out, self._random):
            mapping.pop(name, None)

    def table(self) -> str:
        """Return a table: each trial's learning rate, parameters, losses and state."""
        rows = [("trial", "lr", "parameters", "loss", "held out", "")]
        for name, trial in self.trials.items():
            recent = self._losses[name][-RECENT:]
            rows.append(
                (
                    name,
                    f"{trial.lr:g}",
                    f"{self._flats[name].n_parameters:,}",
                    f"{sum(recent) / len(recent):.4f}" if recent else "",
                    f"{self._held_out[name]:.4f}" if name in self._held_out else "",
                    self.stopped.get(name, ""),
                )
            )
        widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
        lines = ("  ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)) for row in rows)
        return "\n".join(line.rstrip() for line in lines)

    # ------------------------------------------------------------------------------ save, resume

    def save(self, path: str | PathLike[str]) -> Path:
        """Write everything that a resumed run needs into one file, atomically.

        Args:
            path: The file. An existing file is replaced.

        Returns:
            The path.
        """
        about = {
            "trials": {name: trial.to_dict() for name, trial in self.trials.items()},
            "max_tokens": self.max_tokens,
            "packed": self.packed,
            "leave_new": self._leave_new,
            "n_steps": self.n_steps,
            "stopped": self.stopped,
            "losses": self._losses,
            "held_out": self._held_out,
        }
        states = {name: adapter_state(self.model, name) for name in self.trials}
        held = {
            "about": json.dumps(about),
            "base": {name: _base_of(state) for name, state in states.items()},
            "values": {name: flat.vectors for name, flat in self._flats.items()},
            "optimizer": {n: self._optimizer.state_of(flat) for n, flat in self._flats.items()},
            "random": self._random,
        }
        content = io.BytesIO()
        torch.save(held, content)
        return write_file(user_path("save trials", path), content.getvalue(), overwrite=True)

    @classmethod
    def resume(cls, model: nn.Module, path: str | PathLike[str]) -> Self:
        """Put saved trials onto a model. Training continues bit for bit.

        Args:
            model: The base, as it was before the trials.
            path: A file that `save` wrote.

        Raises:
            FormatError: `save` did not write the file, or wrote it with another base.
        """
        file = user_path("resume trials", path)
        try:
            held = torch.load(file, weights_only=True, map_location="cpu")
            about = json.loads(held["about"])
        except DAMAGE as error:
            problem = f"it cannot be read: {error}"
            raise FormatError(f"resume {str(path)!r}", problem, "Give what save wrote") from error
        trials = {name: Trial(**kept) for name, kept in about["trials"].items()}
        options = {option: about[option] for option in ("max_tokens", "packed", "leave_new")}
        new = cls(model, trials, **options)
        for name in trials:
            if _base_of(adapter_state(model, name)) != held["base"][name]:
                for one in trials:
                    eject(model, one)
                problem = f"the base of trial {name!r} has other values"
                raise FormatError(
                    f"resume {str(path)!r}", problem, "Give the model as it was before"
                )
        for name, vectors in held["values"].items():
            new._flats[name].fill(vectors, new._optimizer)
            new._optimizer.restore(new._flats[name], held["optimizer"][name])
        new._random = held["random"]
        new.n_steps, new._losses = about["n_steps"], about["losses"]
        new._held_out = about["held_out"]
        for name, why in about["stopped"].items():
            new._stop(name, why)
        return new


def _refuse_untrained(name: str) -> NoReturn:
    what = "no gradient leads from it to A and B"
    remedy = "Compute it from the outputs; li.unreached lists layers that take no part in a forward"
    raise StateError(f"loss of trial {name!r}", what, remedy)


def _refuse_shared(model: nn.Module, names: Iterable[str]) -> None:
    """Refuse what cannot differ by row: weights of modules whose rows cannot run apart."""
    for path, module, attached in adapted_modules(Survey(model)):
        for entry in (entry for name in names for entry in attached.entries(name)):
            reads = attached.forward.get(entry.adapter) is not entry
            if reads and not routes_rows(module, entry) and not runs_apart(module):
                raise StateError(
                    f"Trials, {entry.adapter!r}",
                    f"it changes {joined_name(path, entry.param)!r}, and the forward of a "
                    f"{type(module).__name__} takes more than one tensor with the rows first",
                    "Leave it out of the config, or train that adapter by itself",
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


def _base_of(state: Any) -> dict[str, list[float]]:
    """Return the fingerprint's samples of an adapter's base, as plain data."""
    samples: Mapping[str, tuple[float, ...]] = state.fingerprint.samples
    return {name: list(values) for name, values in samples.items()}
