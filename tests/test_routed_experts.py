"""Rows with adapters of their own through stacks of experts, in inference and in training."""

import copy
from typing import Any

import pytest
import torch
from conftest import error, fill, same_bits
from helpers.experts import experts
from helpers.reference import config, refused
from torch import Tensor, nn

import lora_inject as li

IDS = torch.arange(20).reshape(5, 4) % 13
ROWS = ["one", None, "two", "one", "two"]
ROUTED = ["all-experts", "o_proj"]


def adapted(family: str, how: str, **options: Any) -> Any:
    model, _ = experts(family, how)
    torch.manual_seed(1)
    for name in ("one", "two"):
        fill(li.inject(model, config(*ROUTED, **options), name), name)
    return model


def alone(model: nn.Module, rows: list[str | None] = ROWS) -> Tensor:
    """The logits of each row by itself, under its own adapter."""
    each = []
    for ids, name in zip(IDS, rows, strict=True):
        li.activate(model, name)
        each.append(model(ids[None]).logits)
    return torch.cat(each)


@pytest.mark.parametrize("how", ["eager", "batched_mm", "default"])
@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe", "gpt_oss", "deepseek_v3"])
def test_each_row_has_its_own_experts(family: str, how: str) -> None:
    model = adapted(family, how)
    with torch.no_grad():
        wanted = alone(model)
        assert error(alone(model, [None] * 5), wanted) > 1e-2
        with li.routed(model, ROWS):
            assert error(model(IDS).logits, wanted) < 2e-5
        of_two = alone(model, ["two"] * 5)
        with li.routed(model, ["two"] * 5):
            assert error(model(IDS).logits, of_two) < 2e-5


@pytest.mark.parametrize("family", ["mixtral", "gpt_oss"])
def test_each_row_trains_its_own_experts(family: str) -> None:
    model = adapted(family, "eager").double()
    weights = torch.randn(5, 4, 13, dtype=torch.float64)
    li.train_only(model, ["one", "two"])
    (alone(model) * weights).sum().backward()
    one, two = (li.adapter_parameters(model, name) for name in ("one", "two"))
    both = {**one, **{f"two {key}": parameter for key, parameter in two.items()}}
    wanted = {key: p.grad.clone() for key, p in both.items()}
    model.zero_grad()
    with li.routed(model, ROWS):
        (model(IDS).logits * weights).sum().backward()
    for key, p in both.items():
        assert error(p.grad, wanted[key]) < 1e-10, key


def test_a_stack_whose_forward_is_a_kernel_runs_for_each_adapter_alone(monkeypatch) -> None:
    from lora_inject.rows import expert_rows

    model = adapted("mixtral", "eager")
    monkeypatch.setattr(expert_rows, "_FORWARDS", set())
    with torch.no_grad():
        wanted = alone(model)
        with li.routed(model, ROWS):
            assert error(model(IDS).logits, wanted) < 2e-5


def test_beams_of_a_row_have_its_experts() -> None:
    model = adapted("mixtral", "eager")
    with torch.no_grad():
        wanted = alone(model)
        with li.routed(model, ROWS, repeat=2):
            assert error(model(IDS.repeat_interleave(2, 0)).logits[::2], wanted) < 2e-5


def test_a_batch_of_another_size_is_refused() -> None:
    """Ten tokens are no other than five rows of two to a stack of experts."""
    model = adapted("mixtral", "eager")
    with li.routed(model, ROWS), pytest.raises(li.LayerError, match="not the number of rows"):
        model(IDS[:2, :].repeat(1, 3)[:, :5])


LENGTHS = [3, 5, 1, 4, 2]


def packed() -> dict[str, Tensor]:
    positions = [torch.arange(n) for n in LENGTHS]
    ids = torch.arange(sum(LENGTHS)) % 13
    return {"input_ids": ids[None], "position_ids": torch.cat(positions)[None]}


def packed_alone(model: nn.Module) -> Tensor:
    """The logits of each sequence by itself, under its own adapter, side by side.

    GPT-OSS, with eager attention, does not keep packed sequences apart in transformers 5.24.
    """
    each = []
    for ids, name in zip(packed()["input_ids"][0].split(LENGTHS), ROWS, strict=True):
        li.activate(model, name)
        each.append(model(ids[None]).logits)
    return torch.cat(each, 1)


@pytest.mark.parametrize("how", ["eager", "batched_mm", "default"])
@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe", "deepseek_v3"])
def test_each_packed_sequence_has_its_own_experts(family: str, how: str) -> None:
    model = adapted(family, how)
    model.config.use_cache = False
    with torch.no_grad():
        wanted = packed_alone(model)
        with li.routed(model, ROWS, tokens=LENGTHS):
            assert error(model(**packed()).logits, wanted) < 2e-5


@pytest.mark.parametrize("further", [[], ["embed_tokens"], [{"train": ["lm_head.weight"]}]])
def test_each_packed_sequence_trains_its_own_adapter(further: list[Any]) -> None:
    model, _ = experts("qwen3_moe")
    model = model.double()
    model.config.use_cache = False
    options: dict[str, Any] = {}
    targets = [*ROUTED, "q_proj", *(t for t in further if isinstance(t, str))]
    for more in further:
        options |= more if isinstance(more, dict) else {}
    for name in ("one", "two"):
        fill(li.inject(model, config(*targets, **options), name), name)
    weights = torch.randn(1, sum(LENGTHS), 13, dtype=torch.float64)
    li.train_only(model, ["one", "two"])
    wanted_logits = packed_alone(model)
    (wanted_logits * weights).sum().backward()
    one, two = (li.adapter_parameters(model, name) for name in ("one", "two"))
    both = {**one, **{f"two {key}": parameter for key, parameter in two.items()}}
    wanted = {key: p.grad.clone() for key, p in both.items()}
    model.zero_grad()
    with li.routed(model, ROWS, tokens=LENGTHS):
        logits = model(**packed()).logits
        assert error(logits, wanted_logits) < 1e-12
        (logits * weights).sum().backward()
    for key, p in both.items():
        assert error(p.grad, wanted[key]) < 1e-10, key


def test_sequences_packed_into_one_row_are_refused_without_their_lengths() -> None:
    """What is a row cannot be told from a tensor."""
    model = adapted("qwen3_moe", "eager")
    for rows in (ROWS, ["one"] * 10):
        words = r"packed into one row tokens="
        with li.routed(model, rows), pytest.raises(li.LayerError, match=words):
            model(**packed())
    other = [*LENGTHS[:-1], 9]
    with (
        li.routed(model, ROWS, tokens=other),
        pytest.raises(li.LayerError, match=r"routed\(\) with 22 tokens.*shape \(1, 15, 8\)"),
    ):
        model(**packed())
    with li.routed(model, ROWS, tokens=LENGTHS), pytest.raises(li.LayerError, match="15 tokens"):
        model(IDS)


@pytest.mark.parametrize(
    "given", [{"tokens": [3, 5]}, {"tokens": [3, 0]}, {"tokens": [3, 5, 1, 4, 2], "repeat": 2}]
)
def test_lengths_that_are_not_one_for_each_adapter_are_refused(given: dict[str, Any]) -> None:
    model = adapted("mixtral", "eager")
    rows = ROWS if len(given["tokens"]) != 2 or given["tokens"][1] else ROWS[:2]
    with pytest.raises(li.StateError, match="number of tokens of each packed sequence"):
        li.routed(model, rows, **given)


def test_adapters_on_stacks_alone_are_refused_as_nothing_sees_the_rows() -> None:
    model, _ = experts("mixtral")
    li.inject(model, config("all-experts"), "one")

    def enter() -> None:
        with li.routed(model, ["one", None]):
            pass

    refused(model, enter, li.StateError, "they do not see what is a row. Adapt a layer .* q_proj")


def test_experts_that_are_layers_are_refused() -> None:
    """An expert may get just as many tokens as there are rows."""

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.top_k, self.gate = 1, nn.Linear(4, 2)
            self.experts = nn.ModuleList(nn.ModuleDict({"up": nn.Linear(4, 4)}) for _ in range(2))

    model = nn.Sequential(nn.Linear(4, 4), Block())
    li.inject(model, config("0", "all-experts"), "one")
    with (
        pytest.raises(li.StateError, match=r"'1\.experts\.[01]\.up' gets tokens that a router"),
        li.routed(model, ["one"]),
    ):
        pass


def test_a_stack_of_another_class_is_refused_as_before() -> None:
    model, _ = experts("llama4")
    li.inject(model, config(*ROUTED), "one")
    with (
        pytest.raises(li.StateError, match="itself, which all rows of a batch share"),
        li.routed(model, ["one"]),
    ):
        pass


def test_a_plain_forward_after_routing_is_the_active_adapter_s() -> None:
    model = adapted("qwen3_moe", "eager")
    li.activate(model, "one")
    with torch.no_grad():
        before = model(IDS).logits
        with li.routed(copy.copy(model), ROWS):
            model(IDS)
        assert same_bits(model(IDS).logits, before)


def test_a_compiled_model_runs_ranges_of_tokens_without_a_graph() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2))
    for name in ("one", "two"):
        fill(li.inject(model, config("0", "2"), name), name)
    x = torch.randn(1, 5, 4)
    compiled = torch.compile(model, backend="eager")
    for rows in (["one", None], ["two", "one"]):
        with torch.no_grad(), li.routed(model, rows, tokens=[2, 3]):
            assert error(compiled(x), model(x).double()) < 1e-6
