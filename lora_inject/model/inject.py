"""Planning and injecting: a config onto a live model."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from lora_inject.formats.model_facts import expert_names
from lora_inject.functional import master_dtype, norms_of
from lora_inject.layers.candidates import inventory
from lora_inject.layers.dense_values import dense
from lora_inject.layers.reading import is_quantized
from lora_inject.layers.survey import Survey, memory_of
from lora_inject.model.attach import attach, places, refuse_statistics, survey_for
from lora_inject.model.carried import Carried
from lora_inject.model.train import refuse_dead_inputs
from lora_inject.spec.config import Config, ConfigLike
from lora_inject.spec.matching import resolve
from lora_inject.spec.names import matching
from lora_inject.spec.plan import Plan
from lora_inject.spec.sites import SiteSpec

M = TypeVar("M", bound=nn.Module)


def plan(model: nn.Module, config: ConfigLike) -> Plan:
    r"""Say what `inject` would do, and change nothing.

    Args:
        model: Any module, also on the meta device.
        config: A `Config`, a dict, the path of a YAML file, or a LoraConfig of PEFT.

    Returns:
        The plan; `print(plan)` shows it as a table.

    Raises:
        ConfigError: The config is not valid.
        MatchError: A pattern matches nothing, or `expect` is missed.
        LayerError: A matched module cannot carry an adapter.

    Examples:
        >>> net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
        >>> plan(net, {"rank": 2, "targets": [r"\d"]}).n_lora
        44
    """
    found = inventory(Survey(model))
    return resolve(Config.coerce(config, found, expert_names(model)), found)


def inject(
    model: M, config: ConfigLike, name: str = "default", *, probe: Callable[[], Any] | None = None
) -> M:
    """Put a new adapter onto a model, in place, and freeze everything else.

    The adapter becomes the only active and the only trainable one; others keep their values. That
    holds for another model's adapters as well if it shares a layer with this one.

    Args:
        model: Any module; stays the same object.
        config: A `Config`, a dict, the path of a YAML file, or a LoraConfig of PEFT.
        name: Name of the adapter.
        probe: Runs the model once, for instance `lambda: model(**batch)`. With it a site that the
            run does not reach, whose adapter would be inert, is an error.

    Returns:
        The same object, for chaining.

    Raises:
        ConfigError: The config is not valid.
        MatchError: A pattern matches nothing, or `expect` is missed.
        LayerError: A matched module cannot carry an adapter, or `probe` does not reach it.
        StateError: The name is in use, or the model is merged.

    Examples:
        >>> net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
        >>> _ = inject(net, {"rank": 2, "targets": ["0"]})
        >>> sorted(n for n, p in net.named_parameters() if p.requires_grad)
        ['0.lora_A__default', '0.lora_B__default']
    """
    survey = survey_for(model, name)
    refuse_dead_inputs(survey, f"inject {name!r}")
    present = inventory(survey)
    planned = resolve(Config.coerce(config, present, expert_names(model)), present)
    named = {
        key: trained.rows for trained in planned.trained for key in survey.names_of(trained.name)
    }
    found = places(survey, name, planned.sites, named)
    for i, pattern in enumerate(planned.config.train):
        asked = f"train {i + 1} ('{pattern}')"
        refuse_statistics(survey, matching(pattern, present.modules, asked=asked), asked)

    def initial(place: Carried) -> Mapping[str, Tensor]:
        spec, weight, dtype = place.entry.spec, place.weight, master_dtype(place.weight.dtype)
        if spec is None:
            role = next(iter(place.entry.names))
            return {role: place.entry.start(weight).to(dtype, copy=True)}
        return place.entry.variant.start(spec, weight, dtype, lambda: _norms(spec, place))

    def tied(place: Carried) -> Hashable:
        return memory_of(place.weight)

    attach(survey, name, found, initial, tied, planned.config.to_dict(), probe=probe)
    return model


def _norms(spec: SiteSpec, place: Carried) -> Tensor:
    """Return the norms of the adapted outputs of W, equal in every bit to the first forward's."""
    weight: Tensor = place.weight
    if is_quantized(weight):
        weight = dense(place.module, weight)
    matrix = weight.detach().reshape(spec.matrix_shape)
    if spec.update == "weight":
        matrix = matrix.to(torch.promote_types(weight.dtype, torch.float32))
    norms = norms_of(matrix, spec.transposed)
    return torch.cat([norms[start:stop] for start, stop in spec.spans])
