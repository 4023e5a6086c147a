"""Stage `directions`: rank deficiency of adapters of q and v at r = 8 and 64 (section 7).

Two sets of directions are compared by eq. (4): `phi(i, j) = |U1_i^T U2_j|_F^2 / min(i, j)`. It is 1
where the smaller span lies in the larger, 0 where they are orthogonal, and `max(i, j) / d` on
average for random spans in d dimensions: the mean of `|U1^T U2|_F^2` is then `i j / d`, a sum of i
times j squares, each of one coordinate of a random unit vector.

Ranks are compared across different seeds: with the same seed the smaller A would start as a part
of the larger one, and what they share would prove nothing.
"""

from __future__ import annotations

import itertools
from statistics import mean, median
from typing import Any

import torch
from torch import Tensor

import lora_inject as li
from lora_inject import analysis

from . import sentences
from .lab import FAILS, HOLDS, OPEN, PARTLY, Answer, Lab, Result, holds, table

RANKS = (8, 64)
KINDS = {"q": "query", "v": "value"}
TABLE_7 = {  # of GPT-3's layer 48, q, by rank
    "4": (0.32, 21.67, 0.02, 61.95, 6.91, 21.6),
    "64": (1.90, 37.71, 0.33, 61.95, 3.57, 1.9),
}
HEAD = ("", "delta's", "W's own", "random", "norm of W", "norm of delta", "factor")


def directions(lab: Lab) -> tuple[str, list[Answer]]:
    """Subspace similarity between ranks and seeds, and what the delta amplifies."""
    for seed, rank in itertools.product(lab.sizes.seeds, RANKS):
        sentences.run(lab, f"lora-qv-r{rank}", seed)
    seven = lab.run(amplifications)
    rows = [(f"r = {key}", *(f"{x:.2f}" for x in row)) for key, row in seven.items()]
    rows += [(f"GPT-3, r = {rank} (paper)", *map(str, row)) for rank, row in TABLE_7.items()]
    return table(HEAD, rows), [*figures_3_and_4(**lab.run(similarities)), *table_7(seven)]


def blocks(lab: Lab, rank: int, seed: int, kind: str) -> dict[str, Any]:
    """The blocks of a kept adapter on one kind of matrix, by the names of their sites."""
    sites = li.read_adapter(sentences.kept(lab, f"lora-qv-r{rank}", seed)).sites
    chosen = {name: site for name, site in sites.items() if name.endswith(KINDS[kind])}
    return {name: analysis.site_blocks(site)[0] for name, site in chosen.items()}


def right_directions(matrix: Tensor) -> Tensor:
    """The right singular directions `(n, rank)` of `(m, n)`, the strongest first, in float64.

    Directions whose singular value is zero to float64 say nothing and are left out.
    """
    _, S, Vh = torch.linalg.svd(matrix.detach().double(), full_matrices=False)
    noise = S[:1] * max(matrix.shape) * torch.finfo(S.dtype).eps
    return Vh[: int(S.gt(noise).sum())].T


def similarity(first: Tensor, second: Tensor) -> Tensor:
    """`(k1, k2)` of directions `(d, k1)` and `(d, k2)`: `[i - 1, j - 1]` is `phi(i, j)`."""
    overlap = (first.T @ second).square().cumsum(0).cumsum(1)
    i, j = (torch.arange(1, n + 1) for n in overlap.shape)
    return (overlap / torch.minimum(i[:, None], j)).clamp(max=1.0)


def similarities(lab: Lab) -> Result:
    """phi(1, 1) and that of all, each beside chance: means over sites and pairs of seeds."""
    found: Result = {"ranks": [], "seeds": []}
    for kind, small in itertools.product(KINDS, RANKS):
        of = itertools.permutations if small < RANKS[-1] else itertools.combinations
        grids, dim = [], 1
        for first, second in of(lab.sizes.seeds, 2):
            other = blocks(lab, RANKS[-1], second, kind)
            for site, block in blocks(lab, small, first, kind).items():
                one, two = (right_directions(b.A) for b in (block, other[site]))
                grids.append(similarity(one, two))
                dim = len(one)
        last = min(grids[0].shape) - 1
        phi = [(mean(g[i, i].item() for g in grids), (i + 1) / dim) for i in (0, last)]
        found["ranks" if small < RANKS[-1] else "seeds"].append(phi)
    return found


def amplifications(lab: Lab) -> Result:
    """The columns of Table 7 by rank and kind, medians over sites and seeds."""
    weights = dict(lab.encoder()[0].named_parameters(prefix="encoder"))
    found: Result = {}
    for rank, kind in itertools.product(RANKS, KINDS):
        rows = [
            amplification(weights[f"{site}.weight"], block.delta)
            for seed in lab.sizes.seeds
            for site, block in blocks(lab, rank, seed, kind).items()
        ]
        found[f"{rank}, {kind}"] = [median(column) for column in zip(*rows, strict=True)]
    return found


def amplification(W: Tensor, delta: Any) -> tuple[float, ...]:
    """One row of Table 7: what of W lies in directions of the delta, of W, and at random."""
    W = W.detach().double()
    U, S, V = delta.svd()
    random = torch.Generator().manual_seed(0)
    left, right = (
        torch.linalg.qr(torch.randn(n, len(S), generator=random, dtype=torch.float64)).Q
        for n in W.shape
    )
    own = torch.linalg.svdvals(W)[: len(S)]
    norms = (U.T @ W @ V, own, left.T @ W @ right, W, S)
    row = [float(torch.linalg.vector_norm(x)) for x in norms]
    return (*row, row[-1] / row[0])


def figures_3_and_4(ranks: list[Any], seeds: list[Any]) -> list[Answer]:
    """From phi(1, 1) and phi of all of q and v, each beside chance."""
    top = [first for (first, _), _ in ranks]
    above = [first > 5 * chance for (first, chance), _ in seeds]
    every = [phi for _, (phi, _) in seeds]
    chance = seeds[0][1][1]

    def firsts(found: list[Any]) -> str:
        said = ", ".join(f"{row[0][0]:.2f} ({k})" for row, k in zip(found, KINDS, strict=True))
        return f"phi(1, 1) = {said}, chance {found[0][0][1]:.3f}"

    noise = f"phi of all 64 between seeds {every[0]:.2f}, {every[1]:.2f}; chance {chance:.2f}"
    return [
        (firsts(ranks), HOLDS if min(top) > 0.5 else FAILS if max(top) < 0.5 else PARTLY),
        (firsts(seeds), HOLDS if all(above) else OPEN if any(above) else FAILS),
        (noise, holds(max(every) < 2 * chance)),
    ]


def table_7(seven: Result) -> list[Answer]:
    rows = {key.replace(",", ""): row for key, row in seven.items()}
    places = [f"{r[0]:.2f} in {r[2]:.2f}..{r[1]:.2f} ({name})" for name, r in rows.items()]
    over = [r[0] / r[2] for r in rows.values()]  # the delta's directions, beside random ones
    beyond = min(over) < 1 or any(r[0] >= r[1] for r in rows.values())
    factors = [r[-1] for r in rows.values()]
    less, strong = factors[2] < factors[0] and factors[3] < factors[1], min(factors[:2]) > 10
    said = ", ".join(f"{r[-1]:.1f} (r = {name})" for name, r in rows.items())
    return [
        ("; ".join(places), FAILS if beyond else HOLDS if min(over) > 2 else PARTLY),
        (said, HOLDS if less and strong else PARTLY if less or strong else FAILS),
    ]
