"""The fingerprint: the same base in another dtype passes, another base or a new weight does not."""

import copy
import dataclasses
import json
import math
import re
from collections.abc import Callable
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from conftest import fill
from helpers.models import SIZES, tiny, tiny_llama
from helpers.refusals import refused
from helpers.versions import needs_transformers_5
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import lora_inject as li

DTYPES = (torch.float32, torch.bfloat16, torch.float64, torch.float16)


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

    def forward(self, ids: Tensor) -> Tensor:
        x = self.table(ids)
        return self.head(x + self.mlp(self.q(x).relu()))


Q = {"rank": 2, "targets": ["q"]}
IDS = torch.tensor([[7, 100, 251]])


def moved(name: str, model: Any = None) -> Any:
    """A model whose module of this name has other values, as another training leaves them."""
    model = Net() if model is None else model
    with torch.no_grad():
        for parameter in model.get_submodule(name).parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


# --------------------------------------------------------------------------------- which base it is


def test_the_same_base_in_another_dtype_is_the_same() -> None:
    for scale, first, second in product((1e-6, 0.02, 10.0), DTYPES, DTYPES):
        torch.manual_seed(0)
        weights = scale * torch.randn(30, 30)
        bases = [nn.Sequential(nn.Linear(30, 30, bias=False)) for _ in range(2)]
        for base, dtype in zip(bases, (first, second), strict=True):
            base.to(dtype)[0].weight.data.copy_(weights)
        state = li.adapter_state(li.inject(bases[0], {"rank": 1, "targets": ["0"]}))
        li.install(bases[1], state)


@pytest.mark.parametrize("value", [0.0, math.nan])
def test_nan_in_a_base_is_that_of_the_base(value: float) -> None:
    state = li.adapter_state(li.inject(broken(math.nan), {"rank": 1, "targets": ["0"]}))
    if math.isnan(value):
        li.install(broken(value), state)
        return
    with refused(li.FormatError, "0.weight"):
        li.install(broken(value), state)


def broken(value: float) -> nn.Module:
    model = nn.Sequential(nn.Linear(3, 1, bias=False))
    nn.init.constant_(model[0].weight, value)
    return model


@pytest.mark.parametrize("other", ["q", "mlp", "head", "table"])
@pytest.mark.parametrize(("layout", "file"), [("native", "a.safetensors"), ("peft", "a")])
def test_another_tensor_than_the_adapted_ones_is_noticed(other, layout, file, tmp_path) -> None:
    path = li.save_adapter(li.inject(Net(), Q), tmp_path / file, format=layout)
    li.load_adapter(Net(), path)
    model = moved(other)
    with refused(li.FormatError, f"'{other}."):
        li.load_adapter(model, path)
    li.load_adapter(model, path, base="any")


def test_words_of_other_calls_are_told_in_ours(tmp_path: Path) -> None:
    path = li.save_adapter(li.inject(Net(), Q), tmp_path / "a")
    for option, name in (({"any_base": True}, 'base="any"'), ({"adapter_name": "sql"}, "name=")):
        with refused(li.FormatError, *option, name):
            li.load_adapter(Net(), path, **option)


@pytest.mark.parametrize("train", [r"q\.bias", "head"])
def test_an_adapter_without_sites_knows_its_base(train: str, tmp_path: Path) -> None:
    model = li.inject(Net(), {"targets": [], "train": [train]})
    path = li.save_adapter(fill(model), tmp_path / "a")
    loaded = li.load_adapter(moved("head") if train == "head" else Net(), path)
    assert torch.equal(loaded(IDS), model(IDS))
    with refused(li.FormatError, "'q."):
        li.load_adapter(moved("q"), path)


def test_a_head_of_another_size_is_another_head_and_a_resized_vocabulary_is_not() -> None:
    state = li.adapter_state(li.inject(Net(), Q))
    li.install(Net(vocabulary=410), state)
    with refused(li.FormatError, "'head.weight'", "(3, 8)"):
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
    both = li.combine([li.adapter_state(li.inject(Net(), each)) for each in (config, Q)])
    for state in (rows, both):
        li.install(moved("head"), state)


def test_two_bases_without_values_are_not_taken_for_one() -> None:
    state = li.adapter_state(li.inject(Net(), Q))
    assert state.fingerprint is not None
    known = state.fingerprint["q.weight"]
    unknown = {
        "q.weight": known._replace(values=(), moved=())
    }  # as of a base on meta, or in shards
    with refused(li.FormatError, "compared"):
        li.install(Net().to("meta"), dataclasses.replace(state, fingerprint=unknown))


# --------------------------------------------------------------- a base that has the adapter in it


def embedded() -> Any:
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
    with refused(li.FormatError, "'table.weight'"):
        li.load_adapter(merged, path)
    (tmp_path / "base").mkdir()
    save_file(Net().state_dict(), tmp_path / "base" / "model.safetensors")
    li.merge_checkpoint(tmp_path / "base", [path], tmp_path / "out")
    with refused(li.CheckpointError, "table"):
        li.merge_checkpoint(tmp_path / "out", [path], tmp_path / "again")


class Bank(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.fused, self.experts = (
            nn.Linear(4, 600, bias=False),
            nn.Parameter(torch.randn(40, 8, 4)),
        )


STACKED = {"match": "experts", "layout": "out_in"}
# Which rule adapts a small part of a weight, and where in B that part is.
PARTS: dict[str, tuple[dict[str, Any], Any]] = {
    "a slice": ({"match": "fused", "slices": {"a": 3, "b": 597}, "adapt": ["a"]}, ...),
    "one expert of all": (STACKED, 33),
    "one expert alone": ({**STACKED, "only": [1]}, ...),  # which even samples miss
}


@pytest.mark.parametrize("part", PARTS)
def test_the_merged_base_of_a_slice_or_of_one_expert_is_not_its_base(part: str) -> None:
    rule, where = PARTS[part]
    model = li.inject(Bank(), {"rank": 1, "targets": [rule]})
    li.adapter_parameters(model)[f"{rule['match']}.lora_B"].data[where] = 0.5
    state, merged = li.adapter_state(model), Bank()
    li.install(Bank(), state)
    merged.load_state_dict(dict(li.merged_weights(model)))
    with refused(li.FormatError, rule["match"]):
        li.install(merged, state)


def test_positions_outside_of_the_weight_are_an_edited_file(tmp_path: Path) -> None:
    path = li.save_adapter(embedded(), tmp_path / "a.safetensors", format="native")
    tensors, said = load_file(path), safe_open(path, "pt").metadata()
    plain = json.loads(said["lora_inject.fingerprint"])
    plain["table.weight"][3][0] = 10**9
    save_file(tensors, path, {**said, "lora_inject.fingerprint": json.dumps(plain)})
    with refused(li.FormatError, "'table.weight'"):
        li.load_adapter(Net(), path)


# ----------------------------------------------------------------- weights that no checkpoint had
# transformers gives them random values, other ones in each process.

QV = {"rank": 2, "targets": ["query", "value"]}
OF_LLAMA = {"rank": 2, "targets": ["q_proj"]}


@pytest.fixture
def encoder(tmp_path: Path) -> Path:
    """A pretrained BERT without a head."""
    tiny(transformers.BertModel).save_pretrained(tmp_path / "encoder")
    return tmp_path / "encoder"


@pytest.fixture
def decoder(tmp_path: Path) -> Path:
    """A pretrained Llama, whose output head is not tied."""
    tiny_llama(pad_token_id=0).save_pretrained(tmp_path / "decoder")
    return tmp_path / "decoder"


def classifier(path: Path) -> Any:
    return transformers.BertForSequenceClassification.from_pretrained(path, num_labels=3)


@needs_transformers_5  # 4 leaves no mark on what it has loaded
def test_a_new_head_that_nobody_trains_is_refused_and_the_remedies_work(encoder: Path) -> None:
    model = classifier(encoder)
    assert "train: ['classifier']" in str(li.plan(model, QV)).replace("\n  ", " ")
    with refused(li.LayerError, "'classifier.weight'", "leave_new=True", model=model) as raised:
        li.inject(model, QV)
    line = re.search(r"train: (\[.*?\])", str(raised.value))
    assert line is not None
    config = {**QV, "train": eval(line[1])}
    assert "checkpoint" not in str(li.plan(model, config))
    li.inject(model, config)
    assert [*li.adapter_state(model).trained] == ["classifier.weight", "classifier.bias"]
    with refused(li.LayerError, "'classifier.weight'"):
        li.inject(model, QV, "a second one, which does not hold what the first one trains")
    assert not li.adapter_state(li.inject(li.eject(model), QV, leave_new=True)).trained


@needs_transformers_5  # 4 leaves no mark on what it has loaded
def test_trials_ask_the_same_question(encoder: Path) -> None:
    model, trials = classifier(encoder), {"one": li.Trial(QV, lr=1e-3)}
    loss = {"loss": lambda y, _: y.logits.square().mean()}
    with refused(li.LayerError, "'classifier.weight'", "leave_new=True"):
        li.Trials(model, trials, **loss)
    assert not li.adapters(model)
    li.Trials(model, trials, **loss, leave_new=True)


@needs_transformers_5  # 4 leaves no mark on what it has loaded
def test_what_stays_new_is_named_and_a_bias_of_zeros_may_stay(encoder: Path) -> None:
    """Every process starts from the same zeros."""
    li.inject(classifier(encoder), {**QV, "train": [r"classifier\.weight"]})
    on_it = {"rank": 2, "targets": ["all-linear"]}  # an adapter does not hold its weight
    for config in ({**QV, "train": [r"classifier\.bias"]}, on_it):
        with refused(li.LayerError, "'classifier.weight'"):
            li.inject(classifier(encoder), config)
    li.inject(classifier(encoder), {**on_it, "train": ["classifier"], "exclude": ["classifier"]})


@needs_transformers_5  # 4 leaves no mark on what it has loaded
def test_a_pooler_that_the_checkpoint_lacks_is_named_also_on_loading(tmp_path: Path) -> None:
    plain = transformers.BertModel(
        transformers.BertConfig(**SIZES["bert"]), add_pooling_layer=False
    )
    plain.save_pretrained(tmp_path / "base")

    def loaded(seed: int = 0, **how: Any) -> Any:
        torch.manual_seed(seed)
        return transformers.BertModel.from_pretrained(tmp_path / "base", **how)

    with refused(li.LayerError, "'0.pooler.dense.weight'"):
        li.inject(nn.Sequential(loaded()), QV)  # as in sentence-transformers
    li.inject(loaded(add_pooling_layer=False), QV)
    li.save_adapter(li.inject(loaded(1), QV, leave_new=True), tmp_path / "a")
    with refused(li.FormatError, "'pooler.dense.weight'", "leave_new=True"):
        li.load_adapter(loaded(2), tmp_path / "a")
    li.load_adapter(loaded(2), tmp_path / "a", leave_new=True)


def test_a_reward_model_trains_its_new_head_or_is_refused(decoder: Path) -> None:
    peft = pytest.importorskip("peft")
    pytest.importorskip("bitsandbytes")
    four_bits = transformers.BitsAndBytesConfig(load_in_4bit=True)
    packed = {"quantization_config": four_bits, "device_map": "cpu"}
    cls = transformers.LlamaForSequenceClassification
    for how in ({}, packed):
        with refused(li.LayerError, "train: ['score']"):
            li.inject(cls.from_pretrained(decoder, num_labels=1, **how), OF_LLAMA)
        li.inject(transformers.LlamaForCausalLM.from_pretrained(decoder, **how), OF_LLAMA)
    as_peft = peft.LoraConfig(task_type="SEQ_CLS", target_modules=["q_proj"])
    model = li.inject(cls.from_pretrained(decoder, num_labels=1), as_peft)
    assert [*li.adapter_state(model).trained] == ["score.weight"]


CHANGES: dict[str, Callable[[Any], object]] = {
    "resized": lambda model: model.resize_token_embeddings(20),
    "a head of its own": lambda model: setattr(model, "extra", nn.Linear(16, 2)),
    "a copied layer": lambda m: m.model.layers.append(copy.deepcopy(m.model.layers[0])),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_model_whose_weights_were_all_in_the_checkpoint_is_adapted(decoder, change) -> None:
    model = transformers.LlamaForCausalLM.from_pretrained(decoder)
    CHANGES[change](model)
    li.inject(model, OF_LLAMA)


WHOLE = {
    "q_proj": lambda: tiny_llama(tie_word_embeddings=True),
    "query": lambda: tiny(transformers.BertForMaskedLM),
    "c_attn": lambda: tiny(transformers.GPT2LMHeadModel),
}


@pytest.mark.parametrize("target", WHOLE)
def test_tied_heads_buffers_and_models_from_a_config_are_adapted(target, tmp_path: Path) -> None:
    model = li.inject(WHOLE[target](), {"targets": [target]})
    li.eject(model).save_pretrained(tmp_path / "base")
    li.inject(type(model).from_pretrained(tmp_path / "base"), {"targets": [target]})
