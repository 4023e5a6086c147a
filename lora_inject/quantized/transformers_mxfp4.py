"""transformers' experts in MXFP4, which compute by kernels.

Those that `packed_experts()` loads are another thing: tensors that say their values themselves.
"""

from __future__ import annotations

import sys

from torch import Tensor, nn

from lora_inject.core.layers.weight_kinds import Reason, Verb, WeightKind

_KERNELS = "transformers.integrations.mxfp4"


class KernelExperts(WeightKind):
    """`Mxfp4GptOssExperts`, whose matmul_ogs launches kernels into a new tensor."""

    def matches(self, module: nn.Module, weight: Tensor | None) -> bool:
        """Return whether the module is one of them."""
        return isinstance(module, getattr(sys.modules[_KERNELS], "Mxfp4GptOssExperts", ()))

    def why_not(self, verb: Verb, module: nn.Module, weight: Tensor | None) -> Reason | None:
        """Return why nothing below them trains, and why they get no adapter."""
        if verb in ("inject", "train"):
            remedy = "Load the base within lora_inject.packed_experts(), which keeps 4 bits, "
            remedy += "or with Mxfp4Config(dequantize=True)"
            return Reason("experts compute in MXFP4 by kernels for inference", remedy)
        return super().why_not(verb, module, weight)
