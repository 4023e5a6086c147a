"""Loading a base with its experts packed as they are published, so that adapters train on them.

transformers' own packed experts run by kernels that pass no gradient or need a GPU; else it unpacks
all experts as it loads, or cannot load them (NVFP4). Its classes of unpacked experts also run on
packed ones.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from lora_inject.errors import LayerError
from lora_inject.experts.packed_experts import PackedExperts
from lora_inject.experts.stack_formats import Mxfp4Stack, block_structure, read_matrix

# What lies beside the weight of a linear layer, by the `quant_method` of a config.
_BESIDE = {
    "compressed-tensors": (
        "weight",
        "weight_packed",
        "weight_scale",
        "weight_global_scale",
        "weight_zero_point",
        "weight_shape",
        "input_scale",
        "input_global_scale",
    ),
    "modelopt": ("weight", "weight_scale", "weight_scale_2", "input_scale"),
}
_WEIGHTS = ("weight", "weight_packed")


@contextmanager
def packed_experts() -> Iterator[None]:
    """Have `from_pretrained` keep stacks of experts packed, in a model that trains.

    Experts in MXFP4, NVFP4 or float8 keep the memory of their codes, on any device and without
    kernels. Each is unpacked where it is used, and again in the backward pass. All other layers are
    unpacked as they load, and activations are not quantized. Other threads must not load models
    meanwhile.

    Raises:
        LayerError: transformers is not installed, or older than 5.24; in `from_pretrained`, a
            weight is stored in another format.

    Examples:
        >>> from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING
        >>> with packed_experts():  # model = AutoModelForCausalLM.from_pretrained("gpt-oss-20b")
        ...     AUTO_QUANTIZER_MAPPING["mxfp4"].__name__
        'KeptMxfp4'
    """
    try:
        import transformers
        from packaging.version import Version
    except ImportError:
        remedy = "Run pip install 'transformers>=5.24' accelerate"
        raise LayerError("packed_experts()", "transformers is not installed", remedy) from None
    if Version(transformers.__version__) < Version("5.24"):
        raise LayerError(
            "packed_experts()",
            f"transformers {transformers.__version__} loads packed experts in another way",
            "Install transformers 5.24 or newer",
        )
    from transformers.quantizers import auto

    problems: list[LayerError] = []
    tables: list[dict[str, Any]] = [
        auto.AUTO_QUANTIZER_MAPPING,
        auto.AUTO_QUANTIZATION_CONFIG_MAPPING,
    ]
    before = [dict(table) for table in tables]
    quantizers = _published_by_transformers(problems) | _published_by_others(problems)
    own = [quantizers, _configs()]
    for table, rows in zip(tables, own, strict=True):
        table.update(rows)
    try:
        yield
    except RuntimeError as error:  # transformers' report of all that went wrong
        if problems:
            raise problems[0] from error
        raise
    finally:
        for table, rows in zip(tables, before, strict=True):
            table.clear()
            table.update(rows)


def _kept_linears(problems: list[LayerError]) -> Any:
    """Return what quantizers share whose experts are stored as linear layers."""

    class KeptLinears:
        def get_load_operations(self) -> dict[str, Any]:
            return {"dequantize": _operation(_of_linears, problems)}

        def postprocess_model(self, model: Any, **more: Any) -> Any:
            _freeze(model)
            return super().postprocess_model(model, **more)  # type: ignore[misc]

    return KeptLinears


def _published_by_transformers(problems: list[LayerError]) -> dict[str, type]:
    """Return quantizers in the place of its own that would unpack experts, or run kernels."""
    from transformers.quantizers.quantizer_finegrained_fp8 import FineGrainedFP8HfQuantizer
    from transformers.quantizers.quantizer_mxfp4 import Mxfp4HfQuantizer

    class KeptMxfp4(Mxfp4HfQuantizer):
        def validate_environment(self, *_: Any, **__: Any) -> None:
            self.quantization_config.dequantize = True

        def get_load_operations(self) -> dict[str, Any]:
            return {"dequantize": _operation(_of_gpt_oss, problems)}

    class KeptFloat8(_kept_linears(problems), FineGrainedFP8HfQuantizer):  # type: ignore[misc]
        def validate_environment(self, *_: Any, **__: Any) -> None:
            self.quantization_config.dequantize = True

    return {"mxfp4": KeptMxfp4, "fp8": KeptFloat8, "mxfp8": KeptFloat8}


def _published_by_others(problems: list[LayerError]) -> dict[str, type]:
    """Return quantizers for files of compressed-tensors and modelopt, without these packages."""
    from transformers.quantizers.base import HfQuantizer

    class KeptByNames(_kept_linears(problems), HfQuantizer):  # type: ignore[misc]
        def __init__(self, quantization_config: Any, **more: Any) -> None:
            super().__init__(quantization_config, **more)
            self.serialized_names = {"weight": list(_BESIDE[quantization_config.quant_method])}

        @property
        def is_trainable(self) -> bool:
            return True

        def is_serializable(self) -> bool:
            return True

    return dict.fromkeys(_BESIDE, KeptByNames)


def _configs() -> dict[str, type]:
    """Return the class of the configs that `KeptByNames` reads: what a file says, as it is."""
    from transformers.utils.quantization_config import QuantizationConfigMixin

    class Said(QuantizationConfigMixin):  # type: ignore[misc]
        quant_method: Any

        def __init__(self, quant_method: str, **said: Any) -> None:
            self.quant_method = quant_method
            self.dequantize = True
            self.said = said

    return dict.fromkeys(_BESIDE, Said)


def _operation(read: Callable[..., dict[str, Any]], problems: list[LayerError]) -> type:
    """Return an operation of transformers' loading that calls `read` and notes what it raises."""
    from transformers.core_model_loading import ConversionOps
    from transformers.quantizers.quantizers_utils import get_module_from_name

    class Keep(ConversionOps):  # type: ignore[misc]
        def __init__(self, hf_quantizer: Any) -> None:
            self.hf_quantizer = hf_quantizer

        def convert(self, input_dict: dict[str, Any], *_: Any, **more: Any) -> dict[str, Any]:
            full = more["full_layer_name"]
            module, name = get_module_from_name(more["model"], full)
            like: Tensor = getattr(module, name)
            try:
                return read(input_dict, full, like, self.hf_quantizer.quantization_config)
            except LayerError as error:
                problems.append(error)
                raise

    return Keep


def _of_gpt_oss(tensors: Mapping[str, Any], full: str, like: Tensor, _: Any) -> dict[str, Any]:
    """Return a stack that is stored as one, of blocks and scales."""
    name = full.rpartition(".")[2]
    each = (tensors[f"{name}_{part}"] for part in ("blocks", "scales"))
    blocks, scales = (part[0] if isinstance(part, list) else part for part in each)
    parts = {"codes": blocks.flatten(-2), "scales": scales}
    stack = PackedExperts(Mxfp4Stack(), parts, like.dtype)
    return {full: nn.Parameter(stack, requires_grad=False)}


def _of_linears(
    tensors: Mapping[str, Any], full: str, like: Tensor, settings: Any
) -> dict[str, Any]:
    """Return what linear layers store as one matrix for each: packed for a stack, else unpacked.

    The matrices of a stack are stacked and joined by transformers' next operations.
    """
    block = _block(settings)
    made: dict[str, Any] = {}
    for pattern in [key for key in tensors if key.rpartition(".")[2] in _WEIGHTS]:
        prefix = pattern.removesuffix(pattern.rpartition(".")[2])
        beside = {
            key.removeprefix(prefix): _listed(tensors[key])
            for key in tensors
            if key.startswith(prefix)
        }
        matrices = [
            _matrix({name: each[n] for name, each in beside.items()}, full, like, block)
            for n in range(len(_listed(tensors[pattern])))
        ]
        if like.dim() == 3:
            made[pattern] = matrices
        else:
            made[full] = matrices[0]
    if len(made) > 1:
        _check_joinable(made, full)
    return made


def _check_joinable(made: Mapping[str, list[Tensor]], full: str) -> None:
    """Refuse matrices of which one ends within a block of scales: in a stack they are one."""
    for matrices in made.values():
        first = matrices[0]
        rows = max(first.form.rows_of.values()) if isinstance(first, PackedExperts) else 1
        if len(first) % rows:
            raise LayerError(
                f"packed_experts(), '{full}'",
                f"of the matrices that it joins one has {len(first):,} outputs, and {rows} of them "
                "share a scale",
                "Load it dequantized, outside packed_experts()",
            )


def _matrix(
    tensors: Mapping[str, Tensor], full: str, like: Tensor, block: tuple[int, int] | None
) -> Tensor:
    known = read_matrix(tensors, block, f"packed_experts(), '{full}'")
    if known is None:
        return next(tensors[name] for name in _WEIGHTS if name in tensors).to(like.dtype)
    packed = PackedExperts(*known, like.dtype, is_turned=True)
    return packed if like.dim() == 3 else packed.unpacked()


def _listed(tensors: Any) -> list[Tensor]:
    return tensors if isinstance(tensors, list) else [tensors]


def _block(settings: Any) -> tuple[int, int] | None:
    """Return the block of float8 that a config states."""
    said = getattr(settings, "said", {})
    block = getattr(settings, "weight_block_size", None) or block_structure(said)
    return None if block is None else (int(block[0]), int(block[1]))


def _freeze(model: nn.Module) -> None:
    """Freeze stacks, of which transformers makes Parameters that would get gradients."""
    for parameter in model.parameters():
        if isinstance(parameter, PackedExperts):
            parameter.requires_grad_(False)
