"""The counts that a config expects of its plan."""

from __future__ import annotations

from lora_inject.core.spec.config import Expect
from lora_inject.core.spec.names import counted
from lora_inject.core.spec.plan import Plan
from lora_inject.errors import MatchError


def check_expect(plan: Plan, expect: Expect) -> None:
    """Raise if a plan has other counts than are expected; say how many sites each rule has."""
    counts = {"sites": plan.n_sites, "lora": plan.n_lora, "trainable": plan.n_trainable}
    wanted = {k: n for k, n in expect.model_dump(exclude_none=True).items() if n != counts[k]}
    if not wanted:
        return
    asked = ", ".join(f"{key}: {n:,}" for key, n in wanted.items())
    got = ", ".join(f"{key}: {counts[key]:,}" for key in wanted)
    rules = [
        f"{plan.config.label(i)} {counted(n, 'site')}" for i, n in enumerate(plan.n_sites_by_rule)
    ]
    extra = [f"train and bias {plan.n_trained:,} elements"] if plan.trained else []
    problem = f"found {got} ({'; '.join(rules + extra)})"
    raise MatchError(f"expect {{{asked}}}", problem, "Correct the rules, or the counts")
