"""One of many training runs: its config and the settings of its optimizer."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, fields
from functools import partial
from numbers import Real
from os import PathLike
from typing import Any, Literal

from lora_inject.core.spec.config import Config
from lora_inject.errors import ConfigError, check_type
from lora_inject.formats.from_peft import config_of

Schedule = Literal["constant", "linear", "cosine"]
_SHAPES: dict[str, Callable[[float], float]] = {
    "constant": lambda _: 1.0,
    "linear": lambda done: 1.0 - done,
    "cosine": lambda done: 0.5 * (1.0 + math.cos(math.pi * done)),
}


def _is_number(value: Any, above: float = -1.0) -> bool:
    """Whether a value is a finite number from 0, and more than `above`."""
    is_number = isinstance(value, Real) and not isinstance(value, bool)
    return is_number and 0 <= float(value) < math.inf and float(value) > above


def _are_betas(values: tuple[Any, ...]) -> bool:
    return len(values) == 2 and all(_is_number(value) and value < 1 for value in values)


@dataclass(frozen=True)
class Trial:
    """One run: a config and the settings of its AdamW.

    Attributes:
        config: As for `inject`.
        lr: Largest learning rate of A in the schedule.
        b_lr_ratio: Learning rate of B over that of A (LoRA+, arXiv:2402.12354).
        weight_decay: Decoupled weight decay of AdamW.
        betas: The betas of AdamW.
        clip: Largest norm of the trial's gradient; None for no clipping.
        schedule: `constant`, or `linear` or `cosine` down to 0 after `steps`.
        steps: Steps of the schedule, warm-up included; not used by `constant`.
        warmup: Steps in which the learning rate rises linearly.
        seed: Seed of the start of A and of the adapter's dropout.

    Raises:
        ConfigError: A setting is out of its range, or the config is not valid.

    Examples:
        >>> trial = Trial({"rank": 4, "targets": ["q_proj"]}, lr=1e-3, schedule="cosine", steps=100)
        >>> trial.factor(0), round(trial.factor(50), 3), trial.factor(100)
        (1.0, 0.5, 0.0)
    """

    config: Config | Mapping[str, Any] | str | PathLike[str]
    lr: float = field(kw_only=True)
    b_lr_ratio: float = field(default=1.0, kw_only=True)
    weight_decay: float = field(default=0.0, kw_only=True)
    betas: tuple[float, float] = field(default=(0.9, 0.999), kw_only=True)
    clip: float | None = field(default=None, kw_only=True)
    schedule: Schedule = field(default="constant", kw_only=True)
    steps: int | None = field(default=None, kw_only=True)
    warmup: int = field(default=0, kw_only=True)
    seed: int = field(default=0, kw_only=True)

    def __post_init__(self) -> None:
        object.__setattr__(self, "config", config_of(self.config))
        check_type("Trial.betas", self.betas, Iterable, "Give two numbers", ConfigError)
        object.__setattr__(self, "betas", tuple(self.betas))
        positive = partial(_is_number, above=0.0)
        for name, fits, wanted in (
            ("lr", positive(self.lr), "a positive number, such as 1e-3"),
            ("b_lr_ratio", positive(self.b_lr_ratio), "a positive number, such as 4"),
            ("weight_decay", _is_number(self.weight_decay), "a number from 0"),
            ("betas", _are_betas(self.betas), "two numbers from 0 and below 1"),
            ("seed", type(self.seed) is int and -(2**63) <= self.seed < 2**64, "a whole number"),
            ("clip", self.clip is None or positive(self.clip), "a positive number or None"),
            ("schedule", self.schedule in [*_SHAPES], f"one of {', '.join(_SHAPES)}"),
            ("warmup", _is_number(self.warmup), "a number of steps from 0"),
            ("steps", self.steps is None or positive(self.steps), "a number of steps, or None"),
            (
                "steps",
                self.schedule == "constant" or (self.steps or 0) > self.warmup,
                f"how many steps the {self.schedule} schedule takes, more than warmup",
            ),
        ):
            if not fits:
                problem = f"it is {getattr(self, name)!r}"
                raise ConfigError(f"Trial.{name}", problem, f"Give {wanted}")

    def factor(self, step: int) -> float:
        """Return what the learning rate is multiplied by at a step, counted from 0."""
        if step < self.warmup:
            return (step + 1) / self.warmup
        if self.steps is None:
            return 1.0
        done = (step - self.warmup) / (self.steps - self.warmup)
        return _SHAPES[self.schedule](min(done, 1.0))

    def to_dict(self) -> dict[str, Any]:
        """Return the trial as plain data, which `Trial(**data)` takes."""
        assert isinstance(self.config, Config)
        rest = {f.name: getattr(self, f.name) for f in fields(self) if f.name != "config"}
        return {"config": self.config.to_dict(), **rest}
