"""What happens beside the training: a bar, an early end, an end that was asked for.

Each of these decides by what Trainer's own record says, and keeps nothing that a
checkpoint would have to hold, so a run that was killed and resumed decides alike.
"""

from __future__ import annotations

import signal
import sys
from types import FrameType
from typing import Any

import torch
import torch.distributed as dist
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from transformers import TrainerCallback

__all__ = ["Bar", "EarlyStop", "StopWhenAsked"]


class EarlyStop(TrainerCallback):
    """Stop when the metric was not better for some evaluations in a row.

    Args:
        metric: As the record names it.
        higher: Whether more of it is better.
        patience: Evaluations without a better one.
    """

    def __init__(self, metric: str, higher: bool, patience: int) -> None:
        self.metric = metric
        self.sign = 1 if higher else -1
        self.patience = patience

    def on_evaluate(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        del args
        values = [self.sign * e[self.metric] for e in state.log_history if self.metric in e]
        if values and len(values) - 1 - values.index(max(values)) >= self.patience:
            control.should_training_stop = True


class StopWhenAsked(TrainerCallback):
    """On Ctrl-C or SIGTERM finish the step, have it saved, and stop; a second one stops at once.

    It listens while it is entered, as a context.

    Attributes:
        asked: Whether somebody did.
    """

    def __init__(self) -> None:
        self.asked = False
        self._before: dict[int, Any] = {}

    def __enter__(self) -> StopWhenAsked:
        self._before = {s: signal.signal(s, self._ask) for s in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _ask(self, number: int, frame: FrameType | None) -> None:
        del frame
        self.asked = True
        signal.signal(number, signal.default_int_handler)
        print("finishing this step; once more to stop at once", file=sys.stderr)

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        del state
        if args.world_size > 1:  # all processes stop after the same step, or none
            asked = torch.tensor(float(self.asked), device=args.device)
            dist.all_reduce(asked)
            self.asked = bool(asked)
        if self.asked:
            control.should_save = control.should_training_stop = True


class Bar(TrainerCallback):
    """One line that moves, and a line for each evaluation."""

    def __init__(self, console: Console) -> None:
        self.console = console
        self._progress: Progress | None = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        del args, control
        if not state.is_world_process_zero:
            return
        self._progress = Progress(
            TextColumn("training"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("loss {task.fields[loss]}"),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            console=self.console,
        )
        self._progress.add_task("", total=state.max_steps, completed=state.global_step, loss="-")
        self._progress.start()

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        del args, control
        self._update(completed=state.global_step)

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
        del args, control
        if "loss" in logs:
            self._update(loss=f"{logs['loss']:.3f}")
        shown = {k.removeprefix("eval_"): v for k, v in logs.items() if k.startswith("eval_")}
        words = [f"{k} {shown[k]:.4g}" for k in ("nll", "perplexity", "accuracy", "mse", "pearson")
                 if k in shown]  # fmt: skip
        if words and self._progress is not None:
            self._progress.print(f"step {state.global_step}: {', '.join(words)}", highlight=False)

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        del args, state, control
        if self._progress is not None:
            self._progress.stop()
            self._progress = None

    def _update(self, **what: Any) -> None:
        if self._progress is not None:
            self._progress.update(self._progress.task_ids[0], **what)
