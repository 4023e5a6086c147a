"""Bases with layers that hand no gradient to what lies before them."""

import copy
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from conftest import error, fill, same_bits, snapshot
from helpers.packages import compressed, imported, loaded
from torch import nn

import lora_inject as li

pytestmark = pytest.mark.filterwarnings("ignore")
CONFIG = {"rank": 2, "targets": ["0"]}
DYNAMIC = ["Int8WeightConfig", "IntxWeightConfig"]


def quantize(net: Any, how: str, *names: str) -> Any:
    quantization = imported("torchao.quantization")
    config = getattr(quantization, f"Int8DynamicActivation{how}")()
    quantization.quantize_(net, config, filter_fn=lambda module, name: name in names)
    return net


def two_layers() -> Any:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(32, 32), nn.Linear(32, 32))


@pytest.mark.parametrize("how", DYNAMIC)
def test_an_adapter_serves_and_does_not_train_wherever_it_is(how: str, tmp_path: Path) -> None:
    net, plain, x = quantize(two_layers(), how, "1"), two_layers(), torch.randn(3, 32)
    for target in ("0", "1"):
        with pytest.raises(li.LayerError, match=r"'1\.weight'.*quantizes activations.*no gradient"):
            li.inject(net, {"rank": 2, "targets": [target]})
    assert type(net[0]) is nn.Linear
    li.save_adapter(fill(li.inject(plain, CONFIG)), tmp_path / "a")
    li.load_adapter(net, tmp_path / "a")
    with torch.no_grad():
        assert same_bits(net(x), net[1](plain[0](x)))
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
    net = two_layers()
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


@pytest.mark.parametrize("how", DYNAMIC)
def test_a_layer_is_not_quantized_over_its_adapter_and_one_between_is_seen(how: str) -> None:
    """What would be quantized is W + delta, and the update would be added again."""
    net = fill(li.inject(Residual(), {"rank": 2, "targets": ["first", "last"]}))
    with pytest.raises(li.LayerError, match="replacing parameter 'weight' of a Linear"):
        quantize(copy.deepcopy(net), how, "first", "between", "last")
    quantize(net, how, "between")
    for setup in (lambda: li.parameter_groups(net, 1e-3), lambda: li.train_only(net, "default")):
        with pytest.raises(li.LayerError, match=r"'between\.weight'.*quantizes activations"):
            setup()
    li.train_only(net, None)


def test_layers_that_torch_quantizes_serve_and_let_no_adapter_before_them_train() -> None:
    """They compute without autograd: a gradient would pass by them in silence."""
    dynamic, x = torch.ao.quantization.quantize_dynamic, torch.randn(3, 32)
    words = r"'between': its Linear of torch\.ao computes"
    net = dynamic(Residual(), {"between", "last"})
    with pytest.raises(li.LayerError, match=words):
        li.inject(net, {"rank": 2, "targets": ["first"]})
    assert type(net.first) is nn.Linear
    model = fill(li.inject(Residual(), {"rank": 2, "targets": ["first", "last"]}))
    net, wide = dynamic(model), Residual()
    with torch.no_grad():
        for name in ("first", "last"):
            wide.get_submodule(name).weight.copy_(model.get_submodule(name).weight)
        wide.between = net.between
        assert type(net.between).__module__ == "torch.ao.nn.quantized.dynamic.modules.linear"
        assert error(net(x), wide(x)) < 1e-5
    for setup in (lambda: li.parameter_groups(net, 1e-3), lambda: li.train_only(net, "default")):
        with pytest.raises(li.LayerError, match=words):
            setup()
    assert li.adapter_state(net).sites == li.adapter_state(model).sites


@pytest.mark.parametrize("by", ["name", "class", "static"])
def test_a_layer_with_an_adapter_is_not_quantized_by_torch(by: str) -> None:
    quantization = torch.ao.quantization
    model = fill(li.inject(Residual(), {"rank": 2, "targets": ["first", "between", "last"]}))
    x = torch.randn(3, 32)
    before, wanted = snapshot(model), model(x)
    if by == "static":
        made = copy.deepcopy(model).eval()
        made.qconfig = quantization.get_default_qconfig("x86")
        made = quantization.convert(quantization.prepare(made))
    else:
        made = quantization.quantize_dynamic(model, {"first"} if by == "name" else {nn.Linear})
    assert same_bits(made(x), wanted)
    assert snapshot(model) == before


def test_a_layer_that_rounds_its_weight_in_place_is_read_by_others_with_its_adapter(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Layers of compressed-tensors do so: whoever else read the weight got plain W in silence."""

    class Both(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc, self.calls = nn.Linear(32, 32), True

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            read = nn.functional.linear(x, self.fc.weight)
            return read + self.fc(x) if self.calls else read

    loaded(monkeypatch, "compressed_tensors.quantization")
    net, x = Both(), torch.randn(2, 32)
    compressed(net.fc)
    W, bias = net.fc.weight.detach().clone(), net.fc.bias.detach().clone()
    li.inject(net, {"rank": 2, "alpha": 3, "targets": ["fc"]}, probe=lambda: net(x))
    delta = 1.5 * fill(net).fc.lora_B__default @ net.fc.lora_A__default
    torch.testing.assert_close(net(x), x @ (W.round(decimals=1) + W + 2 * delta).T + bias)
    net(x).square().sum().backward()
    assert all(p.grad.norm() > 0 for p in li.adapter_parameters(net).values())
    assert torch.equal(net.fc.get_parameter("weight"), W)
    net.calls = False
    torch.testing.assert_close(net(x), x @ (W + delta).T)
    assert li.unreached(net, lambda: net(x)) == []
    path = li.save_adapter(net, tmp_path / "a.safetensors", format="native")
    torch.testing.assert_close(li.load_adapter(li.eject(net), path)(x), x @ (W + delta).T)
