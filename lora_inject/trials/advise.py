"""A config to start from, for a number of parameters and a purpose.

It is a uniform rank on all linear layers but the head, and that rank shared by the experts that a
token goes to. At an equal number of parameters neither ranks by gradient energy, nor pruning after
brief training, nor q and v at a higher rank were better beyond noise. A wrong learning rate costs
several times more than these differences: find the right one with a few short runs.
"""

from __future__ import annotations

import re
from bisect import bisect_right
from collections.abc import Iterator
from numbers import Integral
from typing import Any, Literal

from torch import nn

from lora_inject.core.layers.candidates import inventory as inventory_of
from lora_inject.core.layers.survey import Survey
from lora_inject.core.spec.config import ALL_EXPERTS, ALL_LINEAR, Config, Expect
from lora_inject.core.spec.inventory import Inventory
from lora_inject.core.spec.names import counted, nearest
from lora_inject.core.spec.plan import Plan
from lora_inject.core.spec.resolve import resolve
from lora_inject.errors import ConfigError, MatchError, check_type

ALPHA = 32.0
"""Alpha of every advised config, whatever the rank. The best learning rate then hardly depends on
the rank (Schulman and others, LoRA Without Regret, 2025; arXiv:2602.06204). With alpha in
proportion to the rank it falls as the rank grows."""

Purpose = Literal["sft", "rl", "classify"]
MOST: dict[str, int] = {"sft": 256, "rl": 32, "classify": 16}
"""The highest rank that is advised, by what the adapter is trained for. Reinforcement learning
takes in little information: rank 1 may suffice (LoRA Without Regret), and ranks from 128 up have
collapsed in it. Labels of classes are as little."""


def advise(model: nn.Module, budget: int, *, purpose: Purpose = "sft") -> Config:
    """Return a config to start from: the largest uniform rank that fits, experts included.

    All linear layers but the head have the rank, and so have the experts that a token goes to
    together (`rank: {active: ...}`); where not even rank 1 of all experts fits, they are left out.
    The rank is at most the smaller side of the largest layer: a higher one adds nothing. Alpha is
    32 whatever the rank, so the learning rate need not change with it. No batch is needed, and
    the model may be on the meta device.

    Args:
        model: The model.
        budget: Largest number of parameters in A and B.
        purpose: `sft`: ranks of up to 256; `rl`, by rewards: up to 32; `classify`: up to 16.

    Returns:
        The config, with its counts in `expect`.

    Raises:
        ConfigError: The budget is not a whole number, or there is no such purpose.
        MatchError: Not even rank 1 fits, or there are no linear layers.

    Examples:
        >>> net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
        >>> config = advise(net, 70)
        >>> config.rank, config.alpha, config.expect.lora
        (3, 32.0, 66)
    """
    remedy = "Give a whole number of parameters, such as 100_000"
    check_type("advise, budget", budget, Integral, remedy, ConfigError)
    return advised(inventory_of(Survey(model)), budget, purpose)


def advised(inventory: Inventory, budget: int, purpose: str = "sft") -> Config:
    """Return the config of the largest uniform rank that fits a budget, with its counts."""
    if purpose not in MOST:
        near = nearest(purpose, MOST, n=1) if isinstance(purpose, str) else []
        remedy = f"Did you mean {near[0]!r}?" if near else f"Choose {', '.join(MOST)}"
        raise ConfigError("advise, purpose", f"there is no purpose {purpose!r}", remedy)
    sites = _plan(inventory, 1).sites
    most = min(MOST[purpose], max(min(site.in_features, site.out_features) for site in sites))
    for experts in (True, False) if inventory.mixtures else (False,):
        ranks = range(_least(inventory) if experts else 1, most + 1)

        def size(rank: int, experts: bool = experts) -> int:
            return _plan(inventory, rank, experts=experts).n_lora

        if n_fitting := bisect_right(ranks, budget, key=size):
            plan = _plan(inventory, ranks[n_fitting - 1], experts=experts)
            expect = Expect(sites=plan.n_sites, lora=plan.n_lora)
            return plan.config.model_copy(update={"expect": expect})
    raise _nothing_fits(inventory, budget)


def _least(inventory: Inventory) -> int:
    """Return the least rank that leaves every expert one, if it is divided."""
    return max(mixture.top_k or 1 for mixture in inventory.mixtures)


def _plan(inventory: Inventory, rank: int, *, experts: bool = False) -> Plan:
    """Return the plan of one rank on all linear layers, and shared by a token's experts.

    It is not divided where a mixture does not say to how many experts a token goes.
    """
    targets: list[Any] = [ALL_LINEAR]
    if experts and all(mixture.top_k for mixture in inventory.mixtures):
        targets.append({"match": ALL_EXPERTS, "rank": {"active": rank}})
    elif experts:
        targets.append(ALL_EXPERTS)
    return resolve(Config.from_dict({"rank": rank, "alpha": ALPHA, "targets": targets}), inventory)


def _nothing_fits(inventory: Inventory, budget: int) -> MatchError:
    """Return the error where not even rank 1 of the linear layers fits, with what does."""
    one = _plan(inventory, 1)
    sizes: dict[str, int] = {}
    for site in one.sites:
        kind = re.sub(r"\b\d+\b", "*", site.name)
        sizes[kind] = sizes.get(kind, 0) + site.n_parameters
    fits = ", ".join(f"{kind} ({n:,})" for kind, n in sizes.items() if n <= budget)
    asked = f"a config of at most {budget:,} parameters"
    problem = f"rank 1 on all linear layers takes {one.n_lora:,}, and there is no rule for less"
    remedy = f"At rank 1 these fit, one at a time: {fits}" if fits else "Give a larger budget"
    return MatchError(asked, problem, remedy)


def remarks(inventory: Inventory, config: Config) -> Iterator[str]:
    """Yield what is known beside the config: experts that did not fit, learning rate, batch."""
    words = [rule.match for rule in config.targets]
    yield "One rank on all linear layers: at an equal number of parameters hard to beat."
    if inventory.mixtures and ALL_EXPERTS not in words:
        least = _plan(inventory, _least(inventory), experts=True).n_lora
        n = counted(len(inventory.mixtures), "block")
        yield f"The experts of {n} are left out: with them it takes {least:,} at least."
    yield (
        "Rate: ten times that of full fine-tuning, fifteen times in short runs (LoRA Without "
        "Regret, 2025); tune it with a few trials, it matters more than the rank. As alpha stays "
        f"{ALPHA:g}, it hardly depends on the rank."
    )
    width = max((c.out_features for c in inventory.candidates if c.kind == "embedding"), default=0)
    if width:
        low, high = sorted(5e-4 * (2000 / width) ** power for power in (0.781, 0.0775))
        yield (
            f"tinker-cookbook (hyperparam_utils.py): {low:.1e} to {high:.1e} by its formula for a "
            f"width of {width:,} (first versions); 3e-4 to 1e-3 for most of 28 models in its "
            "later sweep, of 128 rows a step."
        )
    yield "Batch: small. Large ones cost LoRA more than full fine-tuning, at any rank."
