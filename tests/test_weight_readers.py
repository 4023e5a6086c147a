"""Who reads a weight finds what it needs: a forward W + delta, everybody else W itself.

A parent may compute with the weight of a child instead of calling it, or besides calling it.
"""

import copy
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import torchvision
from conftest import error, fill, same_bits
from helpers.reference import with_deltas
from torch import Tensor, nn
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn.utils import prune
from torch.utils.checkpoint import checkpoint

import lora_inject as li

CONFIG = {"rank": 2, "alpha": 3.0}
V, D = 11, 6
IDS = torch.arange(8).view(2, 4)
X = torch.linspace(-1, 1, 24, dtype=torch.float64).view(4, D)


class Reading(nn.Module):
    """Computes with the weight of one child, calls another, and does both with a third."""

    def __init__(self) -> None:
        super().__init__()
        self.read = nn.Linear(D, D)
        self.called = nn.Linear(D, D)
        self.both = nn.Linear(D, D)

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
    "all": (Reading, ["read", "called", "both"], X),
    "its weight named": (Reading, [r"read\.weight", "called"], X),
    "embedding": (TiedByHand, ["emb"], IDS),
    "embedding and layers": (TiedByHand, ["emb", "read", "both"], IDS),
    "asked for its dtype": (AsksOnly, ["wo"], X),
}
every_case = pytest.mark.parametrize("case", CASES)


def made(case: str, **options: Any) -> tuple[nn.Module, nn.Module, Tensor]:
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
    li.merge(model)
    assert error(model(x), wide(x)) < 1e-12


class Parts(nn.Module):
    """Methods that users call in place of the forward, as those of CLIP, timm and Lightning."""

    def __init__(self) -> None:
        super().__init__()
        self.proj = nn.Parameter(torch.randn(D, D))
        self.fc = nn.Linear(D, D)

    def encode_image(self, x: Tensor) -> Tensor:
        return F.linear(x, self.fc.weight) @ self.proj

    decode = torch.no_grad()(encode_image)

    def forward_features(self, x: Tensor) -> Tensor:
        return self.encode_image(x)

    def training_step(self, batch: tuple[Tensor], _: int) -> Tensor:
        return F.linear(batch[0], self.fc.weight) @ self.proj

    def encoder_init(self, x: Tensor) -> Tensor:
        return F.linear(x, self.fc.weight) @ self.proj


def test_a_part_of_the_forward_that_users_call_reads_as_the_forward_does() -> None:
    plain: Any = Parts().double()
    model: Any = fill(li.inject(copy.deepcopy(plain), {**CONFIG, "targets": ["proj", "fc"]}))
    wanted = with_deltas(plain, model).encode_image(X)  # type: ignore[operator]
    found = model.encode_image(X), model.decode(X), model.forward_features(X)
    assert all(error(each, wanted) < 1e-12 for each in (*found, model.training_step((X,), 0)))
    assert same_bits(model.encoder_init(X), plain.encode_image(X))


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


@every_case
@pytest.mark.parametrize("how", ["plain", "reentrant", "not reentrant", "checkpointed function"])
def test_gradients_flow_through_what_was_read(case: str, how: str) -> None:
    plain, model, x = made(case)
    wide, scale = with_deltas(plain, model), torch.ones((), dtype=torch.float64, requires_grad=True)

    def run(m: nn.Module) -> Tensor:
        if how == "plain":
            return m(x)  # type: ignore[no-any-return]
        if how == "checkpointed function":
            # Recomputed without a call of the module.
            return checkpoint(m.forward, x, use_reentrant=False)  # type: ignore[no-any-return]
        return checkpoint(lambda x, s: m(x) * s, x, scale, use_reentrant=how == "reentrant")  # type: ignore[no-any-return]

    check_gradients(model.train(), wide, run)


@pytest.mark.parametrize(
    "case", ["all", "its weight named", "embedding and layers", "asked for its dtype"]
)
def test_the_whole_is_one_compiled_graph(case: str) -> None:
    plain, model, x = made(case)
    wide = with_deltas(plain, model)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    assert error(compiled(x), wide(x)) < 1e-12
    check_gradients(model, wide, lambda m: compiled(x) if m is model else m(x))


def test_a_part_that_is_called_directly_and_its_forward() -> None:
    plain, model, _ = made("embedding and layers")
    wide: Any = with_deltas(plain, model)
    assert error(model.inner[0](X), wide.inner[0](X)) < 1e-12
    assert error(model.inner[0].forward(X), wide.inner[0](X)) < 1e-12
    assert error(torch.func.functional_call(model, {}, (IDS,)), wide(IDS)) < 1e-12


def test_threads_do_not_see_each_others_forwards() -> None:
    plain, model, x = made("all")
    wanted, found, raw = with_deltas(plain, model)(x), [], []

    def serve() -> None:
        for _ in range(20):
            found.append(model(x))
            raw.append(model.read.weight)

    threads = [threading.Thread(target=serve) for _ in range(4)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert len(found) == 80
    assert all(error(y, wanted) < 1e-12 for y in found)
    assert all(w is model.read._parameters["weight"] for w in raw)


def test_a_question_about_a_weight_does_not_count_as_use() -> None:
    """Dropout acts on the input of a layer, which the reader of its weight does not have."""
    _, model, x = made("asked for its dtype", dropout=0.5)
    model.train()(x)
    with li.routed(model.eval(), ["default", None, None, None]):
        model(x)
    _, model, x = made("read", dropout=0.5)
    with pytest.raises(li.LayerError, match=r"'read'.*dropout 0\.5.*reader of a weight"):
        model.train()(x)
    model.eval()(x)
    with (
        li.routed(model, ["default", None, None, None]),
        pytest.raises(li.LayerError, match="one weight is read for the whole batch"),
    ):
        model(x)


def test_the_summary_and_the_card_name_what_no_forward_has_used(tmp_path: Path) -> None:
    _, model, x = made("all")
    assert li.adapters(model)["default"].idle == ()
    model.called(x)
    assert li.adapters(model)["default"].idle == ("read", "both")
    assert "default: no forward has used 'read', 'both' (2) so far" in li.summary(model)
    card = (li.save_adapter(model, tmp_path / "a") / "README.md").read_text()
    assert "used 2 of them when it was saved: `read`, `both`" in card
    model(x)
    assert li.adapters(model)["default"].idle == ()
    assert "so far" not in li.summary(model)


def test_an_idle_layer_is_found_by_a_probe() -> None:
    class Idle(AsksOnly):
        def forward(self, x: Tensor) -> Tensor:
            return x * self.wo.weight.numel()

    model = Idle().double()
    with pytest.raises(li.LayerError, match=r"'wo'.*reached"):
        li.inject(model, {**CONFIG, "targets": ["wo"]}, probe=lambda: model(X))


@pytest.mark.parametrize("compute", ["base", "float32"])
def test_over_16_bits_a_read_weight_keeps_its_dtype(compute: str) -> None:
    torch.manual_seed(0)
    plain = TiedByHand().bfloat16()
    config = {**CONFIG, "targets": ["emb", "read", "both"], "compute": compute}
    model = fill(li.inject(copy.deepcopy(plain), config))
    found = model(IDS)
    assert found.dtype == torch.bfloat16
    wide = with_deltas(plain, model)
    assert error(found.double(), wide(IDS)) < 0.05


# --------------------------------------------------------------------------------- other libraries


def test_torchvisions_swin() -> None:
    """`shifted_window_attention(x, self.qkv.weight, self.proj.weight, ...)` reads both."""
    torch.manual_seed(0)
    plain = torchvision.models.SwinTransformer(
        [4, 4], 8, [1, 1], [2, 2], [2, 2], num_classes=3, stochastic_depth_prob=0.0
    )
    plain = plain.eval().double()
    model = fill(li.inject(copy.deepcopy(plain), {**CONFIG, "targets": ["qkv", "proj"]}))
    x = torch.randn(1, 3, 16, 16, dtype=torch.float64)
    wide = with_deltas(plain, model)
    assert error(plain(x), wide(x)) > 1e-3
    assert error(model(x), wide(x)) < 1e-12
    check_gradients(model, wide, lambda m: m(x))


# ----------------------------------------------------------------------------- outside of forwards

LAYERS: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "forward update": (lambda: nn.Linear(D, D), "^0$"),
    "weight update": (lambda: nn.Linear(D, D), r"^0\.weight"),
    "convolution": (lambda: nn.Conv1d(D, D, 1), "^0$"),
    "embedding": (lambda: nn.Embedding(D, D), "^0$"),
}


def layer(kind: str) -> tuple[nn.Module, Any]:
    torch.manual_seed(0)
    net = nn.Sequential(LAYERS[kind][0]()).double()
    fill(li.inject(net, {**CONFIG, "targets": [LAYERS[kind][1]]}))
    return net, net[0]


WRITES: dict[str, Callable[[Any], Any]] = {
    "nn.init": lambda m: nn.init.constant_(m.weight, 0.5),
    "data": lambda m: m.weight.data.fill_(0.5),
    "set data": lambda m: setattr(m.weight, "data", torch.full_like(m.weight, 0.5)),
    "no_grad": lambda m: torch.no_grad()(lambda: m.weight.copy_(torch.full_like(m.weight, 0.5)))(),
    "another Parameter": lambda m: setattr(m, "weight", nn.Parameter(m.weight * 0 + 0.5)),
    "reset_parameters": lambda m: m.reset_parameters(),
}


@pytest.mark.parametrize("write", WRITES)
@pytest.mark.parametrize("kind", LAYERS)
def test_a_write_from_outside_reaches_the_base(kind: str, write: str) -> None:
    net, m = layer(kind)
    values = {k: v.clone() for k, v in net.state_dict().items()}
    assert m.weight is m._parameters["weight"]
    WRITES[write](m)
    if write != "reset_parameters":
        assert (m._parameters["weight"] == 0.5).all()
    now = net.state_dict()
    assert not torch.equal(now["0.weight"], values["0.weight"])
    assert all(torch.equal(now[k], v) for k, v in values.items() if "lora" in k)
    x = torch.arange(D) if kind == "embedding" else torch.eye(D, dtype=torch.float64)
    x = x.t()[..., None] if kind == "convolution" else x
    plain = copy.deepcopy(net)
    li.eject(plain)
    assert error(net(x), with_deltas(plain, net)(x)) < 1e-12


REPLACING: dict[str, Callable[[Any], Any]] = {
    "parametrize": lambda m: nn.utils.parametrize.register_parametrization(
        m, "weight", nn.Identity()
    ),
    "parametrizations.weight_norm": lambda m: nn.utils.parametrizations.weight_norm(m),
    "weight_norm": nn.utils.weight_norm,
    "spectral_norm": nn.utils.spectral_norm,
    "parametrizations.orthogonal": lambda m: nn.utils.parametrizations.orthogonal(m),
    "prune": lambda m: prune.l1_unstructured(m, "weight", 2),
    "None": lambda m: setattr(m, "weight", None),
    "register None": lambda m: m.register_parameter("weight", None),
}


@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize("how", REPLACING)
@pytest.mark.filterwarnings("ignore:.*weight_norm. is deprecated:FutureWarning")
def test_a_weight_that_would_be_computed_from_now_on_is_refused(kind: str, how: str) -> None:
    _, m = layer(kind)
    held, cls = dict(m._parameters), type(m)
    values = m._parameters["weight"].clone()
    with pytest.raises(li.LayerError, match=r"Eject the adapter first|merge\(model"):
        REPLACING[how](m)
    assert type(m) is cls
    assert not m._buffers
    assert not m._forward_pre_hooks
    assert [(k, id(p)) for k, p in m._parameters.items()] == [(k, id(p)) for k, p in held.items()]
    assert same_bits(m._parameters["weight"], values)


def fuse_conv_and_bn(layer: Any) -> Tensor:
    """As ultralytics names it: what reads the weight puts another in its place."""
    return layer.weight.clone()


def from_float(layer: Any) -> Tensor:
    """As torchao names what makes a float8 layer of another."""
    return layer.weight


class Fused(nn.Linear):
    """Computes with a weight that it fuses in each forward."""

    def forward(self, x: Tensor) -> Tensor:
        return x @ fuse_conv_and_bn(self).T


def test_a_layer_that_would_be_replaced_is_refused_and_one_that_fuses_as_it_runs_is_not() -> None:
    from transformers.pytorch_utils import prune_linear_layer

    for kind in LAYERS:
        _, m = layer(kind)
        for put_another in (fuse_conv_and_bn, from_float):
            with pytest.raises(li.LayerError, match=rf"^{put_another.__name__}: .* merge\(model"):
                put_another(m)
    _, m = layer("forward update")
    with pytest.raises(li.LayerError, match=r"^prune_linear_layer: "):
        prune_linear_layer(m, torch.tensor([1]))
    plain = nn.Sequential(Fused(D, D)).double()
    model = fill(li.inject(copy.deepcopy(plain), {**CONFIG, "targets": ["0"]}))
    assert error(model(X), with_deltas(plain, model)(X)) < 1e-12


def replaced_by_accelerate(model: nn.Module) -> None:
    from accelerate.utils import BnbQuantizationConfig
    from accelerate.utils.bnb import replace_with_bnb_layers

    replace_with_bnb_layers(model, BnbQuantizationConfig(load_in_8bit=True), [])


def replaced_by_bitsandbytes(model: nn.Module) -> None:
    from bitsandbytes.utils import replace_linear

    replace_linear(model, nn.Linear, copy_weights=True)


def replaced_by_lightning(model: nn.Module) -> None:
    plugins = pytest.importorskip("lightning.fabric.plugins")
    plugins.BitsandbytesPrecision("int8").convert_module(model)


def replaced_for_torchao_qat(model: nn.Module) -> None:
    from torchao.quantization.qat.linear import Int8DynActInt4WeightQATQuantizer

    Int8DynActInt4WeightQATQuantizer(groupsize=32).prepare(model)


def replaced_by_torchao_sparsity(model: nn.Module) -> None:
    from torchao.sparsity.training import SemiSparseLinear, swap_linear_with_semi_sparse_linear

    swap_linear_with_semi_sparse_linear(model, {"0": SemiSparseLinear})


@pytest.mark.filterwarnings("ignore:Deprecation. TorchAODType")
@pytest.mark.parametrize(
    "replace",
    [
        replaced_by_accelerate,
        replaced_by_bitsandbytes,
        replaced_by_lightning,
        replaced_for_torchao_qat,
        replaced_by_torchao_sparsity,
    ],
)
def test_a_library_that_replaces_layers_after_inject_is_refused(replace: Any) -> None:
    plain = nn.Sequential(nn.Linear(32, 32, bias=False))
    replace(copy.deepcopy(plain))
    model = fill(li.inject(plain, {**CONFIG, "targets": ["0"]}))
    with pytest.raises(li.LayerError, match=r"the layer has an adapter.*merge\(model"):
        replace(model)


def test_a_graph_that_would_hold_the_sum_as_a_constant_is_refused() -> None:
    plain, model, x = made("read")
    with torch.no_grad(), pytest.raises(li.LayerError, match=r"symbolic_trace.*torch\.export"):
        torch.fx.symbolic_trace(model)
    traced = make_fx(model)(x)
    assert error(traced(x), with_deltas(plain, model)(x)) < 1e-12
    with li.disabled(model):
        assert error(torch.fx.symbolic_trace(model)(x), plain(x)) < 1e-12


def test_fusing_with_a_batch_norm_is_refused() -> None:
    for kind, bn, fuse in (
        ("convolution", nn.BatchNorm1d(D), nn.utils.fuse_conv_bn_eval),
        ("weight update", nn.BatchNorm1d(D), nn.utils.fuse_linear_bn_eval),
        ("forward update", nn.BatchNorm1d(D), nn.utils.fuse_linear_bn_eval),
    ):
        net, m = layer(kind)
        with pytest.raises(li.LayerError, match=r"has an adapter.*merge\(model"):
            fuse(m.eval(), bn.double().eval())
        li.merge(net)
        li.eject(net)
        fuse(net[0].eval(), bn.double().eval())


@pytest.mark.parametrize("first", ["quantized", "injected"])
def test_a_quantized_weight_that_a_parent_reads_is_refused_where_it_is_used(first: str) -> None:
    """torchao's tensor multiplies like a plain one, and would leave the adapter out."""

    class Reads(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc, self.use = nn.Linear(32, 32), True

        def forward(self, x: Tensor) -> Tensor:
            x = x.to(self.fc.weight.dtype)
            return F.linear(x, self.fc.weight) if self.use else x[:, : self.fc.weight.shape[0]]

    quantization = pytest.importorskip("torchao.quantization")
    net, x = Reads(), torch.randn(2, 32)
    if first == "injected":
        li.inject(net, {"rank": 2, "targets": ["fc"]})
    quantization.quantize_(net, quantization.Int8WeightOnlyConfig())
    if first == "quantized":
        li.inject(net, {"rank": 2, "targets": ["fc"]})
    with pytest.raises(li.LayerError, match=r"reading 'weight' of a Linear.*Leave this layer out"):
        net(x)
    net.use = False
    assert same_bits(net(x), x), "a question does not count as use"
    with li.disabled(net):
        assert net(x).shape == (2, 32)
