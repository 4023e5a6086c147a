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

from lora_inject.checkpoint.index import Checkpoint
from lora_inject.checkpoint.packed import Float8, FourBit, Int8, Mxfp4, Packed
from lora_inject.errors import CheckpointError
from lora_inject.storage.safetensors_file import TensorEntry
from lora_inject.storage.strict_json import parse_json

FORMAT_DTYPES = {"float32": "F32", "bfloat16": "BF16", "float16": "F16"}
"""The format's names of dtypes that a checkpoint can be written in."""
_STATES = {f"quant_state.bitsandbytes__{kind}": kind.upper() for kind in ("nf4", "fp4")}
_MARKS = {
    **{f"weight.{state}": f"bitsandbytes 4-bit ({kind})" for state, kind in _STATES.items()},
    "weight.absmax": "bitsandbytes 4-bit",
    "weight.SCB": "bitsandbytes 8-bit",
    "SCB": "bitsandbytes 8-bit",
    "qweight": "GPTQ or AWQ",
    "weight_packed": "compressed-tensors",
    "weight_scale_inv": "fp8 with block scales",
    "weight_scale": "fp8 or int8 with scales",
}
_INTEGER = {"U8", "I8", "I32", "U32", "F4"}
_FLOAT8 = {"F8_E4M3", "F8_E5M2", "F8_E4M3FNUZ", "F8_E5M2FNUZ"}
_KNOWN = ("bitsandbytes", "fp8 with block", "MXFP4")  # what `unpacked` can read
_ROLES = ("absmax", "quant_map", "nested_absmax", "nested_quant_map", *_STATES)  # of 4 bits


def method_of(checkpoint: Checkpoint, name: str) -> str | None:
    """Return how one weight is quantized; None if it is a plain float tensor or absent."""
    tensors, module = checkpoint.tensors, name.removesuffix(".weight")
    for mark, method in _MARKS.items():
        if f"{module}.{mark}" in tensors:
            return method
    if f"{name}_blocks" in tensors and f"{name}_scales" in tensors:
        return "MXFP4"
    dtype = tensors[name].dtype if name in tensors else ""
    if dtype in _FLOAT8:
        return "fp8"
    return f"packed integers ({dtype})" if dtype in _INTEGER else None


def why_not(checkpoint: Checkpoint, names: Iterable[str]) -> tuple[str, str] | None:
    """Return why some weights take no update, and a remedy; None if none is quantized."""
    for name in names:
        if method := method_of(checkpoint, name):
            remedy = (
                "Merge into the 16-bit checkpoint that it was made from and quantize the result"
            )
            if method.startswith(_KNOWN):
                remedy += ", or write the merged one in 16 bits (--dequantize bfloat16)"
                remedy += "" if method == "MXFP4" else " or in its own format (--requantize)"
            return f"'{name}' is quantized: {method}", remedy
    return None


def unpacked(checkpoint: Checkpoint, dtype: str | None) -> Checkpoint:
    """Return a checkpoint that shows quantized tensors as float tensors of a dtype.

    Each tensor has its plain name and shape, so adapters are placed as on any base. Without a dtype
    the tensors will be quantized again, and have the name of their format as dtype.
    """
    packed = dict(_find(checkpoint))
    parts = {part.name for each in packed.values() for part in each.parts.values()}
    for entry in checkpoint if dtype is not None else ():
        if entry.name not in parts and len(entry.shape) > 1:
            method = method_of(checkpoint, entry.name)
            _check(entry, method is None, f"its quantization, {method}, is not supported")
    if not packed:
        asked = f"{'re' if dtype is None else 'de'}quantize '{checkpoint.folder}'"
        remedy = f"Leave it out, or write every float tensor so: dtype={dtype or 'bfloat16'!r}"
        raise CheckpointError(asked, "none of its tensors is quantized", remedy)
    dtypes = {
        name: each.form if dtype is None else FORMAT_DTYPES[dtype] for name, each in packed.items()
    }
    shown = {n: TensorEntry(n, dtypes[n], each.shape, 0, 0) for n, each in packed.items()}
    return replace(checkpoint, packed=packed, shown=shown)


def _find(checkpoint: Checkpoint) -> Iterator[tuple[str, Packed]]:
    tensors, said = checkpoint.tensors, checkpoint.config.get("quantization_config")
    said = said if isinstance(said, dict) else {}
    for entry in checkpoint:
        name, module = entry.name, entry.name.removesuffix("weight")
        near = {role: tensors[f"{name}.{role}"] for role in _ROLES if f"{name}.{role}" in tensors}
        if state := next((role for role in _STATES if role in near), None):
            yield name, _four_bit(checkpoint, {"codes": entry, "state": near[state], **near})
        elif entry.dtype == "I8" and f"{module}SCB" in tensors and len(entry.shape) == 2:
            parts = {"codes": entry, "scales": tensors[f"{module}SCB"]}
            if (form := tensors.get(f"{module}weight_format")) is not None:
                parts["format"] = form
            _check(entry, parts["scales"].n_elements == entry.shape[0], "its scales do not fit")
            yield name, Int8(checkpoint, entry.shape, parts)
        elif entry.dtype in _FLOAT8 and not name.endswith("_scale_inv"):
            scales = tensors.get(f"{name}_scale_inv")
            fits = entry.dtype == "F8_E4M3" and len(entry.shape) == 2
            if scales is None or not fits:
                raise _misfit(entry, "it is float8 without block scales")
            yield name, _float8(checkpoint, entry, scales, said)
        elif name.endswith("_blocks") and said.get("quant_method") == "mxfp4":
            stem = name.removesuffix("_blocks")
            yield stem, _mxfp4(checkpoint, entry, tensors.get(f"{stem}_scales"))


def _four_bit(checkpoint: Checkpoint, parts: Mapping[str, TensorEntry]) -> FourBit:
    entry, nested = parts["codes"], "nested_absmax" in parts
    found = FourBit(checkpoint, (), parts, {})
    text = found.read("state", as_bytes=True)(0, parts["state"].n_bytes).flatten().tolist()
    state = parse_json(bytes(text), f"read the quantization of '{entry.name}'", CheckpointError)
    good = isinstance(state, dict) and {"quant_map", "absmax"} <= parts.keys()
    shape: Any = state.get("shape") if good else None
    good = good and isinstance(shape, list) and len(shape) == 2
    numbers = ("blocksize", *(("nested_blocksize",) if nested else ()))
    counts = [*shape, *map(state.get, numbers)] if good else []
    good = good and all(type(n) is int and n > 0 for n in counts)
    good = good and state.get("dtype") in FORMAT_DTYPES
    _check(entry, good, f"its settings are {str(state)[:80]}")
    n_values = math.prod(shape)
    n_blocks = -(-n_values // state["blocksize"])
    fits = [entry.n_bytes * 2 in (n_values, n_values + 1), parts["absmax"].n_elements == n_blocks]
    fits.append(parts["quant_map"].n_elements == 16)
    if nested:
        n_nested = -(-n_blocks // state["nested_blocksize"])
        fits.append(parts["absmax"].dtype == "U8")
        fits.append(parts["nested_absmax"].n_elements == n_nested)
        fits.append(parts.get("nested_quant_map", entry).n_elements == 256)
        fits.append(isinstance(state.get("nested_offset"), float))
    _check(entry, all(fits), "its parts do not fit each other")
    said = {**state, "dtype": FORMAT_DTYPES[state["dtype"]]}
    return replace(found, shape=tuple(shape), state=said)


def _float8(
    checkpoint: Checkpoint, entry: TensorEntry, scales: TensorEntry, said: Mapping[str, Any]
) -> Float8:
    block = said.get("weight_block_size", [128, 128])
    good = isinstance(block, list) and len(block) == 2
    if not good or not all(type(b) is int and b > 0 for b in block):
        found = f"config.json has the block size {str(block)[:40]}"
        raise CheckpointError("dequantize", found, "Give it two numbers")
    wanted = tuple(-(-size // b) for size, b in zip(entry.shape, block, strict=True))
    fits = scales.shape == wanted and scales.dtype in {"F32", "BF16", "F16"}
    _check(entry, fits, f"its scales are {scales.dtype} {list(scales.shape)}")
    parts, powers = {"codes": entry, "scales": scales}, said.get("scale_fmt") == "ue8m0"
    return Float8(checkpoint, entry.shape, parts, (block[0], block[1]), powers)


def _mxfp4(checkpoint: Checkpoint, entry: TensorEntry, scales: TensorEntry | None) -> Mxfp4:
    fits = len(entry.shape) == 4 and entry.shape[3] == 16 and entry.dtype == "U8"
    if scales is None or not fits or (scales.shape, scales.dtype) != (entry.shape[:3], "U8"):
        raise _misfit(entry, "its blocks or scales have another shape")
    n_experts, n_out, n_groups, _ = entry.shape
    parts = {"codes": entry, "scales": scales}
    return Mxfp4(checkpoint, (n_experts, n_groups * 32, n_out), parts)


def _check(entry: TensorEntry, fits: bool, found: str) -> None:
    if not fits:
        raise _misfit(entry, found)


def _misfit(entry: TensorEntry, found: str) -> CheckpointError:
    return CheckpointError(
        f"dequantize '{entry.name}'",
        found,
        "Supported: 4 and 8 bits of bitsandbytes, float8 (e4m3) with block scales, and MXFP4; "
        "merge into the 16-bit checkpoint that it was made from",
    )
