"""What the tests of formats share: states of every kind, and the dense delta they must mean.

The reference is written from `SiteSpec.blocks` in float64, independently of every format.
"""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from lora_inject.core.adapter.fingerprint import Sampled
from lora_inject.core.adapter.site_state import SiteState
from lora_inject.core.adapter.state import AdapterState
from lora_inject.core.spec.sites import SiteSpec
from lora_inject.core.spec.slices import Slices


def _spec(name: str, kind: str, n_in: int, n_out: int, shape: Any, **others: Any) -> SiteSpec:
    weight = name if kind == "parameter" else f"{name}.weight"
    return SiteSpec(
        name, kind, n_in, n_out, shape, weight=weight, **{"rank": 2, "alpha": 4.0} | others
    )


TURNED = {"transposed": True}
UNEQUAL, EQUAL = (
    Slices(tuple(zip("qkv", n, strict=True)), ("q", "v")) for n in ((4, 1, 3), (2, 2, 2))
)
KIND_SPECS: dict[str, SiteSpec] = {
    "linear": _spec("h.0.fc", "linear", 5, 7, (7, 5)),
    "conv1d": _spec("h.0.c", "conv1d", 5, 6, (5, 6), rank=3, alpha=1.5, **TURNED),
    "embedding": _spec("wte", "embedding", 11, 4, (11, 4), alpha=8.0, **TURNED),
    "conv": _spec("stem", "conv", 18, 4, (4, 2, 3, 3), alpha=2.0),
    "slices": _spec("h.0.qkv", "linear", 5, 8, (8, 5), alpha=6.0, slices=UNEQUAL),
    "slices of conv1d": _spec(
        "h.0.c_attn", "conv1d", 4, 6, (4, 6), alpha=32.0, slices=EQUAL, **TURNED
    ),
    "parameter": _spec("mix.table", "parameter", 5, 7, (7, 5)),
    "turned parameter": _spec("mix.table", "parameter", 5, 7, (5, 7), **TURNED),
    "experts": _spec("moe.up", "parameter", 5, 7, (3, 7, 5), experts=3),
    "turned experts": _spec("moe.up", "parameter", 5, 7, (3, 5, 7), experts=3, **TURNED),
}


def make_site(
    spec: SiteSpec, *, seed: int = 0, derived: bool = False, dtype: torch.dtype = torch.float32
) -> SiteState:
    generator = torch.Generator().manual_seed(seed)
    spec = replace(spec, init="pissa") if derived else spec
    shapes = [spec.a_shape, spec.b_shape] * (2 if derived else 1)
    tensors = [torch.randn(shape, generator=generator).to(dtype) for shape in shapes]
    return SiteState(spec, *tensors)


def make_state(*specs: SiteSpec, derived: bool = False, **others: object) -> AdapterState:
    sites = {spec.name: make_site(spec, seed=n, derived=derived) for n, spec in enumerate(specs)}
    return AdapterState(sites, **others)  # type: ignore[arg-type]


def dense(site: SiteState) -> Tensor:
    """`scale * (B A - B0 A0)` in the weight's own shape, float64, block by block."""
    spec = site.spec
    total = torch.zeros(spec.matrix_shape, dtype=torch.float64)
    pairs = [(site.A, site.B, 1.0)]
    if site.A0 is not None and site.B0 is not None:
        pairs.append((site.A0, site.B0, -1.0))
    for a, b, sign in pairs:
        a2, b2 = a.double().reshape(-1, spec.in_features), b.double().reshape(-1, spec.rank)
        for block in spec.blocks:
            update = b2[slice(*block.b)] @ a2[slice(*block.a)]
            update = update.T if spec.transposed else update
            total[slice(*block.rows), slice(*block.cols)] += sign * spec.scale * update
    return total.reshape(spec.weight_shape)


def assert_same_state(actual: AdapterState, due: AdapterState) -> None:
    """Equal in every bit and number."""
    assert [*actual.sites, *actual.trained] == [*due.sites, *due.trained]
    exact = {"rtol": 0, "atol": 0, "equal_nan": True}
    for name, site in due.sites.items():
        assert actual.sites[name].spec == site.spec
        torch.testing.assert_close(actual.sites[name].tensors, site.tensors, **exact)
    torch.testing.assert_close(actual.trained, due.trained, **exact)
    assert actual.config == due.config
    assert actual.fingerprint == due.fingerprint
    assert not actual.base_copies


FINGERPRINT = {
    "h.0.fc.weight": Sampled((7, 5), (0.5, -3.140625, 2.0**-100, *13 * (1.0,))),
    "q": Sampled((4, 4), packed="packed"),
}


def effect(site: SiteState) -> Tensor:
    """The dense delta as `(out, in)`, whichever way round the weight is held; float64."""
    delta = dense(site)
    delta = delta.mT if site.spec.transposed else delta
    lead = () if site.spec.experts is None else (site.spec.experts,)
    return delta.reshape(*lead, site.spec.out_features, -1)


def spoil(path: Path, end: str, *values: float) -> Path:
    """Overwrite the first values of the tensor of an adapter's file whose key ends so."""
    file = path if path.is_file() else next(path.glob("*.safetensors"))
    with safe_open(file, "pt") as opened:
        metadata = opened.metadata()
    tensors = load_file(file)
    (key,) = (k for k in tensors if k.endswith(end))
    tensors[key].view(-1)[: len(values)] = torch.tensor(values)
    save_file(tensors, file, metadata)
    return path


def edit_config(folder: Path, **fields: Any) -> Path:
    """Set fields of an adapter's adapter_config.json; those set to `...` are left out."""
    file = folder / "adapter_config.json"
    config = {**json.loads(file.read_text()), **fields}
    file.write_text(json.dumps({key: value for key, value in config.items() if value is not ...}))
    return folder
