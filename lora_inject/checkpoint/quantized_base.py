"""Quantized weights of a checkpoint: recognized, refused with a remedy, or shown as floats.

A quantized weight is recognized by its neighbors (`qweight`, `weight.absmax`, `weight_scale_inv`,
`_blocks`) and by what the config says. Only the tensors that the adapter needs are checked, so an
adapter on layers that stayed in 16 bits merges as usual.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Mapping
from dataclasses import replace
from typing import Any

from lora_inject.checkpoint.index import Checkpoint
from lora_inject.checkpoint.packed import (
    Float8,
    FourBit,
    Mxfp4,
    Nvfp4,
    Packed,
)
from lora_inject.core.files.safetensors_file import DTYPE_BITS, TensorEntry
from lora_inject.core.files.strict_json import parse_json
from lora_inject.errors import CheckpointError

FORMAT_DTYPES = {"float32": "F32", "bfloat16": "BF16", "float16": "F16"}
"""The format's names of dtypes that a checkpoint can be written in."""
_CODES = ("", "_packed", "_blocks")  # ends of the names of a weight's codes
_PACKED_DTYPES = {"U8", "I8", "I32", "U32", "F4"}
_PACKED_DTYPES |= {"F8_E4M3", "F8_E5M2", "F8_E4M3FNUZ", "F8_E5M2FNUZ"}

Settings = Mapping[str, Any]
"""What `config.json` says of the quantization."""
Found = tuple[str, Packed] | None
"""A quantized weight by its plain name; None for a tensor that is not the codes of one."""


def why_no_update(checkpoint: Checkpoint, names: Iterable[str]) -> tuple[str, str] | None:
    """Return why some weights take no update, and a remedy; None if none is quantized."""
    for name in names:
        module = name.removesuffix("weight")
        for stored in (f"{module}qweight", *(name + end for end in _CODES)):
            if (entry := checkpoint.tensors.get(stored)) is None:
                continue
            remedy = (
                "Merge into the 16-bit checkpoint that it was made from and quantize the result"
            )
            try:
                found = _recognized(checkpoint, entry)
            except CheckpointError as error:
                return f"'{name}' is quantized: {error.found}", remedy
            if found is None and entry.dtype not in _PACKED_DTYPES:
                continue
            if found is None:
                problem = f"'{name}' is quantized: {_stored_as(checkpoint, entry)}"
                return problem, f"{remedy}{_tool(checkpoint, entry)}"
            remedy += ", or write the merged one in 16 bits (--dequantize bfloat16)"
            remedy += " or in its own format (--requantize)" if found[1].written else ""
            return f"'{name}' is quantized: {found[1].title}", remedy
    return None


def unpacked(checkpoint: Checkpoint, dtype: str | None) -> Checkpoint:
    """Return a checkpoint that shows quantized tensors as float tensors of a dtype.

    Each tensor has its plain name and shape, so adapters are placed as on any base. Without a dtype
    the tensors will be quantized again, and have the name of their format as dtype.
    """
    packed = dict(filter(None, (_recognized(checkpoint, entry) for entry in checkpoint)))
    parts = {part.name for weight in packed.values() for part in weight.parts.values()}
    for entry in checkpoint if dtype is not None or not packed else ():
        known = entry.name in parts or len(entry.shape) < 2 or entry.dtype not in _PACKED_DTYPES
        problem = f"{_stored_as(checkpoint, entry)}, without scales that are known"
        _check(entry, known, problem, _tool(checkpoint, entry))
    if not packed:
        asked = f"{'re' if dtype is None else 'de'}quantize '{checkpoint.folder}'"
        remedy = f"Leave it out, or write every float tensor so: dtype={dtype or 'bfloat16'!r}"
        raise CheckpointError(asked, "none of its tensors is quantized", remedy)
    shown = {}
    for name, weight in packed.items():
        shown_dtype = weight.form if dtype is None else FORMAT_DTYPES[dtype]
        shown[name] = TensorEntry(name, shown_dtype, weight.shape, 0, 0)
    return replace(checkpoint, packed=packed, shown=shown)


def _recognized(checkpoint: Checkpoint, entry: TensorEntry) -> Found:
    """Return the weight whose codes a tensor is, in the first format that knows it."""
    said = checkpoint.config.get("quantization_config")
    settings = said if isinstance(said, dict) else {}
    for way in (_four_bit, _nvfp4, _float8, _mxfp4):
        if (found := way(checkpoint, entry, settings)) is not None:
            return found
    return None


def _beside(checkpoint: Checkpoint, start: str, **ends: str) -> dict[str, TensorEntry]:
    """Return the tensors that are there, by their roles; each has a name that begins so."""
    tensors = checkpoint.tensors
    return {role: tensors[start + end] for role, end in ends.items() if start + end in tensors}


def _bytes_of(entry: TensorEntry) -> TensorEntry:
    """Return the same bytes as integers, whatever dtype they are stored as."""
    return replace(entry, dtype="U8", shape=(entry.n_bytes,))


# Formats: each returns None for a tensor that it does not know -----------------------------------


def _four_bit(checkpoint: Checkpoint, entry: TensorEntry, _: Settings) -> Found:
    roles = ("absmax", "quant_map", "nested_absmax", "nested_quant_map")
    parts = _beside(checkpoint, f"{entry.name}.", **{role: role for role in roles})
    kinds = {kind: f"quant_state.bitsandbytes__{kind}" for kind in ("nf4", "fp4")}
    states = [*_beside(checkpoint, f"{entry.name}.", **kinds).values()]
    if not states:
        return None
    parts |= {"codes": _bytes_of(entry), "state": _bytes_of(states[0])}
    weight = FourBit(checkpoint.path_of, (), parts, {})
    text = bytes(weight.part("state").tolist())
    state = parse_json(text, f"read the quantization of '{entry.name}'", CheckpointError)
    state, nested = state if isinstance(state, dict) else {}, "nested_absmax" in parts
    sizes: list[Any] = [state.get("blocksize"), state.get("nested_blocksize") if nested else 1]
    good = _are_counts(state.get("shape"), 2) and state.get("dtype") in FORMAT_DTYPES
    good = good and _are_counts(sizes, 2)
    good = good and (not nested or type(state.get("nested_offset")) is float)
    _check(entry, good, f"its settings are {str(state)[:80]}")
    n_values = math.prod(state["shape"])
    n_blocks = -(-n_values // sizes[0])
    due: Due = {"codes": (_ANY, (-(-n_values // 2),)), "quant_map": (_ANY, 16)}
    due["absmax"] = ({"U8"} if nested else _ANY, n_blocks)
    if nested:
        due |= {"nested_absmax": (_ANY, -(-n_blocks // sizes[1])), "nested_quant_map": (_ANY, 256)}
    _check_parts(entry, parts, due)
    said = {**state, "dtype": FORMAT_DTYPES[state["dtype"]]}
    return entry.name, replace(weight, shape=tuple(state["shape"]), state=said)


def _float8(checkpoint: Checkpoint, entry: TensorEntry, said: Settings) -> Found:
    """Recognize the weights of DeepSeek (`weight_scale_inv`) and others (`weight_scale`)."""
    beside = _beside(checkpoint, entry.name, blocks="_scale_inv", rows="_scale")
    if entry.dtype != "F8_E4M3" or not beside or len(entry.shape) != 2:
        return None
    scales, (n_out, n_in) = next(iter(beside.values())), entry.shape
    block: Any = said.get("weight_block_size") or [128, 128]
    if scales.n_elements == 1:
        block = [n_out, n_in]
    elif scales.shape in ((n_out,), (n_out, 1)):
        block = [1, n_in]
    if not _are_counts(block, 2):
        problem = f"config.json has the block size {str(block)[:40]}"
        raise CheckpointError("dequantize", problem, "Give it two numbers")
    n_blocks = (-(-n_out // block[0]), -(-n_in // block[1]))
    shape = n_blocks if len(scales.shape) > 1 else math.prod(n_blocks)
    _check_parts(entry, {"scales": scales}, {"scales": (_FLOATS, shape)})
    parts = {"codes": entry, "scales": scales, **_of_inputs(checkpoint, entry.name)}
    blocks, powers = (block[0], block[1]), said.get("scale_fmt") == "ue8m0"
    return entry.name, Float8(checkpoint.path_of, entry.shape, parts, blocks, powers)


def _nvfp4(checkpoint: Checkpoint, entry: TensorEntry, _: Settings) -> Found:
    """Recognize a weight as compressed-tensors (`weight_packed`) or modelopt (`weight`) has it."""
    name = entry.name.removesuffix("_packed")
    divides = name != entry.name
    whole = "_global_scale" if divides else "_scale_2"
    parts = {"codes": entry, **_beside(checkpoint, name, scales="_scale", whole=whole)}
    if "whole" not in parts:
        return None
    n_out, n_in = entry.shape[0], 2 * entry.shape[-1]
    due: Due = {"codes": ({"U8"}, (n_out, n_in // 2)), "whole": ({"F32"}, 1)}
    _check_parts(entry, parts, due | {"scales": ({"F8_E4M3"}, (n_out, n_in // 16))})
    _check(entry, n_in % 16 == 0, f"its rows are {n_in} long, and groups of 16 share a scale")
    parts |= _of_inputs(checkpoint, name)
    return name, Nvfp4(checkpoint.path_of, (n_out, n_in), parts, divides)


def _of_inputs(checkpoint: Checkpoint, name: str) -> dict[str, TensorEntry]:
    """Return the scales of a layer's activations: parts, as no plain weight has them."""
    ends = ("input_scale", "input_global_scale")
    return _beside(checkpoint, name.removesuffix("weight"), **{end: end for end in ends})


def _mxfp4(checkpoint: Checkpoint, entry: TensorEntry, said: Settings) -> Found:
    name = entry.name.removesuffix("_blocks")
    if name == entry.name or said.get("quant_method") != "mxfp4":
        return None
    parts = {"codes": entry, **_beside(checkpoint, name, scales="_scales")}
    n_experts, n_out, n_groups = (*entry.shape, 0, 0, 0)[:3]
    due: Due = {"codes": ({"U8"}, (n_experts, n_out, n_groups, 16))}
    _check_parts(entry, parts, due | {"scales": ({"U8"}, (n_experts, n_out, n_groups))})
    return name, Mxfp4(checkpoint.path_of, (n_experts, n_groups * 32, n_out), parts)


_ANY = frozenset(DTYPE_BITS)
_FLOATS = frozenset(FORMAT_DTYPES.values())
Due = dict[str, tuple[Collection[str], int | tuple[int, ...]]]
"""By the role of a part its dtypes, and its shape or its number of elements."""


def _check_parts(entry: TensorEntry, parts: Mapping[str, TensorEntry], due: Due) -> None:
    """Refuse a weight that lacks a part, or has one of another dtype or shape."""
    for role, (dtypes, shape) in due.items():
        part = parts.get(role)
        _check(entry, part is not None, f"its parts lack the {role}")
        if part is not None:
            found = part.n_elements if isinstance(shape, int) else part.shape
            problem = f"its parts do not fit each other: '{part.name}' is {part.dtype} "
            _check(entry, part.dtype in dtypes and found == shape, f"{problem}{list(part.shape)}")


def _are_counts(values: Any, n: int) -> bool:
    """Whether this is a list of `n` positive integers."""
    if not isinstance(values, list) or len(values) != n:
        return False
    return all(type(value) is int and 0 < value < 2**63 for value in values)


def _check(entry: TensorEntry, fits: bool, problem: str, tool: str = "") -> None:
    if not fits:
        raise CheckpointError(
            f"dequantize '{entry.name}'",
            problem,
            "Supported: 4 bits of bitsandbytes, float8 (e4m3) with scales, NVFP4 and MXFP4; "
            f"merge into the 16-bit checkpoint that it was made from{tool}",
        )


# GPTQ and AWQ, which gptqmodel unpacks ----------------------------------------------------------

_TOOLS = {"gptq": "dequantize_model", "awq": "dequantize_gemm"}
"""The function of gptqmodel 7.7 that gives the floats of a method; that for models has other values
for AWQ, whose codes it takes in another order."""


def _method(checkpoint: Checkpoint, entry: TensorEntry) -> str | None:
    """Return the method that packs codes into a layer's `qweight`, if gptqmodel knows it."""
    said = checkpoint.config.get("quantization_config")
    method = said.get("quant_method") if isinstance(said, dict) else None
    known = isinstance(method, str) and method in _TOOLS
    return method if known and entry.name.endswith("qweight") else None


def _stored_as(checkpoint: Checkpoint, entry: TensorEntry) -> str:
    method = _method(checkpoint, entry)
    return f"it is stored as {entry.dtype}{f' of {method.upper()}' if method else ''}"


def _tool(checkpoint: Checkpoint, entry: TensorEntry) -> str:
    """Return the way over plain floats, for the end of a remedy."""
    method = _method(checkpoint, entry)
    if method is None:
        return ""
    floats = "into its plain floats, which gptqmodel writes"
    return f", or {floats} ({_TOOLS[method]})"
