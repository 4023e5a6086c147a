"""What this environment has, and which features it switches off, by name and version."""

from __future__ import annotations

import os
import platform
import re
import sys
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from importlib import import_module
from importlib.metadata import PackageNotFoundError, distribution, packages_distributions
from itertools import chain
from typing import Any

import torch

from lora_inject.private import look_up
from lora_inject.private_names import NAMES
from lora_inject.serving.requirements import REQUIREMENTS, SERVERS, Requirement
from lora_inject.version import __version__

OWN = ("torch", "safetensors", "pydantic", "regex", "pyyaml", "typer", "rich")
"""What the package itself stands on."""

VARIABLES = (
    *("CUDA_VISIBLE_DEVICES", "HF_HUB_OFFLINE", "TORCHDYNAMO_DISABLE", "TORCH_COMPILE_DISABLE"),
    *("PYTORCH_ENABLE_MPS_FALLBACK", "ACCELERATE_USE_FSDP", "WORLD_SIZE"),
)
"""Variables that change what runs; their values are shown, and no others."""


@dataclass(frozen=True)
class Feature:
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
class Diagnosis:
    """An environment.

    Attributes:
        system: Python, the operating system, the processor, and accelerators, in words.
        packages: The version of each package that a feature may stand on and that is installed.
        features: All features, those that are switched off among them.
        servers: Programs that serve adapters and are installed, with versions.
        private: What torch, and the other packages that were looked at, keep private and this
            package would use, but is not there; with what happens instead.
        broken: Packages that are installed and cannot be imported, with the error.
        variables: Variables of the environment that change what runs.
    """

    system: dict[str, str]
    packages: dict[str, str]
    features: tuple[Feature, ...]
    servers: dict[str, str]
    private: dict[str, str]
    broken: dict[str, str]
    variables: dict[str, str]

    def to_dict(self) -> dict[str, Any]:
        """Return it as plain data."""
        return {"lora-inject": __version__, **asdict(self)}

    def text(self, width: int = 80) -> str:
        """Return it in lines, what is switched off first; names of packages are not broken.

        Examples:
            >>> diagnose().text().startswith("lora-inject ")
            True
        """
        del width
        off = {f.feature: f"{f.here} ({f.without})" for f in self.features if not f.works}
        lines = [
            f"lora-inject {__version__} in {sys.prefix}",
            *(f"  {what}: {value}" for what, value in self.system.items()),
            *_listed("packages", self.packages),
            *_listed("servers", self.servers or {"none": "is installed here"}),
            *_listed("installed, but cannot be imported", self.broken),
            *_listed("variables", self.variables),
            *_listed("switched off here", off),
            *_listed("there", {f.feature: f.here for f in self.features if f.works}),
            *_listed("missing of others' private side", self.private),
        ]
        return "\n".join(lines)


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
    packages = _installed(dict.fromkeys((*OWN, *chain(*(row.packages for row in REQUIREMENTS)))))
    broken = dict(_broken(packages)) if imports else {}
    looked_at = {"torch", *(packages if imports else ())} - broken.keys()
    return Diagnosis(
        system=_system(),
        packages=packages,
        features=(*(_feature(row, packages, broken) for row in REQUIREMENTS), _processes()),
        servers=_installed(chain(*SERVERS.values())),
        private=_private(looked_at),
        broken=broken,
        variables={name: os.environ[name] for name in VARIABLES if name in os.environ},
    )


def _installed(packages: Iterable[str]) -> dict[str, str]:
    """Return those of the packages that are installed, with their versions."""
    versions = {package: _version(package) for package in packages}
    return {package: version for package, version in versions.items() if version}


def _version(package: str) -> str:
    """Return the version of an installed package, or ""."""
    try:
        return distribution(package).version
    except PackageNotFoundError:
        return ""


def _system() -> dict[str, str]:
    """Return what a reader of an issue asks first."""
    backends = {"CUDA": torch.version.cuda, "ROCm": torch.version.hip}
    built = [f"{name} {version}" for name, version in backends.items() if version]
    return {
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.release()}, {platform.machine()}",
        "torch is built for": ", ".join(built) or "CPU",
        "devices": ", ".join(_devices()) or "CPU only",
    }


def _devices() -> Iterator[str]:
    for n in range(torch.cuda.device_count()):
        yield torch.cuda.get_device_name(n)
    for name in ("mps", "xpu"):
        backend = getattr(torch.backends, name, None) or getattr(torch, name, None)
        if backend is not None and backend.is_available():
            yield name


def _feature(row: Requirement, packages: Mapping[str, str], broken: Mapping[str, str]) -> Feature:
    lacks = [
        reason
        for package, oldest in row.packages.items()
        if (reason := _lack(package, oldest, packages, broken))
    ]
    there = ", ".join(f"{name} {packages[name]}" for name in row.packages if name in packages)
    return Feature(row.feature, not lacks, ", ".join(lacks) or there, row.without if lacks else "")


def _processes() -> Feature:
    """Return whether several processes can share a model, which is a matter of torch's build."""
    there = torch.distributed.is_available()
    here = "torch.distributed" if there else "this torch is built without torch.distributed"
    without = "" if there else "one process"
    return Feature("FSDP2, tensor parallelism, DDP", there, here, without)


def _lack(package: str, oldest: str, packages: Mapping[str, str], broken: Mapping[str, str]) -> str:
    """Return what is wrong with a package for a feature, or ""."""
    if package not in packages:
        return f"{package} is not installed"
    if package in broken:
        return f"{package} {packages[package]} cannot be imported"
    if oldest and numbers(packages[package]) < numbers(oldest):
        return f"needs {package} {oldest}; this is {packages[package]}"
    return ""


def numbers(version: str) -> tuple[int, ...]:
    """Return the leading numbers of a version, without zeros at the end, for comparing.

    Examples:
        >>> numbers("2.13.0+cpu")
        (2, 13)
        >>> numbers("5.24.0.dev0") == numbers("5.24")
        True
    """
    leading = re.match(r"\d+(\.\d+)*", version)
    parts = [int(part) for part in leading[0].split(".")] if leading else []
    while parts and parts[-1] == 0:
        parts.pop()
    return tuple(parts)


def _broken(packages: Iterable[str]) -> Iterator[tuple[str, str]]:
    """Import packages; yield those that cannot be imported, each with its error in a line."""
    modules = _modules()
    for package in packages:
        try:
            for module in modules.get(_normal(package), ()):
                import_module(_MODULES.get(package, module))
        except Exception as error:  # noqa: BLE001 - whatever a package raises is its diagnosis
            text = str(error).strip().splitlines() or ["without a message"]
            yield package, f"{type(error).__name__}: {text[0]}"


def _modules() -> dict[str, list[str]]:
    """Return the modules that each installed package brings, without private ones."""
    modules: dict[str, list[str]] = {}
    for module, packages in sorted(packages_distributions().items()):
        for package in packages if module.isidentifier() and module[0] != "_" else ():
            modules.setdefault(_normal(package), []).append(module)
    return modules


_MODULES = {"optimum-quanto": "optimum.quanto"}  # of a namespace that others share


def _normal(package: str) -> str:
    return re.sub(r"[-_.]+", "-", package).lower()


def _private(packages: set[str]) -> dict[str, str]:
    """Return the private names that this package would use and that are missing here."""
    missing = {}
    for name, instead in NAMES.items():
        package = name.partition(".")[0].replace("_", "-")
        if package in packages and look_up(name) is None:
            missing[name] = instead
    return missing


def _listed(title: str, rows: Mapping[str, str]) -> Iterator[str]:
    if rows:
        yield f"{title}:"
        yield from (f"  {name}: {value}" for name, value in rows.items())
