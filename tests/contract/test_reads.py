"""Every way of reading an adapted parameter gives W + delta, and products with it stay thin.

The reference is the same code on the dense weight in float64, formed by hand.
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
from helpers.refusals import refused
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import lora_inject as li
from contract.kinds import Kind, dense_weight

E, M, N, T = 3, 7, 11, 6  # no other number is 7 or 11: what has these sizes is a whole matrix


class Reading:
    """A module with a raw parameter that adapters change, and its dense twin on the same leaves."""

    def __init__(
        self,
        layout: str = "out_in",
        *,
        experts: int | None = E,
        mix: tuple[float, ...] = (1.0,),
        sliced: tuple[int, ...] = (),
        **config: Any,
    ) -> None:
        torch.manual_seed(0)
        turned = layout == "in_out"
        shape = (M, N) if experts is None else (experts, M, N)
        self.module: Any = nn.Module()
        self.module.w = nn.Parameter(torch.randn(shape, dtype=torch.float64))
        self.W = self.module.w.detach().clone().requires_grad_()
        sizes = (M, N) if turned else (N, M)
        rule = {"match": "w", "layout": layout}
        parts = {"slices": {"q": 2, "k": 1, "v": 4}, "adapt": ["q", "v"]}
        self.terms: list[tuple[float, Kind, dict[str, Tensor]]] = []
        for i, weight in enumerate(mix):
            spans = ((0, 2), (3, 7)) if i in sliced else ()
            kind = Kind(nn.Module, sizes, spans=spans, transposed=turned, experts=experts)
            each = {**rule, **(parts if i in sliced else {})}
            li.inject(self.module, {"rank": 2, "alpha": 3, "targets": [each], **config}, f"a{i}")
            found = li.adapter_parameters(fill(self.module, f"a{i}"), f"a{i}")
            roles = {key.removeprefix("w.lora_"): p for key, p in found.items()}
            self.terms.append((weight, kind, roles))
        names = [f"a{i}" for i in range(len(mix))]
        li.activate(self.module, dict(zip(names, mix, strict=True)))
        li.train_only(self.module, names)
        self.leaves = [p for _, _, roles in self.terms for p in roles.values()]

    def lazy(self) -> Tensor:
        return self.module.w

    def dense(self) -> Tensor:
        total = self.W
        for weight, kind, roles in self.terms:
            total = total + weight * (dense_weight(kind, self.W, roles) - self.W)
        return total

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


def equal(one: Tensor, other: Tensor) -> bool:
    return torch.allclose(one, other, rtol=1e-11, atol=1e-11)


PICKS = ("device", "select", "unbind", "index", "transpose", "permute", "t", "mT", "numpy_T")
SUMS = ("mm", "bmm", "addmm", "baddbmm", "mul", "add")


class Whole(TorchDispatchMode):
    """Notes what asks for the whole weight, and products and sums as large as one matrix of it."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        name = func.name().removeprefix("aten::").partition(".")[0]
        whole = any(each not in (Tensor, nn.Parameter) for each in types)  # what was read, itself
        if (whole and name.removeprefix("prim::") not in PICKS) or (
            name in SUMS and {*made.shape[-2:]} == {M, N}
        ):
            self.seen.append(name)
        return made


def tokens(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, requires_grad=True)


ENDS = torch.tensor([2, 2, 5], dtype=torch.int32)  # one group is empty, one row is behind the last
IDS = torch.tensor([2, 0, 2, 1, 2, -1])


def grouped(x: Tensor, stack: Tensor) -> Tensor:
    """`F.grouped_mm` takes no float64: what transformers puts in its place does."""
    pytest.importorskip("transformers.integrations.moe")  # registers the operation
    if not hasattr(torch.ops.transformers, "grouped_mm_fallback"):
        pytest.skip("this transformers has no such operation")
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
def test_a_stack_is_read_as_the_dense_one(how: str, layout: str) -> None:
    use, shape = STACK[how]
    Reading(layout).compare(use, tokens(*shape))


@every_layout
@pytest.mark.parametrize("how", THIN_MATRIX)
def test_one_matrix_is_read_as_the_dense_one(how: str, layout: str) -> None:
    use, shape = THIN_MATRIX[how]
    Reading(layout, experts=None).compare(use, tokens(*shape))


@pytest.mark.parametrize("mode", [torch.enable_grad, torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("how", [*THIN_STACK, "a matrix"])
def test_products_form_no_whole_matrix(how: str, mode: Any) -> None:
    """In inference mode torch hands on operations such as `.T` whole."""
    use, shape = THIN_STACK.get(how, THIN_MATRIX["linear"])
    reading, x = Reading(experts=E if how in THIN_STACK else None), tokens(*shape)
    with mode(), Whole() as whole:
        y = use(reading.lazy(), x)
    assert whole.seen == []
    assert equal(y, use(reading.dense(), x))


@pytest.mark.parametrize("padding_idx", [None, 0, M - 1, -1])
def test_rows_are_looked_up_thinly_and_padding_has_no_gradient(padding_idx: int | None) -> None:
    ids, reading = torch.tensor([[M - 1, 0, 1], [0, 2, M - 1]]), Reading(experts=None)
    reading.compare(lambda w: F.embedding(ids, w, padding_idx))
    with Whole() as whole:
        F.embedding(ids, reading.lazy(), padding_idx)
    assert whole.seen == []


@pytest.mark.parametrize("how", ["linear", "gathered, in_out", "einsum", "sum"])
def test_several_adapters_weights_slices_and_a_weight_of_zero(how: str) -> None:
    use, shape = STACK[how]
    if how in ("linear", "sum"):
        one = use if how == "sum" else (lambda w, x: F.linear(x, w))
        Reading(experts=None, mix=(0.5, -1.5, 0.0), sliced=(1,)).compare(one, tokens(*shape))
    Reading(mix=(0.5, -1.5, 0.0)).compare(use, tokens(*shape))


@pytest.mark.parametrize("how", ["linear", "bmm", "gathered", "einsum", "sum"])
def test_the_gradient_of_a_gradient_and_that_of_a_base_that_trains(how: str) -> None:
    use, shape = STACK[how]
    reading, x = Reading(), tokens(*shape)
    reading.module.get_parameter("w").requires_grad_()
    raw, twice = reading.module.get_parameter("w"), []
    for w, base in ((reading.lazy(), raw), (reading.dense(), reading.W)):
        leaves = [*reading.leaves, x, base]
        once = torch.autograd.grad(use(w, x).square().sum(), leaves, create_graph=True)
        twice.append((*once, *torch.autograd.grad(sum(g.sin().sum() for g in once), leaves)))
    assert all(error(one, other) < 1e-12 for one, other in zip(*twice, strict=True))


@pytest.mark.parametrize("how", [how for how in FORMS_STACK if how != "a mask"])  # picks first
def test_the_watch_sees_what_is_formed(how: str) -> None:
    use, shape = FORMS_STACK[how]
    reading, x = Reading(), tokens(*shape)
    with Whole() as whole:
        use(reading.lazy(), x)
    assert whole.seen != []


def test_questions_are_answered_without_forming() -> None:
    with Whole() as whole:
        read = Reading().lazy()
        assert isinstance(read, Tensor)
        assert read.shape == read.size() == (E, M, N)
        assert (read.ndim, len(read), read.numel()) == (3, E, E * M * N)
        assert (read.dtype, read.device.type) == (torch.float64, "cpu")
        assert (read.requires_grad, read.is_leaf) == (True, False)
        assert (read.is_contiguous(), read.mT.is_contiguous()) == (True, False)
        assert read[1].T.shape == (N, M)
        assert torch.zeros(2, device=read.device).device.type == "cpu"
    assert whole.seen == []


def test_what_it_shows_copies_and_saves_is_the_effective_weight() -> None:
    reading = Reading()
    with torch.no_grad():
        read, wanted = reading.lazy(), reading.lazy().clone()
        assert str(read) == str(wanted)
        assert f"{read[0, 0, 0]:.3f}" == f"{wanted[0, 0, 0]:.3f}"
    assert equal(wanted, reading.dense())
    assert not read.detach().requires_grad
    assert torch.equal(read, wanted)
    assert read.tolist() == wanted.tolist()
    assert (read.detach().numpy() == wanted.numpy()).all()
    assert read.data_ptr() == read.data_ptr() != reading.module.get_parameter("w").data_ptr()
    assert same_bits(read.detach().clone(), wanted)
    assert same_bits(read.data.clone(), wanted)
    file = io.BytesIO()
    torch.save(read, file)
    file.seek(0)
    for copied in (copy.deepcopy(read), pickle.loads(pickle.dumps(read)), torch.load(file)):
        assert type(copied) is Tensor
        assert same_bits(copied, wanted)


@pytest.mark.parametrize("index", [None, 1, torch.tensor([0, 2])], ids=["all", "one", "some"])
@pytest.mark.parametrize("grad", [True, False])
def test_no_tensor_can_have_its_data_which_are_nowhere(index: Any, grad: bool) -> None:
    """It would have none, and the next read of it would end the process."""
    with torch.set_grad_enabled(grad):
        read = Reading().lazy()
        read = read if index is None else read[index]
    for other in (nn.Parameter(torch.zeros(2)), torch.zeros(read.shape, dtype=read.dtype)):
        before = other.clone()
        with pytest.raises(RuntimeError, match="incompatible tensor type"):
            other.data = read
        assert same_bits(other, before)
        other.data = read.data.clone().to(other.dtype)
        assert equal(other.double(), read.detach().to(other.dtype).double())


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


# Views of a matrix `(8, 6)`, each with what it is called on a plain weight.
VIEWS: dict[str, Callable[[Tensor], Any]] = {
    "itself": lambda w: w,
    "a slice": lambda w: w[-1:],
    "a row": lambda w: w[3],
    "rows in turn": lambda w: [*w][1],
    "a chunk": lambda w: w.chunk(2)[1],
    "a part of split": lambda w: w.split(2)[1],
    "a part of tensor_split": lambda w: w.tensor_split(3)[1],
    "one of unbind": lambda w: w.unbind()[2],
    "heads": lambda w: w.view(2, 4, 6)[0],
    "flat": lambda w: w.flatten()[2:4],
    "ravel": lambda w: w.ravel()[2:4],
    "reshape": lambda w: w.reshape(-1)[:4],
    "narrow": lambda w: w.narrow(0, 1, 2),
    "transposed": lambda w: w.T,
    "mT": lambda w: w.mT[0],
    "permuted": lambda w: w.permute(1, 0)[1],
    "the diagonal": lambda w: w.diagonal(),
    "expanded": lambda w: w.expand(2, 8, 6)[0],
    "strided": lambda w: w.as_strided((4,), (1,)),
    "unfolded": lambda w: w.unfold(0, 2, 2),
    "squeezed": lambda w: w.unsqueeze(0).squeeze(0),
    "a view of a view": lambda w: w[2:].view(-1)[3:].view(-1, 3),
    "a part of its conjugate": lambda w: torch.view_as_complex(w.view(8, 3, 2)).conj().imag,
}
WRITES: dict[str, Callable[[Any], Any]] = {
    "zero_": lambda v: v.zero_(),
    "copy_": lambda v: v.copy_(torch.ones(v.shape)),
    "an index": lambda v: v.__setitem__(0, 1.0),
    "add in place": lambda v: v.__iadd__(1),
    "out=": lambda v: torch.add(torch.zeros(v.shape), 1, out=v),
    "foreach": lambda v: torch._foreach_add_([v], 1),
    "its storage": lambda v: v.untyped_storage().fill_(0),
}


def layer_with_an_adapter() -> nn.Sequential:
    torch.manual_seed(0)
    return fill(li.inject(nn.Sequential(nn.Linear(6, 8)), {"rank": 2, "targets": ["0"]}))


@pytest.mark.parametrize("write", WRITES)
@pytest.mark.parametrize("view", VIEWS)
def test_a_write_through_a_view_of_what_was_read_is_refused(view: str, write: str) -> None:
    """`emb.weight.data[-1:].copy_(mean)` went to a copy, and was lost without a word."""
    model = layer_with_an_adapter()
    for read in (model[0].weight.data, model[0].weight.detach()):
        with torch.no_grad(), refused(li.LayerError, "W + delta", model=model):
            WRITES[write](VIEWS[view](read))
    with torch.no_grad(), refused(li.LayerError, "W + delta", model=model):
        WRITES[write](VIEWS[view](model[0].weight))


@pytest.mark.parametrize("name", ["requires_grad", "grad"])
def test_what_was_read_takes_no_flag_and_no_gradient(name: str) -> None:
    """Either did nothing: what was read is another tensor each time."""
    model = layer_with_an_adapter()
    with refused(li.LayerError, "W + delta", model=model):
        setattr(model[0].weight, name, {"requires_grad": False, "grad": torch.zeros(8, 6)}[name])


@pytest.mark.parametrize("view", VIEWS)
def test_a_view_of_what_was_read_has_the_values_and_gradients_of_the_dense_one(view: str) -> None:
    model = layer_with_an_adapter()
    state = li.adapter_state(model).sites["0"]
    W = model[0].get_parameter("weight").detach()
    A, B = state.A.clone().requires_grad_(), state.B.clone().requires_grad_()
    wanted, read = VIEWS[view](W + state.scale * B @ A), VIEWS[view](model[0].weight)
    torch.testing.assert_close(read + 0, wanted)
    read.square().sum().backward()
    wanted.square().sum().backward()
    got = {key.rpartition("_")[2]: p.grad for key, p in li.adapter_parameters(model).items()}
    torch.testing.assert_close(got, {"A": A.grad, "B": B.grad})


def as_complex(w: Tensor) -> Tensor:
    return torch.view_as_complex(w.reshape(8, 3, 2))


CONJUGATING: dict[str, Callable[[Tensor], Tensor]] = {
    "hfft2": torch.fft.hfft2,
    "pinv": lambda w: torch.linalg.pinv(as_complex(w)),
    "vecdot": lambda w: torch.linalg.vecdot(as_complex(w), as_complex(w)),
    "conj": lambda w: as_complex(w).conj() * 1,
    "einsum": lambda w: torch.einsum("ij,ik->jk", as_complex(w), as_complex(w).conj()),
    "neg": lambda w: torch._neg_view(w) + 1,
}


@pytest.mark.parametrize("mode", [torch.enable_grad, torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("what", CONJUGATING)
def test_what_torch_conjugates_by_itself_is_conjugated(what: str, mode: Any) -> None:
    """Below autograd no operand was: `hfft2` and `pinv` gave other numbers."""
    model = layer_with_an_adapter()
    wanted = CONJUGATING[what]((model[0].weight + 0).detach())
    with mode():
        made = CONJUGATING[what](model[0].weight)
    torch.testing.assert_close(made.resolve_conj(), wanted.resolve_conj())


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_what_gives_its_argument_back_can_be_written_to_no_more_than_that(mode: Any) -> None:
    """In inference mode `type_as` gave what was read to whoever read it next, to be written to."""
    model = layer_with_an_adapter()
    with mode(), refused(li.LayerError, "W + delta", model=model):
        model[0].weight.type_as(torch.zeros(1)).zero_()


CUT: dict[str, Callable[[Tensor], Tensor]] = {
    "detach": lambda w: w.detach(),
    "data": lambda w: w.data,
    "detach of a view": lambda w: w.T.detach().T,
}
PRODUCTS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "linear": F.linear,
    "@": lambda x, w: x @ w.T,
    "mm": lambda x, w: torch.mm(x, w.t()),
    "addmm": lambda x, w: torch.addmm(x.new_zeros(len(w)), x, w.t()),
    "bmm": lambda x, w: torch.bmm(x[None], w.t()[None]),
    "embedding": lambda x, w: F.embedding(torch.tensor([1, 2]), w) * x.mean(),
    "einsum": lambda x, w: torch.einsum("bi,oi->bo", x, w),
    "elementwise": lambda x, w: w * x.mean(),
}


@pytest.mark.parametrize("product", PRODUCTS)
@pytest.mark.parametrize("cut", CUT)
def test_what_was_cut_from_the_graph_sends_no_gradient(cut: str, product: str) -> None:
    """A stop-gradient on an adapted weight (shared embeddings, codebooks) was ignored."""
    model, x = layer_with_an_adapter(), torch.randn(3, 6, requires_grad=True)
    y = PRODUCTS[product](x, CUT[cut](model[0].weight))
    torch.testing.assert_close(y, PRODUCTS[product](x, model[0].weight))
    y.sum().backward()
    assert all(p.grad is None for p in li.adapter_parameters(model).values())


def test_an_array_of_what_was_read_is_read_only() -> None:
    model = layer_with_an_adapter()
    array = model[0].weight.detach().numpy()
    assert (array == (model[0].weight + 0).detach().numpy()).all()
    with pytest.raises(ValueError, match="read-only"):
        array.fill(1)


def test_what_was_read_without_gradients_has_them_where_it_is_used_with_them() -> None:
    """As a plain weight has; of a site with slices A got a gradient and B none."""
    torch.manual_seed(0)
    slices = {"q": 3, "k": 2, "v": 3}
    rule = {"match": "0", "slices": slices, "adapt": ["q", "v"]}
    model = fill(li.inject(nn.Sequential(nn.Linear(6, 8)), {"rank": 2, "targets": [rule]}))
    x = torch.randn(3, 6)
    with torch.no_grad():
        read = model[0].weight
    F.linear(x, read).square().sum().backward()
    early = [p.grad.clone() for p in li.adapter_parameters(model).values()]
    model.zero_grad()
    F.linear(x, model[0].weight).square().sum().backward()
    late = [p.grad for p in li.adapter_parameters(model).values()]
    torch.testing.assert_close(early, late)


def test_a_custom_function_finds_the_effective_weight_with_its_gain() -> None:
    Reading().compare(lambda w, x: Opaque.apply(x, w.mT[2].T), tokens(T, N))
    Reading(experts=None, variant="dora").compare(lambda w, x: Opaque.apply(x, w), tokens(T, N))


def test_beneath_autograd_the_weight_is_formed_and_not_written() -> None:
    def beneath(w: Tensor, x: Tensor) -> Tensor:
        with torch._C.DisableTorchFunctionSubclass():
            return x @ w[1].T

    reading = Reading()
    reading.compare(beneath, tokens(T, N))
    read = reading.lazy()
    with (
        torch._C.DisableTorchFunctionSubclass(),
        torch.no_grad(),
        refused(li.LayerError, ".clone()"),
    ):
        read.mul_(2)


def test_an_adapter_that_changed_since_is_noticed() -> None:
    reading, x = Reading(), tokens(T, N)
    read = reading.lazy()
    expert = read[1]
    with torch.no_grad():
        reading.leaves[0].mul_(2)
    for late in (lambda: F.linear(x, read[1]), lambda: F.linear(x, expert), lambda: read + 1):
        with refused(li.LayerError, ".clone()"):
            late()


def test_bf16_keeps_what_rounding_the_sum_would_lose() -> None:
    """The base is exact, and the update is rounded by itself."""
    reading = Reading()
    reading.module.to(torch.bfloat16)
    A, B = li.adapter_parameters(reading.module).values()
    with torch.no_grad():
        A.mul_(1e-3)
        y = F.linear(torch.eye(N, dtype=torch.bfloat16), reading.lazy()[1])
    assert reading.lazy().dtype == torch.bfloat16
    W = reading.module.get_parameter("w")[1].double()
    assert error(y.double(), (W + 1.5 * B[1].double() @ A[1].double()).T) < 0.01
