"""The arithmetic of one layer: any shape, layout, mix and derivative that it is asked for.

References are dense float64 formulas written here, and finite differences.
"""

import copy
import itertools
import math
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from conftest import TOLERANCE, error, fill, same_bits
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import lora_inject as li
from contract.kinds import KINDS, Host, Kind, conv1d, dense_output, dense_weight, host, injected

OF_EACH_WAY = ["linear", "equal slices of conv1d", "embedding", "conv 2d", "experts"]
MATRICES = ["linear", "conv1d", "equal slices"]
SEEDS = st.integers(0, 9999)
SPANS = [(), ((0, 2), (3, 6)), ((1, 2),), ((0, 6),), ((1, 3), (4, 6))]


def pair(kind: str, dtype: torch.dtype, **more: Any) -> tuple[Host, Host, list[nn.Parameter]]:
    """A plain host, an adapted copy of it, and the A and B of the copy."""
    plain = host(KINDS[kind], dtype)
    model = fill(li.inject(copy.deepcopy(plain), {**KINDS[kind].config, **more}))
    return plain, model, list(li.adapter_parameters(model).values())


def doubled(leaves: list[Any]) -> list[Tensor]:
    return [t.detach().double().requires_grad_() for t in leaves]


def sliced(spans: tuple[tuple[int, int], ...]) -> dict[str, Any]:
    """The rule that adapts these of six outputs."""
    if not spans:
        return {}
    cuts = sorted({0, 6, *(end for span in spans for end in span)})
    slices = {f"s{start}": stop - start for start, stop in itertools.pairwise(cuts)}
    return {"slices": slices, "adapt": [f"s{start}" for start, _ in spans]}


@st.composite
def problems(draw: st.DrawFn) -> dict[str, Any]:
    updates = st.tuples(st.sampled_from(SPANS), st.floats(-2, 2))
    return {
        "lead": draw(st.sampled_from([(), (1,), (3,), (2, 3), (0,), (2, 0), (2, 1, 2)])),
        "n_in": draw(st.integers(1, 6)),
        "transposed": draw(st.booleans()),
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


ONE_TOKEN: dict[str, Any] = {"lead": (), "n_in": 1, "layout": "contiguous", "train": set()}
ONE_TOKEN |= {"transposed": False, "updates": [((), 1.0)]}


@settings(max_examples=120, deadline=None)
@given(
    problem=problems(), dtype=st.sampled_from(list(TOLERANCE)), float32=st.booleans(), seed=SEEDS
)
@example(problem=ONE_TOKEN, dtype=torch.float64, float32=False, seed=0)
@example(problem={**ONE_TOKEN, "train": {"A"}}, dtype=torch.float64, float32=False, seed=0)
def test_a_linear_layer_is_the_dense_one_for_any_mix_shape_and_layout(
    problem: dict[str, Any], dtype: torch.dtype, float32: bool, seed: int
) -> None:
    torch.manual_seed(seed)
    n_in, turned, train = problem["n_in"], problem["transposed"], problem["train"]
    layer = (conv1d(6, n_in) if turned else nn.Linear(n_in, 6)).to(dtype)
    base, model = dict(layer.named_parameters()), nn.Sequential(layer)
    mix, terms = {}, []
    for i, (spans, weight) in enumerate(problem["updates"]):
        rule = {"match": "0", **sliced(spans)}
        config = {"rank": 2, "alpha": 3, "compute": "float32" if float32 else "base"}
        li.inject(model, {**config, "targets": [rule]}, f"a{i}")
        A, B = li.adapter_parameters(fill(model, f"a{i}"), f"a{i}").values()
        mix[f"a{i}"] = weight
        terms.append((Kind(nn.Module, (n_in, 6), spans=spans, transposed=turned), weight, A, B))
    li.activate(model, mix)
    x = input_of(problem["lead"], n_in, problem["layout"], dtype)
    named = [("x", x), *base.items()]
    named += [(role, t) for _, _, A, B in terms for role, t in (("A", A), ("B", B))]
    for name, tensor in named:
        tensor.requires_grad_(name in train)
    twins = {id(t): t.detach().double().requires_grad_(name in train) for name, t in named}
    leaves = [t for name, t in named if name in train]

    y = model(x)
    with torch.no_grad():
        assert same_bits(model(x), y), "with and without gradients"
    W = total = twins[id(base["weight"])]
    size = float(W.detach().norm()) + 1
    for kind, weight, A, B in terms:
        roles = {"A": twins[id(A)], "B": twins[id(B)]}
        total = total + weight * (dense_weight(kind, W, roles) - W)
        size += float(abs(1.5 * weight) * (B.norm() * A.norm()).detach())
    wanted = F.linear(twins[id(x)], total.t() if turned else total, twins[id(base["bias"])])
    # A result may be small by cancellation: errors are relative to the size of what is summed.
    largest = float(x.detach().abs().max()) if x.numel() else 0.0
    bound = TOLERANCE[dtype] * (size * largest + float(base["bias"].detach().abs().max()))
    assert (y.shape, y.dtype, y.requires_grad) == (wanted.shape, dtype, bool(leaves))
    assert torch.allclose(y.double(), wanted, rtol=0, atol=bound)
    if not leaves:
        return
    g = torch.randn(y.shape).to(dtype)
    limit = TOLERANCE[dtype] * max(1, math.prod(problem["lead"])) * size * 8
    found = torch.autograd.grad(y, leaves, g, allow_unused=True)
    due = torch.autograd.grad(wanted, [twins[id(t)] for t in leaves], g.double())
    for leaf, one, other in zip(leaves, found, due, strict=True):
        if one is None:
            assert not other.any(), "its weight is zero"
            continue
        assert (one.shape, one.dtype) == (leaf.shape, leaf.dtype)
        assert torch.allclose(one.double(), other, rtol=0, atol=limit)


DERIVATIVES: dict[str, dict[str, Any]] = {
    "plain": {},
    "slices": {"spans": ((0, 2), (3, 6))},
    "slices of conv1d": {"transposed": True, "spans": ((0, 1), (4, 6))},
    "dropout": {"dropout": 0.4},
    "dropout in slices": {"dropout": 0.4, "spans": ((0, 2), (3, 6))},
}


@pytest.mark.parametrize("trained", ["", "x", "A__one", "B__one", "bias"])
@pytest.mark.parametrize("name", DERIVATIVES)
def test_both_derivatives_by_finite_differences(name: str, trained: str) -> None:
    """Of x, W, the bias, and both factors of two adapters; or of x and what else trains alone."""
    options = dict(DERIVATIVES[name])
    layer = conv1d(6, 3) if options.pop("transposed", False) else nn.Linear(3, 6)
    rule = {"match": "0", **sliced(options.pop("spans", ())), **options}
    model = nn.Sequential(layer.double())
    fill(li.inject(model, {"rank": 2, "alpha": 1.4, "targets": [rule]}, "one"), "one")
    fill(li.inject(model, {"rank": 1, "alpha": 1, "targets": ["0"]}, "two"), "two")
    li.activate(model, {"one": 1.0, "two": -1.3})
    named = [*model.named_parameters()]
    names = [each for each, _ in named]
    leaves = [torch.randn(20, 3, dtype=torch.float64, requires_grad=True)]
    leaves += [p.detach().clone().requires_grad_(each.endswith(trained)) for each, p in named]

    def run(x: Tensor, *tensors: Tensor) -> Tensor:
        torch.manual_seed(4)
        return torch.func.functional_call(model, dict(zip(names, tensors, strict=True)), (x,))

    # fast_mode: a random projection sees a wrong entry as well
    assert torch.autograd.gradcheck(run, leaves, fast_mode=True)
    assert torch.autograd.gradgradcheck(run, leaves, fast_mode=True)
    wanted = [leaf for leaf in leaves if leaf.requires_grad]
    both = [
        torch.autograd.grad(run(*leaves).cos().sum(), wanted, create_graph=graph)
        for graph in (False, True)
    ]
    assert all(error(one, other) < 1e-12 for one, other in zip(*both, strict=True))


@pytest.mark.parametrize("padding_idx", [None, 2])
def test_derivatives_of_an_embedding_by_finite_differences(padding_idx: int | None) -> None:
    ids = torch.tensor([[0, 2], [2, 4]])
    model = nn.Sequential(nn.Embedding(5, 3, padding_idx=padding_idx).double())
    fill(li.inject(model, {"rank": 2, "alpha": 1.4, "targets": ["0"]}))
    A, B = li.adapter_parameters(model).values()
    names = [name for name, p in model.named_parameters() if p.requires_grad]

    def run(*tensors: Tensor) -> Tensor:
        return torch.func.functional_call(model, dict(zip(names, tensors, strict=True)), (ids,))

    if padding_idx is None:
        assert torch.autograd.gradcheck(run, (A, B))
        assert torch.autograd.gradgradcheck(run, (A, B))
    model(ids).sum().backward()  # with padding the gradient is zero there by definition
    assert bool(A.grad[:, 2].any()) is (padding_idx is None)
    assert A.grad[:, 0].all()


@pytest.mark.parametrize("kind", OF_EACH_WAY)
def test_gradients_of_each_sample_are_those_of_one_backward_for_each(kind: str) -> None:
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


@pytest.mark.filterwarnings("ignore:There is a performance drop:UserWarning")
@pytest.mark.parametrize("kind", [*OF_EACH_WAY, "equal slices"])
@pytest.mark.parametrize("by", ["is_grads_batched", "vmap"])
def test_a_batch_of_gradients_is_one_backward_for_each(kind: str, by: str) -> None:
    """As `functional.jacobian(vectorize=True)` asks for them."""
    model, row = injected(KINDS[kind], torch.float64), KINDS[kind]
    y = model(*row.inputs(torch.float64))
    leaves, gs = list(li.adapter_parameters(model).values()), torch.randn(3, *y.shape).double()

    def backward(g: Tensor, **more: Any) -> tuple[Tensor, ...]:
        return torch.autograd.grad(y, leaves, g, retain_graph=True, **more)

    found = torch.vmap(backward)(gs) if by == "vmap" else backward(gs, is_grads_batched=True)
    for one, each in zip(found, zip(*map(backward, gs), strict=True), strict=True):
        assert error(one, torch.stack(each)) < 1e-12


@pytest.mark.parametrize("kind", OF_EACH_WAY)
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


@pytest.mark.parametrize("kind", MATRICES)
def test_inputs_that_changed_before_the_backward_are_refused_and_outputs_may_change(
    kind: str,
) -> None:
    model = injected(KINDS[kind], torch.float64)
    x = torch.randn(2, 3, 5, dtype=torch.float64)
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


# How a stack `(3, 16, 16)` is used, each matrix for its own rows of x `(3, 4, 16)`.
STACK_USES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "matmul": lambda x, w: x @ w.mT,
    "bmm": lambda x, w: torch.bmm(x, w.mT),
    "bmm, the stack first": lambda x, w: torch.bmm(w, x.mT).mT,
    "some of them": lambda x, w: x @ w[torch.arange(3)].mT,
    "one by one": lambda x, w: torch.stack([F.linear(*both) for both in zip(x, w, strict=True)]),
    "in groups": lambda x, w: torch._grouped_mm(
        x.flatten(0, 1), w.mT, offs=torch.tensor([4, 8, 12], dtype=torch.int32)
    ).view(3, 4, 16),
}


class Stack(nn.Module):
    """A stack of zeros, whose product is the update alone."""

    def __init__(self, use: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.up = nn.Parameter(torch.zeros(3, 16, 16, dtype=torch.bfloat16))
        self.use = use

    def forward(self, x: Tensor) -> Tensor:
        return self.use(x, self.up)


@pytest.mark.parametrize("share", [None, "A", "B"])
@pytest.mark.parametrize("use", STACK_USES)
def test_compute_float32_reaches_every_product_with_a_stack(use: str, share: str | None) -> None:
    errors: dict[str, list[float]] = {}
    for compute in ("base", "float32"):
        torch.manual_seed(0)
        rule = {"match": "up", "layout": "out_in", **({"share": share} if share else {})}
        model = Stack(STACK_USES[use])
        fill(li.inject(model, {"rank": 3, "alpha": 6, "compute": compute, "targets": [rule]}))
        leaves = list(li.adapter_parameters(model).values())
        x = torch.randn(3, 4, 16).bfloat16().requires_grad_()
        wide, A, B = doubled([x, *leaves])
        wanted = 2.0 * wide @ A.mT @ B.mT
        with torch.no_grad():
            y = model(x)
        assert (y.dtype, same_bits(model(x), y)) == (torch.bfloat16, True)
        g = torch.randn(3, 4, 16).bfloat16()
        found = torch.autograd.grad(model(x), leaves, g)
        due = torch.autograd.grad(wanted, [A, B], g.double())
        # Half an eps of the value is the rounding of the output itself.
        off = (y.double() / wanted.detach() - 1).abs().max() / torch.finfo(y.dtype).eps
        errors[compute] = [float(off), *map(error, found, due)]
    assert errors["float32"][0] < 0.51 < errors["base"][0]
    assert max(errors["float32"][1:]) < 1e-6
    assert min(errors["base"][1:]) > 1e-4


@pytest.mark.parametrize("tokens", [1, 33])
def test_the_low_rank_of_a_16_bit_base_is_in_16_bits_for_any_number_of_tokens(tokens: int) -> None:
    # In float32 256 (1 + 2^-10) - 256 is 1/4, and in bfloat16 it is 0: exactly, in any order.
    model = nn.Sequential(nn.Linear(2, 1, bias=False, dtype=torch.bfloat16))
    nn.init.zeros_(model[0].weight)
    li.inject(model, {"rank": 1, "alpha": 1.0, "compute": "base", "targets": ["0"]})
    factors = li.adapter_parameters(model)
    with torch.no_grad():
        factors["0.lora_A"].copy_(torch.tensor([[1 + 2**-10, -1.0]]))
        factors["0.lora_B"].fill_(1.0)
    x = torch.full((tokens, 2), 256.0, dtype=torch.bfloat16)
    for mode in (torch.no_grad, torch.enable_grad):
        with mode():
            assert torch.equal(model(x), torch.zeros(tokens, 1, dtype=torch.bfloat16))


@pytest.mark.parametrize("compute", ["base", "float32"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rule", [{}, {"slices": ["q", "k"], "adapt": ["q"]}])
def test_inside_autocast_a_forward_without_gradients_is_one_with_them_to_the_bit(
    dtype: torch.dtype, rule: dict[str, Any], compute: str
) -> None:
    config = {"rank": 2, "compute": compute, "targets": [{"match": "layer", **rule}]}
    model = fill(li.inject(Host(nn.Linear(4, 6)).to(dtype), config))
    x = torch.randn(5, 4, dtype=dtype)
    with torch.autocast("cpu", torch.bfloat16):
        wanted = model(x)
        with torch.no_grad():
            assert torch.equal(model(x), wanted)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rule", [{}, {"dropout": 0.5}, {"slices": ["q", "k"], "adapt": ["q"]}])
def test_a_backward_inside_autocast_gives_the_gradients_of_one_outside(
    dtype: torch.dtype, rule: dict[str, Any]
) -> None:
    config = {"rank": 2, "compute": "float32", "targets": [{"match": "layer", **rule}]}
    model = fill(li.inject(Host(nn.Linear(4, 6)).to(dtype), config))
    x = torch.randn(5, 4, dtype=dtype, requires_grad=True)
    leaves, gradients = [x, *li.adapter_parameters(model).values()], []
    for inside in (True, False):
        torch.manual_seed(1)
        with torch.autocast("cpu", torch.bfloat16):
            loss = model(x).float().square().sum()
        with torch.autocast("cpu", torch.bfloat16, enabled=inside):
            gradients.append(torch.autograd.grad(loss, leaves))
    assert all(torch.equal(got, wanted) for got, wanted in zip(*gradients, strict=True))
