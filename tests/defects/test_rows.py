"""Rows: each row of a routed batch computes what it computes alone, under its own adapter.

What a tensor's first axis holds may be as long as the batch by chance: positions, pictures, picked
tokens.
"""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from conftest import error, fill
from helpers.architectures import ARCHITECTURES
from torch import Tensor, nn
from transformers import MixtralConfig
from transformers.models.mixtral.modeling_mixtral import MixtralExperts

import lora_inject as li


def adapted(model: nn.Module, targets: list[Any], **options: Any) -> nn.Module:
    """A model with the adapters one and two."""
    for name in ("one", "two"):
        fill(li.inject(model, {"rank": 2, "targets": targets, **options}, name), name)
    return model


def check_each_row(
    model: nn.Module, rows: list[str | None], run: Callable[..., Tensor], within: float = 1e-9
) -> None:
    """A routed batch is each row alone; `run` takes the indices of the rows that it runs."""
    with torch.no_grad():
        with li.routed(model, rows):
            together = run(range(len(rows)))
        alone = []
        for i, name in enumerate(rows):
            li.activate(model, name)
            alone.append(run([i]))
        li.activate(model, None)
        assert error(run(range(len(rows))), torch.cat(alone)) > 1e-3, "the adapters act"
    assert error(together, torch.cat(alone)) < within


def test_a_row_s_pictures_go_through_its_own_adapter() -> None:
    """Two rows and two pictures, both of the first row."""
    model = ARCHITECTURES["llava"].build().double().eval()
    adapted(model, ["all-linear"])
    pixels = torch.randn(2, 3, *[model.config.vision_config.image_size] * 2).double()
    n = int(model.model.get_image_features(pixels[:1].to(model.dtype)).pooler_output[0].shape[0])
    token = model.config.image_token_id
    ids = torch.full((2, 2 * n + 2), 3)
    ids[0, 1:-1] = token
    given = {0: pixels, 1: None}

    def run(rows: Any) -> Tensor:
        pictures = [given[i] for i in rows if given[i] is not None]
        more = {"pixel_values": torch.cat(pictures)} if pictures else {}
        return model(input_ids=ids[list(rows)], **more).logits

    check_each_row(model, ["one", "two"], run)


class Positions(nn.Module):
    """A decoder's start, as nanoGPT has it: positions are looked up once for all rows."""

    def __init__(self) -> None:
        super().__init__()
        self.wte, self.wpe = nn.Embedding(11, 6), nn.Embedding(8, 6)
        self.head = nn.Linear(6, 4)

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(torch.tanh(self.wte(ids) + self.wpe(torch.arange(ids.shape[1]))))


def test_positions_as_many_as_rows_are_each_row_s_own() -> None:
    model = adapted(Positions().double(), ["wte", "wpe", "head"])
    ids = torch.arange(9).view(3, 3)
    check_each_row(model, ["one", None, "two"], lambda rows: model(ids[list(rows)]))


def of_transformers(family: str) -> tuple[nn.Module, list[str], dict[str, Any]]:
    from transformers import AutoModel, T5Config, XLNetConfig

    torch.manual_seed(0)
    if family == "t5":
        sizes = {"d_model": 16, "d_ff": 24, "d_kv": 8, "num_layers": 2, "num_heads": 2}
        model = AutoModel.from_config(T5Config(**sizes, vocab_size=31)).encoder
        return model, ["relative_attention_bias", "[qv]"], {}
    config = XLNetConfig(vocab_size=31, d_model=16, n_layer=2, n_head=2, d_inner=24)
    return AutoModel.from_config(config), ["all-linear"], {"use_mems": False}


@pytest.mark.parametrize("family", ["t5", "xlnet"])
def test_as_many_positions_as_rows_in_transformers(family: str) -> None:
    model, targets, options = of_transformers(family)
    adapted(model.double().eval(), targets)
    ids = torch.arange(16).view(4, 4) + 2

    def run(rows: Any) -> Tensor:
        return model(input_ids=ids[list(rows)], **options).last_hidden_state

    check_each_row(model, ["one", None, "two", "one"], run)


class OneModality(nn.Module):
    """A stack of experts that gets the tokens of one modality, as many or few as a row has."""

    def __init__(self) -> None:
        super().__init__()
        sizes = {"hidden_size": 8, "intermediate_size": 6, "num_local_experts": 3}
        self.fc, self.router = nn.Linear(8, 8), nn.Linear(8, 3)
        self.experts = MixtralExperts(MixtralConfig(**sizes))
        for parameter in self.experts.parameters():
            nn.init.normal_(parameter, std=0.3)

    def forward(self, x: Tensor, is_text: Tensor) -> Tensor:
        x = self.fc(x)
        picked = x[is_text]
        weights, index = self.router(picked).softmax(-1).topk(2)
        out = x.clone()
        out[is_text] = x[is_text] + self.experts(picked, index, weights)
        return out


def test_tokens_of_one_modality_go_to_the_experts_of_their_row() -> None:
    """Six tokens of the first row and four of the second are no five of each."""
    model = adapted(OneModality().double(), ["fc", {"match": "experts.gate_up_proj"}])
    x = torch.randn(2, 7, 8, dtype=torch.float64)
    is_text = torch.arange(7) < torch.tensor([[6], [4]])
    check_each_row(model, ["one", "two"], lambda rows: model(x[list(rows)], is_text[list(rows)]))


class Flattened(nn.Module):
    """Layers that get rows and positions as one axis, as in OPT."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.fc1 = nn.Linear(6, 6), nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        y = self.q(x)
        return self.fc1(y.reshape(-1, 6)).relu().view(y.shape)


@pytest.mark.parametrize("targets", [["q", "fc1"], ["fc1"]])
def test_rows_and_positions_in_one_axis_are_told_apart(targets: list[str]) -> None:
    model = adapted(Flattened().double(), targets)
    x = torch.randn(3, 5, 6, dtype=torch.float64)
    check_each_row(model, ["one", None, "two"], lambda rows: model(x[list(rows)]))


@pytest.mark.parametrize("adapters", [[["one"]] * 4, [1.5, None], [{"one": "much"}, None]])
def test_rows_that_are_no_names_are_refused(adapters: Any) -> None:
    model = adapted(nn.Sequential(nn.Linear(4, 4)), ["0"])
    with pytest.raises(li.StateError) as raised, li.routed(model, adapters):
        pass
    assert raised.value.remedy


@pytest.mark.parametrize("repeat", ["2", 2.0, None, 0])
def test_a_repeat_that_is_no_number_of_rows_is_refused(repeat: Any) -> None:
    model = adapted(nn.Sequential(nn.Linear(4, 4)), ["0"])
    with pytest.raises(li.StateError) as raised, li.routed(model, ["one", None], repeat=repeat):
        pass
    assert raised.value.remedy
