"""Safetensors headers, indexes and folders: what is read, and everything that is refused."""

import json
import os
import struct

import pytest
import torch
from helpers.checkpoints import LLAMA, llama_adapter, llama_tensors, save_checkpoint
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from lora_inject.checkpoint import Checkpoint, MergeOptions, merge_checkpoint
from lora_inject.checkpoint.disk_copies import copy_range
from lora_inject.checkpoint.index import edit_config, find_side_files
from lora_inject.core.files.read_at import read_at
from lora_inject.core.files.safetensors_file import build_header, read_header
from lora_inject.errors import CheckpointError


def write_raw(path, table, data=b"", length=None):
    text = table if isinstance(table, bytes) else json.dumps(table).encode()
    path.write_bytes(struct.pack("<Q", len(text) if length is None else length) + text + data)
    return path


def entry(dtype="F32", shape=(2,), offsets=(0, 8)):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}


def test_header_agrees_with_the_reference_library(tmp_path):
    path = tmp_path / "model.safetensors"
    tensors = llama_tensors() | {"mask": torch.ones(3, dtype=torch.bool), "none": torch.zeros(0, 4)}
    save_file(tensors, path, {"format": "pt"})
    header = read_header(path)
    assert header.metadata == {"format": "pt"}
    assert set(header.tensors) == set(tensors)
    fd = os.open(path, os.O_RDONLY)
    for name, tensor in tensors.items():
        found = header.tensors[name]
        assert found.shape == tuple(tensor.shape)
        assert found.n_bytes == tensor.numel() * tensor.element_size()
        data = bytearray(found.n_bytes)
        read_at(fd, memoryview(data), found.start)
        if data:
            assert torch.equal(
                torch.frombuffer(data, dtype=torch.uint8), tensor.flatten().view(torch.uint8)
            )
    os.close(fd)


GOOD = {"a": entry()}
BAD = {
    "empty file": (b"", None),
    "short length": (b"1234567", None),
    "length past the end": (struct.pack("<Q", 100) + b"{}", None),
    "length beyond the limit": (struct.pack("<Q", 2**63) + b"{}", None),
    "not json": (struct.pack("<Q", 5) + b"{nope", None),
    "not utf-8": (struct.pack("<Q", 4) + b'{"\xff', None),
    "a list": (struct.pack("<Q", 2) + b"[]", None),
    "nested too deeply": (struct.pack("<Q", 100_000) + b"[" * 100_000, None),
    "duplicate key": ('{"a":' + json.dumps(entry()) + ',"a":' + json.dumps(entry()) + "}", 8),
    "metadata not strings": ({"__metadata__": {"a": 1}, **GOOD}, 8),
    "metadata a string": ({"__metadata__": "a", **GOOD}, 8),
    "unknown dtype": ({"a": entry(dtype="F33")}, 8),
    "dtype a list": ({"a": {**entry(), "dtype": []}}, 8),
    "entry a list": ({"a": []}, 8),
    "no shape": ({"a": {"dtype": "F32", "data_offsets": [0, 8]}}, 8),
    "negative dimension": ({"a": entry(shape=(-2,))}, 8),
    "float dimension": ({"a": entry(shape=(2.0,))}, 8),
    "boolean dimension": ({"a": entry(shape=(True, 2))}, 8),
    "huge dimension of nothing": ({"a": entry(shape=(0, 2**62), offsets=(0, 0))}, 0),
    "too many dimensions": ({"a": entry(shape=(1,) * 40 + (2,))}, 8),
    "size lie": ({"a": entry(shape=(3,))}, 8),
    "offsets swapped": ({"a": entry(shape=(0,), offsets=(8, 0))}, 8),
    "three offsets": ({"a": entry(offsets=(0, 4, 8))}, 8),
    "gap": ({"a": entry(), "b": entry(offsets=(12, 20))}, 20),
    "overlap": ({"a": entry(), "b": entry(offsets=(4, 12))}, 12),
    "trailing bytes": (GOOD, 9),
    "short data": (GOOD, 7),
    "name too long": ({"a" * 2000: entry()}, 8),
    "name not printable": ({"a\x00b": entry()}, 8),
    "name a lone surrogate": (b'{"\\ud800":' + json.dumps(entry()).encode() + b"}", 8),
    "number with 5000 digits": (b'{"a":{"dtype":"F32","shape":[' + b"9" * 5000 + b"]}}", 8),
}


@pytest.mark.parametrize("case", BAD)
def test_malformed_header_is_refused(tmp_path, case):
    table, n_data = BAD[case]
    path = tmp_path / "model.safetensors"
    if n_data is None:
        path.write_bytes(table)
    else:
        table = table.encode() if isinstance(table, str) else table
        write_raw(path, table, bytes(n_data))
    with pytest.raises(CheckpointError, match=r"model\.safetensors"):
        read_header(path)


@settings(max_examples=100, deadline=None)
@given(st.data())
def test_mutated_headers_never_pass_where_the_reference_refuses(tmp_path_factory, data):
    """Any change of bytes: an error of ours, or a header that the reference library reads too."""
    folder = tmp_path_factory.mktemp("fuzz")
    path = folder / "model.safetensors"
    write_raw(
        path, {"__metadata__": {"k": "v"}, "a": entry(), "b": entry(offsets=(8, 16))}, b"x" * 16
    )
    raw = bytearray(path.read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, len(raw) - 1))
        raw[at] = data.draw(st.sampled_from(list(b'{}[]",:0123456789-eaF \\\x00\xff')))
    path.write_bytes(raw[: data.draw(st.integers(len(raw) - 3, len(raw)))])
    try:
        ours = read_header(path)
    except CheckpointError:
        return
    try:
        with safe_open(path, "pt") as file:
            assert set(file.keys()) == set(ours.tensors)
    except SafetensorError as error:
        pytest.fail(f"we accept what safetensors refuses: {error}")


@settings(max_examples=40, deadline=None)
@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
        lambda inner: (
            st.lists(inner, max_size=3)
            | st.dictionaries(
                st.sampled_from(
                    ["a", "dtype", "shape", "data_offsets", "__metadata__", "weight_map"]
                ),
                inner,
                max_size=3,
            )
        ),
    )
)
def test_any_json_as_header_or_index_is_read_or_refused(tmp_path_factory, value):
    folder = tmp_path_factory.mktemp("fuzz")
    write_raw(folder / "model.safetensors", value)
    for name in ("model.safetensors", "model.safetensors.index.json"):
        if name.endswith("json"):
            (folder / "model.safetensors").unlink()
            (folder / name).write_text(json.dumps(value))
        try:
            Checkpoint.open(folder)
        except CheckpointError:
            continue


def test_built_header_is_what_the_reference_reads(tmp_path):
    rows = [("b", "F32", (2, 3)), ("a", "BF16", (5,)), ("ü", "U8", ())]
    header = build_header(rows, {"format": "pt"})
    path = tmp_path / "x.safetensors"
    path.write_bytes(header.raw + bytes(header.size_bytes - len(header.raw)))
    assert len(header.raw) % 8 == 0
    assert dict(read_header(path).tensors) == dict(header.tensors)
    with safe_open(path, "pt") as file:
        assert {n: tuple(file.get_slice(n).get_shape()) for n in file.keys()} == {  # noqa: SIM118
            name: shape for name, _, shape in rows
        }


@pytest.mark.parametrize("shards", [1, 3])
def test_open_finds_every_tensor(tmp_path, shards):
    tensors = llama_tensors()
    checkpoint = Checkpoint.open(save_checkpoint(tmp_path / "base", tensors, shards, LLAMA))
    assert set(checkpoint.tensors) == set(tensors)
    assert len(checkpoint.shards) == shards
    assert checkpoint.stem == "model"
    assert checkpoint.config["model_type"] == "llama"


OUTSIDE = ["../x.safetensors", "/etc/x.safetensors", "a/b.safetensors", "..\\x.safetensors"]


@pytest.mark.parametrize("name", [*OUTSIDE, "x.bin", "", "x.safetensors\n", 7, None])
def test_shard_names_that_leave_the_folder_are_refused(tmp_path, name):
    folder = save_checkpoint(tmp_path / "base", llama_tensors(), 2, LLAMA)
    path = folder / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    index["weight_map"]["lm_head.weight"] = name
    path.write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match="not the plain name"):
        Checkpoint.open(folder)


def test_index_and_headers_must_agree(tmp_path):
    folder = save_checkpoint(tmp_path / "base", llama_tensors(), 2, LLAMA)
    path = folder / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    first = index["weight_map"].pop("lm_head.weight")
    path.write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match=r"'lm_head.weight' of .* is not in the index"):
        Checkpoint.open(folder)
    index["weight_map"] |= {"lm_head.weight": first, "more.weight": first}
    path.write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match=r"puts 'more.weight' into .* does not hold it"):
        Checkpoint.open(folder)


def test_missing_shard_is_named(tmp_path):
    folder = save_checkpoint(tmp_path / "base", llama_tensors(), 2, LLAMA)
    (folder / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(CheckpointError, match="model-00002-of-00002"):
        Checkpoint.open(folder)


def test_single_and_sharded_at_once_is_refused(tmp_path):
    folder = save_checkpoint(tmp_path / "base", llama_tensors(), 2, LLAMA)
    save_checkpoint(folder, llama_tensors(), 1)
    with pytest.raises(CheckpointError, match="both"):
        Checkpoint.open(folder)


def test_consolidated_file_beside_an_index_is_left_aside(tmp_path):
    folder = save_checkpoint(tmp_path / "base", llama_tensors(), 2, LLAMA)
    save_checkpoint(folder, {"other": torch.zeros(2)}, 1, stem="consolidated")
    assert "other" not in Checkpoint.open(folder).tensors


def test_the_outer_folder_of_the_hub_cache_is_told_its_snapshot(tmp_path):
    (tmp_path / "snapshots" / "abc").mkdir(parents=True)
    with pytest.raises(CheckpointError, match="give its folder 'snapshots/abc'"):
        Checkpoint.open(tmp_path)


def test_pickle_only_says_what_to_do(tmp_path):
    (tmp_path / "pytorch_model.bin").write_bytes(b"x")
    with pytest.raises(CheckpointError, match="save_pretrained"):
        Checkpoint.open(tmp_path)


def test_links_are_followed_inside_the_folder_and_the_hub_cache_only(tmp_path):
    cache = tmp_path / "models--a--b"
    snapshot, blobs = cache / "snapshots" / "0123", cache / "blobs"
    save_checkpoint(blobs, llama_tensors(), 1, LLAMA)
    snapshot.mkdir(parents=True)
    for name in ("model.safetensors", "config.json"):
        (snapshot / name).symlink_to(f"../../blobs/{name}")
    assert Checkpoint.open(snapshot).config["model_type"] == "llama"
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "model.safetensors").symlink_to(blobs / "model.safetensors")
    with pytest.raises(CheckpointError, match="outside the folder"):
        Checkpoint.open(outside)


def test_side_files_that_belong_come_along(tmp_path):
    save_checkpoint(tmp_path, llama_tensors(), 1, LLAMA)
    belong = ["generation_config.json", "tokenizer.json", "tokenizer.model", "chat_template.jinja"]
    belong += ["special_tokens_map.json", "merges.txt", "LICENSE", "1_Pooling/config.json"]
    not_belong = ["pytorch_model.bin", "optimizer.pt", "model.gguf", ".git/HEAD", ".secret.json"]
    not_belong += ["adapter_config.json", "adapter_model.safetensors", "trainer_state.json"]
    not_belong += ["pytorch_model.bin.index.json", "flax_model.msgpack"]
    for name in [*belong, *not_belong, "modeling_x.py"]:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("{}")
    taken, left = find_side_files(tmp_path)
    assert sorted(taken) == sorted(belong)
    assert left == ("modeling_x.py",)
    taken, left = find_side_files(tmp_path, code=True)
    assert sorted(taken) == sorted([*belong, "modeling_x.py"])


def test_config_edits_reach_inner_configs_and_keep_the_rest():
    config = {"b": 1, "text_config": {"vocab_size": 5, "x": 1}, "torch_dtype": "float16"}
    edited = json.loads(edit_config(config, {"vocab_size": 6, "tie_word_embeddings": False}))
    assert edited == {
        "b": 1,
        "text_config": {"vocab_size": 6, "x": 1},
        "torch_dtype": "float16",
        "tie_word_embeddings": False,
    }
    assert list(edited)[:3] == list(config)


WRITE = os.O_WRONLY | os.O_CREAT


@pytest.mark.parametrize("kernel", [True, False])
def test_copy_range_copies_exactly(tmp_path, monkeypatch, kernel):
    if not kernel:
        monkeypatch.delattr(os, "copy_file_range", raising=False)
    data = os.urandom(100_001)
    (tmp_path / "a").write_bytes(data)
    source, target = os.open(tmp_path / "a", os.O_RDONLY), os.open(tmp_path / "b", WRITE)
    copy_range(source, target, 17, 5, 99_000)
    os.close(source)
    os.close(target)
    assert (tmp_path / "b").read_bytes() == bytes(5) + data[17 : 17 + 99_000]


def test_platform_without_copies_in_the_kernel_merges_the_same(tmp_path, monkeypatch):
    """As on macOS: no copy_file_range, no posix_fallocate."""
    tensors = llama_tensors()
    base = save_checkpoint(tmp_path / "base", tensors, 2, LLAMA)
    state = llama_adapter(tensors)
    merge_checkpoint(base, [state], tmp_path / "with")
    for name in ("copy_file_range", "posix_fallocate"):
        monkeypatch.delattr(os, name, raising=False)
    merge_checkpoint(base, [state], tmp_path / "without", options=MergeOptions(workers=3))
    for path in (tmp_path / "with").iterdir():
        assert path.read_bytes() == (tmp_path / "without" / path.name).read_bytes(), path.name


def test_copy_range_falls_back_across_file_systems(tmp_path, monkeypatch):
    def exdev(*_):
        raise OSError(18, "cross-device link")

    monkeypatch.setattr(os, "copy_file_range", exdev)
    (tmp_path / "a").write_bytes(b"0123456789")
    source, target = os.open(tmp_path / "a", os.O_RDONLY), os.open(tmp_path / "b", WRITE)
    copy_range(source, target, 0, 0, 10)
    with pytest.raises(CheckpointError, match="ends after"):
        copy_range(source, target, 5, 0, 10)
    os.close(source)
    os.close(target)
    assert (tmp_path / "b").read_bytes()[5:] == b"56789"
