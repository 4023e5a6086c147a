"""All that the package knows of other libraries: a row for each, in the order of asking."""

from __future__ import annotations

from lora_inject.core.layers.library import LIBRARIES, Packs
from lora_inject.core.layers.weight_kinds import OF_ANY_LIBRARY
from lora_inject.distributed.sharding import Sharding
from lora_inject.formats.older_names import OlderNames
from lora_inject.integrations.accelerate import Accelerate
from lora_inject.integrations.peft_wrapped import Peft
from lora_inject.integrations.stand_ins import Methods
from lora_inject.integrations.transformers import Transformers
from lora_inject.quantized.bitsandbytes import BitsAndBytes4, BitsAndBytes8
from lora_inject.quantized.libraries import (
    HQQ,
    CompressedTensors,
    FineGrained,
    FineGrainedExperts,
    Kernel,
    KernelExperts,
    Multiplies,
    OfLayer,
    OfTensor,
    Quantized,
    Quanto,
    TorchAO,
)

_TRANSFORMERS = "transformers.integrations"


def fill() -> None:
    """Fill the tables of the core."""
    LIBRARIES[:] = [
        Accelerate(),
        Packs("bitsandbytes.nn.modules", BitsAndBytes4(), BitsAndBytes8()),
        CompressedTensors(),
        Packs("gptqmodel.nn_modules.qlinear", Kernel()),
        Packs("hqq.core.quantize", HQQ()),
        Packs("optimum.quanto.nn.qlinear", Quanto()),
        Packs("torchao", TorchAO()),
        Packs(f"{_TRANSFORMERS}.fbgemm_fp8", Multiplies()),
        Packs(f"{_TRANSFORMERS}.finegrained_fp8", FineGrained(), FineGrainedExperts()),
        Packs(f"{_TRANSFORMERS}.metal_quantization", Multiplies()),
        Packs(f"{_TRANSFORMERS}.mxfp4", KernelExperts()),
        Packs("transformers.models.falcon.modeling_falcon", Multiplies()),
        Packs("transformers.quantizers.base", Quantized()),
        Peft(),
        Transformers(),
        OlderNames(),
        Methods(),
        Sharding(),
    ]

    OF_ANY_LIBRARY[:] = [OfTensor(), OfLayer()]
