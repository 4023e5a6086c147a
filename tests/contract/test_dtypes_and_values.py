"""No wide copies of inputs over a 16-bit base, and NaN or Inf is not merged."""

import copy
import math
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from conftest import fill
from helpers.refusals import refused
from helpers.states import spoil
from torch import nn

import lora_inject as li
from contract.kinds import ALPHA, KINDS, RANK, Host, host

CONFIG = {"rank": RANK, "alpha": ALPHA}


@pytest.mark.parametrize("routed", [False, True])
@pytest.mark.parametrize("compute", ["base", "float32"])
@pytest.mark.parametrize("kind", ["linear", "conv1d", "equal slices"])
def test_mixed_dtypes(kind: str, compute: str, routed: bool) -> None:
    """Over a bf16 base no float32 copy of the input is made, let alone kept for the backward."""
    config = {**KINDS[kind].config, "compute": compute}
    model = fill(li.inject(host(KINDS[kind], torch.bfloat16), config))
    x, saved = torch.randn(64, 7, 5).bfloat16().requires_grad_(), []
    rows = li.routed(model, ["default"] * 32 + [None] * 32) if routed else nullcontext()
    hooks = torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t)
    with rows, hooks:
        model(x)
    assert saved
    assert not [t for t in saved if t.dtype == torch.float32 and t.numel() >= x.numel()]
    copies = {t.data_ptr() for t in saved if t.numel() == x.numel() and t.shape[-1] == 5}
    assert routed or copies <= {x.data_ptr()}, "a copy of x is kept besides x"


NOT_FINITE = [math.nan, -math.inf]
BOTH = {**CONFIG, "targets": ["layer", "before"], "train": ["after"]}


@pytest.mark.parametrize("value", NOT_FINITE)
@pytest.mark.parametrize("key", ["layer.lora_A", "layer.lora_B", "after.bias"])
@pytest.mark.parametrize("undo", [True, False])
def test_non_finite(key: str, value: float, undo: bool) -> None:
    model = fill(li.inject(Host(nn.Linear(5, 6)), BOTH))
    with torch.no_grad():
        li.adapter_parameters(model)[key].view(-1)[1] = value
    with refused(li.StateError, key.rpartition(".")[0], model=model):
        li.merge(model, undo=undo)


LOADED: dict[str, tuple[str, Any]] = {
    "'layer'": ("A/layer", lambda s: s.sites["layer"].A),
    "'after.bias'": ("trained/after.bias", lambda s: s.trained["after.bias"]),
}


@pytest.mark.parametrize("key", LOADED)
def test_non_finite_adapters_are_read_and_neither_put_on_a_model_nor_written(key, tmp_path) -> None:
    model = fill(li.inject(Host(nn.Linear(5, 6)), BOTH))
    diverged, (stored, of) = copy.deepcopy(model), LOADED[key]
    path = li.save_adapter(model, tmp_path / "broken.safetensors", format="native")
    spoil(path, stored, math.nan)
    assert not of(li.read_adapter(path)).isfinite().all()
    state = li.adapter_state(diverged)
    of(state).view(-1)[1] = math.nan
    plain, new = li.eject(copy.deepcopy(model)), tmp_path / "new"
    for call, changed, place in (
        (lambda: li.load_adapter(plain, path), plain, "broken"),
        (lambda: li.install(plain, state), plain, "install"),
        (lambda: li.swap_adapter(model, path), model, "broken"),
        (lambda: li.swap_adapter(model, state), model, "'default'"),
        (lambda: li.save_adapter(diverged, new), diverged, "'default'"),
        (lambda: li.write_adapter(state, new), diverged, "new"),
        (lambda: li.convert(path, new, "portable"), model, "new"),
    ):
        with refused(li.FormatError, key, place, model=changed):
            call()
        assert not new.exists()


@pytest.mark.parametrize(
    ("dtype", "size"), [(torch.float16, 1e3), (torch.bfloat16, 1e25), (torch.float32, 1e25)]
)
@pytest.mark.parametrize("undo", [True, False])
def test_non_finite_products_of_finite_factors(dtype, size: float, undo: bool) -> None:
    model = Host(nn.Linear(5, 6)).to(dtype)
    fill(li.inject(model, {**CONFIG, "targets": ["before", "layer"]}), std=1e-3)
    with torch.no_grad():
        for parameter in li.adapter_parameters(model).values():
            if parameter.shape != (2, 2):
                parameter.mul_(size * 1e3)
    with refused(li.LayerError, "layer.weight", model=model):
        li.merge(model, undo=undo)
