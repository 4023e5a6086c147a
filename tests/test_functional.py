"""The arithmetic, against dense float64 formulas written here, and against itself by another path.

`linear` has an autograd Function, plain operations under tracers and function transforms, and for a
CPU another order of the products. All must state the same fact.
"""

import copy
import math
from collections.abc import Sequence
from typing import Any
from unittest.mock import patch

import pytest
import torch
import torch.nn.functional as F
from conftest import (
    KINDS,
    TOLERANCE,
    Host,
    dense_output,
    error,
    fill,
    host,
    injected,
    same_bits,
)
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import lora_inject as li
from lora_inject.core.functional import cpu
from lora_inject.core.functional.factors import Patch, Update, master_dtype
from lora_inject.core.functional.finite import all_finite
from lora_inject.core.functional.fold import Delta
from lora_inject.core.functional.linear import few_tokens, linear
from lora_inject.core.functional.lookup import embedding
from lora_inject.core.functional.on_output import add_updates
from lora_inject.core.functional.rounded_fold import Tally, fold_rows
from lora_inject.core.functional.weight import dense_delta, effective_weight
from lora_inject.core.spec.sites import SiteSpec
from lora_inject.core.spec.slices import Slices

MATRICES = ["linear", "conv1d", "equal slices"]
FORWARD = [name for name, kind in KINDS.items() if kind.update == "forward"]
Span = tuple[int, int]
SEEDS = st.integers(0, 9999)


def dense(updates: Sequence[Update], n_out: int) -> Tensor:
    """The sum of `scale * B A` as one `(out, in)` matrix, in the dtype of the factors."""
    total = 0.0
    for u in updates:
        spans = u.spans or ((0, n_out),)
        rank, row = u.B.shape[1], 0
        delta = u.A.new_zeros(n_out, u.A.shape[1])
        for part, (start, stop) in enumerate(spans):
            block = u.B[row : row + stop - start] @ u.A[part * rank : (part + 1) * rank]
            delta = delta + F.pad(block, (0, 0, start, n_out - stop))
            row += stop - start
        total = total + u.scale * delta
    return total


# ------------------------------------------------------------------------- linear, any shape at all


@st.composite
def problems(draw: st.DrawFn) -> dict[str, Any]:
    spans: list[tuple[Span, ...] | None] = [
        None, ((0, 2), (3, 6)), ((1, 2),), ((0, 6),), ((1, 3), (4, 6)),
    ]  # fmt: skip
    updates = st.tuples(st.integers(1, 3), st.sampled_from(spans), st.floats(-2, 2))
    return {
        "lead": draw(st.sampled_from([(), (1,), (3,), (2, 3), (0,), (2, 0), (2, 1, 2)])),
        "n_in": draw(st.integers(1, 6)),
        "transposed": draw(st.booleans()),
        "bias": draw(st.booleans()),
        "on a cpu": draw(st.booleans()),
        "layout": draw(st.sampled_from(["contiguous", "strided", "expanded"])),
        "train": draw(st.sets(st.sampled_from(["x", "weight", "bias", "A", "B"]))),
        "updates": draw(st.lists(updates, min_size=1, max_size=3)),
    }


def _input(lead: tuple[int, ...], n_in: int, layout: str, dtype: torch.dtype) -> Tensor:
    if layout == "strided":
        return torch.randn(n_in, *lead).to(dtype).movedim(0, -1)
    if layout == "expanded" and lead:
        return torch.randn(*(1 for _ in lead), n_in).to(dtype).expand(*lead, n_in)
    return torch.randn(*lead, n_in).to(dtype)


ONE_TOKEN: dict[str, Any] = {"lead": (), "n_in": 1, "layout": "contiguous", "train": set()}
ONE_TOKEN |= {"transposed": False, "bias": False, "on a cpu": True, "updates": [(1, None, 1.0)]}


@settings(max_examples=150, deadline=None)
@given(
    problem=problems(), dtype=st.sampled_from(list(TOLERANCE)), float32=st.booleans(), seed=SEEDS
)
@example(problem=ONE_TOKEN, dtype=torch.float64, float32=False, seed=0)
@example(problem={**ONE_TOKEN, "train": {"A"}}, dtype=torch.float64, float32=False, seed=0)
def test_linear_is_the_dense_layer(problem, dtype, float32, seed) -> None:
    with patch("lora_inject.core.functional.cpu.is_cpu", lambda _: problem["on a cpu"]):
        _is_the_dense_layer(problem, dtype, float32, seed)


def _is_the_dense_layer(
    problem: dict[str, Any], dtype: torch.dtype, float32: bool, seed: int
) -> None:
    torch.manual_seed(seed)
    n_in, wide = problem["n_in"], master_dtype(dtype)
    x = _input(problem["lead"], n_in, problem["layout"], dtype)
    weight = torch.randn((n_in, 6) if problem["transposed"] else (6, n_in)).to(dtype)
    bias = torch.randn(6).to(dtype) if problem["bias"] else None
    updates = []
    for rank, spans, scale in problem["updates"]:
        width = sum(b - a for a, b in spans) if spans else 6
        A = torch.randn(rank * len(spans or (1,)), n_in, dtype=wide)
        updates.append(Update(A, torch.randn(width, rank, dtype=wide), scale, spans))
    named = {"x": [x], "weight": [weight], "bias": [bias] if bias is not None else []}
    named |= {"A": [u.A for u in updates], "B": [u.B for u in updates]}
    trained = [t for name in sorted(problem["train"]) for t in named[name]]
    leaves = [t.requires_grad_() for t in trained]

    options = {"transposed": problem["transposed"], "float32": float32}
    y = linear(x, weight, bias, updates, **options)
    everything = [t for tensors in named.values() for t in tensors]
    twins = [t.detach().double().requires_grad_(t.requires_grad) for t in everything]
    twin = dict(zip(map(id, everything), twins, strict=True))
    wide_updates = [u._replace(A=twin[id(u.A)], B=twin[id(u.B)]) for u in updates]
    W = twin[id(weight)].t() if problem["transposed"] else twin[id(weight)]
    total = W + dense(wide_updates, 6)
    wanted = F.linear(twin[id(x)], total, None if bias is None else twin[id(bias)])

    # A result may be small by cancellation: errors are relative to the size of what is summed.
    size = sum(abs(u.scale) * u.B.norm() * u.A.norm() for u in updates) + weight.norm() + 1
    largest_x = float(x.detach().abs().max()) if x.numel() else 0.0
    largest_b = float(bias.detach().abs().max()) if bias is not None else 0.0
    bound = TOLERANCE[dtype] * (float(size.detach()) * largest_x + largest_b)
    assert (y.shape, y.dtype, y.requires_grad) == (wanted.shape, dtype, bool(leaves))
    assert torch.allclose(y.double(), wanted, rtol=0, atol=bound)
    with torch.no_grad():
        slim = linear(x, weight, bias, updates, **options)
    assert same_bits(slim, y), "with and without gradients"
    if not leaves:
        return
    g = torch.randn(y.shape).to(dtype)
    found = torch.autograd.grad(y, leaves, g)
    expected = torch.autograd.grad(wanted, [twin[id(t)] for t in leaves], g.double())
    for leaf, a, b in zip(leaves, found, expected, strict=True):
        assert (a.shape, a.dtype) == (leaf.shape, leaf.dtype)
        n = max(1, math.prod(problem["lead"]))
        limit = TOLERANCE[dtype] * n * float(size.detach()) * 8
        assert torch.allclose(a.double(), b, rtol=0, atol=limit)


PROBLEMS: dict[str, dict[str, Any]] = {
    "plain": {},
    "slices": {"spans": ((0, 2), (3, 6))},
    "one slice": {"spans": ((2, 3),)},
    "conv1d": {"transposed": True},
    "slices of conv1d": {"transposed": True, "spans": ((0, 1), (4, 6))},
    "dropout": {"dropout": 0.4},
    "little dropout": {"dropout": 0.1},
    "equal slices": {"spans": ((0, 2), (3, 5))},
    "dropout in slices": {"dropout": 0.4, "spans": ((0, 2), (3, 6))},
}


@pytest.mark.parametrize("path", ["fused", "fused, not on a CPU", "general"])
@pytest.mark.parametrize("second", [False, True], ids=["first", "second derivative"])
@pytest.mark.parametrize("name", PROBLEMS)
def test_derivatives_by_finite_differences(name, second, path, monkeypatch) -> None:
    """x, W, bias, and both factors of two updates, one of which takes an entry from the other."""
    if "not on a CPU" in path:
        monkeypatch.setattr(cpu, "is_cpu", lambda _: False)
    options = dict(PROBLEMS[name])
    transposed = options.pop("transposed", False)
    spans = options.get("spans", ((0, 6),))
    rows, width = 2 * len(spans), sum(stop - start for start, stop in spans)
    weight = (3, 6) if transposed else (6, 3)
    shapes = [(2, 3), weight, (6,), (rows, 3), (width, 2), (1, 3), (6, 1)]
    leaves = [torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in shapes]

    def run(*tensors: Tensor) -> Tensor:
        x, weight, bias, A, B, A2, B2 = tensors
        updates = [Update(A, B, 0.7, **options), Update(A2, B2, -1.3)]
        torch.manual_seed(4)
        if path.startswith("fused"):
            return linear(x, weight, bias, updates, transposed=transposed)
        y = F.linear(x, weight.t() if transposed else weight, bias)
        return add_updates(y, x, updates)

    check = torch.autograd.gradgradcheck if second else torch.autograd.gradcheck
    assert check(run, leaves, fast_mode=True)  # a random projection sees a wrong entry as well
    wanted, found = (
        torch.autograd.grad(run(*leaves).cos().sum(), leaves, create_graph=how)
        for how in (False, True)
    )
    for one, other in zip(found, wanted, strict=True):  # which no check of one alone sees
        assert error(one, other) < 1e-12


@pytest.mark.parametrize("padding_idx", [None, 2])
def test_embedding_derivatives_by_finite_differences(padding_idx: int | None) -> None:
    ids = torch.tensor([[0, 2], [2, 4]])
    W = torch.randn(5, 3, dtype=torch.float64)
    A, B = (torch.randn(s, dtype=torch.float64, requires_grad=True) for s in ((2, 5), (3, 2)))

    def run(A: Tensor, B: Tensor) -> Tensor:
        y = embedding(F.embedding(ids, W), ids, [Update(A, B, 0.7)], padding_idx)
        # With padding the table's gradient is zero there by definition, not by calculus.
        return y if padding_idx is None else y[ids != padding_idx]

    assert torch.autograd.gradcheck(run, (A, B))
    assert torch.autograd.gradgradcheck(run, (A, B))
    if padding_idx is not None:
        embedding(F.embedding(ids, W), ids, [Update(A, B, 0.7)], padding_idx).sum().backward()
        assert not A.grad[:, 2].any()
        assert A.grad[:, 0].all()


@pytest.mark.parametrize("kind", FORWARD)
def test_paths_agree(kind: str) -> None:
    """Fused, slim, and the plain operations that tracers and transforms see."""
    model = injected(KINDS[kind])
    inputs = KINDS[kind].inputs(torch.float32)
    fused = model(*inputs)
    with torch.no_grad():
        assert same_bits(model(*inputs), fused)
    with torch.inference_mode():
        assert same_bits(model(*inputs).clone(), fused)
    parameters = dict(model.named_parameters())
    seen = torch.func.vmap(lambda i: torch.func.functional_call(model, parameters, (i,)))(*inputs)
    assert error(seen, fused) < TOLERANCE[torch.float32]


# --------------------------------------------------------------------------------------- torch.func


@pytest.mark.parametrize("kind", [k for k in KINDS if k != "bilinear"])
def test_functional_call_grad_and_vmap(kind: str) -> None:
    """Per-sample gradients by vmap(grad) are those of one backward for each sample."""
    row = KINDS[kind]
    model = injected(row, torch.float64)
    (x,) = row.inputs(torch.float64)
    adapters = {n: p for n, p in model.named_parameters() if p.requires_grad}
    fixed = {n: p for n, p in model.named_parameters() if not p.requires_grad}

    def loss(parameters: dict[str, Tensor], sample: Tensor) -> Tensor:
        y = torch.func.functional_call(model, (parameters, fixed), (sample.unsqueeze(0),))
        # The square alone is fixed where the norm is enforced: its gradient would be rounding.
        return (y - 1).square().sum()

    found = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0))(adapters, x)
    for i, sample in enumerate(x):
        wanted = torch.autograd.grad(
            (model(sample.unsqueeze(0)) - 1).square().sum(), list(adapters.values())
        )
        for name, gradient in zip(adapters, wanted, strict=True):
            if gradient.any():
                assert error(found[name][i], gradient) < 1e-12


# torch itself scripts its forward-mode rules when they are first needed.
@pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated:DeprecationWarning")
@pytest.mark.parametrize("kind", ["linear", "equal slices of conv1d", "embedding", "conv 2d"])
def test_forward_mode_is_right_or_refused(kind: str) -> None:
    model = injected(KINDS[kind], torch.float64)
    inputs = KINDS[kind].inputs(torch.float64)
    adapters = {n: p.detach() for n, p in model.named_parameters() if p.requires_grad}
    tangents = {n: torch.randn_like(p) for n, p in adapters.items()}

    def run(parameters: dict[str, Tensor]) -> Tensor:
        return torch.func.functional_call(model, parameters, inputs)

    _, found = torch.func.jvp(run, (adapters,), (tangents,))
    step = 1e-6
    above, below = (
        run({n: p + sign * step * tangents[n] for n, p in adapters.items()}) for sign in (1, -1)
    )
    assert error(found, (above - below) / (2 * step)) < 1e-7


def test_second_derivatives_of_a_model() -> None:
    """The Hessian of a loss over A and B, against the dense layer's."""
    kind = KINDS["unequal slices"]
    plain = host(kind, torch.float64)
    model = fill(li.inject(copy.deepcopy(plain), kind.config))
    A, B = li.adapter_parameters(model).values()
    (x,) = kind.inputs(torch.float64)

    def penalty(output: Tensor, leaves: Sequence[Tensor]) -> Sequence[Tensor]:
        first = torch.autograd.grad(torch.tanh(output).sum(), leaves, create_graph=True)
        return torch.autograd.grad(sum(g.square().sum() for g in first), leaves)  # type: ignore[arg-type,return-value]

    twins = [t.detach().requires_grad_() for t in (A.clone(), B.clone())]
    wanted = penalty(dense_output(kind, plain, *twins, [x]), twins)
    for a, b in zip(penalty(model(x), (A, B)), wanted, strict=True):
        assert error(a, b) < 1e-11


@pytest.mark.filterwarnings("ignore:There is a performance drop:UserWarning")
def test_batched_backwards_are_right_or_refused() -> None:
    model = injected(KINDS["equal slices"], torch.float64)
    A, _ = li.adapter_parameters(model).values()
    y = model(torch.randn(3, 5, dtype=torch.float64))
    g = torch.randn(4, *y.shape, dtype=torch.float64)
    wanted = [torch.autograd.grad(y, A, one, retain_graph=True)[0] for one in g]
    try:
        (found,) = torch.autograd.grad(y, A, g, is_grads_batched=True, retain_graph=True)
    except RuntimeError:
        return
    assert error(found, torch.stack(wanted)) < 1e-12


def test_a_backward_after_the_input_changed_is_refused() -> None:
    model = injected(KINDS["linear"])
    x = torch.randn(2, 5)
    y = model(x)
    x.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_the_output_may_be_changed_in_place() -> None:
    model = injected(KINDS["linear"], torch.float64)
    x = torch.randn(2, 5, dtype=torch.float64, requires_grad=True)
    model(x).relu_().sum().backward()
    found = x.grad.clone()
    x.grad = None
    torch.relu(model(x)).sum().backward()
    assert torch.equal(found, x.grad)


# ------------------------------------------------------------------------------------------ dropout


class Identity(nn.Linear):
    """W = 0 and no bias: the output is the update alone."""

    def __init__(self) -> None:
        super().__init__(6, 6, bias=False)
        nn.init.zeros_(self.weight)


def identity(layer: nn.Module, p: float) -> Host:
    """B A is the identity, so the output is the dropped input itself."""
    model = li.inject(Host(layer), {"rank": 6, "alpha": 6, "dropout": p, "targets": ["layer"]})
    with torch.no_grad():
        for parameter in li.adapter_parameters(model).values():
            nn.init.eye_(parameter)
    return model


@pytest.mark.parametrize("p", [0.1, 0.5, 0.9])
@pytest.mark.parametrize("grad", [True, False])
def test_dropout_is_on_the_input_of_a(p: float, grad: bool) -> None:
    model = identity(Identity(), p)
    x = torch.rand(2000, 6) + 0.5
    with torch.set_grad_enabled(grad):
        y = model(x).detach()
    dropped = y == 0
    assert torch.allclose(y[~dropped], (x / (1 - p))[~dropped])
    n = x.numel()
    assert abs(float(dropped.double().mean()) - p) < 5 * (p * (1 - p) / n) ** 0.5
    # Elements are dropped independently: whole rows and whole columns are not.
    by_row, by_column = dropped.double().mean(1), dropped.double().mean(0)
    assert (by_column - p).abs().max() < 5 * (p * (1 - p) / 2000) ** 0.5
    assert abs(float(by_row.var()) / (p * (1 - p) / 6) - 1) < 0.25
    assert same_bits(model.eval()(x), x)


def test_dropout_of_no_tokens() -> None:
    """An expert that no token came to still trains."""
    A, B = torch.randn(2, 4, requires_grad=True), torch.randn(3, 2, requires_grad=True)
    x = torch.randn(0, 4, requires_grad=True)
    y = linear(x, torch.randn(3, 4), None, [Update(A, B, 0.5, None, 0.1)])
    y.sum().backward()
    assert y.shape == (0, 3)
    assert not A.grad.any()


def test_dropout_is_reproducible_and_its_gradient_has_the_same_mask() -> None:
    model = identity(Identity(), 0.5)
    x = (torch.rand(20, 6) + 0.5).requires_grad_()
    torch.manual_seed(7)
    y = model(x)
    torch.manual_seed(7)
    assert same_bits(model(x), y)
    assert not same_bits(model(x), y)
    y.sum().backward()
    assert torch.equal(x.grad, (y != 0) * 2.0)


def test_embedding_dropout_drops_whole_tokens() -> None:
    model = Host(nn.Embedding(5, 4))
    fill(li.inject(model, {"rank": 2, "alpha": 2, "dropout": 0.5, "targets": ["layer"]}))
    ids = torch.arange(5).repeat(400)
    y = model(ids).detach()
    full = 2 * (model.eval()(ids) - model.layer._parameters["weight"][ids]).detach()
    update = y - model.layer._parameters["weight"][ids]
    dropped = (update == 0).all(-1)
    assert abs(float(dropped.double().mean()) - 0.5) < 5 * 0.5 / 2000**0.5
    assert torch.allclose(update[~dropped], full[~dropped], atol=1e-5)


# -------------------------------------------------------------------------- dtype of the arithmetic


@pytest.mark.parametrize("kind", [*MATRICES, "unequal slices of conv1d"])
@pytest.mark.parametrize("routed", [False, True])
def test_compute_float32_keeps_gradients_right_over_a_16_bit_base(kind: str, routed: bool) -> None:
    row = KINDS[kind]
    errors = {}
    for compute in ("base", "float32"):
        torch.manual_seed(0)
        plain = host(row, torch.bfloat16)
        model = fill(li.inject(copy.deepcopy(plain), {**row.config, "compute": compute}))
        A, B = li.adapter_parameters(model).values()
        x = torch.randn(4, 30, 5).bfloat16()
        if routed:
            with li.routed(model, ["default"] * 4):
                y = model(x)
        else:
            y = model(x)
        g = torch.randn_like(y)
        y.backward(g)
        twins = [t.detach().double().requires_grad_() for t in (A, B)]
        dense_output(row, plain, *twins, [x]).backward(g.double())
        errors[compute] = max(error(t.grad, w.grad) for t, w in zip((A, B), twins, strict=True))
        assert y.dtype == torch.bfloat16
    assert errors["float32"] < 1e-6
    assert errors["base"] > 1e-4


def test_compute_float32_rounds_the_output_once() -> None:
    row = KINDS["linear"]
    plain = host(row, torch.bfloat16)
    model = fill(li.inject(copy.deepcopy(plain), {**row.config, "compute": "float32"}))
    A, B = (p.detach().double() for p in li.adapter_parameters(model).values())
    x = torch.randn(4, 3, 5).bfloat16()
    base = plain(x).double()
    exact = base + dense_output(row, plain, A, B, [x]) - dense_output(row, plain, A, 0 * B, [x])
    half = torch.finfo(torch.bfloat16).eps / 2
    assert ((model(x).double() - exact).abs() <= half * exact.abs() + 1e-5).all()


@pytest.mark.parametrize(
    "kind", [*MATRICES, "embedding", "conv 2d", "activation inside", "parameter"]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_autocast(kind: str, dtype: torch.dtype) -> None:
    row = KINDS[kind]
    plain = host(row, dtype)
    model = fill(li.inject(copy.deepcopy(plain), row.config))
    A, B = li.adapter_parameters(model).values()
    inputs = row.inputs(dtype)
    with torch.autocast("cpu", torch.bfloat16):
        y, plain_y = model(*inputs), plain(*inputs)
    assert y.dtype == plain_y.dtype
    g = torch.randn_like(y)
    y.backward(g)
    twins = [t.detach().double().requires_grad_() for t in (A, B)]
    wanted = dense_output(row, plain, *twins, inputs)
    wanted.backward(g.double())
    limit = 2 * TOLERANCE[torch.bfloat16]
    assert error(y, wanted) < limit
    for found, twin in zip((A, B), twins, strict=True):
        assert found.grad.dtype == torch.float32
        assert error(found.grad, twin.grad) < limit


# ------------------------------------------------------------------ the delta, the weight, the fold


@st.composite
def specs(draw: st.DrawFn) -> SiteSpec:
    n_in, n_out, rank = draw(st.integers(1, 5)), draw(st.integers(2, 6)), draw(st.integers(1, 3))
    transposed = draw(st.booleans())
    experts = draw(st.sampled_from([None, None, 1, 3]))
    slices = None
    if experts is None and draw(st.booleans()):
        cut = draw(st.integers(1, n_out - 1))
        adapt = draw(st.sampled_from([("a",), ("b",), ("a", "b")]))
        slices = Slices((("a", cut), ("b", n_out - cut)), adapt)
    shape = (n_in, n_out) if transposed else (n_out, n_in)
    return SiteSpec(
        "s", "parameter", n_in, n_out, shape if experts is None else (experts, *shape), rank,
        draw(st.floats(0.1, 8)), transposed=transposed, experts=experts, slices=slices,
        scaling=draw(st.sampled_from(["standard", "rslora"])),
    )  # fmt: skip


def delta_by_hand(spec: SiteSpec, A: Tensor, B: Tensor) -> Tensor:
    divisor = math.sqrt(spec.rank) if spec.scaling == "rslora" else spec.rank
    spans = spec.slices.spans if spec.slices else None
    A, B = A.double(), B.double()
    banks = zip(A, B, strict=True) if spec.experts is not None else [(A, B)]
    found = [
        dense([Update(a, b, spec.alpha / divisor, spans)], spec.out_features) for a, b in banks
    ]
    found = [d.t() if spec.transposed else d for d in found]
    return torch.stack(found) if spec.experts is not None else found[0]


@settings(max_examples=100, deadline=None)
@given(spec=specs(), dtype=st.sampled_from([*TOLERANCE, torch.float16]), data=st.data(), seed=SEEDS)
def test_delta_effective_weight_and_fold_state_one_fact(spec, dtype, data, seed) -> None:
    torch.manual_seed(seed)
    A, B = torch.randn(spec.a_shape), torch.randn(spec.b_shape)
    W = torch.randn(spec.weight_shape).to(dtype)
    delta = delta_by_hand(spec, A, B)
    assert torch.allclose(dense_delta(spec, A, B), delta, rtol=1e-12, atol=1e-12)
    assert dense_delta(spec, A, B, torch.float32).dtype == torch.float32
    exact = W.double() + delta
    half = torch.finfo(dtype).eps / 2 if torch.finfo(dtype).bits == 16 else 0.0
    slack = 1e-5 if dtype != torch.float64 else 1e-12
    bound = half * exact.abs() + slack * (1 + delta.abs())
    read = effective_weight(W, [Patch(spec, A, B)], float32=False)
    assert (read.shape, read.dtype) == (W.shape, dtype)
    assert ((read.double() - exact).abs() <= bound).all()
    wide = effective_weight(W, [Patch(spec, A, B)], float32=True)
    assert wide.dtype == torch.promote_types(dtype, torch.float32)
    assert ((wide.double() - exact).abs() <= slack * (1 + delta.abs())).all()

    matrix, bits = W.view(spec.matrix_shape), W.clone()
    cut = data.draw(st.integers(0, matrix.shape[0]))
    tally = Tally()
    delta_rows = Delta([Patch(spec, A, B)], torch.promote_types(dtype, torch.float32))
    halves = [(matrix[:cut], 0), (matrix[cut:], cut)]
    merged = torch.cat([fold_rows(*half, delta_rows, tally) for half in halves]).view(W.shape)
    assert same_bits(W, bits), "the rows that were given are never written"
    assert ((merged.double() - exact).abs() <= bound).all()
    assert same_bits(merged[delta == 0], W[delta == 0])
    assert tally.delta_norm == pytest.approx(float(delta.norm()), rel=1e-4)
    assert tally.weight_norm == pytest.approx(float(W.double().norm()), rel=1e-4)
    moved = merged.double() - W.double()
    # `W + D` itself is rounded, which is not counted: as much of D as it is smaller than W.
    rounded = torch.finfo(torch.promote_types(dtype, torch.float32)).eps / 2
    unseen = rounded * float((W.double().abs() + delta.abs()).norm() / delta.norm())
    assert tally.kept == pytest.approx(
        float((moved * delta).sum() / delta.square().sum()), abs=1e-4 + unseen
    )


def test_fold_says_when_the_result_is_not_finite() -> None:
    spec = SiteSpec("s", "linear", 3, 4, (4, 3), 2, 2.0)
    W = torch.zeros(4, 3, dtype=torch.float16)
    for size, finite in ((1e2, True), (1e3, False)):
        tally = Tally()
        term = Patch(spec, torch.full((2, 3), size), torch.full((4, 2), size))
        fold_rows(W, 0, Delta([term]), tally)
        assert tally.finite is finite


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_value_that_is_not_finite_is_found_among_many_tensors(bad: float) -> None:
    floats = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
    tensors = [torch.full((n % 7, 5000), 6e4, dtype=floats[n % 4]) for n in range(60)]
    tensors += [torch.ones(3, 900_000).mT, torch.ones(2).to(torch.float8_e5m2), torch.arange(3)]
    tensors += [torch.empty(2, device="meta"), torch.ones((), requires_grad=True)]
    assert all_finite(*tensors)  # sums in 16 bits are not
    for i in (1, 2, 3, 4, 58, 60, 61):
        flat = tensors[i].detach().clone()
        flat[-1, ...] = bad
        assert not all_finite(*tensors[:i], flat, *tensors[i + 1 :]), i


@pytest.mark.parametrize("shape", [(1, 1), (3, 4)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_few_tokens_have_the_bits_of_the_same_tokens_in_training(
    dtype: torch.dtype, shape: tuple[int, int]
) -> None:
    layer = li.inject(nn.Sequential(nn.Linear(5, 6)), {"rank": 2, "targets": ["0"]})[0].to(dtype)
    nn.init.normal_(layer.get_parameter("lora_B__default"))
    x = torch.randn(*shape, 10, dtype=dtype)[..., ::2]  # not contiguous
    wanted = layer(x)
    with torch.no_grad(), patch("lora_inject.core.functional.linear.apply_updates", None):
        assert same_bits(layer.eval()(x), wanted)


def test_what_is_not_a_few_tokens_of_a_cpu_goes_the_general_way() -> None:
    W, A, B = (nn.Parameter(torch.randn(shape)) for shape in ((6, 4), (2, 4), (6, 2)))
    x = torch.randn(1, 4)

    def are_few(x: Tensor, *tensors: Tensor) -> bool:
        weight, a, b = tensors or (W, A, B)
        return few_tokens(x, weight, None, a, b, 0.5) is not None

    with torch.no_grad():
        assert are_few(x)
        assert are_few(torch.randn(32, 4))
        assert not are_few(torch.randn(33, 4))
        assert not are_few(torch.randn(0, 4))
        assert not are_few(x.to_sparse())
        assert not are_few(torch.nested.nested_tensor([x], layout=torch.jagged))
        assert not are_few(x.bfloat16())
        assert not are_few(x, W, A, nn.Parameter(B.double()))
        assert not are_few(x, W.detach(), A, B)
        with torch.autocast("cpu"):
            assert not are_few(x)
        with TorchDispatchMode():
            assert not are_few(x)
