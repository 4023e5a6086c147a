"""What a state dict tells of adapters, through whatever it is sent, and which one is refused.

Another scale, other slices or rows, another rank or other sites under the same keys would compute
something else than what was trained; merged weights under an adapter would count it twice.
"""

import copy
import pickle
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import fill, same_bits, snapshot
from helpers.refusals import refused
from safetensors.torch import load_file, load_model, save_file, save_model
from torch import Tensor, nn

import lora_inject as li

SLICED = {"match": "fc", "slices": {"a": 3, "b": 3}, "adapt": ["a"]}
CONFIG: dict[str, Any] = {"rank": 2, "alpha": 4, "targets": [SLICED], "tokens": {"embed": [1, 2]}}
X = torch.arange(6)


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.norm, self.fc = nn.Embedding(6, 4), nn.LayerNorm(4), nn.Linear(4, 6)

    def forward(self, ids: Tensor) -> Tensor:
        return self.fc(self.norm(self.embed(ids)))


def injected(**changes: Any) -> nn.Module:
    torch.manual_seed(0)
    return fill(li.inject(Net(), CONFIG | changes))


def by_torch(state: Any, folder: Path) -> Any:
    torch.save(state, folder / "state.pt")
    return torch.load(folder / "state.pt", weights_only=True)


def by_safetensors(state: Any, folder: Path) -> Any:
    save_file(state, folder / "state.safetensors")
    return load_file(folder / "state.safetensors")


def by_hand(state: Any, folder: Path) -> Any:
    return {key: tensor.clone() for key, tensor in state.items()}


WAYS = {"torch.save": by_torch, "safetensors": by_safetensors, "a dict of clones": by_hand}
OTHERS: dict[str, dict[str, Any]] = {
    "scale": {"alpha": 64},
    "slices": {"targets": [SLICED | {"adapt": ["b"]}]},
    "rows": {"tokens": {"embed": [2, 3]}},
    "rank": {"rank": 3, "alpha": 6},
}


@pytest.mark.parametrize("strict", [True, False])
@pytest.mark.parametrize("other", OTHERS)
@pytest.mark.parametrize("way", WAYS)
def test_what_would_mean_something_else_is_refused(
    way: str, other: str, strict: bool, tmp_path: Path
) -> None:
    state = WAYS[way](injected().state_dict(), tmp_path)
    model = injected(**OTHERS[other])
    with refused(li.StateError, other):
        model.load_state_dict(state, strict=strict)


@pytest.mark.parametrize("way", WAYS)
def test_a_model_takes_back_what_it_gave_and_what_the_same_config_gave(way, tmp_path) -> None:
    """The best state so far, kept as clones; what it says is that of its adapters by name."""
    source = injected()
    wanted, state = source(X), WAYS[way](source.state_dict(), tmp_path)
    fill(source)
    for model in (source, copy.deepcopy(source), pickle.loads(pickle.dumps(source)), injected()):
        for parameter in model.parameters():
            nn.init.zeros_(parameter)
        model.load_state_dict(state)
        assert same_bits(model(X), wanted)
    li.inject(source, CONFIG, "later")
    source.load_state_dict(state)
    other = {key.replace("__default", "__later"): tensor for key, tensor in state.items()}
    with refused(li.StateError, "embed.weight__lora_T__later", "embed._lora_forms"):
        source.load_state_dict(other)


def test_each_module_with_adapters_has_one_key_besides_its_tensors() -> None:
    model = injected(train=["norm"])
    for change in (li.merge, li.unmerge, lambda model: li.inject(model, CONFIG, "later")):
        change(model)
        names = [name for name, _ in model.named_parameters()]
        assert {"fc.lora_A__default", "norm.weight__lora_T__default"} < {*names}
        further = [key for key in model.state_dict() if key not in names]
        assert further == ["embed._lora_forms", "norm._lora_forms", "fc._lora_forms"]
        assert [key for key in model.state_dict() if key in names] == names
    assert [*li.eject(model).state_dict()] == [*Net().state_dict()]


KEPT: dict[str, Callable[[Any], Any]] = {
    "bfloat16": lambda state: {key: t.to(torch.bfloat16) for key, t in state.items()},
    "averaged": lambda state: {key: (t + t.clone()) / 2 for key, t in state.items()},
    "the adapters alone": lambda state: {key: t for key, t in state.items() if "lora" in key},
}


@pytest.mark.parametrize("done", KEPT)
def test_casts_and_averages_keep_what_it_says(done: str) -> None:
    state = KEPT[done](injected().state_dict())
    model = injected()
    model.load_state_dict(state, strict=done != "the adapters alone")
    values = model.state_dict()
    for key, tensor in state.items():
        assert torch.equal(values[key], tensor.to(values[key].dtype)), key
    with refused(li.StateError, "fc.lora_A__default", "scale 2", "32"):
        injected(alpha=64).load_state_dict(state)


SPOILT: dict[str, Callable[[Any], Any]] = {
    "scaled": lambda state: {key: t * 0.9 for key, t in state.items()},
    "averaged with another scale": lambda state: {
        key: (t + other) / 2
        for (key, t), other in zip(
            state.items(), injected(alpha=8).state_dict().values(), strict=True
        )
    },
    "float8": lambda state: {key: t.to(torch.float8_e4m3fn) for key, t in state.items()},
    "stacked": lambda state: {key: torch.stack([t, t]) for key, t in state.items()},
    "no tensors": lambda state: {key: t.tolist() for key, t in state.items()},
    "a deep text": lambda state: state | {"fc._lora_forms": text(b"[" * 100_000)},
}


def text(told: bytes) -> Tensor:
    return torch.tensor([*told, *(b"#%08x" % zlib.crc32(told))], dtype=torch.float32)


@pytest.mark.parametrize("done", SPOILT)
def test_what_can_no_longer_be_read_is_refused(done: str) -> None:
    """Arithmetic with a dict changes what it means; that is no reason to take it for ours."""
    state = SPOILT[done](dict(injected().state_dict()))
    model = injected()
    with refused(li.StateError, "_lora_forms"):
        model.load_state_dict(state)


def test_safetensors_own_loader_compares(tmp_path: Path) -> None:
    """It calls `state_dict()` of the model that it loads into: alpha 3 was loaded under alpha 9."""
    file = str(tmp_path / "model.safetensors")
    source, model, same = injected(alpha=3), injected(alpha=9), fill(injected(alpha=3))
    save_model(source, file)
    with refused(li.StateError, "1.5", "4.5"):
        load_model(model, file)
    load_model(same, file)
    assert same_bits(same(X), source(X))


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_a_distributed_checkpoint_is_not_read_in_place_under_other_adapters(tmp_path: Path) -> None:
    """It asks for the keys that the model has: merged weights were loaded under an adapter."""
    import torch.distributed.checkpoint as dcp

    source, merged = injected(), injected()
    li.merge(merged)
    for name, model in {"source": source, "merged": merged}.items():
        dcp.save(model.state_dict(), checkpoint_id=tmp_path / name)
    same = fill(injected())
    dcp.load(same.state_dict(), checkpoint_id=tmp_path / "source")
    assert same_bits(same(X), source(X))
    for model, name in ((same, "merged"), (injected(alpha=64), "source")):
        held, path = model.state_dict(), tmp_path / name
        before = snapshot(model)
        with pytest.raises(dcp.CheckpointException, match="_lora_forms"):
            dcp.load(held, checkpoint_id=path)
        assert snapshot(model) == before
    # Texts of one length are read: who then calls load_state_dict is told.
    model = injected(alpha=8)
    state = model.state_dict()
    dcp.load(state, checkpoint_id=tmp_path / "source")
    with refused(li.StateError, "fc.lora_A__default", "scale 2", "4"):
        model.load_state_dict(state)


@pytest.mark.parametrize("kept", ["all", "the base"])
@pytest.mark.parametrize("part", [False, True])
def test_merged_weights_are_not_loaded_where_an_adapter_adds_to_them(
    kept: str, part: bool, tmp_path: Path
) -> None:
    """They would compute W + 2 delta."""
    source = injected()
    wanted = source(X)
    li.merge(source)
    state = source.fc.state_dict() if part else source.state_dict()
    for key in [key for key in state if kept == "the base" and "lora" in key]:
        del state[key]
    if kept == "all":
        state = by_safetensors(state, tmp_path)
    model = injected(alpha=4)
    into = model.fc if part else model
    with refused(li.StateError, "'default'", "unmerge(model)", model=model):
        into.load_state_dict(state, strict=False)
    plain = Net()
    (plain.fc if part else plain).load_state_dict(state, strict=kept == "the base")
    if not part:
        torch.testing.assert_close(plain(X), wanted)
        model.load_state_dict(li.unmerge(source).state_dict())
        assert same_bits(model(X), wanted)


def test_hooks_may_rename_what_is_loaded() -> None:
    def shorten(_: Any, state: Any, *__: Any) -> None:
        for key in list(state):
            state[key.removeprefix("module.")] = state.pop(key)

    source, same, other = injected(), fill(injected()), injected(alpha=64)
    for model in (same, other):
        model.register_load_state_dict_pre_hook(shorten)
    same.load_state_dict(prefixed(source.state_dict()))
    assert same_bits(same(X), source(X))
    with refused(li.StateError, "fc.lora_A__default", "scale 2", "32"):
        other.load_state_dict(prefixed(source.state_dict()))


CALLS: dict[str, Callable[[nn.Module, Any], Any]] = {
    "by keyword": lambda m, state: m.load_state_dict(state_dict=state, strict=False),
    "assigned": lambda m, state: m.load_state_dict(state, assign=True),
    "in DataParallel": lambda m, state: nn.DataParallel(m).load_state_dict(prefixed(state)),
    "compiled": lambda m, state: torch.compile(m, backend="eager").load_state_dict(
        prefixed(state, "_orig_mod."), strict=True
    ),
}


def prefixed(state: Any, prefix: str = "module.") -> Any:
    return type(state)((prefix + key, tensor) for key, tensor in state.items())


@pytest.mark.parametrize("call", CALLS)
def test_however_it_is_loaded(call: str) -> None:
    source, model = injected(), injected(alpha=64)
    before = {key: p.detach().clone() for key, p in model.named_parameters()}
    with refused(li.StateError, "fc.lora_A__default", "scale 2", "32"):
        CALLS[call](model, source.state_dict())
    assert all(torch.equal(p, before[key]) for key, p in model.named_parameters())
    same = injected()
    CALLS[call](same, source.state_dict())
    assert same_bits(same(X), source(X))


@pytest.mark.parametrize("change", ["other numbers", "merged", "unmerged"])
def test_functional_calls_with_what_means_something_else_are_refused(change: str) -> None:
    model, source = injected(), injected(alpha=64 if change == "other numbers" else 4)
    if change != "other numbers":
        li.merge(source if change == "merged" else model)
    wanted = model(X)
    with refused(li.StateError, "scale 32" if change == "other numbers" else "merged", model=model):
        torch.func.functional_call(model, source.state_dict(), (X,))
    assert same_bits(model(X), wanted)
    assert same_bits(torch.func.functional_call(model, model.state_dict(), (X,)), wanted)
