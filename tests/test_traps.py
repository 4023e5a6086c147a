"""One test for each trap of the design, named after it: failures seen in libraries that people use.

Each test fails for a library that falls into the trap, by values and not by warnings.
"""

from __future__ import annotations

import contextlib
import copy
import json
import math
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import (
    ALPHA,
    KINDS,
    RANK,
    SCALE,
    TOLERANCE,
    Host,
    Kind,
    conv1d,
    dense_output,
    error,
    fill,
    host,
    injected,
    refusal,
    same_bits,
    snapshot,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import GPT2Config, GPT2LMHeadModel

import lora_inject as li

CONFIG = {"rank": RANK, "alpha": ALPHA}


def gpt2(**options: Any) -> GPT2LMHeadModel:
    torch.manual_seed(0)
    sizes = {"n_layer": 2, "n_embd": 8, "n_head": 2, "vocab_size": 13, "n_positions": 16}
    drops = dict.fromkeys(("attn_pdrop", "resid_pdrop", "embd_pdrop"), 0.0)
    tokens = {"bos_token_id": 0, "eos_token_id": 0}
    config = GPT2Config(**sizes, **drops, **tokens, initializer_range=0.3, **options)
    return GPT2LMHeadModel(config).eval()


def with_deltas(plain: nn.Module, model: nn.Module, name: str = "default") -> nn.Module:
    """A float64 copy of the plain model with the dense deltas of plain matrices in its weights."""
    wide = copy.deepcopy(plain).double()
    parameters = dict(wide.named_parameters(remove_duplicate=False))
    with torch.no_grad():
        for site in li.adapter_state(model, name).sites.values():
            delta = SCALE * site.B.double() @ site.A.double()
            parameters[site.spec.weight] += delta.t() if site.spec.transposed else delta
    return wide


def finite_differences(run: Callable[[], Tensor], parameter: Tensor) -> Tensor:
    """The gradient of a float64 scalar by central differences."""
    found, step = torch.zeros_like(parameter), 1e-6
    with torch.no_grad():
        for i in range(parameter.numel()):
            flat = parameter.view(-1)
            value = flat[i].item()
            flat[i] = value + step
            above = run()
            flat[i] = value - step
            below = run()
            flat[i] = value
            found.view(-1)[i] = (above - below) / (2 * step)
    return found


# ---------------------------------------------------------------------------- weights that are read

EVERYTHING = ["linear1", "linear2", "self_attn"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("stacked", [False, True], ids=["layer", "encoder"])
@pytest.mark.parametrize("targets", [EVERYTHING, ["linear2"], ["self_attn"], ["out_proj"]], ids=str)
def test_encoder_fast_path(targets: list[str], stacked: bool, dtype: torch.dtype) -> None:
    plain: nn.Module = nn.TransformerEncoderLayer(8, 2, 12, dropout=0.0, batch_first=True)
    if stacked:
        plain = nn.TransformerEncoder(plain, 2, enable_nested_tensor=False)  # type: ignore[arg-type]
    plain = plain.to(dtype)
    model = fill(li.inject(copy.deepcopy(plain), {**CONFIG, "targets": targets}))
    x = torch.randn(2, 5, 8, dtype=dtype)
    wanted = with_deltas(plain, model)(x.double())
    assert error(plain(x), wanted) > 0.01
    for training in (True, False):
        model.train(training)
        for grad in (True, False):
            with torch.set_grad_enabled(grad):
                assert error(model(x), wanted) < (1 + stacked) * TOLERANCE[dtype]
    assert li.unreached(model, lambda: model(x)) == []


@pytest.mark.slow
def test_encoder_fast_path_compiled() -> None:
    plain = nn.TransformerEncoderLayer(8, 2, 12, dropout=0.0, batch_first=True)
    model = fill(li.inject(copy.deepcopy(plain), {**CONFIG, "targets": EVERYTHING})).eval()
    x = torch.randn(2, 5, 8)
    wanted = with_deltas(plain, model)(x.double())
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    assert error(compiled(x), wanted) < TOLERANCE[torch.float32]
    with torch.no_grad():
        assert error(compiled(x), wanted) < TOLERANCE[torch.float32]


class Attention(nn.Module):
    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.attn = nn.MultiheadAttention(8, 2, batch_first=True, **options)

    def forward(self, x: Tensor) -> Tensor:
        kv = x[..., :6] if self.attn.kdim == 6 else x
        found: Tensor = self.attn(x, kv, kv, need_weights=False)[0]
        return found


@pytest.mark.parametrize("options", [{}, {"kdim": 6, "vdim": 6}, {"bias": False}], ids=str)
@pytest.mark.parametrize("target", ["attn", r"attn\.out_proj", "out_proj", r"out_proj\.weight"])
def test_attention_out_proj(target: str, options: dict[str, Any]) -> None:
    plain = Attention(**options).double()
    model = fill(li.inject(copy.deepcopy(plain), {**CONFIG, "targets": [target]}))
    base = {n: p for n, p in model.named_parameters() if "lora" not in n}
    before = {n: (p.detach().clone(), p._version) for n, p in base.items()}
    x = torch.randn(2, 3, 8, dtype=torch.float64)
    wanted = with_deltas(plain, model)(x)
    assert error(plain(x), wanted) > 0.01
    for training in (True, False):
        assert error(model.train(training)(x), wanted) < 1e-12

    g = torch.randn_like(wanted)
    model.train()
    (model(x) * g).sum().backward()
    for parameter in li.adapter_parameters(model).values():
        measured = finite_differences(lambda: (model(x) * g).sum(), parameter)
        assert parameter.grad is not None
        assert error(parameter.grad, measured) < 1e-6
    assert {n: p._version for n, p in base.items()} == {n: v for n, (_, v) in before.items()}
    assert all(same_bits(p, before[n][0]) for n, p in base.items())
    li.merge(model)
    assert error(model(x), wanted) < 1e-12


def test_unreached_sees_branches_and_restores() -> None:
    model = nn.ModuleDict({n: nn.Linear(3, 3) for n in ("used", "idle")})
    li.inject(model, {"rank": 1, "targets": ["used", "idle"]})
    x = torch.randn(2, 3)
    assert li.unreached(model, lambda: model["used"](x)) == ["idle"]
    with li.routed(model, ["default", None]):
        assert li.unreached(model, lambda: model["idle"](x)) == ["used"]
    with pytest.raises(ZeroDivisionError):
        li.unreached(model, lambda: 1 / 0)
    assert li.unreached(model, lambda: None) == ["used", "idle"]
    li.activate(model, None)
    with pytest.raises(li.StateError, match="no adapter is active"):
        li.unreached(model, lambda: model["used"](x))


# -------------------------------------------------------------------------------- sharing and tying


def test_a_module_that_holds_its_parent() -> None:
    """Its names have no end: an error, and not all memory."""
    net = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    net[0].parent = net
    with pytest.raises(li.LayerError, match=r"0\.parent\.0.*a module holds one that holds it"):
        li.inject(net, {"rank": 1, "targets": ["1"]})
    assert type(net[1]) is nn.Linear


TIED = [["wte"], ["lm_head"], ["wte", "lm_head"], ["c_attn", "wte"]]


@pytest.mark.parametrize("undo", [True, False])
@pytest.mark.parametrize("targets", TIED, ids=str)
def test_tied_weight(targets: list[str], undo: bool, tmp_path: Path) -> None:
    model = fill(li.inject(gpt2(), {**CONFIG, "targets": targets}))
    ids = torch.arange(10).view(2, 5)
    wanted = model(ids).logits
    tied = model.transformer.wte.weight
    before, bits = snapshot(model), tied.detach().clone()
    li.merge(model, undo=undo)
    assert error(model(ids).logits, wanted) < TOLERANCE[torch.float32]
    assert model.transformer.wte.weight is not model.lm_head.weight
    assert model.config.tie_word_embeddings is False
    untouched = {"wte", "lm_head"} - set(targets)
    for name in untouched:
        module = model.lm_head if name == "lm_head" else model.transformer.wte
        assert same_bits(module._parameters["weight"], bits)
    saved = copy.deepcopy(model)
    li.eject(saved)
    saved.save_pretrained(tmp_path)
    again = GPT2LMHeadModel.from_pretrained(tmp_path)
    assert error(again(ids).logits, wanted) < TOLERANCE[torch.float32]
    if undo:
        li.unmerge(model)
        assert snapshot(model) == before
        assert model.config.tie_word_embeddings is True
        assert model.transformer.wte.weight is tied
        assert model.lm_head.weight is tied


@pytest.mark.parametrize("says", [True, False])
def test_tied_weight_is_known_by_the_tensor_not_by_the_config(says: bool) -> None:
    model = gpt2(tie_word_embeddings=not says)
    model.config.tie_word_embeddings = says
    assert (model.lm_head.weight is model.transformer.wte.weight) is not says
    fill(li.inject(model, {**CONFIG, "targets": ["wte"]}))
    ids = torch.arange(10).view(2, 5)
    wanted, head = model(ids).logits, model.lm_head.weight
    li.merge(model)
    assert error(model(ids).logits, wanted) < TOLERANCE[torch.float32]
    assert model.lm_head.weight is head
    assert model.config.tie_word_embeddings is (says and model.lm_head.weight is not None)


# ----------------------------------------------------------------------------------- awkward layers


CONVOLUTIONS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "groups": (lambda: nn.Conv2d(6, 8, 3, groups=2), (2, 6, 7, 6)),
    "depthwise": (lambda: nn.Conv2d(6, 6, 3, groups=6, padding=1), (2, 6, 7, 6)),
    "dilation": (lambda: nn.Conv2d(3, 8, 3, dilation=(1, 2), stride=2), (2, 3, 9, 9)),
    "reflect": (lambda: nn.Conv2d(3, 8, 3, padding=2, padding_mode="reflect"), (2, 3, 7, 6)),
    "replicate": (lambda: nn.Conv1d(3, 8, 3, padding=2, padding_mode="replicate"), (2, 3, 9)),
    "circular": (lambda: nn.Conv3d(2, 4, 2, padding=1, padding_mode="circular"), (1, 2, 4, 4, 4)),
    "same": (lambda: nn.Conv2d(3, 8, (3, 5), padding="same"), (2, 3, 7, 6)),
    "not square": (lambda: nn.Conv2d(3, 8, (1, 5), padding=(0, 2)), (2, 3, 7, 6)),
    "unbatched": (lambda: nn.Conv1d(3, 8, 3), (3, 9)),
    "transposed groups": (
        lambda: nn.ConvTranspose2d(6, 4, (3, 2), stride=(2, 1), groups=2),
        (2, 6, 4, 5),
    ),
    "transposed dilation": (
        lambda: nn.ConvTranspose1d(4, 6, 3, dilation=2, output_padding=1, stride=2),
        (2, 4, 5),
    ),
    "transposed 3d": (lambda: nn.ConvTranspose3d(2, 3, 2), (1, 2, 3, 3, 3)),
}


@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_convolutions(name: str) -> None:
    build, shape = CONVOLUTIONS[name]
    plain = Host(build()).double()
    model = fill(li.inject(copy.deepcopy(plain), {**CONFIG, "targets": ["layer"]}))
    A, B = (p.detach() for p in li.adapter_parameters(model).values())
    W = plain.layer.weight.detach()
    delta = SCALE * B @ A
    wide = copy.deepcopy(plain)
    wide.layer.weight.data += (delta.t() if "transposed" in name else delta).reshape(W.shape)
    x = torch.randn(shape, dtype=torch.float64)
    assert error(plain(x), wide(x)) > 0.01
    assert error(model(x), wide(x)) < 1e-12
    li.merge(model)
    assert error(model(x), wide(x)) < 1e-12


@pytest.mark.parametrize("norm_type", [2.0, 1.0, 3.0])
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_embedding_max_norm(dtype: torch.dtype, norm_type: float) -> None:
    plain = Host(nn.Embedding(300, 16, max_norm=3.9, norm_type=norm_type)).to(dtype)
    model = li.inject(copy.deepcopy(plain), {**CONFIG, "targets": ["layer"]})
    ids = torch.randint(0, 300, (9, 40))
    W = model.layer._parameters["weight"]
    assert W is not None
    bits, version = W.detach().clone(), W._version
    assert same_bits(model(ids), copy.deepcopy(plain)(ids))
    fill(model)
    found = model(ids)
    assert same_bits(W, bits)
    assert W._version == version
    site = li.adapter_state(model).sites["layer"]
    rows = (bits.double() + SCALE * (site.B.double() @ site.A.double()).t())[ids]
    norm = rows.norm(norm_type, dim=-1, keepdim=True)
    assert 0.1 < (norm > 3.9).double().mean() < 1 or norm_type == 1.0
    wanted = torch.where(norm > 3.9, rows * 3.9 / (norm + 1e-7), rows)
    assert error(found, wanted) < TOLERANCE[dtype]


def test_embedding_max_norm_gradient_against_finite_differences() -> None:
    model = injected(KINDS["embedding max_norm"], torch.float64)
    ids = torch.arange(7)
    g = torch.randn(7, 5, dtype=torch.float64)
    (model(ids) * g).sum().backward()
    for parameter in li.adapter_parameters(model).values():
        measured = finite_differences(lambda: (model(ids) * g).sum(), parameter)
        assert error(parameter.grad, measured) < 1e-6


@pytest.mark.parametrize("options", [{"sparse": True}, {"scale_grad_by_freq": True}], ids=str)
def test_embedding_options_keep_their_gradients(options: dict[str, Any]) -> None:
    kind = Kind(lambda: nn.Embedding(7, 5, **options), (7, 5), ["ids"], transposed=True)
    plain = host(kind, torch.float64)
    model = fill(li.inject(copy.deepcopy(plain), kind.config))
    A, B = li.adapter_parameters(model).values()
    ids = torch.tensor([[1, 1, 1], [2, 1, 5]])
    g = torch.randn(2, 3, 5, dtype=torch.float64)
    (model(ids) * g).sum().backward()
    wide = [t.detach().clone().requires_grad_() for t in (A, B)]
    if options.get("sparse"):
        plain.layer.sparse = False  # the dense reference differentiates a sum, which is not sparse
    (dense_output(kind, plain, *wide, [ids]) * g).sum().backward()
    assert error(A.grad, wide[0].grad) < 1e-12
    assert error(B.grad, wide[1].grad) < 1e-12


@settings(max_examples=40, deadline=None)
@given(
    sizes=st.lists(st.integers(1, 5), min_size=2, max_size=5),
    data=st.data(),
    transposed=st.booleans(),
    rank=st.integers(1, 2),
    seed=st.integers(0, 9999),
)
def test_fused_slices(
    sizes: list[int], data: st.DataObject, transposed: bool, rank: int, seed: int
) -> None:
    torch.manual_seed(seed)
    names = [f"s{i}" for i in range(len(sizes))]
    wide = [n for n, size in zip(names, sizes, strict=True) if size >= rank]
    if not wide:
        return
    adapt = data.draw(st.lists(st.sampled_from(wide), min_size=1, unique=True))
    n_out = sum(sizes)
    layer = conv1d(n_out, 3) if transposed else nn.Linear(3, n_out)
    model = Host(layer).double()
    x = torch.randn(4, 3, dtype=torch.float64)
    base, W = model(x), layer.weight.detach().clone()
    rule = {"match": "layer", "slices": dict(zip(names, sizes, strict=True)), "adapt": adapt}
    fill(li.inject(model, {"rank": rank, "alpha": 3, "targets": [rule]}))
    y = model(x)
    site = li.adapter_state(model).sites["layer"]
    delta = torch.zeros(n_out, 3, dtype=torch.float64)
    row = start = part = 0
    for name, size in zip(names, sizes, strict=True):
        if name in adapt:
            A = site.A[part * rank : (part + 1) * rank]
            delta[start : start + size] = 3 / rank * site.B[row : row + size] @ A
            row, part = row + size, part + 1
        else:
            assert same_bits(y[:, start : start + size], base[:, start : start + size])
        start += size
    assert torch.allclose(y, base + x @ delta.t(), atol=1e-12)
    li.merge(model, undo=False)
    moved = (layer.weight - W).t() if transposed else layer.weight - W
    assert torch.equal(moved == 0, delta == 0)
    assert torch.allclose(moved, delta, atol=1e-12)


# ------------------------------------------------------------------------------ numbers that travel


def test_alpha_lost(tmp_path: Path) -> None:
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


NAMES = [
    "mlp", "lora_A", "lora_B", "weight", "bias", "default.1", "a%2E1", "%", "a:b", "A", "forward",
    "training", "_parameters", "layer", "with space", "ünïcode", "x" * 100, "base", "None",
    "__class__",
]  # fmt: skip


@pytest.mark.parametrize("name", NAMES)
def test_name_collisions(name: str, tmp_path: Path) -> None:
    class Mlp(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.lora_in = nn.Linear(5, 5)
            self.mlp = nn.Linear(5, 5)
            self.lora_A = nn.Linear(5, 5)

        def forward(self, x: Tensor) -> Tensor:
            found: Tensor = self.lora_A(self.mlp(self.lora_in(x)))
            return found

    model = Mlp()
    plain, before = copy.deepcopy(model), snapshot(model)
    config = {**CONFIG, "targets": ["mlp", "lora_in", "lora_A"], "bias": "all"}
    li.inject(model, config, "other")
    li.inject(model, config, name)
    fill(fill(model, name), "other")
    x = torch.randn(2, 5)
    wide = with_deltas(plain, model, name)
    wide.load_state_dict(
        {k: v.double() for k, v in li.adapter_state(model, name).trained.items()}, strict=False
    )
    assert error(model(x), wide(x.double())) < TOLERANCE[torch.float32]
    assert set(li.adapters(model)) == {"other", name}
    assert len(model.state_dict()) == len(plain.state_dict()) + 2 * (6 + 3)
    wanted = model(x)
    li.save_adapter(model, tmp_path / "a", name)
    li.eject(model)
    assert snapshot(model) == before
    li.load_adapter(model, tmp_path / "a", name)
    assert same_bits(model(x), wanted)


@pytest.mark.parametrize("name", ["", None, 3, "default"])
def test_name_collisions_are_refused_at_once(name: Any) -> None:
    model = injected(KINDS["linear"])
    before = snapshot(model)
    with pytest.raises(li.StateError, match="adapter"):
        li.inject(model, {**CONFIG, "targets": ["layer"]}, name)
    assert snapshot(model) == before


def _drop(tensors: dict[str, Tensor]) -> None:
    del tensors[next(k for k in tensors if "lora_B" in k and "layer" in k)]


def _add(tensors: dict[str, Tensor]) -> None:
    tensors["base_model.model.nowhere.lora_A.weight"] = torch.ones(2, 5)
    tensors["base_model.model.nowhere.lora_B.weight"] = torch.ones(6, 2)


def _stray(tensors: dict[str, Tensor]) -> None:
    tensors["base_model.model.layer.lora_magnitude_vector"] = torch.ones(6)


def _misshape(tensors: dict[str, Tensor]) -> None:
    key = next(k for k in tensors if "lora_B" in k and "layer" in k)
    tensors[key] = torch.ones(7, 2)


def _misrank(tensors: dict[str, Tensor]) -> None:
    key = next(k for k in tensors if "lora_A" in k and "layer" in k)
    tensors[key] = torch.ones(1, 5)


@pytest.mark.parametrize("damage", [_drop, _add, _stray, _misshape, _misrank])
def test_partial_load(damage: Callable[[dict[str, Tensor]], None], tmp_path: Path) -> None:
    plain = Host(nn.Linear(5, 6))
    model = fill(li.inject(copy.deepcopy(plain), {**CONFIG, "targets": ["layer", "before"]}))
    li.save_adapter(model, tmp_path / "a")
    path = tmp_path / "a" / "adapter_model.safetensors"
    tensors = load_file(path)
    damage(tensors)
    save_file(tensors, path)  # as peft itself would write it, without our metadata
    before = snapshot(plain)
    with pytest.raises(li.FormatError):
        li.load_adapter(plain, tmp_path / "a")
    assert snapshot(plain) == before


def test_partial_load_of_another_base(tmp_path: Path) -> None:
    plain = Host(nn.Linear(5, 6))
    model = fill(li.inject(copy.deepcopy(plain), {**CONFIG, "targets": ["layer"]}))
    li.save_adapter(model, tmp_path / "a")
    other = Host(nn.Linear(5, 6))
    before = snapshot(other)
    with pytest.raises(li.FormatError, match=r"another base.*layer"):
        li.load_adapter(other, tmp_path / "a")
    assert snapshot(other) == before
    li.load_adapter(other, tmp_path / "a", base="any")
    li.load_adapter(plain.to(torch.bfloat16), tmp_path / "a")


def test_partial_load_by_an_argument_that_names_what_is_let_go(tmp_path: Path) -> None:
    config = {**CONFIG, "targets": ["layer", "before"], "train": ["after"]}
    plain = Host(nn.Linear(5, 6))
    model = fill(li.inject(copy.deepcopy(plain), config))
    li.save_adapter(model, tmp_path / "a")
    with pytest.raises(li.FormatError, match="matches nothing"):
        li.load_adapter(plain, tmp_path / "a", leave_out=["aftr"])
    li.load_adapter(plain, tmp_path / "a", leave_out=["before", r"after\..*"])
    info = li.adapters(plain)["default"]
    assert (list(info.sites), info.trained) == (["layer"], ())


# -------------------------------------------------------------------------------- state left behind


def test_half_done() -> None:
    """The third of three sites cannot carry an adapter, which only its class can tell."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        scripted = torch.jit.trace(nn.Linear(5, 5), torch.randn(1, 5))
    for third in (scripted, nn.LazyLinear(5)):
        model = nn.Sequential(nn.Linear(5, 5), nn.Linear(5, 5), third)
        before = [(n, id(m), type(m), sorted(m.__dict__)) for n, m in model.named_modules()]
        keys = list(model.state_dict())
        with pytest.raises((li.LayerError, li.MatchError), match="2"):
            li.inject(model, {**CONFIG, "targets": ["0", "1", r"2(\.\w+)?"]})
        assert [(n, id(m), type(m), sorted(m.__dict__)) for n, m in model.named_modules()] == before
        assert list(model.state_dict()) == keys
        assert all(p.requires_grad for p in model.parameters())


def saved_tensors(run: Callable[[], Any]) -> list[Tensor]:
    saved: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        run()
    return saved


@pytest.mark.parametrize("routed", [False, True])
@pytest.mark.parametrize("compute", ["base", "float32"])
@pytest.mark.parametrize("kind", ["linear", "conv1d", "equal slices"])
def test_mixed_dtypes(kind: str, compute: str, routed: bool) -> None:
    """Over a bf16 base no float32 copy of the input is made, let alone kept for the backward."""
    model = li.inject(host(KINDS[kind], torch.bfloat16), {**KINDS[kind].config, "compute": compute})
    fill(model)
    x = torch.randn(64, 7, 5).bfloat16().requires_grad_()
    if routed:
        with li.routed(model, ["default"] * 32 + [None] * 32):
            saved = saved_tensors(lambda: model(x))
    else:
        saved = saved_tensors(lambda: model(x))
    assert saved
    wide = [t for t in saved if t.dtype == torch.float32 and t.numel() >= x.numel()]
    assert wide == []
    copies = {t.data_ptr() for t in saved if t.numel() == x.numel() and t.shape[-1] == 5}
    if not routed:
        assert copies <= {x.data_ptr()}, "a copy of x is kept beside x"


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("key", ["layer.lora_A", "layer.lora_B", "after.bias"])
def test_non_finite(key: str, value: float) -> None:
    model = Host(nn.Linear(5, 6))
    fill(li.inject(model, {**CONFIG, "targets": ["layer", "before"], "train": ["after"]}))
    with torch.no_grad():
        li.adapter_parameters(model)[key].view(-1)[1] = value
    before = snapshot(model)
    for undo in (True, False):
        with pytest.raises(li.StateError, match=key.rpartition(".")[0]):
            li.merge(model, undo=undo)
        assert snapshot(model) == before


@pytest.mark.parametrize(
    ("dtype", "size"), [(torch.float16, 1e3), (torch.bfloat16, 1e25), (torch.float32, 1e25)]
)
def test_non_finite_products_of_finite_factors(dtype: torch.dtype, size: float) -> None:
    model = Host(nn.Linear(5, 6)).to(dtype)
    fill(li.inject(model, {**CONFIG, "targets": ["before", "layer"]}), std=1e-3)
    with torch.no_grad():
        for parameter in li.adapter_parameters(model).values():
            if parameter.shape != (2, 2):
                parameter.mul_(size * 1e3)
    before = snapshot(model)
    for undo in (True, False):
        with pytest.raises(li.LayerError, match=r"layer\.weight"):
            li.merge(model, undo=undo)
        assert snapshot(model) == before


def test_second_round(tmp_path: Path) -> None:
    """Ejected and injected again, saved, loaded and saved again: nothing drifts."""
    plain = host(KINDS["equal slices"])
    model = fill(li.inject(copy.deepcopy(plain), {**KINDS["equal slices"].config, "dropout": 0.1}))
    li.save_adapter(model, tmp_path / "one")
    li.eject(model)
    li.load_adapter(model, tmp_path / "one")
    li.save_adapter(model, tmp_path / "two")
    again = li.load_adapter(copy.deepcopy(plain), tmp_path / "two")
    x = torch.randn(3, 5)
    assert same_bits(again.eval()(x), model.eval()(x))
    assert li.adapters(again) == li.adapters(model)
    first, second = (load_file(tmp_path / n / "adapter_model.safetensors") for n in ("one", "two"))
    assert first.keys() == second.keys()
    assert all(same_bits(t, second[key]) for key, t in first.items())


def test_train_eval(tmp_path: Path) -> None:
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


RESIZED = [
    {"targets": ["wte"]},
    {"targets": ["lm_head"]},
    {"targets": ["c_attn"], "train": ["wte"]},
    {"targets": ["wte", "c_attn"]},
]


@pytest.mark.parametrize("part", ["", "transformer"])
@pytest.mark.parametrize("config", RESIZED, ids=str)
def test_resize(config: dict[str, Any], part: str) -> None:
    """Right, or an error that says to eject first."""
    model = fill(li.inject(gpt2(), {**CONFIG, **config}))
    ids = torch.arange(10).view(2, 5)
    wanted, before = model(ids).logits, snapshot(model)
    with pytest.raises(li.LayerError, match="Eject first, resize, then inject again"):
        model.get_submodule(part).resize_token_embeddings(20)
    assert snapshot(model) == before
    assert same_bits(model(ids).logits, wanted)
    li.eject(model)
    model.resize_token_embeddings(20)
    fill(li.inject(model, {**CONFIG, **config}))
    assert model(ids).logits.shape == (2, 5, 20)


def test_resize_of_what_is_not_adapted() -> None:
    model = fill(li.inject(gpt2(), {**CONFIG, "targets": ["c_attn"]}))
    ids = torch.arange(10).view(2, 5)
    wanted = model(ids).logits
    model.resize_token_embeddings(20)
    assert error(model(ids).logits[..., :13], wanted) < TOLERANCE[torch.float32]
    assert model.lm_head.weight is model.transformer.wte.weight


@pytest.mark.parametrize("targets", [["c_attn", "c_proj"], ["wte"], [r"c_fc\.weight"]], ids=str)
@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing(reentrant: bool, targets: list[str]) -> None:
    """Works, or says what to call: with frozen embeddings the reentrant mode passes no gradient."""
    model = fill(li.inject(gpt2(), {**CONFIG, "targets": targets})).train()
    ids = torch.arange(10).view(2, 5)
    model(ids, labels=ids).loss.backward()
    wanted = {n: p.grad for n, p in li.adapter_parameters(model).items()}
    model.zero_grad()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # another name in newer versions
        model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    refused = refusal(lambda: model(ids, labels=ids).loss.backward(), li.LayerError)
    if refused is not None:  # newer versions of transformers call it themselves
        assert reentrant
        assert "enable_input_require_grads" in str(refused)
        model.enable_input_require_grads()
        model(ids, labels=ids).loss.backward()
    for name, parameter in li.adapter_parameters(model).items():
        assert error(parameter.grad, wanted[name]) < 1e-5


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad:UserWarning")
@pytest.mark.parametrize(
    ("config", "routed"),
    [
        ({"targets": ["0"]}, False),
        ({"targets": ["0"]}, True),
        ({"targets": [r"0\.weight"]}, False),
        ({"train": ["0"]}, False),
        ({"bias": "all"}, False),
    ],
    ids=str,
)
def test_gradient_checkpointing_never_trains_in_vain(config: dict[str, Any], routed: bool) -> None:
    model = fill(li.inject(nn.Sequential(nn.Linear(5, 5)), {**CONFIG, **config}))
    x = torch.randn(2, 5)
    context = li.routed(model, ["default", None]) if routed else contextlib.nullcontext()
    words = "no input of the checkpoint requires a gradient"
    with context, pytest.raises(li.LayerError, match=words):
        checkpoint(model, x, use_reentrant=True)
    checkpoint(model.eval(), x, use_reentrant=True)
