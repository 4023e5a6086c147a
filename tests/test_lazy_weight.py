"""A weight that is read and formed only where it must be: every way of reading gives W + delta.

The reference is the same code on the dense `W + scale * B @ A` in float64, formed by hand.
"""

import copy
import io
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from conftest import error, same_bits
from torch import Tensor, nn

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


def site(layout: str, experts: int | None = E, slices: Slices | None = None) -> SiteSpec:
    """A site whose weight is `(E, M, N)`, or `(M, N)`: out_in or in_out."""
    out, n_in = (M, N) if layout == "out_in" else (N, M)
    shape = (M, N) if experts is None else (experts, M, N)
    return SiteSpec(
        "w", "parameter", n_in, out, shape, R, R * SCALE, layout == "in_out", experts, slices=slices
    )


def equal(one: Tensor, other: Tensor) -> bool:
    return torch.allclose(one, other, rtol=1e-12, atol=1e-12)


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
        weight = lazy_weight(self.W, self.updates, float32=False)
        assert type(weight) is LazyWeight
        return weight

    def dense(self) -> Tensor:
        """The formula, one expert and one slice at a time."""
        total = self.W
        for spec, A, B, weight in self.updates:
            pairs = zip(A, B, strict=True) if spec.experts else [(A, B)]
            deltas = [self._delta(spec, a, b) for a, b in pairs]
            delta = torch.stack(deltas) if spec.experts else deltas[0]
            total = total + spec.scale * weight * delta
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
        y, wanted = use(self.lazy(), *inputs), use(self.dense(), *inputs)
        assert (type(y), y.shape, y.dtype) == (Tensor, wanted.shape, wanted.dtype)
        assert equal(y, wanted)
        g = torch.randn_like(wanted)
        for one, other in zip(
            torch.autograd.grad(y, leaves, g, allow_unused=True),
            torch.autograd.grad(wanted, leaves, g, allow_unused=True),
            strict=True,
        ):
            if one is None or other is None:  # nothing, or zeros
                assert one is other or not (other if one is None else one).any()
            else:
                assert equal(one, other)


@pytest.fixture
def formed(monkeypatch: pytest.MonkeyPatch) -> list[LowRank]:
    """What has been formed since."""
    each: list[LowRank] = []
    real = LowRank.formed
    monkeypatch.setattr(LowRank, "formed", lambda self, d: each.append(self) or real(self, d))
    return each


def tokens(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, requires_grad=True)


ENDS = torch.tensor([2, 2, 5], dtype=torch.int32)  # one group is empty, one row is behind the last
IDS = torch.tensor([2, 0, 2, 1, 2, -1])


def grouped(x: Tensor, stack: Tensor) -> Tensor:
    """`F.grouped_mm` takes no float64: what transformers puts in its place does."""
    import transformers.integrations.moe  # noqa: F401 - registers the operation

    return torch.ops.transformers.grouped_mm_fallback(x, stack, ENDS)


Use = tuple[Callable[..., Tensor], tuple[int, ...]]
# Name to what is done with the weight (E, M, N), and the shape of the input.
THIN_STACK: dict[str, Use] = {
    "linear": (lambda w, x: F.linear(x, w[1]), (T, N)),
    "linear, one dimension": (lambda w, x: F.linear(x, w[1]), (N,)),
    "linear, no rows": (lambda w, x: F.linear(x, w[1]), (0, N)),
    "linear, index is a tensor": (lambda w, x: F.linear(x, w[torch.tensor(2)]), (T, N)),
    "linear, turned twice": (lambda w, x: F.linear(x, w.mT[1].T), (T, N)),
    "every expert": (lambda w, x: torch.stack([F.linear(x, w[e]) for e in (2, 0, 1)]), (T, N)),
    "unbound": (lambda w, x: torch.stack([x @ m for m in w.unbind(0)]), (T, M)),
    "matmul, turned": (lambda w, x: x @ w[1].T, (T, N)),
    "matmul from the left": (lambda w, x: w[1] @ x, (N, T)),
    "addmm": (lambda w, x: torch.addmm(torch.ones(N).double(), x, w[1]), (T, M)),
    "bmm": (lambda w, x: torch.bmm(x, w), (E, T, M)),
    "bmm, turned": (lambda w, x: x @ torch.transpose(w, -2, -1), (E, T, N)),
    "bmm from the left": (lambda w, x: w.bmm(x), (E, N, T)),
    "stack in four dimensions": (lambda w, x: x @ w, (2, E, T, M)),
    "gathered": (lambda w, x: torch.bmm(w[IDS], x.unsqueeze(-1)).squeeze(-1), (T, N)),
    "gathered, in_out": (lambda w, x: torch.bmm(x.unsqueeze(1), w[IDS]).squeeze(1), (T, M)),
    "grouped": (lambda w, x: grouped(x, w)[:5], (T, M)),
    "grouped, turned": (lambda w, x: grouped(x, w.transpose(-2, -1))[:5], (T, N)),
}
FORMS_STACK: dict[str, Use] = {
    "sum": (lambda w, x: w.sum() * x, (T,)),
    "plus": (lambda w, x: x + w, (E, M, N)),
    "a mask": (lambda w, x: x @ w[torch.tensor([True, False, True])], (T, M)),
    "reshaped": (lambda w, x: x @ w.view(E * M, N).T, (T, N)),
    "einsum": (lambda w, x: torch.einsum("ti,eoi->teo", x, w), (T, N)),
    "weight times weight": (lambda w, x: x @ (w[1] @ w[2].T), (T, M)),
    "of another dtype": (lambda w, x: F.linear(x.float(), w[1].float()).double(), (T, N)),
    "in vmap": (lambda w, x: torch.vmap(F.linear)(x, w), (E, T, N)),
}
THIN_MATRIX: dict[str, Use] = {
    "linear": (lambda w, x: F.linear(x, w), (2, T, N)),
    "matmul, turned": (lambda w, x: x @ w.T, (T, N)),
    "matmul from the left": (lambda w, x: w @ x, (N, T)),
}
STACK = THIN_STACK | FORMS_STACK
every_layout = pytest.mark.parametrize("layout", ["out_in", "in_out"])


@every_layout
@pytest.mark.parametrize("how", STACK)
def test_products_with_a_stack_are_thin_and_all_else_forms_it(how, layout, formed) -> None:
    use, shape = STACK[how]
    Case(site(layout)).compare(use, tokens(*shape))
    assert bool(formed) == (how in FORMS_STACK)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("how", THIN_STACK)
def test_products_are_thin_without_gradients(how: str, mode: Any, formed: list[LowRank]) -> None:
    """In inference mode torch hands on operations such as `.T` whole."""
    use, shape = THIN_STACK[how]
    case, x = Case(site("out_in")), tokens(*shape)
    with mode():
        y = use(case.lazy(), x)
    assert not formed
    assert equal(y, use(case.dense(), x))


@every_layout
@pytest.mark.parametrize("how", THIN_MATRIX)
def test_products_with_one_matrix_are_thin(how: str, layout: str, formed: list[LowRank]) -> None:
    use, shape = THIN_MATRIX[how]
    Case(site(layout, experts=None)).compare(use, tokens(*shape))
    assert not formed


@pytest.mark.parametrize("padding_idx", [None, 0, M - 1, -1])
def test_rows_are_looked_up_thinly_and_padding_has_no_gradient(padding_idx, formed) -> None:
    ids = torch.tensor([[M - 1, 0, 1], [0, 2, M - 1]])
    Case(site("out_in", None)).compare(lambda w: F.embedding(ids, w, padding_idx))
    assert formed == []


@pytest.mark.parametrize("how", ["linear", "bmm", "gathered, in_out", "einsum", "sum"])
def test_several_adapters_weights_slices_and_a_scale_of_zero(how: str) -> None:
    use, shape = STACK[how]
    slices = Slices((("q", 2), ("k", 1), ("v", 2)), ("q", "v"))
    plain, parts = site("out_in"), site("out_in", slices=slices)
    Case(plain, parts, plain, weights=(0.5, -1.5, 0.0)).compare(use, tokens(*shape))
    Case(parts, weights=(0.0,)).compare(use, tokens(*shape))


@pytest.mark.parametrize("how", ["linear", "bmm", "gathered", "einsum", "sum"])
def test_the_gradient_of_a_gradient_and_that_of_a_base_that_trains(how: str) -> None:
    use, shape = STACK[how]
    case, x = Case(site("out_in")), tokens(*shape)
    leaves = [*case.leaves, x]
    twice = []
    for w in (case.lazy(), case.dense()):
        once = torch.autograd.grad(use(w, x).square().sum(), leaves, create_graph=True)
        twice.append(torch.autograd.grad(sum(g.sin().sum() for g in once), leaves))
    assert all(error(one, other) < 1e-12 for one, other in zip(*twice, strict=True))
    case.leaves.append(case.W.requires_grad_())
    case.compare(use, x)


def test_questions_are_answered_without_forming(formed: list[LowRank]) -> None:
    lazy = Case(site("out_in")).lazy()
    assert isinstance(lazy, Tensor)
    assert lazy.shape == lazy.size() == (E, M, N)
    assert (lazy.ndim, len(lazy), lazy.numel()) == (3, E, E * M * N)
    assert (lazy.dtype, lazy.device.type) == (torch.float64, "cpu")
    assert (lazy.requires_grad, lazy.is_leaf) == (True, False)
    assert (lazy.is_contiguous(), lazy.mT.is_contiguous()) == (True, False)
    assert lazy[1].T.shape == (N, M)
    assert torch.zeros(2, device=lazy.device).device.type == "cpu"
    assert not formed


def test_what_it_shows_copies_and_saves_is_the_effective_weight() -> None:
    case = Case(site("out_in"))
    with torch.no_grad():
        lazy, wanted = case.lazy(), case.lazy().clone()
    assert equal(wanted, case.dense())
    assert str(lazy) == str(wanted)
    assert torch.equal(lazy, wanted)
    assert lazy.tolist() == wanted.tolist()
    assert (lazy.numpy() == wanted.numpy()).all()
    assert lazy.data_ptr() == lazy.data_ptr() != case.W.data_ptr()
    for view in (lazy.detach(), lazy.data):
        assert type(view) is ReadOnly
        assert same_bits(view.clone(), wanted)
    file = io.BytesIO()
    torch.save(lazy, file)
    file.seek(0)
    for copied in (copy.deepcopy(lazy), pickle.loads(pickle.dumps(lazy)), torch.load(file)):
        assert type(copied) is Tensor
        assert same_bits(copied, wanted)


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


def test_a_custom_function_finds_the_effective_weight_with_its_gain() -> None:
    Case(site("out_in")).compare(lambda w, x: Opaque.apply(x, w.mT[2].T), tokens(T, N))
    case, x = Case(site("out_in", None)), tokens(T, N)
    m = torch.rand(M, dtype=torch.float64, requires_grad=True)
    gain = Gain(lambda tensors, norms: tensors["m"] / norms.detach(), {"m": m}, ((0, M),))
    lazy = lazy_weight(case.W, case.updates, float32=False, gain=gain)
    wanted = effective_weight(case.W, case.updates, float32=False, gain=gain)
    leaves, outputs = [*case.leaves, m, x], [Opaque.apply(x, lazy), x @ wanted.T]
    assert type(lazy) is LazyWeight
    assert equal(*outputs)
    for pair in zip(*(torch.autograd.grad(y.sum(), leaves) for y in outputs), strict=True):
        assert equal(*pair)


def test_beneath_autograd_the_weight_is_formed_and_not_written() -> None:
    def beneath(w: Tensor, x: Tensor) -> Tensor:
        with torch._C.DisableTorchFunctionSubclass():
            return x @ w[1].T

    case = Case(site("out_in"))
    case.compare(beneath, tokens(T, N))
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


def test_bf16_keeps_what_rounding_the_sum_would_lose() -> None:
    """The base is exact, and the update is rounded by itself."""
    torch.manual_seed(0)
    spec = site("out_in")
    W = torch.randn(E, M, N).bfloat16()
    A, B = 1e-3 * torch.randn(spec.a_shape), torch.randn(spec.b_shape)
    lazy = lazy_weight(W, [Patch(spec, A, B, 1 / SCALE)], float32=False)
    assert lazy.dtype == torch.bfloat16
    with torch.no_grad():
        y = F.linear(torch.eye(N, dtype=torch.bfloat16), lazy[1])
    assert error(y.double(), (W[1].double() + B[1].double() @ A[1].double()).T) < 0.01
