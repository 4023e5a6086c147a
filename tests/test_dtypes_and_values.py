"""No wide copies of inputs over a 16-bit base, and NaN or Inf is not merged."""

import copy
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import ALPHA, KINDS, RANK, Host, fill, host, snapshot
from helpers.adapter_states import spoil
from torch import Tensor, nn

import lora_inject as li
from lora_inject.core.adapter import fingerprint

CONFIG = {"rank": RANK, "alpha": ALPHA}


def saved_tensors(run: Callable[[], Any]) -> list[Tensor]:
    saved: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        run()
    return saved


@pytest.mark.parametrize("routed", [False, True])
@pytest.mark.parametrize("compute", ["base", "float32"])
@pytest.mark.parametrize("kind", ["linear", "conv1d", "equal slices"])
def test_mixed_dtypes(kind: str, compute: str, routed: bool) -> None:
    """Over a bf16 base no float32 copy of the input is made, let alone kept for the backward."""
    model = li.inject(host(KINDS[kind], torch.bfloat16), {**KINDS[kind].config, "compute": compute})
    fill(model)
    x = torch.randn(64, 7, 5).bfloat16().requires_grad_()
    if routed:
        with li.routed(model, ["default"] * 32 + [None] * 32):
            saved = saved_tensors(lambda: model(x))
    else:
        saved = saved_tensors(lambda: model(x))
    assert saved
    wide = [t for t in saved if t.dtype == torch.float32 and t.numel() >= x.numel()]
    assert wide == []
    copies = {t.data_ptr() for t in saved if t.numel() == x.numel() and t.shape[-1] == 5}
    if not routed:
        assert copies <= {x.data_ptr()}, "a copy of x is kept besides x"


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("key", ["layer.lora_A", "layer.lora_B", "after.bias"])
def test_non_finite(key: str, value: float) -> None:
    model = Host(nn.Linear(5, 6))
    fill(li.inject(model, {**CONFIG, "targets": ["layer", "before"], "train": ["after"]}))
    with torch.no_grad():
        li.adapter_parameters(model)[key].view(-1)[1] = value
    before = snapshot(model)
    for undo in (True, False):
        with pytest.raises(li.StateError, match=key.rpartition(".")[0]):
            li.merge(model, undo=undo)
        assert snapshot(model) == before


LOADED = {
    "A of site 'layer'": ("A/layer", lambda state: state.sites["layer"].A),
    "B of site 'layer'": ("B/layer", lambda state: state.sites["layer"].B),
    "trained tensor 'after.bias'": (
        "trained/after.bias",
        lambda state: state.trained["after.bias"],
    ),
}


@pytest.mark.parametrize("value", [math.nan, -math.inf])
@pytest.mark.parametrize("key", LOADED)
def test_non_finite_adapters_are_read_and_neither_put_on_a_model_nor_written(
    key, value, tmp_path
) -> None:
    config = {**CONFIG, "targets": ["layer", "before"], "train": ["after"]}
    model = fill(li.inject(Host(nn.Linear(5, 6)), config))
    diverged, (stored, of) = copy.deepcopy(model), LOADED[key]
    path = li.save_adapter(model, tmp_path / "broken.safetensors", format="native")
    spoil(path, stored, value)
    assert not of(li.read_adapter(path)).isfinite().all()
    state = li.adapter_state(diverged)
    of(state).view(-1)[1] = value
    plain, before = li.eject(copy.deepcopy(model)), snapshot(model)
    bare, new = snapshot(plain), tmp_path / "new"
    for call, words in (
        (lambda: li.load_adapter(plain, path), rf"load '.*broken.*', {key}: .* 1 NaN or infinite"),
        (lambda: li.install(plain, state), rf"install, {key}"),
        (lambda: li.swap_adapter(model, path), rf"swap adapter 'default' for '.*broken.*', {key}"),
        (lambda: li.swap_adapter(model, state), rf"swap adapter 'default', {key}"),
        (lambda: li.save_adapter(diverged, new), rf"save adapter 'default', {key}"),
        (lambda: li.write_adapter(state, new), rf"write peft adapter to '.*new', {key}"),
        (lambda: li.convert(path, new, "portable"), rf"write portable adapter to '.*new', {key}"),
    ):
        with pytest.raises(li.FormatError, match=words):
            call()
        assert (snapshot(plain), snapshot(model), new.exists()) == (bare, before, False)


@pytest.mark.parametrize(
    ("dtype", "size"), [(torch.float16, 1e3), (torch.bfloat16, 1e25), (torch.float32, 1e25)]
)
def test_non_finite_products_of_finite_factors(dtype: torch.dtype, size: float) -> None:
    model = Host(nn.Linear(5, 6)).to(dtype)
    fill(li.inject(model, {**CONFIG, "targets": ["before", "layer"]}), std=1e-3)
    with torch.no_grad():
        for parameter in li.adapter_parameters(model).values():
            if parameter.shape != (2, 2):
                parameter.mul_(size * 1e3)
    before = snapshot(model)
    for undo in (True, False):
        with pytest.raises(li.LayerError, match=r"layer\.weight"):
            li.merge(model, undo=undo)
        assert snapshot(model) == before


def _what_verbs_give(folder: Path) -> list[Tensor]:
    """Train, save, load, swap, mix, truncate, route and merge on a CPU; return what comes out."""
    torch.manual_seed(0)
    model, config = nn.Sequential(nn.Linear(40, 40, device="cpu")), {"targets": ["0"], **CONFIG}
    x = torch.randn(64, 40, device="cpu")
    for name, p in (("plain", 0.0), ("dropped", 0.1)):
        fill(li.inject(model, {**config, "dropout": p}, name), name)
        model(x).sum().backward()
        li.save_adapter(model, folder / name, name)
    found = [p.grad for p in li.adapter_parameters(model, "dropped").values()]
    states = [li.read_adapter(folder / name) for name in ("plain", "dropped")]
    for method in ("ties_svd", "dare_linear_svd"):
        states.append(li.combine(states[:2], method=method, density=0.5, rank=2))
    states.append(states[0].truncate(rank=1))
    found += [t for state in states for t in state.sites["0"].tensors.values()]
    li.swap_adapter(model, states[1], "plain")
    with li.routed(model, ["plain", None] * 32):
        found.append(model(x))
    li.merge(li.load_adapter(li.eject(model), folder / "plain"))
    return [*found, model[0].weight]


def test_verbs_do_not_depend_on_the_default_device(tmp_path: Path) -> None:
    """As where somebody calls `torch.set_default_device("cuda")` and has a model on the CPU."""
    wanted = _what_verbs_give(tmp_path / "cpu")
    fingerprint.sample_index.cache_clear()
    with torch.device("meta"):
        found = _what_verbs_give(tmp_path / "meta")
    assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))
