"""Merging on disk into quantized checkpoints, as plain floats or in their format again."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import error, fill, same_bits
from helpers.checkpoints import (
    LLAMA,
    adapter,
    assert_equal_to_dense,
    assert_merged,
    assert_verified,
    dense,
    load_checkpoint,
    merged,
    save_checkpoint,
    site,
)
from safetensors.torch import load_file
from torch import Tensor, nn

import lora_inject as li
from lora_inject.checkpoint import (
    MergeOptions,
    WeightedAdapter,
    merge_checkpoint,
    plan_merge,
)
from lora_inject.core.files import row_reader as reading
from lora_inject.core.functional.weight import dense_delta
from lora_inject.errors import CheckpointError

N = 64
BF16, AGAIN = MergeOptions(dequantize="bfloat16"), MergeOptions(requantize=True)
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


def kept(merged: Tensor, before: Tensor, exact: Tensor) -> float:
    """The share of the delta that the merged weight has, from dense values."""
    D = exact.double() - before.double()
    return float(((merged.double() - before.double()) * D).sum() / D.square().sum())


def assert_same_files(base: Path, out: Path, changed: set[str]) -> None:
    """Everything but some tensors is what it was, bit for bit, in the same files."""
    assert {p.name for p in base.iterdir()} == {p.name for p in out.iterdir()}
    for path in base.iterdir():
        if path.suffix == ".json":
            assert (out / path.name).read_bytes() == path.read_bytes()
        else:
            before, after = load_file(path), load_file(out / path.name)
            assert before.keys() == after.keys()
            for name in before.keys() - changed:
                assert same_bits(before[name], after[name]), name


def of_library(tensors: dict[str, Tensor], form: str) -> Tensor:
    """The values of '0.weight' as bitsandbytes reads its parts."""
    if form == "int8":
        return tensors["0.weight"].float() * tensors["0.SCB"].float()[:, None] / 127
    functional = pytest.importorskip("bitsandbytes").functional
    parts = {name: t for name, t in tensors.items() if name.startswith("0.weight.")}
    state = functional.QuantState.from_dict(parts, torch.device("cpu"))
    return functional.dequantize_4bit(tensors["0.weight"], state).float()


@quiet
@pytest.mark.parametrize("form", FORMS)
def test_files_of_bitsandbytes_merge_as_the_live_model_does(form, tmp_path, monkeypatch) -> None:
    """Into plain floats, and quantized again; only when asked, and into their own base."""
    monkeypatch.setattr(reading, "BLOCK_ELEMENTS", 1000)  # pieces must follow the blocks of scales
    dtype = torch.bfloat16 if form == "nf4" else torch.float32
    net = bitsandbytes(form, dtype)
    base = stored(net, tmp_path / "base", shards=3)
    fill(li.inject(net, {"rank": 2, "targets": ["0"]}))
    with torch.no_grad():
        for parameter in li.adapter_parameters(net).values():
            parameter.mul_(0.15)  # a delta of the size of W
    state = li.adapter_state(net)
    with pytest.raises(CheckpointError, match=r"bitsandbytes.*--dequantize"):
        merge_checkpoint(base, [state], tmp_path / "no")
    other = stored(bitsandbytes(form, dtype, seed=1), tmp_path / "other")
    with pytest.raises(CheckpointError, match=r"made on another base.*'0.weight'"):
        merge_checkpoint(other, [state], tmp_path / "no", options=BF16)
    for kind in ("bfloat16", "float32"):
        out = tmp_path / kind
        report = merge_checkpoint(base, [state], out, options=MergeOptions(dequantize=kind))
        actions = {name: row.action for name, row in report.tensors.items()}
        assert actions == {"0.weight": "folded", "2.weight": "dequantized"}
        written, wanted = load_checkpoint(out), dict(li.merged_weights(net, dequantize=kind))
        assert written.keys() == wanted.keys(), "scales and tables are gone"
        for name in ("0.weight", "2.weight"):
            assert written[name].dtype == wanted[name].dtype
            assert error(written[name], wanted[name].double()) < 1e-6, name
        assert "quantization_config" not in json.loads((out / "config.json").read_text())
        assert_verified(base, [state], out, dequantize=kind)

    report = merge_checkpoint(base, [state], tmp_path / "out", options=AGAIN)
    before, after = load_checkpoint(base), load_checkpoint(tmp_path / "out")
    new = {f"0.{end}" for end in ("weight", "SCB", "weight.absmax", "weight.nested_absmax")}
    assert_same_files(base, tmp_path / "out", new)
    W, merged, held = of_library(before, form), of_library(after, form), state.sites["0"]
    exact = W.double() + dense_delta(held.spec, held.A, held.B)
    li.merge(net, requantize=True)
    live = of_library({k: t.contiguous() for k, t in net.state_dict().items()}, form)
    assert error(merged, exact) < 1.02 * error(live, exact)
    assert error(merged, exact) < 0.5 * error(W, exact)
    row = report.tensors["0.weight"]
    assert row.dtype == ("int8" if form == "int8" else form[:3])
    assert row.kept == pytest.approx(kept(merged, W, exact), abs=1e-5)
    assert_verified(base, [state], tmp_path / "out", requantize=True)
    strict, little = MergeOptions(requantize=True, min_kept=0.9), WeightedAdapter(state, 1e-3)
    with pytest.raises(CheckpointError, match=r"rounding leaves less.*'0.weight'.*--dequantize"):
        merge_checkpoint(base, [little], tmp_path / "no", options=strict)
    assert not (tmp_path / "no").exists()


def quantized(w: Tensor, block: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """Quantize by blocks as DeepSeek's checkpoints are; returns the two tensors."""
    rows, cols = (-(-size // b) for size, b in zip(w.shape, block, strict=True))
    values, scales = torch.empty_like(w), torch.empty(rows, cols)
    for i in range(rows):
        for j in range(cols):
            at = slice(i * block[0], (i + 1) * block[0]), slice(j * block[1], (j + 1) * block[1])
            scales[i, j] = w[at].abs().max() / 448
            values[at] = w[at] / scales[i, j]
    return values.to(torch.float8_e4m3fn), scales


def dequantized(q: Tensor, s: Tensor, block: tuple[int, int]) -> Tensor:
    full = s.repeat_interleave(block[0], 0).repeat_interleave(block[1], 1)
    return q.float() * full[: q.shape[0], : q.shape[1]]


@pytest.mark.parametrize("shards", [1, 3])
@pytest.mark.parametrize("block", [(128, 128), (8, 16)])
def test_float8_base_is_dequantized_or_quantized_again_on_request(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, shards: int, block: tuple[int, int]
) -> None:
    monkeypatch.setattr(reading, "BLOCK_ELEMENTS", 1000)  # scales must follow the rows
    shape = (300, 200) if block[0] == 128 else (20, 40)
    tensors, values = {"norm.weight": torch.ones(8).bfloat16()}, {}
    for n in "qv":
        q, s = quantized(torch.randn(shape), block)
        tensors |= {f"{n}.weight": q, f"{n}.weight_scale_inv": s}
        values[f"{n}.weight"] = dequantized(q, s, block)
    quantization = {"quant_method": "fp8", "weight_block_size": list(block)}
    config = {**LLAMA, "quantization_config": quantization}
    base = save_checkpoint(tmp_path / "base", tensors, shards, config)
    state, out, again = adapter(site("q", shape, size=0.1)), tmp_path / "out", tmp_path / "again"
    with pytest.raises(CheckpointError, match=r"fp8 with block scales.*--dequantize"):
        plan_merge(base, [state])
    merge_checkpoint(base, [state], out, options=BF16)
    exact = dense(values, (state, 1.0))
    wanted = {n: t.bfloat16() for n, t in exact.items()} | {"norm.weight": tensors["norm.weight"]}
    assert_equal_to_dense(load_checkpoint(out), wanted, {"q.weight"})
    assert "quantization_config" not in json.loads((out / "config.json").read_text())
    assert_verified(base, [state], out, dequantize="bfloat16")
    report = merge_checkpoint(base, [state], again, options=AGAIN)
    written = load_checkpoint(again)
    assert_same_files(base, again, {"q.weight", "q.weight_scale_inv"})
    result = dequantized(written["q.weight"], written["q.weight_scale_inv"], block)
    due = dequantized(*quantized(exact["q.weight"], block), block)
    assert error(result, due.double()) < 1e-6
    row = report.tensors["q.weight"]
    assert (row.action, row.dtype) == ("folded", "float8")
    assert row.kept == pytest.approx(kept(result, values["q.weight"], exact["q.weight"]))
    assert_verified(base, [state], again, requantize=True)


def test_scales_that_are_powers_of_two_stay_so(tmp_path: Path) -> None:
    """DeepSeek's later checkpoints: their kernels read exponents only."""
    q, s = quantized(torch.randn(256, 200), (128, 128))
    s = s.log2().ceil().exp2()
    said = {"weight_block_size": [128, 128], "scale_fmt": "ue8m0"}
    tensors = {"q.weight": q, "q.weight_scale_inv": s}
    state = adapter(site("q", (256, 200), size=0.1))
    config = {"quantization_config": said}
    written = merged(tmp_path, tensors, state, config=config, requantize=True)
    scales = written["q.weight_scale_inv"]
    assert torch.equal(scales.log2(), scales.log2().round())
    exact = dense({"q.weight": dequantized(q, s, (128, 128))}, (state, 1.0))["q.weight"]
    assert error(dequantized(written["q.weight"], scales, (128, 128)), exact.double()) < 0.05


@pytest.mark.parametrize("shards", [1, 2])
def test_mxfp4_experts_merge_as_transformers_dequantizes_them(tmp_path: Path, shards: int) -> None:
    mxfp4 = pytest.importorskip("transformers.integrations.mxfp4")
    E, n_in, n_out, name = 3, 64, 40, "model.layers.0.mlp.experts.gate_up_proj"
    tensors = {
        f"{name}_blocks": torch.randint(0, 256, (E, n_out, n_in // 32, 16), dtype=torch.uint8),
        f"{name}_scales": torch.randint(118, 124, (E, n_out, n_in // 32), dtype=torch.uint8),
        "model.norm.weight": torch.ones(8).bfloat16(),
    }
    W = mxfp4.convert_moe_packed_tensors(*list(tensors.values())[:2])
    config = {"quantization_config": {"quant_method": "mxfp4"}}
    held = site(name, (E, n_in, n_out), experts=E, transposed=True, size=0.1)
    options = {"shards": shards, "config": config, "dequantize": "bfloat16"}
    written = merged(tmp_path, tensors, adapter(held), **options)
    wanted = W.double() + dense_delta(held.spec, held.A, held.B)
    assert same_bits(written[name], wanted.float().bfloat16())
    assert written.keys() == {name, "model.norm.weight"}
    assert_verified(tmp_path / "base", [adapter(held)], tmp_path / "out", dequantize="bfloat16")
    with pytest.raises(CheckpointError, match="quantizing to mxfp4 is not supported"):
        plan_merge(tmp_path / "base", [adapter(held)], AGAIN)
    # Each is written where its blocks were, and not into one file for all.
    assert len(list((tmp_path / "out").glob("*.safetensors"))) == shards


def with_settings(**changes: Any) -> Any:
    def change(tensors: dict[str, torch.Tensor]) -> None:
        key = "0.weight.quant_state.bitsandbytes__nf4"
        said = json.loads(bytes(tensors[key].tolist())) | changes
        tensors[key] = torch.tensor(list(json.dumps(said).encode()), dtype=torch.uint8)

    return change


DAMAGE = {
    "blocksize 0": with_settings(blocksize=0),
    "shape too large": with_settings(shape=[1 << 40, 64]),
    "no offset": with_settings(nested_offset="x"),
    "dtype": with_settings(dtype="int8"),
    "no absmax": lambda tensors: tensors.pop("0.weight.absmax"),
    "short absmax": lambda t: t.update({"0.weight.absmax": t["0.weight.absmax"][:3].clone()}),
}


@quiet
@pytest.mark.parametrize("how", DAMAGE)
def test_parts_that_do_not_fit_each_other_are_refused(how: str, tmp_path: Path) -> None:
    tensors = {name: t.contiguous() for name, t in bitsandbytes("nf4").state_dict().items()}
    DAMAGE[how](tensors)
    base = save_checkpoint(tmp_path / "base", tensors)
    with pytest.raises(CheckpointError, match=r"dequantize '0.weight': its (parts|settings)"):
        merge_checkpoint(base, [adapter(site("2", (32, N)))], tmp_path / "out", options=BF16)


INT8 = {"q.weight": torch.zeros(8, 8, dtype=torch.int8), "q.weight_scale": torch.ones(8)}
UNKNOWN = [
    ({"q.qweight": torch.zeros(8, 8).int()}, BF16, r"'q.qweight'.*packed.*16-bit checkpoint"),
    (INT8, BF16, r"dequantize 'q.weight': .*int8 with scales"),
    ({"q.weight": torch.zeros(8, 8).to(torch.float8_e4m3fn)}, BF16, "without block scales"),
    ({}, BF16, r"none of its tensors is .*dtype='bfloat16'"),
    ({}, AGAIN, r"requantize .*none of its tensors is quantized"),
]


@pytest.mark.parametrize(("tensors", "options", "words"), UNKNOWN)
def test_what_nothing_here_knows_is_refused_with_the_way_out(
    tmp_path, tensors, options, words
) -> None:
    base = save_checkpoint(tmp_path / "base", tensors | {"v.weight": torch.zeros(8, 8)}, 1, LLAMA)
    with pytest.raises(CheckpointError, match=words):
        plan_merge(base, [adapter(site("v", (8, 8)))], options)


def in_words(codes: Tensor, bits: int, *, is_awq: bool = False) -> Tensor:
    """Pack each row into words of 32 bits."""
    places = [0, 4, 1, 5, 2, 6, 3, 7] if is_awq else range(32 // bits)
    words = [codes[:, i :: 32 // bits].long() << bits * place for i, place in enumerate(places)]
    return sum(words, torch.zeros_like(words[0])).to(torch.int32).contiguous()


GPTQ: dict[str, Any] = {"quant_method": "gptq", "bits": 4, "group_size": 32}
AWQ: dict[str, Any] = {"quant_method": "awq", "bits": 4, "group_size": 32, "version": "gemm"}
MADE = {"meta": {"quantizer": ["gptqmodel:7.7.0"]}}
WORDS: dict[str, dict[str, Any]] = {
    "gptq": GPTQ,
    "gptq, 2 bits": {**GPTQ, "bits": 2, "checkpoint_format": "gptq"},
    "gptq, 8 bits in one group": {**GPTQ, "bits": 8, "group_size": -1},
    "gptq, act-order": {**GPTQ, "desc_act": True},
    "gptq_v2": {**GPTQ, "checkpoint_format": "gptq_v2"},
    "gptq, zeros of 0": {**GPTQ, **MADE},
    "gptq, bits by layer": {**GPTQ, "bits": 2, "dynamic": {"q": {"bits": 4}}, "true_bits": 4},
    "awq": AWQ,
}


def grouped(said: dict[str, Any], name: str, n_out: int, n_in: int) -> dict[str, Tensor]:
    """A layer of random codes, with its values as `name.weight`."""
    torch.manual_seed(n_out)
    bits, is_awq = said.get("true_bits", said["bits"]), said["quant_method"] == "awq"
    size = n_in if said["group_size"] == -1 else said["group_size"]
    v1 = not is_awq and said.get("checkpoint_format") != "gptq_v2"
    codes = torch.randint(0, 2**bits, (n_in, n_out))
    zeros = torch.randint(int(v1 and "meta" not in said), 2**bits, (n_in // size, n_out))
    scales = (0.02 * torch.rand(n_in // size, n_out) + 0.01).half()
    group = torch.arange(n_in) // size
    group = group[torch.randperm(n_in)] if said.get("desc_act") else group
    made = {"scales": scales, "qzeros": in_words(zeros, bits, is_awq=is_awq)}
    if v1:
        made["qzeros"] -= in_words(torch.ones(1, 32 // bits), bits)
    if is_awq:
        made["qweight"] = in_words(codes, bits, is_awq=True)
    else:
        made["qweight"] = in_words(codes.t(), bits).t().contiguous()
        made["g_idx"] = group.int()
    made["weight"] = ((codes - zeros[group]) * scales[group]).t().contiguous()
    return {f"{name}.{end}": tensor for end, tensor in made.items()}


@pytest.mark.parametrize("shards", [1, 3])
@pytest.mark.parametrize("form", WORDS)
def test_gptq_and_awq_merge_into_plain_floats(form, shards, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(reading, "BLOCK_ELEMENTS", 300)  # groups and words must follow the rows
    said = WORDS[form]
    tensors = grouped(said, "q", 96, 128) | grouped(said, "v", 64, 32) | {"q.bias": torch.ones(96)}
    wanted = {n: tensors.pop(n).float() for n in ("q.weight", "v.weight")}
    if form == "gptq":
        del tensors["v.g_idx"]
    base = save_checkpoint(tmp_path / "base", tensors, shards, {"quantization_config": said})
    (base / "quantize_config.json").write_text(json.dumps(said))
    state = adapter(site("q", (96, 128), size=0.1))
    with pytest.raises(CheckpointError, match=r"quantized: GPTQ or AWQ.*\(--dequantize"):
        plan_merge(base, [state])
    with pytest.raises(CheckpointError, match=f"quantizing to {said['quant_method']} is not"):
        plan_merge(base, [state], AGAIN)
    for dtype in (torch.bfloat16, torch.float32):
        name = str(dtype).removeprefix("torch.")
        out = tmp_path / name
        merge_checkpoint(base, [state], out, options=MergeOptions(dequantize=name))
        due = {n: t.to(dtype) for n, t in dense(wanted, (state, 1.0)).items()}
        due["q.bias"] = tensors["q.bias"]
        assert_equal_to_dense(load_checkpoint(out), due, {"q.weight"})
        assert not (out / "quantize_config.json").exists()
        assert "quantization_config" not in json.loads((out / "config.json").read_text())
        assert_verified(base, [state], out, dequantize=name)


@quiet
@pytest.mark.parametrize("form", [form for form in WORDS if "bits" not in form])
def test_gptq_and_awq_have_the_values_that_the_library_reads(form: str, tmp_path: Path) -> None:
    said = WORDS[form]
    tensors = grouped(said, "0", 64, 128)
    due = tensors.pop("0.weight")
    base = save_checkpoint(tmp_path / "base", tensors, 1, {"quantization_config": said})
    kind = "torch_awq.AwqTorch" if form == "awq" else "torch.Torch"
    module, prefix = f"gptqmodel.nn_modules.qlinear.{kind}".rsplit(".", 1)
    made = getattr(pytest.importorskip(module), f"{prefix}Linear")(
        bits=4, group_size=32, sym=False, desc_act="act" in form, bias=False,
        in_features=128, out_features=64, register_buffers=True,
    )  # fmt: skip
    made.load_state_dict({n.removeprefix("0."): t for n, t in tensors.items()})
    if form.startswith("gptq") and "v2" not in form:
        pytest.importorskip("gptqmodel.utils.model").convert_gptq_v1_to_v2_format_module(
            made, 4, torch.int32
        )
    made.optimized = True  # nothing is compiled
    made.post_init()
    net: Any = nn.Sequential(made)
    state = li.adapter_state(fill(li.inject(net, {"rank": 2, "targets": ["0"]})))
    merge_checkpoint(base, [state], tmp_path / "out", options=MergeOptions(dequantize="float32"))
    live = dict(li.merged_weights(net, dequantize="float32"))
    assert error(load_checkpoint(tmp_path / "out")["0.weight"], live["0.weight"].double()) < 1e-6
    held = state.sites["0"]
    assert error(live["0.weight"], due.double() + dense_delta(held.spec, held.A, held.B)) < 1e-6


@pytest.mark.parametrize(
    ("said", "change", "found"),
    [
        ({**GPTQ, "bits": 3}, {}, "gptq has 3 bits"),
        ({**GPTQ, "bits": 8}, {}, "its parts do not fit"),
        ({**GPTQ, "desc_act": True}, {"q.g_idx": None}, "its parts do not fit"),
        (GPTQ, {"q.g_idx": torch.full((64,), 2).int()}, "its parts do not fit"),
        (GPTQ, {"q.scales": None}, "its scales or zeros are missing"),
        (GPTQ, {"q.qzeros": torch.full((2, 4), -1).int()}, "some zeros are the largest"),
        ({**GPTQ, "checkpoint_format": "marlin"}, {}, "its gptq layout is 'marlin'"),
        ({**AWQ, "version": "gemv"}, {}, "its awq layout is 'gemv'"),
        ({**AWQ, "zero_point": False}, {}, "it has no zeros"),
        ({**GPTQ, "quant_method": "auto-round"}, {}, r"packed integers \(I32\), is not"),
    ],
)
def test_gptq_and_awq_of_other_layouts_are_refused_by_name(said, change, found, tmp_path) -> None:
    tensors: dict[str, Any] = grouped({**said, "bits": 4, "group_size": 32}, "q", 32, 64)
    del tensors["q.weight"]
    tensors = {n: t for n, t in (tensors | change).items() if t is not None}
    base = save_checkpoint(tmp_path / "base", tensors, 1, {"quantization_config": said})
    with pytest.raises(CheckpointError, match=rf"dequantize 'q.qweight'.*{found}"):
        merge_checkpoint(base, [adapter(site("q", (32, 64)))], tmp_path / "out", options=BF16)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("packed", ["qweight", "W_q"])
def test_adapter_made_on_packed_layers_merges_into_the_plain_base(packed, tmp_path) -> None:
    tensors, plain = {"q.weight": torch.randn(32, 64)}, adapter(site("q", (32, 64)))
    on_packed = adapter(site("q", (32, 64), weight=f"q.{packed}"))
    written = merged(tmp_path, tensors, on_packed)
    assert_equal_to_dense(written, dense(tensors, (plain, 1.0)), {"q.weight"})


def test_a_raw_parameter_keeps_its_name_though_packed_layers_have_such_names(tmp_path) -> None:
    tensors = {name: torch.randn(32, 64) for name in ("q.qweight", "q.weight")}
    raw = adapter(site("q.qweight", (32, 64), kind="parameter", weight="q.qweight"))
    merged(tmp_path, tensors, raw)
    assert_merged(tmp_path / "out", tensors, raw)
