"""Quantized weights of a checkpoint: recognized, refused with a remedy, or shown as floats.

A quantized weight is recognized by its neighbors (`qweight`, `weight.absmax`, `weight_scale_inv`,
`_blocks`) or by its dtype. Only the tensors that the adapter needs are checked, so an adapter on
layers that stayed in 16 bits merges as usual.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from typing import Any

import torch

from lora_inject.checkpoint.index import Checkpoint
from lora_inject.checkpoint.packed import (
    Float8,
    FourBit,
    Int8,
    Mxfp4,
    Nvfp4,
    Packed,
    PackedWords,
)
from lora_inject.core.files.safetensors_file import TensorEntry
from lora_inject.core.files.strict_json import misfit, parse_json
from lora_inject.errors import CheckpointError
from lora_inject.experts.stack_formats import block_structure

FORMAT_DTYPES = {"float32": "F32", "bfloat16": "BF16", "float16": "F16"}
"""The format's names of dtypes that a checkpoint can be written in."""
_STATES = {f"quant_state.bitsandbytes__{kind}": kind.upper() for kind in ("nf4", "fp4")}
_MARKS = {
    **{f"weight.{state}": f"bitsandbytes 4-bit ({kind})" for state, kind in _STATES.items()},
    "weight.absmax": "bitsandbytes 4-bit",
    "weight.SCB": "bitsandbytes 8-bit",
    "SCB": "bitsandbytes 8-bit",
    "qweight": "GPTQ or AWQ",
    "weight_global_scale": "NVFP4",
    "weight_scale_2": "NVFP4",
    "weight_packed": "compressed-tensors",
    "weight_scale_inv": "fp8 with block scales",
    "weight_scale": "fp8 or int8 with scales",
}
_COUNT = range(1, 2**63)
_INTEGER = {"U8", "I8", "I32", "U32", "F4"}
_FLOAT8 = {"F8_E4M3", "F8_E5M2", "F8_E4M3FNUZ", "F8_E5M2FNUZ"}
_READ_ONLY = ("MXFP4", "GPTQ or AWQ")  # what `unpacked` can read, and nothing here writes
_KNOWN = ("bitsandbytes", "fp8 with", "NVFP4", *_READ_ONLY)
_LAYOUTS = {"gptq": ("gptq", "gptq_v2"), "awq": ("gemm",)}  # of packed words; the first if unsaid
_WORDS = {"scales": "scales", "zeros": "qzeros", "groups": "g_idx"}  # of GPTQ and AWQ
# Of NVFP4, by whether it divides: that of compressed-tensors, that of modelopt.
_WHOLE = {True: "global_scale", False: "scale_2"}
_INPUTS = ("input_scale", "input_global_scale")  # of activations, beside NVFP4 and float8
_ROLES = ("absmax", "quant_map", "nested_absmax", "nested_quant_map", *_STATES)  # of 4 bits


def method_of(checkpoint: Checkpoint, name: str) -> str | None:
    """Return how one weight is quantized; None if it is a plain float tensor or absent."""
    tensors, module = checkpoint.tensors, name.removesuffix(".weight")
    dtype = tensors[name].dtype if name in tensors else ""
    if dtype in _FLOAT8 and f"{module}.weight_scale" in tensors:
        return "fp8 with scales"
    for mark, method in _MARKS.items():
        if f"{module}.{mark}" in tensors:
            return method
    if f"{name}_blocks" in tensors and f"{name}_scales" in tensors:
        return "MXFP4"
    if dtype in _FLOAT8:
        return "fp8"
    return f"packed integers ({dtype})" if dtype in _INTEGER else None


def why_no_update(checkpoint: Checkpoint, names: Iterable[str]) -> tuple[str, str] | None:
    """Return why some weights take no update, and a remedy; None if none is quantized."""
    for name in names:
        if method := method_of(checkpoint, name):
            remedy = (
                "Merge into the 16-bit checkpoint that it was made from and quantize the result"
            )
            if method.startswith(_KNOWN):
                remedy += ", or write the merged one in 16 bits (--dequantize bfloat16)"
                remedy += "" if method in _READ_ONLY else " or in its own format (--requantize)"
            return f"'{name}' is quantized: {method}", remedy
    return None


def unpacked(checkpoint: Checkpoint, dtype: str | None) -> Checkpoint:
    """Return a checkpoint that shows quantized tensors as float tensors of a dtype.

    Each tensor has its plain name and shape, so adapters are placed as on any base. Without a dtype
    the tensors will be quantized again, and have the name of their format as dtype.
    """
    packed = dict(_find(checkpoint))
    if dtype is not None:
        _check_all_known(checkpoint, packed)
    if not packed:
        asked = f"{'re' if dtype is None else 'de'}quantize '{checkpoint.folder}'"
        remedy = f"Leave it out, or write every float tensor so: dtype={dtype or 'bfloat16'!r}"
        raise CheckpointError(asked, "none of its tensors is quantized", remedy)
    shown = {}
    for name, weight in packed.items():
        shown_dtype = weight.form if dtype is None else FORMAT_DTYPES[dtype]
        shown[name] = TensorEntry(name, shown_dtype, weight.shape, 0, 0)
    return replace(checkpoint, packed=packed, shown=shown)


def _check_all_known(checkpoint: Checkpoint, packed: Mapping[str, Packed]) -> None:
    """Refuse a quantized tensor that is not read: it would stay packed among plain ones."""
    parts = {part.name for weight in packed.values() for part in weight.parts.values()}
    for entry in checkpoint:
        if entry.name not in parts and len(entry.shape) > 1:
            method = method_of(checkpoint, entry.name)
            _check(entry, method is None, f"its quantization, {method}, is not supported")


def _find(checkpoint: Checkpoint) -> Iterator[tuple[str, Packed]]:
    """Yield each quantized weight by its plain name, as the first of `_WAYS` reads it that can."""
    said = checkpoint.config.get("quantization_config")
    settings = said if isinstance(said, dict) else {}
    for entry in checkpoint:
        weights = (way(checkpoint, entry, settings) for way in _WAYS)
        weight = next((weight for weight in weights if weight is not None), None)
        if weight is not None:
            yield weight


def _bitsandbytes_4(
    checkpoint: Checkpoint, entry: TensorEntry, _: Mapping[str, Any]
) -> tuple[str, Packed] | None:
    tensors = checkpoint.tensors
    name = entry.name
    near = {role: tensors[f"{name}.{role}"] for role in _ROLES if f"{name}.{role}" in tensors}
    state = next((role for role in _STATES if role in near), None)
    if state is None:
        return None
    return name, _four_bit(checkpoint, {"codes": entry, "state": near[state], **near})


def _bitsandbytes_8(
    checkpoint: Checkpoint, entry: TensorEntry, _: Mapping[str, Any]
) -> tuple[str, Packed] | None:
    tensors, module = checkpoint.tensors, entry.name.removesuffix("weight")
    scales = tensors.get(f"{module}SCB")
    if entry.dtype != "I8" or scales is None or len(entry.shape) != 2:
        return None
    parts = {"codes": entry, "scales": scales}
    if (form := tensors.get(f"{module}weight_format")) is not None:
        parts["format"] = form
    _check(entry, scales.n_elements == entry.shape[0], "its scales do not fit")
    return entry.name, Int8(checkpoint, entry.shape, parts)


def _float8_with_scales(
    checkpoint: Checkpoint, entry: TensorEntry, settings: Mapping[str, Any]
) -> tuple[str, Packed] | None:
    tensors = checkpoint.tensors
    name = entry.name
    if entry.dtype not in _FLOAT8 or name.endswith("_scale_inv"):
        return None
    if name.endswith("_scale") and _nvfp4_codes(checkpoint, name.removesuffix("_scale")):
        return None
    in_blocks, of_rows = tensors.get(f"{name}_scale_inv"), tensors.get(f"{name}_scale")
    scales = in_blocks or of_rows
    if scales is None or entry.dtype != "F8_E4M3" or len(entry.shape) != 2:
        raise _misfit(entry, "it is float8 without block scales")
    return name, _float8(checkpoint, entry, scales, settings)


def _nvfp4(
    checkpoint: Checkpoint, entry: TensorEntry, _: Mapping[str, Any]
) -> tuple[str, Packed] | None:
    """Yield a weight as compressed-tensors (`weight_packed`) or modelopt (`weight`) stores it."""
    name = entry.name.removesuffix("_packed")
    if entry != _nvfp4_codes(checkpoint, name):
        return None
    tensors = checkpoint.tensors
    divides = f"{name}_global_scale" in checkpoint.tensors
    whole, scales = tensors[f"{name}_{_WHOLE[divides]}"], tensors.get(f"{name}_scale")
    n_out, n_in = entry.shape[0], 2 * entry.shape[-1]
    if scales is None or len(entry.shape) != 2 or entry.dtype != "U8" or n_in % 16:
        raise _misfit(entry, "its codes or scales are not those of NVFP4")
    fits = (scales.shape, scales.dtype) == ((n_out, n_in // 16), "F8_E4M3")
    _check(entry, fits, f"its scales are {scales.dtype} {list(scales.shape)}")
    _check(entry, (whole.n_elements, whole.dtype) == (1, "F32"), "its scale of all is not one")
    parts = {"codes": entry, "scales": scales, "whole": whole}
    return name, Nvfp4(checkpoint, (n_out, n_in), parts | _inputs(checkpoint, name), divides)


def _nvfp4_codes(checkpoint: Checkpoint, name: str) -> TensorEntry | None:
    """Return the codes of a weight that has a scale of all."""
    tensors = checkpoint.tensors
    if f"{name}_{_WHOLE[True]}" in tensors:
        return tensors.get(f"{name}_packed")
    return tensors.get(name) if f"{name}_{_WHOLE[False]}" in tensors else None


def _inputs(checkpoint: Checkpoint, name: str) -> dict[str, TensorEntry]:
    """Return the scales of a layer's activations, which no plain weight has."""
    module = name.removesuffix("weight")
    tensors = checkpoint.tensors
    return {role: tensors[module + role] for role in _INPUTS if module + role in tensors}


def _mxfp4_blocks(
    checkpoint: Checkpoint, entry: TensorEntry, settings: Mapping[str, Any]
) -> tuple[str, Packed] | None:
    if not entry.name.endswith("_blocks") or settings.get("quant_method") != "mxfp4":
        return None
    name = entry.name.removesuffix("_blocks")
    return name, _mxfp4(checkpoint, entry, checkpoint.tensors.get(f"{name}_scales"))


def _packed_words(
    checkpoint: Checkpoint, entry: TensorEntry, settings: Mapping[str, Any]
) -> tuple[str, Packed] | None:
    if not entry.name.endswith(".qweight") or settings.get("quant_method") not in _LAYOUTS:
        return None
    name = f"{entry.name.removesuffix('qweight')}weight"
    return name, _words(checkpoint, entry, settings)


_WAYS = (
    _bitsandbytes_4,
    _bitsandbytes_8,
    _nvfp4,
    _float8_with_scales,
    _mxfp4_blocks,
    _packed_words,
)


def _four_bit(checkpoint: Checkpoint, parts: Mapping[str, TensorEntry]) -> FourBit:
    entry, nested = parts["codes"], "nested_absmax" in parts
    weight = FourBit(checkpoint, (), parts, {})
    text = weight.read("state", as_bytes=True)(0, parts["state"].n_bytes).flatten().tolist()
    state = parse_json(bytes(text), f"read the quantization of '{entry.name}'", CheckpointError)
    form: dict[str, Any] = {
        "shape": (_COUNT, _COUNT),
        "blocksize": _COUNT,
        "dtype": (*FORMAT_DTYPES,).__contains__,
    }
    form |= {"nested_blocksize": _COUNT, "nested_offset": float} if nested else {}
    good = isinstance(state, dict) and {"quant_map", "absmax"} <= parts.keys()
    good = good and not misfit({key: state.get(key) for key in form}, form)
    _check(entry, good, f"its settings are {str(state)[:80]}")
    n_values = math.prod(state["shape"])
    n_blocks = -(-n_values // state["blocksize"])
    fits = [entry.n_bytes * 2 in (n_values, n_values + 1), parts["absmax"].n_elements == n_blocks]
    fits.append(parts["quant_map"].n_elements == 16)
    if nested:
        n_nested = -(-n_blocks // state["nested_blocksize"])
        fits.append(parts["absmax"].dtype == "U8")
        fits.append(parts["nested_absmax"].n_elements == n_nested)
        fits.append(parts.get("nested_quant_map", entry).n_elements == 256)
    _check(entry, all(fits), "its parts do not fit each other")
    said = {**state, "dtype": FORMAT_DTYPES[state["dtype"]]}
    return replace(weight, shape=tuple(state["shape"]), state=said)


def _float8(
    checkpoint: Checkpoint, entry: TensorEntry, scales: TensorEntry, said: Mapping[str, Any]
) -> Float8:
    block = _block_of(entry, scales, said)
    if misfit(block, (_COUNT, _COUNT)):
        problem = f"config.json has the block size {str(block)[:40]}"
        raise CheckpointError("dequantize", problem, "Give it two numbers")
    wanted = tuple(-(-size // b) for size, b in zip(entry.shape, block, strict=True))
    fits = scales.n_elements == math.prod(wanted) and scales.dtype in {"F32", "BF16", "F16"}
    fits = fits and (len(scales.shape) < 2 or scales.shape == wanted)
    _check(entry, fits, f"its scales are {scales.dtype} {list(scales.shape)}")
    parts = {"codes": entry, "scales": scales, **_inputs(checkpoint, entry.name)}
    powers = said.get("scale_fmt") == "ue8m0"
    return Float8(checkpoint, entry.shape, parts, (block[0], block[1]), powers)


def _block_of(entry: TensorEntry, scales: TensorEntry, said: Mapping[str, Any]) -> Any:
    """Return what one scale is for: the whole, a row, or the block that the config states."""
    if scales.n_elements == 1:
        return list(entry.shape)
    if scales.shape in ((entry.shape[0],), (entry.shape[0], 1)):
        return [1, entry.shape[1]]
    return said.get("weight_block_size") or block_structure(said) or [128, 128]


def _mxfp4(checkpoint: Checkpoint, entry: TensorEntry, scales: TensorEntry | None) -> Mxfp4:
    fits = len(entry.shape) == 4 and entry.shape[3] == 16 and entry.dtype == "U8"
    if scales is None or not fits or (scales.shape, scales.dtype) != (entry.shape[:3], "U8"):
        raise _misfit(entry, "its blocks or scales have another shape")
    n_experts, n_out, n_groups, _ = entry.shape
    parts = {"codes": entry, "scales": scales}
    return Mxfp4(checkpoint, (n_experts, n_groups * 32, n_out), parts)


def _words(checkpoint: Checkpoint, entry: TensorEntry, said: Mapping[str, Any]) -> PackedWords:
    """Return a weight of GPTQ or AWQ, whose codes lie side by side in 32-bit words."""
    method = str(said["quant_method"])
    layout = _layout_of_words(said, method)
    _check(entry, layout in _LAYOUTS[method], f"its {method} layout is '{layout}'")
    parts = _parts_of_words(checkpoint, entry)
    _check(entry, _are_words(parts), "its scales or zeros are missing")
    n_out = parts["scales"].shape[1]
    bits: Any = said.get("bits")
    if said.get("dynamic"):  # layers differ, and only the zeros show this one's
        bits = parts["zeros"].shape[1] * 32 // n_out
    known_bits = (4,) if method == "awq" else (2, 4, 8)
    _check(entry, type(bits) is int and bits in known_bits, f"{method} has {bits} bits")
    _check(entry, said.get("zero_point", True) is True, "it has no zeros")
    n_in = entry.shape[0] if method == "awq" else entry.shape[0] * 32 // bits
    size: Any = n_in if said.get("group_size") == -1 else said.get("group_size")
    words = PackedWords(
        checkpoint, (n_out, n_in), parts, method, bits, size, less_one=layout == "gptq"
    )
    _check(entry, _words_fit(words, bool(said.get("desc_act"))), "its parts do not fit each other")
    same = said.get("sym") is True or "gptqmodel" in str(said.get("meta")) or not words.wraps()
    _check(entry, same, "some zeros are the largest code, which programs read differently")
    return words


def _layout_of_words(said: Mapping[str, Any], method: str) -> str:
    """Return the layout that the first of three keys names; the method's usual one if none does."""
    spoken = [said.get(key) for key in ("checkpoint_format", "version", "format")]
    return str(next(filter(None, spoken), _LAYOUTS[method][0])).lower()


def _parts_of_words(checkpoint: Checkpoint, entry: TensorEntry) -> dict[str, TensorEntry]:
    """Return the codes with those of scales, zeros and groups that lie beside them."""
    module = entry.name.removesuffix("qweight")
    beside = {role: checkpoint.tensors.get(module + end) for role, end in _WORDS.items()}
    return {"codes": entry, **{role: part for role, part in beside.items() if part is not None}}


def _are_words(parts: Mapping[str, TensorEntry]) -> bool:
    """Whether scales and zeros are there, and all are matrices of the dtypes that they have."""
    if not {"scales", "zeros"} <= parts.keys():
        return False
    scales = parts["scales"]
    matrices = all(len(parts[role].shape) == 2 for role in ("codes", "scales", "zeros"))
    dtypes = parts["codes"].dtype == parts["zeros"].dtype == "I32"
    return matrices and dtypes and scales.dtype in FORMAT_DTYPES.values() and scales.n_elements > 0


def _words_fit(words: PackedWords, is_ordered: bool) -> bool:
    """Whether the parts have the shapes, and every input a group; `is_ordered` by activations."""
    (n_out, n_in), parts, is_awq = words.shape, words.parts, words.method == "awq"
    n_groups, n_packed = parts["scales"].shape[0], n_out * words.bits // 32
    fits = parts["zeros"].shape == (n_groups, n_packed) and n_packed * 32 == n_out * words.bits
    fits = fits and parts["codes"].shape[1] == (n_packed if is_awq else n_out)
    if "groups" not in parts:
        fits = fits and type(words.size) is int and words.size > 0 and not is_ordered
        return fits and -(-n_in // words.size) == n_groups
    form = (parts["groups"].shape, parts["groups"].dtype)
    fits = fits and not is_awq and n_in > 0 and form == ((n_in,), "I32")
    groups = words.part("groups") if fits else torch.tensor([-1])
    return 0 <= int(groups.min()) <= int(groups.max()) < n_groups


def _check(entry: TensorEntry, fits: bool, problem: str) -> None:
    if not fits:
        raise _misfit(entry, problem)


def _misfit(entry: TensorEntry, problem: str) -> CheckpointError:
    return CheckpointError(
        f"dequantize '{entry.name}'",
        problem,
        "Supported: 4 and 8 bits of bitsandbytes, float8 (e4m3) with scales, NVFP4, MXFP4, GPTQ in "
        "2, 4 and 8 bits, and AWQ (gemm) in 4; "
        "merge into the 16-bit checkpoint that it was made from",
    )
