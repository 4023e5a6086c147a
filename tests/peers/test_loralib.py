"""The paper's own library: the same outputs, gradients and merged weights; its files, both ways.

Loralib states the method independently; only W, bias, A and B are copied across.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import error, same_bits
from contract.kinds import Host, conv1d
from helpers.merging import save_checkpoint
from helpers.refusals import refused
from helpers.states import SITES, Site, linear, same_effects, state_of
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import lora_inject as li

loralib = pytest.importorskip("loralib")

R, ALPHA = 2, 6


@dataclass(frozen=True)
class Pair:
    """A layer of loralib, the plain layer and rule that must equal it, and what no file says."""

    theirs: Callable[[], Any]
    row: Site
    told: dict[str, Any] = field(default_factory=dict)


def layer(plain: Callable[[], nn.Module], n_out: int, **more: Any) -> Site:
    return Site("layer", plain, n_out, **more)


def merged(*enabled: bool, turned: bool = False) -> Pair:
    names = [f"part{i}" for i in range(len(enabled))]
    n_out = 4 * len(enabled)
    on = [i for i, is_on in enumerate(enabled) if is_on]
    rule = {"slices": names, "adapt": [names[i] for i in on]}
    told: dict[str, Any] = {"enable_lora": [*enabled]}
    return Pair(
        lambda: loralib.MergedLinear(
            5, n_out, r=R, lora_alpha=ALPHA, enable_lora=list(enabled), fan_in_fan_out=turned
        ),
        layer(
            lambda: conv1d(n_out, 5) if turned else nn.Linear(5, n_out),
            n_out, rule=rule, spans=tuple((4 * i, 4 * i + 4) for i in on),
        ),
        told | ({"fan_in_fan_out": True} if turned else {}),
    )  # fmt: skip


NUMBERS = {"r": R, "lora_alpha": ALPHA}
PAIRS = {
    "Linear": Pair(lambda: loralib.Linear(5, 6, **NUMBERS), layer(lambda: nn.Linear(5, 6), 6)),
    "Linear turned": Pair(
        lambda: loralib.Linear(5, 6, **NUMBERS, fan_in_fan_out=True),
        layer(lambda: conv1d(6, 5), 6), {"fan_in_fan_out": True},
    ),
    "Embedding": Pair(
        lambda: loralib.Embedding(7, 5, **NUMBERS),
        layer(lambda: nn.Embedding(7, 5), 5),
    ),
    "MergedLinear q v": merged(True, False, True),
    "MergedLinear k": merged(False, True, False),
    "MergedLinear all": merged(True, True, True),
    "MergedLinear turned q v": merged(True, False, True, turned=True),
    "MergedLinear turned v": merged(False, False, True, turned=True),
}  # fmt: skip
every_pair = pytest.mark.parametrize("pair", PAIRS.values(), ids=list(PAIRS))


def injected(pair: Pair) -> Any:
    config = {"rank": R, "alpha": ALPHA, "targets": [{"match": "layer", **pair.row.rule}]}
    return li.inject(Host(pair.row.layer()).double(), config)


def build(pair: Pair) -> tuple[Any, Any, Tensor]:
    """Theirs, ours with the same W, bias, A and B, and an input."""
    theirs = pair.theirs().double()
    ours = injected(pair)
    with torch.no_grad():
        ours.layer._parameters["weight"].copy_(theirs.weight)
        if getattr(theirs, "bias", None) is not None:
            ours.layer.bias.copy_(theirs.bias)
        nn.init.normal_(theirs.lora_A)
        nn.init.normal_(theirs.lora_B)
    A, B = li.adapter_parameters(ours).values()
    assert (A.shape, B.shape) == (theirs.lora_A.shape, theirs.lora_B.shape)
    with torch.no_grad():
        A.copy_(theirs.lora_A)
        B.copy_(theirs.lora_B)
    takes_ids = isinstance(theirs, nn.Embedding)
    x = torch.randint(0, 7, (4, 3)) if takes_ids else torch.randn(4, 3, 5, dtype=torch.float64)
    return theirs, ours, x


@every_pair
def test_outputs_gradients_and_merged_weights_are_the_same(pair: Pair) -> None:
    theirs, ours, x = build(pair)
    inputs = [x.clone().requires_grad_(x.is_floating_point()) for _ in range(2)]
    outputs = [model(i) for model, i in zip((theirs, ours), inputs, strict=True)]
    assert error(outputs[1], outputs[0]) < 1e-12
    g = torch.randn_like(outputs[0])
    for y in outputs:
        y.backward(g)
    A, B = li.adapter_parameters(ours).values()
    assert error(A.grad, theirs.lora_A.grad) < 1e-12
    assert error(B.grad, theirs.lora_B.grad) < 1e-12
    if x.is_floating_point():
        assert error(inputs[1].grad, inputs[0].grad) < 1e-12
    theirs.eval()  # which merges
    li.merge(ours)
    assert error(ours.layer.weight, theirs.weight) < 1e-12
    assert error(ours(x), theirs(x)) < 1e-12


# ------------------------------------------------------------------------------------------ files


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
@every_pair
def test_files_are_read_right_both_ways(pair: Pair, suffix: str, tmp_path: Path) -> None:
    """Their trainable state, read by its own helper, is our adapter's two tensors."""
    theirs, ours, x = build(pair)
    model = nn.ModuleDict({"layer": theirs, "head": nn.Linear(2, 2)})
    tensors = loralib.lora_state_dict(model)
    tensors |= {k: v for k, v in model.state_dict().items() if k.startswith("head.")}
    path, pickled = tmp_path / f"a{suffix}", suffix == ".pt"
    (torch.save if pickled else save_file)(tensors, path)
    told = {"alpha": ALPHA, **pair.told, **({"allow_pickle": True} if pickled else {})}
    if sum(told.get("enable_lora", (True, True))) == 1:
        with refused(li.FormatError, "one part"):
            li.read_adapter(path, **told)
        return
    state = li.read_adapter(path, **told)
    wanted = li.adapter_state(ours)
    assert same_bits(state.sites["layer"].A, theirs.lora_A)
    assert set(state.trained) == {"head.weight", "head.bias"}
    host = Host(pair.row.layer()).double()
    loaded = li.load_adapter(host, path, leave_out=["head"], **told)
    same_effects(li.adapter_state(loaded), wanted, pair.row, within=0)
    path = li.write_adapter(wanted, tmp_path / f"ours{suffix}", format="loralib")
    loaded = li.load_adapter(Host(pair.row.layer()).double(), path, **told)
    same_effects(li.adapter_state(loaded), wanted, pair.row, within=0)
    nn.init.zeros_(theirs.lora_B)
    given = torch.load(path) if pickled else load_file(path)
    given = {key.removeprefix("layer."): tensor for key, tensor in given.items()}
    assert not theirs.load_state_dict(given, strict=False).unexpected_keys
    assert error(theirs(x), ours(x)) < 1e-12


class Evil:
    """Unpickling it makes a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (self.path,))


def test_pickles_are_read_only_when_allowed_and_run_nothing(tmp_path: Path) -> None:
    path = tmp_path / "a.pt"
    torch.save({"x.lora_A": torch.ones(2, 2), "x.lora_B": torch.ones(2, 2)}, path)
    with refused(li.FormatError, "allow_pickle=True"):
        li.read_adapter(path, alpha=1)
    torch.save({"x.lora_A": Evil(tmp_path / "was here")}, path)
    for content in (path.read_bytes(), b"not a pickle"):
        path.write_bytes(content)
        with refused(li.FormatError, str(path)):
            li.read_adapter(path, alpha=1, allow_pickle=True)
    assert not (tmp_path / "was here").exists()


PAIR, TOLD = {"fc.lora_A": torch.ones(2, 4), "fc.lora_B": torch.ones(6, 2)}, {"alpha": 1}
TWO_A = {f"{name}.lora_A": torch.ones(2, 4) for name in ("fc", "x")}
FUSED = PAIR | {"fc.lora_A": torch.ones(4, 4)}
UNREADABLE: dict[str, tuple[dict[str, Tensor], dict[str, Any], list[str]]] = {
    "no alpha": (PAIR, {}, ["alpha"]),
    "no B": (TWO_A, TOLD, ["fc", "its B"]),
    "fused": (FUSED, TOLD, ["fc", "enable_lora"]),
    "too many parts": (FUSED, {**TOLD, "enable_lora": [True] * 3}, ["fc", "2"]),
    "flags as text": (FUSED, {**TOLD, "enable_lora": "1,0,1"}, ["enable_lora", "'1,0,1'"]),
    "flags of text": (FUSED, {**TOLD, "enable_lora": ["1", "0"]}, ["enable_lora", "['1', '0']"]),
    "one part, unnamed": (PAIR, {**TOLD, "enable_lora": [True, False]}, ["enable_lora"]),
    "ranks": (PAIR | {"fc.lora_A": torch.ones(3, 4)}, TOLD, ["fc"]),
}


@pytest.mark.parametrize("case", UNREADABLE)
def test_what_cannot_be_read_right_is_refused(case: str, tmp_path: Path) -> None:
    tensors, options, named = UNREADABLE[case]
    save_file({key: t.clone() for key, t in tensors.items()}, tmp_path / "a.safetensors")
    with refused(li.FormatError, *named):
        li.read_adapter(tmp_path / "a.safetensors", format="loralib", **options)


def test_that_the_file_does_not_hold_alpha_is_said(run: Any, tmp_path: Path) -> None:
    """Read with another one the scale is another."""
    path = li.write_adapter(state_of(linear("fc", alpha=16.0)), tmp_path / "a")
    ran = run("convert", path, tmp_path / "b.pt", "--to", "loralib")
    assert (ran.code, "alpha, 16 of rank 2, is left out" in ran.err) == (0, True)


UNWRITABLE: dict[str, tuple[list[Site], str]] = {
    "two alphas": ([SITES["linear"], linear("b", alpha=1.0)], "alpha"),
    "a convolution": ([SITES["conv"]], "conv"),
    "a frozen start": ([SITES["linear"].by(init="pissa")], "'h.0.fc'"),
    "unequal widths": ([SITES["slices"].by(alpha=4.0)], "'h.0.qkv'"),
}


@pytest.mark.parametrize("case", UNWRITABLE)
def test_what_loralib_cannot_express_is_refused(case: str, tmp_path: Path) -> None:
    rows, named = UNWRITABLE[case]
    with refused(li.FormatError, named):
        li.write_adapter(state_of(*rows), tmp_path / "a.pt", format="loralib")
    with refused(li.FormatError, ".pt"):
        li.write_adapter(state_of(SITES["linear"]), tmp_path / "a.txt", format="loralib")
    assert not list(tmp_path.iterdir())


# ----------------------------------------------------------------------------- on the command line


def test_the_commands_take_what_python_read_of_loralib(run: Any, tmp_path: Path) -> None:
    pair = PAIRS["MergedLinear turned q v"]
    theirs, _, _ = build(pair)
    model = nn.ModuleDict({"layer": theirs})
    tensors = loralib.lora_state_dict(model)
    base = {k: v.contiguous() for k, v in model.state_dict().items() if k not in tensors}
    save_checkpoint(tmp_path / "base", base)
    file = tmp_path / "a.bin"
    torch.save(tensors, file)
    merge = ("merge", tmp_path / "base")
    said = run(*merge, file, "-o", tmp_path / "out").err
    assert "loralib files do not hold alpha. Read it in Python: li.read_adapter" in said
    assert not (tmp_path / "out").exists()
    state = li.read_adapter(file, alpha=ALPHA, allow_pickle=True, **pair.told)
    path = li.write_adapter(state, tmp_path / "a")
    assert run(*merge, path, "-o", tmp_path / "out").code == 0
    assert run("verify", tmp_path / "base", path, tmp_path / "out").code == 0
    assert "1 site" in run("inspect", path).out
    theirs.eval()  # which merges
    merged = load_file(tmp_path / "out" / "model.safetensors")
    assert error(merged["layer.weight"], theirs.weight) < 1e-12
