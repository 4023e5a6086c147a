"""Right after inject a model runs the operations of the plain one, on the same shapes, and more.

Equal bits on one processor may be luck: a product and a bias that are summed apart round otherwise.
"""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from conftest import same_bits
from helpers.versions import needs_transformers_5
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import lora_inject as li

# What asks for no sum: layouts, and copies of them.
LAYOUT = {"t", "view", "_unsafe_view", "clone", "transpose", "detach", "expand", "contiguous"}
LAYOUT |= {"promote_types", "reshape", "as_strided", "unsqueeze", "squeeze", "permute", "alias"}
# What an update adds.
LOW_RANK = {"mm", "addmm", "bmm", "baddbmm", "add", "matmul", "embedding", "mul", "zeros"}
LOW_RANK |= {"_to_copy", "addmm_", "baddbmm_", "new_zeros", "masked_fill"}


class Operations(TorchDispatchMode):
    """Notes each operation with the shapes of its tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[Any, ...]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.name().removeprefix("aten::").partition(".")[0]
        if name not in LAYOUT and not name.startswith("prim"):
            tensors = [x for x in tree_leaves((args, kwargs or {})) if isinstance(x, Tensor)]
            self.seen.append((name, *(tuple(tensor.shape) for tensor in tensors)))
        return func(*args, **(kwargs or {}))


def more_than(seen: list[Any], plain: list[Any]) -> list[str] | None:
    """What ran besides the plain operations; None if one of them is missing."""
    rest, more = list(plain), []
    for one in seen:
        if rest and one == rest[0]:
            rest.pop(0)
        else:
            more.append(one[0])
    return None if rest else more


def check(plain: nn.Module, targets: list[Any], run: Callable[[Any], list[Tensor]]) -> None:
    model = li.inject(copy.deepcopy(plain), {"rank": 2, "targets": targets}, leave_new=True)
    for mode in (torch.no_grad, torch.enable_grad):
        with mode():
            wanted, outputs = run(plain), run(model)
            assert len(wanted) == len(outputs) > 0
            assert all(same_bits(a, b) for a, b in zip(wanted, outputs, strict=True))
    with torch.no_grad():
        with Operations() as ours:
            run(model)
        with Operations() as theirs:
            run(plain)
    more = more_than(ours.seen, theirs.seen)
    assert more is not None, "an operation of the plain model is missing"
    assert {*more} <= LOW_RANK
    assert li.adapters(model)["default"].idle == (), "each site takes part"


@needs_transformers_5  # for which the zoo builds its models
@pytest.mark.filterwarnings("ignore")  # transformers' of configs as small as these
@pytest.mark.parametrize("model_type", ["fsmt", "longformer", "siglip_vision_model", "gpt2"])
def test_a_model_of_transformers_starts_with_its_own_operations(model_type: str) -> None:
    from zoo.build import build
    from zoo.inputs import dummy_inputs
    from zoo.steps import run

    plain = build(model_type).requires_grad_(False)
    calls = dummy_inputs(plain, model_type)
    check(plain, ["all-linear"], lambda model: run(model, calls))


D = 8
READS: dict[str, Callable[[Any, Tensor], Tensor]] = {
    "called": lambda fc, x: fc(x),
    "linear with a bias": lambda fc, x: F.linear(x, fc.weight, fc.bias),
    "addmm": lambda fc, x: torch.addmm(fc.bias, x.reshape(-1, D), fc.weight.t()),
    "matmul": lambda fc, x: x @ fc.weight.T + fc.bias,
    "einsum": lambda fc, x: torch.einsum("...d,od->...o", x, fc.weight),
    "formed": lambda fc, x: x * fc.weight.sum(0),
}


class Reads(nn.Module):
    """Uses one layer in a given way."""

    def __init__(self, use: Callable[[Any, Tensor], Tensor]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.fc, self.use = nn.Linear(D, D), use

    def forward(self, x: Tensor) -> Tensor:
        return self.use(self.fc, x)


@pytest.mark.parametrize("shape", [(5, D), (2, 5, D), (1, D)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("read", READS)
def test_a_weight_that_is_read_is_multiplied_as_the_plain_one(
    read: str, dtype: torch.dtype, shape: tuple[int, ...]
) -> None:
    x = torch.randn(shape, generator=torch.Generator().manual_seed(1)).to(dtype)
    plain = Reads(READS[read]).to(dtype).requires_grad_(False)
    check(plain, ["fc"], lambda model: [model(x)])
