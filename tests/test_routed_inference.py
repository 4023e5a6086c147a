"""`routed` without gradients: what is gathered once for many forwards, and when it is not.

Whatever a layer keeps, the result is that of the general way, which keeps nothing and is
taken with gradients.
"""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable

import pytest
import torch
from conftest import KINDS, TOLERANCE, error, fill, injected, same_bits
from torch import Tensor, nn

import lora_inject as li
from lora_inject import functional
from lora_inject.functional import Factors
from lora_inject.layers import forward_update as forward

Rows = list[str | None]
# Eight rows of two adapters of one rank, or of three of unequal rank.
ROWS: dict[str, Rows] = {
    "few adapters": ["default", "wide", None, "default", "wide", "default", "wide", None],
    "many adapters": ["thin", "wide", None, "default", "thin", "wide", "default", "thin"],
}


def crowded(kind: str, dtype: torch.dtype = torch.float64) -> nn.Module:
    model = injected(KINDS[kind], dtype)
    for name, rank in (("wide", 2), ("thin", 1)):
        fill(li.inject(model, {**KINDS[kind].config, "rank": rank}, name), name)
    return model.eval()


def batch(kind: str, dtype: torch.dtype, n_tokens: int | None) -> Tensor:
    x = KINDS[kind].inputs(dtype)[0]
    row = x.reshape(-1, x.shape[-1])
    shape = (8, row.shape[-1]) if n_tokens is None else (8, n_tokens, row.shape[-1])
    return torch.randn(shape).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("n_tokens", [None, 1, 3, 32], ids=str)
@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("kind", ["linear", "one slice", "conv1d"])
def test_gathered_is_the_general_way(
    kind: str, rows: str, n_tokens: int | None, dtype: torch.dtype
) -> None:
    model, x = crowded(kind, dtype), batch(kind, dtype, n_tokens)
    with li.routed(model, ROWS[rows]):
        wanted = model(x)
        with torch.no_grad():
            found, again = model(x), model(x)
    assert found.dtype == dtype
    assert error(found, wanted) <= TOLERANCE.get(dtype, 2e-2)
    assert same_bits(found, again)
    with li.disabled(model):
        plain = model(x)
    base = [i for i, name in enumerate(ROWS[rows]) if name is None]
    assert same_bits(found[base], plain[base].detach())


CHANGES: dict[str, Callable[[nn.Module], None]] = {
    "in place": lambda model: fill(model, "wide"),
    "replaced": lambda model: _replace(model),
    "loaded": lambda model: _load(model),
}


def _replace(model: nn.Module) -> None:
    for module in model.modules():
        for key, parameter in list(module._parameters.items()):
            if key.endswith("lora_B__wide") and parameter is not None:
                module._parameters[key] = nn.Parameter(parameter.detach() + 1)


def _load(model: nn.Module) -> None:
    state = {k: v + 1 for k, v in model.state_dict().items()}
    model.load_state_dict(state)


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("change", CHANGES)
def test_new_values_are_seen_inside_the_context(change: str, rows: str) -> None:
    model, x = crowded("linear"), batch("linear", torch.float64, 1)
    with li.routed(model, ROWS[rows]):
        with torch.no_grad():
            before = model(x)
            CHANGES[change](model)
            found = model(x)
        wanted = model(x)
    assert error(found, wanted) < TOLERANCE[torch.float64]
    assert error(before, wanted) > 1e-3


def test_nothing_is_kept_after_the_context(monkeypatch: pytest.MonkeyPatch) -> None:
    kept: list[weakref.ref[Tensor]] = []
    gather = functional.gather

    def watched(*args: object, **kwargs: bool) -> functional.Gathered:
        found = gather(*args, **kwargs)  # type: ignore[arg-type]
        kept.extend(map(weakref.ref, found[:2]))
        return found

    monkeypatch.setattr(forward, "gather", watched)
    model, x = crowded("linear"), batch("linear", torch.float64, 1)
    with torch.no_grad(), li.routed(model, ROWS["few adapters"]):
        model(x)
        model(x)
        assert len(kept) == 2, "gathered once"
        assert all(t() is not None for t in kept)
    gc.collect()
    assert not any(t() is not None for t in kept)


def test_tensors_of_inference_mode_are_never_kept() -> None:
    """They do not tell when they are written."""
    model, x = crowded("linear"), batch("linear", torch.float64, 1)
    for module in model.modules():
        for key, parameter in list(module._parameters.items()):
            if "lora_" in key and parameter is not None:
                with torch.inference_mode():
                    module._parameters[key] = nn.Parameter(parameter.clone(), requires_grad=False)
    with torch.inference_mode(), li.routed(model, ROWS["few adapters"]):
        before = model(x).clone()
        for parameter in li.adapter_parameters(model, "wide").values():
            parameter.mul_(2)
        assert error(model(x), before) > 1e-3


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("n_tokens", [1, 3, 32])
@pytest.mark.parametrize("factor", ["lora_A", "lora_B"])
def test_a_broken_adapter_spoils_its_own_rows_only(factor: str, rows: str, n_tokens: int) -> None:
    """Tenants share a batch, not their mistakes."""
    model, x = crowded("linear"), batch("linear", torch.float64, n_tokens)
    with li.routed(model, ROWS[rows]), torch.no_grad():
        wanted = model(x)
        broken = [p for k, p in li.adapter_parameters(model, "wide").items() if factor in k]
        broken[0].fill_(torch.inf)
        found = model(x)
    for i, name in enumerate(ROWS[rows]):
        if name == "wide":
            assert not found[i].isfinite().any()
        else:
            assert error(found[i], wanted[i]) < TOLERANCE[torch.float64]


def test_beams_and_plain_batches_in_one_context() -> None:
    model, x = crowded("linear"), batch("linear", torch.float64, 1)
    with li.routed(model, ROWS["few adapters"], repeat=2), torch.no_grad():
        wide, narrow = model(x.repeat_interleave(2, 0)), model(x)
    assert error(wide[::2], narrow) < TOLERANCE[torch.float64]
    assert error(wide[1::2], narrow) < TOLERANCE[torch.float64]


def test_a_forward_with_gradients_after_one_of_inference_mode() -> None:
    """What layers share for the context was made in inference mode."""
    model, x = crowded("linear"), batch("linear", torch.float64, 1)
    li.train_only(model, ["default", "wide"])
    with li.routed(model, ROWS["few adapters"]):
        with torch.inference_mode():
            found = model(x).clone()
        wanted = model(x)
        wanted.sum().backward()
    assert error(found, wanted) < TOLERANCE[torch.float64]
    assert all(p.grad is not None for p in li.adapter_parameters(model, "wide").values())


def test_function_transforms_over_a_routed_batch() -> None:
    model = crowded("linear")
    x = torch.stack([batch("linear", torch.float64, n) for n in (32, 32)])
    with li.routed(model, ROWS["few adapters"]), torch.no_grad():
        wanted = torch.stack([model(each) for each in x])
        found = torch.func.vmap(model)(x)
    assert error(found, wanted) < TOLERANCE[torch.float64]


class _Remembers(nn.Linear):
    """A layer of somebody's own, which keeps its output: it must stay as it was."""

    seen: Tensor

    def forward(self, x: Tensor) -> Tensor:
        self.seen = super().forward(x)
        return self.seen


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("n_tokens", [1, 3, 32])
def test_the_output_that_a_layer_of_its_own_keeps_is_not_written_on(
    rows: str, n_tokens: int
) -> None:
    model = nn.Sequential(_Remembers(6, 5)).double().eval()
    for name in ("default", "wide", "thin"):
        fill(li.inject(model, {"rank": 2, "targets": ["0"]}, name), name)
    x = torch.randn(8, n_tokens, 6).double()
    with torch.no_grad():
        with li.disabled(model):
            plain = model(x).clone()
        with li.routed(model, ROWS[rows]):
            found = model(x)
    layer = model[0]
    assert isinstance(layer, _Remembers)
    assert same_bits(layer.seen, plain)
    assert error(found, plain) > 1e-3


@pytest.mark.parametrize("n_tokens", [1, 4])
@pytest.mark.parametrize("ranks", [(1, 3), (2,) * 8, (4, 1, 1, 1)])
def test_gather_by_hand(ranks: tuple[int, ...], n_tokens: int) -> None:
    """Against dense matrices, row by row."""
    adapters = [
        [Factors(torch.randn(r, 5).double(), torch.randn(7, r).double(), 0.5 + i % 2)]
        for i, r in enumerate(ranks)
    ]
    rows = list(range(1, 9)) if len(ranks) == 8 else [0, 2, 1, 2, 2, 1, 0, 2]
    x, y = torch.randn(8, n_tokens, 5).double(), torch.randn(8, n_tokens, 7).double()
    of_rows = functional.Rows(rows, x.device)
    found = functional.gather(of_rows, adapters, 7, torch.float64, one_token=n_tokens == 1)
    one_by_one = functional.add_row_by_row(y, x, of_rows, adapters, torch.float64)
    for out in (found.add(y, x), one_by_one):
        for i, row in enumerate(rows):
            wanted = y[i]
            if row:
                u = adapters[row - 1][0]
                wanted = y[i] + x[i] @ (u.scale * u.B @ u.A).T
            assert error(out[i], wanted) < 1e-14
