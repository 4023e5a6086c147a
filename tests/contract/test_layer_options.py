"""Options of stock layers: padding, sparse gradients, slices; recurrent cells."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from conftest import error, fill
from helpers.reference import adapted, hold, random
from torch import Tensor, nn

import lora_inject as li
from contract.kinds import Host, Kind, dense_output, host


class Once(nn.Module):
    """A cell that runs twice."""

    def __init__(self, cell: nn.Module) -> None:
        super().__init__()
        self.cell = cell

    def forward(self, x: Tensor) -> Tensor:
        state = self.cell(x, self.cell(x))
        return state[0] if isinstance(state, tuple) else state


@pytest.mark.parametrize("cell", [nn.LSTMCell, nn.GRUCell, nn.RNNCell])
def test_recurrent_cells(cell: Any) -> None:
    plain, x = Once(cell(4, 5)).double(), random(3, 4)
    hold(plain, adapted(plain, "weight_ih", "weight_hh"), lambda m: m(x))


CONVOLUTIONS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "replicate": (lambda: nn.Conv1d(3, 8, 3, padding=2, padding_mode="replicate"), (2, 3, 9)),
    "unbatched": (lambda: nn.Conv1d(3, 8, 3), (3, 9)),
    "transposed dilation": (
        lambda: nn.ConvTranspose1d(4, 6, 3, dilation=2, output_padding=1, stride=2),
        (2, 4, 5),
    ),
}


@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_convolutions(name: str) -> None:
    build, shape = CONVOLUTIONS[name]
    plain, x = Host(build()).double(), random(*shape)
    model = adapted(plain, "layer")
    assert li.adapter_state(model).sites["layer"].spec.transposed is ("transposed" in name)
    hold(plain, model, lambda m: m(x))


def test_a_sparse_bag_trains_its_adapter() -> None:
    sparse, bag = (nn.EmbeddingBag(7, 4, sparse=s) for s in (True, False))
    bag.load_state_dict(sparse.state_dict())
    ids, gradients = torch.tensor([[1, 2, 2], [3, 4, 6]]), []
    for layer in (sparse, bag):
        torch.manual_seed(0)
        model = adapted(Host(layer).double(), r"layer\.weight")
        model(ids).square().sum().backward()
        gradients.append([p.grad.to_dense() for p in li.adapter_parameters(model).values()])
    assert all(error(got, wanted) < 1e-12 for got, wanted in zip(*gradients, strict=True))


@pytest.mark.parametrize("options", [{"sparse": True}, {"scale_grad_by_freq": True}], ids=str)
def test_embedding_options_keep_their_gradients(options: dict[str, Any]) -> None:
    kind = Kind(lambda: nn.Embedding(7, 5, **options), (7, 5), ["ids"], transposed=True)
    plain = host(kind, torch.float64)
    model = fill(li.inject(copy.deepcopy(plain), kind.config))
    leaves = list(li.adapter_parameters(model).values())
    ids, g = torch.tensor([[1, 1, 1], [2, 1, 5]]), random(2, 3, 5)
    (model(ids) * g).sum().backward()
    wide = [t.detach().clone().requires_grad_() for t in leaves]
    plain.layer.sparse = False  # the dense reference differentiates a sum, which is not sparse
    (dense_output(kind, plain, *wide, [ids]) * g).sum().backward()
    assert all(error(a.grad, b.grad) < 1e-12 for a, b in zip(leaves, wide, strict=True))
