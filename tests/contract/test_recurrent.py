"""LSTM, GRU and RNN: what their fused kernel is handed is W + delta; torch's books hold W."""

import copy
import warnings
from pathlib import Path

import pytest
import torch
from conftest import COPIES, error, fill, same_bits
from helpers.reference import EXACT, adapted, config, dense, hold, saved
from helpers.refusals import refused
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import lora_inject as li

LAYERS = {
    "LSTM": (nn.LSTM, {"num_layers": 2, "bidirectional": True}),
    "LSTM, projected": (nn.LSTM, {"proj_size": 3, "bias": False}),
    "GRU": (nn.GRU, {"num_layers": 2}),
    "RNN": (nn.RNN, {"nonlinearity": "relu"}),
}


class Reads(nn.Module):
    """A recurrent layer whose parent moves its weights together, as many do."""

    def __init__(self, name: str = "LSTM") -> None:
        super().__init__()
        make, options = LAYERS[name]
        self.rnn = make(4, 6, batch_first=True, **options)

    def forward(self, x: Tensor) -> Tensor:
        self.rnn.flatten_parameters()
        return self.rnn(x)[0]


def run(model: nn.Module) -> Tensor:
    return model(X)


X = torch.linspace(-2, 2, 24, dtype=torch.float64).view(2, 3, 4)


@pytest.mark.parametrize("target", ["rnn", r"weight_hh_l\d.*"])
@pytest.mark.parametrize("name", LAYERS)
def test_equal_the_dense_reference(name: str, target: str) -> None:
    plain = Reads(name).double()
    model = adapted(plain, target)
    named = {s.name for s in li.plan(plain, config(target)).sites}
    weights = {n for n, p in plain.named_parameters() if p.dim() == 2}
    assert named == (weights if target == "rnn" else {n for n in weights if "_hh_" in n})
    hold(plain, model, run)


def test_two_adapters_take_turns_and_leave() -> None:
    plain = Reads().double()
    model = adapted(plain, "rnn")
    fill(li.inject(model, config(r"weight_ih_l0", train=[r"rnn\.bias_hh_l0"]), "second"))
    li.activate(model, "default")
    assert error(run(model), run(dense(plain, model))) < EXACT
    li.activate(model, {"default": 1.0, "second": 1.0})
    bias = li.adapter_state(model, "second").trained["rnn.bias_hh_l0"]
    wide = dense(dense(plain, model), model, "second")
    wide.rnn.bias_hh_l0 = nn.Parameter(bias.detach())
    assert error(run(model), run(wide)) < EXACT
    with li.disabled(model):  # torch multiplies in another order by weights that train
        assert same_bits(run(model), run(copy.deepcopy(plain).requires_grad_(False)))
    named = zip(model.rnn.__dict__["_flat_weights"], model.rnn._flat_weights_names, strict=True)
    assert all(w is model.rnn._parameters[name] for w, name in named)
    assert type(li.eject(model).rnn) is nn.LSTM
    assert same_bits(run(model), run(plain))


@pytest.mark.parametrize("layout", ["native", "peft"])
def test_travel(layout: str, tmp_path: Path) -> None:
    plain = Reads("GRU").double()
    model = adapted(plain, "rnn")
    path, _ = saved(model, tmp_path, layout)
    assert error(run(li.load_adapter(copy.deepcopy(plain), path)), run(model)) < EXACT
    for copied in COPIES.values():
        assert same_bits(run(copied(model)), run(model))
    li.merge(model, eject=True)
    plain.load_state_dict(model.state_dict())
    assert same_bits(run(plain), run(model))


def test_weights_that_are_put_in_place_are_read() -> None:
    plain, other = Reads().double(), Reads().double()
    model = adapted(plain, "rnn")
    new = dict(other.named_parameters())
    y = torch.func.functional_call(model, new, (X,))
    replaced = copy.deepcopy(model)
    replaced.load_state_dict(copy.deepcopy(new), strict=False, assign=True)
    assert same_bits(y, run(replaced))
    assert error(run(li.eject(replaced)), run(other)) < EXACT
    with refused(li.LayerError, "'weight_hh_l0'"):
        model.rnn.weight_hh_l0 = copy.deepcopy(new["rnn.weight_hh_l0"])
    assert error(y, run(dense(other, model))) < EXACT
    assert error(run(model), run(dense(plain, model))) < EXACT
    assert error(run(model.float().double()), run(dense(plain.float().double(), model))) < EXACT


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpoints_packed_sequences_and_no_leftovers(reentrant: bool) -> None:
    model = adapted(Reads().double(), "rnn")
    parameters = list(li.adapter_parameters(model).values())
    wanted = torch.autograd.grad(run(model).sum(), parameters)
    x = X.clone().requires_grad_()
    checkpoint(model, x, use_reentrant=reentrant).sum().backward()
    assert all(same_bits(p.grad, g) for p, g in zip(parameters, wanted, strict=True))
    packed = nn.utils.rnn.pack_padded_sequence(X, torch.tensor([3, 3]), batch_first=True)
    out, _ = nn.utils.rnn.pad_packed_sequence(model.rnn(packed)[0], batch_first=True)
    assert error(out, run(model)) < EXACT
    assert all(w.grad_fn is None for w in model.rnn.__dict__["_flat_weights"])


def test_graphs_break_and_replicas_have_a_list_of_their_own() -> None:
    model = adapted(Reads().double(), "rnn")
    torch.compiler.reset()
    assert error(torch.compile(model, backend="eager")(X), run(model)) < EXACT
    torch.compiler.reset()
    replica = model.rnn._replicate_for_data_parallel()
    assert replica.__dict__["_flat_weights"] is not model.rnn.__dict__["_flat_weights"]
    assert type(replica) is type(model.rnn)


def test_a_compiled_model_trains_by_row_without_a_word_of_dynamo() -> None:
    """It compiles what runs below the layer function by function, and says what it cannot keep."""
    model = Reads().double()
    for name in ("one", "two"):
        fill(li.inject(model, config(r"weight_hh_l0"), name), name)
    with li.routed(model, ["one", "two"]), warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        assert error(torch.compile(model, backend="eager")(X), run(model)) < EXACT
    assert not said
