"""What a layer computes with its weight: known, or its weight reads as W + delta, or refused.

A forward of a class's own may scale, clamp, renumber or take other arguments, today or once another
base is loaded: nothing of that is guessed from its answers.
"""

import copy
import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from conftest import conv1d, error, fill, same_bits, snapshot
from helpers.reference import with_deltas
from torch import Tensor, nn

import lora_inject as li
from lora_inject import Geometry, LoRALinear, register_kind
from lora_inject.core.layers.kinds import KINDS

CONFIG = {"rank": 2, "alpha": 3.0, "targets": [r"^layer$"]}
N = 6
X = torch.linspace(-1, 1, 4 * N, dtype=torch.float64).view(4, N)
IDS = torch.tensor([[0, 3, 5], [2, 9, 1]])


class Gain(nn.Linear):
    """Its gain is 1 until a checkpoint is loaded, as with transformers' DoryLMHead."""

    def __init__(self) -> None:
        super().__init__(N, N)
        self.gain = nn.Parameter(torch.ones(()))

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * self.gain


class Clamped(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).clamp(-0.7, 0.7)


class Residual(nn.Linear):
    def forward(self, x: Tensor, residual: Tensor | None = None, scale: float = 1.0) -> Tensor:
        return super().forward(x) * scale + (0.0 if residual is None else residual)


class DropsItsOutput(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return F.dropout(super().forward(x), 0.5, self.training)


class Renumbers(nn.Embedding):
    def forward(self, ids: Tensor) -> Tensor:
        return super().forward((ids + 1) % self.num_embeddings)


class Host(nn.Module):
    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor, **options: Any) -> Tensor:
        return self.layer(x, **options)


def idefics() -> nn.Module:
    from transformers.models.idefics.modeling_idefics import IdeficsDecoupledEmbedding

    return IdeficsDecoupledEmbedding(8, 4, N)


def ovis2() -> nn.Module:
    from transformers.models.ovis2.modeling_ovis2 import Ovis2VisualEmbeddingTable

    return Ovis2VisualEmbeddingTable(12, N)


def dory() -> nn.Module:
    pytest.importorskip("transformers.models.dory", reason="a model of transformers 5.24")
    from transformers.models.dory.modeling_dory import DoryConfig, DoryLMHead

    return DoryLMHead(DoryConfig(hidden_size=N, vocab_size=N, initializer_range=0.02))


BUILD: dict[str, tuple[Callable[[], nn.Module], Tensor]] = {
    "gain": (Gain, X),
    "clamped": (lambda: Clamped(N, N), X),
    "residual": (lambda: Residual(N, N), X),
    "renumbers": (lambda: Renumbers(12, N), IDS),
    "idefics": (idefics, IDS),
    "ovis2 ids": (ovis2, IDS),
    "ovis2 soft": (ovis2, torch.rand(3, 12, dtype=torch.float64)),
    "dory": (dory, X),
}


def made(build: Callable[[], nn.Module]) -> tuple[Host, Host]:
    torch.manual_seed(0)
    plain = Host(build()).double()
    return plain, fill(li.inject(copy.deepcopy(plain), CONFIG))


def dense(model: nn.Module) -> Any:
    """The model as it is now, with `W + scale B A` as its weight."""
    return with_deltas(li.eject(copy.deepcopy(model)), model)


@pytest.mark.parametrize("name", BUILD)
def test_an_unknown_forward_computes_with_the_dense_weight(name: str) -> None:
    build, x = BUILD[name]
    plain, model = made(build)
    tolerance = 1e-6 if name == "dory" else 1e-12  # it computes in float32
    assert li.plan(plain, CONFIG).sites[0].update == "weight"
    assert error(plain(x), dense(model)(x)) > 1e-3
    assert error(model(x), dense(model)(x)) < tolerance
    with torch.no_grad():  # a base that is loaded later
        for key, p in model.layer.named_parameters():
            if "gain" in key or "logit_scale" in key:
                p.copy_(torch.full_like(p, 7.0))
    wide = dense(model)
    assert error(model(x), wide(x)) < tolerance
    li.merge(model)
    assert error(model(x), wide(x)) < tolerance


def test_a_gain_that_trains_with_the_adapter() -> None:
    torch.manual_seed(0)
    model = Host(Gain()).double()
    fill(li.inject(model, {**CONFIG, "train": [r"layer\.gain"]}))
    with torch.no_grad():
        li.adapter_parameters(model)["layer.gain"].fill_(3.0)
    wide = dense(model)
    wide.layer.gain.data.fill_(3.0)
    assert error(model(X), wide(X)) < 1e-12


@pytest.mark.parametrize("options", [{"scale": 3.0}, {"residual": X}, {"residual": X, "scale": 3}])
def test_further_arguments_reach_the_layer(options: dict[str, Any]) -> None:
    _, model = made(lambda: Residual(N, N))
    wide = dense(model)
    assert error(model(X, **options), wide(X, **options)) < 1e-12
    named = model.layer(residual=X, x=2 * X)
    assert error(named, wide.layer(residual=X, x=2 * X)) < 1e-12


@pytest.mark.parametrize(
    ("build", "x", "name"),
    [
        (lambda: nn.Linear(N, N), X, "input"),
        (lambda: conv1d(N, N), X, "x"),
        (lambda: nn.Embedding(12, N), IDS, "input"),
    ],
    ids=["linear", "conv1d", "embedding"],
)
def test_a_stock_layer_takes_the_arguments_that_its_class_takes(build, x, name) -> None:
    _, model = made(build)
    assert same_bits(model.layer(**{name: x}), model.layer(x))
    for args, options in (((x, x), {}), ((), {}), ((x,), {"scale": 3}), ((), {"ids": x})):
        with pytest.raises(TypeError):
            model.layer(*args, **options)


@pytest.mark.parametrize("training", [True, False])
def test_an_output_that_is_dropped_in_training_only(training: bool) -> None:
    _, model = made(lambda: DropsItsOutput(N, N))
    wide, x = dense(model), torch.randn(40, N, dtype=torch.float64)
    outputs = []
    for m in (model, wide):
        torch.manual_seed(5)
        outputs.append(m.train(training)(x))
    assert error(*outputs) < 1e-12


def test_a_kind_from_outside_says_which_argument_it_is() -> None:
    """The first of its forward, however it is passed."""

    class Adds(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(N, N))

        def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
            return x @ self.weight.t() + (0.0 if residual is None else residual)

    class LoRAAdds(LoRALinear):
        kind = "test_adds"

        @classmethod
        def matches(cls, layer: type[nn.Module]) -> bool:
            return issubclass(layer, Adds)

        @staticmethod
        def geometry(module: nn.Module) -> Geometry:
            return Geometry(N, N, (N, N))

        @classmethod
        def adds_to_output(cls, module: nn.Module, *, stock: bool) -> bool:
            return type(module).forward is Adds.forward

    before = list(KINDS)
    register_kind(LoRAAdds)
    try:
        plain, model = made(Adds)
        assert li.plan(plain, CONFIG).sites[0].update == "forward"
        wide = dense(model)
        assert error(model.layer(residual=X, x=2 * X), wide.layer(2 * X, X)) < 1e-12
        assert error(model.layer(2 * X, X), wide.layer(2 * X, X)) < 1e-12
    finally:
        KINDS[:] = before


def test_falcon_keeps_dropout_and_routing() -> None:
    from transformers.models.falcon.modeling_falcon import FalconLinear

    torch.manual_seed(0)
    model = Host(FalconLinear(N, N)).double()
    fill(li.inject(model, {**CONFIG, "dropout": 0.1}))
    assert li.adapters(model)["default"].sites["layer"].update == "forward"
    assert error(model.eval()(X), dense(model)(X)) < 1e-12


def test_peft_reads_an_unknown_forward_as_a_target_parameter(tmp_path: Path) -> None:
    """Its own way with a Linear would add to the output, past the gain and the clamp."""
    import peft

    torch.manual_seed(0)
    plain = nn.Sequential(nn.Linear(N, N), Clamped(N, N)).double()
    config = {"rank": 2, "alpha": 3.0, "targets": ["0", "1"]}
    model = fill(li.inject(copy.deepcopy(plain), config))
    li.save_adapter(model, tmp_path / "adapter")
    theirs = peft.PeftModel.from_pretrained(copy.deepcopy(plain), str(tmp_path / "adapter"))
    assert error(plain(X), model(X)) > 0.01
    assert error(theirs(X), model(X)) < 1e-6
    ours = li.load_adapter(copy.deepcopy(plain), tmp_path / "adapter")
    assert error(ours(X), model(X)) < 1e-12


# ------------------------------------------------------------------------------- refused at inject


def refused(model: nn.Module, match: str) -> None:
    before = snapshot(model)
    with pytest.raises(li.LayerError, match=match):
        li.inject(model, CONFIG)
    assert snapshot(model) == before


@pytest.mark.parametrize(
    "layer",
    [nn.Linear(N, N), nn.Embedding(N, N), nn.Conv1d(N, N, 3)],
    ids=lambda m: type(m).__name__,
)
def test_sizes_that_disagree_with_the_weight(layer: Any) -> None:
    layer.weight = nn.Parameter(layer.weight[:-1])
    refused(Host(layer), r"'layer'.*states sizes \(6, 6.*its weight has \(5, 6.*sizes to those")


def test_a_weight_that_cannot_be_read_under_a_forward_that_is_not_known() -> None:
    class Packed(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return 3 * F.linear(x, self.weight.to(x.dtype))

    layer = Packed(N, N)
    layer.weight = nn.Parameter(torch.ones(N, N, dtype=torch.int8), requires_grad=False)
    refused(Host(layer), r"'layer'.*packed.*forward of Packed is not known.*register_kind")


def test_a_weight_that_the_class_computes() -> None:
    class Doubles(nn.Linear):
        @property
        def weight(self) -> Tensor:  # type: ignore[override]
            return 2 * self._parameters["weight"]  # type: ignore[operator]

    layer = nn.Linear(N, N)
    layer.__class__ = Doubles
    refused(Host(layer), r"'layer'.*Doubles\.weight is computed by the class")


def test_a_complex_weight() -> None:
    refused(Host(nn.Linear(N, N, dtype=torch.complex64)), r"'layer'.*complex.*real")


# ---------------------------------------------------------------------------------- nested tensors


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
@pytest.mark.parametrize("layout", [torch.jagged, torch.strided], ids=str)
@pytest.mark.parametrize("rule", [{}, {"slices": ["q", "v"], "adapt": ["v"]}], ids=["", "slices"])
def test_rows_of_a_nested_tensor(layout: torch.layout, rule: dict[str, Any]) -> None:
    torch.manual_seed(0)
    model = Host(nn.Linear(N, N)).double()
    fill(li.inject(model, {**CONFIG, "targets": [{"match": "layer", **rule}]}))
    rows = [X[:1], X[1:]]
    wanted = [model(row) for row in rows]
    sum(y.square().sum() for y in wanted).backward()
    parameters = li.adapter_parameters(model).values()
    grads = [p.grad.clone() for p in parameters]  # type: ignore[union-attr]
    for p in parameters:
        p.grad = None
    nested = torch.nested.nested_tensor(rows, layout=layout)
    found = model(nested).unbind()
    assert all(error(y, w) < 1e-12 for y, w in zip(found, wanted, strict=True))
    sum(y.square().sum() for y in found).backward()
    assert all(error(p.grad, g) < 1e-12 for p, g in zip(parameters, grads, strict=True))  # type: ignore[arg-type]
    with (
        pytest.raises(li.LayerError, match=r"routed\(\): a Linear got a nested tensor"),
        li.routed(model, ["default", None]),
    ):
        model(nested)


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_a_nested_tensor_beside_an_adapter_with_a_gain_is_refused() -> None:
    model = fill(li.inject(Host(nn.Linear(N, N)).double(), {**CONFIG, "variant": "dora"}))
    nested = torch.nested.nested_tensor([X[:1], X[1:]], layout=torch.jagged)
    with pytest.raises(li.LayerError, match="an adapter with a gain: a Linear got a nested tensor"):
        model(nested)


class Graph(nn.Module):
    """Multiplies a sparse matrix with a layer that it calls, and one whose weight it reads."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.read = nn.Linear(N, N), nn.Linear(N, N)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x) + x @ self.read.weight


def test_dropout_on_a_sparse_input_is_refused_in_training() -> None:
    """The layer multiplies with W + delta there, and whoever reads a weight drops nothing."""
    model = fill(li.inject(Graph().double(), {**CONFIG, "dropout": 0.5, "targets": ["layer"]}))
    with pytest.raises(li.LayerError, match=r"'layer' in training.*dropout 0\.5.*dropout: 0"):
        model(X.to_sparse())
    assert error(model.eval()(X.to_sparse()), model(X)) < 1e-12


@pytest.mark.filterwarnings("ignore:Sparse CSR tensor support is in beta")
@pytest.mark.parametrize("layout", [Tensor.to_sparse, Tensor.to_sparse_csr], ids=["coo", "csr"])
@pytest.mark.parametrize("variant", ["lora", "dora"])
def test_a_sparse_input_gives_what_a_dense_one_gives(layout: Any, variant: str) -> None:
    plain = Graph().double()
    config = {**CONFIG, "variant": variant, "targets": ["layer", "read"]}
    model = fill(li.inject(copy.deepcopy(plain), config))
    x = X.relu()
    g = torch.randn(4, N, dtype=torch.float64)
    (model(x) * g).sum().backward()
    wanted = {k: p.grad.clone() for k, p in li.adapter_parameters(model).items()}
    model.zero_grad()
    found = model(layout(x))
    assert error(found.to_dense(), model(x)) < 1e-12
    assert error(model.eval()(layout(x)).to_dense(), model(x)) < 1e-12
    (found.to_dense() * g).sum().backward()
    assert all(error(p.grad, wanted[k]) < 1e-12 for k, p in li.adapter_parameters(model).items())
    with li.disabled(model):
        assert error(model(layout(x)).to_dense(), plain(x)) < 1e-12


@pytest.mark.parametrize("keeps_names", [True, False])
@pytest.mark.parametrize("kind", ["linear", "embedding", "Conv1D"])
def test_a_forward_that_was_put_onto_the_class_is_the_one_that_computes(
    kind: str, keeps_names: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Programs replace `nn.Linear.forward` for a whole process: not even the start was the same."""
    x: Tensor = torch.tensor([0, 3, 1])
    if kind == "Conv1D":
        cls: Any = pytest.importorskip("transformers.pytorch_utils").Conv1D
        plain = nn.Sequential(cls(4, 5))
    else:
        plain = nn.Sequential(nn.Linear(5, 4) if kind == "linear" else nn.Embedding(5, 4))
        cls = type(plain[0])
    x = x if kind == "embedding" else torch.randn(3, 5)
    real = cls.forward

    def forward(self: Any, x: Tensor) -> Tensor:
        return 2 * real(self, x)

    monkeypatch.setattr(cls, "forward", functools.wraps(real)(forward) if keeps_names else forward)
    model = li.inject(copy.deepcopy(plain), {"rank": 2, "alpha": 3.0, "targets": ["0"]})
    assert same_bits(model(x), plain(x))
    fill(model)
    wide = with_deltas(plain, model)
    assert error(model(x), wide(x if kind == "embedding" else x.double())) < 1e-5


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("kind", ["linear", "embedding", "Conv1D"])
def test_a_forward_that_is_put_onto_the_class_after_inject_is_refused(
    kind: str, training: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A layer whose class computes as torch's does is computed without a call of its forward."""
    if kind == "Conv1D":
        layer: nn.Module = pytest.importorskip("transformers.pytorch_utils").Conv1D(4, 5)
    else:
        layer = nn.Linear(5, 4) if kind == "linear" else nn.Embedding(5, 4)
    cls: Any = type("Own", (type(layer),), {})
    layer.__class__ = cls
    x: Tensor = torch.tensor([0, 3, 1]) if kind == "embedding" else torch.randn(3, 5)
    model = fill(li.inject(nn.Sequential(layer), {"rank": 2, "targets": ["0"]})).train(training)
    real = cls.forward
    with torch.set_grad_enabled(training):
        model(x)
        with monkeypatch.context() as patched:
            patched.setattr(cls, "forward", lambda self, x: 2 * real(self, x))
            li.activate(model, None)
            with pytest.raises(li.LayerError, match="another forward onto Own, which would not be"):
                model(x)
            again = li.inject(li.eject(model), {"rank": 2, "targets": ["0"]})
            assert same_bits(again(x), 2 * real(li.eject(again)[0], x))
