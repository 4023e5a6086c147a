"""What `inject` would do to a live model, without doing it."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from torch import nn

from lora_inject.core.layers.candidates import inventory
from lora_inject.core.layers.library import loaded_libraries
from lora_inject.core.layers.survey import Survey
from lora_inject.core.model.stages import plan_of_part
from lora_inject.core.spec.config import ConfigLike
from lora_inject.core.spec.plan import Plan
from lora_inject.core.spec.resolve import resolve
from lora_inject.formats.from_peft import config_of
from lora_inject.formats.live_models import notes_on_files


def plan(model: nn.Module, config: ConfigLike, *, group: Any = None) -> Plan:
    r"""Say what `inject` would do, and change nothing.

    Args:
        model: Any module, also on the meta device.
        config: A `Config`, a dict, the path of a YAML file, or a `LoraConfig`.
        group: Processes of which each has other layers of the model; see `inject`. Each gets the
            plan of its part, and what the whole model lacks is an error in all.

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
    survey = Survey(model)
    if group is not None:
        planned = plan_of_part(group, survey, config)
    else:
        present = inventory(survey)
        planned = resolve(config_of(config, present, model), present)
    notes = [
        f"inject would refuse this: {problem}. {remedy}"
        for library in loaded_libraries()
        for problem, remedy in library.against(survey, planned, leave_new=False)
    ]
    notes += notes_on_files(survey, planned.sites)
    return replace(planned, notes=(*planned.notes, *notes))
