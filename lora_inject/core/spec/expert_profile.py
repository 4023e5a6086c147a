"""How often each expert of a model is chosen, as a file: a config adapts those chosen most.

MoE-Sieve (arXiv:2603.24044) adapts the quarter of the experts of each layer that a task chooses
most, at a fraction of the parameters. A profile is what that choice is made by.
"""

from __future__ import annotations

import math
from os import PathLike
from pathlib import Path
from typing import Annotated, ClassVar, Literal

from pydantic import ConfigDict, Field

from lora_inject.core.files.atomic import write_file
from lora_inject.core.spec.names import quoted
from lora_inject.core.spec.reading import YamlModel, written
from lora_inject.errors import MatchError, user_path

_Count = Annotated[int, Field(ge=0)]


class ExpertProfile(YamlModel):
    r"""How often each expert was chosen, by the name of the stack.

    Raises:
        ConfigError: The file is no profile.

    Examples:
        >>> profile = ExpertProfile.from_text("version: 1\nexperts: {mlp.experts: [5, 0, 7, 1]}")
        >>> profile.most_chosen("mlp.experts", 4, 0.5, "rule 1")
        (0, 2)
    """

    model_config = ConfigDict(defer_build=True)  # few processes read one

    forms: ClassVar[str] = "an ExpertProfile, a dict, or the path of a YAML file"

    version: Literal[1] = 1
    """Version of this schema."""
    experts: Annotated[dict[str, list[_Count]], Field(min_length=1)]
    """The name of a stack of experts, to how many tokens each of its experts got."""

    def most_chosen(self, stack: str, n: int, share: float, asked: str) -> tuple[int, ...]:
        """Return the numbers of the experts of a stack that were chosen most, in order.

        They are the share of the n experts, rounded up; of two as frequent ones the first.

        Raises:
            MatchError: The profile is of another model.
        """
        counts = self.experts.get(stack)
        remedy = "Profile this model: profile_experts(model, batches), or lora-inject profile"
        if counts is None:
            there = quoted(list(self.experts)[:2])
            raise MatchError(asked, f"the profile has no '{stack}'; it has {there}", remedy)
        if len(counts) != n:
            problem = f"the profile counts {len(counts):,} experts of '{stack}', which has {n:,}"
            raise MatchError(asked, problem, remedy)
        order = sorted(range(n), key=lambda expert: (-counts[expert], expert))
        return tuple(sorted(order[: _n_of(share, n)]))

    def covered(self, share: float) -> float:
        """Return the share of all choices that go to the most chosen share of each stack."""
        best = total = 0
        for counts in self.experts.values():
            most = sorted(counts, reverse=True)
            best += sum(most[: _n_of(share, len(most))])
            total += sum(most)
        return best / total if total else 0.0

    def write(self, path: str | PathLike[str]) -> Path:
        """Write the profile as a YAML file that `only:` reads."""
        text = written(self.model_dump(), rows=True)
        return write_file(user_path("write the profile", path), text.encode(), overwrite=True)


def _n_of(share: float, n: int) -> int:
    """Return a share of n, rounded up; what the product of floats is off by does not count."""
    return math.ceil(round(share * n, 9))
