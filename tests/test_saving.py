"""A live model's adapter to files and back: exact, whole, of the right base, or an error.

The formats are tested in test_formats_*.py; here it is the model that must come out right.
"""

import copy
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import (
    KINDS,
    TOLERANCE,
    Host,
    Kind,
    error,
    fill,
    host,
    injected,
    refusal,
    same_bits,
    snapshot,
)
from helpers.models import IDS, Net, Packed, PackedKind
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import lora_inject as li
from lora_inject.core.layers import packed_weights

CONFIG = {"rank": 2, "alpha": 3}
FORMATS = {"peft": "adapter", "native": "adapter.safetensors"}
every_format = pytest.mark.parametrize("layout", FORMATS)


def expressible(kind: Kind, layout: str) -> bool:
    """PEFT has no words for weights that are read, bilinear layers and a parameter's slices."""
    return layout == "native" or kind.update == "forward"


def save(model: nn.Module, folder: Path, layout: str, name: str = "default") -> Path:
    return li.save_adapter(model, folder / FORMATS[layout], name, format=layout)


# -------------------------------------------------------------------------------------- round trips


@pytest.mark.parametrize(
    ("dtype", "init"),
    [(torch.float32, "pissa"), (torch.bfloat16, "kaiming"), (torch.float64, "kaiming")],
    ids=str,
)
@every_format
@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_comes_back_bit_for_bit(kind, layout, dtype, init, tmp_path) -> None:
    row = KINDS[kind]
    plain = host(row, dtype)
    config = {**row.config, "init": init, "dropout": 0.25 if row.update == "forward" else 0.0}
    model = fill(li.inject(copy.deepcopy(plain), config)).eval()
    inputs = row.inputs(dtype)
    wanted, before = model(*inputs), snapshot(plain)
    refused = refusal(lambda: save(model, tmp_path, layout), li.FormatError)
    if refused is not None:
        assert layout == "peft"
        assert not expressible(row, layout)
        assert 'format="native"' in str(refused)
        assert not any(tmp_path.iterdir())
        return
    loaded = li.load_adapter(plain.eval(), tmp_path / FORMATS[layout])
    assert same_bits(loaded(*inputs), wanted)
    (spec,) = li.adapters(loaded)["default"].sites.values()
    (saved,) = li.adapters(model)["default"].sites.values()
    facts = "name kind rank alpha scale dropout slices update init compute"
    for fact in facts.split():
        assert getattr(spec, fact) == getattr(saved, fact), fact
    dtypes = {p.dtype for p in li.adapter_parameters(loaded).values()}
    assert dtypes == {torch.float64 if dtype == torch.float64 else torch.float32}
    li.eject(loaded)
    loaded.train()
    assert snapshot(loaded) == before


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
    assert one.trained.keys() == two.trained.keys()
    assert all(same_bits(t, two.trained[k]) for k, t in one.trained.items())
    assert {n: s.scale for n, s in one.sites.items()} == {n: s.scale for n, s in two.sites.items()}
    assert two.config == one.config == li.Config.from_dict(RICH).to_dict()
    again = save(loaded, tmp_path / "second", layout, "other.name")
    files = [p / "adapter_model.safetensors" if p.is_dir() else p for p in (path, again)]
    first, second = map(load_file, files)
    assert first.keys() == second.keys()
    assert all(same_bits(t, second[k]) for k, t in first.items())


@every_format
@pytest.mark.parametrize("config", [{"bias": "all"}, {"train": ["head"]}], ids=str)
def test_adapters_without_sites_come_back(config, layout, tmp_path) -> None:
    plain = Net()
    model = fill(li.inject(copy.deepcopy(plain), config))
    loaded = li.load_adapter(copy.deepcopy(plain), save(model, tmp_path, layout))
    assert same_bits(loaded(IDS), model(IDS))


@every_format
def test_the_base_is_not_dragged_along(layout: str, tmp_path: Path) -> None:
    model = Host(nn.Embedding(1000, 50))
    li.inject(model, {"rank": 1, "targets": ["layer"]})
    path = save(model, tmp_path, layout)
    file = path / "adapter_model.safetensors" if path.is_dir() else path
    assert file.stat().st_size < 4 * 1050 + 4000
    assert sum(t.numel() for t in load_file(file).values()) == 1050


def test_an_adapter_fits_the_same_base_in_another_dtype(tmp_path: Path) -> None:
    plain = Net()
    model = fill(li.inject(copy.deepcopy(plain), {**CONFIG, "targets": ["fc", "embed"]}))
    path = save(model, tmp_path, "peft")
    for dtype in (torch.bfloat16, torch.float16, torch.float64):
        loaded = li.load_adapter(copy.deepcopy(plain).to(dtype), path)
        assert loaded(IDS).dtype == dtype
        assert error(loaded(IDS), model(IDS)) < 0.05
        for name, parameter in li.adapter_parameters(loaded).items():
            assert torch.equal(parameter.float(), li.adapter_parameters(model)[name])


def test_the_tensors_of_a_loaded_adapter_are_its_own() -> None:
    model = fill(li.inject(Net(), RICH))
    state = li.adapter_state(model)
    assert state.sites["fc"].A.data_ptr() == li.adapter_parameters(model)["fc.lora_A"].data_ptr()
    assert not state.sites["fc"].A.requires_grad
    other = li.install(li.eject(copy.deepcopy(model)), state)
    before = state.sites["fc"].A.clone()
    fill(other)
    assert torch.equal(state.sites["fc"].A, before)


# ------------------------------------------------------------------------ checked before any change


def refused(model: nn.Module, path: Path, words: str, **options: Any) -> None:
    before, listed = snapshot(model), li.summary(model)
    with pytest.raises(li.LoraInjectError, match=words):
        li.load_adapter(model, path, **options)
    assert snapshot(model) == before
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
    refused(model, saved, "the model has one of that name")
    li.merge(model)
    refused(model, saved, "is merged into the weights", name="other")
    with pytest.raises(li.StateError, match="is merged into the weights"):
        li.save_adapter(model, saved.with_name("merged"))  # the fingerprint would be of the merged
    refused(base(), saved / "nothing", "there is no such file or directory")


@pytest.mark.parametrize("key", ["embed", "fc"])
@pytest.mark.parametrize("how", ["scaled", "fine-tuned"])
def test_another_base_is_refused_unless_told(saved: Path, key: str, how: str) -> None:
    model = base()
    with torch.no_grad():
        W = model.get_submodule(key).weight
        W.add_(0.02 * W if how == "scaled" else 0.01 * torch.randn_like(W))
    refused(model, saved, f"another base: '{key}.weight'")
    assert li.load_adapter(model, saved, base="any") is model


def test_a_quantized_base_is_named_and_needs_the_argument(saved, monkeypatch) -> None:
    monkeypatch.setattr(packed_weights, "REGISTERED", [PackedKind()])
    model = base()
    model.fc = Packed(model.fc)
    refused(model, saved, "cannot be compared at 1 sites, of which 'fc.weight'")
    plain = li.load_adapter(base(), saved)
    loaded = li.load_adapter(model, saved, base="quantized")
    assert error(loaded(IDS), plain(IDS)) < 0.05
    other = base()
    other.fc = Packed(other.fc)
    with torch.no_grad():
        other.embed.weight.add_(1)
    refused(other, saved, "another base: 'embed", base="quantized")


def _without_fc(model: Net) -> None:
    del model.fc


def _narrow(model: Net) -> None:
    model.fc = nn.Linear(4, 6)


def _renamed(model: Net) -> None:
    model.fc1 = model.fc
    del model.fc


def _other_head(model: Net) -> None:
    model.head = nn.Linear(6, 4)


def _no_head(model: Net) -> None:
    del model.head


def _recurrent(model: Net) -> None:
    model.fc = nn.LSTM(5, 6)  # type: ignore[assignment]


CHANGES = {
    "the model has no such module": (_without_fc, "any"),
    "maps 5 to 6 features in the file, 4 to 6 here": (_narrow, "any"),
    "Nearest: .*'fc1'": (_renamed, "any"),
    r"has shape \(\d(, 6)?\) in the file and \(\d(, 6)?\) here": (_other_head, "same"),
    r"the model has no such parameter\. .*leave_out": (_no_head, "same"),
    "site 'fc'": (_recurrent, "any"),
}


@pytest.mark.parametrize("words", CHANGES)
def test_a_model_that_does_not_fit_is_refused(words: str, saved: Path) -> None:
    model = base()
    change, how = CHANGES[words]
    change(model)
    refused(model, saved, words, base=how)


def test_what_is_let_through_is_named(saved: Path) -> None:
    model = base()
    _other_head(model)
    li.load_adapter(model, saved, leave_out=["head.*"])
    assert set(li.adapters(model)["default"].trained) == {"fc.bias", "norm.bias"}
    refused(
        base(),
        saved,
        r"leave_out 'head.wieght': it matches nothing\. Nearest: 'head.weight",
        leave_out=["head.wieght"],
    )


def test_an_adapter_loads_under_any_name_of_a_shared_module(tmp_path: Path) -> None:
    layer, x = nn.Linear(5, 5), torch.randn(2, 5)
    turned = nn.ModuleDict(dict.fromkeys("ba", copy.deepcopy(layer)))
    model = fill(li.inject(nn.ModuleDict(dict.fromkeys("ab", layer)), {**CONFIG, "targets": ["a"]}))
    loaded = li.load_adapter(turned, save(model, tmp_path, "native"))
    assert list(li.adapters(loaded)["default"].sites) == ["b"]
    assert same_bits(loaded["a"](x), model["a"](x))


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
    model, x = fill(li.inject(Twice(), {**CONFIG, "targets": targets})), torch.randn(2, 5)
    path = save(model, tmp_path, layout)
    for shared in (True, False):
        assert same_bits(li.load_adapter(Twice(shared), path)(x), model(x))


def test_on_disk_it_is_merged_into_each_of_its_names_as_well(tmp_path: Path) -> None:
    """Where the file holds them all; where it holds one, as safetensors leaves them, into that."""
    targets = ["a", r"blocks\.1\.0"]
    model, x = fill(li.inject(Twice(), {**CONFIG, "targets": targets})), torch.randn(2, 5)
    path = save(model, tmp_path, "native")
    for names in (("a", "b", "blocks"), ("a", "blocks.0")):
        tensors = {k: t.clone() for k, t in Twice().state_dict().items() if k.startswith(names)}
        (tmp_path / "base").mkdir(exist_ok=True)
        save_file(tensors, tmp_path / "base" / "model.safetensors")
        li.merge_checkpoint(tmp_path / "base", [path], out := tmp_path / str(len(names)))
        merged = Twice()
        merged.load_state_dict(load_file(out / "model.safetensors"), strict=False)
        assert error(merged(x), model(x)) < TOLERANCE[torch.float32]


@pytest.mark.filterwarnings("ignore:Found missing adapter keys")  # as of files of its own
def test_peft_adapts_a_layer_in_the_first_of_its_places_only(tmp_path: Path) -> None:
    """So neither our file nor theirs means the same to both; of a shared block both do."""
    from peft import LoraConfig, PeftModel, get_peft_model

    model, x = fill(li.inject(Twice(), {**CONFIG, "targets": ["a"]})), torch.randn(2, 5)
    with pytest.raises(li.FormatError, match=r"site 'a'.*stands in 2 places.*native"):
        save(model, tmp_path, "peft")
    theirs = get_peft_model(Twice(), LoraConfig(r=2, target_modules=["a"]))
    theirs.save_pretrained(tmp_path / "theirs")
    refused(Twice(), tmp_path / "theirs", "site 'a'.*stands in 2 places.*deepcopy")
    li.load_adapter(Twice(shared=False), tmp_path / "theirs")
    block = fill(li.inject(Twice(), {**CONFIG, "targets": [r"blocks\.0\.0"]}))
    read = PeftModel.from_pretrained(Twice(), save(block, tmp_path, "peft"))
    assert error(read(x), block(x)) < TOLERANCE[torch.float32]


def test_save_refuses_unknown_names_and_formats(tmp_path: Path) -> None:
    model = injected(KINDS["linear"])
    with pytest.raises(li.StateError, match="adapter_state of 'x': the model's adapters are"):
        li.save_adapter(model, tmp_path / "a", "x")
    with pytest.raises(li.FormatError, match=r"there is no format .peff.*Nearest: peft"):
        li.save_adapter(model, tmp_path / "a", format="peff")
    assert not any(tmp_path.iterdir())
    path = save(model, tmp_path, "peft")
    before = {p.name: p.read_bytes() for p in path.iterdir()}
    fill(model)
    with pytest.raises(li.FormatError, match="overwrite"):
        save(model, tmp_path, "peft")
    assert {p.name: p.read_bytes() for p in path.iterdir()} == before
    li.save_adapter(model, path, overwrite=True)
    x = torch.randn(2, 5)
    wanted = model(x)
    assert same_bits(li.load_adapter(li.eject(model), path)(x), wanted)


@pytest.mark.parametrize(
    "config", [{"train": ["1"]}, {"targets": ["0"], "bias": "all"}], ids=["train", "bias"]
)
def test_a_norm_that_also_moves_statistics_is_refused(config: dict[str, Any]) -> None:
    """Saved without its statistics it would not come back, and eject would not restore them."""
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
    before = snapshot(model)
    with pytest.raises(li.LayerError, match=r"trained tensor '1\.\w+': .*moves running_mean"):
        li.inject(model, {"rank": 1, **config})
    assert snapshot(model) == before
    still = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4, track_running_stats=False))
    li.inject(still, {"rank": 1, **config})


def test_a_module_in_train_with_a_norm_inside_that_moves_statistics_is_refused() -> None:
    """The norm has no parameters, so that no trained tensor tells of it."""
    head = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4, affine=False))
    model = nn.ModuleDict({"body": nn.Linear(3, 4), "head": head})
    before = snapshot(model)
    with pytest.raises(li.LayerError, match=r"train 1 \('head'\), 'head\.1': .*moves running_mean"):
        li.inject(model, {"rank": 1, "targets": ["body"], "train": ["head"]})
    assert snapshot(model) == before
    li.inject(model, {"rank": 1, "targets": ["body"], "train": [r"head\.0"]})


class Centers(nn.Module):
    """Subtracts a moving average, times a gain."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.gain, self.how = nn.Parameter(torch.ones(4)), how
        self.register_buffer("mean", torch.full((4,), torch.nan) if how == "nan" else torch.ones(4))
        self.register_buffer("seen", torch.zeros((), dtype=torch.int64))
        self.register_buffer("last", torch.zeros(4), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        self.last = x.detach().mean(0)
        if self.training and self.how == "in place":
            self.mean.mul_(0.9).add_(self.last, alpha=0.1)
        if self.training and self.how == "data":  # leaves the version counter alone
            self.mean.data.mul_(0.9)
        if self.training and self.how == "another":
            self.mean = 0.9 * self.mean
        if self.training and self.how == "counter":
            self.seen += 1
        return (x - self.mean) * self.gain


def own(module: nn.Module) -> dict[str, Tensor]:
    """What a state dict holds besides what it says of adapters, which is made each time."""
    state = module.state_dict(keep_vars=True)
    return {name: tensor for name, tensor in state.items() if name != "_lora_forms"}


@pytest.mark.parametrize("how", ["in place", "data", "another", "counter"])
def test_a_module_in_train_that_moves_its_buffers_is_refused_at_its_first_step(how: str) -> None:
    model = nn.Sequential(nn.Linear(3, 4), Centers(how))
    li.inject(model, {"rank": 1, "targets": ["0"], "train": ["1"]})
    held = own(model[1])
    before = {name: tensor.detach().clone() for name, tensor in held.items()}
    for _ in range(2):
        with pytest.raises(li.LayerError, match=r"moves its buffer '(mean|seen)'.*Leave it out"):
            model(torch.randn(5, 3))
        for name, tensor in own(model[1]).items():
            assert tensor is held[name]
            assert same_bits(tensor, before[name])
    model[1].eval()
    model(torch.randn(5, 3))


@pytest.mark.parametrize("how", ["none", "nan"])
def test_constant_buffers_of_a_module_in_train_are_asked_about_once(how: str) -> None:
    model = nn.Sequential(nn.Linear(3, 4), Centers(how))
    li.inject(model, {"rank": 1, "targets": ["0"], "train": ["1"]})
    model(torch.randn(5, 3))
    assert model[1]._lora.still


def test_scales_come_back_and_a_config_that_contradicts_them_is_refused(tmp_path: Path) -> None:
    rules = [
        {"match": "before", "rank": 1, "alpha": 5},
        {"match": "layer", "rank": 2, "alpha": 0.5, "scaling": "rslora"},
    ]
    wanted = {"before": 5.0, "layer": 0.5 / math.sqrt(2)}
    plain = Host(nn.Linear(5, 6))
    model = fill(li.inject(copy.deepcopy(plain), {"alpha": 99, "targets": rules}))
    x, x2 = torch.randn(3, 5), torch.randn(3, 2)
    li.save_adapter(model, tmp_path / "a")
    other = copy.deepcopy(plain)
    fill(
        li.inject(other, {"rank": 1, "alpha": 7, "targets": ["layer", "before"]}, "older"), "older"
    )
    li.load_adapter(other, tmp_path / "a", "newer")
    for loaded, name in ((model, "default"), (other, "newer"), (copy.deepcopy(other), "newer")):
        sites = li.adapter_state(loaded, name).sites
        assert {n: site.scale for n, site in sites.items()} == wanted
        li.activate(loaded, name)
        assert same_bits(loaded(x), model(x))
        assert same_bits(loaded.before(x2), model.before(x2))
    assert li.adapter_state(other, "older").sites["layer"].scale == 7.0
    config = json.loads((tmp_path / "a" / "adapter_config.json").read_text())
    config["lora_alpha"] = 12345
    (tmp_path / "a" / "adapter_config.json").write_text(json.dumps(config))
    # A side file that contradicts the tensors is neither believed nor ignored in silence.
    with pytest.raises(li.FormatError, match=r"(?i)alpha"):
        li.load_adapter(copy.deepcopy(plain), tmp_path / "a", "again")


def test_dropout_acts_in_training_alone_also_after_a_load(tmp_path: Path) -> None:
    config = {**CONFIG, "dropout": 0.5, "targets": ["layer"]}
    model = fill(li.inject(Host(nn.Linear(5, 6)).eval(), config))
    x = torch.randn(50, 5)
    li.save_adapter(model, tmp_path / "a")
    loaded = li.load_adapter(li.eject(copy.deepcopy(model)), tmp_path / "a")
    for m in (model, loaded):
        assert not m.layer.training
        assert same_bits(m(x), m(x)), "dropout is active in an eval model"
        m.train()
        assert not same_bits(m(x), m(x))
        m.eval()
        assert same_bits(m(x), m(x))
    assert same_bits(loaded(x), model(x))


def test_saving_an_adapter_that_adds_nothing_says_so(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model = li.inject(nn.Sequential(nn.Linear(4, 4)), {"rank": 2, "targets": ["0"]})
    li.save_adapter(model, tmp_path / "fresh")
    assert "its update is 0 at each of its sites (1)" in caplog.text
    caplog.clear()
    with torch.no_grad():
        model[0].lora_B__default.fill_(1.0)
    li.save_adapter(model, tmp_path / "trained")
    assert caplog.text == ""


def test_an_adapter_that_is_loaded_to_train_is_the_only_active_and_trainable_one(
    tmp_path: Path,
) -> None:
    def net() -> nn.Module:
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(4, 4))

    config = {"rank": 2, "targets": ["0"]}
    li.save_adapter(li.inject(net(), config), tmp_path / "a")
    model = li.inject(net(), config, "other")
    li.load_adapter(model, tmp_path / "a", "more", trainable=True)
    training = {name for name, p in model.named_parameters() if p.requires_grad}
    assert training == {"0.lora_A__more", "0.lora_B__more"}
    assert {name: info.weight for name, info in li.adapters(model).items()} == {
        "other": None,
        "more": 1.0,
    }
    model(torch.ones(1, 4)).sum().backward()
