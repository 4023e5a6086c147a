"""Adapters that PEFT 0.12 to 0.21 wrote, merged on disk, against each version's own merge.

The archives were made by `fixtures/peft_versions/make.py` with the versions that they are named
after.
"""

import zipfile
from pathlib import Path

import pytest
import torch
from helpers.checkpoints import load_checkpoint
from safetensors.torch import load_file

from lora_inject.checkpoint import Checkpoint, merge_checkpoint, read_weighted, verify_checkpoint

SCALE_FORGOTTEN = {"0.14.0", "0.15.2"}
"""Their merge adds the bias of lora_B as it is; their forward takes it times the scale, 2 here."""
FIXTURES = Path(__file__).parent / "fixtures" / "peft_versions"


def cases():
    for archive in sorted(FIXTURES.glob("*.zip")):
        with zipfile.ZipFile(archive) as packed:
            for name in sorted({n.partition("/")[0] for n in packed.namelist()}):
                yield pytest.param(archive, name, id=f"{archive.stem} {name}")


def test_every_minor_version_is_there():
    versions = {path.stem.rpartition(".")[0] for path in FIXTURES.glob("*.zip")}
    assert versions == {f"0.{minor}" for minor in range(12, 22)}


@pytest.mark.parametrize(("archive", "case"), list(cases()))
def test_adapter_of_an_older_peft_merges_as_it_merged_it(tmp_path, archive, case):
    with zipfile.ZipFile(archive) as packed:
        members = [n for n in packed.namelist() if n.startswith(f"{case}/")]
        packed.extractall(tmp_path, members)
    folder, before = tmp_path / case, load_file(FIXTURES / "base.safetensors")
    theirs = load_file(folder / "merged.safetensors")
    base = Checkpoint.open(FIXTURES / "base.safetensors")
    part = read_weighted(folder, base)
    report = merge_checkpoint(base, [part], tmp_path / "out")
    ours = load_checkpoint(tmp_path / "out")
    assert report.tensors.keys() == theirs.keys()
    for name, w in before.items():
        wanted = theirs.get(name, w)
        if case == "lora bias" and name.endswith("bias") and archive.stem in SCALE_FORGOTTEN:
            wanted = w + 2 * (wanted - w)
        torch.testing.assert_close(ours[name], wanted, rtol=0, atol=2e-6)
    assert verify_checkpoint(base, [part], tmp_path / "out").problems == ()
