"""Variants of LoRA: DoRA on every kind of layer, against dense layers in float64 and PEFT."""

import copy
import itertools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import peft
import pytest
import torch
from conftest import error, fill, same_bits
from helpers.forks import Forks
from helpers.merging import save_checkpoint
from helpers.models import TiedDecoder
from helpers.refusals import refused
from helpers.states import give_biases_of_b, with_biases_of_b
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import lora_inject as li
from contract.kinds import OwnForward, conv1d


def test_dropout_is_pefts(tmp_path: Path) -> None:
    """What x keeps goes through W as well, where the gain is not 1."""
    plain = nn.Sequential(nn.Linear(5, 6))
    config = {"rank": 2, "alpha": 3, "variant": "dora", "dropout": 0.5, "targets": ["0"]}
    model = fill(li.inject(copy.deepcopy(plain), config))
    li.save_adapter(model, tmp_path / "a")
    other = peft.PeftModel.from_pretrained(copy.deepcopy(plain), tmp_path / "a").train()
    x = torch.randn(4, 5)
    torch.manual_seed(1)
    ours = model.train()(x)
    torch.manual_seed(1)
    assert error(ours, other(x)) <= 1e-6


# ------------------------------------------------------ outputs of which an update leaves little

LEFT = (0.9, 0.5, 0.2, 0.1, 0.05, 0.02)  # shares of the first weights of six outputs, in tenths
WIDE = 64


@dataclass(frozen=True)
class Cancelled:
    """A layer, and the first axis of its weight and of its outputs that outputs have."""

    layer: Callable[[], nn.Module]
    shape: tuple[int, ...] = (16, WIDE)  # of its inputs; none: ids
    axis: int = 0  # of its weight
    channel: int = -1  # of its output
    rule: Mapping[str, Any] = field(default_factory=dict)
    weight: str = "weight"

    def rows(self, W: Tensor) -> Tensor:
        """The weight as `(out, in)`."""
        return W.movedim(self.axis, 0).flatten(1)

    def dense(self, W: Tensor, site: Any) -> Tensor:
        """`m V / |V|` for `V = W + scale * B A`, in float64 and with the shape of W."""
        B, n = site.B.double(), site.spec.out_features
        total = self.rows(W.double()) + site.scale * B @ site.A.double()
        assert n == len(B)
        total = total * (site.tensors["m"].double() / total.norm(dim=1))[:, None]
        shape = W.movedim(self.axis, 0).shape
        return total.reshape(shape).movedim(0, self.axis)


CANCELLED = {
    "linear": Cancelled(lambda: nn.Linear(WIDE, 48)),
    "no bias": Cancelled(lambda: nn.Linear(WIDE, 48, bias=False), (2, 3, WIDE)),
    "conv1d": Cancelled(lambda: conv1d(48, WIDE), axis=1),
    "embedding": Cancelled(lambda: nn.Embedding(WIDE, 48), (), axis=1),
    "own forward": Cancelled(lambda: OwnForward(WIDE, 48)),
    "conv 2d": Cancelled(lambda: nn.Conv2d(16, 48, 2), (4, 16, 3, 3), channel=1),
}


def left_of(how: Cancelled, dtype: torch.dtype) -> tuple[nn.Module, Any]:
    """A layer, and an adapter that leaves of six outputs these shares, mixed over its ranks."""
    plain = nn.Sequential(how.layer()).to(dtype)
    config = {"rank": 8, "alpha": 4, "variant": "dora", "targets": [{"match": "0", **how.rule}]}
    state = li.adapter_state(li.inject(copy.deepcopy(plain), config))
    site = state.sites["0"]
    W = how.rows(plain[0].weight.detach().double())[: len(LEFT)]
    mixed, _ = torch.linalg.qr(torch.randn(8, 8, dtype=torch.float64))
    site.A.copy_(mixed[:, : len(LEFT)] @ W)
    site.B.normal_(0, 0.02)
    gone = 1 - torch.tensor(LEFT, dtype=torch.float64)
    site.B[: len(LEFT)] = -(gone / site.scale)[:, None] * mixed[:, : len(LEFT)].T
    site.tensors["m"].mul_(0.5 + torch.rand_like(site.tensors["m"]))
    return plain, state


def merged(model: Any) -> nn.Module:
    li.merge(model)
    return model


def routed(model: Any, x: Tensor) -> Tensor:
    with li.routed(model, ["default"] * len(x)):
        y: Tensor = model(x)
        return y


AROUND: dict[str, Callable[[Any, Tensor], Tensor]] = {
    "plain": lambda model, x: model(x),
    "without gradients": lambda model, x: torch.no_grad()(model)(x),
    "recomputed": lambda model, x: checkpoint(model, x, use_reentrant=False),
    "routed": routed,
    "merged": lambda model, x: merged(model)(x),
}


def off_by(how: Cancelled, found: Tensor, wanted: Tensor) -> float:
    """The largest error of the six outputs, each relative to its own largest value."""
    both = (t.detach().double().movedim(how.channel, 0).flatten(1) for t in (found, wanted))
    one, due = (t[: len(LEFT)] for t in both)
    assert torch.isfinite(found).all()
    return float(((one - due).abs().amax(1) / due.abs().amax(1)).max())


LITTLE = {torch.bfloat16: 3e-2, torch.float16: 3e-2, torch.float32: 1e-4}


def twin_of(how: Cancelled, plain: nn.Module, state: Any, x: Tensor) -> Tensor:
    """What the plain layer gives in float64 with the dense weight."""
    W = {"0.weight": how.dense(plain[0].weight.detach(), state.sites["0"])}  # type: ignore[index]
    wide = x.double() if x.is_floating_point() else x
    y: Tensor = torch.func.functional_call(copy.deepcopy(plain).double(), W, (wide,))
    return y


def with_little_left(layer: str, dtype: torch.dtype) -> tuple[Cancelled, Any, Any, Tensor, Tensor]:
    """How a layer is, its model, its adapter, an input and the output that is due."""
    how = CANCELLED[layer]
    plain, state = left_of(how, dtype)
    model = li.train_only(li.install(copy.deepcopy(plain), state), "default")
    x = torch.randn(how.shape).to(dtype) if how.shape else torch.arange(WIDE)
    return how, model, state, x, twin_of(how, plain, state, x)


@pytest.mark.parametrize("dtype", LITTLE)
@pytest.mark.parametrize("around", AROUND)
@pytest.mark.parametrize("layer", CANCELLED)
def test_an_output_of_which_the_update_leaves_little_is_the_dense_one(
    layer: str, around: str, dtype: torch.dtype
) -> None:
    """Its norm was rounded to 16 bits: of 2 % nothing was left, and outputs were 1e27 or Inf."""
    how, model, _, x, wanted = with_little_left(layer, dtype)
    assert off_by(how, AROUND[around](model, x), wanted) < LITTLE[dtype]


@pytest.mark.parametrize("dtype", LITTLE)
@pytest.mark.parametrize("layer", CANCELLED)
def test_what_trains_an_output_of_which_little_is_left_is_the_dense_gradient(
    layer: str, dtype: torch.dtype
) -> None:
    how, model, state, x, wanted = with_little_left(layer, dtype)
    site = state.sites["0"]
    plain, W = li.eject(copy.deepcopy(model)), how.rows(model[0].get_parameter("weight").detach())
    A, B, m = (t.double().requires_grad_() for t in (site.A, site.B, site.tensors["m"]))
    rows = W.double() + site.scale * B @ A
    rows = rows * (m / rows.detach().norm(dim=1))[:, None]
    shape = plain[0].weight.movedim(how.axis, 0).shape
    dense = {"0.weight": rows.reshape(shape).movedim(0, how.axis)}
    wide = x.double().requires_grad_() if x.is_floating_point() else x
    due = torch.func.functional_call(plain.double(), dense, (wide,))
    assert error(due, wanted) < 1e-12
    y = model(x.requires_grad_(x.is_floating_point()))
    g = torch.randn(y.shape).to(y.dtype)
    y.backward(g)
    due.backward(g.double())
    leaves = li.adapter_parameters(model)
    pairs = [(leaves[f"0.lora_{role}"], t) for role, t in (("A", A), ("B", B), ("m", m))]
    for one, other in [*pairs, *([(x, wide)] if x.is_floating_point() else [])]:
        assert error(one.grad, other.grad) < LITTLE[dtype]


@pytest.mark.parametrize("dtype", LITTLE)
def test_trials_of_which_the_update_leaves_little_are_the_dense_ones(dtype: torch.dtype) -> None:
    how = CANCELLED["linear"]
    plain, state = left_of(how, dtype)
    config = {"rank": 8, "alpha": 4, "variant": "dora", "targets": ["0"]}
    trials = {
        "one": li.Trial(config, lr=1e-3),
        "two": li.Trial({**config, "dropout": 0.3}, lr=1e-3),
    }
    model, seen = copy.deepcopy(plain), []

    def forward(batch: Tensor) -> Tensor:
        seen.append(model(batch))
        return seen[-1]

    running = li.Trials(model, trials, forward=forward, loss=lambda y, _: y.square().mean())
    for name in trials:
        li.swap_adapter(model, copy.deepcopy(state), name)
    x = torch.randn(how.shape).to(dtype)
    running.step(dict.fromkeys(trials, x))
    (together,) = [y for y in seen if y.requires_grad and len(y) == 2 * len(x)]
    assert off_by(how, together[: len(x)], twin_of(how, plain, state, x)) < LITTLE[dtype]
    assert torch.isfinite(together).all()


@pytest.mark.parametrize("dtype", LITTLE)
def test_what_dropout_has_left_of_an_input_meets_little_of_an_output(dtype: torch.dtype) -> None:
    """The gain multiplies W x' + u by itself, and never the rounding of W x + b."""
    how = CANCELLED["linear"]
    plain, state = left_of(how, dtype)
    nn.init.normal_(plain[0].bias, 0, 4)
    site, x = state.sites["0"], torch.randn(how.shape).to(dtype)
    config = {"rank": 8, "alpha": 4, "variant": "dora", "dropout": 0.5, "targets": ["0"]}
    model = li.inject(copy.deepcopy(plain), config).train()
    with torch.no_grad():
        for role, t in site.tensors.items():
            li.adapter_parameters(model)[f"0.lora_{role}"].copy_(t)
    torch.manual_seed(1)
    kept = nn.functional.dropout(x, 0.5).double()
    torch.manual_seed(1)
    found = model(x)
    W, b = plain[0].weight.detach().double(), plain[0].bias.detach().double()
    wanted = x.double() @ W.T + b + kept @ (how.dense(W, site) - W).T
    assert off_by(how, found, wanted) < LITTLE[dtype]


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dtype", LITTLE)
def test_no_bias_and_no_output_of_zeros_makes_noise_or_inf_of_a_gain(
    dtype: torch.dtype, bias: bool
) -> None:
    how = CANCELLED["linear"]
    plain, state = left_of(how, dtype)
    if bias:
        nn.init.normal_(plain[0].bias, 0, 8)
    else:
        plain[0].register_parameter("bias", None)
    with torch.no_grad():
        plain[0].weight[-1].zero_()  # and nothing is added to it
    state.sites["0"].B[-1].zero_()
    model = li.install(copy.deepcopy(plain), state, base="any")
    x = torch.randn(how.shape).to(dtype)
    W = how.dense(plain[0].weight.detach(), state.sites["0"]).nan_to_num(0)
    wide = copy.deepcopy(plain).double()
    wanted = torch.func.functional_call(wide, {"0.weight": W}, (x.double(),))
    for mode in (torch.no_grad, torch.enable_grad):
        with mode():
            y = model(x)
        b = plain[0].bias.double() if bias else 0
        assert off_by(how, y - b, wanted - b) < LITTLE[dtype] * (8 if bias else 1)  # b is rounded
        assert error(y[:, -1:] + 1, wanted[:, -1:] + 1) < LITTLE[dtype]


def test_what_cannot_carry_a_magnitude_refuses_it(tmp_path: Path) -> None:
    rules = [{"match": "0", "variant": "dora"}, "1"]
    mixed = li.inject(nn.Sequential(nn.Linear(4, 6), nn.Linear(6, 4)), {"targets": rules})
    li.save_adapter(mixed, tmp_path / "a.safetensors", format="native")
    for layout, named in (("portable", "'dora'"), ("loralib", "'dora'"), ("peft", "variant")):
        with refused(li.FormatError, named):
            li.save_adapter(mixed, tmp_path / "b", format=layout)


class Gate(li.extending.Variant):
    """Outputs have a gate that starts at 1; its role ends as that of a frozen start does."""

    name = "gate"
    roles: ClassVar[Any] = {"g0": lambda a, b: b[:-1]}
    gained = True

    def start(self, factors: Mapping[str, Tensor], norms: Any) -> Mapping[str, Tensor]:
        return {"g0": torch.ones_like(factors["B"][..., 0])}

    def gain(self, tensors: Mapping[str, Tensor], norms: Tensor) -> Tensor:
        return tensors["g0"]


def use_and_save_a_gate(folder: Path) -> None:
    li.extending.register_variant(Gate)
    net = nn.Sequential(nn.Linear(4, 6))
    model = li.inject(copy.deepcopy(net), {"rank": 1, "variant": "gate", "targets": ["0"]})
    fill(model)
    site, x = li.adapter_state(model).sites["0"], torch.randn(3, 4)
    delta = site.scale * site.B @ site.A
    weight = site.further["g0"][:, None] * (net[0].weight + delta)
    wanted = nn.functional.linear(x, weight, net[0].bias)
    assert error(model(x), wanted) <= 1e-6
    path = li.save_adapter(model, folder / "a.safetensors", format="native")
    assert same_bits(li.load_adapter(copy.deepcopy(net), path)(x), model(x))
    with refused(li.FormatError, "'gate'"):
        li.save_adapter(model, folder / "a")
    li.merge(model)
    assert error(model(x), wanted) <= 1e-6


def differentiate_gates() -> None:
    """Gates are all that no norm is in, so finite differences know each of their derivatives."""
    li.extending.register_variant(Gate)
    for bias, dropout, rule in itertools.product([True, False], [0.0, 0.4], [{}, SLICES]):
        model = nn.Sequential(nn.Linear(3, 6, bias=bias).double())
        config = {"rank": 2, "alpha": 1.4, "variant": "gate", "dropout": dropout}
        fill(li.inject(model, {**config, "targets": [{"match": "0", **rule}]}))
        named = dict(model.named_parameters())
        with torch.no_grad():
            named["0.lora_g0__default"][1] = 0
        leaves = [torch.randn(7, 3, dtype=torch.float64, requires_grad=True)]
        leaves += [p.detach().clone().requires_grad_() for p in named.values()]

        def run(x: Tensor, *tensors: Tensor) -> Tensor:
            torch.manual_seed(4)
            given = dict(zip(named, tensors, strict=True))  # noqa: B023 - called in the loop
            return torch.func.functional_call(model, given, (x,))  # noqa: B023

        assert torch.autograd.gradcheck(run, leaves)
        assert torch.autograd.gradgradcheck(run, leaves)
        both = [
            torch.autograd.grad(run(*leaves).cos().sum(), leaves, create_graph=graph)
            for graph in (False, True)
        ]
        assert all(error(one, other) < 1e-12 for one, other in zip(*both, strict=True))
        model.eval()  # without dropout
        assert error(model(leaves[0]), torch.no_grad()(model)(leaves[0])) < 1e-12


SLICES = {"slices": {"q": 2, "k": 1, "v": 3}, "adapt": ["q", "v"]}


def test_both_derivatives_of_a_layer_with_gains_by_finite_differences(forks: Forks) -> None:
    forks.start(differentiate_gates).result()


def test_a_variant_from_outside_the_package(tmp_path: Path, forks: Forks) -> None:
    """Which only the other process has registered."""
    forks.start(use_and_save_a_gate, tmp_path).result()
    with refused(li.FormatError, "'gate'"):
        li.read_adapter(tmp_path / "a.safetensors")
    taken = {"name": "taken", "roles": {"A0": lambda a, b: b[:-1]}}  # a role that every site has
    with refused(li.LayerError, "'A0'"):
        li.extending.register_variant(type("Taken", (li.extending.Variant,), taken))


def test_a_bias_of_b_is_refused_where_it_has_no_place() -> None:
    def with_bias(**config: Any) -> li.AdapterState:
        net = li.inject(nn.Sequential(nn.Linear(4, 6)), {"rank": 1, "targets": ["0"], **config})
        return with_biases_of_b(li.adapter_state(net))

    bare, net = nn.Sequential(nn.Linear(4, 6, bias=False)), nn.Sequential(nn.Linear(4, 6))
    with refused(li.LayerError, "'0.bias'", "lora_bias", model=bare):
        li.install(bare, with_bias(), base="any")
    with refused(li.LayerError, "'bias'", model=net):
        li.install(net, with_bias(bias="adapted"), base="any")
    parts = {"match": "0", "slices": {"q": 2, "k": 4}, "adapt": ["k"]}
    with refused(li.LayerError, "'0'", "lora_bias", "slices", model=net):
        li.install(net, with_bias(targets=[parts]), base="any")


@pytest.mark.parametrize("layout", ["native", "peft"])
def test_a_bias_of_b_does_not_train(layout: str, tmp_path: Path, caplog: Any) -> None:
    """A file that has it is loaded and merged; who trains it is told, who asks for one as well."""
    plain = TiedDecoder().double()
    model = give_biases_of_b(fill(li.inject(copy.deepcopy(plain), {"rank": 1, "targets": ["fc"]})))
    path, due = tmp_path / ("a.safetensors" if layout == "native" else "a"), model(IDS)
    li.save_adapter(model, path, format=layout)
    caplog.clear()
    back = li.load_adapter(copy.deepcopy(plain), path, trainable=True)
    (told,) = caplog.messages
    assert "do not train" in told
    assert "'fc'" in told
    assert [*li.adapter_parameters(back)] == ["fc.lora_A", "fc.lora_B"]
    assert {name for name, p in back.named_parameters() if p.requires_grad} == {
        "fc.lora_A__default",
        "fc.lora_B__default",
    }
    assert same_bits(back(IDS), due)
    li.merge(back)
    assert error(back(IDS), due) <= 1e-12
    for config in ({"lora_bias": True}, {"targets": [{"match": "fc", "lora_bias": True}]}):
        with refused(li.ConfigError, "lora_bias", "does not train", "bias: adapted", model=plain):
            li.inject(plain, {"targets": ["fc"], **config})


TOKENS = {"rank": 1, "targets": ["fc"], "tokens": {"embed": [7, 2]}}
IDS = torch.tensor([[1, 2, 7, 2]])


def test_rows_that_train_are_read_in_place_of_the_bases_under_all_names() -> None:
    plain = TiedDecoder().double()
    model = li.inject(copy.deepcopy(plain), {**TOKENS, "expect": {"trainable": 2 * 4 + 8}})
    assert same_bits(model(IDS), plain(IDS))
    fill(model)
    state = li.adapter_state(model)
    assert state.rows == {"embed.weight": (7, 2), "head.weight": (7, 2)}
    rows = li.adapter_parameters(model)["embed.weight"]
    assert rows.shape == (2, 4)
    delta = state.sites["fc"].scale * state.sites["fc"].B @ state.sites["fc"].A
    table = plain.embed.weight.detach().index_copy(0, torch.tensor([7, 2]), rows)
    dense = {"embed.weight": table, "fc.weight": plain.fc.weight + delta}
    wanted = torch.func.functional_call(plain, dense, (IDS,))
    assert error(model(IDS), wanted) <= 1e-12
    grads = [torch.autograd.grad(y.square().sum(), rows)[0] for y in (model(IDS), wanted)]
    assert error(*grads) <= 1e-11
    li.merge(model)
    assert model.head.weight is model.embed.weight, "the tie stays"
    assert same_bits(model.embed.weight, table.detach())


def test_rows_of_two_adapters_are_mixed_as_copies_are() -> None:
    model = fill(li.inject(TiedDecoder(), {"tokens": {"embed": [7, 2]}}, "a"), "a")
    fill(li.inject(model, {"tokens": {"embed": [2, 3]}}, "b"), "b")
    W = model.embed.get_parameter("weight").detach().clone()
    wanted = W.clone()
    for name, weight, ids in (("a", 0.5, [7, 2]), ("b", 2.0, [2, 3])):
        rows = li.adapter_state(model, name).trained["embed.weight"]
        wanted[ids] += weight * (rows - W[ids])
    li.activate(model, {"a": 0.5, "b": 2.0})
    assert error(model.embed(IDS), wanted[IDS]) <= 1e-6
    li.merge(model)
    assert error(model.embed(IDS), wanted[IDS]) <= 1e-6


def test_peft_reads_rows_under_every_name_of_a_table(tmp_path: Path) -> None:
    """PEFT knows ties by the config of transformers only."""
    model = fill(li.inject(TiedDecoder(), TOKENS))
    li.save_adapter(model, tmp_path / "a")
    plain = li.eject(copy.deepcopy(model))
    theirs = peft.PeftModel.from_pretrained(plain, tmp_path / "a").eval()
    assert error(theirs(IDS), model(IDS)) <= 1e-5
    model = nn.ModuleDict({"embed": nn.Embedding(9, 4), "pos_embed": nn.Embedding(9, 4)})
    li.inject(model, {"tokens": {"^embed": [7]}})
    with refused(li.FormatError, "'pos_embed'"):
        li.save_adapter(model, tmp_path / "d")


def test_tokens_are_refused_where_they_cannot_train() -> None:
    for config, names in (
        ({"tokens": {"embed": [9]}}, ("'embed.weight'", "row 9", "9 rows")),
        ({"tokens": {"nowhere": [1]}}, ("nowhere",)),
        ({"tokens": {"fc": [1]}}, ("'fc'", "linear", "train:")),
        ({"tokens": {r"fc\.weight": [1]}}, ("'fc.weight'", "linear", "train:")),
        ({"tokens": {"embed|fc": [1]}}, ("'fc'", "linear", "train:")),
        ({"tokens": {"embed": [1]}, "targets": ["embed"]}, ("embed",)),
        ({"tokens": {"embed": [1]}, "train": ["embed"]}, ("embed", "train 1")),
    ):
        model = TiedDecoder()
        with refused(li.MatchError, *names, model=model):
            li.inject(model, config)
    whole = li.plan(TiedDecoder(), {"tokens": {"^$": [1]}})
    assert [entry.name for entry in whole.trained] == ["embed.weight"]
    with refused(li.ConfigError, "tokens.embed"):
        li.Config(tokens={"embed": [1, 1]})


MORE: dict[str, dict[str, Any]] = {
    "variant": {"variant": "dora", "targets": ["fc", "embed"]},
    "lora_bias": {"targets": ["fc"]},
    "rows": TOKENS,
}


@pytest.mark.parametrize("layout", ["native", "peft"])
@pytest.mark.parametrize("more", MORE)
def test_files_swaps_and_merges_on_disk_know_what_an_adapter_has_besides_a_and_b(
    more: str, layout: str, tmp_path: Path
) -> None:
    plain, config = TiedDecoder(), {"rank": 2, "alpha": 3, **MORE[more]}
    if more == "variant":
        plain.head.weight = nn.Parameter(plain.head.weight.clone())
    model, other = (fill(li.inject(copy.deepcopy(plain), config)) for _ in range(2))
    if more == "lora_bias":
        model, other = give_biases_of_b(model), give_biases_of_b(other)
    wanted, state = model(IDS), li.adapter_state(model)
    path = tmp_path / ("a.safetensors" if layout == "native" else "a")
    li.save_adapter(model, path, format=layout)
    again = li.load_adapter(copy.deepcopy(plain), path)
    assert same_bits(again(IDS), wanted)
    assert li.adapter_state(again).rows == state.rows
    for name, site in li.adapter_state(again).sites.items():
        assert site.tensors.keys() == state.sites[name].tensors.keys()
    if more != "rows":
        lora = li.inject(copy.deepcopy(plain), {**config, "variant": "lora"})
        with refused(li.FormatError, more, model=lora):
            li.swap_adapter(lora, path)
    if (more, layout) == ("rows", "peft"):
        return  # whose files say nothing of the rest of the table
    assert same_bits(li.swap_adapter(other, path)(IDS), wanted)
    base = save_checkpoint(tmp_path / "base", {k: t.clone() for k, t in plain.state_dict().items()})
    li.merge_checkpoint(base, [path], tmp_path / "merged")
    merged = load_file(tmp_path / "merged" / "model.safetensors")
    li.merge(model)
    for key in ("embed.weight", "fc.weight", "fc.bias", "head.weight"):
        assert error(merged[key], model.get_parameter(key)) <= 1e-6


@pytest.mark.parametrize("layout", ["native", "peft"])
def test_rows_that_a_smaller_table_lacks_are_refused(layout: str, tmp_path: Path) -> None:
    path = tmp_path / ("a.safetensors" if layout == "native" else "a")
    li.save_adapter(fill(li.inject(TiedDecoder(), TOKENS)), path, format=layout)
    small = TiedDecoder()
    small.embed = nn.Embedding(5, 4)
    with refused(li.FormatError, "'embed.weight'", "resize_token_embeddings", model=small):
        li.load_adapter(small, path)
