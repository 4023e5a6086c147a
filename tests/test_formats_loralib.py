"""The paper's own library: the same outputs, gradients and steps; its files read, written, merged.

Loralib is a second, independent statement of the method. Its layers are read as they are;
only W, bias, A and B are copied across.
"""

import dataclasses
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Host, conv1d, error, same_bits
from helpers.adapter_states import KIND_SPECS, dense, make_state
from helpers.checkpoints import save_checkpoint
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import lora_inject as li
from lora_inject.errors import FormatError
from lora_inject.formats import read_adapter, write_adapter

loralib = pytest.importorskip("loralib")

R, ALPHA = 2, 6


@dataclass(frozen=True)
class Pair:
    """A layer of loralib, the plain layer and rule that must equal it, and what no file says."""

    theirs: Callable[[], Any]
    plain: Callable[[], nn.Module]
    rule: dict[str, Any] = field(default_factory=dict)
    ids: bool = False
    told: dict[str, Any] = field(default_factory=dict)


TURNED = {"fan_in_fan_out": True}


def merged(*enabled: bool, turned: bool = False) -> Pair:
    names = [f"part{i}" for i in range(len(enabled))]
    n_out = 4 * len(enabled)
    by_name = {"enable_lora": {"layer": [*enabled]}} if sum(enabled) == 1 else None
    return Pair(
        lambda: loralib.MergedLinear(
            5, n_out, r=R, lora_alpha=ALPHA, enable_lora=list(enabled), fan_in_fan_out=turned
        ),
        lambda: conv1d(n_out, 5) if turned else nn.Linear(5, n_out),
        {"slices": names, "adapt": [n for n, on in zip(names, enabled, strict=True) if on]},
        told={**(by_name or {"enable_lora": [*enabled]}), **(TURNED if turned else {})},
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
        told={"fan_in_fan_out": ["layer"]},
    ),
    "Embedding": Pair(
        lambda: loralib.Embedding(7, 5, r=R, lora_alpha=ALPHA),
        lambda: nn.Embedding(7, 5),
        ids=True,
        told={"embeddings": ["layer"]},
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


# ------------------------------------------------------------------------------------------ files


@pytest.mark.parametrize("suffix", [".pt", ".bin", ".safetensors"])
@every_pair
def test_what_it_writes_is_read_right(pair: Pair, suffix: str, tmp_path: Path) -> None:
    """Their trainable state, read by its own helper, is our adapter's two tensors."""
    theirs, ours, _ = build(pair)
    model = nn.ModuleDict({"layer": theirs, "head": nn.Linear(2, 2)})
    tensors = loralib.lora_state_dict(model)
    tensors |= {k: v for k, v in model.state_dict().items() if k.startswith("head.")}
    path, pickled = tmp_path / f"a{suffix}", suffix != ".safetensors"
    (torch.save if pickled else save_file)(tensors, path)
    allowed = {"allow_pickle": True} if pickled else {}
    state = read_adapter(path, alpha=ALPHA, **pair.told, **allowed)
    wanted = li.adapter_state(ours).sites["layer"]
    assert same_bits(state.sites["layer"].A, theirs.lora_A)
    assert torch.equal(dense(state.sites["layer"]), dense(wanted))
    assert set(state.trained) == {"head.weight", "head.bias"}


@every_pair
def test_it_reads_what_is_written(pair: Pair, tmp_path: Path) -> None:
    theirs, ours, x = build(pair)
    for suffix in (".pt", ".safetensors"):
        state = li.adapter_state(ours)
        path = write_adapter(state, tmp_path / f"a{suffix}", format="loralib")
        back = read_adapter(path, alpha=ALPHA, allow_pickle=True, **pair.told)
        assert torch.equal(dense(back.sites["layer"]), dense(state.sites["layer"]))
    nn.init.zeros_(theirs.lora_B)
    given = {key.removeprefix("layer."): t for key, t in torch.load(tmp_path / "a.pt").items()}
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
    with pytest.raises(FormatError, match="allow_pickle=True"):
        read_adapter(path, alpha=1)
    torch.save({"x.lora_A": Evil(tmp_path / "was here")}, path)
    with pytest.raises(FormatError, match="cannot be loaded"):
        read_adapter(path, alpha=1, allow_pickle=True)
    assert not (tmp_path / "was here").exists()
    for content in (b"", b"not a pickle", [1], {"a": 1}):
        if isinstance(content, bytes):
            path.write_bytes(content)
        else:
            torch.save(content, path)
        with pytest.raises(FormatError):
            read_adapter(path, alpha=1, allow_pickle=True)


PAIR, TOLD = {"fc.lora_A": torch.ones(2, 4), "fc.lora_B": torch.ones(6, 2)}, {"alpha": 1}
BAD: dict[str, tuple[dict[str, torch.Tensor], dict[str, Any], str]] = {
    "no alpha": (PAIR, {}, "do not hold alpha"),
    "alpha 0": (PAIR, {"alpha": 0}, "do not hold alpha"),
    "no B": (
        {f"{name}.lora_A": PAIR["fc.lora_A"] for name in ("fc", "x")}, TOLD, "lora_B is missing",
    ),
    "no A": (
        {"fc.lora_B": PAIR["fc.lora_B"], **{f"x.{k}": v for k, v in PAIR.items()}}, TOLD,
        "lora_A is missing",
    ),
    "fused": (PAIR | {"fc.lora_A": torch.ones(4, 4)}, TOLD, "fused layer with 2"),
    "too many parts": (
        PAIR | {"fc.lora_A": torch.ones(4, 4)}, {**TOLD, "enable_lora": [True] * 3},
        "of 2 adapted parts",
    ),
    "one part, unnamed": (
        PAIR, {**TOLD, "enable_lora": [True, False]}, "cannot be distinguished from a plain layer",
    ),
    "ranks": (PAIR | {"fc.lora_A": torch.ones(3, 4)}, TOLD, "do not fit"),
    "name": (PAIR, {**TOLD, "embeddings": ["wte"]}, "no site is called 'wte'"),
    "shapes": (PAIR | {"fc.lora_A": torch.ones(2)}, TOLD, "shapes"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_what_cannot_be_read_right_is_refused(case: str, tmp_path: Path) -> None:
    tensors, options, words = BAD[case]
    save_file({key: t.clone() for key, t in tensors.items()}, tmp_path / "a.safetensors")
    with pytest.raises(FormatError, match=words):
        read_adapter(tmp_path / "a.safetensors", format="loralib", **options)


def test_what_loralib_cannot_express_is_refused(tmp_path: Path) -> None:
    linear = KIND_SPECS["linear"]
    unequal = dataclasses.replace(KIND_SPECS["slices"], rank=2, alpha=4.0)
    states = {
        "one rank, one alpha": make_state(linear, dataclasses.replace(linear, name="b", alpha=1.0)),
        "standard scaling": make_state(dataclasses.replace(linear, scaling="rslora")),
        "has no conv": make_state(KIND_SPECS["conv"]),
        "derived from the base": make_state(linear, derived=True),
        "unequal widths": make_state(unequal),
    }
    for words, state in states.items():
        with pytest.raises(FormatError, match=words):
            write_adapter(state, tmp_path / "a.pt", format="loralib")
    with pytest.raises(FormatError, match="does not end in"):
        write_adapter(make_state(linear), tmp_path / "a.txt", format="loralib")
    assert not list(tmp_path.iterdir())


# ------------------------------------------------------------------------------ merged checkpoints

OPTIONS = ("--alpha", "6", "--fan-in-fan-out", "c_attn", "--enable-lora", "1,0,1")


class Net(nn.Module):
    """GPT-2's fused layer as loralib adapts it, a plain one, and a head that is trained."""

    def __init__(self, *, adapted):
        super().__init__()
        if adapted:
            self.c_attn = loralib.MergedLinear(
                8, 24, r=2, lora_alpha=6, enable_lora=[True, False, True], fan_in_fan_out=True
            )
            self.c_proj = loralib.Linear(8, 8, r=2, lora_alpha=6)
        else:
            self.c_attn = loralib.MergedLinear(8, 24, fan_in_fan_out=True)
            self.c_proj = nn.Linear(8, 8)
        self.head = nn.Linear(8, 3)

    def forward(self, x):
        q, k, v = self.c_attn(x).chunk(3, -1)
        return self.head(self.c_proj(torch.tanh(q) * k + v))


@pytest.fixture
def case(tmp_path):
    torch.manual_seed(0)
    plain, adapted = Net(adapted=False), Net(adapted=True)
    save_checkpoint(tmp_path / "base", {k: v.contiguous() for k, v in plain.state_dict().items()})
    adapted.load_state_dict(plain.state_dict(), strict=False)
    for name, parameter in adapted.named_parameters():
        if "lora_" in name or name.startswith("head"):
            nn.init.normal_(parameter, std=0.3)
    tensors = loralib.lora_state_dict(adapted)
    tensors |= {k: v for k, v in adapted.state_dict().items() if k.startswith("head.")}
    return tmp_path, plain, adapted, tensors


@pytest.mark.parametrize("suffix", [".safetensors", ".bin"])
def test_merged_equals_the_layers_of_loralib(run, case, suffix):
    folder, plain, adapted, tensors = case
    file, pickled = folder / f"a{suffix}", suffix == ".bin"
    (torch.save if pickled else save_file)(tensors, file)
    options = (*OPTIONS, "--allow-pickle") if pickled else OPTIONS
    assert run("merge", folder / "base", file, "-o", folder / "out", *options).code == 0
    plain.load_state_dict(load_file(folder / "out" / "model.safetensors"))
    x = torch.randn(4, 8)
    torch.testing.assert_close(plain(x), adapted.train()(x), rtol=1e-5, atol=1e-5)
    assert run("verify", folder / "base", file, folder / "out", *options).code == 0


def test_what_the_file_does_not_hold_is_asked_for(run, case):
    folder, _, _, tensors = case
    save_file(tensors, folder / "a.safetensors")
    torch.save(tensors, folder / "a.bin")
    for file, options, code, words in (
        ("a.safetensors", (), 1, "Pass --alpha"),
        ("a.bin", OPTIONS, 1, "is a pickle. Pass --allow-pickle"),
        ("a.safetensors", ("--alpha", "6", "--enable-lora", "yes"), 2, "--enable-lora"),
        ("a.safetensors", ("--alpha", "6"), 1, "enable_lora"),
    ):
        printed = run("merge", folder / "base", folder / file, "-o", folder / "out", *options)
        assert (printed.code, words in printed.err) == (code, True), printed.err
    assert not (folder / "out").exists()


def test_options_of_loralib_without_a_file_of_it_are_wrong_usage(run, tmp_path):
    for name in ("base", "folder"):
        (tmp_path / name).mkdir()
    base = tmp_path / "base" / "model.safetensors"
    save_file({"w": torch.ones(2, 2)}, base)
    printed = run("merge", base, tmp_path / "folder", "-o", tmp_path / "out", "--alpha", "6")
    assert printed.code == 2
    assert "no adapter has a format with this option" in printed.err


def test_inspect_and_analyze_read_what_merge_reads(run, case):
    folder, _, _, tensors = case
    file = folder / "loralib.safetensors"
    save_file({k: v.contiguous() for k, v in tensors.items()}, file)
    for command in ("inspect", "analyze"):
        assert "Pass --alpha" in run(command, file).err
        assert "2 sites" in run(command, file, *OPTIONS).out
    assert run("inspect", file, *OPTIONS, "--base", folder / "base").code == 0
    shutil.copy(file, folder / "without-ending")
    assert run("inspect", folder / "without-ending", *OPTIONS, "--format", "loralib").code == 0
