"""Loading GPT-OSS with its experts packed, so that adapters train on and below them.

transformers' own MXFP4 experts run by kernels that pass no gradient, on GPUs that have them; else
it unpacks all experts as it loads. Its class of unpacked experts also runs on packed ones.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

from lora_inject.errors import LayerError
from lora_inject.experts.packed_experts import PackedExperts


@contextmanager
def packed_experts() -> Iterator[None]:
    """Have `from_pretrained` keep MXFP4 experts packed, in a model that trains.

    The model is the one that `Mxfp4Config(dequantize=True)` gives, on any device, in the memory of
    4 bits for each value of the experts. Each expert is unpacked where it is used, and again in
    the backward pass. Other threads must not load models meanwhile.

    Raises:
        LayerError: transformers is not installed, or older than 5.24.

    Examples:
        >>> from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING
        >>> with packed_experts():  # model = AutoModelForCausalLM.from_pretrained("gpt-oss-20b")
        ...     AUTO_QUANTIZER_MAPPING["mxfp4"].__name__
        'KeptPacked'
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
    from transformers.core_model_loading import ConversionOps
    from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING
    from transformers.quantizers.quantizer_mxfp4 import Mxfp4HfQuantizer
    from transformers.quantizers.quantizers_utils import get_module_from_name

    class Pack(ConversionOps):
        def __init__(self, hf_quantizer: Any) -> None:
            self.hf_quantizer = hf_quantizer

        def convert(self, input_dict: dict[str, Any], *_: Any, **more: Any) -> dict[str, Any]:
            full = more["full_layer_name"]
            module, name = get_module_from_name(more["model"], full)
            parts = (input_dict[f"{name}_{part}"] for part in ("blocks", "scales"))
            blocks, scales = (part[0] if isinstance(part, list) else part for part in parts)
            stack = PackedExperts(blocks.flatten(-2), scales, getattr(module, name).dtype)
            return {full: nn.Parameter(stack, requires_grad=False)}

    class KeptPacked(Mxfp4HfQuantizer):
        def validate_environment(self, *_: Any, **__: Any) -> None:
            self.quantization_config.dequantize = True

        def get_load_operations(self) -> dict[str, Any]:
            return {"dequantize": Pack}

    before = AUTO_QUANTIZER_MAPPING["mxfp4"]
    AUTO_QUANTIZER_MAPPING["mxfp4"] = KeptPacked
    try:
        yield
    finally:
        AUTO_QUANTIZER_MAPPING["mxfp4"] = before
