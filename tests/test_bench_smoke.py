"""The benchmarks run and write what they say they write; what they measure is never tested."""

import json
import os
from unittest import mock

import pytest
from conftest import script

with mock.patch.dict(os.environ):  # which they set, for programs of their own
    bench = script("bench")


def run(*words: object) -> int | None:
    with mock.patch("sys.argv", ["bench", "--quick", *map(str, words)]):
        return bench.main()


@pytest.mark.slow
@pytest.mark.filterwarnings("default")  # torch's and PEFT's own
def test_quick_rows_write_json_and_a_document_that_keeps_what_was_written_by_hand(tmp_path) -> None:
    results, document = tmp_path / "results.json", tmp_path / "performance.md"
    write = ("--json", results, "--write", document)
    assert run("exactness", "saved-bytes", *write) == 0
    rows = json.loads(results.read_text())["rows"]
    assert all(line["reached"] for line in rows["exactness"]["lines"])
    saved = {(line["case"], line["variant"]): line["mid"] for line in rows["saved-bytes"]["lines"]}
    assert 0 < saved["Llama tiny bf16", "lora_inject"] < saved["Llama tiny bf16", "PEFT"]
    document.write_text(document.read_text() + "\nBy hand.\n")
    assert run("exactness", *write) == 0
    text = document.read_text()
    assert text.rstrip().endswith("By hand.")
    assert "| saved-bytes |" in text  # of the first run, out of the JSON file


def test_rows_of_another_machine_are_not_joined_into_one_page(tmp_path, capsys) -> None:
    results = tmp_path / "results.json"
    results.write_text('{"machine": {"processor": "another"}, "rows": {}}')
    assert run("exactness", "--json", results) == 2
    assert "was measured on another" in capsys.readouterr().err
