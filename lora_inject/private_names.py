"""Names of other libraries' private side that the package uses, and what happens without each."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

_PLAIN = "another way: plain torch operations everywhere"
_NO_AUTOCAST = (
    "another way: autocast sees no operation of a weight that is read, and of nothing else"
)

NAMES: Mapping[str, str] = MappingProxyType(
    {
        # name: what happens without it
        "bitsandbytes.functional._convert_weight_packed_for_cpu_inverse": (
            "refused: reading 4-bit weights that inference on a CPU has rearranged"
        ),
        "mlx_lm.utils._get_classes": "refused: names and sizes of mlx-lm's own model of a base",
        "torch._C.DispatchKey": _NO_AUTOCAST,
        "torch._C.DispatchKeySet": _NO_AUTOCAST,
        "torch._C._are_functorch_transforms_active": _PLAIN,
        # since torch 2.8
        "torch._C._autograd._top_saved_tensors_default_hooks": (
            "torch raises where a layer reads its weight in a part that its own forward checkpoints"
        ),
        "torch._C._current_graph_task_id": "a change of adapters within a backward is not refused",
        "torch._C._get_tracing_state": _PLAIN,
        "torch._C._len_torch_dispatch_stack": "another way: nothing is added in place",
        "torch._C._will_engine_execute_node": "refused: training several trials at once",
        "torch._foreach_copy_": "another way: swap_adapter keeps a copy of the values meanwhile",
        "torch._foreach_mul_": "another way: one launch for each tensor of a trial",
        "torch._foreach_norm": "another way: one launch for each tensor of a trial",
        # since torch 2.8
        "torch._grouped_mm": "another way: torch.nn.functional.grouped_mm, which is public",
        "torch.Tensor._make_wrapper_subclass": (
            "another way: W + delta is formed at once where a weight is read; "
            "refused: experts that stay packed"
        ),
        "torch._subclasses.fake_tensor.FakeTensor": (
            "refused: weights of a fake model, which count as packed"
        ),
        "torch._subclasses.functional_tensor.FunctionalTensor": (
            "refused: weights in a trace of make_fx that functionalizes, which count as packed"
        ),
        "torch.autograd.forward_ad._current_level": _PLAIN,
        "torch.distributed._composable_state._module_state_mapping": (
            "refused: reading a weight that is a DTensor, which may be a shard of FSDP2"
        ),
        "torch.fx._symbolic_trace.is_fx_symbolic_tracing": "another way: is_fx_tracing",
        "torch.fx._symbolic_trace.is_fx_tracing": (
            "another way: is_fx_symbolic_tracing; without both, a graph of torch.fx holds "
            "W + delta as a constant"
        ),
        "torch.mps._get_default_mps_generator": "refused: seeded random numbers of an MPS device",
        "torch.ops.aten._to_copy": "another way: packed experts are unpacked to be moved",
        "torch.ops.aten._unsafe_view": "another way: a copy",
        "torch.utils._python_dispatch._disable_current_modes": (
            "refused: switching adapters in a compiled graph"
        ),
        "torch.utils._pytree": "another way: trees of tuples, lists and dicts only",
        "transformers.conversion_mapping._MODEL_TO_CONVERSION_PATTERN": (
            "another way: PEFT, which reads the same name, renames no experts without it"
        ),
        "transformers.integrations.finegrained_fp8._dequantize_fp8_weight": (
            "refused: the values of weights in block FP8"
        ),
    }
)
