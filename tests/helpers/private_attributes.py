"""Private attributes of others' objects that the package asks of an object at hand."""

from collections.abc import Mapping
from types import MappingProxyType

_KEPT = "nn.Module: how it keeps what is registered; its pickles stand on it, so it is there"
_METHOD = "nn.Module: a method for classes to override; a change of its name is a change of theirs"
_RECURRENT = "nn.LSTM, GRU, RNN: their weights are read as those of any layer"
_MARK = "a module without it counts as one that the library leaves alone"
_CHILD = "a wrapper that has another name for its module puts that name into those of the layers"

ATTRIBUTES: Mapping[str, str] = MappingProxyType(
    {
        # name: whose it is, and what happens without it
        "_apply": _METHOD,
        "_buffers": _KEPT,
        "_call_impl": "nn.Module: a weight that a parent reads is not noted for PEFT's files",
        "_checkpoint_conversion_mapping": "transformers 4: names in older files count as they are",
        "_conv_forward": "nn.Conv1d, 2d, 3d: a class that overrides it counts as a plain one",
        "_custom_modules": "PEFT's LoraConfig: such a config counts as one without own layers",
        "_dynamo_marked_constant": "torch.compile: a graph breaks there",
        "_experts_implementation": "transformers' config: counts as the default",
        "_flat_weights": _RECURRENT,
        "_flat_weights_names": _RECURRENT,
        "_checkpoint_wrapped_module": f"torch's checkpoint_wrapper: {_CHILD}",
        "_fsdp_wrapped_module": f"torch's FSDP1: {_CHILD}",
        "_former_parameters": f"torch's DataParallel: {_MARK}",
        "_from_config": "transformers' classes: the constructor is called",
        "_hf_hook": f"accelerate: {_MARK}",
        "_hf_peft_config_loaded": f"transformers: {_MARK}",
        "_hf_tp_plan": f"transformers: {_MARK}",
        "_hp_mapping": f"DeepSpeed: {_MARK}",
        "_fsdp_param_group": "torch's FSDP2: the name that other versions have is asked",
        "_fsdp_param_groups": "torch's FSDP2: the name that other versions have is asked",
        "_i_will_not_complain_if_bc_breaks_InstructionTranslator": (
            "torch._dynamo.comptime: a write to a weight that a compiled graph reads is lost"
        ),
        "_init_flat_weights": _RECURRENT,
        "_is_expert_parallel": f"transformers: {_MARK}",
        "_is_fsdp_managed_module": f"torch's FSDP1: {_MARK}",
        "_is_hf_initialized": f"transformers: {_MARK}",
        "_is_quantized": f"transformers: {_MARK}",
        "_is_replica": f"torch's DataParallel: {_MARK}",
        "_keys_to_ignore_on_load_missing": "transformers: no weight may be missing in a file",
        "_iter_named_params": "TRL's VLLMGeneration: merged weights are not sent to vLLM; refused",
        "_load_from_state_dict": _METHOD,
        "_local_tensor": "torch's DTensor: the whole is compared, and not the part that is here",
        "_metadata": "torch's state dicts: the versions in it are not known",
        "_module_info": "torch's FSDP2: a read of a DTensor raises",
        "_modules": _KEPT,
        "_name_or_path": "transformers' config: the base has no name in the files",
        "_non_persistent_buffers_set": _KEPT,
        "_old_forward": f"accelerate: {_MARK}",
        "_orig_mod": f"torch.compile: {_CHILD}",
        "_parameters": _KEPT,
        "_pre_quantization_dtype": f"transformers: {_MARK}",
        "_save_to_state_dict": _METHOD,
        "_sequence_nr": "a node of autograd: it counts as the first of all",
        "_schema": "an operation of torch: whether it writes is known by its name",
        "_update_flat_weights": _RECURRENT,
        "_version": "Tensor: documented with in-place changes",
    }
)
