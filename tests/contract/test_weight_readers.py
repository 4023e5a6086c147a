"""Who reads an adapted weight gets W + delta, whoever reads it; Parameters themselves are raw."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from conftest import error, fill, same_bits
from helpers.reference import with_deltas
from helpers.refusals import refused
from helpers.states import give_biases_of_b
from torch import Tensor, nn
from torch.nn.utils import prune
from torch.utils.checkpoint import checkpoint

import lora_inject as li

CONFIG = {"rank": 2, "alpha": 3.0}
V, D = 11, 6
IDS = torch.arange(8).view(2, 4)
X = torch.linspace(-1, 1, 24, dtype=torch.float64).view(4, D)
ALL_ROWS = ["default", None, None, None]


class Reading(nn.Module):
    """Computes with the weight of one child, calls another, and does both with a third."""

    def __init__(self) -> None:
        super().__init__()
        self.read, self.called, self.both = (nn.Linear(D, D) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        x = F.linear(torch.tanh(self.called(x)), self.read.weight, self.read.bias)
        return self.both(x) + x @ self.both.weight


class TiedByHand(nn.Module):
    """`hidden @ emb.weight.T` and a look-up, one of them by hand, in a child that is called."""

    def __init__(self) -> None:
        super().__init__()
        self.emb = nn.Embedding(V, D)
        self.inner = nn.Sequential(Reading())

    def forward(self, ids: Tensor) -> Tensor:
        hidden = self.inner(self.emb(ids)) + F.embedding(ids, self.emb.weight)
        return hidden @ self.emb.weight.T


class AsksOnly(nn.Module):
    """What transformers' T5 does: look at a dtype, then call."""

    def __init__(self) -> None:
        super().__init__()
        self.wo = nn.Linear(D, D)

    def forward(self, x: Tensor) -> Tensor:
        if x.dtype != self.wo.weight.dtype:
            x = x.to(self.wo.weight.dtype)
        return self.wo(x)


CASES: dict[str, tuple[Callable[[], nn.Module], list[str], Tensor]] = {
    "read": (Reading, ["read"], X),
    "called and read": (Reading, ["both"], X),
    "its weight named": (Reading, [r"read\.weight", "called"], X),
    "embedding and layers": (TiedByHand, ["emb", "read", "both"], IDS),
    "asked for its dtype": (AsksOnly, ["wo"], X),
}
every_case = pytest.mark.parametrize("case", CASES)


def made(case: str, **options: Any) -> tuple[nn.Module, Any, Tensor]:
    build, targets, x = CASES[case]
    torch.manual_seed(0)
    plain = build().double()
    config = {**CONFIG, "targets": targets, **options}
    return plain, fill(li.inject(copy.deepcopy(plain), config)), x


@every_case
def test_a_weight_that_a_forward_reads_is_the_dense_one(case: str) -> None:
    plain, model, x = made(case)
    wide = with_deltas(plain, model)
    assert error(plain(x), wide(x)) > 0.01
    for training in (True, False):
        assert error(model.train(training)(x), wide(x)) < 1e-12
    with torch.no_grad():
        assert error(model(x), wide(x)) < 1e-12
    assert li.unreached(model, lambda: model(x)) == []
    with li.disabled(model):
        assert same_bits(model(x), plain(x))


def check_gradients(model: nn.Module, wide: nn.Module, run: Callable[[nn.Module], Tensor]) -> None:
    """dL/dA = scale B^T G and dL/dB = scale G A^T, of the dense model's G = dL/dW."""
    for m in (wide.requires_grad_(), model):
        y = run(m)
        (y * torch.arange(y.numel(), dtype=y.dtype).cos().view(y.shape)).sum().backward()
    parameters = li.adapter_parameters(model)
    for name, site in li.adapter_state(model).sites.items():
        G = wide.get_parameter(site.spec.weight).grad
        G = G.t() if site.spec.transposed else G
        assert error(parameters[f"{name}.lora_A"].grad, site.scale * site.B.t() @ G) < 1e-12
        assert error(parameters[f"{name}.lora_B"].grad, site.scale * G @ site.A.t()) < 1e-12


ONE = torch.ones((), dtype=torch.float64, requires_grad=True)
WAYS: dict[str, Callable[[Any, Tensor], Tensor]] = {
    "plain": lambda m, x: m(x),
    "reentrant": lambda m, x: checkpoint(lambda x, s: m(x) * s, x, ONE, use_reentrant=True),
    "not reentrant": lambda m, x: checkpoint(m, x, use_reentrant=False),
    "recomputed without a call": lambda m, x: checkpoint(m.forward, x, use_reentrant=False),
}


@every_case
@pytest.mark.parametrize("way", WAYS)
def test_gradients_flow_through_what_was_read(case: str, way: str) -> None:
    plain, model, x = made(case)
    check_gradients(model.train(), with_deltas(plain, model), lambda m: WAYS[way](m, x))


def test_the_whole_is_one_compiled_graph() -> None:
    plain, model, x = made("embedding and layers")
    wide = with_deltas(plain, model)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    assert error(compiled(x), wide(x)) < 1e-12
    check_gradients(model, wide, lambda m: compiled(x) if m is model else m(x))


def test_a_question_about_a_weight_does_not_count_as_use() -> None:
    """Dropout acts on the input of a layer, which the reader of its weight does not have."""
    _, model, x = made("asked for its dtype", dropout=0.5)
    model.train()(x)
    with li.routed(model.eval(), ALL_ROWS):
        model(x)
    _, model, x = made("read", dropout=0.5)
    with refused(li.LayerError, "'read'", "0.5"):
        model.train()(x)
    adapted = model.eval()(x)
    with li.disabled(model):
        base = model(x)
    with li.routed(model, ALL_ROWS):
        torch.testing.assert_close(model(x), torch.cat([adapted[:1], base[1:]]))


def test_the_summary_names_what_no_forward_has_used() -> None:
    model: Any = nn.Sequential(*(nn.Linear(D, D) for _ in range(3))).double()
    fill(li.inject(model, {**CONFIG, "targets": ["all-linear"]}))
    model[1](X)
    assert "default: no forward has used '0', '2' (2) so far" in li.summary(model)
    model(X)
    assert "so far" not in li.summary(model)


READ_16_BITS: dict[str, tuple[Callable[[], nn.Module], str, Callable[[Any, Tensor], Any]]] = {
    "linear": (lambda: nn.Linear(D, D), "weight", lambda m, x: m(x)),
    "embedding": (lambda: nn.Embedding(D, D), "weight", lambda m, _: m(IDS % D)),
    "attention": (
        lambda: nn.MultiheadAttention(D, 2),
        "in_proj_weight",
        lambda m, x: m(x, x, x)[0],
    ),
}


@pytest.mark.parametrize("compute", ["base", "float32"])
@pytest.mark.parametrize("layer", READ_16_BITS)
def test_the_weight_of_torchs_layers_keeps_the_dtype_that_their_input_has(layer, compute) -> None:
    """With compute: float32 the weight was float32, and torch refused the product."""
    build, param, run = READ_16_BITS[layer]
    plain = nn.Sequential(build()).bfloat16()
    config = {**CONFIG, "compute": compute, "targets": [rf"0\.{param}"]}
    model = fill(li.inject(copy.deepcopy(plain), config))
    y, wide = run(model[0], X.bfloat16()), with_deltas(plain, model)
    assert y.dtype == torch.bfloat16
    assert error(y.double(), run(wide[0], X)) < 0.05
    assert error(run(plain[0], X.bfloat16()).double(), run(wide[0], X)) > 0.1


LAYERS: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "forward update": (lambda: nn.Linear(D, D), "^0$"),
    "weight update": (lambda: nn.Linear(D, D), r"^0\.weight"),
    "convolution": (lambda: nn.Conv1d(D, D, 1), "^0$"),
    "embedding": (lambda: nn.Embedding(D, D), "^0$"),
}
every_kind = pytest.mark.parametrize("kind", LAYERS)


def layer(kind: str) -> tuple[nn.Module, Any]:
    """A model of one adapted layer, and the layer."""
    torch.manual_seed(0)
    net = nn.Sequential(LAYERS[kind][0]()).double()
    fill(li.inject(net, {**CONFIG, "targets": [LAYERS[kind][1]]}))
    return net, net[0]


# What code that knows of no adapter does to a weight.
WRITES: dict[str, Callable[[Any], Any]] = {
    "nn.init": lambda m: nn.init.constant_(m.weight, 0.5),
    "clipping": lambda m: m.weight.data.clamp_(0),
    "detach": lambda m: m.weight.detach().clamp_(0),
    "an element": lambda m: m.weight.data.__setitem__(0, 0.0),
    "out": lambda m: torch.add(m.weight.detach(), 1, out=m.weight.data),
    "foreach": lambda m: torch._foreach_mul_([m.weight.data], 2),
    "inplace": lambda m: F.relu(m.weight.data, inplace=True),
    "+=": lambda m: m.weight.data.__iadd__(1),
    "set data": lambda m: setattr(m.weight, "data", torch.full_like(m.weight, 0.5)),
    "no_grad": lambda m: torch.no_grad()(lambda: m.weight.copy_(torch.full_like(m.weight, 0.5)))(),
    "inference": lambda m: torch.inference_mode()(lambda: m.weight.data.mul_(2))(),
    "requires_grad": lambda m: m.weight.requires_grad_(),
    "another Parameter": lambda m: setattr(m, "weight", nn.Parameter(m.weight * 0 + 0.5)),
    "a Parameter of it": lambda m: nn.Parameter(m.weight),
    "a Parameter of its data": lambda m: nn.Parameter(m.weight.data),
    "swapped": lambda m: torch.utils.swap_tensors(m.weight, torch.zeros(D, D).double()),
    "swapped with": lambda m: torch.utils.swap_tensors(torch.zeros(D, D).double(), m.weight),
    "swapped by names": lambda m: torch.utils.swap_tensors(t1=m.weight, t2=torch.zeros(D, D)),
}


@every_kind
@pytest.mark.parametrize("write", WRITES)
def test_a_write_to_what_was_read_is_refused(kind: str, write: str) -> None:
    """It would go to a temporary."""
    net, m = layer(kind)
    with refused(li.LayerError, "get_parameter", "merge(model", model=net):
        WRITES[write](m)


MADE_ON_READING = {"rows of a table": "0.weight", "a bias with that of B": "1.bias"}


@pytest.mark.parametrize("write", [lambda t: t.add_(1), lambda t: t.data.mul_(2)], ids=["", "data"])
@pytest.mark.parametrize("case", MADE_ON_READING)
def test_a_write_to_what_is_a_tensor_of_its_own_is_refused(case: str, write: Any) -> None:
    net = nn.Sequential(nn.Embedding(D, D), nn.Linear(D, D))
    fill(li.inject(net, {"rank": 2, "targets": ["1"], "tokens": {"0": [1, 3]}}))
    give_biases_of_b(net)
    path, _, parameter = MADE_ON_READING[case].partition(".")
    read = getattr(net.get_submodule(path), parameter)
    with torch.no_grad(), refused(li.LayerError, "get_parameter", model=net):
        write(read)


def clipped(plain: nn.Module, write: str) -> nn.Module:
    """Make a layer write to its weight in each forward."""

    class Clipped(type(plain)):  # type: ignore[misc]
        def forward(self, x: Tensor) -> Tensor:
            WRITES[write](self)
            return super().forward(x)  # type: ignore[no-any-return]

    plain.__class__ = Clipped
    return plain


@every_kind
@pytest.mark.parametrize("write", WRITES)
def test_a_write_in_the_layers_own_forward_is_refused(kind: str, write: str) -> None:
    """Weight clipping, and layers whose weights stay positive."""
    net = nn.Sequential(clipped(LAYERS[kind][0]().double(), write))
    model = fill(li.inject(net, {**CONFIG, "targets": [r"^0\.weight|^0$"]}))
    x = torch.arange(D) if kind == "embedding" else torch.eye(D, dtype=torch.float64)
    with refused(li.LayerError, "merge(", model=model):
        model(x)


@every_kind
def test_a_hook_that_no_forward_would_meet_is_refused(kind: str) -> None:
    """One that masks rows of a table was lost, and all rows trained."""
    _, m = layer(kind)
    with refused(li.LayerError, "register_hook", "adapter_parameters(model"):
        m.weight.register_hook(torch.zeros_like)
    seen: list[Tensor] = []
    mine = m.weight.clone()
    mine.register_hook(seen.append)
    mine.sum().backward()
    assert len(seen) == 1


REPLACING: dict[str, Callable[[Any], Any]] = {
    "parametrize": lambda m: nn.utils.parametrize.register_parametrization(
        m, "weight", nn.Identity()
    ),
    "weight_norm": nn.utils.weight_norm,
    "prune": lambda m: prune.l1_unstructured(m, "weight", 2),
    "None": lambda m: setattr(m, "weight", None),
}


@every_kind
@pytest.mark.parametrize("how", REPLACING)
@pytest.mark.filterwarnings("ignore:.*weight_norm. is deprecated:FutureWarning")
def test_a_weight_that_would_be_computed_from_now_on_is_refused(kind: str, how: str) -> None:
    """At once or in the next forward."""
    net, m = layer(kind)
    x = torch.arange(D) if kind == "embedding" else torch.eye(D, dtype=torch.float64)
    with refused(li.LayerError, "merge"):
        REPLACING[how](m)
        net(x)


OLD: dict[str, tuple[Callable[[Any], Any], str, Callable[[Any], Any]]] = {
    "weight_norm": (lambda _: None, "weight", nn.utils.weight_norm),
    "spectral_norm": (lambda _: None, "weight", nn.utils.spectral_norm),
    "prune": (lambda _: None, "weight", REPLACING["prune"]),
    "remove_weight_norm": (nn.utils.weight_norm, "weight_v", nn.utils.remove_weight_norm),
    "remove_spectral_norm": (nn.utils.spectral_norm, "weight_orig", nn.utils.remove_spectral_norm),
    "prune.remove": (REPLACING["prune"], "weight_orig", lambda m: prune.remove(m, "weight")),
}


@pytest.mark.parametrize("how", OLD)
@pytest.mark.parametrize("is_merged", [False, True], ids=["active", "merged"])
@pytest.mark.filterwarnings("ignore:.*weight_norm. is deprecated:FutureWarning")
def test_what_takes_a_parameter_from_its_layer_is_refused_before_it_does(
    how: str, is_merged: bool
) -> None:
    """W was gone then, or the adapter was left in what had been computed with it."""
    before, site, act = OLD[how]
    model = nn.Sequential(nn.Linear(D, D)).double().eval()
    before(model[0])
    fill(li.inject(model, {"rank": 2, "targets": [site]}))
    x = torch.eye(D, dtype=torch.float64)
    expected = model(x)
    if is_merged:
        li.merge(model)
    with refused(li.LayerError, site, "merge(model", model=model):
        act(model[0])
    torch.testing.assert_close(model(x), expected)
    act(li.eject(model)[0])


@pytest.mark.parametrize("kind", ["convolution", "forward update"])
def test_fusing_with_a_batch_norm_is_refused(kind: str) -> None:
    is_conv = kind == "convolution"
    fuse: Any = nn.utils.fuse_conv_bn_eval if is_conv else nn.utils.fuse_linear_bn_eval
    _, m = layer(kind)
    bn = nn.BatchNorm1d(D).double().eval()
    with refused(li.LayerError, "merge(model"):
        fuse(m.eval(), bn)


class Reads(nn.Module):
    """Multiplies by the weight of its layer, or asks for its shape only."""

    def __init__(self) -> None:
        super().__init__()
        self.fc, self.use = nn.Linear(32, 32), True

    def forward(self, x: Tensor) -> Tensor:
        x = x.to(self.fc.weight.dtype)
        return F.linear(x, self.fc.weight) if self.use else x[:, : self.fc.weight.shape[0]]


def test_a_quantized_weight_that_a_parent_reads_is_refused_where_it_is_used() -> None:
    """torchao's tensor multiplies like a plain one, and would leave the adapter out."""
    quantization = pytest.importorskip("torchao.quantization")
    net, x = Reads(), torch.randn(2, 32)
    quantization.quantize_(net, quantization.Int8WeightOnlyConfig())
    li.inject(net, {"rank": 2, "targets": ["fc"]})
    with refused(li.LayerError, "'weight'"):
        net(x)
    net.use = False
    assert same_bits(net(x), x), "a question does not count as use"
    with li.disabled(net):
        assert net(x).shape == (2, 32)


def test_a_graph_that_would_hold_what_was_read_as_a_constant_is_refused() -> None:
    model = fill(li.inject(Reading().double(), {**CONFIG, "targets": ["read"]}))
    with refused(li.LayerError, "symbolic_trace", "torch.export", model=model):
        torch.fx.symbolic_trace(model)
    merged = copy.deepcopy(model)
    li.merge(merged, eject=True)
    merged = torch.fx.symbolic_trace(merged)
    assert error(merged(X), model(X)) < 1e-12
