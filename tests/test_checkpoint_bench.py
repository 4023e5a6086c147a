"""The benchmark of merging runs, at a tiny size; what it measures is never tested."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.mark.slow
def test_bench_prints_a_table_and_writes_the_runs(tmp_path):
    command = [sys.executable, "scripts/bench_merge.py", "--size", "0.01", "--rounds", "1"]
    command += ["--only", "cp -r", "--only", "lora_inject"]
    command += ["--folder", str(tmp_path / "bench"), "--json", str(tmp_path / "runs.json")]
    done = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True)
    assert not list((tmp_path / "bench").iterdir())  # tidied up
    runs = json.loads((tmp_path / "runs.json").read_text())["0.01"]
    for way in ("cp -r", "lora_inject"):
        assert f"| {way} |" in done.stdout
        assert runs[way][0]["wall"] > 0
