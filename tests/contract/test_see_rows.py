"""Rows are seen on an example; a live forward that changes what the next one reads runs once."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from conftest import error, fill
from helpers.models import tiny
from helpers.reference import config
from helpers.refusals import refused
from torch import Tensor, nn
from transformers import DynamicCache, GPT2LMHeadModel

import lora_inject as li

ROWS = ["one", None, "two"]
IDS = torch.arange(18).view(3, 6) * 7 % 11


def of_two(model: Any, *targets: str) -> Any:
    torch.manual_seed(1)
    for name in ("one", "two"):
        fill(li.inject(model, config(*targets), name), name)
    return model.double().eval()


class Decoder(nn.Module):
    """A language model that keeps its keys and values in buffers, as gpt-fast and torchtune do."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.qkv, self.out = nn.Embedding(11, 8), nn.Linear(8, 24), nn.Linear(8, 11)
        self.register_buffer("kv", torch.zeros(2, 3, 8, 8), persistent=False)

    def reset(self) -> None:
        self.n_done = 0

    def forward(self, ids: Tensor, start: int) -> Tensor:
        q, k, v = self.qkv(torch.tanh(self.embed(ids))).chunk(3, -1)
        n, end = len(ids), start + ids.shape[1]
        self.kv[0, :n, start:end], self.kv[1, :n, start:end] = k, v
        keys, values = self.kv[:, :n, :end]
        mask = torch.full((ids.shape[1], end), -torch.inf).triu(start + 1)
        return self.out((q @ keys.mT + mask).softmax(-1) @ values)


class Counting(Decoder):
    """The same, and where it is stands in an attribute."""

    def forward(self, ids: Tensor, start: int) -> Tensor:
        logits = super().forward(ids, self.n_done)
        self.n_done += ids.shape[1]
        return logits


class Summary(nn.Module):
    """A summary of the prompt, in an attribute, on which each later token depends."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.up, self.out = nn.Embedding(11, 8), nn.Linear(8, 8), nn.Linear(8, 11)

    def reset(self) -> None: ...

    def forward(self, ids: Tensor, start: int) -> Tensor:
        x = torch.tanh(self.up(self.embed(ids)))
        if start == 0:
            self.summary = x.mean(1, keepdim=True)
        return self.out(x + self.summary)


class Adding(Summary):
    """The same, of all tokens so far."""

    def reset(self) -> None:
        self.summary: Any = 0

    def forward(self, ids: Tensor, start: int) -> Tensor:
        x = torch.tanh(self.up(self.embed(ids)))
        self.summary = self.summary + x.sum(1, keepdim=True)
        return self.out(x + self.summary)


class Listing(Adding):
    """The same, each part by itself in a list."""

    def reset(self) -> None:
        self.parts: list[Tensor] = []

    def forward(self, ids: Tensor, start: int) -> Tensor:
        x = torch.tanh(self.up(self.embed(ids)))
        self.parts.append(x.sum(1, keepdim=True))
        return self.out(x + sum(self.parts))


def decoded(model: Any, ids: Tensor) -> Tensor:
    """A prompt of three tokens, then one after the other."""
    with torch.inference_mode():
        model.reset()
        each = [model(ids[:, :3], 0), *(model(ids[:, i : i + 1], i) for i in range(3, 6))]
    return torch.cat(each, 1)


def alone(model: Any, run: Callable[[Any, Tensor], Tensor] = decoded) -> Tensor:
    return torch.cat([run(li.activate(model, name), IDS[i, None]) for i, name in enumerate(ROWS)])


@pytest.mark.parametrize("make", [Decoder, Counting, Summary, Adding, Listing])
def test_each_row_is_decoded_as_alone_after_it_was_seen_on_an_example(make: Any) -> None:
    model = of_two(make(), "all-linear", "embed")
    wanted = alone(model)
    model.reset()
    calls: list[int] = []
    assert li.see_rows(model, IDS[:2, :3], 0) == []
    model.register_forward_hook(lambda *_: calls.append(1) or None)
    with li.routed(model, ROWS):
        assert error(decoded(model, IDS), wanted) < 1e-9
    assert len(calls) == 4, "a live forward runs once"


# What no example has told: a forward that moves what the next one reads is not run again.
MOVING = {Decoder: "'kv'", Counting: "'kv'", Adding: "'summary'", Listing: "'parts.1'"}


@pytest.mark.parametrize("make", MOVING)
def test_a_live_forward_that_moves_a_state_is_refused_before_it_runs_again(make: Any) -> None:
    model = of_two(make(), "all-linear", "embed")
    with li.routed(model, ROWS), refused(li.LayerError, MOVING[make], "see_rows"):
        decoded(model, IDS)
    model.reset()
    li.see_rows(model, IDS[:2, :3], 0)
    wanted = alone(model)
    with li.routed(model, ROWS):
        assert error(decoded(model, IDS), wanted) < 1e-9


def test_what_a_live_forward_sets_as_its_prompt_says_is_as_it_left_it() -> None:
    """It was that of another run, with other tokens."""
    model = of_two(Summary(), "all-linear", "embed")
    wanted = alone(model)
    with li.routed(model, ROWS):
        assert error(decoded(model, IDS), wanted) < 1e-9


@pytest.mark.parametrize("make", [Decoder, Counting, Adding, Listing])
def test_an_example_leaves_buffers_attributes_and_generators_as_they_were(make: Any) -> None:
    model = of_two(nn.Sequential(make(), nn.Dropout(0.5)), "all-linear")
    inner, modes = model[0], [module.training for module in model.train().modules()]
    inner.reset()
    inner.summary = torch.ones(2, 1, 8).double()
    before = {k: v.clone() for k, v in inner.named_buffers()}, {**inner.__dict__}
    generator = torch.get_rng_state()
    model.forward = lambda *given: model[1](model[0](*given))
    li.see_rows(model, IDS[:2, :3], 0)
    assert all(torch.equal(v, before[0][k]) for k, v in inner.named_buffers())
    assert inner.__dict__ == before[1]
    assert getattr(inner, "parts", []) == []
    assert inner.summary.eq(1).all()
    assert torch.equal(torch.get_rng_state(), generator)
    assert [module.training for module in model.modules()] == modes


def test_an_example_names_the_layers_that_do_not_get_the_rows_first() -> None:
    model = of_two(tiny(GPT2LMHeadModel, vocab_size=11), "c_attn", "wpe")
    assert li.see_rows(model, input_ids=IDS) == ["transformer.wpe"]
    li.eject(model)
    assert li.see_rows(of_two(model, "c_attn"), IDS) == []


WRONG: dict[str, tuple[Any, list[str]]] = {
    "one row": (lambda m: li.see_rows(m, IDS[:1]), ["see_rows", "1 row"]),
    "no tensor": (lambda m: li.see_rows(m, 3), ["see_rows", "tensor"]),
    "no adapter": (lambda m: li.see_rows(nn.Linear(2, 2), IDS), ["see_rows", "no adapter"]),
}


@pytest.mark.parametrize("case", WRONG)
def test_an_example_that_tells_nothing_is_refused(case: str) -> None:
    act, names = WRONG[case]
    model = of_two(tiny(GPT2LMHeadModel, vocab_size=11), "c_attn")
    with refused(li.StateError, *names, model=model):
        act(model)


# --------------------------------------------------------------- where rows run one after the other


def with_a_cache(model: Any, ids: Tensor) -> Tensor:
    """The loop that everybody writes, with a cache of one's own."""
    cache = DynamicCache()
    parts = (ids[:, :3], *ids[:, 3:].split(1, 1))
    with torch.inference_mode():
        each = [model(part, past_key_values=cache, use_cache=True).logits for part in parts]
    return torch.cat(each, 1)


@pytest.mark.recent
@pytest.mark.filterwarnings("ignore:`past_key_values` is deprecated:FutureWarning")
def test_a_cache_of_the_caller_holds_what_each_row_has_alone() -> None:
    """It held what the forward wrote that was thrown away."""
    model = of_two(tiny(GPT2LMHeadModel, vocab_size=11), "c_attn", "wpe")
    wanted = alone(model, with_a_cache)
    with li.routed(model, ROWS):
        assert error(with_a_cache(model, IDS), wanted) < 1e-9


class Own:
    """A cache of one's own: keys by layer."""

    def __init__(self) -> None:
        self.held: dict[str, list[Tensor]] = {}


class Kept(nn.Module):
    """Positions are looked up once for all rows; what a cache holds is added up."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.wte, self.wpe, self.out = nn.Embedding(11, 8), nn.Embedding(6, 8), nn.Linear(8, 11)

    def forward(self, ids: Tensor, start: int, cache: Any) -> Tensor:
        place = torch.arange(start, start + ids.shape[1])
        x = torch.tanh(self.wte(ids) + self.wpe(place))
        held = cache.held.setdefault("x", []) if isinstance(cache, Own) else cache
        held.append(x.sum(1, keepdim=True))
        return self.out(x + sum(held))


@pytest.mark.parametrize("cache", [Own, list])
def test_so_does_a_cache_of_any_class(cache: Any) -> None:
    def run(model: Any, ids: Tensor) -> Tensor:
        mine = cache()
        with torch.inference_mode():
            each = [model(ids[:, i : i + 2], i, mine) for i in (0, 2, 4)]
        return torch.cat(each, 1)

    model = of_two(Kept(), "wte", "wpe", "out")
    wanted = alone(model, run)
    with li.routed(model, ROWS):
        assert error(run(model, IDS), wanted) < 1e-9


class Loads(Kept):
    """Beside its logits the load of each of as many experts as there are rows."""

    def forward(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        logits = super().forward(ids, 0, [])
        load = torch.nn.functional.one_hot(logits.argmax(-1) % 3, 3).sum((0, 1))
        return logits, load


def test_an_output_that_is_as_long_as_the_rows_by_chance_is_not_put_together_of_runs() -> None:
    model = of_two(Loads(), "wte", "wpe", "out")
    wanted = alone(model, lambda m, ids: m(ids)[0])
    for _ in range(2):
        with torch.no_grad(), li.routed(model, ROWS):
            logits, load = model(IDS)
        assert error(logits, wanted) < 1e-9
        assert load is None


class Moving(Kept):
    """It counts its calls in a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("n", torch.zeros(()))

    def forward(self, ids: Tensor) -> Tensor:
        self.n += 1
        return super().forward(ids, 0, [])


def test_rows_do_not_run_one_after_the_other_where_a_forward_moves_a_buffer() -> None:
    model = of_two(Moving(), "wte", "wpe", "out")
    for seen in (False, True):
        with li.routed(model, ROWS), refused(li.LayerError, "'n'"):
            model(IDS)
        assert seen or li.see_rows(model, IDS) == ["wpe"]
