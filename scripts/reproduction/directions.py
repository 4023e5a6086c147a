"""Stage `directions`: rank deficiency of the adapters just trained (section 7.2 and 7.3).

The adapters that the stage `quality` kept (q and v, r = 8 and r = 64, every seed) are
read from their files and compared. Ranks are compared across different seeds: with the same seed
the smaller A would start as a part of the larger one, and what they share would prove nothing.
"""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lora_inject import analysis
from lora_inject.analysis.pictures import png, similarity_figure
from lora_inject.formats.exchange import read_adapter

from . import trials
from .document import FAILS, HOLDS, OPEN, PARTLY, Claim, Section, picture, table
from .lab import Lab, Result

SMALL, LARGE = "lora-qv-r8", "lora-qv-r64"
KINDS = {"q": "query", "v": "value"}
TABLE_7 = {
    "4": (0.32, 21.67, 0.02, 61.95, 6.91),
    "64": (1.90, 37.71, 0.33, 61.95, 3.57),
}


def do(lab: Lab) -> None:
    """Train what is missing, compare, draw."""
    for seed in lab.sizes.seeds:
        for name in (SMALL, LARGE):
            trials.one(lab, trials.METHODS[name], seed)
    settings = lab.settings(*trials.SHARED, "n_test", "seeds")
    lab.run("directions/similarity", settings, lambda: similarities(lab))
    lab.run("directions/amplification", settings, lambda: amplifications(lab))


# ----------------------------------------------------------------------------------- subspaces


def blocks(lab: Lab, name: str, seed: int) -> dict[str, Any]:
    """The blocks of a kept adapter by the names of their sites."""
    state = read_adapter(lab.kept(f"{trials.record_name(name, seed)}.safetensors"))
    return {site: analysis.site_blocks(value)[0] for site, value in state.sites.items()}


def pairs_of(lab: Lab, one: str, other: str) -> Iterator[tuple[str, Tensor]]:
    """Grids of phi(i, j) of A, by site, for all pairs of different seeds."""
    for first, second in itertools.permutations(lab.sizes.seeds, 2):
        if one == other and first > second:
            continue
        ours, theirs = blocks(lab, one, first), blocks(lab, other, second)
        for site, block in ours.items():
            yield site, phi_of(block, theirs[site])


def phi_of(one: Any, other: Any) -> Tensor:
    """phi(i, j) of the A of two blocks."""
    return analysis.similarity(analysis.directions(one.A), analysis.directions(other.A))


def similarities(lab: Lab) -> Result:
    """phi at a few places, mean over sites and pairs of seeds; the baseline is chance."""
    found: Result = {}
    for title, one, other in (("ranks", SMALL, LARGE), ("seeds", LARGE, LARGE)):
        grids = list(pairs_of(lab, one, other))
        dim = blocks(lab, one, lab.sizes.seeds[0])[grids[0][0]].A.shape[1]
        for kind, name in KINDS.items():
            mine = [grid for site, grid in grids if site.endswith(name)]
            last = min(mine[0].shape)
            found[f"{title} {kind}"] = {
                "first": statistics.mean(grid[0, 0].item() for grid in mine),
                "first_in_8": statistics.mean(grid[0, 7].item() for grid in mine),
                "all": statistics.mean(grid[last - 1, last - 1].item() for grid in mine),
                "last": last,
                "chance_first": 1 / dim,
                "chance_first_in_8": 8 / dim,
                "chance_all": last / dim,
            }
    return found


def draw(lab: Lab, folder: Path) -> list[Path]:
    """Figures 3 and 4, of the middle layer."""
    first, second = lab.sizes.seeds[:2]
    small, large = blocks(lab, SMALL, first), blocks(lab, LARGE, first)
    other = blocks(lab, LARGE, second)
    sites = {kind: [s for s in small if s.endswith(name)] for kind, name in KINDS.items()}
    middle = {kind: found[len(found) // 2] for kind, found in sites.items()}
    layer = len(sites["q"]) // 2
    ranks = {
        f"{kind}, layer {layer}": phi_of(small[site], other[site]) for kind, site in middle.items()
    }
    seeds = {
        f"{kind}, layer {layer}": phi_of(large[site], other[site]) for kind, site in middle.items()
    }
    rank, dim = large[middle["q"]].A.shape
    random = torch.Generator().manual_seed(0)
    drawn = (
        analysis.directions(torch.randn(rank, dim, generator=random, dtype=torch.float64))
        for _ in range(2)
    )
    zoomed = [each for name, grid in ranks.items()
              for each in ((name, grid), (f"{name}, zoomed", corner(grid)))]  # fmt: skip
    three = similarity_figure(zoomed, ("i (r = 8)", "j (r = 64)"))
    chance = ("random", analysis.similarity(*drawn))
    four = similarity_figure([*seeds.items(), chance], columns=3)
    return [png(three, folder / "figure-3.png"), png(four, folder / "figure-4.png")]


def corner(grid: Tensor) -> Tensor:
    """`(n, n)`, n the smaller side, of a grid: blank where j > i, as the paper zooms."""
    n = min(grid.shape)
    upper = torch.ones(n, n, dtype=torch.bool).triu(1)
    return grid[:n, :n].masked_fill(upper, math.nan)


# ------------------------------------------------------------------------------- amplification


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
                field: statistics.median(row[field] for row in rows) for field in rows[0]
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


# -------------------------------------------------------------------------------------- section


def section(lab: Lab, document: Path) -> Section | None:
    """What came out."""
    similar, strong = lab.record("directions/similarity"), lab.record("directions/amplification")
    if similar is None or strong is None:
        return None
    phi, seven = similar["result"], strong["result"]
    pictures = draw(lab, document.parent / "pictures")
    seeds = ", ".join(map(str, lab.sizes.seeds))
    text = [
        (
            f"The adapters of the first section, q and v at r = 8 and r = 64, seeds {seeds}. "
            "phi(i, j), eq. (4), compares the A of two adapters: how much of the first i "
            "directions of one lies in the first j of the other, from 0 for nothing to 1 for all. "
            "The table has the mean over all sites and all pairs of different seeds, beside that "
            "of random matrices (chance)."
        ),
        table(
            ("", "phi(1, 1)", "chance", "phi(1, 8)", "chance", "phi of all", "chance"),
            [
                (
                    f"{title} (r = {'8, r = 64' if 'ranks' in title else '64, two seeds'})",
                    f"{p['first']:.3f}",
                    f"{p['chance_first']:.3f}",
                    f"{p['first_in_8']:.3f}",
                    f"{p['chance_first_in_8']:.3f}",
                    f"{p['all']:.3f}",
                    f"{p['chance_all']:.3f}",
                )
                for title, p in phi.items()
            ],
        ),
        "*All* is phi(8, 8) between ranks and phi(64, 64) between seeds.",
        picture(pictures[0], document, "Figure 3: r = 8 against r = 64"),
        picture(pictures[1], document, "Figure 4: two seeds at r = 64"),
        (
            "Table 7 asks where in W the delta lies. The first three columns are the Frobenius "
            "norm of W projected onto the top r directions of the delta, of W itself, and of a "
            "random matrix. *Factor* is the norm of the delta over the first of them. All are "
            "medians over sites and seeds:"
        ),
        _table_7(seven),
    ]
    return Section("Rank deficiency (figures 3 and 4, Table 7)", _claims(phi, seven), text)


def _table_7(seven: Result) -> str:
    rows = [
        (
            f"r = {key.replace(' ', ', ')}",
            *(f"{row[f]:.2f}" for f in ("of_delta", "of_weight", "of_random")),
            *(f"{row[f]:.2f}" for f in ("weight_norm", "delta_norm", "factor")),
        )
        for key, row in seven.items()
    ]
    rows += [
        (
            f"GPT-3, layer 48, q, r = {rank} (paper)",
            *(f"{x:.2f}" for x in row),
            f"{row[4] / row[0]:.1f}",
        )
        for rank, row in TABLE_7.items()
    ]
    head = ("", "delta's", "W's own", "random", "norm of W", "norm of delta", "factor")
    return table(head, rows)


def _claims(phi: Result, seven: Result) -> list[Claim]:
    """Figures 3 and 4 and Table 7."""
    ranks, seeds = ([phi[f"{t} {k}"] for k in KINDS] for t in ("ranks", "seeds"))
    top = [p["first"] for p in ranks]
    above = [p["first"] > 5 * p["chance_first"] for p in seeds]
    rest = [(p["all"], p["chance_all"]) for p in seeds]
    factors = {key: row["factor"] for key, row in seven.items()}
    return [
        Claim(
            "The top direction of r = 8 and of r = 64 is the same to more than 0.5 (Fig. 3)",
            "phi(1, 1) > 0.5 for q and v",
            "phi(1, 1) = "
            + ", ".join(f"{x:.2f} ({k})" for x, k in zip(top, KINDS, strict=True))
            + f", chance {ranks[0]['chance_first']:.3f}",
            HOLDS if min(top) > 0.5 else FAILS if max(top) < 0.5 else PARTLY,
        ),
        Claim(
            "Two seeds share their top directions, and random matrices none (Fig. 4)",
            "clear for v, fewer for q",
            "phi(1, 1) = "
            + ", ".join(f"{p['first']:.2f} ({k})" for p, k in zip(seeds, KINDS, strict=True))
            + f", chance {seeds[0]['chance_first']:.3f}",
            HOLDS if all(above) else OPEN if any(above) else FAILS,
        ),
        Claim(
            "The other directions are mostly noise (Fig. 3, 4)",
            "phi falls to what is random",
            "phi of all 64 between seeds "
            + ", ".join(f"{a:.2f}" for a, _ in rest)
            + f"; chance {rest[0][1]:.2f}",
            HOLDS if all(a < 2 * c for a, c in rest) else FAILS,
        ),
        Claim(
            "The delta lies in directions that W has, but not in its strongest (Table 7)",
            "0.32, between 0.02 (random) and 21.67 (W's own), r = 4",
            "; ".join(
                f"{r['of_delta']:.2f}, between {r['of_random']:.2f} and {r['of_weight']:.2f} "
                f"(r = {k})"
                for k, r in seven.items()
            ),
            _between(seven),
        ),
        Claim(
            "The delta amplifies these directions by about 20 at a small rank, "
            "and by less at r = 64 (Table 7)",
            "21.5 at r = 4, 1.9 at r = 64",
            ", ".join(f"{x:.1f} (r = {key})" for key, x in factors.items()),
            _amplified(factors),
        ),
    ]


def _between(seven: Result) -> str:
    """Whether the delta's share of W is clearly above chance and below W's own."""
    over = [row["of_delta"] / row["of_random"] for row in seven.values()]
    if any(row["of_delta"] >= row["of_weight"] for row in seven.values()) or min(over) < 1:
        return FAILS
    return HOLDS if min(over) > 2 else PARTLY


def _amplified(factors: dict[str, float]) -> str:
    less = all(factors[f"64 {kind}"] < factors[f"8 {kind}"] for kind in KINDS)
    large = all(factors[f"8 {kind}"] > 10 for kind in KINDS)
    return HOLDS if less and large else PARTLY if less or large else FAILS
