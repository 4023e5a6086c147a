"""Private attributes of others' objects that the package asks of an object at hand."""

from helpers.tables import rows

# Names, whose they are, and what happens without them. `passed by`: a module without it counts as
# one that the library leaves alone. `a wrapper`: where it has another name for its module, that
# name gets into those of the layers.
TABLE = """
_apply _load_from_state_dict _save_to_state_dict => nn.Module: methods for classes to override; a
  change of their names is a change of theirs
_buffers _modules _non_persistent_buffers_set _parameters => nn.Module: how it keeps what is
  registered; its pickles stand on it, so it is there
_call_impl => nn.Module: a weight that a parent reads is not noted for PEFT's files
_checkpoint_conversion_mapping => transformers 4: names in older files count as they are
_checkpoint_wrapped_module => torch's checkpoint_wrapper: a wrapper
_conv_forward => nn.Conv1d, 2d, 3d: a class that overrides it counts as a plain one
_custom_modules => PEFT's LoraConfig: such a config counts as one without own layers
_dynamo_marked_constant => torch.compile: a graph breaks there
_experts_implementation => transformers' config: counts as the default
_flat_weights _flat_weights_names _init_flat_weights _update_flat_weights => nn.LSTM, GRU, RNN:
  their weights are read as those of any layer
_former_parameters _is_replica => torch's DataParallel: passed by
_from_config => transformers' classes: the constructor is called
_fsdp_param_group _fsdp_param_groups => torch's FSDP2: the name that other versions have is asked
_fsdp_wrapped_module => torch's FSDP1: a wrapper
_hf_hook _old_forward => accelerate: passed by
_hf_peft_config_loaded _hf_tp_plan _is_expert_parallel _is_hf_initialized _is_quantized
  _pre_quantization_dtype => transformers: passed by
_hp_mapping => DeepSpeed: passed by
_i_will_not_complain_if_bc_breaks_InstructionTranslator => torch._dynamo.comptime: a write to a
  weight that a compiled graph reads is lost
_is_fsdp_managed_module => torch's FSDP1: passed by
_iter_named_params => TRL's VLLMGeneration: merged weights are not sent to vLLM; refused
_keys_to_ignore_on_load_missing => transformers: no weight may be missing in a file
_local_tensor => torch's DTensor: the whole is compared, and not the part that is here
_metadata => torch's state dicts: the versions in it are not known
_module_info => torch's FSDP2: a read of a DTensor raises
_name_or_path => transformers' config: the base has no name in the files
_orig_mod => torch.compile: a wrapper
_schema => an operation of torch: whether it writes is known by its name
_sequence_nr => a node of autograd: it counts as the first of all
_version => Tensor: documented with in-place changes
"""
ATTRIBUTES = {name for names, _ in rows(TABLE) for name in names.split()}
