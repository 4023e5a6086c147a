"""Rows with adapters of their own through stacks of experts, in inference and in training."""

from typing import Any

import pytest
import torch
from conftest import error, fill, same_bits
from helpers.experts import experts
from helpers.reference import config
from torch import Tensor, nn

import lora_inject as li

IDS = torch.arange(20).reshape(5, 4) % 13
ROWS = ["one", None, "two", "one", "two"]
ROUTED = ["all-experts", "o_proj"]
LENGTHS = [3, 5, 1, 4, 2]
FLAT = torch.arange(sum(LENGTHS)) % 13
PACKED = {
    "input_ids": FLAT[None],
    "position_ids": torch.cat([torch.arange(n) for n in LENGTHS])[None],
}
# What the model gets, the sequences in it, what `routed` is told, and where they lie in the output.
BATCHES: dict[str, tuple[dict[str, Tensor], list[Tensor], dict[str, Any], int]] = {
    "rows": ({"input_ids": IDS}, list(IDS), {}, 0),
    "packed": (PACKED, list(FLAT.split(LENGTHS)), {"tokens": LENGTHS}, 1),
}
CASES = [(f, b) for f in ("mixtral", "qwen3_moe", "deepseek_v3") for b in BATCHES]
# With eager attention, it does not keep packed sequences apart in transformers 5.24.
CASES.append(("gpt_oss", "rows"))


def adapted(family: str, how: str = "eager", *further: Any, **options: Any) -> Any:
    model, _ = experts(family, how)
    model.config.use_cache = False
    torch.manual_seed(1)
    for name in ("one", "two"):
        fill(li.inject(model, config(*ROUTED, *further, **options), name), name)
    return model


def alone(model: nn.Module, batch: str, rows: list[str | None] = ROWS) -> Tensor:
    """The logits of each sequence by itself, under its own adapter."""
    _, sequences, _, dim = BATCHES[batch]
    each = []
    for ids, name in zip(sequences, rows, strict=True):
        li.activate(model, name)
        each.append(model(ids[None]).logits)
    return torch.cat(each, dim)


def together(model: nn.Module, batch: str, rows: list[str | None] = ROWS) -> Tensor:
    inputs, _, options, _ = BATCHES[batch]
    with li.routed(model, rows, **options):
        return model(**inputs).logits


@pytest.mark.parametrize("how", ["eager", "batched_mm", "default"])
@pytest.mark.parametrize(("family", "batch"), CASES)
def test_each_sequence_has_its_own_experts(family: str, batch: str, how: str) -> None:
    model = adapted(family, how)
    with torch.no_grad():
        for rows in (ROWS, ["two"] * 5):
            wanted = alone(model, batch, rows)
            assert error(alone(model, batch, [None] * 5), wanted) > 1e-2
            assert error(together(model, batch, rows), wanted) < 2e-5
        plain = model(IDS).logits
        together(model, batch)
        assert same_bits(model(IDS).logits, plain), "the active adapter's again"


def test_a_stack_whose_forward_is_a_kernel_runs_for_each_adapter_alone(monkeypatch) -> None:
    from lora_inject.rows import expert_rows

    model = adapted("mixtral")
    monkeypatch.setattr(expert_rows, "_FORWARDS", set())
    with torch.no_grad():
        assert error(together(model, "rows"), alone(model, "rows")) < 2e-5


def test_beams_of_a_row_have_its_experts() -> None:
    model = adapted("mixtral")
    with torch.no_grad():
        wanted = alone(model, "rows")
        with li.routed(model, ROWS, repeat=2):
            assert error(model(IDS.repeat_interleave(2, 0)).logits[::2], wanted) < 2e-5


@pytest.mark.parametrize(
    ("family", "batch", "further", "options"),
    [
        ("mixtral", "rows", [], {}),
        ("gpt_oss", "rows", [], {}),
        ("qwen3_moe", "packed", ["q_proj"], {}),
        ("qwen3_moe", "packed", ["q_proj", "embed_tokens"], {}),
        ("qwen3_moe", "packed", ["q_proj"], {"train": ["lm_head.weight"]}),
    ],
)
def test_each_sequence_trains_its_own_adapter(family, batch, further, options) -> None:
    model = adapted(family, "eager", *further, **options).double()
    li.train_only(model, ["one", "two"])
    trained = [p for name in ("one", "two") for p in li.adapter_parameters(model, name).values()]
    wanted, logits = alone(model, batch), together(model, batch)
    assert error(logits, wanted) < 1e-12
    weights = torch.randn_like(wanted)
    due = torch.autograd.grad(wanted, trained, weights)
    for grad, wanted_grad in zip(torch.autograd.grad(logits, trained, weights), due, strict=True):
        assert error(grad, wanted_grad) < 1e-10


# What `routed` is told, what the model gets, and the words that say why it cannot be.
WRONG_BATCHES: list[tuple[list[Any], dict[str, Any], dict[str, Tensor], str]] = [
    # Ten tokens are no other than five rows of two to a stack of experts.
    (ROWS, {}, {"input_ids": IDS[:2].repeat(1, 3)[:, :5]}, "not the number of rows"),
    (["one"] * 10, {}, PACKED, "packed into one row tokens="),
    (ROWS, {"tokens": [*LENGTHS[:-1], 9]}, PACKED, r"with 22 tokens.*shape \(1, 15, 8\)"),
    (ROWS, {"tokens": LENGTHS}, {"input_ids": IDS}, "15 tokens"),
]


@pytest.mark.parametrize(("rows", "options", "inputs", "words"), WRONG_BATCHES)
def test_a_batch_in_which_rows_cannot_be_told_is_refused(rows, options, inputs, words) -> None:
    model = adapted("qwen3_moe")
    with li.routed(model, rows, **options), pytest.raises(li.LayerError, match=words):
        model(**inputs)


def test_tokens_of_a_stack_that_are_not_as_many_for_each_row_are_refused() -> None:
    model = adapted("qwen3_moe")
    with li.routed(model, ROWS), pytest.raises(li.LayerError, match="no multiple of that"):
        model.model.layers[0].mlp(torch.randn(1, 7, 8))


class Listed(nn.Module):
    """Experts that are layers, each of which may get just as many tokens as there are rows."""

    def __init__(self) -> None:
        super().__init__()
        self.top_k, self.gate = 1, nn.Linear(4, 2)
        self.experts = nn.ModuleList(nn.ModuleDict({"up": nn.Linear(4, 4)}) for _ in range(2))


# The model, what is adapted, what `routed` is told, and the words that say why it cannot be.
WRONG_MODELS: list[tuple[Any, list[str], dict[str, Any], str]] = [
    ("mixtral", ROUTED, {"tokens": [3, 5]}, "number of tokens of each packed sequence"),
    ("mixtral", ROUTED[:1], {}, "they do not see what is a row. Adapt a layer .* q_proj"),
    ("llama4", ROUTED, {}, "itself, which all rows of a batch share"),
    (Listed, ["0", "all-experts"], {}, r"'1\.experts\.[01]\.up' gets tokens that a router"),
]


@pytest.mark.parametrize(("family", "targets", "options", "words"), WRONG_MODELS)
def test_what_can_never_be_routed_is_refused_at_entry(family, targets, options, words) -> None:
    is_listed = family is Listed
    model = nn.Sequential(nn.Linear(4, 4), Listed()) if is_listed else experts(family)[0]
    li.inject(model, config(*targets), "one")
    with pytest.raises(li.StateError, match=words):
        li.routed(model, ["one", None, "one"], **options).__enter__()


def test_a_compiled_model_runs_ranges_of_tokens_without_a_graph() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2))
    for name in ("one", "two"):
        fill(li.inject(model, config("0", "2"), name), name)
    x = torch.randn(1, 5, 4)
    compiled = torch.compile(model, backend="eager")
    for rows in (["one", None], ["two", "one"]):
        with torch.no_grad(), li.routed(model, rows, tokens=[2, 3]):
            assert error(compiled(x), model(x).double()) < 1e-6
