"""The arithmetic, against dense float64 formulas written here and finite differences."""

import copy
import math
from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any
from unittest.mock import patch

import pytest
import torch
import torch.nn.functional as F
from conftest import TOLERANCE, error, fill, same_bits
from contract.kinds import KINDS, Host, dense_output, host, injected
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import lora_inject as li
from lora_inject.core.functional import cpu
from lora_inject.core.functional.factors import Patch, Update, master_dtype
from lora_inject.core.functional.finite import all_finite
from lora_inject.core.functional.fold import Delta
from lora_inject.core.functional.linear import linear
from lora_inject.core.functional.lookup import embedding
from lora_inject.core.functional.on_output import add_updates
from lora_inject.core.functional.rounded_fold import Tally, fold_rows
from lora_inject.core.functional.weight import dense_delta, effective_weight
from lora_inject.core.spec.sites import SiteSpec
from lora_inject.core.spec.slices import Slices

MATRICES = ["linear", "conv1d", "equal slices"]
SEEDS = st.integers(0, 9999)


def pair(kind: str, dtype: torch.dtype, **more: Any) -> tuple[Host, Host, list[nn.Parameter]]:
    """A plain host, an adapted copy of it, and the A and B of the copy."""
    plain = host(KINDS[kind], dtype)
    model = fill(li.inject(copy.deepcopy(plain), {**KINDS[kind].config, **more}))
    return plain, model, list(li.adapter_parameters(model).values())


def doubled(leaves: Sequence[Tensor]) -> list[Tensor]:
    return [t.detach().double().requires_grad_() for t in leaves]


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


@st.composite
def problems(draw: st.DrawFn) -> dict[str, Any]:
    spans: list[Any] = [
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


def input_of(lead: tuple[int, ...], n_in: int, layout: str, dtype: torch.dtype) -> Tensor:
    if layout == "strided":
        return torch.randn(n_in, *lead).to(dtype).movedim(0, -1)
    if layout == "expanded" and lead:
        return torch.randn(*(1 for _ in lead), n_in).to(dtype).expand(*lead, n_in)
    return torch.randn(*lead, n_in).to(dtype)


def update_of(n_in: int, rank: int, spans: Any, scale: float, dtype: torch.dtype) -> Update:
    width = sum(b - a for a, b in spans) if spans else 6
    A = torch.randn(rank * len(spans or (1,)), n_in, dtype=dtype)
    return Update(A, torch.randn(width, rank, dtype=dtype), scale, spans)


ONE_TOKEN: dict[str, Any] = {"lead": (), "n_in": 1, "layout": "contiguous", "train": set()}
ONE_TOKEN |= {"transposed": False, "bias": False, "on a cpu": True, "updates": [(1, None, 1.0)]}


@settings(max_examples=150, deadline=None)
@given(
    problem=problems(), dtype=st.sampled_from(list(TOLERANCE)), float32=st.booleans(), seed=SEEDS
)
@example(problem=ONE_TOKEN, dtype=torch.float64, float32=False, seed=0)
@example(problem={**ONE_TOKEN, "train": {"A"}}, dtype=torch.float64, float32=False, seed=0)
def test_linear_is_the_dense_layer(problem, dtype, float32, seed) -> None:
    torch.manual_seed(seed)
    n_in, transposed, train = problem["n_in"], problem["transposed"], problem["train"]
    x = input_of(problem["lead"], n_in, problem["layout"], dtype)
    weight = torch.randn((n_in, 6) if transposed else (6, n_in)).to(dtype)
    bias = torch.randn(6).to(dtype) if problem["bias"] else None
    updates = [update_of(n_in, *each, master_dtype(dtype)) for each in problem["updates"]]
    named = [("x", x), ("weight", weight), *([("bias", bias)] if problem["bias"] else [])]
    named += [("A", u.A) for u in updates] + [("B", u.B) for u in updates]
    leaves = [t.requires_grad_() for name, t in named if name in train]
    twin = {id(t): t.detach().double().requires_grad_(name in train) for name, t in named}

    def run() -> Tensor:
        return linear(x, weight, bias, updates, transposed=transposed, float32=float32)

    with patch("lora_inject.core.functional.cpu.is_cpu", lambda _: problem["on a cpu"]):
        y = run()
        with torch.no_grad():
            assert same_bits(run(), y), "with and without gradients"
        g = torch.randn(y.shape).to(dtype)
        grads = torch.autograd.grad(y, leaves, g) if leaves else []

    W = twin[id(weight)].t() if transposed else twin[id(weight)]
    total = W + dense([u._replace(A=twin[id(u.A)], B=twin[id(u.B)]) for u in updates], 6)
    wanted = F.linear(twin[id(x)], total, None if bias is None else twin[id(bias)])
    # A result may be small by cancellation: errors are relative to the size of what is summed.
    norms = sum(abs(u.scale) * u.B.norm() * u.A.norm() for u in updates) + weight.norm() + 1
    size = float(norms.detach())
    largest_x = float(x.detach().abs().max()) if x.numel() else 0.0
    largest_b = float(bias.detach().abs().max()) if bias is not None else 0.0
    bound = TOLERANCE[dtype] * (size * largest_x + largest_b)
    assert (y.shape, y.dtype, y.requires_grad) == (wanted.shape, dtype, bool(leaves))
    assert torch.allclose(y.double(), wanted, rtol=0, atol=bound)
    limit = TOLERANCE[dtype] * max(1, math.prod(problem["lead"])) * size * 8
    due = torch.autograd.grad(wanted, [twin[id(t)] for t in leaves], g.double()) if leaves else []
    for leaf, one, other in zip(leaves, grads, due, strict=True):
        assert (one.shape, one.dtype) == (leaf.shape, leaf.dtype)
        assert torch.allclose(one.double(), other, rtol=0, atol=limit)


@pytest.mark.parametrize("shape", [(1, 1), (3, 4)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_few_tokens_have_the_bits_of_the_same_tokens_in_training(dtype, shape) -> None:
    layer = li.inject(nn.Sequential(nn.Linear(5, 6)), {"rank": 2, "targets": ["0"]})[0].to(dtype)
    nn.init.normal_(layer.get_parameter("lora_B__default"))
    x = torch.randn(*shape, 10, dtype=dtype)[..., ::2]  # not contiguous
    wanted = layer(x)
    with torch.no_grad():
        assert same_bits(layer.eval()(x), wanted)


PROBLEMS: dict[str, dict[str, Any]] = {
    "plain": {},
    "slices": {"spans": ((0, 2), (3, 6))},
    "slices of conv1d": {"transposed": True, "spans": ((0, 1), (4, 6))},
    "dropout": {"dropout": 0.4},
    "little dropout": {"dropout": 0.1},
    "dropout in slices": {"dropout": 0.4, "spans": ((0, 2), (3, 6))},
}


@pytest.mark.parametrize("path", ["fused", "fused, not on a CPU", "general"])
@pytest.mark.parametrize("name", PROBLEMS)
def test_both_derivatives_by_finite_differences(name, path, monkeypatch) -> None:
    """x, W, bias, and both factors of two updates, one of which takes an entry from the other."""
    if "not on a CPU" in path:
        monkeypatch.setattr(cpu, "is_cpu", lambda _: False)
    options = dict(PROBLEMS[name])
    transposed = options.pop("transposed", False)
    spans = options.get("spans", ((0, 6),))
    rows, width = 2 * len(spans), sum(stop - start for start, stop in spans)
    weight = (3, 6) if transposed else (6, 3)
    shapes = [(20, 3), weight, (6,), (rows, 3), (width, 2), (1, 3), (6, 1)]
    leaves = [torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in shapes]

    def run(*tensors: Tensor) -> Tensor:
        x, weight, bias, A, B, A2, B2 = tensors
        updates = [Update(A, B, 0.7, **options), Update(A2, B2, -1.3)]
        torch.manual_seed(4)
        if path.startswith("fused"):
            return linear(x, weight, bias, updates, transposed=transposed)
        y = F.linear(x, weight.t() if transposed else weight, bias)
        return add_updates(y, x, updates)

    # fast_mode: a random projection sees a wrong entry as well
    assert torch.autograd.gradcheck(run, leaves, fast_mode=True)
    assert torch.autograd.gradgradcheck(run, leaves, fast_mode=True)
    both = [
        torch.autograd.grad(run(*leaves).cos().sum(), leaves, create_graph=graph)
        for graph in (False, True)
    ]
    assert all(error(one, other) < 1e-12 for one, other in zip(*both, strict=True))


def test_embedding_derivatives_by_finite_differences() -> None:
    ids, W = torch.tensor([[0, 2], [2, 4]]), torch.randn(5, 3, dtype=torch.float64)
    A, B = (torch.randn(s, dtype=torch.float64, requires_grad=True) for s in ((2, 5), (3, 2)))

    def run(A: Tensor, B: Tensor, padding_idx: int | None = None) -> Tensor:
        return embedding(F.embedding(ids, W), ids, [Update(A, B, 0.7)], padding_idx)

    assert torch.autograd.gradcheck(run, (A, B))
    assert torch.autograd.gradgradcheck(run, (A, B))
    run(A, B, 2).sum().backward()  # with padding the gradient is zero there by definition
    assert not A.grad[:, 2].any()
    assert A.grad[:, 0].all()


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

    grads = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0))(adapters, x)
    for i, sample in enumerate(x):
        wanted = torch.autograd.grad(
            (model(sample.unsqueeze(0)) - 1).square().sum(), list(adapters.values())
        )
        for name, gradient in zip(adapters, wanted, strict=True):
            if gradient.any():
                assert error(grads[name][i], gradient) < 1e-12


# torch itself scripts its forward-mode rules when they are first needed.
@pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated:DeprecationWarning")
@pytest.mark.parametrize(
    "kind", ["linear", "equal slices of conv1d", "embedding", "conv 2d", "experts"]
)
def test_forward_mode_is_right_or_refused(kind: str) -> None:
    model = injected(KINDS[kind], torch.float64)
    inputs = KINDS[kind].inputs(torch.float64)
    adapters = {n: p.detach() for n, p in model.named_parameters() if p.requires_grad}
    tangents = {n: torch.randn_like(p) for n, p in adapters.items()}

    def run(parameters: dict[str, Tensor]) -> Tensor:
        return torch.func.functional_call(model, parameters, inputs)

    _, slope = torch.func.jvp(run, (adapters,), (tangents,))
    step = 1e-6
    above, below = (
        run({n: p + sign * step * tangents[n] for n, p in adapters.items()}) for sign in (1, -1)
    )
    assert error(slope, (above - below) / (2 * step)) < 1e-7


def test_inputs_that_changed_before_the_backward_are_refused_and_outputs_may_change() -> None:
    model = injected(KINDS["linear"], torch.float64)
    x = torch.randn(2, 5, dtype=torch.float64)
    y = model(x)
    x.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()
    x.requires_grad_()
    one, other = (
        torch.autograd.grad(z.sum(), x)[0] for z in (model(x).relu_(), torch.relu(model(x)))
    )
    assert torch.equal(one, other)


@pytest.mark.parametrize("p", [0.1, 0.5])
@pytest.mark.parametrize("grad", [True, False])
def test_dropout_is_on_the_input_of_a(p: float, grad: bool) -> None:
    """W is zero and B A the identity, so the output is the dropped input itself."""
    config = {"rank": 6, "alpha": 6, "dropout": p, "targets": ["layer"]}
    model, x = li.inject(Host(nn.Linear(6, 6, bias=False)), config), torch.rand(2000, 6) + 0.5
    nn.init.zeros_(model.layer.get_parameter("weight"))
    for parameter in li.adapter_parameters(model).values():
        nn.init.eye_(parameter)
    with torch.set_grad_enabled(grad):
        y = model(x).detach()
    dropped = y == 0
    assert torch.allclose(y[~dropped], (x / (1 - p))[~dropped])
    # Elements are dropped independently: whole rows and whole columns are not.
    by_row, by_column = dropped.double().mean(1), dropped.double().mean(0)
    assert (by_column - p).abs().max() < 5 * (p * (1 - p) / 2000) ** 0.5
    assert abs(float(by_row.var()) / (p * (1 - p) / 6) - 1) < 0.25
    assert same_bits(model.eval()(x), x)


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


@pytest.mark.parametrize("kind", [*MATRICES, "unequal slices of conv1d"])
@pytest.mark.parametrize("routed", [False, True])
def test_compute_float32_keeps_gradients_right_over_a_16_bit_base(kind: str, routed: bool) -> None:
    errors = {}
    for compute in ("base", "float32"):
        torch.manual_seed(0)
        plain, model, leaves = pair(kind, torch.bfloat16, compute=compute)
        x = torch.randn(4, 30, 5).bfloat16()
        with li.routed(model, ["default"] * 4) if routed else nullcontext():
            y = model(x)
        assert y.dtype == torch.bfloat16
        g = torch.randn_like(y)
        y.backward(g)
        twins = doubled(leaves)
        dense_output(KINDS[kind], plain, *twins, [x]).backward(g.double())
        errors[compute] = max(error(t.grad, w.grad) for t, w in zip(leaves, twins, strict=True))
    assert errors["float32"] < 1e-6
    assert errors["base"] > 1e-4


@pytest.mark.parametrize("kind", ["parameter", "experts"])
def test_compute_float32_reads_a_16_bit_parameter_in_float32(kind: str) -> None:
    plain, model, leaves = pair(kind, torch.bfloat16, compute="float32")
    inputs = KINDS[kind].inputs(torch.float32)
    y = model(*inputs)
    assert y.dtype == torch.float32
    assert error(y, dense_output(KINDS[kind], plain, *doubled(leaves), inputs)) < 1e-6


@pytest.mark.parametrize(
    "kind", [*MATRICES, "embedding", "conv 2d", "activation inside", "parameter", "experts"]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_autocast(kind: str, dtype: torch.dtype) -> None:
    plain, model, leaves = pair(kind, dtype)
    inputs = KINDS[kind].inputs(dtype)
    with torch.autocast("cpu", torch.bfloat16):
        y, plain_y = model(*inputs), plain(*inputs)
    assert y.dtype == plain_y.dtype
    g = torch.randn_like(y)
    y.backward(g)
    twins = doubled(leaves)
    wanted = dense_output(KINDS[kind], plain, *twins, inputs)
    wanted.backward(g.double())
    limit = 2 * TOLERANCE[torch.bfloat16]
    assert error(y, wanted) < limit
    for leaf, twin in zip(leaves, twins, strict=True):
        assert leaf.grad.dtype == torch.float32
        assert error(leaf.grad, twin.grad) < limit


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
    scale = spec.alpha / divisor
    deltas = [dense([Update(a, b, scale, spans)], spec.out_features) for a, b in banks]
    delta = torch.stack(deltas) if spec.experts is not None else deltas[0]
    return delta.mT if spec.transposed else delta


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
    delta_rows = Delta([Patch(spec, A, B)], torch.promote_types(dtype, torch.float32))
    halves = [(matrix[:cut], 0), (matrix[cut:], cut)]
    merged = [fold_rows(*half, delta_rows, Tally()) for half in halves]
    folded = torch.cat(merged).view(W.shape)
    assert same_bits(W, bits), "the rows that were given are never written"
    assert ((folded.double() - exact).abs() <= bound).all()
    assert same_bits(folded[delta == 0], W[delta == 0])


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
