"""A live model's adapter to files and back: exact, whole, of the right base, or an error."""

import copy
import math
import pickle
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import TOLERANCE, error, fill, same_bits
from helpers.models import IDS, Net
from helpers.refusals import refused
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import lora_inject as li
from contract.kinds import KINDS, Host, injected

CONFIG = {"rank": 2, "alpha": 3}
FORMATS = {"peft": "adapter", "native": "adapter.safetensors"}
every_format = pytest.mark.parametrize("layout", FORMATS)


def save(model: nn.Module, folder: Path, layout: str, name: str = "default") -> Path:
    return li.save_adapter(model, folder / FORMATS[layout], name, format=layout)


def tensors_of(path: Path) -> dict[str, Tensor]:
    return load_file(path / "adapter_model.safetensors" if path.is_dir() else path)


# -------------------------------------------------------------------------------------- round trips


RICH = {
    "targets": [{"match": "embed", "rank": 1, "scaling": "rslora", "alpha": 7}, "fc"],
    "train": ["head"],
    "bias": "all",
    **CONFIG,
}


@every_format
def test_everything_that_an_adapter_is_comes_back(layout: str, tmp_path: Path) -> None:
    plain = Net()
    model = fill(li.inject(copy.deepcopy(plain), RICH, "sql"), "sql")
    path = save(model, tmp_path, layout, "sql")
    loaded = li.load_adapter(copy.deepcopy(plain), path, "other.name")
    assert same_bits(loaded(IDS), model(IDS))
    one, two = li.adapter_state(model, "sql"), li.adapter_state(loaded, "other.name")
    assert {n: s.scale for n, s in one.sites.items()} == {n: s.scale for n, s in two.sites.items()}
    assert two.config == one.config == li.Config.from_dict(RICH).to_dict()
    first, again = tensors_of(path), tensors_of(save(loaded, tmp_path / "2", layout, "other.name"))
    assert first.keys() == again.keys()
    assert all(same_bits(t, again[k]) for k, t in first.items())


def test_scales_come_back_beside_an_older_adapter_of_other_scales(tmp_path: Path) -> None:
    rules = [
        {"match": "before", "rank": 1, "alpha": 5},
        {"match": "layer", "rank": 2, "alpha": 0.5, "scaling": "rslora"},
    ]
    plain = Host(nn.Linear(5, 6))
    model = fill(li.inject(copy.deepcopy(plain), {"alpha": 99, "targets": rules}))
    li.save_adapter(model, tmp_path / "a")
    older = {"rank": 1, "alpha": 7, "targets": ["layer", "before"]}
    other = li.inject(copy.deepcopy(plain), older, "older")
    li.activate(li.load_adapter(other, tmp_path / "a", "newer"), "newer")
    x, x2 = torch.randn(3, 5), torch.randn(3, 2)
    assert same_bits(other(x), model(x))
    assert same_bits(other.before(x2), model.before(x2))
    sites = li.adapter_state(other, "newer").sites
    assert (sites["before"].scale, sites["layer"].scale) == (5.0, 0.5 / math.sqrt(2))
    assert li.adapter_state(other, "older").sites["layer"].scale == 7.0


def test_dropout_acts_in_training_alone_also_after_a_load(tmp_path: Path) -> None:
    config = {**CONFIG, "dropout": 0.5, "targets": ["layer"]}
    model = fill(li.inject(Host(nn.Linear(5, 6)).eval(), config))
    x = torch.randn(50, 5)
    li.save_adapter(model, tmp_path / "a")
    loaded = li.load_adapter(li.eject(copy.deepcopy(model)), tmp_path / "a")
    assert same_bits(loaded(x), model(x)), "dropout is active in an eval model"
    assert not same_bits(loaded.train()(x), loaded(x))


def test_an_adapter_that_is_loaded_to_train_is_the_only_active_and_trainable_one(
    tmp_path: Path,
) -> None:
    plain, config = nn.Sequential(nn.Linear(4, 4)), {"rank": 2, "targets": ["0"]}
    li.save_adapter(li.inject(copy.deepcopy(plain), config), tmp_path / "a")
    model = li.inject(plain, config, "other")
    li.load_adapter(model, tmp_path / "a", "more", trainable=True)
    training = {name for name, p in model.named_parameters() if p.requires_grad}
    assert training == {"0.lora_A__more", "0.lora_B__more"}
    weights = {name: info.weight for name, info in li.adapters(model).items()}
    assert weights == {"other": None, "more": 1.0}


def test_saving_an_adapter_that_adds_nothing_says_so(tmp_path: Path, caplog: Any) -> None:
    model = li.inject(nn.Sequential(nn.Linear(4, 4)), {"rank": 2, "targets": ["0"]})
    li.save_adapter(fill(copy.deepcopy(model)), tmp_path / "trained")
    assert caplog.text == ""
    li.save_adapter(model, tmp_path / "fresh")
    assert "its update is 0 at each of its sites (1)" in caplog.text


class Wrapper(nn.Module):
    """Calls what is inside as PEFT's layers do."""

    def __init__(self, inside: nn.Module) -> None:
        super().__init__()
        self.base_layer = inside

    def forward(self, x: Tensor) -> Tensor:
        return self.base_layer(x)


@pytest.mark.parametrize("inside", [nn.Linear(4, 6), nn.Sequential(nn.Linear(4, 6))])
@pytest.mark.parametrize("layout", ["peft", "portable"])
def test_a_module_called_base_layer_is_written_as_it_can_be_read(
    layout: str, inside: nn.Module, tmp_path: Path
) -> None:
    plain = nn.Sequential(Wrapper(copy.deepcopy(inside)))
    model = fill(li.inject(copy.deepcopy(plain), {"rank": 2, "targets": ["all-linear"]}))
    path = li.save_adapter(model, tmp_path / "a", format=layout)
    x = torch.randn(3, 4)
    torch.testing.assert_close(li.load_adapter(plain, path)(x), model(x))


class Table(nn.Embedding):
    def __init__(self) -> None:
        super().__init__(8, 4)
        self.token_adapter = nn.Linear(4, 4)  # as PEFT calls what trains rows


def test_rows_lie_where_peft_puts_them_beside_an_adapted_module_of_that_name(
    tmp_path: Path,
) -> None:
    model = nn.Sequential(Table())
    li.inject(model, {"rank": 1, "targets": ["token_adapter"], "tokens": {"0.weight": [1, 5]}})
    li.save_adapter(model, tmp_path / "a")
    keys = {key.removeprefix("base_model.model.") for key in tensors_of(tmp_path / "a")}
    assert keys == {
        "0.token_adapter.trainable_tokens_delta",
        "0.token_adapter.lora_A.weight",
        "0.token_adapter.lora_B.weight",
    }


def test_save_refuses_unknown_names_and_formats_and_to_overwrite(tmp_path: Path) -> None:
    model, x = injected(KINDS["linear"]), torch.randn(2, 5)
    with refused(li.StateError, "adapter_state", "'x'"):
        li.save_adapter(model, tmp_path / "a", "x")
    with refused(li.FormatError, "peff", "peft"):
        li.save_adapter(model, tmp_path / "a", format="peff")
    assert not any(tmp_path.iterdir())
    path = save(model, tmp_path, "peft")
    before = {p.name: p.read_bytes() for p in path.iterdir()}
    fill(model)
    with refused(li.FormatError, "overwrite"):
        save(model, tmp_path, "peft")
    assert {p.name: p.read_bytes() for p in path.iterdir()} == before
    li.save_adapter(model, path, overwrite=True)
    wanted = model(x)
    assert same_bits(li.load_adapter(li.eject(model), path)(x), wanted)


# ------------------------------------------------------------------------ checked before any change


def not_loaded(
    model: nn.Module,
    path: Path,
    *names: str,
    error: type[li.LoraInjectError] = li.FormatError,
    **options: Any,
) -> None:
    listed = li.summary(model)
    with refused(error, *names, model=model):
        li.load_adapter(model, path, **options)
    assert li.summary(model) == listed


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    return save(fill(li.inject(Net(), RICH)), tmp_path, "peft")


def base() -> Net:
    torch.manual_seed(0)
    return Net()


def test_a_name_in_use_a_merged_model_and_a_missing_file_are_refused(saved: Path) -> None:
    model = li.load_adapter(base(), saved)
    not_loaded(model, saved, "'default'", error=li.StateError)
    li.merge(model)
    not_loaded(model, saved, "unmerge(model)", error=li.StateError, name="other")
    with refused(li.StateError, "unmerge(model)"):
        li.save_adapter(model, saved.with_name("merged"))  # the fingerprint would be of the merged
    not_loaded(base(), saved / "nothing", "nothing")


@pytest.mark.parametrize("key", ["embed", "fc"])
@pytest.mark.parametrize("how", ["scaled", "fine-tuned"])
def test_another_base_is_refused_unless_told(saved: Path, key: str, how: str) -> None:
    model = base()
    with torch.no_grad():
        W = model.get_submodule(key).weight
        W.add_(0.02 * W if how == "scaled" else 0.01 * torch.randn_like(W))
    not_loaded(model, saved, f"'{key}.weight'", 'base="any"')
    assert li.load_adapter(model, saved, base="any") is model


def _put(**modules: nn.Module) -> Callable[[Any], object]:
    return lambda model: [setattr(model, name, module) for name, module in modules.items()]


# What is done to the model, what is said of its base, the class of the refusal and what it names.
CHANGES: dict[str, tuple[Callable[[Any], object], str, type[li.LoraInjectError], tuple[str, ...]]]
CHANGES = {
    "without the module": (lambda m: delattr(m, "fc"), "any", li.FormatError, ("'fc'",)),
    "other sizes": (_put(fc=nn.Linear(4, 6)), "any", li.FormatError, ("'fc'", "5", "4 to 6")),
    "another name": (
        lambda m: m.add_module("fc1", m._modules.pop("fc")), "any", li.FormatError, ("'fc1'",),
    ),
    "another head": (_put(head=nn.Linear(6, 4)), "same", li.FormatError, ("head.", "(4")),
    "without the head": (
        lambda m: delattr(m, "head"), "same", li.FormatError, ("head.", "leave_out"),
    ),
    "another kind": (_put(fc=nn.LSTM(5, 6)), "any", li.FormatError, ("'fc'",)),
}  # fmt: skip


# What a value says of its tensors that is not so.
LIES: dict[str, Callable[[li.AdapterState], dict[str, Any]]] = {
    "another rank": lambda s: {"spec": replace(s.sites["0"].spec, rank=3)},
    "another width": lambda s: {"A": torch.ones(2, 5)},
    "B is cut": lambda s: {"B": s.sites["0"].B[:, :1]},
    "whole numbers": lambda s: {"A": s.sites["0"].A.long()},
    "a start of A alone": lambda s: {"A0": s.sites["0"].A},
    "another name": lambda s: {"sites": {"2": s.sites["0"]}},
    "a row twice": lambda s: {"rows": {"1.weight": (2, 2)}},
    "a row from the end": lambda s: {"rows": {"1.weight": (-1, 2)}},
}


@pytest.mark.parametrize("lie", LIES)
def test_a_value_whose_tensors_are_not_what_it_says_is_refused(lie: str, tmp_path: Path) -> None:
    net = nn.Sequential(nn.Linear(4, 6), nn.Embedding(5, 4))
    plain = copy.deepcopy(net)
    state = li.adapter_state(li.inject(net, {"rank": 2, "targets": ["0"], "tokens": {"1": [1, 2]}}))
    said = LIES[lie](state)
    if not {"rows", "sites"} & said.keys():
        said = {"sites": {"0": replace(state.sites["0"], **said)}}
    false, path = replace(state, **said), tmp_path / "model.safetensors"
    named = "'1.weight'" if "rows" in said else "'0'"
    save_file(plain.state_dict(), path)
    for model, call in (
        (plain, lambda: li.install(plain, false)),
        (net, lambda: li.swap_adapter(net, false)),
        (None, lambda: li.combine([false], [0.5])),
        (None, lambda: li.truncate(false, rank=1)),
        (None, lambda: li.write_adapter(false, tmp_path / "a", "peft")),
        (None, lambda: li.write_adapter(false, tmp_path / "a", "native")),
        (None, lambda: li.merge_checkpoint(path, [false], tmp_path / "merged")),
    ):
        with refused(li.LoraInjectError, named, model=model):
            call()
    assert [*tmp_path.iterdir()] == [path]


# As many features as the layer of the adapter, and the layer is another.
LOOK_ALIKES: dict[str, tuple[Callable[[], nn.Module], Callable[[], nn.Module]]] = {
    "a turned kernel": (lambda: nn.Conv2d(4, 6, (1, 3)), lambda: nn.Conv2d(4, 6, (3, 1))),
    "no kernel": (lambda: nn.Conv2d(4, 6, (1, 3)), lambda: nn.Linear(12, 6)),
    "other groups": (lambda: nn.Conv1d(4, 6, 2, groups=2), lambda: nn.Conv1d(4, 6, 1)),
    "no embedding": (lambda: nn.Embedding(12, 6), lambda: nn.Linear(12, 6)),
}


@pytest.mark.parametrize("case", LOOK_ALIKES)
def test_as_many_features_do_not_make_a_layer_the_same(case: str, tmp_path: Path) -> None:
    """Files of other programs have no fingerprint that would tell."""
    made, other = LOOK_ALIKES[case]
    models = [nn.Sequential(layer()) for layer in (made, other)]
    state, of_other = (
        replace(li.adapter_state(li.inject(model, {"rank": 2, "targets": ["0"]})), fingerprint=None)
        for model in models
    )
    model = nn.Sequential(other())
    with refused(li.FormatError, "'0'", "shape", model=model):
        li.install(model, state)
    if "embedding" not in case:  # of a matrix in a file nobody knows
        save_file(dict(model.state_dict()), tmp_path / "model.safetensors")
        with refused(li.CheckpointError, "'0.weight'", "shape"):
            li.merge_checkpoint(tmp_path / "model.safetensors", [state], tmp_path / "out")
        with refused(li.StateError, "'0'"):
            li.combine([state, of_other])


def test_a_kernel_of_one_fits_a_linear_layer() -> None:
    point = nn.Sequential(nn.Conv2d(4, 6, 1))
    state = li.adapter_state(li.inject(point, {"rank": 2, "targets": ["0"]}))
    li.install(nn.Sequential(nn.Linear(4, 6)), state, base="any")


@pytest.mark.parametrize("change", CHANGES)
def test_a_model_that_does_not_fit_is_refused(change: str, saved: Path) -> None:
    model = base()
    act, how, error, names = CHANGES[change]
    act(model)
    not_loaded(model, saved, *names, error=error, base=how)


def test_what_is_let_through_is_named(saved: Path) -> None:
    model = base()
    model.head = nn.Linear(6, 4)
    li.load_adapter(model, saved, leave_out=["head.*"])
    assert set(li.adapters(model)["default"].trained) == {"fc.bias", "norm.bias"}
    not_loaded(base(), saved, "'head.wieght'", "'head.weight", leave_out=["head.wieght"])


# ---------------------------------------------------------------------------------- shared layers


class Twice(nn.Module):
    """A layer in two places, or two layers with one value; a block in two places."""

    def __init__(self, shared: bool = True) -> None:
        super().__init__()
        torch.manual_seed(0)
        again = (lambda layer: layer) if shared else copy.deepcopy
        self.a = nn.Linear(5, 5)
        self.b = again(self.a)
        self.blocks = nn.ModuleList([nn.Sequential(nn.Linear(5, 5), nn.Tanh())])
        self.blocks.append(again(self.blocks[0]))

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return self.b(self.a(x).tanh())


@pytest.mark.parametrize(("targets", "layout"), [
    (["a", r"blocks\.0\.0"], "native"), ([r"b\.weight"], "native"), ([r"blocks\.1\.0"], "peft"),
], ids=str)  # fmt: skip
def test_an_adapter_of_a_shared_layer_goes_to_each_of_its_names(targets, layout, tmp_path) -> None:
    """On disk too: where the file holds them all, or one, as safetensors leaves them."""
    model, x = fill(li.inject(Twice(), {**CONFIG, "targets": targets})), torch.randn(2, 5)
    path = save(model, tmp_path, layout)
    for shared in (True, False):
        assert same_bits(li.load_adapter(Twice(shared), path)(x), model(x))
    for names in (("a", "b", "blocks"), ("a", "blocks.0")):
        tensors = {k: t.clone() for k, t in Twice().state_dict().items() if k.startswith(names)}
        (tmp_path / "base").mkdir(exist_ok=True)
        save_file(tensors, tmp_path / "base" / "model.safetensors")
        li.merge_checkpoint(tmp_path / "base", [path], out := tmp_path / str(len(names)))
        merged = Twice()
        merged.load_state_dict(load_file(out / "model.safetensors"), strict=False)
        assert error(merged(x), model(x)) < TOLERANCE[torch.float32]


COMPUTED: dict[str, Any] = {
    "renamed": lambda a: li.algebra.rename(li.algebra.rename(a, lambda n: f"x.{n}"), {"x": ""}),
    "truncated": lambda a: li.truncate(a, rank=2).state,
    "added": lambda a: li.combine([a, a]),
    "split and joined": lambda a: li.algebra.join(
        li.algebra.split(a, r"blocks\.0\.0"), "0", {"q": 2, "k": 3}
    ),
}


@pytest.mark.parametrize("how", COMPUTED)
def test_what_is_computed_of_a_shared_layers_adapter_goes_to_each_of_its_names(how: str) -> None:
    rule = {"match": r"blocks\.0\.0", "slices": {"q": 2, "k": 3}, "adapt": ["q", "k"]}
    model, x = fill(li.inject(Twice(), {**CONFIG, "targets": [rule]})), torch.randn(2, 5)
    made = COMPUTED[how](li.adapter_state(model))
    one, several = (li.install(Twice(shared), made)(x) for shared in (True, False))
    assert error(one, several) < TOLERANCE[torch.float32] < error(one, Twice()(x))


@pytest.mark.filterwarnings("ignore:Found missing adapter keys")  # as of files of its own
def test_peft_adapts_a_layer_in_the_first_of_its_places_only(tmp_path: Path) -> None:
    """So neither our file nor theirs means the same to both; of a shared block both do."""
    from peft import LoraConfig, PeftModel, get_peft_model

    model, x = fill(li.inject(Twice(), {**CONFIG, "targets": ["a"]})), torch.randn(2, 5)
    with refused(li.FormatError, "'a'", "native"):
        save(model, tmp_path, "peft")
    config = LoraConfig(r=2, target_modules=["a"], init_lora_weights=False)  # B is not zero
    theirs = get_peft_model(Twice(), config)
    theirs.save_pretrained(tmp_path / "theirs")
    not_loaded(Twice(), tmp_path / "theirs", "'a'", "deepcopy")
    li.load_adapter(Twice(shared=False), tmp_path / "theirs")
    block = fill(li.inject(Twice(), {**CONFIG, "targets": [r"blocks\.0\.0"]}))
    read = PeftModel.from_pretrained(Twice(), save(block, tmp_path, "peft"))
    assert error(read(x), block(x)) < TOLERANCE[torch.float32]


# ------------------------------------- buffers of the base, which no file of an adapter holds


class Centers(nn.Module):
    """Subtracts an average that may move."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.gain, self.how, self.n = nn.Parameter(torch.ones(4)), how, 0
        self.register_buffer("mean", torch.full((4,), torch.nan) if how == "nan" else torch.ones(4))
        self.register_buffer("last", torch.zeros(4), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        self.last = x.detach().mean(0)
        self.n += self.training
        later = self.how == "from the third forward on" and self.n > 2
        if self.training and (self.how == "in place" or later):
            self.mean.mul_(0.9).add_(self.last, alpha=0.1)
        if self.training and self.how == "data":  # leaves the version counter alone
            self.mean.data.mul_(0.9)
        if self.training and self.how == "another":
            self.mean = 0.9 * self.mean
        return (x - self.mean) * self.gain


NORMS: dict[str, Callable[[], nn.Module]] = {
    "BatchNorm": lambda: nn.BatchNorm1d(4),
    "an average of its own": lambda: Centers("in place"),
    "data": lambda: Centers("data"),
    "another tensor each time": lambda: Centers("another"),
}
STILL: dict[str, Callable[[Any], Any]] = {
    "eval": lambda norm: norm.eval(),
    "momentum 0": lambda norm: setattr(norm, "momentum", 0.0),
    "no statistics": lambda norm: norm.__init__(4, track_running_stats=False),
}


def with_norm(norm: nn.Module) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), norm, nn.Linear(4, 2))


def trained(model: nn.Module, steps: int = 5) -> nn.Module:
    """A model of which some steps have trained what trains, on data that no norm has seen."""
    x = 3 + torch.randn(8, 3)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.01)
    for _ in range(steps):
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()
    return model


def of_buffers(model: nn.Module) -> dict[str, Tensor]:
    """The buffers that a state dict holds."""
    held = model.named_buffers()
    return {name: buffer.detach().clone() for name, buffer in held if name != "1.last"}


@pytest.mark.parametrize("norm", NORMS)
def test_buffers_of_the_frozen_base_that_moved_are_told_by_a_save_and_put_back_by_eject(
    norm: str, tmp_path: Path
) -> None:
    """Else the loss of the process would be another after a load onto the same base."""
    model = with_norm(NORMS[norm]())
    before, named = of_buffers(model), "'1.running_mean'" if norm == "BatchNorm" else "'1.mean'"
    objects = dict(model.named_buffers())
    trained(li.inject(model, {"rank": 1, "targets": ["0"]}))
    for layout in FORMATS:
        with refused(li.StateError, named, "eval()", "momentum=0", model=model):
            save(model, tmp_path, layout)
    with refused(li.StateError, named, model=model):
        li.merged_weights(model)
    full = copy.deepcopy(model.state_dict())  # of a run that is to go on
    li.inject(model, {"rank": 1, "targets": ["0"]}, "second")
    for some in (model, copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        with refused(li.StateError, named):
            li.save_adapter(some, tmp_path / "second", "second")
        li.eject(li.eject(some, "second"))
        after = of_buffers(some)
        assert all(same_bits(after[name], t) for name, t in before.items())
    assert all(model.get_buffer(name) is t for name, t in objects.items() if name != "1.last")
    resumed = li.inject(with_norm(NORMS[norm]()), {"rank": 1, "targets": ["0"]})
    resumed.load_state_dict(full)
    with refused(li.StateError, named):
        li.save_adapter(resumed, tmp_path / "resumed")


@pytest.mark.parametrize("still", STILL)
def test_a_norm_that_keeps_still_trains_and_is_the_same_after_a_load(still, tmp_path) -> None:
    model, x = with_norm(nn.BatchNorm1d(4)), torch.randn(8, 3)
    plain = copy.deepcopy(model)
    for each in (plain, model):
        STILL[still](each[1])
    in_full = [] if still == "momentum 0" else ["1"]  # it counts, which a copy does not
    li.inject(model, {"rank": 1, "targets": ["0"], "train": in_full})
    trained(model)
    loaded = li.load_adapter(plain, save(model, tmp_path, "peft"))
    assert same_bits(loaded.eval()(x), model.eval()(x))


def test_another_base_that_is_loaded_is_no_move_and_a_frozen_adapter_holds_no_buffer(
    tmp_path: Path,
) -> None:
    base, config = trained(with_norm(nn.BatchNorm1d(4))), {"rank": 1, "targets": ["0"]}
    model = li.inject(with_norm(nn.BatchNorm1d(4)), config)
    model.load_state_dict(base.state_dict())
    trained(model[0])
    path = save(model, tmp_path, "peft")
    save(model.bfloat16().float(), tmp_path, "native")
    model = copy.deepcopy(base)
    model[2].requires_grad_(False)
    li.load_adapter(model, path)
    moved = of_buffers(trained(model))
    assert any(not same_bits(t, moved[name]) for name, t in base.named_buffers())
    li.save_adapter(model, tmp_path / "again")
    assert all(same_bits(t, moved[name]) for name, t in li.eject(model).named_buffers())


# After how many forwards it moves; None: never.
MOVES = {"in place": 0, "from the third forward on": 2, "data": 0, "another": 0}
MOVES |= {"still": None, "nan": None}


@pytest.mark.parametrize("how", MOVES)
def test_a_module_in_train_that_moves_its_buffers_is_refused_and_they_are_put_back(how) -> None:
    model, x = nn.Sequential(nn.Linear(3, 4), Centers(how)), torch.randn(5, 3)
    li.inject(model, {"rank": 1, "targets": ["0"], "train": ["1"]})
    mean = model[1].mean
    before = mean.clone()
    for _ in range(2 if MOVES[how] is None else MOVES[how]):
        model(x)
    if MOVES[how] is None:
        return
    for _ in range(2):
        with refused(li.LayerError, "'mean'"):
            model(x)
        assert model[1].mean is mean
        assert same_bits(mean, before)
    model.eval()
    model(x)


def test_what_moves_a_buffer_unseen_after_the_first_forward_is_told_by_a_save(tmp_path) -> None:
    model, x = nn.Sequential(nn.Linear(3, 4), Centers("still")), torch.randn(5, 3)
    li.inject(model, {"rank": 1, "targets": ["0"], "train": ["1"]})
    model(x)
    model[1].how = "data"
    model(x)
    with refused(li.StateError, "'1.mean'", model=model):
        li.save_adapter(model, tmp_path / "adapter")
