"""How often each expert of a model is chosen: counted on data, as a file, and what it advises.

MoE-Sieve (arXiv:2603.24044) adapts the quarter of the experts of each layer that a task chooses
most, at a fraction of the parameters. A profile is what that choice is made by.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from os import PathLike
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

import torch
import yaml
from pydantic import Field
from torch import Tensor, nn

from lora_inject.core.files.atomic import write_file
from lora_inject.core.layers.candidates import inventory
from lora_inject.core.layers.survey import Survey
from lora_inject.core.spec.mixture import Mixture
from lora_inject.core.spec.names import parent, quoted
from lora_inject.core.spec.strict import YamlModel
from lora_inject.errors import LayerError, MatchError, user_path

_BARS = " ▁▂▃▄▅▆▇█"
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

    def picture(self) -> str:
        """Return a line of bars for each stack, an expert's bar as high as it is chosen."""
        width = max(map(len, self.experts))
        lines = []
        for name, counts in self.experts.items():
            most = max(counts) or 1
            bars = "".join(_BARS[math.ceil(8 * count / most)] for count in counts)
            lines.append(f"{name:{width}}  {bars}")
        return "\n".join(lines)

    def write(self, path: str | PathLike[str]) -> Path:
        """Write the profile as a YAML file that `only:` reads."""
        data = {"version": self.version, "experts": self.experts}
        text = yaml.safe_dump(data, sort_keys=False, default_flow_style=None, width=1 << 16)
        return write_file(user_path("write the profile", path), text.encode(), overwrite=True)


def profile_experts(model: nn.Module, batches: Iterable[Any], *, run: Any = None) -> ExpertProfile:
    """Count how often each expert of a model is chosen on some batches.

    The model runs without gradients, in the mode that it is in; padding counts as other tokens do.

    Args:
        model: The model, with or without adapters.
        batches: Mappings, which the model gets as keywords, or single arguments.
        run: What to call with a batch instead of the model.

    Returns:
        The counts by stack; `write` saves them for `only:`.

    Raises:
        LayerError: The model has no experts whose choice can be seen, or none was chosen.

    Examples:
        >>> from transformers import MixtralConfig, MixtralForCausalLM
        >>> sizes = dict(hidden_size=8, intermediate_size=8, num_hidden_layers=1, vocab_size=16)
        >>> heads = dict(num_attention_heads=2, num_key_value_heads=1, num_local_experts=4)
        >>> model = MixtralForCausalLM(MixtralConfig(**sizes, **heads))
        >>> profile = profile_experts(model, [torch.arange(6)[None]])
        >>> [sum(counts) for counts in profile.experts.values()]  # 6 tokens, 2 experts each
        [12]
    """
    survey = Survey(model)
    mixtures = inventory(survey).mixtures
    if not mixtures:
        remedy = "Give a mixture of experts"
        raise LayerError(
            "profile_experts", "the model has no experts that a router chooses", remedy
        )
    counts: dict[str, Tensor] = {}
    with ExitStack() as stack:
        for mixture in mixtures:
            for name in dict.fromkeys(parent(expert) for expert in mixture.experts):
                stack.enter_context(_counted(name, survey.by_name[name], mixture, counts))
        stack.enter_context(torch.no_grad())
        for batch in batches:
            _run(run or model, batch)
    if not counts:
        remedy = "Give batches that reach its experts"
        raise LayerError("profile_experts", "no batch reached an expert", remedy)
    return ExpertProfile(experts={name: each.tolist() for name, each in counts.items()})


def _run(model: Any, batch: Any) -> None:
    if isinstance(batch, Mapping):
        model(**batch)
    else:
        model(batch)


@contextmanager
def _counted(
    name: str, module: nn.Module, mixture: Mixture, counts: dict[str, Tensor]
) -> Iterator[None]:
    """Count the experts that a stack is called with."""

    def count(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        given = [*args, *kwargs.values()]
        chosen = [t for t in given if isinstance(t, Tensor) and not t.is_floating_point()]
        if len(chosen) != 1:
            raise LayerError(
                f"profile_experts, '{name}'",
                f"a {type(module).__name__} is not told which expert each token goes to",
                "Stacks of transformers that take the experts of each token can be profiled",
            )
        here = torch.bincount(chosen[0].reshape(-1), minlength=mixture.n_experts)
        counts[name] = counts.get(name, 0) + here[: mixture.n_experts].cpu()

    handle = module.register_forward_pre_hook(count, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()


def _n_of(share: float, n: int) -> int:
    """Return a share of n, rounded up; what the product of floats is off by does not count."""
    return math.ceil(round(share * n, 9))
