"""Safetensors headers, indexes and folders: what is read, and everything that is refused."""

import json
import os
import struct

import pytest
import torch
from helpers.checkpoints import (
    LLAMA,
    assert_merged,
    llama_adapter,
    llama_tensors,
    merged,
    save_checkpoint,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import SafetensorError, safe_open

from lora_inject.checkpoint import Checkpoint
from lora_inject.checkpoint.index import find_side_files
from lora_inject.core.files.safetensors_file import read_header
from lora_inject.errors import CheckpointError


def raw(table, n_data=8):
    """A file: the length of its header, the header, the data."""
    text = table if isinstance(table, bytes) else json.dumps(table).encode()
    return struct.pack("<Q", len(text)) + text + bytes(n_data)


def entry(dtype="F32", shape=(2,), offsets=(0, 8)):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}


GOOD = {"a": entry()}
TABLE = json.dumps(entry()).encode()
BAD = {
    "empty file": b"",
    "length past the end": struct.pack("<Q", 100) + b"{}",
    "not json": struct.pack("<Q", 5) + b"{nope",
    "not utf-8": struct.pack("<Q", 4) + b'{"\xff',
    "a list": struct.pack("<Q", 2) + b"[]",
    "nested too deeply": struct.pack("<Q", 100_000) + b"[" * 100_000,
    "duplicate key": raw(b'{"a":' + TABLE + b',"a":' + TABLE + b"}"),
    "metadata not strings": raw({"__metadata__": {"a": 1}, **GOOD}),
    "unknown dtype": raw({"a": entry(dtype="F33")}),
    "entry a list": raw({"a": []}),
    "no shape": raw({"a": {"dtype": "F32", "data_offsets": [0, 8]}}),
    "boolean dimension": raw({"a": entry(shape=(True, 2))}),
    "huge dimension of nothing": raw({"a": entry(shape=(0, 2**62), offsets=(0, 0))}, 0),
    "too many dimensions": raw({"a": entry(shape=(1,) * 40 + (2,))}),
    "size lie": raw({"a": entry(shape=(3,))}),
    "offsets swapped": raw({"a": entry(shape=(0,), offsets=(8, 0))}),
    "gap": raw({"a": entry(), "b": entry(offsets=(12, 20))}, 20),
    "trailing bytes": raw(GOOD, 9),
    "name not printable": raw({"a\x00b": entry()}),
    "name a lone surrogate": raw(b'{"\\ud800":' + TABLE + b"}"),
    "number with 5000 digits": raw(b'{"a":{"dtype":"F32","shape":[' + b"9" * 5000 + b"]}}"),
}


@pytest.mark.parametrize("case", BAD)
def test_malformed_header_is_refused(tmp_path, case):
    (tmp_path / "model.safetensors").write_bytes(BAD[case])
    with pytest.raises(CheckpointError, match=r"model\.safetensors"):
        read_header(tmp_path / "model.safetensors")


@settings(max_examples=100)
@given(st.data())
def test_mutated_headers_never_pass_where_the_reference_refuses(tmp_path_factory, data):
    """Any change of bytes: an error of ours, or a header that the reference library reads too."""
    path = tmp_path_factory.mktemp("fuzz") / "model.safetensors"
    table = {"__metadata__": {"k": "v"}, "a": entry(), "b": entry(offsets=(8, 16))}
    content = bytearray(raw(table, 16))
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, len(content) - 1))
        content[at] = data.draw(st.sampled_from(list(b'{}[]",:0123456789-eaF \\\x00\xff')))
    path.write_bytes(content[: data.draw(st.integers(len(content) - 3, len(content)))])
    try:
        ours = read_header(path)
    except CheckpointError:
        return
    try:
        with safe_open(path, "pt") as file:
            assert set(file.keys()) == set(ours.tensors)
    except SafetensorError as error:
        pytest.fail(f"we accept what safetensors refuses: {error}")


OUTSIDE = ["../x.safetensors", "/etc/x.safetensors", "a/b.safetensors", "..\\x.safetensors"]


@pytest.fixture
def sharded(tmp_path):
    """A checkpoint of two files, its index, and how the index is written."""
    folder = save_checkpoint(tmp_path / "base", llama_tensors(), 2, LLAMA)
    path = folder / "model.safetensors.index.json"
    return folder, json.loads(path.read_text()), lambda index: path.write_text(json.dumps(index))


@pytest.mark.parametrize("name", [*OUTSIDE, "x.bin", "", "x.safetensors\n", 7, None])
def test_shard_names_that_leave_the_folder_are_refused(sharded, name):
    folder, index, write = sharded
    index["weight_map"]["lm_head.weight"] = name
    write(index)
    with pytest.raises(CheckpointError, match="not the plain name"):
        Checkpoint.open(folder)


def test_index_and_headers_must_agree(sharded):
    folder, index, write = sharded
    first = index["weight_map"].pop("lm_head.weight")
    write(index)
    with pytest.raises(CheckpointError, match=r"'lm_head.weight' of .* is not in the index"):
        Checkpoint.open(folder)
    index["weight_map"] |= {"lm_head.weight": first, "more.weight": first}
    write(index)
    with pytest.raises(CheckpointError, match=r"puts 'more.weight' into .* does not hold it"):
        Checkpoint.open(folder)


def test_which_files_are_the_checkpoint(sharded, tmp_path):
    folder, _, _ = sharded
    save_checkpoint(folder, {"other": torch.zeros(2)}, 1, stem="consolidated")
    assert "other" not in Checkpoint.open(folder).tensors
    save_checkpoint(folder, llama_tensors(), 1)
    with pytest.raises(CheckpointError, match="both"):
        Checkpoint.open(folder)
    (folder / "model-00002-of-00002.safetensors").unlink()
    (folder / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match="model-00002-of-00002"):
        Checkpoint.open(folder)
    (tmp_path / "pytorch_model.bin").write_bytes(b"x")
    with pytest.raises(CheckpointError, match="save_pretrained"):
        Checkpoint.open(tmp_path)
    (tmp_path / "snapshots" / "abc").mkdir(parents=True)
    with pytest.raises(CheckpointError, match="give its folder 'snapshots/abc'"):
        Checkpoint.open(tmp_path)


def test_links_are_followed_inside_the_folder_and_the_hub_cache_only(tmp_path):
    cache = tmp_path / "models--a--b"
    snapshot, outside = cache / "snapshots" / "0123", tmp_path / "outside"
    save_checkpoint(cache / "blobs", llama_tensors(), 1, LLAMA)
    for folder in (snapshot, outside):
        folder.mkdir(parents=True)
        for name in ("model.safetensors", "config.json"):
            (folder / name).symlink_to(cache / "blobs" / name)
    assert Checkpoint.open(snapshot).config["model_type"] == "llama"
    with pytest.raises(CheckpointError, match="outside the folder"):
        Checkpoint.open(outside)
    (cache / "blobs" / "config.json").unlink()  # which says the class, and with it the ties
    with pytest.raises(CheckpointError, match=r"read 'config\.json'.*no such file"):
        Checkpoint.open(snapshot)


def test_side_files_that_belong_come_along(tmp_path):
    save_checkpoint(tmp_path, llama_tensors(), 1, LLAMA)
    belong = {"generation_config.json", "tokenizer.json", "tokenizer.model", "chat_template.jinja"}
    belong |= {"special_tokens_map.json", "merges.txt", "LICENSE", "1_Pooling/config.json"}
    others = ["pytorch_model.bin", "optimizer.pt", "model.gguf", ".git/HEAD", ".secret.json"]
    others += ["adapter_config.json", "adapter_model.safetensors", "trainer_state.json"]
    others += ["pytorch_model.bin.index.json", "flax_model.msgpack"]
    for name in [*belong, *others, "modeling_x.py"]:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("{}")
    taken, left = find_side_files(tmp_path)
    assert (set(taken), left) == (belong, ("modeling_x.py",))
    taken, left = find_side_files(tmp_path, code=True)
    assert set(taken) == belong | {"modeling_x.py"}


def test_bytes_are_copied_exactly_where_the_kernel_cannot(tmp_path, monkeypatch):
    def exdev(*_):
        raise OSError(18, "cross-device link")

    monkeypatch.setattr(os, "copy_file_range", exdev, raising=False)
    tensors = llama_tensors()
    merged(tmp_path, tensors, llama_adapter(tensors), shards=2, workers=3)
    assert_merged(tmp_path / "out", tensors, llama_adapter(tensors))
