"""The benchmark of merging runs, at a tiny size; what it measures is never tested."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.mark.slow
def test_bench_writes_a_document_and_keeps_what_was_written_by_hand(tmp_path):
    pytest.importorskip("transformers")
    pytest.importorskip("peft")
    document = tmp_path / "merging.md"
    command = [sys.executable, "scripts/bench_merge.py", "--size", "0.01", "--rounds", "1"]
    command += ["--folder", str(tmp_path / "bench"), "--write", str(document)]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    assert not list((tmp_path / "bench").iterdir())  # tidied up
    text = document.read_text()
    for way in ("cp -r", "import torch", "lora_inject", "PEFT"):
        assert f"| {way} |" in text
    assert "0.01 GB: time over PEFT's" in text
    document.write_text(f"{text}\nBy hand.\n")
    subprocess.run([*command, "--only", "cp -r"], cwd=ROOT, check=True, capture_output=True)
    again = document.read_text()
    assert again.rstrip().endswith("By hand.")
    assert "| PEFT |" not in again
