"""The benchmarks run and write what they say they write; what they measure is never tested.

The command itself is run, at its tiny sizes, and its JSON is read back. Only numbers that
do not depend on the machine are looked at: errors and counts of bytes.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[1] / "scripts" / "bench.py"


@pytest.mark.slow
def test_quick_rows_write_json_and_a_document_that_keeps_what_was_written_by_hand(
    tmp_path: Path,
) -> None:
    pytest.importorskip("transformers")
    results, document = tmp_path / "results.json", tmp_path / "performance.md"
    command = [sys.executable, str(SCRIPT), "--quick", "exactness", "saved-bytes"]
    command += ["--json", str(results), "--write", str(document)]
    subprocess.run(command, check=True, capture_output=True)
    found = json.loads(results.read_text())
    assert set(found) == {"machine", "rows"}
    assert {"processor", "cores", "python", "versions"} <= set(found["machine"])
    assert set(found["rows"]) == {"exactness", "saved-bytes"}
    for row in found["rows"].values():
        assert {"title", "date", "seconds", "load", "threads", "quick", "notes"} <= set(row)
        for line in row["lines"]:
            assert line["low"] <= line["mid"] <= line["high"]
            assert line["n"] >= 1
            assert (line["reached"] is None) == (line["target"] is None)
    errors = [line for line in found["rows"]["exactness"]["lines"] if "error" in line["metric"]]
    assert len(errors) > 20
    assert all(line["reached"] for line in found["rows"]["exactness"]["lines"])
    saved = {
        (line["case"], line["variant"]): line["mid"]
        for line in found["rows"]["saved-bytes"]["lines"]
    }
    assert 0 < saved["Llama tiny bf16", "lora_inject"] < saved["Llama tiny bf16", "PEFT"]

    document.write_text(document.read_text() + "\nBy hand.\n")
    subprocess.run([*command[:3], "exactness", *command[5:]], check=True, capture_output=True)
    text = document.read_text()
    assert text.rstrip().endswith("By hand.")
    assert "## saved-bytes" in text  # of the first run, out of the JSON file


def test_an_unknown_row_is_an_error_that_names_all_rows() -> None:
    done = subprocess.run(
        [sys.executable, str(SCRIPT), "no-such-row"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 2
    assert "step-fp32" in done.stderr
