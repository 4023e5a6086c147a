"""Stage `together`: LoRA with prefix tuning, and LoRA of full rank (appendix E, section 4.1).

Two facts about what LoRA is. It is orthogonal to other methods: PEFT's prefix and this package's
adapters train on one model, and nothing needs to know of the other. And it is a way into full
fine-tuning: with full rank and all biases it reaches any change of the layers that it is put on.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import lora_inject

from . import trials
from .document import FAILS, HOLDS, Claim, Section, table, verdict_above
from .lab import Lab, Result
from .methods import TARGETS

CHANGE = 0.5  # size of the arbitrary update, as a share of the weight's own size
REACHED = 1e-9  # relative distance of outputs in float64 that counts as equal
COMBINED = ("prefix", "lora-qv-r8", "lora-qv-r8-prefix")


def do(lab: Lab) -> None:
    """The dense update, then the runs on sentences."""
    lab.run("together/full-rank", {"change": CHANGE}, lambda: full_rank(lab))
    trials.do(lab, COMBINED)


def full_rank(lab: Lab) -> Result:
    """Distance of outputs from a model whose every matrix and bias was changed at random.

    Returns:
        base: without adapters; full: rank = full, `bias: all`, factors by SVD; half: half the rank.
    """
    model, _ = lab.encoder()
    model = model.double()
    target = changed(model)
    ids = torch.randint(2, 300, (2, 9), generator=torch.Generator().manual_seed(1))
    wanted = target(ids).last_hidden_state.detach()
    whole = model.config.hidden_size
    found = {"base": distance(model(ids).last_hidden_state, wanted), "rank": whole}
    for name, rank in (("full", whole), ("half", whole // 2)):
        model_of_rank = copy.deepcopy(model)
        reach(model_of_rank, target, rank)
        with torch.inference_mode():
            found[name] = distance(model_of_rank(ids).last_hidden_state, wanted)
    return found


def changed(model: Any) -> Any:
    """A copy with every adapted matrix and every bias moved, at random and by much."""
    torch.manual_seed(0)
    target = copy.deepcopy(model)
    matrices = {site.weight for site in _sites(model, 1)}
    with torch.no_grad():
        for name, parameter in target.named_parameters():
            if name in matrices or name.endswith("bias"):
                size = CHANGE * parameter.std() if name in matrices else 0.1
                parameter.add_(size * torch.randn_like(parameter))
    return target


def reach(model: Any, target: Any, rank: int) -> None:
    """Inject, and set factors and biases to the nearest that the rank allows."""
    lora_inject.inject(model, _config(rank))
    values = dict(target.named_parameters())
    with torch.no_grad():
        sites = lora_inject.adapter_state(model).sites
        parameters = lora_inject.adapter_parameters(model)
        base = {name: p for name, p in model.named_parameters() if name in values}
        for name, site in sites.items():
            D = values[f"{name}.weight"] - base[f"{name}.weight"]
            U, S, Vh = torch.linalg.svd(D, full_matrices=False)
            parameters[f"{name}.lora_A"].copy_(S[:rank, None] * Vh[:rank] / site.scale)
            parameters[f"{name}.lora_B"].copy_(U[:, :rank])
        for name, copied in parameters.items():
            if name in values:
                copied.copy_(values[name])


def _config(rank: int) -> dict[str, Any]:
    return {"rank": rank, "alpha": rank, "targets": TARGETS["all"], "bias": "all"}


def _sites(model: nn.Module, rank: int) -> list[Any]:
    return list(lora_inject.plan(model, _config(rank)).sites)


def distance(found: Tensor, wanted: Tensor) -> float:
    """Relative distance in the Frobenius norm."""
    return (torch.linalg.norm(found - wanted) / torch.linalg.norm(wanted)).item()


def section(lab: Lab, document: Path) -> Section | None:  # noqa: ARG001 - it has no picture
    """What came out."""
    record = lab.record("together/full-rank")
    if record is None:
        return None
    result = record["result"]
    claims = [
        Claim(
            "With the rank of the matrices and all biases, LoRA reaches what full fine-tuning can",
            "section 4.1, in words",
            f"outputs {result['full']:.0e} off those of an arbitrary dense update "
            f"(the base {result['base']:.2f}, half the rank {result['half']:.2f})",
            HOLDS if result["full"] < REACHED else FAILS,
        )
    ]
    text = [
        (
            "Can LoRA express any update? Every attention and MLP matrix of the encoder, and every "
            f"bias, is changed at random by {CHANGE:.0%} of its size. An adapter of the plain "
            f"encoder, of rank {result['rank']} on all of them and with `bias: all`, gets the SVD "
            "of these changes as its A and B. Its outputs are those of the changed encoder to "
            f"{result['full']:.0e} (relative, float64). Without the adapter they differ by "
            f"{result['base']:.2f}, at half the rank by {result['half']:.2f}."
        )
    ]
    found = {name: scores for name in COMBINED if (scores := trials.scores(lab, name))}
    if len(found) == len(COMBINED):
        both = found[COMBINED[2]]
        gaps = [trials.gap(both, found[name]) for name in COMBINED[:2]]
        rows = [
            (
                s.method.title,
                f"{s.middle('parameters'):,.0f}",
                f"{100 * s.mean:.1f}",
                len(s.results),
            )
            for s in found.values()
        ]
        text += [
            (
                "The prefix is PEFT's. LoRA is injected into the model that PEFT has wrapped. The "
                "config of LoRA names the prefix under `train`, so the prefix trains and is saved "
                "with the adapter."
            ),
            table(("method", "trainable besides the head", "accuracy, %", "seeds"), rows),
        ]
        assert gaps[0] is not None
        assert gaps[1] is not None
        claims += [
            Claim(
                "LoRA and prefix tuning work on one model, and are better than the prefix alone",
                "appendix E: both together are best on WikiSQL",
                f"{gaps[0]} points over the prefix alone",
                verdict_above(gaps[0].difference, gaps[0].error),
            ),
            Claim(
                "LoRA and prefix tuning together are better than LoRA alone",
                "on WikiSQL, not on MNLI",
                f"{gaps[1]} points over LoRA alone",
                verdict_above(gaps[1].difference, gaps[1].error),
            ),
        ]
    return Section("LoRA and others; LoRA of full rank (appendix E, section 4.1)", claims, text)
