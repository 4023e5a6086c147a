"""What torch can do with a layer, an adapted one does as well, or says that it does not."""

import copy
import signal
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from conftest import error, fill
from helpers.reference import random
from torch import Tensor, nn
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import BertConfig, BertForMaskedLM

import lora_inject as li

LINEAR = {"rank": 2, "alpha": 3.0, "targets": ["0"]}


def adapted(layer: nn.Module, target: str = "0") -> nn.Module:
    return fill(li.inject(nn.Sequential(layer).double(), {**LINEAR, "targets": [target]}))


class Again(torch.autograd.Function):
    """A checkpoint that is not torch's, such as those of DeepSpeed and unsloth."""

    @staticmethod
    def forward(ctx: Any, run: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        ctx.run = run
        ctx.save_for_backward(x)
        return run(x)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[None, Tensor]:
        x = ctx.saved_tensors[0].detach().requires_grad_()
        with torch.enable_grad():
            ctx.run(x).backward(g)
        return None, x.grad


def in_this_thread(run: Callable[[], Any]) -> None:
    run()


def elsewhere(run: Callable[[], Any]) -> None:
    with ThreadPoolExecutor(1) as pool:
        pool.submit(run).result()


def in_another_thread(run: Callable[[], Any]) -> None:
    n = torch.autograd._get_sequence_nr()  # each thread counts its own nodes

    def after_as_many_nodes() -> None:
        y = torch.ones(1, requires_grad=True)
        for _ in range(n):
            y = y + 1
        run()

    elsewhere(after_as_many_nodes)


@pytest.mark.parametrize("where", [in_this_thread, in_another_thread])
def test_a_reference_between_forward_and_backward_changes_nothing(where: Any) -> None:
    elsewhere(lambda: refer_between_forward_and_backward(where))  # which has counted none yet


def refer_between_forward_and_backward(where: Any) -> None:
    model, x = adapted(nn.Linear(4, 4)), random(3, 4).requires_grad_()
    parameters = list(li.adapter_parameters(model).values())
    wanted = torch.autograd.grad(model(x).square().sum(), parameters)

    def refer() -> None:
        with li.disabled(model), torch.no_grad():
            model(x)

    loss = Again.apply(model, x).square().sum()
    where(refer)
    loss.backward()
    assert all(torch.equal(p.grad, g) for p, g in zip(parameters, wanted, strict=True))


class Products(TorchDispatchMode):
    """Counts products of matrices."""

    def __init__(self) -> None:
        super().__init__()
        self.n = 0

    def __torch_dispatch__(self, func: Any, _: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.n += func.overloadpacket.__name__ in ("mm", "addmm", "addmm_", "bmm", "baddbmm_")
        return func(*args, **(kwargs or {}))


def products_of_a_merge(dtype: torch.dtype) -> int:
    layers = [nn.Linear(8, 8) for _ in range(2)]
    model = fill(li.inject(nn.Sequential(*layers).to(dtype), {**LINEAR, "targets": [r"\d"]}))
    with Products() as products:
        li.merge(model)
    assert products.n
    return products.n


def test_a_merge_in_float16_takes_as_many_products_as_one_in_bfloat16() -> None:
    assert products_of_a_merge(torch.float16) == products_of_a_merge(torch.bfloat16)


def test_unmerge_leaves_the_interrupt_handler_of_a_host_program(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """As in Blender, whose handler Python cannot name, and so not put back."""

    def put(_: int, handler: Any) -> None:
        if handler is None:
            raise TypeError("signal handler must be signal.SIG_IGN, signal.SIG_DFL, or callable")
        put.to = handler

    put.to = None
    monkeypatch.setattr(signal, "getsignal", lambda _: put.to)
    monkeypatch.setattr(signal, "signal", put)
    model, x = adapted(nn.Linear(4, 4)), random(3, 4)
    before = model(x)
    li.merge(model)
    assert torch.equal(li.unmerge(model)(x), before)
    assert put.to is None


def test_a_trace_of_a_convolution_computes_with_its_adapter() -> None:
    model, x = adapted(nn.Conv1d(4, 6, 3)), random(2, 4, 9)
    assert error(make_fx(model)(x)(x), model(x)) < 1e-12


def test_a_sparse_bag_trains_its_adapter() -> None:
    sparse, bag = (nn.EmbeddingBag(7, 4, sparse=s) for s in (True, False))
    bag.load_state_dict(sparse.state_dict())
    ids = torch.tensor([[1, 2, 2], [3, 4, 6]])
    gradients = []
    for layer in (sparse, bag):
        torch.manual_seed(0)
        model = adapted(layer, "0.weight")
        model(ids).square().sum().backward()
        gradients.append([p.grad.to_dense() for p in li.adapter_parameters(model).values()])
    for got, wanted in zip(*gradients, strict=True):
        assert error(got, wanted) < 1e-12


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning")
def test_a_compiled_model_may_be_frozen_by_inductor() -> None:
    model, x = adapted(nn.Linear(4, 4)).float().eval(), torch.randn(3, 4)
    with torch.no_grad(), torch._inductor.config.patch(freezing=True):
        assert error(torch.compile(model)(x), model(x)) < 1e-5


def test_a_tied_model_of_which_one_end_trains_is_merged() -> None:
    torch.manual_seed(0)
    sizes = {"hidden_size": 8, "intermediate_size": 12, "num_hidden_layers": 1, "vocab_size": 13}
    plain = BertForMaskedLM(BertConfig(num_attention_heads=2, **sizes)).eval().double()
    ends = ["bert.embeddings.word_embeddings.weight", "cls.predictions.decoder.weight"]
    both = li.inject(
        copy.deepcopy(plain), {"rank": 2, "targets": ["query"], "train": ["word_embeddings"]}
    )
    state = li.adapter_state(fill(both))
    assert set(ends) <= state.trained.keys()
    one = copy.deepcopy(state)
    del one.trained[ends[1]]
    ids = torch.tensor([[1, 2, 3]])
    model = li.install(plain, one)
    before = model(ids).logits
    li.merge(model)
    assert error(model(ids).logits, before) < 1e-9
