"""What a layer computes with its weight: known, or its weight reads as W + delta, or refused.

A forward of a class's own may scale, clamp, renumber or take other arguments, today or once another
base is loaded: nothing of that is guessed from its answers. Where the weight itself is computed
(weight_norm, spectral_norm), what it is computed of is adapted.
"""

import copy
import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from conftest import error, fill, same_bits
from helpers.reference import EXACT, SCALE, config, random, with_deltas
from helpers.refusals import refused
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize

import lora_inject as li
from contract.kinds import ActivationInside, conv1d

CONFIG = {"rank": 2, "alpha": 3.0, "targets": [r"^layer$"]}
N = 6
X = torch.linspace(-1, 1, 4 * N, dtype=torch.float64).view(4, N)


class Own(nn.Linear):
    """Its gain is 1 until a checkpoint is loaded, as with transformers' DoryLMHead."""

    def __init__(self, *sizes: int) -> None:
        super().__init__(*sizes)
        self.gain = nn.Parameter(torch.ones(()))

    def forward(self, x: Tensor, residual: Tensor | float = 0.0, scale: float = 1.0) -> Tensor:
        return super().forward(x) * self.gain * scale + residual


class Renumbers(nn.Embedding):
    def forward(self, ids: Tensor) -> Tensor:
        return super().forward((ids + 1) % self.num_embeddings)


class Host(nn.Module):
    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor, **options: Any) -> Tensor:
        return self.layer(x, **options)


def made(build: Callable[[], nn.Module], **options: Any) -> tuple[Host, Host]:
    torch.manual_seed(0)
    plain = Host(build()).double()
    return plain, fill(li.inject(copy.deepcopy(plain), {**CONFIG, **options}))


OPTIONS = [{}, {"scale": 3.0}, {"residual": X, "scale": 3.0}]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_an_unknown_forward_computes_with_the_dense_weight(options: dict[str, Any]) -> None:
    _, model = made(lambda: Own(N, N))
    model.layer.gain.data.fill_(7.0)  # a base that is loaded later
    wide = with_deltas(li.eject(copy.deepcopy(model)), model)
    assert error(model(X, **options), wide(X, **options)) < 1e-12
    assert error(model.layer(x=X, **options), wide(X, **options)) < 1e-12
    plain, model = made(lambda: Renumbers(12, N))
    ids = torch.tensor([[0, 3, 5], [2, 9, 1]])
    assert error(model(ids), with_deltas(plain, model)(ids)) < 1e-12


def test_peft_reads_an_unknown_forward_as_a_target_parameter(tmp_path: Path) -> None:
    """Its own way with a Linear would add to the output, past the activation."""
    import peft

    plain = nn.Sequential(nn.Linear(N, N), ActivationInside(N, N)).double()
    config = {"rank": 2, "alpha": 3.0, "targets": ["0", "1"]}
    model = fill(li.inject(copy.deepcopy(plain), config))
    li.save_adapter(model, tmp_path / "adapter")
    theirs = peft.PeftModel.from_pretrained(copy.deepcopy(plain), str(tmp_path / "adapter"))
    assert error(plain(X), model(X)) > 0.01
    assert error(theirs(X), model(X)) < 1e-6
    ours = li.load_adapter(copy.deepcopy(plain), tmp_path / "adapter")
    assert error(ours(X), model(X)) < 1e-12


class Triples(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return 3 * F.linear(x, self.weight.to(x.dtype))


class Doubles(nn.Linear):
    @property
    def weight(self) -> Tensor:  # type: ignore[override]
        return 2 * self._parameters["weight"]  # type: ignore[operator]


def computed() -> nn.Module:
    layer = nn.Linear(N, N)
    layer.__class__ = Doubles
    return layer


def cut_short() -> nn.Module:
    layer = nn.Linear(N, N)
    layer.weight = nn.Parameter(layer.weight[:-1])
    return layer


def packed() -> nn.Module:
    layer = Triples(N, N)
    layer.weight = nn.Parameter(torch.ones(N, N, dtype=torch.int8), requires_grad=False)
    return layer


REFUSED: dict[str, tuple[Callable[[], nn.Module], tuple[str, ...]]] = {
    "of other sizes": (cut_short, ("'layer'", "(6, 6", "(5, 6")),
    "packed, own forward": (packed, ("Triples", "register_kind")),
    "max_norm": (lambda: nn.Embedding(9, N, max_norm=1.0), ("'layer'", "max_norm")),
    "computed": (computed, ("Doubles.weight",)),
    "complex": (lambda: nn.Linear(N, N, dtype=torch.complex64), ("'layer'", "complex")),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_layer_whose_product_cannot_be_known_is_refused(name: str) -> None:
    build, names = REFUSED[name]
    model = Host(build())
    with refused(li.LayerError, *names, model=model):
        li.inject(model, CONFIG)


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
@pytest.mark.parametrize("layout", [torch.jagged, torch.strided], ids=str)
def test_rows_of_a_nested_tensor(layout: torch.layout) -> None:
    rule = {"match": "layer", "slices": ["q", "v"], "adapt": ["v"]}
    _, model = made(lambda: nn.Linear(N, N), targets=[rule])
    trained, rows = list(li.adapter_parameters(model).values()), [X[:1], X[1:]]
    nested = torch.nested.nested_tensor(rows, layout=layout)
    outputs = [model(row) for row in rows], model(nested).unbind()
    grads = [torch.autograd.grad(sum(y.square().sum() for y in ys), trained) for ys in outputs]
    for pairs in (outputs, grads):
        assert all(error(one, other) < 1e-12 for one, other in zip(*pairs, strict=True))
    with refused(li.LayerError, "routed("), li.routed(model, ["default", None]):
        model(nested)
    li.inject(model, {**CONFIG, "variant": "dora"}, "dora")
    with refused(li.LayerError, "gain", "nested tensor"):
        model(nested)


SPARSE: dict[str, dict[str, Any]] = {
    "plain": {},
    "slices": {"slices": ["q", "v"], "adapt": ["v"]},
    "dropout": {"dropout": 0.5},
    "gain": {"variant": "dora"},
}


@pytest.mark.filterwarnings("ignore:Sparse CSR tensor support:UserWarning")
@pytest.mark.parametrize("layout", ["sparse", "sparse_csr", "sparse_csc"])
@pytest.mark.parametrize("options", SPARSE)
def test_a_sparse_input_is_the_dense_one(options: str, layout: str) -> None:
    """Bags of words and one-hot features, which `nn.Linear` takes."""
    _, model = made(lambda: nn.Linear(N, N), targets=[{"match": "layer", **SPARSE[options]}])
    trained, x = list(li.adapter_parameters(model).values()), X.clone()
    x[..., ::2] = 0
    sparse = getattr(x, f"to_{layout}")()
    assert model(sparse).shape == x.shape
    model.eval()
    both = [(y := model(t), *torch.autograd.grad(y.sum(), trained)) for t in (x, sparse)]
    assert all(error(one, other) < 1e-12 for one, other in zip(*both, strict=True))


STOCK: dict[str, tuple[Callable[[], nn.Module], Tensor]] = {
    "linear": (lambda: nn.Linear(5, 4), torch.linspace(-1, 1, 15).view(3, 5)),
    "embedding": (lambda: nn.Embedding(5, 4), torch.tensor([0, 3, 1])),
    "conv1d": (lambda: conv1d(4, 5), torch.linspace(-1, 1, 15).view(3, 5)),
}


def doubling(real: Any) -> Any:
    return lambda self, x: 2 * real(self, x)


@pytest.mark.parametrize("keeps_names", [True, False])
@pytest.mark.parametrize("kind", STOCK)
def test_a_forward_that_was_put_onto_the_class_is_the_one_that_computes(
    kind: str, keeps_names: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Programs replace `nn.Linear.forward` for a whole process: not even the start was the same."""
    build, x = STOCK[kind]
    plain = nn.Sequential(build())
    real = type(plain[0]).forward
    new = functools.wraps(real)(doubling(real)) if keeps_names else doubling(real)
    monkeypatch.setattr(type(plain[0]), "forward", new)
    model = li.inject(copy.deepcopy(plain), {"rank": 2, "alpha": 3.0, "targets": ["0"]})
    assert same_bits(model(x), plain(x))
    fill(model)
    wide = with_deltas(plain, model)
    assert error(model(x), wide(x if kind == "embedding" else x.double())) < 1e-5


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("kind", STOCK)
def test_a_forward_that_is_put_onto_the_class_after_inject_is_refused(
    kind: str, training: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A layer whose class computes as torch's does is computed without a call of its forward."""
    build, x = STOCK[kind]
    layer = build()
    cls: Any = type("Own", (type(layer),), {})
    layer.__class__ = cls
    model = fill(li.inject(nn.Sequential(layer), {"rank": 2, "targets": ["0"]})).train(training)
    with torch.set_grad_enabled(training):
        model(x)
        monkeypatch.setattr(cls, "forward", doubling(cls.forward))
        li.activate(model, None)
        with refused(li.LayerError, "Own", "inject again"):
            model(x)
        due = li.eject(model)(x)
        assert same_bits(li.inject(model, {"rank": 2, "targets": ["0"]})(x), due)


COMPUTED: dict[str, tuple[Callable[[nn.Module], Any], str]] = {
    "weight_norm": (parametrizations.weight_norm, "parametrizations.weight.original1"),
    "spectral_norm": (parametrizations.spectral_norm, "parametrizations.weight.original"),
    "orthogonal": (parametrizations.orthogonal, "parametrizations.weight.original"),
    "old weight_norm": (nn.utils.weight_norm, "weight_v"),
}


@pytest.mark.filterwarnings("ignore:.*weight_norm. is deprecated:FutureWarning")
@pytest.mark.parametrize("how", COMPUTED)
def test_what_a_weight_is_computed_of_is_adapted(how: str) -> None:
    compute, parameter = COMPUTED[how]

    def make() -> Any:
        torch.manual_seed(3)
        return nn.Sequential(compute(nn.Linear(6, 6).double())).eval()

    for target in ("0", r"0\.weight"):
        with pytest.raises((li.LayerError, li.MatchError)) as raised:
            li.plan(make(), config(target))
        assert target != "0" or parameter in str(raised.value)
    plain, model, x = make(), make(), random(3, 6)
    cls = type(model[0])
    site = li.adapter_state(fill(li.inject(model, config(parameter)))).sites[f"0.{parameter}"]
    plain.get_parameter(f"0.{parameter}").data.add_(SCALE * site.B @ site.A)
    assert error(model(x), plain(x)) < EXACT
    li.merge(model, eject=True)
    assert error(model(x), plain(x)) < EXACT
    assert type(model[0]) is cls


@pytest.mark.parametrize("name", ["0", "1"])
def test_a_module_some_of_whose_weights_are_computed_is_not_adapted_in_part(name: str) -> None:
    model = nn.Sequential(nn.LSTM(4, 4), nn.MultiheadAttention(4, 2))
    parametrizations.spectral_norm(model[0], "weight_hh_l0")
    parametrizations.spectral_norm(model[1], "in_proj_weight")
    with refused(li.LayerError, f"'{name}'", "original", model=model):
        li.inject(model, config(name))


class Doubled(nn.Module):
    def forward(self, W: torch.Tensor) -> torch.Tensor:
        return 2 * W


def test_a_bias_that_is_parametrized_after_inject_is_used() -> None:
    model, x = fill(li.inject(nn.Sequential(nn.Linear(6, 6).double()), config("0"))), random(3, 6)
    parametrize.register_parametrization(model[0], "bias", Doubled())
    wide = with_deltas(li.eject(copy.deepcopy(model)), model)
    assert error(model(x), wide(x)) < EXACT
    assert parametrize.is_parametrized(li.eject(model)[0], "bias")


def test_a_layer_that_was_given_another_class_is_an_error_and_can_be_ejected() -> None:
    class Other(nn.Linear):
        """Knows of no adapter."""

    def further(model: nn.Module) -> None:
        li.inject(model, config("0", "1"), "second")  # 0 is of that class too, and never had one

    model = li.inject(nn.Sequential(Other(6, 6), nn.Linear(6, 6)), config("1"))
    model[1].__class__ = Other
    for verb in (li.merge, li.adapter_state, further):
        with refused(li.LayerError, "'1'", "Other", model=model):
            verb(model)
    li.eject(model)
    assert type(model[1]) is Other
    assert list(model.state_dict()) == ["0.weight", "0.bias", "1.weight", "1.bias"]
