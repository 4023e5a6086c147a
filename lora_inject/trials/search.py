"""Train the trials of a space on one base, rung by rung, and return the best config.

Successive halving (arXiv:1502.07943) in which each rung gives its trials a whole run.

A loss in the middle of a schedule says little about the loss at its end: a large learning rate
looks bad until it falls. So the trials of a rung start again from the beginning, with a schedule
that falls to 0 at the rung's end.
"""

from __future__ import annotations

import copy
import hashlib
import json
import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from os import PathLike
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from lora_inject.core.adapter.state import AdapterState
from lora_inject.core.files.atomic import write_file
from lora_inject.core.files.strict_json import read_json
from lora_inject.core.files.tensors import bytes_of
from lora_inject.core.layers.candidates import inventory
from lora_inject.core.layers.survey import Survey, evaluating
from lora_inject.core.model.listing import adapters
from lora_inject.core.model.read_off import adapter_state
from lora_inject.core.spec.config import Config
from lora_inject.core.spec.names import counted
from lora_inject.core.spec.tables import Listing, Report
from lora_inject.errors import FormatError, StateError, check_type, user_path
from lora_inject.trials.batches import Forward, copied, in_one_order, plain_forward, size_of
from lora_inject.trials.losses import Loss, default_loss, scalar_loss
from lora_inject.trials.runs import Trials
from lora_inject.trials.space import Point, Space
from lora_inject.trials.trial import Trial

# Chosen on the movie snippets of docs/evidence/search.md (seeds 10 to 17, all losses known). The
# share of random sets of held-out batches by which the best or second best of 16 trials is in the
# last rung (its standard error over seeds is 0.1), and the mean of the found loss minus the best:
#                               a third of the batches      half            all
#   a quarter of the steps, 3 continue:     0.74, 0.011     0.79, 0.010     0.75, 0.016
#   a fifth of the steps, 3 continue:       0.74, 0.018     0.75, 0.019     0.75, 0.024
#   a sixth of the steps, 3 continue:       0.69, 0.023     0.72, 0.023     0.75, 0.024
#   a quarter of the steps, 2 continue:     0.55, 0.018     0.55, 0.018     0.50, 0.021
MORE_STEPS = 5
"""A rung has so many times the steps of the one before it."""
CONTINUE = 5
"""One of so many trials continues, but two at least."""
LEAST_STEPS = 4
"""Steps of the first rung: a shorter run ranks nothing."""
JUDGED = 3
"""Before the last rung, one of so many held-out batches is used."""


def rungs(trials: int, steps: int) -> list[tuple[int, int]]:
    """Return trials and steps of each rung; the last has four trials at most, if steps allow it.

    Examples:
        >>> rungs(16, 64), rungs(5, 64), rungs(4, 64), rungs(64, 128)
        ([(16, 12), (3, 64)], [(5, 12), (2, 64)], [(4, 64)], [(64, 5), (12, 25), (2, 128)])
    """
    sizes = [trials]
    while sizes[-1] > 4 and steps // MORE_STEPS ** len(sizes) >= LEAST_STEPS:
        sizes.append(max(2, sizes[-1] // CONTINUE))
    last = len(sizes) - 1
    return [(size, steps // MORE_STEPS ** (last - i)) for i, size in enumerate(sizes)]


def ranked(losses: Mapping[str, Sequence[float]]) -> list[str]:
    """Return the trials whose mean loss is finite, the best first."""
    means = {name: fmean(values) for name, values in losses.items()}
    return sorted((n for n, v in means.items() if math.isfinite(v)), key=means.__getitem__)


def behind(losses: Sequence[float], best: Sequence[float]) -> str:
    """Say how much higher losses are than the best on the same batches, with the standard error.

    Examples:
        >>> behind([2.0, 3.5], [1.0, 2.0]), behind([2.0], [1.5])
        ('+1.2500 \u00b1 0.2500', '+0.5000')
    """
    apart = [a - b for a, b in zip(losses, best, strict=True)]
    error = f" \u00b1 {stdev(apart) / math.sqrt(len(apart)):.4f}" if len(apart) > 1 else ""
    return f"{fmean(apart):+.4f}{error}"


SAVE_SECONDS = 20.0
"""Time between two saves of the running rung: an interrupt loses at most this much."""
RECENT = 8
"""Steps over which the loss of a running trial is averaged."""
PASS_TOKENS = 4096


@dataclass
class Rung:
    """One rung: trials that each train for a whole run.

    Attributes:
        steps: Steps of the run.
        losses: Trial to its training loss at each step.
        held_out: Trial to its loss on each held-out batch, at the end; without stopped trials.
        stopped: Trial to the reason why it was stopped.
        seconds: Time of the rung, evaluation included.
    """

    steps: int
    losses: dict[str, list[float]] = field(default_factory=dict)
    held_out: dict[str, list[float]] = field(default_factory=dict)
    stopped: dict[str, str] = field(default_factory=dict)
    seconds: float = 0.0

    def judged(self, name: str) -> str:
        """Return how a trial did: its held-out loss, and how far it is behind the best."""
        if name in self.stopped:
            return "stopped"
        if name not in self.held_out:
            recent = self.losses.get(name, [])[-RECENT:]
            return f"{fmean(recent):.4f} in training" if recent else "-"
        loss, best = self.held_out[name], self.held_out[ranked(self.held_out)[0]]
        apart = "" if loss is best else f" {behind(loss, best)}"
        return f"{fmean(loss):.4f}{apart}"


@dataclass
class Search(Report):
    """A running or finished search, with its evidence.

    Attributes:
        space: What the search tries.
        candidates: Trial to its config, learning rate and parameters.
        over_budget: Trials that are left out, because they are over the budget.
        rungs: The finished rungs, and the running one.
        equal: How many trials were left out because they equal others.
        base: Loss of the base on each held-out batch.
        adapter: The best trial's adapter; None until the end.
    """

    space: Space
    candidates: dict[str, Point]
    over_budget: list[str] = field(default_factory=list)
    equal: int = 0
    rungs: list[Rung] = field(default_factory=list)
    base: list[float] = field(default_factory=list)
    adapter: AdapterState | None = None

    @property
    def plan(self) -> list[tuple[int, int]]:
        """Trials and steps of each rung."""
        return rungs(len(self.candidates), self.space.budget.steps)

    @property
    def best(self) -> str:
        """The trial with the lowest held-out loss in the last rung."""
        return ranked(self.rungs[-1].held_out)[0]

    @property
    def config(self) -> Config:
        """The best trial's config, with its counts in `expect`."""
        return self.candidates[self.best].config

    @property
    def seconds(self) -> float:
        """Time of all rungs."""
        return sum(rung.seconds for rung in self.rungs)

    def trial(self, name: str, steps: int) -> Trial:
        """Return a candidate as a trial for a rung of `steps` steps."""
        config, lr, _ = self.candidates[name]
        settings = self.space.training.model_dump()
        warmup = min(math.ceil(settings.pop("warmup") * steps), steps - 1)
        return Trial(config, lr=lr, steps=steps, warmup=warmup, seed=self.space.seed, **settings)

    def to_dict(self) -> dict[str, Any]:
        """Return what was tried, and how each trial did in each rung, as plain data."""
        return {
            "best": self.best,
            "seed": self.space.seed,
            "seconds": self.seconds,
            "base": fmean(self.base),
            "over_budget": self.over_budget,
            "equal": self.equal,
            "trials": {
                name: {"lr": point.lr, "parameters": point.parameters}
                for name, point in self.candidates.items()
            },
            "rungs": [
                {
                    "steps": rung.steps,
                    "held_out": {name: fmean(losses) for name, losses in rung.held_out.items()},
                    "stopped": rung.stopped,
                }
                for rung in self.rungs
            ],
            "config": self.config.to_dict(),
        }

    def _lines(self, width: int) -> Iterator[str]:
        """Yield a row for each trial, the best of the last rung first, and the best one's name.

        After a sign: behind the best, with the standard error over the held-out batches.
        """
        order = dict.fromkeys(n for rung in reversed(self.rungs) for n in ranked(rung.held_out))
        order |= dict.fromkeys(self.candidates)
        points = ((name, self.candidates[name]) for name in order)
        rows = tuple(
            (name, f"{p.lr:g}", f"{p.parameters:,}", *(rung.judged(name) for rung in self.rungs))
            for name, p in points
        )
        heads = ("trial", "lr", "parameters", *(f"after {steps} steps" for _, steps in self.plan))
        yield from Listing(heads, rows).lines(width, everything=True)
        if self.rungs[-1].held_out:
            yield f"best: {self.best}; {self.seconds:.0f} s of training"

    def to_yaml(self) -> str:
        """Return the best config as YAML, with the evidence for it in comments."""
        last, best = self.rungs[-1], self.best
        training, loss = self.space.training, fmean(last.held_out[best])
        plan = ", then ".join(f"{n} for {counted(steps, 'step')}" for n, steps in self.plan)
        warmup = self.trial(best, last.steps).warmup
        schedule = f"{training.schedule}, {counted(last.steps, 'step')}, {warmup} of warm-up"
        judged = f"the base {fmean(self.base):.4f}; batches: {len(self.base)}"
        lines = [
            f"Found by a search of {len(self.candidates)} trials, seed {self.space.seed}: {plan}.",
            f"Train with lr {self.candidates[best].lr} ({schedule}).",
            f"Held-out loss {loss:.4f}; {judged}; {self.seconds:.0f} s in all.",
        ]
        for name in ranked(last.held_out)[1:]:
            apart = behind(last.held_out[name], last.held_out[best])
            lines.append(f"{name}: {apart} (over batches, one seed)")
        lines += [f"{name}: stopped, {why}" for r in self.rungs for name, why in r.stopped.items()]
        if self.over_budget:
            lines.append(f"{len(self.over_budget)} more were over the budget.")
        if self.equal:
            lines.append(f"{self.equal} more were equal to others.")
        return "".join(f"# {line}\n" for line in lines) + self.config.to_yaml()


Watch = Callable[[Search], None]


def search(
    model: nn.Module,
    space: Space | Mapping[str, Any] | str | PathLike[str],
    batches: Sequence[Any],
    held_out: Sequence[Any],
    *,
    forward: Forward | None = None,
    loss: Loss | None = None,
    folder: str | PathLike[str] | None = None,
    max_tokens: int | None = PASS_TOKENS,
    watch: Watch | None = None,
    leave_new: bool = False,
) -> Search:
    """Find the config and learning rate of a space that fit the data best, in one run.

    All trials of a rung train together on the same batches. Each rung is a whole run with its own
    schedule. The best fifth, two trials at least, starts again in the next rung, with five times
    the steps. Rungs before the last are judged by every third held-out batch.

    Args:
        model: The base, without adapters. Afterwards it is unchanged.
        space: What to try, as a `Space`, a mapping, or the path of a YAML file.
        batches: A batch for each step, as `Trials.step` takes it; used again from the first on.
        held_out: Batches whose mean loss ranks the trials.
        forward: As for `Trials.step`.
        loss: As for `Trials.step`.
        folder: Where the state is saved every 20 seconds. After an interrupt, a call with the same
            arguments continues from the saved state.
        max_tokens: As for `Trials`.
        watch: Called with the search after each step.
        leave_new: As for `inject`: leave weights out that the model's checkpoint lacked.

    Returns:
        The search, with the best config and its adapter.

    Raises:
        ConfigError: The space or a config is not valid.
        MatchError: A rule matches nothing, or no trial fits the budget.
        StateError: There is no batch, a loss of the base is not finite, the model has adapters, all
            trials diverged, or `Trials` raises it. The model is then unchanged.
        FormatError: The folder holds another search, or a damaged one.

    Examples:
        >>> model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
        >>> space = {"targets": {"all": ["all-linear"], "last": ["2"]}, "rank": [1, 2],
        ...          "lr": [1e-3, 1e-2], "budget": {"steps": 20}}
        >>> x, y = torch.randn(32, 4), torch.randn(32, 2)
        >>> result = search(model, space, [(x, y)], [(x, y)], forward=lambda b: model(b[0]),
        ...     loss=lambda out, b: nn.functional.mse_loss(out, b[1]))
        >>> result.plan, [len(rung.held_out) for rung in result.rungs]
        ([(8, 4), (2, 20)], [8, 2])
        >>> result.config.expect.sites in (1, 2)
        True
    """
    space = Space.coerce(space)
    for name, given in (("batches", batches), ("held_out", held_out)):
        check_type(f"search, {name}", given, Sequence, "Give a list of batches, one for each step")
        if not given:
            raise StateError(f"search, {name}", "there is no batch", "Give one at least")
    if names := list(adapters(model)):
        has = f"the model has the adapter {names[0]!r}, and trials run on the plain base"
        raise StateError("search", has, "Eject it, and install it again afterwards")
    candidates, over = space.candidates(inventory(Survey(model)))
    equal = len(space.points()) - len(candidates) - len(over)
    result = Search(space, candidates, over, equal)
    rows = [
        [*in_one_order({str(i): one for i, one in enumerate(given)}).values()]
        for given in (batches, held_out)
    ]
    calls = {"forward": forward or plain_forward(model), "loss": loss or default_loss(model)}
    options = {"max_tokens": max_tokens, "leave_new": leave_new}
    where = None if folder is None else user_path("search, folder", folder)
    try:
        _Runner(model, result, rows, calls, options, watch, where).run()
    except KeyboardInterrupt as error:
        if folder is not None:
            error.add_note(f"Run the same again: it goes on from what is saved in '{folder}'.")
        raise
    return result


class _Runner:
    """Runs the rungs of a search on a model, and saves them in a folder."""

    def __init__(
        self,
        model: nn.Module,
        search: Search,
        rows: Sequence[Sequence[Any]],
        calls: dict[str, Any],
        options: dict[str, Any],
        watch: Watch | None,
        folder: Path | None,
    ) -> None:
        self.model, self.search, self.calls, self.options = model, search, calls, options
        (self.batches, self.held_out), self.watch, self.folder = rows, watch, folder
        self.kept: dict[str, Any] = {}
        if folder is not None:
            plain = search.space.model_dump(mode="json", by_alias=True, exclude_none=True)
            data = [*map(_digest, rows)]
            self.key = {"space": plain, "data": data, "max_tokens": options["max_tokens"]}
            self._read(folder)

    def _read(self, folder: Path) -> None:
        """Read what a folder holds of the same search."""
        if not (path := folder / "search.json").exists():
            return
        self.kept = read_json(path, f"search in '{folder}'")
        held = self.kept.get("key") if isinstance(self.kept, dict) else None
        for what, value in self.key.items():
            if not isinstance(held, dict) or held.get(what) != value:
                problem = f"the {what} of the search in it differs"
                raise FormatError(f"search in '{folder}'", problem, "Give another folder")

    def run(self) -> None:
        """Run the missing rungs; of a finished search read the adapter."""
        search, base = self.search, self._base()
        held = self.kept.get("base", base)
        if not all(math.isclose(a, b, rel_tol=1e-4) for a, b in zip(held, base, strict=True)):
            problem = f"the base's held-out losses in it are {held}, and now they are {base}"
            remedy = "Give the model, loss and forward that it had, or another folder"
            raise FormatError(f"search in '{self.folder}'", problem, remedy)
        search.base = base
        done = [Rung(**rung) for rung in self.kept.get("rungs", ())]
        names = list(search.candidates)
        for i, (size, steps) in enumerate(search.plan):
            search.rungs.append(done[i] if i < len(done) else Rung(steps))
            rung = search.rungs[i]
            if i + 1 == len(search.plan) or not rung.held_out:
                self._rung(rung, names[:size])
            if not (names := ranked(rung.held_out)):
                name, why = next(iter(rung.stopped.items()))
                problem = f"all trials diverged; {name!r}: {why}"
                remedy = "Give smaller learning rates; if they end at one step, look at its batch"
                raise StateError("search", problem, remedy)

    def _rung(self, rung: Rung, names: Sequence[str]) -> None:
        """Train the trials of the last rung to its end, or until none runs, and judge them."""
        began = saved = time.monotonic() - rung.seconds
        last = len(self.search.rungs) == len(self.search.plan)
        with self._trials(names, rung.steps, self._file() if self.kept else None) as trials:
            self._save(trials)
            while trials.running and (n := trials.n_steps[trials.running[0]]) < rung.steps:
                trials.step(self.batches[n % len(self.batches)], **self.calls)
                for name, values in trials.losses.items():
                    rung.losses[name] = [loss for loss in values if math.isfinite(loss)]
                rung.stopped = dict(trials.stopped)
                rung.seconds = (now := time.monotonic()) - began
                if self.watch is not None:
                    self.watch(self.search)
                if now - saved > SAVE_SECONDS:
                    self._save(trials)
                    saved = now
            rung.held_out = {name: [] for name in trials.running}
            for batch in self.held_out[:: 1 if last else JUDGED] if trials.running else ():
                for name, value in trials.evaluate(batch, **self.calls).items():
                    rung.held_out[name].append(value)
            for name in rung.held_out.keys() - set(ranked(rung.held_out)):
                del rung.held_out[name]
                rung.stopped[name] = "its held-out loss is not a number"
            rung.seconds = time.monotonic() - began
            self._save(trials)
            if last and rung.held_out:
                self.search.adapter = copy.deepcopy(adapter_state(self.model, self.search.best))

    def _file(self) -> Path | None:
        """Return where the trials of the last rung are saved."""
        return self.folder and self.folder / f"rung-{len(self.search.rungs)}.pt"

    def _save(self, trials: Trials) -> None:
        """Save the search and the trials of its last rung, and delete those of earlier rungs."""
        if self.folder is None or (path := self._file()) is None:
            return
        trials.save(path)
        rungs = [asdict(rung) for rung in self.search.rungs]
        held = {"key": self.key, "base": self.search.base}
        text = json.dumps({**held, "rungs": rungs})
        write_file(self.folder / "search.json", text.encode(), overwrite=True)
        self.kept = held
        for other in set(self.folder.glob("rung-*.pt")) - {path}:
            other.unlink()

    @contextmanager
    def _trials(
        self, names: Iterable[str], steps: int, file: Path | None = None
    ) -> Iterator[Trials]:
        """Put trials onto the model, from their file if it exists; eject them at the end."""
        if file is not None and file.exists():
            trials = Trials.resume(self.model, file)
        else:
            runs = {name: self.search.trial(name, steps) for name in names}
            trials = Trials(self.model, runs, **self.options)
        try:
            yield trials
        finally:
            for name in list(trials.trials):
                trials.drop(name)

    def _base(self) -> list[float]:
        """Return the loss of the base on each held-out batch, which must be finite.

        So it must on the first batch of training: no trial learns from data that it cannot be.
        """
        losses = []
        given = {f"held_out[{i}]": each for i, each in enumerate(self.held_out)}
        with torch.no_grad(), evaluating(self.model):
            for name, batch in {"batches[0]": self.batches[0], **given}.items():
                size_of(batch, name)
                outputs = self.calls["forward"](copied(batch))
                value = scalar_loss(self.calls["loss"], outputs, copied(batch), name).item()
                if not math.isfinite(value):
                    problem = f"the base's loss is {value}"
                    raise StateError(f"search, {name}", problem, "Look at its rows")
                losses.append(value)
        return losses[1:]


def _digest(batches: Sequence[Any]) -> str:
    """Return a digest of the tensors in their order."""
    digest = hashlib.sha256()
    for leaf in tree_leaves(list(batches)):
        if isinstance(leaf, Tensor):
            digest.update(f"{leaf.dtype} {tuple(leaf.shape)}".encode())
            digest.update(bytes_of(leaf.cpu()))
    return digest.hexdigest()
