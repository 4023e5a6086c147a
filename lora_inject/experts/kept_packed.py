"""Loading a base with its experts packed as they are published, so that adapters train on them.

transformers' own packed experts run by kernels that pass no gradient or need a GPU; else it unpacks
all experts as it loads. Its classes of unpacked experts also run on packed ones.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from lora_inject.errors import LayerError
from lora_inject.experts.packed_experts import PackedExperts
from lora_inject.experts.stack_formats import Mxfp4Stack, read_matrix


@contextmanager
def packed_experts() -> Iterator[None]:
    """Have `from_pretrained` keep stacks of experts packed, in a model that trains.

    Experts in MXFP4 or float8 keep the memory of their codes, on any device and without kernels.
    Each is unpacked where it is used, and again in the backward pass. All other layers are unpacked
    as they load, and activations are not quantized. Checkpoints of other formats load as outside.
    Other threads must not load models meanwhile.

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
    before = dict(auto.AUTO_QUANTIZER_MAPPING)
    auto.AUTO_QUANTIZER_MAPPING.update(_quantizers(problems))
    try:
        yield
    except RuntimeError as error:  # transformers' report of all that went wrong
        if problems:
            raise problems[0] from error
        raise
    finally:
        auto.AUTO_QUANTIZER_MAPPING.clear()
        auto.AUTO_QUANTIZER_MAPPING.update(before)


def _quantizers(problems: list[LayerError]) -> dict[str, Any]:
    """Return quantizers in the place of those that would unpack experts, or run kernels."""
    from transformers.quantizers.quantizer_finegrained_fp8 import FineGrainedFP8HfQuantizer
    from transformers.quantizers.quantizer_mxfp4 import Mxfp4HfQuantizer

    class KeptMxfp4(Mxfp4HfQuantizer):
        def validate_environment(self, *_: Any, **__: Any) -> None:
            self.quantization_config.dequantize = True

        def get_load_operations(self) -> dict[str, Any]:
            return {"dequantize": _operation(_of_gpt_oss, problems)}

    class KeptFloat8(FineGrainedFP8HfQuantizer):
        def validate_environment(self, *_: Any, **__: Any) -> None:
            self.quantization_config.dequantize = True

        def get_load_operations(self) -> dict[str, Any]:
            return {"dequantize": _operation(_of_linears, problems)}

        def postprocess_model(self, model: Any, **more: Any) -> Any:
            for parameter in model.parameters():  # transformers has them get gradients
                if isinstance(parameter, PackedExperts):
                    parameter.requires_grad_(False)
            return super().postprocess_model(model, **more)

    return {"mxfp4": KeptMxfp4, "fp8": KeptFloat8, "mxfp8": KeptFloat8}


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
    block = settings.weight_block_size
    made: dict[str, Any] = {}
    for pattern in [key for key in tensors if key.rpartition(".")[2] == "weight"]:
        prefix = pattern.removesuffix("weight")
        beside = {
            key.removeprefix(prefix): _listed(tensors[key])
            for key in tensors
            if key.startswith(prefix)
        }
        matrices = [
            _matrix({name: each[n] for name, each in beside.items()}, full, like, block)
            for n in range(len(beside["weight"]))
        ]
        if like.dim() == 3:
            made[pattern] = matrices
        else:
            made[full] = matrices[0]
    if len(made) > 1:
        _check_joinable(made, full)
    return made


def _listed(tensors: Any) -> list[Tensor]:
    return tensors if isinstance(tensors, list) else [tensors]


def _matrix(
    tensors: Mapping[str, Tensor], full: str, like: Tensor, block: tuple[int, int] | None
) -> Tensor:
    known = read_matrix(tensors, block, f"packed_experts(), '{full}'")
    if known is None:
        return tensors["weight"].to(like.dtype)
    packed = PackedExperts(*known, like.dtype, is_turned=True)
    return packed if like.dim() == 3 else packed.unpacked()


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
