"""Attention, encoders and decoders, which read the weights of their children or fuse them."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import TOLERANCE, error, fill, same_bits
from helpers.reference import EXACT, adapted, hold, random, saved, with_deltas
from helpers.refusals import refused
from torch import Tensor, nn

import lora_inject as li


class Attends(nn.Module):
    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.attn = nn.MultiheadAttention(8, 2, batch_first=True, **options)

    def forward(self, x: Tensor) -> Tensor:
        k, v = x[..., : self.attn.kdim], x[..., : self.attn.vdim]
        return self.attn(x, k, v, need_weights=False)[0]


def test_attention_with_separate_weights_named_as_a_module(tmp_path: Path) -> None:
    plain, x = Attends(kdim=6, vdim=4).double(), random(2, 3, 8)
    model = adapted(plain, "attn")
    sites = li.adapters(model)["default"].sites
    assert {name: (s.in_features, s.out_features) for name, s in sites.items()} == {
        "attn.q_proj_weight": (8, 8),
        "attn.k_proj_weight": (6, 8),
        "attn.v_proj_weight": (4, 8),
        "attn.out_proj": (8, 8),
    }
    hold(plain, model, lambda m: m(x))
    path, _ = saved(model, tmp_path, "native")
    assert error(li.load_adapter(copy.deepcopy(plain), path)(x), model(x)) < EXACT


@pytest.mark.parametrize("options", [{}, {"kdim": 6, "vdim": 6}, {"bias": False}], ids=str)
@pytest.mark.parametrize("target", ["attn", "out_proj", r"out_proj\.weight"])
def test_attention_out_proj(target: str, options: dict[str, Any]) -> None:
    plain = Attends(**options).double()
    model = adapted(plain, target)
    base = {n: p for n, p in model.named_parameters() if "lora" not in n}
    before = {n: (p.detach().clone(), p._version) for n, p in base.items()}
    x = random(2, 3, 8)
    wanted = with_deltas(plain, model)(x)
    assert error(plain(x), wanted) > 0.01
    for training in (False, True):
        assert error(model.train(training)(x), wanted) < 1e-12
    model(x).sum().backward()
    assert {n: p._version for n, p in base.items()} == {n: v for n, (_, v) in before.items()}
    assert all(same_bits(p, before[n][0]) for n, p in base.items())
    hold(plain, model, lambda m: m(x))


EVERYTHING = ["linear1", "linear2", "self_attn"]


@pytest.mark.parametrize("targets", [[*EVERYTHING, "multihead_attn"], ["out_proj"]], ids=str)
def test_a_decoder_layer(targets: list[str]) -> None:
    plain = nn.TransformerDecoderLayer(8, 2, 12, dropout=0.0, batch_first=True).double()
    x, memory = random(2, 3, 8), random(2, 4, 8)
    model = adapted(plain, *targets)
    assert li.unreached(model, lambda: model(x, memory)) == []
    for training in (True, False):
        hold(plain, model.train(training), lambda m: m(x, memory))


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors:UserWarning")
@pytest.mark.parametrize("nested", [False, True])
def test_an_encoder_with_padding(nested: bool) -> None:
    layer = nn.TransformerEncoderLayer(8, 2, 12, dropout=0.0, batch_first=True)
    plain = nn.TransformerEncoder(layer, 2, enable_nested_tensor=nested).double()
    mask = torch.tensor([[False] * 4, [False, False, False, True]])
    x, model = random(2, 4, 8), adapted(plain, *EVERYTHING)

    def run(m: nn.Module) -> Tensor:
        y: Tensor = m(x, src_key_padding_mask=mask)
        return y[:, :3]  # what is padded is nobody's business

    hold(plain, model.train(), run)
    wide = with_deltas(plain, model)
    with torch.no_grad():
        assert error(run(model.eval()), run(wide.train())) < EXACT


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors:UserWarning")
@pytest.mark.parametrize("targets", [EVERYTHING, ["linear2"], ["self_attn"], ["in_proj_weight"]])
def test_a_nested_batch_where_torch_takes_one(targets: list[str]) -> None:
    """In eval without gradients: torch attends by a kernel that refuses what is lazy."""
    layer = nn.TransformerEncoderLayer(8, 2, 12, dropout=0.0, batch_first=True)
    plain = nn.TransformerEncoder(layer, 2).double()
    model, rows = adapted(plain, *targets).eval(), [random(n, 8) for n in (3, 1, 4)]
    wide, batch = with_deltas(plain, model).eval(), torch.nested.nested_tensor(rows)
    with torch.no_grad():
        for _ in range(2):
            for row, y in zip(rows, model(batch).unbind(), strict=True):
                assert error(y, wide(row[None])[0]) < EXACT
        with li.disabled(model):
            assert error(model(batch).unbind()[0], plain.eval()(rows[0][None])[0]) < EXACT


@pytest.mark.parametrize("stacked", [False, True], ids=["layer", "encoder"])
@pytest.mark.parametrize("targets", [EVERYTHING, ["linear2"], ["self_attn"], ["out_proj"]], ids=str)
def test_encoder_fast_path(targets: list[str], stacked: bool) -> None:
    plain: nn.Module = nn.TransformerEncoderLayer(8, 2, 12, dropout=0.0, batch_first=True)
    if stacked:
        plain = nn.TransformerEncoder(plain, 2, enable_nested_tensor=False)  # type: ignore[arg-type]
    model, x = adapted(plain, *targets), torch.randn(2, 5, 8)
    wanted = with_deltas(plain, model)(x.double())
    assert error(plain(x), wanted) > 0.01
    for training in (True, False):
        for grad in (True, False):
            with torch.set_grad_enabled(grad):
                y = model.train(training)(x)
            assert error(y, wanted) < (1 + stacked) * TOLERANCE[torch.float32]
    assert li.unreached(model, lambda: model(x)) == []


def test_dropout_acts_in_layers_that_are_called_and_is_refused_where_attention_reads() -> None:
    model = nn.TransformerEncoderLayer(8, 2, 12, dropout=0.0, batch_first=True)
    with refused(li.MatchError, "out_proj", "0.5"):
        li.inject(model, {"rank": 2, "dropout": 0.5, "targets": ["out_proj"]})
    x, model = torch.randn(2, 5, 8), adapted(model, "linear1", dropout=0.5)
    assert not torch.equal(model.train()(x), model(x))
    assert torch.equal(model.eval()(x), model(x))


@pytest.mark.slow
def test_encoder_fast_path_compiled() -> None:
    plain = nn.TransformerEncoderLayer(8, 2, 12, dropout=0.0, batch_first=True)
    model, x = adapted(plain, *EVERYTHING).eval(), torch.randn(2, 5, 8)
    wanted = with_deltas(plain, model)(x.double())
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    for grad in (True, False):
        with torch.set_grad_enabled(grad):
            assert error(compiled(x), wanted) < TOLERANCE[torch.float32]


def test_pefts_files_hold_no_attention_with_dora(tmp_path: Path) -> None:
    """PEFT raises where it should load one, and so did reading it here."""
    model = fill(li.inject(Attends().double(), {"rank": 2, "variant": "dora", "targets": ["attn"]}))
    with refused(li.FormatError, "attn.in_proj_weight", 'format="native"'):
        li.save_adapter(model, tmp_path / "a")
    assert not any(tmp_path.iterdir())
