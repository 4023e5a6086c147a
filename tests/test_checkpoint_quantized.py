"""Merging on disk into quantized checkpoints, as plain floats: what a live merge leaves."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import error, fill, same_bits
from helpers.checkpoints import LLAMA, adapter, load_checkpoint, save_checkpoint, site
from torch import nn
from typer.testing import CliRunner

import lora_inject as li
from lora_inject.checkpoint import MergeOptions, merge_checkpoint, verify_checkpoint
from lora_inject.checkpoint import read as reading
from lora_inject.cli import app
from lora_inject.errors import CheckpointError
from lora_inject.functional import dense_delta

N = 64
BF16 = MergeOptions(dequantize="bfloat16")
NF4 = {"quant_type": "nf4", "compute_dtype": torch.float32}
FORMS: dict[str, tuple[str, dict[str, Any]]] = {
    "nf4": ("Linear4bit", NF4),
    "nf4, scales once": ("Linear4bit", {**NF4, "compress_statistics": False}),
    "nf4, stored as floats": ("Linear4bit", {**NF4, "quant_storage": torch.bfloat16}),
    "fp4": ("Linear4bit", {"compute_dtype": torch.float32}),
    "int8": ("Linear8bitLt", {"has_fp16_weights": False}),
}
quiet = pytest.mark.filterwarnings("ignore")


def bitsandbytes(form: str, dtype: torch.dtype = torch.float32, seed: int = 0) -> Any:
    layers = pytest.importorskip("bitsandbytes").nn
    cls, options = FORMS[form]
    torch.manual_seed(seed)
    plain = nn.Sequential(nn.Linear(N, N), nn.Tanh(), nn.Linear(N, 32)).to(dtype)
    made = [getattr(layers, cls)(N, width, **options) for width in (N, 32)]
    net = nn.Sequential(made[0], nn.Tanh(), made[1]).to(dtype)
    net.load_state_dict(plain.state_dict())
    return net.to("cpu").train()


def stored(net: nn.Module, folder: Path, shards: int = 1) -> Path:
    tensors = {name: tensor.contiguous() for name, tensor in net.state_dict().items()}
    return save_checkpoint(folder, tensors, shards, {"quantization_config": {"load_in_4bit": True}})


@quiet
@pytest.mark.parametrize("form", FORMS)
def test_files_of_bitsandbytes_merge_as_the_live_model_does(
    form: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reading, "BLOCK_ELEMENTS", 1000)  # blocks of scales must follow the rows
    dtype = torch.bfloat16 if form == "nf4" else torch.float32
    net = bitsandbytes(form, dtype)
    base = stored(net, tmp_path / "base", shards=3)
    state = li.adapter_state(fill(li.inject(net, {"rank": 2, "targets": ["0"]})))
    with pytest.raises(CheckpointError, match=r"bitsandbytes.*--dequantize"):
        merge_checkpoint(base, [state], tmp_path / "out")
    for kind in ("bfloat16", "float32"):
        out, options = tmp_path / kind, MergeOptions(dequantize=kind)
        report = merge_checkpoint(base, [state], out, options=options)
        actions = {name: row.action for name, row in report.tensors.items()}
        assert actions == {"0.weight": "folded", "2.weight": "dequantized"}
        found = load_checkpoint(out)
        wanted = dict(li.merged_weights(net, dequantize=kind))
        assert found.keys() == wanted.keys(), "scales and tables are gone"
        for name in ("0.weight", "2.weight"):
            assert found[name].dtype == wanted[name].dtype
            assert error(found[name], wanted[name].double()) < 1e-6, name
        assert "quantization_config" not in json.loads((out / "config.json").read_text())
        assert verify_checkpoint(base, [state], out, options=options).problems == ()
    other = stored(bitsandbytes(form, dtype, seed=1), tmp_path / "other")
    with pytest.raises(CheckpointError, match=r"made on another base.*'0.weight'"):
        merge_checkpoint(other, [state], tmp_path / "no", options=BF16)


@pytest.mark.parametrize("shards", [1, 2])
def test_mxfp4_experts_merge_as_transformers_dequantizes_them(tmp_path: Path, shards: int) -> None:
    mxfp4 = pytest.importorskip("transformers.integrations.mxfp4")
    torch.manual_seed(0)
    E, n_in, n_out, name = 3, 64, 40, "model.layers.0.mlp.experts.gate_up_proj"
    tensors = {
        f"{name}_blocks": torch.randint(0, 256, (E, n_out, n_in // 32, 16), dtype=torch.uint8),
        f"{name}_scales": torch.randint(118, 124, (E, n_out, n_in // 32), dtype=torch.uint8),
        "model.norm.weight": torch.ones(8).bfloat16(),
    }
    W = mxfp4.convert_moe_packed_tensors(*list(tensors.values())[:2])
    config = {"quantization_config": {"quant_method": "mxfp4"}}
    base = save_checkpoint(tmp_path / "base", tensors, shards, config)
    state = adapter(site(name, (E, n_in, n_out), experts=E, transposed=True, size=0.1))
    merge_checkpoint(base, [state], tmp_path / "out", options=BF16)
    found = load_checkpoint(tmp_path / "out")
    held = state.sites[name]
    wanted = W.double() + dense_delta(held.spec, held.A, held.B)
    assert same_bits(found[name], wanted.float().bfloat16())
    assert found.keys() == {name, "model.norm.weight"}
    assert verify_checkpoint(base, [state], tmp_path / "out", options=BF16).problems == ()
    if shards > 1:  # each is written where its blocks were, and not into one file for all
        assert len(list((tmp_path / "out").glob("*.safetensors"))) == shards


def damaged(change: Any) -> dict[str, torch.Tensor]:
    tensors = {k: t.contiguous() for k, t in bitsandbytes("nf4").state_dict().items()}
    change(tensors)
    return tensors


def _state(**changes: Any) -> Any:
    def change(tensors: dict[str, torch.Tensor]) -> None:
        key = "0.weight.quant_state.bitsandbytes__nf4"
        said = json.loads(bytes(tensors[key].tolist())) | changes
        tensors[key] = torch.tensor(list(json.dumps(said).encode()), dtype=torch.uint8)

    return change


DAMAGE = {
    "blocksize 0": _state(blocksize=0),
    "blocksize too small": _state(blocksize=32),
    "shape too large": _state(shape=[1 << 40, 64]),
    "shape negative": _state(shape=[-64, -64]),
    "no offset": _state(nested_offset="x"),
    "dtype": _state(dtype="int8"),
    "no absmax": lambda tensors: tensors.pop("0.weight.absmax"),
    "short absmax": lambda t: t.update({"0.weight.absmax": t["0.weight.absmax"][:3].clone()}),
}


@quiet
def test_the_command_dequantizes(tmp_path: Path) -> None:
    net = bitsandbytes("nf4")
    base = stored(net, tmp_path / "base")
    fill(li.inject(net, {"rank": 2, "targets": ["0"]}))
    path, out = li.save_adapter(net, tmp_path / "adapter"), tmp_path / "out"
    arguments = [str(base), str(path), "--output", str(out), "--dequantize", "bfloat16"]
    result = CliRunner().invoke(app, ["merge", *arguments, "--verify"])
    assert result.exit_code == 0, result.output
    assert {t.dtype for k, t in load_checkpoint(out).items() if "weight" in k} == {torch.bfloat16}


@quiet
@pytest.mark.parametrize("how", DAMAGE)
def test_parts_that_do_not_fit_each_other_are_refused(how: str, tmp_path: Path) -> None:
    base = save_checkpoint(tmp_path / "base", damaged(DAMAGE[how]))
    with pytest.raises(CheckpointError, match=r"dequantize '0.weight': its (parts|settings)"):
        merge_checkpoint(base, [adapter(site("2", (32, N)))], tmp_path / "out", options=BF16)


def test_what_nothing_here_knows_is_refused_with_the_way_out(tmp_path: Path) -> None:
    tensors = {"q.qweight": torch.zeros(8, 8, dtype=torch.int32), "v.weight": torch.zeros(8, 8)}
    base = save_checkpoint(tmp_path / "base", tensors, 1, LLAMA)
    scaled = {"q.weight": torch.zeros(8, 8, dtype=torch.int8), "q.weight_scale": torch.ones(8)}
    other = save_checkpoint(tmp_path / "other", scaled | {"v.weight": torch.zeros(8, 8)})
    with pytest.raises(CheckpointError, match=r"dequantize 'q.weight': .*int8 with scales"):
        merge_checkpoint(other, [adapter(site("v", (8, 8)))], tmp_path / "out", options=BF16)
    with pytest.raises(CheckpointError, match=r"'q.qweight'.*packed.*16-bit checkpoint"):
        merge_checkpoint(base, [adapter(site("v", (8, 8)))], tmp_path / "out", options=BF16)
    plain = save_checkpoint(tmp_path / "plain", {"v.weight": torch.zeros(8, 8)})
    with pytest.raises(
        CheckpointError, match=r"none of its tensors is quantized.*dtype='bfloat16'"
    ):
        merge_checkpoint(plain, [adapter(site("v", (8, 8)))], tmp_path / "out", options=BF16)
    with pytest.raises(CheckpointError, match="write dequantize 'int8'"):
        MergeOptions(dequantize="int8")
