"""What a state dict tells of adapters, through whatever it is sent, and which one is refused.

Another scale, other slices or rows, another rank or other sites under the same keys would compute
something else than what was trained; merged weights under an adapter would count it twice.
"""

import copy
import io
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import fill, same_bits, snapshot
from safetensors.torch import load_file, save_file
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
    "no such site": {"targets": ["fc"], "tokens": {}},
}


@pytest.mark.parametrize("strict", [True, False])
@pytest.mark.parametrize("other", OTHERS)
@pytest.mark.parametrize("way", WAYS)
def test_what_would_mean_something_else_is_refused(
    way: str, other: str, strict: bool, tmp_path: Path
) -> None:
    state = WAYS[way](injected().state_dict(), tmp_path)
    model = injected(**OTHERS[other])
    before = snapshot(model)
    words = "no such site|slices" if other == "no such site" else other
    words = words if way == "torch.save" else "does not say for which scale and slices"
    with pytest.raises(li.StateError, match=words):
        model.load_state_dict(state, strict=strict)
    assert snapshot(model) == before


def test_the_same_config_takes_what_torch_saved(tmp_path: Path) -> None:
    source = injected()
    model = injected()
    for parameter in model.parameters():
        nn.init.zeros_(parameter)
    model.load_state_dict(by_torch(source.state_dict(), tmp_path))
    assert same_bits(model(X), source(X))


@pytest.mark.parametrize("way", WAYS)
def test_a_model_takes_back_what_it_gave(way: str, tmp_path: Path) -> None:
    """The best state so far, kept as clones: there is nothing that could differ."""
    model = injected()
    wanted, state = model(X), WAYS[way](model.state_dict(), tmp_path)
    fill(model)
    for taking in (model, copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        taking.load_state_dict(state)
        assert same_bits(taking(X), wanted)
    li.inject(model, CONFIG, "later")
    later = {key: tensor.clone() for key, tensor in injected().state_dict().items()}
    other = {key.replace("__default", "__later"): tensor for key, tensor in later.items()}
    with pytest.raises(li.StateError, match="does not say for which scale"):
        model.load_state_dict(other)


def the_dict_itself(state: Any, folder: Path) -> Any:
    return state


OF_MERGED = [(way, "all") for way in (*WAYS.values(), the_dict_itself)]
OF_MERGED += [(by_torch, "the base"), (the_dict_itself, "the base")]


@pytest.mark.parametrize("part", [False, True])
@pytest.mark.parametrize(("way", "kept"), OF_MERGED)
def test_merged_weights_are_not_loaded_where_an_adapter_adds_to_them(
    way: Callable[[Any, Path], Any], kept: str, part: bool, tmp_path: Path
) -> None:
    """A dict of clones has no metadata, and computed W + 2 delta."""
    source = injected()
    wanted = source(X)
    li.merge(source)
    state = source.fc.state_dict() if part else source.state_dict()
    for key in [key for key in state if kept == "the base" and "lora" in key]:
        del state[key]
    state = way(state, tmp_path)
    model = injected(alpha=4)
    before = snapshot(model)
    with pytest.raises(li.StateError, match=r"w(as|ere) merged into .* Take it after unmerge"):
        (model.fc if part else model).load_state_dict(state, strict=False)
    assert snapshot(model) == before
    plain = Net()
    (plain.fc if part else plain).load_state_dict(state, strict=kept == "the base")
    if part:
        return
    torch.testing.assert_close(plain(X), wanted)
    li.unmerge(source)
    model.load_state_dict(source.state_dict())
    assert same_bits(model(X), wanted)


def test_the_keys_of_a_model_that_is_not_merged_are_those_of_its_tensors() -> None:
    """So they are again after unmerge: no other reader meets a key of ours."""
    model = injected()
    keys = [*model.state_dict()]
    assert keys == [name for name, _ in model.named_parameters()]
    li.merge(model)
    further = [key for key in model.state_dict() if key not in keys]
    assert further == ["embed._lora_merged", "fc._lora_merged"]
    li.unmerge(model)
    assert [*model.state_dict()] == keys
    li.merge(model, eject=True)
    assert [*model.state_dict()] == [*Net().state_dict()]


def test_torchs_distributed_checkpoints_take_a_merged_model() -> None:
    from torch.distributed.checkpoint.state_dict import get_model_state_dict

    model = injected()
    li.merge(model)
    state = get_model_state_dict(model)
    assert state.keys() == model.state_dict().keys()
    with pytest.raises(li.StateError, match="were merged into the weights"):
        injected().load_state_dict(dict(state))


def test_a_part_tells_what_the_whole_tells() -> None:
    source, model = injected(), injected(alpha=64)
    buffer = io.BytesIO()
    torch.save(source.fc.state_dict(), buffer)
    buffer.seek(0)
    with pytest.raises(li.StateError, match="scale 2 in the state dict, and 32 here"):
        model.fc.load_state_dict(torch.load(buffer, weights_only=True))


def test_a_base_loads_whatever_its_way(tmp_path: Path) -> None:
    for way in WAYS.values():
        torch.manual_seed(1)
        plain, model = Net(), injected()
        held = {key: p.detach().clone() for key, p in li.adapter_parameters(model).items()}
        model.load_state_dict(way(plain.state_dict(), tmp_path))
        li_state = li.adapter_parameters(model)
        assert all(torch.equal(li_state[key], tensor) for key, tensor in held.items())
        assert torch.equal(model.state_dict()["fc.weight"], plain.fc.weight)


CALLS: dict[str, Callable[[nn.Module, Any], Any]] = {
    "by keyword": lambda m, state: m.load_state_dict(state_dict=state, strict=False),
    "assigned": lambda m, state: m.load_state_dict(state, assign=True),
    "in DataParallel": lambda m, state: nn.DataParallel(m).load_state_dict(prefixed(state)),
    "compiled": lambda m, state: torch.compile(m, backend="eager").load_state_dict(
        prefixed(state, "_orig_mod."), strict=True
    ),
}


def prefixed(state: Any, prefix: str = "module.") -> Any:
    made = type(state)((prefix + key, tensor) for key, tensor in state.items())
    made._metadata = {(prefix + key).rstrip("."): v for key, v in state._metadata.items()}
    return made


@pytest.mark.parametrize("call", CALLS)
def test_however_it_is_loaded(call: str) -> None:
    source, model = injected(), injected(alpha=64)
    before = {key: p.detach().clone() for key, p in model.named_parameters()}
    with pytest.raises(li.StateError, match="scale 2 in the state dict, and 32 here"):
        CALLS[call](model, source.state_dict())
    assert all(torch.equal(p, before[key]) for key, p in model.named_parameters())
    same = injected()
    CALLS[call](same, source.state_dict())
    assert same_bits(same(X), source(X))
