"""Adapters that PEFT 0.12 to 0.21 wrote, merged on disk, against each version's own merge.

The archives were made by `fixtures/peft_versions/make.py` with the versions that they are named
after.
"""

import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.merging import load_checkpoint, merge
from safetensors.torch import load_file

SCALE_FORGOTTEN = {"0.14.0", "0.15.2"}
"""Their merge adds the bias of lora_B as it is; their forward takes it times the scale, 2 here."""
FIXTURES = Path(__file__).parents[1] / "fixtures" / "peft_versions"


def cases() -> Iterator[Any]:
    for archive in sorted(FIXTURES.glob("*.zip")):
        with zipfile.ZipFile(archive) as packed:
            for name in sorted({n.partition("/")[0] for n in packed.namelist()}):
                yield pytest.param(archive, name, id=f"{archive.stem} {name}")


def test_every_minor_version_is_there() -> None:
    versions = {path.stem.rpartition(".")[0] for path in FIXTURES.glob("*.zip")}
    assert versions == {f"0.{minor}" for minor in range(12, 22)}


@pytest.mark.parametrize(("archive", "case"), list(cases()))
def test_an_adapter_of_an_older_peft_merges_as_it_merged_it(tmp_path, archive, case) -> None:
    with zipfile.ZipFile(archive) as packed:
        packed.extractall(tmp_path, [n for n in packed.namelist() if n.startswith(f"{case}/")])
    folder, base = tmp_path / case, FIXTURES / "base.safetensors"
    theirs = load_file(folder / "merged.safetensors")
    report = merge(base, [folder], tmp_path / "out")
    ours = load_checkpoint(tmp_path / "out")
    assert report.tensors.keys() == theirs.keys()
    for name, w in load_file(base).items():
        wanted = theirs.get(name, w)
        if case == "lora bias" and name.endswith("bias") and archive.stem in SCALE_FORGOTTEN:
            wanted = w + 2 * (wanted - w)
        torch.testing.assert_close(ours[name], wanted, rtol=0, atol=2e-6)
