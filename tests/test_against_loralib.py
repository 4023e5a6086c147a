"""The paper's own library, with the same A and B: same outputs, same gradients, same steps.

Loralib is a second, independent statement of the method. Its layers are read as they are;
only W, bias, A and B are copied across.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import loralib
import pytest
import torch
from conftest import Host, conv1d, error, same_bits
from torch import Tensor, nn

import lora_inject as li

R, ALPHA = 2, 6


@dataclass(frozen=True)
class Pair:
    """A layer of loralib, and the plain layer and rule that must equal it."""

    theirs: Callable[[], Any]
    plain: Callable[[], nn.Module]
    rule: dict[str, Any] = field(default_factory=dict)
    ids: bool = False


def merged(*enabled: bool, turned: bool = False) -> Pair:
    names = [f"part{i}" for i in range(len(enabled))]
    n_out = 4 * len(enabled)
    return Pair(
        lambda: loralib.MergedLinear(
            5, n_out, r=R, lora_alpha=ALPHA, enable_lora=list(enabled), fan_in_fan_out=turned
        ),
        lambda: conv1d(n_out, 5) if turned else nn.Linear(5, n_out),
        {"slices": names, "adapt": [n for n, on in zip(names, enabled, strict=True) if on]},
    )


PAIRS = {
    "Linear": Pair(lambda: loralib.Linear(5, 6, r=R, lora_alpha=ALPHA), lambda: nn.Linear(5, 6)),
    "Linear without bias": Pair(
        lambda: loralib.Linear(5, 6, r=R, lora_alpha=ALPHA, bias=False),
        lambda: nn.Linear(5, 6, bias=False),
    ),
    "Linear turned": Pair(
        lambda: loralib.Linear(5, 6, r=R, lora_alpha=ALPHA, fan_in_fan_out=True),
        lambda: conv1d(6, 5),
    ),
    "Embedding": Pair(
        lambda: loralib.Embedding(7, 5, r=R, lora_alpha=ALPHA), lambda: nn.Embedding(7, 5), ids=True
    ),
    "MergedLinear q v": merged(True, False, True),
    "MergedLinear k": merged(False, True, False),
    "MergedLinear q k": merged(True, True, False),
    "MergedLinear all": merged(True, True, True),
    "MergedLinear of two": merged(False, True),
    "MergedLinear turned q v": merged(True, False, True, turned=True),
    "MergedLinear turned v": merged(False, False, True, turned=True),
}
every_pair = pytest.mark.parametrize("pair", PAIRS.values(), ids=list(PAIRS))


def build(pair: Pair) -> tuple[Any, Any, Tensor]:
    """Theirs, ours with the same W, bias, A and B, and an input."""
    theirs = pair.theirs().double()
    config = {"rank": R, "alpha": ALPHA, "targets": [{"match": "layer", **pair.rule}]}
    host = Host(pair.plain()).double()
    plain = host.layer
    with torch.no_grad():
        plain.weight.copy_(theirs.weight)
        if getattr(theirs, "bias", None) is not None:
            plain.bias.copy_(theirs.bias)
        nn.init.normal_(theirs.lora_A)
        nn.init.normal_(theirs.lora_B)
    ours = li.inject(host, config)
    A, B = li.adapter_parameters(ours).values()
    assert (A.shape, B.shape) == (theirs.lora_A.shape, theirs.lora_B.shape)
    with torch.no_grad():
        A.copy_(theirs.lora_A)
        B.copy_(theirs.lora_B)
    x = torch.randint(0, 7, (4, 3)) if pair.ids else torch.randn(4, 3, 5, dtype=torch.float64)
    return theirs, ours, x


@every_pair
def test_outputs_and_gradients_are_the_same(pair: Pair) -> None:
    theirs, ours, x = build(pair)
    inputs = [x.clone().requires_grad_(not pair.ids) for _ in range(2)]
    outputs = [model(i) for model, i in zip((theirs, ours), inputs, strict=True)]
    assert error(outputs[1], outputs[0]) < 1e-12
    g = torch.randn_like(outputs[0])
    for y in outputs:
        y.backward(g)
    A, B = li.adapter_parameters(ours).values()
    assert error(A.grad, theirs.lora_A.grad) < 1e-12
    assert error(B.grad, theirs.lora_B.grad) < 1e-12
    if not pair.ids:
        assert error(inputs[1].grad, inputs[0].grad) < 1e-12


@every_pair
def test_merged_weights_are_the_same(pair: Pair) -> None:
    """loralib merges when it goes to eval mode."""
    theirs, ours, x = build(pair)
    theirs.eval()
    li.merge(ours)
    assert error(ours.layer.weight, theirs.weight) < 1e-12
    assert error(ours(x), theirs(x)) < 1e-12


@every_pair
def test_ten_steps_of_adam_are_the_same(pair: Pair) -> None:
    theirs, ours, x = build(pair)
    loralib.mark_only_lora_as_trainable(theirs)
    own = [p for p in theirs.parameters() if p.requires_grad]
    groups = [own, list(li.adapter_parameters(ours).values())]
    for model, parameters in zip((theirs, ours), groups, strict=True):
        optimizer = torch.optim.Adam(parameters, lr=0.03)
        for _ in range(10):
            optimizer.zero_grad()
            model(x).square().mean().backward()
            optimizer.step()
    for a, b in zip(groups[1], groups[0], strict=True):
        assert error(a, b) < 1e-9


@every_pair
def test_a_fresh_adapter_starts_with_the_same_distribution(pair: Pair) -> None:
    """The zero factor is the same one; the random one has the same bound or spread."""
    theirs, ours = pair.theirs(), Host(pair.plain())
    config = {"rank": R, "alpha": ALPHA, "targets": [{"match": "layer", **pair.rule}]}
    A, B = (p.detach() for p in li.adapter_parameters(li.inject(ours, config)).values())
    assert bool(A.any()) is bool(theirs.lora_A.any())
    assert bool(B.any()) is bool(theirs.lora_B.any())
    if not pair.ids:
        bound = 1 / 5**0.5  # kaiming_uniform_ with a = sqrt(5) over 5 inputs
        for random in (A, theirs.lora_A.detach()):
            assert bound / 2 < float(random.abs().max()) <= bound


def test_a_whole_state_dict_of_loralib_carries_over() -> None:
    """Their trainable state, read by its own helper, is our adapter's two tensors."""
    theirs, ours, _ = build(PAIRS["MergedLinear q v"])
    state = loralib.lora_state_dict(theirs)
    site = li.adapter_state(ours).sites["layer"]
    assert same_bits(site.A, state["lora_A"])
    assert same_bits(site.B, state["lora_B"])
    assert site.scale == theirs.scaling
