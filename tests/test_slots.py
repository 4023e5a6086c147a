"""Room for adapters of other ranks, scales and sites, in a model that is compiled once."""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import error, fill
from helpers.models import IDS, tiny_llama
from torch._dynamo.testing import CompileCounter

import lora_inject as li

SUBSETS = (["all-linear"], ["q_proj"], ["down_proj", "up_proj"], [r"layers\.1\..*_proj"])


def apart(base: Any, number: int, **changes: Any) -> li.AdapterState:
    """An adapter of another rank, scale and set of sites, made on a copy of a base."""
    rank = 2 + round(number * 62 / 19)
    config = {"rank": rank, "alpha": 1 + number, "targets": [*SUBSETS[number % 4]], **changes}
    return li.adapter_state(fill(li.inject(copy.deepcopy(base), config), std=0.1))


def test_twenty_adapters_of_ranks_2_to_64_share_one_graph() -> None:
    base = tiny_llama().double().eval()
    model = li.reserve(copy.deepcopy(base), "slot", rank=64)
    li.activate(model, "slot")
    counter = CompileCounter()
    torch._dynamo.reset()
    compiled = torch.compile(model, backend=counter, fullgraph=True)
    ranks = set()
    with torch.no_grad():
        compiled(IDS)
        for number in range(20):
            state = apart(base, number)
            ranks |= {site.spec.rank for site in state.sites.values()}
            li.swap_adapter(model, state, "slot")
            wanted = li.install(copy.deepcopy(base), state)
            assert error(compiled(IDS).logits, wanted(IDS).logits) < 1e-12
    assert counter.frame_count == 1
    assert len(ranks) == 20
    assert (min(ranks), max(ranks)) == (2, 64)


def test_an_empty_slot_is_the_base_and_does_not_train() -> None:
    base = tiny_llama().eval()
    model = li.reserve(copy.deepcopy(base), "slot", rank=4)
    assert torch.equal(model(IDS).logits, base(IDS).logits)
    assert not any(p.requires_grad for p in li.adapter_parameters(model, "slot").values())
    li.swap_adapter(model, apart(base, 0, rank=4), "slot")
    assert error(model(IDS).logits, base(IDS).logits) > 1e-3
    li.swap_adapter(model, apart(base, 1, rank=2), "slot")
    for name, site in li.adapter_state(model, "slot").sites.items():
        rank = 2 if "q_proj" in name else 0  # nothing is left of the one before
        assert not site.A[rank:].any()
        assert not site.B[:, rank:].any()
        assert bool(site.A[:rank].any()) is bool(rank)
    li.swap_adapter(model, li.adapter_state(li.reserve(base, "slot", rank=1), "slot"), "slot")
    li.eject(base)
    assert torch.equal(model(IDS).logits, base(IDS).logits)  # nothing is left of the ones before


@pytest.mark.parametrize(
    "changes",
    [
        {"init": "pissa", "rank": 2, "targets": ["q_proj"]},
        {"scaling": "rslora", "rank": 3},
        {"rank": 2, "targets": [{"match": "up_proj", "slices": {"a": 8, "b": 16}, "adapt": ["b"]}]},
    ],
    ids=["frozen start", "rslora", "slices"],
)
def test_other_forms_of_adapters_fit(changes: dict[str, Any], tmp_path: Path) -> None:
    base = tiny_llama().double().eval()
    state = apart(base, 3, **changes)
    model = li.reserve(copy.deepcopy(base), "slot", rank=8)
    li.write_adapter(state, tmp_path / "a", "native")
    li.swap_adapter(model, tmp_path / "a.safetensors", "slot")
    wanted = li.install(copy.deepcopy(base), state)
    assert error(model(IDS).logits, wanted(IDS).logits) < 1e-12


def refused(words: str, run: Callable[[], object]) -> None:
    with pytest.raises(li.LoraInjectError, match=words):
        run()


def test_what_a_slot_cannot_hold_is_refused_and_nothing_changed() -> None:
    base = tiny_llama().half().eval()
    model = li.reserve(copy.deepcopy(base), "slot", rank=8, targets=["q_proj", "down_proj"])
    li.swap_adapter(model, apart(base, 1, rank=3), "slot")
    before = {n: p.clone() for n, p in li.adapter_parameters(model, "slot").items()}
    states = {
        "its rank is 9, and the slot has room for 8. Reserve a slot of rank 9": {"rank": 9},
        "the adapter on the model has no such site": {"rank": 2, "targets": ["up_proj"]},
        "a slot cannot hold trained tensors": {"rank": 2, "train": ["lm_head"]},
        "of the variant 'dora'": {"rank": 2, "variant": "dora"},
        "its values are not finite in torch.float": {"rank": 2, "alpha": 1e39},
    }
    cases = {words: apart(base, 1, **changes) for words, changes in states.items()}
    cases["another base"] = apart(tiny_llama(initializer_range=0.5), 1, rank=2)
    for words, state in cases.items():
        refused(words, lambda state=state: li.swap_adapter(model, state, "slot"))
    after = li.adapter_parameters(model, "slot")
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_reserving_badly_is_refused() -> None:
    model = tiny_llama()
    slices = {"match": "up_proj", "slices": {"a": 8, "b": 16}, "adapt": ["b"]}
    for words, options in (
        ("rank", {"rank": 0}),
        ("matched none", {"rank": 2, "targets": ["nowhere"]}),
        ("a slot has whole layers", {"rank": 2, "targets": [slices]}),
        *(
            ("Give patterns only", {"rank": 8, "targets": [{"match": "q_proj", **more}]})
            for more in ({"variant": "dora"}, {"lora_bias": True}, {"rank": 4}, {"init": "pissa"})
        ),
    ):
        refused(words, lambda options=options: li.reserve(model, **options))
    li.reserve(model, rank=2)
    refused("the model has one of that name", lambda: li.reserve(model, rank=2))


def test_an_adapter_that_is_no_slot_keeps_its_form() -> None:
    base = tiny_llama()
    model = li.reserve(copy.deepcopy(base), "slot", rank=8, targets=["q_proj"])
    li.eject(model, "slot")
    li.inject(model, {"rank": 8, "alpha": 8, "targets": ["q_proj"]}, "slot")
    state = apart(base, 1, rank=3)
    refused("its rank is 3, and 8 on the model", lambda: li.swap_adapter(model, state, "slot"))


def test_a_slot_travels_with_its_model() -> None:
    base = tiny_llama().eval()
    model = copy.deepcopy(li.reserve(copy.deepcopy(base), "slot", rank=8))
    li.inject(model, {"rank": 2, "targets": ["q_proj"]}, "other")
    state = apart(base, 1, rank=3)
    li.swap_adapter(model, state, "slot")
    li.activate(model, "slot")
    assert error(model(IDS).logits, li.install(base, state)(IDS).logits) < 1e-5
