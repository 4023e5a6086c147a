"""Writing and reading back is the identity, for every kind, and the files are what they claim."""

import dataclasses
import json
import os
import tempfile
from pathlib import Path

import pytest
import torch
from helpers.adapter_states import (
    FINGERPRINT,
    KIND_SPECS,
    assert_same_state,
    dense,
    make_site,
    make_state,
)
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from lora_inject.core.adapter.state import AdapterState
from lora_inject.core.files.safetensors_file import is_plain_name
from lora_inject.core.files.tensors import read_names
from lora_inject.core.spec.sites import SiteSpec
from lora_inject.errors import FormatError
from lora_inject.formats import read_adapter, write_adapter

MODEL = "adapter_model.safetensors"


def place(parent: Path, layout: str) -> Path:
    return parent / ("a.safetensors" if layout == "native" else "a")


@pytest.mark.parametrize(
    "kind",
    sorted(set(KIND_SPECS) - {"turned experts", "turned parameter", "slices of conv1d", "conv1d"}),
)
@pytest.mark.parametrize("derived", [False, True])
def test_without_metadata_the_file_means_the_same(kind: str, derived: bool, tmp_path: Path) -> None:
    """Slices and frozen starts, read as the plain PEFT adapter that the file also is."""
    state = make_state(KIND_SPECS[kind], derived=derived)
    path = write_adapter(state, tmp_path / "a")
    plain = read_adapter(path, prefer="config")
    assert plain.sites.keys() == state.sites.keys()
    for name, site in state.sites.items():
        delta = dense(site)
        assert (dense(plain.sites[name]) - delta).abs().max() <= 1e-6 * delta.abs().max()
    assert all(site.spec.slices is None and site.A0 is None for site in plain.sites.values())
    assert plain.config is None


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("holds", [False, True])
def test_experts_are_written_as_their_module_holds_them(transposed, holds, tmp_path) -> None:
    """PEFT's pair is (in, out) of the module's own orientation; squares would hide an error."""
    shape = (3, 5, 7) if transposed else (3, 7, 5)
    spec = SiteSpec("moe.up", "parameter", 5, 7, shape, 2, 4.0, transposed, 3, weight="moe.up")
    state = make_state(spec)
    path = write_adapter(state, tmp_path / "a", transposed_modules=["moe"] if holds else [])
    A = load_file(path / MODEL)["base_model.model.moe.lora_A.weight"]
    # PEFT: in = shape[1] of the stack if is_transposed, else shape[2].
    assert tuple(A.shape) == (6, shape[1] if holds else shape[2])
    assert_same_state(read_adapter(path), state)


@pytest.mark.parametrize("layout", ["peft", "native"])
def test_everything_else_comes_back(layout: str, tmp_path: Path) -> None:
    numbers = {"rank": 3, "alpha": 0.1 + 0.2, "scaling": "rslora", "dropout": 0.1}
    options = {**numbers, "init": ("normal", 1e-3), "compute": "float32"}
    odd = dataclasses.replace(KIND_SPECS["conv1d"], **options)
    specs = [KIND_SPECS["linear"], KIND_SPECS["slices"], odd]
    sites = {spec.name: make_site(spec, dtype=torch.bfloat16) for spec in specs}
    trained = {
        "h.0.fc.bias": torch.randn(7),
        "ln.weight": torch.randn(3).half(),
        "empty": torch.zeros(0, 4),
        "count": torch.tensor(3),
        "extreme": torch.tensor([torch.finfo().max, -0.0, 1e-45]),
    }
    config = {"rank": 4, "targets": ["a|b", {"match": "ü\n", "alpha": 0.1}]}
    state = AdapterState(sites, trained, config, FINGERPRINT)
    path = write_adapter(state, place(tmp_path, layout), format=layout)
    assert_same_state(read_adapter(path), state)


# Random adapters --------------------------------------------------------------------------------

components = st.text(
    st.characters(codec="utf-8", exclude_characters=".", exclude_categories=("Cs",)),
    min_size=1,
    max_size=6,
) | st.sampled_from(
    ["lora_A", "lora_in", "base_layer", "weight", "default", "0", "a+b", "^x$", "modules_to_save"]
)
names = st.lists(components, min_size=1, max_size=3).map(".".join).filter(is_plain_name)
plain_kinds = st.sampled_from(["linear", "conv1d", "embedding", "conv", "slices"])


@st.composite
def states(draw: st.DrawFn) -> AdapterState:
    """Sites, tensors and biases under names that keys of files use themselves."""
    sites = {}
    for name in draw(st.lists(names, max_size=4, unique=True)):
        spec = KIND_SPECS[draw(plain_kinds)].at(name, f"{name}.weight")
        alpha = draw(st.floats(1e-3, 1e3) | st.integers(1, 64).map(float))
        scaling = draw(st.sampled_from(["standard", "rslora"]))
        spec = dataclasses.replace(spec, rank=draw(st.integers(1, 3)), alpha=alpha, scaling=scaling)
        sites[name] = make_site(spec, seed=draw(st.integers(0, 9)), derived=draw(st.booleans()))
    extra = [n for n in draw(st.lists(names, max_size=3, unique=True)) if n not in sites]
    trained = {name: torch.full((2,), float(n)) for n, name in enumerate(extra)}
    biased = draw(st.sets(st.sampled_from(list(sites)))) if sites else ()
    trained |= {f"{name}.bias": torch.ones(1) for name in biased}
    return AdapterState(sites, trained, draw(st.none() | st.just({"rank": 2})))


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(state=states(), layout=st.sampled_from(["peft", "native"]))
def test_random_adapters_come_back(state: AdapterState, layout: str) -> None:
    with tempfile.TemporaryDirectory() as parent:
        try:
            path = write_adapter(state, place(Path(parent), layout), format=layout)
        except FormatError as error:
            assert layout == "peft"
            assert "two tensors would be called" in str(error)  # noqa: PT017
            return
        assert_same_state(read_adapter(path), state)


# The files --------------------------------------------------------------------------------------

# The fields of LoraConfig in PEFT 0.12, which fails on others.
PEFT_0_12 = """
alpha_pattern auto_mapping base_model_name_or_path bias fan_in_fan_out inference_mode
init_lora_weights layer_replication layers_pattern layers_to_transform loftq_config lora_alpha
lora_dropout megatron_config megatron_core modules_to_save peft_type r rank_pattern revision
target_modules task_type use_dora use_rslora
"""


def test_the_folder_is_one_that_peft_0_12_reads(tmp_path: Path) -> None:
    linear, embedding = KIND_SPECS["linear"], KIND_SPECS["embedding"]
    sites = {"h.0.fc": make_site(linear, dtype=torch.bfloat16), "wte": make_site(embedding)}
    state = AdapterState(sites, {"h.0.fc.bias": torch.ones(7)}, None, None)
    path = write_adapter(state, tmp_path / "a", base_model="org/base", task_type="CAUSAL_LM")
    tensors = load_file(path / MODEL)
    assert {key: (tuple(t.shape), t.dtype) for key, t in tensors.items()} == {
        "base_model.model.h.0.fc.lora_A.weight": ((2, 5), torch.bfloat16),
        "base_model.model.h.0.fc.lora_B.weight": ((7, 2), torch.bfloat16),
        "base_model.model.h.0.fc.base_layer.bias": ((7,), torch.float32),
        "base_model.model.wte.lora_embedding_A": ((2, 11), torch.float32),
        "base_model.model.wte.lora_embedding_B": ((4, 2), torch.float32),
    }
    config = json.loads((path / "adapter_config.json").read_text())
    assert config.keys() <= set(PEFT_0_12.split())
    assert config["target_modules"] == ["h.0.fc", "wte"]  # in the same order in each process
    assert read_names(path / MODEL)[1]["format"] == "pt"


def test_permissions_follow_the_umask(tmp_path: Path) -> None:
    state, before = make_state(KIND_SPECS["linear"]), os.umask(0o027)
    try:
        folder, file = (write_adapter(state, place(tmp_path, f), f) for f in ("peft", "native"))
    finally:
        os.umask(before)
    assert folder.stat().st_mode & 0o777 == 0o750
    assert {p.stat().st_mode & 0o777 for p in [*folder.iterdir(), file]} == {0o640}
