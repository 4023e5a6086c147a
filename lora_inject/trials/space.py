"""What a search tries: choices and ranges for a config and its learning rate, and a budget."""

from __future__ import annotations

import math
from collections.abc import Mapping
from itertools import product
from random import Random
from typing import Annotated, Any, ClassVar, Literal, NamedTuple, Self, TypeVar

from pydantic import BeforeValidator, Field, model_validator

from lora_inject.core.spec.config import Config, Distinct, Expect, Rank, Rule, Variant
from lora_inject.core.spec.inventory import Inventory
from lora_inject.core.spec.reading import Strict, YamlModel
from lora_inject.core.spec.resolve import resolve
from lora_inject.errors import MatchError

SEARCHED = ("targets", "rank", "alpha", "variant", "expect")
_NAMES = {
    "targets": "{}",
    "rank": "r{}",
    "scale": "x{}",
    "alpha": "a{}",
    "variant": "{}",
    "lr": "lr {}",
}
"""What may vary, to its name in the name of a trial."""
_DRAWN = (
    "targets",
    "variant",
    "rank",
    "scale",
    "alpha",
    "lr",
)  # in this order: it is part of a seed


_Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
_Limit = Annotated[int, Field(ge=1)]


class Range(Strict):
    """`{from: 1e-4, to: 1e-2}`: values are drawn evenly on a logarithmic scale."""

    from_: _Positive = Field(alias="from")
    """The smallest value."""
    to: _Positive
    """The largest value."""

    @model_validator(mode="after")
    def _rises(self) -> Self:
        if self.from_ >= self.to:
            problem = f"from {self.from_:g} is not below to {self.to:g}"
            raise ValueError(problem, "Give the smaller value as from")
        return self

    def at(self, share: float) -> float:
        """Return the value at a share, in [0, 1], of the range."""
        return math.exp(math.log(self.from_) + share * math.log(self.to / self.from_))


def _read_choices(value: Any) -> Any:
    if isinstance(value, (Mapping, Range)):
        return value
    return tuple(value) if isinstance(value, (list, tuple)) else (value,)


_Read = BeforeValidator(_read_choices)
_Some = Field(min_length=1)
_T = TypeVar("_T")
Varied = Annotated[Annotated[tuple[_T, ...], _Some, Distinct] | Range, _Read]
Rules = Annotated[tuple[Rule, ...], _Some, _Read]


class Budget(Strict):
    """Limits on the adapter and on the search."""

    parameters: _Limit | None = None
    """Largest number of trainable parameters of the adapter."""
    steps: _Limit
    """Steps of the longest run."""


class Training(Strict):
    """Optimizer settings that all trials share."""

    schedule: Literal["cosine", "linear"] = "cosine"
    """How the learning rate falls to 0 over the steps of a run."""
    warmup: Annotated[float, Field(ge=0, lt=1)] = 0.06
    """Share of the steps in which the learning rate rises."""
    weight_decay: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 0.0
    clip: _Positive | None = None
    b_lr_ratio: _Positive = 1.0


class Point(NamedTuple):
    """A point of a space: a config with its counts in `expect`, and a learning rate."""

    config: Config
    lr: float
    parameters: int


def _rounded(key: str, value: float) -> float:
    """Return a drawn value as a whole rank, or with three digits."""
    return max(1, round(value)) if key == "rank" else float(f"{value:.3g}")


class Space(YamlModel):
    r"""What a search tries.

    `rank`, `alpha`, `scale` and `lr` each take a value, a list of choices, or a range
    `{from: 1e-4, to: 1e-2}`; `variant` takes a value or a list.

    Raises:
        ConfigError: A key or a value is not valid; the message gives its place.

    Examples:
        >>> space = Space.from_text('''
        ... targets: {all: [all-linear], qv: ['[qv]_proj']}
        ... rank: [2, 8]
        ... lr: {from: 1e-4, to: 1e-2}
        ... trials: 8
        ... budget: {steps: 64}
        ... ''')
        >>> points = space.points()
        >>> len(points), points[0]["targets"] in ("all", "qv")
        (8, True)
    """

    forms = "a Space, a dict, or the path of a YAML file"
    inside: ClassVar = {"targets": Rule, "budget": Budget, "training": Training}

    targets: Annotated[dict[Annotated[str, Field(pattern=r"^[\w-]+$")], Rules], _Some]
    """Choices of layers: a name, which the tables show, to rules as in a config."""
    rank: Varied[Rank] = (8,)
    alpha: Varied[_Positive] = (32.0,)
    """The same for all ranks: the best learning rate then hardly depends on the rank."""
    scale: Varied[_Positive] | None = None
    """alpha / rank, in place of alpha."""
    lr: Varied[_Positive]
    """Largest learning rate in the schedule."""
    variant: Annotated[tuple[Variant, ...], _Some, Distinct, _Read] = ("lora",)
    trials: Annotated[int, Field(ge=2)] | None = None
    """Largest number of trials; required with a range, else all combinations by default."""
    seed: int = 0
    """Seed of the draws, and of each trial's start and dropout."""
    config: dict[str, Any] = Field(default_factory=dict)
    """Further keys of every config, such as dropout or exclude."""
    training: Training = Training()
    budget: Budget

    @model_validator(mode="after")
    def _chooses(self) -> Self:
        if wrong := [key for key in SEARCHED if key in self.config]:
            remedy = "Give it as a key of the space (alpha: or scale, alpha / rank)"
            raise ValueError(f"config has {wrong[0]!r}, which the space sets", remedy)
        if self.scale is not None and "alpha" in self.model_fields_set:
            raise ValueError("alpha and scale are both given", "Give one: scale is alpha / rank")
        if self.ranges() and self.trials is None:
            problem = f"{next(iter(self.ranges()))} is a range, and trials is missing"
            raise ValueError(problem, "Say how many to draw, such as trials: 16")
        if not self.ranges() and math.prod(map(len, self.choices().values())) < 2:
            raise ValueError(
                "the space holds a single trial", "Give two choices of something, such as two lr"
            )
        return self

    def choices(self) -> dict[str, tuple[Any, ...]]:
        """Return each key that has choices, and its choices."""
        given = {key: getattr(self, key) for key in _DRAWN}
        return {k: tuple(v) for k, v in given.items() if v and not isinstance(v, Range)}

    def ranges(self) -> dict[str, Range]:
        """Return each key that has a range, and its range."""
        return {key: v for key in _DRAWN if isinstance(v := getattr(self, key), Range)}

    def points(self) -> list[dict[str, Any]]:
        """Return the points to try, as the seed draws them.

        Combinations of choices are taken in turn, in random order unless all are taken. Each range
        is cut into one piece for each point, and each piece has one value (a Latin hypercube).
        """
        random = Random(self.seed)  # noqa: S311  (draws, no secrets)
        choices, ranges = self.choices(), self.ranges()
        combinations = product(*choices.values())
        grid = [dict(zip(choices, combination, strict=True)) for combination in combinations]
        n = self.trials or len(grid)
        if ranges or n < len(grid):
            random.shuffle(grid)
        n_points = n if ranges else min(n, len(grid))
        points = [grid[i % len(grid)] for i in range(n_points)]
        for key, values in ranges.items():
            pieces = random.sample(range(n), n)
            drawn = [values.at((piece + random.random()) / n) for piece in pieces]
            points = [p | {key: _rounded(key, v)} for p, v in zip(points, drawn, strict=True)]
        return points

    def candidates(self, inventory: Inventory) -> tuple[dict[str, Point], list[str]]:
        """Return the trials for a model by name, and the names of those over the budget.

        Raises:
            ConfigError: A config is not valid.
            MatchError: A rule matches nothing, or the budget leaves no trial.
        """
        varied = [k for k, v in self.choices().items() if len(v) > 1] + [*self.ranges()]
        fitting: dict[str, Point] = {}
        over: dict[str, int] = {}
        for point in self.points():
            of_point = {
                "targets": self.targets[point["targets"]],
                "rank": point["rank"],
                "alpha": point["scale"] * point["rank"] if self.scale else point["alpha"],
                "variant": point["variant"],
            }
            config = Config.from_dict({**self.config, **of_point})
            plan = resolve(config, inventory)
            name = " ".join(_NAMES[key].format(point[key]) for key in _NAMES if key in varied)
            if plan.n_trainable > (self.budget.parameters or math.inf):
                over[name] = plan.n_trainable
                continue
            expect = Expect(sites=plan.n_sites, lora=plan.n_lora)
            counted = config.model_copy(update={"expect": expect})
            fitting[name] = Point(counted, point["lr"], plan.n_trainable)
        if not fitting:
            name, least = min(over.items(), key=lambda item: item[1])
            asked = f"a search within {self.budget.model_dump(exclude_none=True)}"
            problem = f"the smallest trial, {name!r}, has {least:,} parameters"
            raise MatchError(asked, problem, "Give a larger budget, a smaller rank or fewer layers")
        return fitting, list(over)
