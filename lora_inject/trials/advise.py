"""A config to start from, for a number of parameters.

It is a uniform rank on all linear layers but the head. At an equal number of parameters neither
ranks by gradient energy, nor pruning after brief training, nor q and v at a higher rank were better
beyond noise. A wrong learning rate costs several times more than these differences: find the right
one with a few short runs.
"""

from __future__ import annotations

import re
from numbers import Integral

from torch import nn

from lora_inject.core.layers.candidates import inventory as inventory_of
from lora_inject.core.layers.survey import Survey
from lora_inject.core.spec.config import ALL_LINEAR, Config
from lora_inject.core.spec.inventory import Inventory
from lora_inject.core.spec.matching import resolve
from lora_inject.errors import ConfigError, MatchError, check_type

ALPHA_OVER_RANK = 2.0
"""The defaults' ratio (alpha 16, rank 8). With it the best learning rate hardly depends on the
rank, so it can be found at a small rank."""


def advise(model: nn.Module, budget: int) -> Config:
    """Return a config to start from: the largest uniform rank on all linear layers that fits.

    The rank is at most the smaller side of the largest layer: a higher one adds nothing.
    No batch is needed, and the model may be on the meta device. At an equal number of parameters
    this config is hard to beat; the learning rate matters more.

    Args:
        model: The model.
        budget: Largest number of parameters in A and B.

    Returns:
        The config, with its counts in `expect`.

    Raises:
        ConfigError: The budget is not a whole number.
        MatchError: Not even rank 1 fits, or there are no linear layers.

    Examples:
        >>> net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
        >>> config = advise(net, 70)
        >>> config.rank, config.alpha, config.expect.lora
        (3, 6.0, 66)
    """
    remedy = "Give a whole number of parameters, such as 100_000"
    check_type("advise, budget", budget, Integral, remedy, ConfigError)
    return advised(inventory_of(Survey(model)), budget)


def advised(inventory: Inventory, budget: int) -> Config:
    """Return the config of the largest uniform rank on all linear layers that fits a budget.

    `budget` is the largest number of parameters in A and B; the counts are in `expect`.
    """
    config = Config.from_dict({"rank": 1, "alpha": ALPHA_OVER_RANK, "targets": [ALL_LINEAR]})
    one = resolve(config, inventory)
    useful = max(min(site.in_features, site.out_features) for site in one.sites)
    rank = min(budget // one.n_lora, useful)
    if rank < 1:
        sizes: dict[str, int] = {}
        for site in one.sites:
            kind = re.sub(r"\b\d+\b", "*", site.name)
            sizes[kind] = sizes.get(kind, 0) + site.n_parameters
        fits = ", ".join(f"{kind} ({n:,})" for kind, n in sizes.items() if n <= budget)
        asked = f"a config of at most {budget:,} parameters"
        problem = f"rank 1 on all linear layers takes {one.n_lora:,}, and there is no rule for less"
        remedy = f"At rank 1 these fit, one at a time: {fits}" if fits else "Give a larger budget"
        raise MatchError(asked, problem, remedy)
    expect = {"sites": one.n_sites, "lora": rank * one.n_lora}
    wanted = {"rank": rank, "alpha": ALPHA_OVER_RANK * rank, "targets": [ALL_LINEAR]}
    return Config.from_dict(wanted | {"expect": expect})
