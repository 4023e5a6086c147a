"""What names of PEFT are called in this package, for errors about them."""

from __future__ import annotations

from collections.abc import Collection

from lora_inject.core.spec.names import nearest

OURS_FOR = {
    "LoraConfig": "Config",
    "get_peft_model": "inject",
    "inject_adapter_in_model": "inject",
    "PeftModel": "load_adapter",
    "PeftModelForCausalLM": "load_adapter",
    "AutoPeftModel": "load_adapter",
    "AutoPeftModelForCausalLM": "load_adapter",
    "get_peft_model_state_dict": "adapter_state",
    "set_peft_model_state_dict": "swap_adapter",
    "set_adapter": "activate",
    "enable_adapters": "activate",
    "disable_adapter": "disabled",
    "disable_adapters": "disabled",
    "active_adapters": "summary",
    "add_adapter": "inject",
    "delete_adapter": "eject",
    "unload": "eject",
    "merge_adapter": "merge",
    "merge_and_unload": "merge",
    "unmerge_adapter": "unmerge",
    "add_weighted_adapter": "combine",
    "hotswap_adapter": "swap_adapter",
    "load_adapter": "load_adapter",
    "load_lora_adapter": "load_adapter",
    "set_adapters": "activate",
    "enable_lora": "activate",
    "disable_lora": "disabled",
    "fuse_lora": "merge",
    "unfuse_lora": "unmerge",
    "delete_adapters": "eject",
    "unload_lora": "eject",
    "print_trainable_parameters": "summary",
    "prepare_model_for_kbit_training": "inject",
}
"""Name of PEFT, or of a method of a model of transformers or diffusers, to ours."""


def lacking(name: str, ours: Collection[str]) -> AttributeError:
    """Return the error about a name that the package lacks, with what it may have meant.

    Examples:
        >>> str(lacking("PeftModel", []))
        "module 'lora_inject' has no attribute 'PeftModel'. Did you mean 'load_adapter'?"
        >>> str(lacking("nonsense", ["inject"]))
        "module 'lora_inject' has no attribute 'nonsense'"
    """
    near = [OURS_FOR[name]] if name in OURS_FOR else [o for o in ours if o.endswith(f".{name}")]
    near = near or nearest(name, ours, n=1)
    hint = f". Did you mean {near[0]!r}?" if near else ""
    return AttributeError(f"module 'lora_inject' has no attribute {name!r}{hint}")
