"""Bases with layers that hand no gradient to what lies before them."""

import warnings
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import fill, same_bits
from helpers.packages import loaded
from torch import nn

import lora_inject as li

pytestmark = pytest.mark.filterwarnings("ignore")
CONFIG = {"rank": 2, "targets": ["0"]}


@pytest.fixture(params=["Int8WeightConfig", "IntxWeightConfig"])
def net(request: pytest.FixtureRequest) -> nn.Sequential:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        quantization = pytest.importorskip("torchao.quantization")
    torch.manual_seed(0)
    made = nn.Sequential(nn.Linear(32, 32), nn.Linear(32, 32))
    how = getattr(quantization, f"Int8DynamicActivation{request.param}")()
    quantization.quantize_(made, how, filter_fn=lambda module, name: name == "1")
    return made


def test_training_is_refused_wherever_the_adapter_is(net: nn.Sequential) -> None:
    x = torch.randn(3, 32, requires_grad=True)
    assert not net[1](x).requires_grad or net[1](x).grad_fn is None or _no_gradient(net[1], x)
    for target in ("0", "1"):
        with pytest.raises(li.LayerError, match=r"'1\.weight'.*quantizes activations.*no gradient"):
            li.inject(net, {"rank": 2, "targets": [target]})
    assert type(net[0]) is nn.Linear


def _no_gradient(layer: nn.Module, x: torch.Tensor) -> bool:
    layer(x).sum().backward()
    return x.grad is None


def test_serving_an_adapter_is_not(net: nn.Sequential, tmp_path: Path) -> None:
    plain = nn.Sequential(nn.Linear(32, 32), nn.Linear(32, 32))
    plain[0] = net[0]
    plain[1].bias = net[1].bias  # one base, of which the second layer is quantized here only
    li.save_adapter(fill(li.inject(plain, CONFIG)), tmp_path / "a")
    x = torch.randn(3, 32)
    with torch.no_grad():
        wanted = net[1](plain[0](x))
    li.eject(plain)
    li.load_adapter(net, tmp_path / "a")
    with torch.no_grad():
        assert same_bits(net(x), wanted)
    with pytest.raises(li.LayerError, match="quantizes activations"):
        li.train_only(net, "default")
    li.train_only(net, None)


def test_experts_in_mxfp4_let_no_adapter_before_them_train() -> None:
    """Only attention would be adapted; its gradient would pass by the experts in silence."""
    mxfp4 = pytest.importorskip("transformers.integrations.mxfp4")
    config = SimpleNamespace(num_local_experts=2, intermediate_size=32, hidden_size=32)
    net = nn.Sequential(nn.Linear(32, 32), mxfp4.Mxfp4GptOssExperts(config))
    with pytest.raises(li.LayerError, match=r"'1': its experts compute in MXFP4.*dequantize=True"):
        li.inject(net, CONFIG)
    trained = fill(li.inject(nn.Sequential(nn.Linear(32, 32)), CONFIG))
    li.install(net, li.adapter_state(trained), base="any")


def test_a_scheme_of_compressed_tensors_that_quantizes_activations(monkeypatch) -> None:
    loaded(monkeypatch, "compressed_tensors.quantization")
    net = nn.Sequential(nn.Linear(32, 32), nn.Linear(32, 32))
    net[1].quantization_scheme = SimpleNamespace(input_activations=object())
    with pytest.raises(li.LayerError, match=r"'1'.*quantizes activations.*dequantize=True"):
        li.inject(net, CONFIG)


class Residual(nn.Module):
    """Layers beside which a gradient finds another way."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.between, self.last = (nn.Linear(32, 32) for _ in range(3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self.first(x).relu()
        x = x + self.between(x).relu()
        return x + self.last(x)


DYNAMIC = pytest.mark.parametrize("how", ["Int8WeightConfig", "IntxWeightConfig"])


def quantized_later(how: str, targets: list[str], layers: list[str]) -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        quantization = pytest.importorskip("torchao.quantization")
    net = fill(li.inject(Residual(), {"rank": 2, "targets": targets}))
    config = getattr(quantization, f"Int8DynamicActivation{how}")()
    quantization.quantize_(net, config, filter_fn=lambda module, name: name in layers)
    return net


@DYNAMIC
def test_a_layer_with_an_adapter_is_not_quantized(how: str) -> None:
    """What would be quantized is W + delta, and the update would be added again."""
    for targets, layers in ((["first", "last"], ["first", "between", "last"]), (["last"],) * 2):
        with pytest.raises(li.LayerError, match="replacing parameter 'weight' of a Linear"):
            quantized_later(how, targets, layers)


@DYNAMIC
def test_a_quantized_layer_that_no_adapter_is_on_is_seen_when_training_is_set_up(how: str) -> None:
    net = quantized_later(how, ["first", "last"], ["between"])
    for setup in (lambda: li.parameter_groups(net, 1e-3), lambda: li.train_only(net, "default")):
        with pytest.raises(li.LayerError, match=r"'between\.weight'.*quantizes activations"):
            setup()
    li.train_only(net, None)


def test_what_a_parent_computes_with_a_packed_weight_counts_as_no_use(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Layers of compressed-tensors round W in its place: their weights read raw for everybody."""

    class Reads(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc, self.called = nn.Linear(32, 32), nn.Linear(32, 32)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.called(torch.nn.functional.linear(x, self.fc.weight))

    loaded(monkeypatch, "compressed_tensors.quantization")
    net, x, config = Reads(), torch.randn(2, 32), {"rank": 2, "targets": ["fc", "called"]}
    net.fc.quantization_scheme = SimpleNamespace()
    with pytest.raises(li.LayerError, match=r"'fc'.*reached"):
        li.inject(net, config, probe=lambda: net(x))
    optimizer = torch.optim.SGD(li.adapter_parameters(li.inject(net, config)).values(), 0.1)
    net(x).square().sum().backward()
    optimizer.step()
    assert li.unreached(net, lambda: net(x)) == ["fc"]
    assert li.adapters(net)["default"].idle == ("fc",)
    with pytest.raises(li.StateError, match="'fc'"):
        li.save_adapter(net, tmp_path / "a.safetensors", format="native")
