"""Merging on disk into quantized checkpoints: as plain floats, or in their format again.

The packed tensors are made here from known values, by each format's own formula.
"""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from conftest import error, fill, same_bits
from helpers.merging import (
    LLAMA,
    dense,
    hold_merged,
    load_checkpoint,
    merge,
    merged,
    same_tensors,
    save_checkpoint,
)
from helpers.quantized import Block, N, bitsandbytes, dequantized, plain_net, quantized
from helpers.refusals import refused
from helpers.states import linear, parameter, state_of
from safetensors.torch import load_file
from torch import Tensor, nn

import lora_inject as li

quiet = pytest.mark.filterwarnings("ignore")
SUMS = 5e-6  # what float32 sums over a block of 2**17 values are off; the processor says how far


def share_kept(merged: Tensor, before: Tensor, exact: Tensor) -> float:
    """The share of the update that the merged weight has, from dense values."""
    update = exact.double() - before.double()
    found = merged.double() - before.double()
    return float((found * update).sum() / update.square().sum())


def hold_same_files(base: Path, out: Path, changed: set[str]) -> None:
    """Everything but some tensors is what it was, bit for bit, in the same files."""
    assert {p.name for p in base.iterdir()} == {p.name for p in out.iterdir()}
    for path in base.iterdir():
        if path.suffix == ".json":
            assert (out / path.name).read_bytes() == path.read_bytes()
            continue
        before, after = load_file(path), load_file(out / path.name)
        assert before.keys() == after.keys()
        assert all(same_bits(before[name], after[name]) for name in before.keys() - changed)


def hold_a_wrong_code_is_found(
    run: Any, base: Path, state: li.AdapterState, out: Path, name: str
) -> None:
    adapter = li.write_adapter(state, out.parent / "to verify", overwrite=True)
    words = ["verify", base, adapter, out, "--requantize", "--any-base"]
    assert run(*words).code == 0
    (file,) = (path for path in out.glob("*.safetensors") if name in load_file(path))
    whole = file.read_bytes()
    data, start = bytearray(whole), 8 + int.from_bytes(whole[:8], "little")
    data[start + json.loads(whole[8:start])[name]["data_offsets"][0] + 7] ^= 4
    file.write_bytes(data)
    ran = run(*words)
    assert (ran.code, f"'{name}'" in ran.out) == (1, True)
    file.write_bytes(whole)


# Formats that are made here -----------------------------------------------------------------------


class Packed(NamedTuple):
    """A quantized checkpoint, and what its weights are."""

    tensors: dict[str, Tensor]
    values: dict[str, Tensor]
    said: dict[str, Any]  # the config's `quantization_config`
    again: bool = False  # whether it can be written in its format again


def float8(block: Block, *shape: int) -> Packed:
    tensors, values = {}, {}
    for name in ("q.weight", "v.weight"):
        q, scales = quantized(torch.randn(shape), block)
        tensors |= {name: q, f"{name}_scale_inv": scales}
        values[name] = dequantized(q, scales, block)
    said = {"quant_method": "fp8", "weight_block_size": list(block)}
    return Packed(tensors, values, said, again=True)


FORMS: dict[str, Callable[[], Packed]] = {
    "fp8": lambda: float8((128, 128), 300, 200),
    "fp8, small blocks": lambda: float8((8, 16), 20, 40),
    "fp8, a large matrix": lambda: float8((128, 128), 1100, 1000),  # of several pieces
}


def stored(form: str, folder: Path, shards: int) -> tuple[Packed, Path]:
    torch.manual_seed(0)
    packed = FORMS[form]()
    tensors = packed.tensors | {"norm.weight": torch.ones(8).bfloat16()}
    base = save_checkpoint(folder, tensors, shards, {**LLAMA, "quantization_config": packed.said})
    (base / "quantize_config.json").write_text(json.dumps(packed.said))
    return packed, base


@pytest.mark.parametrize("shards", [1, 3])
@pytest.mark.parametrize("form", FORMS)
def test_a_packed_base_merges_into_plain_floats_on_request(form, shards, tmp_path) -> None:
    packed, base = stored(form, tmp_path / "base", shards)
    state = state_of(linear("q", *reversed(packed.values["q.weight"].shape)), size=0.1)
    with refused(li.CheckpointError, "--dequantize"):
        merge(base, [state], tmp_path / "no")
    for name, dtype in (("bfloat16", torch.bfloat16), ("float32", torch.float32)):
        out = tmp_path / name
        merge(base, [state], out, dequantize=name)
        wanted = {n: t.to(dtype) for n, t in dense(packed.values, (state, 1.0)).items()}
        wanted["norm.weight"] = torch.ones(8).bfloat16()
        found = load_checkpoint(out)
        found["norm.weight"] = found["norm.weight"].bfloat16()  # which may be made as wide
        same_tensors(found, wanted, {"q.weight"})
        assert not (out / "quantize_config.json").exists()
        assert "quantization_config" not in json.loads((out / "config.json").read_text())


@pytest.mark.parametrize("form", FORMS)
def test_a_packed_base_is_written_in_its_format_again_or_the_format_is_named(
    form, tmp_path, run: Any
) -> None:
    packed, base = stored(form, tmp_path / "base", 3)
    state = state_of(linear("q", *reversed(packed.values["q.weight"].shape)), size=0.1)
    if not packed.again:
        with refused(li.CheckpointError, f"quantizing to {packed.said['quant_method']}"):
            merge(base, [state], tmp_path / "no", requantize=True)
        return
    row = merge(base, [state], tmp_path / "out", requantize=True).tensors["q.weight"]
    hold_a_wrong_code_is_found(run, base, state, tmp_path / "out", "q.weight")
    hold_same_files(base, tmp_path / "out", {"q.weight", "q.weight_scale_inv"})
    block, written = tuple(packed.said["weight_block_size"]), load_checkpoint(tmp_path / "out")
    result = dequantized(written["q.weight"], written["q.weight_scale_inv"], block)
    exact = dense(packed.values, (state, 1.0))["q.weight"]
    due = dequantized(*quantized(exact, block), block)
    assert error(result, due.double()) < 1e-6
    assert (row.action, row.dtype) == ("folded", "float8")
    share = share_kept(result, packed.values["q.weight"], exact)
    assert row.kept == pytest.approx(share, rel=SUMS)


def test_scales_that_are_powers_of_two_stay_so(tmp_path: Path) -> None:
    """DeepSeek's later checkpoints: their kernels read exponents only."""
    block = (128, 128)
    q, scales = quantized(torch.randn(256, 200), block)
    scales = scales.log2().ceil().exp2()
    said = {"weight_block_size": [*block], "scale_fmt": "ue8m0"}
    tensors = {"q.weight": q, "q.weight_scale_inv": scales}
    state = state_of(linear("q", 200, 256), size=0.1)
    config = {"quantization_config": said}
    written = merged(tmp_path, tensors, state, config=config, requantize=True)
    after = written["q.weight_scale_inv"]
    assert torch.equal(after.log2(), after.log2().round())
    exact = dense({"q.weight": dequantized(q, scales, block)}, (state, 1.0))["q.weight"]
    assert error(dequantized(written["q.weight"], after, block), exact.double()) < 0.05


@pytest.mark.parametrize("shards", [1, 2])
def test_mxfp4_experts_merge_as_transformers_dequantizes_them(tmp_path: Path, shards: int) -> None:
    mxfp4 = pytest.importorskip("transformers.integrations.mxfp4")
    n_experts, n_in, n_out, name = 3, 64, 40, "model.layers.0.mlp.experts.gate_up_proj"
    groups = (n_experts, n_out, n_in // 32)
    tensors = {
        f"{name}_blocks": torch.randint(0, 256, (*groups, 16), dtype=torch.uint8),
        f"{name}_scales": torch.randint(118, 124, groups, dtype=torch.uint8),
        "model.norm.weight": torch.ones(8).bfloat16(),
    }
    W = mxfp4.convert_moe_packed_tensors(*list(tensors.values())[:2])
    config = {"quantization_config": {"quant_method": "mxfp4"}}
    state = state_of(parameter(name, n_experts, n_in, n_out, layout="in_out"), size=0.1)
    options = {"shards": shards, "config": config, "dequantize": "bfloat16"}
    written = merged(tmp_path, tensors, state, **options)
    wanted = dense({name: W.double()}, (state, 1.0))[name].float().bfloat16()
    assert same_bits(written[name], wanted)
    assert written.keys() == {name, "model.norm.weight"}
    # Each is written where its blocks were, and not into one file for all.
    assert len(list((tmp_path / "out").glob("*.safetensors"))) == shards
    with refused(li.CheckpointError, "quantizing to mxfp4"):
        merge(tmp_path / "base", [state], tmp_path / "no", requantize=True)


def test_unpacked_tensors_lie_in_the_order_of_their_codes_in_every_process(tmp_path: Path) -> None:
    """Else verifying in another process finds another header, and a rerun begins anew."""
    names, tensors = [f"{n}.up" for n in range(8)], {"q.weight": torch.randn(4, 4)}
    for name in names:
        codes = torch.randint(0, 256, (1, 4, 1, 16), dtype=torch.uint8)
        tensors |= {f"{name}_blocks": codes, f"{name}_scales": torch.full((1, 4, 1), 120).byte()}
    config = {"quantization_config": {"quant_method": "mxfp4"}}
    state = state_of(linear("q", 4, 4))
    merged(tmp_path, tensors, state, config=config, dequantize="bfloat16")
    data = (tmp_path / "out" / "model.safetensors").read_bytes()
    header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    assert [name for name in header if name not in ("q.weight", "__metadata__")] == names


def test_float_layers_of_a_quantized_base_merge_unasked(tmp_path: Path) -> None:
    packed = {"q.qweight": torch.zeros(1, 8).int(), "q.qzeros": torch.zeros(1, 1).int()}
    tensors = {**packed, "q.scales": torch.zeros(1, 8), "lm_head.weight": torch.randn(8, 8)}
    state = state_of(linear("lm_head", 8, 8))
    merged(tmp_path, tensors, state)
    hold_merged(tmp_path / "out", tensors, state)


@pytest.mark.parametrize("packed", ["qweight", "W_q"])
def test_an_adapter_made_on_packed_layers_merges_into_the_plain_base(packed, tmp_path) -> None:
    tensors, plain = {"q.weight": torch.randn(32, 64)}, state_of(linear("q", 64, 32))
    (site,) = plain.sites.values()
    on_packed = replace(site, spec=replace(site.spec, weight=f"q.{packed}"))
    merged(tmp_path, tensors, li.AdapterState({"q": on_packed}))
    hold_merged(tmp_path / "out", tensors, plain)


def test_a_raw_parameter_keeps_its_name_though_packed_layers_have_such_names(tmp_path) -> None:
    tensors = {name: torch.randn(32, 64) for name in ("q.qweight", "q.weight")}
    raw = state_of(parameter("q.qweight", 32, 64))
    merged(tmp_path, tensors, raw)
    hold_merged(tmp_path / "out", tensors, raw)


# What nothing here knows --------------------------------------------------------------------------

WORDS = {"q.qweight": torch.zeros(8, 8).int(), "q.scales": torch.ones(2, 8).half()}
INT8 = {"q.weight": torch.zeros(8, 8, dtype=torch.int8), "q.weight_scale": torch.ones(8)}
FLOATS, AGAIN = {"dequantize": "bfloat16"}, {"requantize": True}
UNKNOWN: dict[str, tuple[dict[str, Tensor], dict[str, Any], list[str]]] = {
    "packed words": ({"q.qweight": torch.zeros(8, 8).int()}, FLOATS, ["'q.qweight'", "16-bit"]),
    "integers": (INT8, FLOATS, ["'q.weight'", "I8"]),
    "no scales": ({"q.weight": torch.zeros(8, 8).to(torch.float8_e4m3fn)}, FLOATS, ["scales"]),
    "nothing packed": ({}, FLOATS, ["dtype='bfloat16'"]),
    "nothing to pack": ({}, AGAIN, ["requantize"]),
}
TOOLS = {"gptq": "gptqmodel writes (dequantize_model", "awq": "gptqmodel writes (dequantize_gemm"}


@pytest.mark.parametrize("case", UNKNOWN)
def test_what_nothing_here_knows_is_refused_with_the_way_out(case: str, tmp_path: Path) -> None:
    tensors, options, named = UNKNOWN[case]
    with refused(li.CheckpointError, *named):
        merged(
            tmp_path, tensors | {"v.weight": torch.zeros(8, 8)}, state_of(linear("v", 8, 8)),
            config=LLAMA, **options,
        )  # fmt: skip
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("method", TOOLS)
@pytest.mark.parametrize("site", ["q", "v"])
def test_gptq_and_awq_are_refused_with_the_tool_that_unpacks_them(method, site, tmp_path) -> None:
    """Their layers alone, but where all is to be dequantized."""
    tensors = WORDS | {"v.weight": torch.zeros(8, 8)}
    config = LLAMA | {"quantization_config": {"quant_method": method, "bits": 4}}
    base = save_checkpoint(tmp_path / "base", tensors, config=config)
    state = state_of(linear(site, 8, 8))
    for options in ({}, FLOATS, AGAIN) if site == "q" else (FLOATS, AGAIN):
        with refused(li.CheckpointError, f"I32 of {method.upper()}", TOOLS[method], "16-bit"):
            merge(base, [state], tmp_path / "out", **options)
    if site == "v":
        merge(base, [state], tmp_path / "out")
        hold_merged(tmp_path / "out", tensors, state)


# Files of bitsandbytes ----------------------------------------------------------------------------

NF4 = {"quant_type": "nf4"}
BITS: dict[str, dict[str, Any]] = {
    "nf4": NF4,
    "nf4, scales once": {**NF4, "compress_statistics": False},
    "nf4, stored as floats": {**NF4, "quant_storage": torch.bfloat16},
    "fp4": {},
}


def built(form: str, dtype: torch.dtype = torch.float32, seed: int = 0) -> Any:
    return bitsandbytes("Linear4bit", plain_net(dtype, seed), **BITS[form]).train()


def saved(net: nn.Module, folder: Path, shards: int = 1) -> Path:
    tensors = {name: tensor.contiguous() for name, tensor in net.state_dict().items()}
    return save_checkpoint(folder, tensors, shards, {"quantization_config": {"load_in_4bit": True}})


def of_library(tensors: dict[str, Tensor], form: str) -> Tensor:
    """The values of '0.weight' as bitsandbytes reads its parts."""
    if form == "int8":
        return tensors["0.weight"].float() * tensors["0.SCB"].float()[:, None] / 127
    functional = pytest.importorskip("bitsandbytes").functional
    parts = {name: t for name, t in tensors.items() if name.startswith("0.weight.")}
    state = functional.QuantState.from_dict(parts, torch.device("cpu"))
    return functional.dequantize_4bit(tensors["0.weight"], state).float()


@quiet
@pytest.mark.parametrize("form", BITS)
def test_files_of_bitsandbytes_merge_as_the_live_model_does(
    form: str, tmp_path: Path, run: Any
) -> None:
    """Into plain floats, and quantized again; only when asked, and into their own base."""
    dtype = torch.bfloat16 if form == "nf4" else torch.float32
    net = built(form, dtype)
    base = saved(net, tmp_path / "base", shards=3)
    fill(li.inject(net, {"rank": 2, "targets": ["0"]}), std=0.075)  # an update of the size of W
    state = li.adapter_state(net)
    with refused(li.CheckpointError, "bitsandbytes", "--dequantize"):
        merge(base, [state], tmp_path / "no")
    other = saved(built(form, dtype, seed=1), tmp_path / "other")
    with refused(li.CheckpointError, "another base", "'0.weight'"):
        merge(other, [state], tmp_path / "no", dequantize="bfloat16")
    for kind in ("bfloat16", "float32"):
        out = tmp_path / kind
        report = merge(base, [state], out, dequantize=kind)
        actions = {name: row.action for name, row in report.tensors.items()}
        assert actions == {"0.weight": "folded", "2.weight": "dequantized"}
        written, wanted = load_checkpoint(out), dict(li.merged_weights(net, dequantize=kind))
        assert written.keys() == wanted.keys(), "scales and tables are gone"
        for name in ("0.weight", "2.weight"):
            assert written[name].dtype == wanted[name].dtype
            assert error(written[name], wanted[name].double()) < 1e-6, name
        assert "quantization_config" not in json.loads((out / "config.json").read_text())

    row = merge(base, [state], tmp_path / "out", requantize=True).tensors["0.weight"]
    hold_a_wrong_code_is_found(run, base, state, tmp_path / "out", "0.weight")
    before, after = load_checkpoint(base), load_checkpoint(tmp_path / "out")
    new = {f"0.{end}" for end in ("weight", "SCB", "weight.absmax", "weight.nested_absmax")}
    hold_same_files(base, tmp_path / "out", new)
    W, found = of_library(before, form), of_library(after, form)
    exact = dense({"0.weight": W.double()}, (state, 1.0))["0.weight"]
    li.merge(net, requantize=True)
    live = of_library({k: t.contiguous() for k, t in net.state_dict().items()}, form)
    assert error(found, exact) < 1.02 * error(live, exact)
    assert error(found, exact) < 0.5 * error(W, exact)
    assert row.dtype == ("int8" if form == "int8" else form[:3])
    assert row.kept == pytest.approx(share_kept(found, W, exact), rel=SUMS)
    with refused(li.CheckpointError, "'0.weight'", "--dequantize"):
        merge(base, [li.combine([state], [1e-3])], tmp_path / "no", requantize=True, min_kept=0.9)
    assert not (tmp_path / "no").exists()


def with_settings(**changes: Any) -> Callable[[dict[str, Tensor]], None]:
    def change(tensors: dict[str, Tensor]) -> None:
        key = "0.weight.quant_state.bitsandbytes__nf4"
        said = json.loads(bytes(tensors[key].tolist())) | changes
        tensors[key] = torch.tensor(list(json.dumps(said).encode()), dtype=torch.uint8)

    return change


DAMAGE: dict[str, Callable[[dict[str, Tensor]], object]] = {
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
    tensors = {name: t.contiguous() for name, t in built("nf4").state_dict().items()}
    DAMAGE[how](tensors)
    with refused(li.CheckpointError, "'0.weight'"):
        merged(tmp_path, tensors, state_of(linear("2", N, 32)), dequantize="bfloat16")
