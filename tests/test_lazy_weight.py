"""A weight that is read and formed only where it must be: every way of reading gives W + delta.

The reference is the same code on the dense `W + scale * B @ A` in float64, formed by hand
with its own graph. Whatever is done with the lazy weight must give that value and those gradients;
whether it was formed on the way is told by counting.
"""

import copy
import io
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from conftest import error, fill, same_bits
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import lora_inject as li
from lora_inject.core.functional.factors import Patch
from lora_inject.core.functional.gain import Gain
from lora_inject.core.functional.lazy import LazyWeight, lazy_weight
from lora_inject.core.functional.read_only import ReadOnly
from lora_inject.core.functional.weight import LowRank, effective_weight
from lora_inject.core.spec.sites import SiteSpec
from lora_inject.core.spec.slices import Slices

E, M, N, R, T = 3, 5, 4, 2, 6
SCALE = 2.0
RANK2 = {"rank": R, "alpha": R * SCALE}


def site(layout: str, experts: int | None = E, slices: Slices | None = None) -> SiteSpec:
    """A site whose weight is `(E, M, N)`, or `(M, N)`: out_in or in_out."""
    out, n_in = (M, N) if layout == "out_in" else (N, M)
    shape = (M, N) if experts is None else (experts, M, N)
    return SiteSpec(
        "w", "parameter", n_in, out, shape, R, R * SCALE, layout == "in_out", experts, slices=slices
    )


def equal(found: Tensor, wanted: Tensor) -> bool:
    return torch.allclose(found, wanted, rtol=1e-12, atol=1e-12)


class Case:
    """A weight and one or more updates, lazily and by hand, on the same leaves."""

    def __init__(self, *specs: SiteSpec, weights: tuple[float, ...] = (1.0,)) -> None:
        torch.manual_seed(0)
        self.W = torch.randn(specs[0].weight_shape, dtype=torch.float64)
        self.leaves: list[Tensor] = []
        self.updates: list[Patch] = []
        for spec, weight in zip(specs, weights, strict=True):
            A = torch.randn(spec.a_shape, dtype=torch.float64, requires_grad=True)
            B = torch.randn(spec.b_shape, dtype=torch.float64, requires_grad=True)
            self.leaves += [A, B]
            self.updates.append(Patch(spec, A, B, weight))

    def lazy(self) -> Tensor:
        """The weight as a forward reads it."""
        found = lazy_weight(self.W, self.updates, float32=False)
        assert type(found) is LazyWeight
        return found

    def dense(self) -> Tensor:
        """The formula, one expert and one slice at a time."""
        total = self.W
        for spec, A, B, weight in self.updates:
            pairs = zip(A, B, strict=True) if spec.experts else [(A, B)]
            deltas = [self._delta(spec, a, b) for a, b in pairs]
            total = total + spec.scale * weight * (
                torch.stack(deltas) if spec.experts else deltas[0]
            )
        return total

    @staticmethod
    def _delta(spec: SiteSpec, a: Tensor, b: Tensor) -> Tensor:
        rows, row = torch.zeros(spec.out_features, spec.in_features, dtype=a.dtype), 0
        for part, (start, stop) in enumerate(spec.spans):
            piece = b[row : row + stop - start] @ a[part * R : (part + 1) * R]
            rows = rows.index_add(0, torch.arange(start, stop), piece)
            row += stop - start
        return rows.t() if spec.transposed else rows

    def compare(self, use: Callable[..., Tensor], *inputs: Tensor) -> None:
        """Check values, and gradients of every A and B and of every input."""
        leaves = [*self.leaves, *(x for x in inputs if x.requires_grad)]
        found, wanted = use(self.lazy(), *inputs), use(self.dense(), *inputs)
        assert type(found) is Tensor
        assert (found.shape, found.dtype) == (wanted.shape, wanted.dtype)
        assert equal(found, wanted)
        torch.manual_seed(1)
        weights = torch.randn_like(wanted)
        for one, other in zip(
            torch.autograd.grad(found, leaves, weights, allow_unused=True),
            torch.autograd.grad(wanted, leaves, weights, allow_unused=True),
            strict=True,
        ):
            if one is None or other is None:  # nothing, or zeros
                assert one is other or not (other if one is None else one).any()
            else:
                assert equal(one, other)


@pytest.fixture
def formed(monkeypatch: pytest.MonkeyPatch) -> list[LowRank]:
    """What has been formed since."""
    found: list[LowRank] = []
    real = LowRank.formed
    monkeypatch.setattr(LowRank, "formed", lambda self, d: found.append(self) or real(self, d))
    return found


def tokens(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, requires_grad=True)


ENDS = torch.tensor([2, 2, 5], dtype=torch.int32)  # one group is empty, one row is behind the last
IDS = torch.tensor([2, 0, 2, 1, 2, -1])


def grouped(x: Tensor, stack: Tensor) -> Tensor:
    """`F.grouped_mm` takes no float64: what transformers puts in its place does."""
    import transformers.integrations.moe  # noqa: F401 - registers the operation

    return torch.ops.transformers.grouped_mm_fallback(x, stack, ENDS)


# Name to what is done with the weight (E, M, N), and the shape of the input.
THIN_STACK: dict[str, tuple[Callable[..., Tensor], tuple[int, ...]]] = {
    "linear": (lambda w, x: F.linear(x, w[1]), (T, N)),
    "linear with a bias": (lambda w, x: F.linear(x, w[1], torch.ones(M).double()), (T, N)),
    "linear, three dimensions": (lambda w, x: F.linear(x, w[1]), (2, T, N)),
    "linear, one dimension": (lambda w, x: F.linear(x, w[1]), (N,)),
    "linear, no rows": (lambda w, x: F.linear(x, w[1]), (0, N)),
    "linear, last expert": (lambda w, x: F.linear(x, w[-1]), (T, N)),
    "linear, index is a tensor": (lambda w, x: F.linear(x, w[torch.tensor(2)]), (T, N)),
    "linear, turned twice": (lambda w, x: F.linear(x, w.mT[1].T), (T, N)),
    "linear, in_out": (lambda w, x: F.linear(x, w[1].t()), (T, M)),
    "every expert": (lambda w, x: torch.stack([F.linear(x, w[e]) for e in (2, 0, 1)]), (T, N)),
    "an expert twice": (lambda w, x: F.linear(x @ w[1], w[1]), (T, M)),
    "iterated": (lambda w, x: torch.stack([x @ m for m in w]), (T, M)),
    "unbound": (lambda w, x: torch.stack([x @ m for m in w.unbind(0)]), (T, M)),
    "unbound by torch": (lambda w, x: torch.stack([x @ m for m in torch.unbind(w)]), (T, M)),
    "matmul": (lambda w, x: x @ w[1], (T, M)),
    "matmul, turned": (lambda w, x: x @ w[1].T, (T, N)),
    "matmul, mm": (lambda w, x: torch.mm(x, w[1].transpose(0, 1)), (T, N)),
    "matmul, method": (lambda w, x: x.mm(w[0].t()).matmul(w[2]), (T, N)),
    "matmul from the left": (lambda w, x: w[1] @ x, (N, T)),
    "matmul from the left, turned": (lambda w, x: torch.matmul(w[1].mT, x), (M, T)),
    "addmm": (lambda w, x: torch.addmm(torch.ones(N).double(), x, w[1]), (T, M)),
    "bmm": (lambda w, x: torch.bmm(x, w), (E, T, M)),
    "bmm, turned": (lambda w, x: x.bmm(w.transpose(-2, -1)), (E, T, N)),
    "bmm, turned by other names": (lambda w, x: x @ torch.transpose(w, 2, 1), (E, T, N)),
    "bmm from the left": (lambda w, x: w.bmm(x), (E, N, T)),
    "stack against one matrix": (lambda w, x: x @ w, (T, M)),
    "stack in four dimensions": (lambda w, x: x @ w, (2, E, T, M)),
    "gathered": (lambda w, x: torch.bmm(w[IDS], x.unsqueeze(-1)).squeeze(-1), (T, N)),
    "gathered, in_out": (lambda w, x: torch.bmm(x.unsqueeze(1), w[IDS]).squeeze(1), (T, M)),
    "grouped": (lambda w, x: grouped(x, w)[:5], (T, M)),
    "grouped, turned": (lambda w, x: grouped(x, w.transpose(-2, -1))[:5], (T, N)),
    "to what it is": (lambda w, x: x @ w.to(x.dtype)[1].to(x.device), (T, M)),
}
FORMS_STACK: dict[str, tuple[Callable[..., Tensor], tuple[int, ...]]] = {
    "sum": (lambda w, x: w.sum() * x, (T,)),
    "plus": (lambda w, x: w[1] + x, (M, N)),
    "another plus": (lambda w, x: x + w, (E, M, N)),
    "clone": (lambda w, x: w.clone() * x, (E, M, N)),
    "stacked again": (lambda w, x: torch.stack([w[0], w[2]]) @ x, (N, T)),
    "vector from the left": (lambda w, x: x @ w[1], (M,)),
    "vector from the right": (lambda w, x: w @ x, (N,)),
    "rows of a matrix": (lambda w, x: x @ w[1][1:3].T, (T, N)),
    "two indices": (lambda w, x: x @ w[0, :, 1:], (T, M)),
    "chunks": (lambda w, x: F.linear(x, w[1].chunk(2)[1]), (T, N)),
    "a mask": (lambda w, x: x @ w[torch.tensor([True, False, True])], (T, M)),
    "a permutation": (lambda w, x: torch.einsum("ti,oei->teo", x, w.permute(1, 0, 2)), (T, N)),
    "reshaped": (lambda w, x: x @ w.view(E * M, N).T, (T, N)),
    "einsum": (lambda w, x: torch.einsum("ti,eoi->teo", x, w), (T, N)),
    "einsum, twice": (lambda w, x: torch.einsum("eio,eoj,ti->etj", w, w.mT, x), (T, M)),
    "weight times weight": (lambda w, x: x @ (w[1] @ w[2].T), (T, M)),
    "as an input": (lambda w, x: F.linear(w[1], x), (T, N)),
    "convolution": (lambda w, x: F.conv1d(x, w), (2, M, 9)),
    "of another dtype": (lambda w, x: F.linear(x.float(), w[1].float()).double(), (T, N)),
    "two-sided addmm": (lambda w, x: torch.addmm(x, w[0].T, w[1], beta=0.5, alpha=2), (N, N)),
}
MATRIX: dict[str, tuple[Callable[..., Tensor], tuple[int, ...]]] = {
    "linear": (lambda w, x: F.linear(x, w), (T, N)),
    "linear, three dimensions": (lambda w, x: F.linear(x, w), (2, T, N)),
    "matmul": (lambda w, x: x @ w, (T, M)),
    "matmul, turned": (lambda w, x: x @ w.T, (T, N)),
    "matmul from the left": (lambda w, x: w @ x, (N, T)),
    "addmm": (lambda w, x: torch.addmm(torch.ones(N).double(), x, w), (T, M)),
}


@pytest.mark.parametrize("layout", ["out_in", "in_out"])
@pytest.mark.parametrize("how", THIN_STACK)
def test_products_with_a_stack_are_thin(how: str, layout: str, formed: list[LowRank]) -> None:
    use, shape = THIN_STACK[how]
    Case(site(layout)).compare(use, tokens(*shape))
    assert not formed


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("how", THIN_STACK)
def test_products_are_thin_without_gradients(how: str, mode: Any, formed: list[LowRank]) -> None:
    """In inference mode torch hands on operations such as `.T` whole."""
    use, shape = THIN_STACK[how]
    case, x = Case(site("out_in")), tokens(*shape)
    with mode():
        found = use(case.lazy(), x)
    assert not formed
    assert equal(found, use(case.dense(), x))


@pytest.mark.parametrize("layout", ["out_in", "in_out"])
@pytest.mark.parametrize("how", FORMS_STACK)
def test_everything_else_forms_the_weight(how: str, layout: str, formed: list[LowRank]) -> None:
    use, shape = FORMS_STACK[how]
    Case(site(layout)).compare(use, tokens(*shape))
    assert formed


@pytest.mark.parametrize("layout", ["out_in", "in_out"])
@pytest.mark.parametrize("how", MATRIX)
def test_products_with_one_matrix_are_thin(how: str, layout: str, formed: list[LowRank]) -> None:
    use, shape = MATRIX[how]
    Case(site(layout, experts=None)).compare(use, tokens(*shape))
    assert not formed


@pytest.mark.parametrize("how", ["linear", "bmm", "gathered, in_out", "einsum", "sum"])
def test_several_adapters_weights_slices_and_a_scale_of_zero(how: str) -> None:
    use, shape = (THIN_STACK | FORMS_STACK)[how]
    slices = Slices((("q", 2), ("k", 1), ("v", 2)), ("q", "v"))
    plain, parts = site("out_in"), site("out_in", slices=slices)
    Case(plain, parts, plain, weights=(0.5, -1.5, 0.0)).compare(use, tokens(*shape))
    Case(parts, weights=(0.0,)).compare(use, tokens(*shape))


@pytest.mark.parametrize("how", ["linear", "bmm", "gathered", "einsum", "sum"])
def test_the_gradient_of_a_gradient(how: str) -> None:
    use, shape = (THIN_STACK | FORMS_STACK)[how]
    case, x = Case(site("out_in")), tokens(*shape)
    leaves = [*case.leaves, x]
    twice = []
    for w in (case.lazy(), case.dense()):
        once = torch.autograd.grad(use(w, x).square().sum(), leaves, create_graph=True)
        total = sum(g.sin().sum() for g in once)
        twice.append(torch.autograd.grad(total, leaves))
    for found, wanted in zip(*twice, strict=True):
        assert error(found, wanted) < 1e-12


def test_a_base_that_trains_gets_its_gradient_too() -> None:
    case, x = Case(site("out_in")), tokens(T, N)
    case.W.requires_grad_()
    case.leaves.append(case.W)
    for how in ("linear", "gathered", "einsum", "sum"):
        use, shape = (THIN_STACK | FORMS_STACK)[how]
        case.compare(use, x if shape == (T, N) else tokens(*shape))


# ------------------------------------------------------------------------------ what is asked of it


def test_questions_are_answered_without_forming(formed: list[LowRank]) -> None:
    lazy = Case(site("out_in")).lazy()
    assert isinstance(lazy, Tensor)
    assert lazy.shape == lazy.size() == (E, M, N)
    assert (lazy.ndim, lazy.dim(), len(lazy), lazy.size(1), lazy.numel()) == (3, 3, E, M, E * M * N)
    assert (lazy.dtype, lazy.device.type) == (torch.float64, "cpu")
    assert lazy.requires_grad
    assert not lazy.is_leaf
    assert lazy.is_contiguous()
    assert not lazy.mT.is_contiguous()
    assert lazy[1].T.shape == (N, M)
    assert not formed


def test_what_it_shows_copies_and_saves_is_the_effective_weight() -> None:
    case = Case(site("out_in"))
    with torch.no_grad():
        lazy, wanted = case.lazy(), lazy_weight(case.W, case.updates, float32=False).clone()
    assert equal(wanted, case.dense())
    assert str(lazy) == str(wanted)
    assert torch.equal(lazy, wanted)
    assert lazy.tolist() == wanted.tolist()
    assert (lazy.numpy() == wanted.numpy()).all()
    assert lazy.data_ptr() == lazy.data_ptr() != case.W.data_ptr()
    for copied in (copy.deepcopy(lazy), pickle.loads(pickle.dumps(lazy))):
        assert type(copied) is Tensor
        assert same_bits(copied, wanted)
    for view in (lazy.detach(), lazy.data):
        assert type(view) is ReadOnly
        assert same_bits(view.clone(), wanted)
    file = io.BytesIO()
    torch.save({"w": lazy}, file)
    file.seek(0)
    assert same_bits(torch.load(file)["w"], wanted)


@pytest.mark.parametrize(
    "change",
    [
        lambda w: w.mul_(2),
        lambda w: w[1].T.mul_(2),
        lambda w: w.__setitem__(1, 0.0),
        lambda w: w.__iadd__(1),
        lambda w: torch.add(w, 1, out=w),
        lambda w: setattr(w, "data", w + 1),
    ],
)
def test_a_change_in_place_is_refused(change: Callable[[Tensor], Any]) -> None:
    with pytest.raises(li.LayerError, match="nowhere stored"):
        change(Case(site("out_in")).lazy())


@pytest.mark.parametrize("index", [None, 1, torch.tensor([0, 2])], ids=["all", "one", "some"])
@pytest.mark.parametrize("grad", [True, False])
def test_no_tensor_can_have_its_data_which_are_nowhere(index: Any, grad: bool) -> None:
    """It would have none, and the next read of it would end the process."""
    with torch.set_grad_enabled(grad):
        lazy = Case(site("out_in")).lazy()
        lazy = lazy if index is None else lazy[index]
    for other in (nn.Parameter(torch.zeros(2)), torch.zeros(lazy.shape, dtype=lazy.dtype)):
        before = other.clone()
        with pytest.raises(RuntimeError, match="incompatible tensor type"):
            other.data = lazy
        assert same_bits(other, before)
        other.data = lazy.data.to(other.dtype)
        assert equal(other.double(), lazy.detach().to(other.dtype).double())


def test_torch_is_told_the_device_of_the_weight() -> None:
    lazy = Case(site("out_in", None)).lazy()
    assert (lazy.device.type, lazy.is_cpu, lazy.is_meta, lazy.is_cuda) == (
        "cpu",
        True,
        False,
        False,
    )
    same = (torch.empty_like(lazy), lazy.new_zeros(2), torch.zeros(2, device=lazy.device))
    assert all(t.device.type == "cpu" for t in same)
    assert torch.empty_like(lazy, device="meta").is_meta


@pytest.mark.parametrize("kept", [torch.float32, torch.bfloat16])
def test_autocast_casts_operations_of_the_weight_alone(kept: torch.dtype) -> None:
    W, B, A = torch.randn(M, M).to(kept), torch.randn(M, R), torch.randn(R, M)
    lazy = lazy_weight(W, [Patch(_square(), A, B, 1 / SCALE)], float32=False)
    assert type(lazy) is LazyWeight
    with torch.autocast("cpu", torch.bfloat16):
        for use in (lambda w: w @ w, lambda w: F.mse_loss(w, -w), lambda w: w.sum()):
            found, wanted = use(lazy), use(lazy.clone())
            assert found.dtype == wanted.dtype
            assert error(found.double(), wanted.double()) < 0.02


def _square() -> SiteSpec:
    return SiteSpec("w", "parameter", M, M, (M, M), R, R * SCALE)


def test_a_hook_sees_the_gradient_of_the_sum() -> None:
    case, x = Case(site("out_in")), tokens(T, N)
    lazy = case.lazy()
    seen: list[Tensor] = []

    class Hooked(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            lazy.register_hook(seen.append)
            return F.linear(x, lazy[1])

    Hooked()(x).sum().backward()
    assert len(seen) == 1
    assert not seen[0][0].any()
    assert error(seen[0][1], x.detach().sum(0).expand(M, N)) < 1e-12


class Opaque(torch.autograd.Function):
    """A product that torch cannot look into, as a custom kernel is."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, w: Tensor) -> Tensor:
        ctx.save_for_backward(x, w)
        return x @ w.T

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, Tensor]:
        x, w = ctx.saved_tensors
        return g @ w, g.T @ x


@pytest.mark.parametrize("view", [lambda w: w[1], lambda w: w.mT[2].T], ids=["expert", "turned"])
def test_a_custom_function_finds_the_effective_weight(view: Callable[[Tensor], Tensor]) -> None:
    Case(site("out_in")).compare(lambda w, x: Opaque.apply(x, view(w)), tokens(T, N))
    Case(site("out_in", None)).compare(lambda w, x: Opaque.apply(x, w), tokens(T, N))


def test_a_custom_function_finds_the_gain() -> None:
    case, x = Case(site("out_in", None)), tokens(T, N)
    m = torch.rand(M, dtype=torch.float64, requires_grad=True)
    gain = Gain(lambda tensors, norms: tensors["m"] / norms.detach(), {"m": m}, ((0, M),))
    found = lazy_weight(case.W, case.updates, float32=False, gain=gain)
    wanted = effective_weight(case.W, case.updates, float32=False, gain=gain)
    leaves, outputs = [*case.leaves, m, x], [Opaque.apply(x, found), x @ wanted.T]
    assert type(found) is LazyWeight
    assert equal(*outputs)
    for pair in zip(*(torch.autograd.grad(y.sum(), leaves) for y in outputs), strict=True):
        assert equal(*pair)


def test_beneath_autograd_the_weight_is_formed() -> None:
    case, x = Case(site("out_in")), tokens(T, N)

    def beneath(w: Tensor, x: Tensor) -> Tensor:
        with torch._C.DisableTorchFunctionSubclass():
            return x @ w[1].T

    case.compare(beneath, x)
    lazy = case.lazy()
    with (
        torch._C.DisableTorchFunctionSubclass(),
        torch.no_grad(),
        pytest.raises(li.LayerError, match="nowhere stored"),
    ):
        lazy.mul_(2)


def test_an_adapter_that_changed_since_is_noticed() -> None:
    case, x = Case(site("out_in")), tokens(T, N)
    lazy = case.lazy()
    expert = lazy[1]
    with torch.no_grad():
        case.leaves[0].mul_(2)
    for late in (lambda: F.linear(x, lazy[1]), lambda: F.linear(x, expert), lambda: lazy + 1):
        with pytest.raises(li.LayerError, match="changed since"):
            late()


def test_errors_are_those_of_a_plain_weight() -> None:
    lazy, dense = Case(site("out_in")).lazy(), Case(site("out_in")).dense()
    for wrong in (
        lambda w: F.linear(torch.ones(T, M), w[1]),
        lambda w: torch.ones(T, M, dtype=torch.float64) @ w[1].T,
        lambda w: torch.mm(torch.ones(T, M, dtype=torch.float64), w),
        lambda w: w[E],
        lambda w: torch.bmm(torch.ones(2, T, M, dtype=torch.float64), w),
    ):
        with pytest.raises((RuntimeError, IndexError)) as wanted:
            wrong(dense)
        with pytest.raises(type(wanted.value)):
            wrong(lazy)


# ----------------------------------------------------------------------------------- within a model


class Experts(nn.Module):
    """A stack of experts that can be read in many ways, and told which."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.randn(E, M, N, dtype=torch.float64))
        self.seen: list[type] = []
        self.use: Callable[..., Tensor] = lambda w, x: F.linear(x, w[1])

    def forward(self, x: Tensor) -> Tensor:
        self.seen.append(type(self.w))
        return self.use(self.w, x)


# torch's forward mode scripts some of its own formulas.
NO_JIT = pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning")
CONFIG = {**RANK2, "targets": [{"match": "w", "layout": "out_in"}]}


def made(**options: Any) -> Any:
    torch.manual_seed(0)
    return fill(li.inject(Experts(), {**CONFIG, **options}))


def effective(model: Any) -> Tensor:
    found = li.adapter_state(model).sites["w"]
    delta = SCALE * found.B.double() @ found.A.double()
    return model._parameters["w"].detach() + delta


def test_everybody_reads_lazily_and_nothing_is_left() -> None:
    model, x = made(), tokens(T, N)
    assert model.get_parameter("w") is model._parameters["w"]
    y = model(x)
    assert model.seen == [LazyWeight]
    assert error(y, F.linear(x, effective(model)[1])) < 1e-12
    assert type(model.w) is LazyWeight
    assert error(model.w, effective(model)) < 1e-12
    model.use = lambda w, x: w
    model(x)
    assert not [k for k, v in vars(model).items() if isinstance(v, LazyWeight)]
    assert model._lora.running == {}
    again = pickle.loads(pickle.dumps(made()._parameters))
    assert all(type(t) is not LazyWeight for t in again.values())


def test_a_copy_made_in_the_middle_of_a_forward_is_whole() -> None:
    model, x = made(), tokens(T, N)
    copies: list[Any] = []

    def use(w: Tensor, x: Tensor) -> Tensor:
        del model.use
        copies.append(copy.deepcopy(model))
        return F.linear(x, w[1])

    model.use = use
    y = model(x)
    copies[0].use = lambda w, x: F.linear(x, w[1])
    assert same_bits(copies[0](x), y)


@NO_JIT
@pytest.mark.parametrize("how", ["linear", "gathered", "bmm", "sum"])
def test_function_transforms_read_the_formed_weight(how: str) -> None:
    use, shape = (THIN_STACK | FORMS_STACK)[how]
    model, x = made(), tokens(*shape)
    model.use = use
    adapters = {n: p for n, p in model.named_parameters() if p.requires_grad}

    def loss(parameters: dict[str, Tensor], x: Tensor) -> Tensor:
        return torch.func.functional_call(model, parameters, (x,)).square().sum()

    wanted = torch.autograd.grad(model(x).square().sum(), list(adapters.values()))
    model.seen.clear()
    found = torch.func.grad(loss)(adapters, x)
    assert LazyWeight not in model.seen
    for name, gradient in zip(adapters, wanted, strict=True):
        assert error(found[name], gradient) < 1e-12
    batched = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0))(adapters, torch.stack([x]))
    for name, gradient in zip(adapters, wanted, strict=True):
        assert error(batched[name][0], gradient) < 1e-12
    tangents = {n: torch.randn_like(p) for n, p in adapters.items()}
    _, slope = torch.func.jvp(lambda p: loss(p, x), (adapters,), (tangents,))
    by_hand = sum((g * t).sum() for g, t in zip(wanted, tangents.values(), strict=True))
    assert error(slope, by_hand) < 1e-12


def test_vmap_inside_the_forward() -> None:
    model, x = made(), tokens(E, T, N)
    model.use = lambda w, x: torch.vmap(F.linear)(x, w)
    y = model(x)
    assert model.seen == [LazyWeight]
    assert error(y, x @ effective(model).mT) < 1e-12
    adapters = list(li.adapter_parameters(model).values())
    found = torch.autograd.grad(y.square().sum(), adapters)
    model.use = lambda w, x: x @ w.mT
    wanted = torch.autograd.grad(model(x).square().sum(), adapters)
    assert all(error(f, w) < 1e-12 for f, w in zip(found, wanted, strict=True))


@NO_JIT
def test_forward_mode_reads_the_formed_weight() -> None:
    model, x = made(), tokens(T, N)
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(x, torch.ones_like(x))
        slope = torch.autograd.forward_ad.unpack_dual(model(dual)).tangent
    assert model.seen == [Tensor]
    assert error(slope, F.linear(torch.ones_like(x), effective(model)[1])) < 1e-12


@pytest.mark.parametrize("how", ["linear", "bmm", "sum"])
def test_compiled_in_one_graph(how: str) -> None:
    use, shape = (THIN_STACK | FORMS_STACK)[how]
    model, x = made(), tokens(*shape)
    model.use = use
    y = model(x)
    torch._dynamo.reset()
    compiled = torch.compile(lambda x: model(x), fullgraph=True, backend="aot_eager")
    assert error(compiled(x), y) < 1e-12


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("inside", [False, True], ids=["around the owner", "inside the owner"])
def test_checkpointing(reentrant: bool, inside: bool) -> None:
    model, x = made(), tokens(T, N)
    adapters = list(li.adapter_parameters(model).values())
    model(x).square().sum().backward()
    wanted = [x.grad, *(p.grad for p in adapters)]
    x.grad = None
    model.zero_grad()
    if inside:
        model.use = lambda w, x: checkpoint(
            lambda x: F.linear(F.linear(x, model.w[1]), model.w[0].T), x, use_reentrant=reentrant
        )
        y = model(x)
        value = effective(model)
        assert error(y, F.linear(F.linear(x, value[1]), value[0].T)) < 1e-12
        li.disabled(model).__enter__()
        y.sum().backward()
        assert all(p.grad is not None and p.grad.any() for p in adapters)
        return
    y = checkpoint(model, x, use_reentrant=reentrant)
    with li.disabled(model):
        y.square().sum().backward()
    found = [x.grad, *(p.grad for p in adapters)]
    for one, other in zip(found, wanted, strict=True):
        assert error(one, other) < 1e-12


@pytest.mark.parametrize("how", ["linear", "gathered", "bmm"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_autocast(how: str, dtype: torch.dtype) -> None:
    use, shape = THIN_STACK[how]
    model = made().to(dtype)
    model.use = use
    x = tokens(*shape).detach().to(dtype)
    value = effective(model)
    with torch.autocast("cpu", torch.bfloat16):
        y = model(x)
    assert model.seen == [LazyWeight]
    assert y.dtype == torch.bfloat16
    assert error(y.double(), use(value, x.double())) < 0.02
    y.float().sum().backward()
    for p in li.adapter_parameters(model).values():
        assert p.dtype == torch.float32
        assert p.grad is not None


def test_bf16_keeps_what_rounding_the_sum_would_lose() -> None:
    """The base is exact, and the update is rounded by itself."""
    torch.manual_seed(0)
    spec = site("out_in")
    W = torch.randn(E, M, N).bfloat16()
    A, B = 1e-3 * torch.randn(spec.a_shape), torch.randn(spec.b_shape)
    lazy = lazy_weight(W, [Patch(spec, A, B, 1 / SCALE)], float32=False)
    assert lazy.dtype == torch.bfloat16
    x = torch.eye(N, dtype=torch.bfloat16)
    with torch.no_grad():
        y = F.linear(x, lazy[1])
    assert error(y.double(), (W[1].double() + B[1].double() @ A[1].double()).T) < 0.01


def test_float32_over_16_bits_forms_the_weight_in_float32() -> None:
    model = made(compute="float32").bfloat16()
    x = torch.randn(T, N)
    y = model(x)
    assert model.seen == [ReadOnly]
    assert y.dtype == torch.float32
    assert error(y.double(), F.linear(x.double(), effective(model)[1])) < 1e-6
    model = made(compute="float32").float()
    model(x)
    assert model.seen == [LazyWeight]


def test_trained_copies_several_adapters_and_the_selection() -> None:
    model, x = made(), tokens(T, N)
    torch.manual_seed(1)
    li.inject(model, CONFIG, "other")
    fill(model)
    values = {}
    raw = model._parameters["w"].detach()
    for name in ("default", "other"):
        found = li.adapter_state(model, name).sites["w"]
        values[name] = SCALE * found.B.double() @ found.A.double()
    li.activate(model, {"default": 0.5, "other": -2.0})
    mixed = raw + 0.5 * values["default"] - 2.0 * values["other"]
    assert error(model(x), F.linear(x, mixed[1])) < 1e-12
    li.activate(model, "other")
    assert error(model(x), F.linear(x, (raw + values["other"])[1])) < 1e-12
    with li.disabled(model):
        assert same_bits(model(x), F.linear(x, raw[1]))
    assert model.seen == [LazyWeight, LazyWeight, nn.Parameter]


@pytest.mark.parametrize("padding_idx", [None, 0, M - 1, -1])
def test_rows_are_looked_up_thinly_and_padding_has_no_gradient(padding_idx, formed) -> None:
    ids = torch.tensor([[M - 1, 0, 1], [0, 2, M - 1]])
    Case(site("out_in", None)).compare(lambda w: F.embedding(ids, w, padding_idx))
    assert formed == []
