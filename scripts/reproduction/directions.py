"""Stage `directions`: rank deficiency of adapters of q and v at r = 8 and 64 (section 7).

Ranks are compared across different seeds: with the same seed the smaller A would start as a part
of the larger one, and what they share would prove nothing.
"""

from __future__ import annotations

import itertools
import statistics
from typing import Any

import torch
from torch import Tensor

import lora_inject as li
from lora_inject import analysis

from . import sentences
from .lab import FAILS, HOLDS, OPEN, PARTLY, Claim, Lab, Result, table
from .sentences import SHARED, kept_name

SMALL, LARGE = "lora-qv-r8", "lora-qv-r64"
KINDS = {"q": "query", "v": "value"}
TABLE_7 = {  # of GPT-3's layer 48, q, by rank
    "4": (0.32, 21.67, 0.02, 61.95, 6.91, 21.6),
    "64": (1.90, 37.71, 0.33, 61.95, 3.57, 1.9),
}
FIELDS = ("of_delta", "of_weight", "of_random", "weight_norm", "delta_norm", "factor")


def directions(lab: Lab) -> tuple[list[str], list[Claim]]:
    """Subspace similarity between ranks and seeds, and what the delta amplifies."""
    for seed, name in itertools.product(lab.sizes.seeds, (SMALL, LARGE)):
        sentences.run(lab, name, seed)
    settings = lab.settings(*SHARED, "n_test", "seeds")
    phi = lab.run("directions/similarity", settings, lambda: similarities(lab))
    seven = lab.run("directions/amplification", settings, lambda: amplifications(lab))
    rows = [
        (f"r = {key.replace(' ', ', ')}", *(f"{row[f]:.2f}" for f in FIELDS))
        for key, row in seven.items()
    ]
    rows += [(f"GPT-3, r = {rank} (paper)", *map(str, row)) for rank, row in TABLE_7.items()]
    seventh = ("", "delta's", "W's own", "random", "norm of W", "norm of delta", "factor")
    return [table(seventh, rows)], claims_of(phi, seven)


def blocks(lab: Lab, name: str, seed: int) -> dict[str, Any]:
    """The blocks of a kept adapter by the names of their sites."""
    state = li.read_adapter(lab.kept(kept_name(name, seed)))
    return {site: analysis.site_blocks(value)[0] for site, value in state.sites.items()}


def similarities(lab: Lab) -> Result:
    """phi(1, 1) and that of all, means over sites and pairs of seeds; the baseline is chance."""
    found: Result = {}
    for title, one, other in (("ranks", SMALL, LARGE), ("seeds", LARGE, LARGE)):
        for kind, name in KINDS.items():
            grids, dim = [], 0
            for first, second in itertools.permutations(lab.sizes.seeds, 2):
                if one == other and first > second:
                    continue
                ours, theirs = blocks(lab, one, first), blocks(lab, other, second)
                for site in filter(lambda site: site.endswith(name), ours):
                    dim = ours[site].A.shape[1]
                    grids.append(
                        analysis.similarity(
                            analysis.directions(ours[site].A), analysis.directions(theirs[site].A)
                        )
                    )
            last = min(grids[0].shape) - 1
            places = {"first": (0, 0), "all": (last, last)}
            found[f"{title} {kind}"] = {
                key: statistics.mean(grid[place].item() for grid in grids)
                for key, place in places.items()
            } | {f"chance_{key}": (place[1] + 1) / dim for key, place in places.items()}
    return found


def amplifications(lab: Lab) -> Result:
    """The columns of Table 7 by rank and kind, medians over sites and seeds."""
    encoder, _ = lab.encoder()
    weights = {f"encoder.{name}": p for name, p in encoder.named_parameters()}
    found: Result = {}
    for rank, name in (("8", SMALL), ("64", LARGE)):
        for kind, end in KINDS.items():
            rows = [
                amplification(weights[f"{site}.weight"], block.delta)
                for seed in lab.sizes.seeds
                for site, block in blocks(lab, name, seed).items()
                if site.endswith(end)
            ]
            found[f"{rank} {kind}"] = {
                field: statistics.median(row[field] for row in rows) for field in FIELDS
            }
    return found


def amplification(W: Tensor, delta: Any) -> dict[str, float]:
    """One row of Table 7: what of W lies in directions of the delta, of W, and at random."""
    W = W.detach().double()
    U, S, V = delta.svd()
    random = torch.Generator().manual_seed(0)
    left, right = (
        torch.linalg.qr(torch.randn(n, len(S), generator=random, dtype=torch.float64)).Q
        for n in W.shape
    )
    norms = {
        "of_delta": float(torch.linalg.matrix_norm(U.T @ W @ V)),
        "of_weight": float(torch.linalg.vector_norm(torch.linalg.svdvals(W)[: len(S)])),
        "of_random": float(torch.linalg.matrix_norm(left.T @ W @ right)),
        "weight_norm": float(torch.linalg.matrix_norm(W)),
        "delta_norm": float(torch.linalg.vector_norm(S)),
    }
    return norms | {"factor": norms["delta_norm"] / norms["of_delta"]}


def claims_of(phi: Result, seven: Result) -> list[Claim]:
    """Figures 3 and 4, and Table 7."""
    ranks, seeds = ([phi[f"{t} {k}"] for k in KINDS] for t in ("ranks", "seeds"))
    top = [p["first"] for p in ranks]
    above = [p["first"] > 5 * p["chance_first"] for p in seeds]
    factors = {key: row["factor"] for key, row in seven.items()}
    over = [row["of_delta"] / row["of_random"] for row in seven.values()]
    beyond = any(row["of_delta"] >= row["of_weight"] for row in seven.values()) or min(over) < 1
    less = all(factors[f"64 {kind}"] < factors[f"8 {kind}"] for kind in KINDS)
    large = all(factors[f"8 {kind}"] > 10 for kind in KINDS)

    def firsts(grids: list[Result]) -> str:
        found = ", ".join(f"{p['first']:.2f} ({k})" for p, k in zip(grids, KINDS, strict=True))
        return f"phi(1, 1) = {found}, chance {grids[0]['chance_first']:.3f}"

    return [
        (
            "The top direction of r = 8 and of r = 64 is the same to more than 0.5 (Fig. 3)",
            "phi(1, 1) > 0.5 for q and v", firsts(ranks),
            HOLDS if min(top) > 0.5 else FAILS if max(top) < 0.5 else PARTLY,
        ),
        (
            "Two seeds share their top directions, and random matrices none (Fig. 4)",
            "clear for v, fewer for q", firsts(seeds),
            HOLDS if all(above) else OPEN if any(above) else FAILS,
        ),
        (
            "The other directions are mostly noise (Fig. 3, 4)", "phi falls to what is random",
            "phi of all 64 between seeds " + ", ".join(f"{p['all']:.2f}" for p in seeds)
            + f"; chance {seeds[0]['chance_all']:.2f}",
            HOLDS if all(p["all"] < 2 * p["chance_all"] for p in seeds) else FAILS,
        ),
        (
            "The delta lies in directions that W has, but not in its strongest (Table 7)",
            "0.32, between 0.02 (random) and 21.67 (W's own), r = 4",
            "; ".join(
                f"{row['of_delta']:.2f} in {row['of_random']:.2f}..{row['of_weight']:.2f} ({key})"
                for key, row in seven.items()
            ),
            FAILS if beyond else HOLDS if min(over) > 2 else PARTLY,
        ),
        (
            (
                "The delta amplifies these directions by about 20 at a small rank, and by less at "
                "r = 64 (Table 7)"
            ),
            "21.5 at r = 4, 1.9 at r = 64",
            ", ".join(f"{x:.1f} (r = {key})" for key, x in factors.items()),
            HOLDS if less and large else PARTLY if less or large else FAILS,
        ),
    ]  # fmt: skip
