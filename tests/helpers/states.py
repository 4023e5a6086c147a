"""Adapters as values, made by public means, and the dense updates that they must mean.

A `Site` is a row: a layer under a name and the rule that adapts it. `state_of` puts such layers
into a model, injects, fills A and B with noise, and takes the adapter's value. `effect` forms its
update in float64 from A, B and the scale, and from what the row says of the layer.
"""

import copy
import json
import re
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeVar

import torch
from contract.kinds import conv1d
from helpers.modules import tree
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import lora_inject as li

M = TypeVar("M", bound=nn.Module)


@dataclass(frozen=True)
class Site:
    """A layer to adapt, by which rule, and how its update lies in its weight."""

    name: str
    layer: Callable[[], nn.Module | nn.Parameter]
    n_out: int
    rule: Mapping[str, Any] = field(default_factory=dict)  # besides the match
    spans: tuple[tuple[int, int], ...] = ()  # of each adapted slice along the output

    def at(self, name: str) -> "Site":
        return replace(self, name=name)

    def by(self, **rule: Any) -> "Site":
        """The same layer, adapted by other numbers."""
        return replace(self, rule={**self.rule, **rule})


def linear(name: str, n_in: int = 5, n_out: int = 7, **rule: Any) -> Site:
    return Site(name, lambda: nn.Linear(n_in, n_out, bias=False), n_out, rule)


def parameter(name: str, *shape: int, layout: str = "out_in", **rule: Any) -> Site:
    n_out = shape[-2 if layout == "out_in" else -1]
    made = lambda: nn.Parameter(torch.randn(shape))  # noqa: E731
    return Site(name, made, n_out, {"layout": layout, **rule})


UNEQUAL = {"slices": {"q": 4, "k": 1, "v": 3}, "adapt": ["q", "v"]}
EQUAL = {"slices": ["q", "k", "v"], "adapt": ["q", "v"]}
SITES: dict[str, Site] = {
    "linear": linear("h.0.fc"),
    "conv1d": Site("h.0.c", lambda: conv1d(6, 5), 6, {"rank": 3, "alpha": 1.5}),
    "embedding": Site("wte", lambda: nn.Embedding(11, 4), 4, {"alpha": 8.0}),
    "conv": Site("stem", lambda: nn.Conv2d(2, 4, 3), 4, {"alpha": 2.0}),
    "slices": Site(
        "h.0.qkv", lambda: nn.Linear(5, 8), 8, {"alpha": 6.0, **UNEQUAL}, ((0, 4), (5, 8))
    ),
    "slices of conv1d": Site(
        "h.0.c_attn", lambda: conv1d(6, 4), 6, {"alpha": 32.0, **EQUAL}, ((0, 2), (4, 6))
    ),
    "parameter": parameter("mix.table", 7, 5),
    "turned parameter": parameter("mix.table", 5, 7, layout="in_out"),
    "experts": parameter("moe.up", 3, 7, 5),
    "turned experts": parameter("moe.up", 3, 5, 7, layout="in_out"),
}


def state_of(*sites: Site, seed: int = 0, size: float = 1.0, **others: Any) -> li.AdapterState:
    """An adapter of such layers with random A and B, without the base's marks; rank 2, alpha 4."""
    held = {}
    if sites:
        rules = [
            {"match": f"^{re.escape(site.name)}", "rank": 2, "alpha": 4.0, **site.rule}
            for site in sites
        ]
        model = li.inject(tree({site.name: site.layer() for site in sites}), {"targets": rules})
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for tensor in li.adapter_parameters(model).values():
                tensor.copy_(size * torch.randn(tensor.shape, generator=generator))
        held = li.adapter_state(model).sites
    return li.AdapterState(held, **others)


def with_biases_of_b(
    state: li.AdapterState, names: Collection[str] | None = None, seed: int = 0
) -> li.AdapterState:
    """The adapter with a random bias of B at some sites, or all, as files of PEFT may hold it."""
    generator, sites = torch.Generator().manual_seed(seed), dict(state.sites)
    for name in sites if names is None else names:
        spec = replace(sites[name].spec, lora_bias=True)
        b = torch.randn(spec.shapes["b"], generator=generator).to(sites[name].B)
        sites[name] = replace(sites[name], spec=spec, further={**sites[name].further, "b": b})
    return replace(state, sites=sites)


def give_biases_of_b(model: M, name: str = "default", names: Collection[str] | None = None) -> M:
    """Put such an adapter in the place of one of a model; it trains, but for these biases."""
    state = with_biases_of_b(copy.deepcopy(li.adapter_state(model, name)), names)
    li.install(li.eject(model, name), state, name)
    return li.train_only(model, name)


def effect(held: li.classes.SiteState, row: Site | None = None) -> Tensor:
    """`scale * (B A - B0 A0)` as `(out, in)` in float64, zero outside the adapted slices."""
    update = _product(held.A.double(), held.B.double(), row)
    if held.A0 is not None and held.B0 is not None:
        update = update - _product(held.A0.double(), held.B0.double(), row)
    return held.scale * update


def _product(A: Tensor, B: Tensor, row: Site | None) -> Tensor:
    rank = B.shape[-1]
    if row is None or (B.shape[-2] == row.n_out and A.shape[-2] == rank):
        return B @ A
    full, start = A.new_zeros(*A.shape[:-2], row.n_out, A.shape[-1]), 0
    for part, (first, last) in enumerate(row.spans):
        rows = B[..., start : start + last - first, :]
        full[..., first:last, :] = rows @ A[..., part * rank : (part + 1) * rank, :]
        start += last - first
    return full


def same_effects(
    back: li.AdapterState, due: li.AdapterState, *rows: Site, within: float = 1e-6
) -> None:
    """Hold that two adapters have the same sites, and the same updates to a share of the largest.

    `rows` are those with slices.
    """
    known = {row.name: row for row in rows}
    assert {*back.sites} == {*due.sites}
    for name, site in due.sites.items():
        wanted = effect(site, known.get(name))
        error = (effect(back.sites[name], known.get(name)) - wanted).abs().max()
        assert error <= within * wanted.abs().max(), name


def metadata(file: Path) -> dict[str, str]:
    """The texts in the header of a safetensors file."""
    with safe_open(file, "pt") as opened:
        return dict(opened.metadata() or {})


def tensors_of(path: Path) -> Path:
    """The file of an adapter that has its tensors."""
    return path if path.is_file() else next(path.glob("*.safetensors"))


def spoil(path: Path, end: str, *values: float) -> Path:
    """Overwrite the first values of the tensor of an adapter's file whose key ends so."""
    file = tensors_of(path)
    said, tensors = metadata(file), load_file(file)
    (key,) = (k for k in tensors if k.endswith(end))
    tensors[key].view(-1)[: len(values)] = torch.tensor(values)
    save_file(tensors, file, said)
    return path


def as_of_peft(folder: Path) -> Path:
    """Take our metadata out of a PEFT folder, which leaves what any PEFT could have written."""
    file = tensors_of(folder)
    save_file(load_file(file), file, {"format": "pt"})
    return folder


def edit_config(folder: Path, **fields: Any) -> Path:
    """Set fields of an adapter's adapter_config.json; those set to `...` are left out."""
    file = folder / "adapter_config.json"
    config = {**json.loads(file.read_text()), **fields}
    file.write_text(json.dumps({key: value for key, value in config.items() if value is not ...}))
    return folder
