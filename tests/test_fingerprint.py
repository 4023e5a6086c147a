"""The fingerprint: the same base in another dtype passes, another base does not."""

import copy
import dataclasses
import json
import math
from itertools import product
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

import lora_inject as li
from lora_inject.core.adapter.base_differences import base_differences
from lora_inject.core.adapter.fingerprint import Fingerprint, Sampled, samples
from lora_inject.errors import FormatError

DTYPES = (torch.float32, torch.bfloat16, torch.float64, torch.float16)


def fingerprint_of(weight: torch.Tensor) -> Fingerprint:
    return {"w": Sampled(tuple(weight.shape), samples({"w": weight})["w"])}


def test_the_same_base_in_another_dtype() -> None:
    for scale, first, second in product((1e-6, 0.02, 10.0), DTYPES, DTYPES):
        weight = torch.randn(1000, generator=torch.Generator().manual_seed(0)) * scale
        saved, here = fingerprint_of(weight.to(first)), fingerprint_of(weight.to(second))
        assert base_differences(saved, here) == {}


def test_other_shapes_names_and_values() -> None:
    one = {"w": Sampled((2, 3))}
    turned = base_differences(one, {"w": Sampled((3, 2))})["w"]
    assert "has shape (2, 3) in the file and (3, 2) here" in turned
    assert base_differences(one, {})["w"] == "is not in this model"
    nan, zero = (fingerprint_of(torch.tensor([value])) for value in (math.nan, 0.0))
    assert base_differences(nan, nan) == {}
    assert base_differences(nan, zero) != {}


class Net(nn.Module):
    """An embedding, a block and a head, as a model of transformers names its tables."""

    def __init__(self, vocabulary: int = 400, classes: int = 3) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.q, self.mlp = nn.Linear(8, 8), nn.Linear(8, 8)
        self.head = nn.Linear(8, classes)
        self.table = nn.Embedding(vocabulary, 8)

    def get_input_embeddings(self) -> nn.Module:
        return self.table

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.table(ids)
        return self.head(x + self.mlp(self.q(x).relu()))  # type: ignore[no-any-return]


Q = {"rank": 2, "targets": ["q"]}
IDS = torch.tensor([[7, 100, 251]])


def moved(name: str) -> nn.Module:
    """A model whose module of this name has other values, as another training leaves them."""
    model = Net()
    with torch.no_grad():
        for parameter in model.get_submodule(name).parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


@pytest.mark.parametrize("train", [r"q\.bias", "head"])
def test_an_adapter_without_sites_knows_its_base(train: str, tmp_path: Path) -> None:
    model = li.inject(Net(), {"targets": [], "train": [train]})
    with torch.no_grad():
        for parameter in li.adapter_parameters(model).values():
            parameter.add_(1.0)
    path = li.save_adapter(model, tmp_path / "a")
    loaded = li.load_adapter(moved("head") if train == "head" else Net(), path)
    assert torch.equal(loaded(IDS), model(IDS))
    other = moved("q")
    for words, option in (
        (r"another base: 'q\.(weight|bias)'", {}),
        (r"'any_base' is not an option.*takes base=\"any\"", {"any_base": True}),  # as of merges
        ("'adapter_name' is not an option.*takes name=", {"adapter_name": "sql"}),  # as of PEFT
    ):
        with pytest.raises(FormatError, match=words):
            li.load_adapter(other, path, **option)
    li.load_adapter(other, path, base="any")


@pytest.mark.parametrize("other", ["mlp", "head", "table"])
@pytest.mark.parametrize(("layout", "file"), [("native", "a.safetensors"), ("peft", "a")])
def test_another_tensor_than_the_adapted_ones_is_noticed(other, layout, file, tmp_path) -> None:
    path = li.save_adapter(li.inject(Net(), Q), tmp_path / file, format=layout)
    li.load_adapter(Net(), path)
    with pytest.raises(FormatError, match=rf"another base: '{other}\.(weight|bias)'"):
        li.load_adapter(moved(other), path)
    li.load_adapter(moved(other), path, base="any")


def test_a_head_of_another_size_is_another_head_and_a_resized_vocabulary_is_not() -> None:
    state = li.adapter_state(li.inject(Net(), Q))
    li.install(Net(vocabulary=410), state)
    with pytest.raises(FormatError, match=r"'head\.weight' has shape \(3, 8\)"):
        li.install(Net(classes=2), state)


@pytest.mark.parametrize("targets", [["q"], ["table"]], ids=str)
def test_rows_that_were_added_to_a_vocabulary_have_other_values_in_each_process(targets) -> None:
    def resized(seed: int) -> nn.Module:
        model = Net()
        torch.manual_seed(seed)
        nn.init.normal_(model.table.weight[-4:])
        return model

    state = li.adapter_state(li.inject(resized(1), {"rank": 2, "targets": targets}))
    li.install(resized(2), state)


def test_what_the_adapter_trains_may_have_any_value_in_the_base() -> None:
    config = {**Q, "train": ["head"]}
    rows = li.adapter_state(li.inject(Net(), {**config, "tokens": {"table": [3]}}))
    both = li.adapter_state(li.inject(Net(), config)) + li.adapter_state(li.inject(Net(), Q))
    for state in (rows, both):
        li.install(moved("head"), state)


def embedded() -> nn.Module:
    """An adapter on an embedding that three tokens have trained."""
    model = li.inject(Net(), {"rank": 2, "targets": ["table"]})
    torch.manual_seed(1)
    optimizer = torch.optim.SGD(li.adapter_parameters(model).values(), 1.0)
    for _ in range(3):
        model(IDS).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    return model


def test_the_merged_base_of_an_embedding_is_not_its_base(tmp_path: Path) -> None:
    """Neither in memory nor on disk is it merged twice."""
    model = embedded()
    path = li.save_adapter(model, tmp_path / "a")
    li.load_adapter(Net(), path)
    li.load_adapter(Net().bfloat16(), path)
    merged = Net()
    merged.load_state_dict(dict(li.merged_weights(model)))
    with pytest.raises(FormatError, match=r"another base: 'table\.weight' where the adapter moves"):
        li.load_adapter(merged, path)
    (tmp_path / "base").mkdir()
    save_file(Net().state_dict(), tmp_path / "base" / "model.safetensors")
    li.merge_checkpoint(tmp_path / "base", [path], tmp_path / "out")
    with pytest.raises(li.CheckpointError, match=r"another base.*where the adapter moves"):
        li.merge_checkpoint(tmp_path / "out", [path], tmp_path / "again")


def test_slices_and_experts_are_sampled_where_they_move() -> None:
    torch.manual_seed(0)
    bank = nn.Module()
    bank.fused, bank.experts = nn.Linear(4, 600, bias=False), nn.Parameter(torch.randn(40, 8, 4))
    fused = {"match": "fused", "slices": {"a": 3, "b": 597}, "adapt": ["a"]}
    targets = [fused, {"match": "experts", "layout": "out_in"}]
    model = li.inject(copy.deepcopy(bank), {"rank": 1, "targets": targets})
    with torch.no_grad():
        parameters = li.adapter_parameters(model)
        parameters["fused.lora_B"].fill_(0.5)
        parameters["experts.lora_B"][33].fill_(0.5)
    state = li.adapter_state(model)
    at = {name: known.moved for name, known in state.fingerprint.items()}
    assert {position // 4 for position in at["fused.weight"]} <= {0, 1, 2}
    assert {position // 32 for position in at["experts"]} == {33}
    li.install(copy.deepcopy(bank), state)
    bank.load_state_dict(dict(li.merged_weights(model)))
    with pytest.raises(FormatError, match="where the adapter moves"):
        li.install(bank, state)


def test_positions_outside_of_the_weight_are_an_edited_file(tmp_path: Path) -> None:
    path = li.save_adapter(embedded(), tmp_path / "a.safetensors", format="native")
    tensors, said = load_file(path), safe_open(path, "pt").metadata()
    plain = json.loads(said["lora_inject.fingerprint"])
    plain["table.weight"][3][0] = 10**9
    save_file(tensors, path, {**said, "lora_inject.fingerprint": json.dumps(plain)})
    with pytest.raises(FormatError, match=r"positions of 'table\.weight'"):
        li.load_adapter(Net(), path)


def test_two_bases_without_values_are_not_taken_for_one() -> None:
    state = li.adapter_state(li.inject(Net(), {"rank": 2, "targets": ["q"]}))
    unknown = {"q.weight": Sampled((8, 8))}  # as of a base on the meta device, or in shards
    with pytest.raises(FormatError, match="the base cannot be compared at 1 sites"):
        li.install(Net().to("meta"), dataclasses.replace(state, fingerprint=unknown))
