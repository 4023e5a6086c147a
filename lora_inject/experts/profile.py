"""Counting how often each expert of a model is chosen on data."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from lora_inject.core.layers.candidates import inventory
from lora_inject.core.layers.survey import Survey
from lora_inject.core.spec.expert_profile import ExpertProfile
from lora_inject.core.spec.inventory import Mixture
from lora_inject.core.spec.names import parent
from lora_inject.errors import LayerError


def profile_experts(model: nn.Module, batches: Iterable[Any]) -> ExpertProfile:
    """Count how often each expert of a model is chosen on some batches.

    The model runs without gradients, in the mode that it is in; padding counts as other tokens do.

    Args:
        model: The model, with or without adapters.
        batches: Mappings, which the model gets as keywords, or single arguments.

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
            model(**batch) if isinstance(batch, Mapping) else model(batch)
    if not counts:
        remedy = "Give batches that reach its experts"
        raise LayerError("profile_experts", "no batch reached an expert", remedy)
    return ExpertProfile(experts={name: each.tolist() for name, each in counts.items()})


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
