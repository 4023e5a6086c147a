"""Writing and reading back is the identity, for every kind, and the files are what they claim."""

import dataclasses
import json
import math
import os
import tempfile
from pathlib import Path

import pytest
import torch
from helpers.adapter_states import (
    FINGERPRINT,
    KIND_SPECS,
    assert_same_deltas,
    assert_same_state,
    dense,
    make_site,
    make_state,
)
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from lora_inject.core.adapter.fingerprint import Fingerprint
from lora_inject.core.adapter.native import describe
from lora_inject.core.adapter.state import AdapterState
from lora_inject.core.files.safetensors_file import is_plain_name
from lora_inject.core.files.tensors import read_names
from lora_inject.core.spec.sites import SiteSpec
from lora_inject.core.spec.slices import Slices
from lora_inject.errors import FormatError
from lora_inject.formats import read_adapter, write_adapter

MODEL = "adapter_model.safetensors"


def place(parent: Path, layout: str) -> Path:
    return parent / ("a.safetensors" if layout == "native" else "a")


@pytest.mark.parametrize("layout", ["peft", "native"])
@pytest.mark.parametrize("derived", [False, True])
@pytest.mark.parametrize("kind", KIND_SPECS)
def test_each_kind_comes_back(kind: str, derived: bool, layout: str, tmp_path: Path) -> None:
    state = make_state(KIND_SPECS[kind], derived=derived)
    path = write_adapter(state, place(tmp_path, layout), format=layout)
    assert_same_state(read_adapter(path), state)


@pytest.mark.parametrize(
    "kind",
    sorted(set(KIND_SPECS) - {"turned experts", "turned parameter", "slices of conv1d", "conv1d"}),
)
@pytest.mark.parametrize("derived", [False, True])
def test_without_metadata_the_file_means_the_same(kind: str, derived: bool, tmp_path: Path) -> None:
    """Slices and frozen starts, read as the plain PEFT adapter that the file also is."""
    state = make_state(KIND_SPECS[kind], derived=derived)
    path = write_adapter(state, tmp_path / "a")
    found = read_adapter(path, prefer="config")
    assert_same_deltas(
        {n: dense(s) for n, s in found.sites.items()}, {n: dense(s) for n, s in state.sites.items()}
    )
    assert all(site.spec.slices is None and site.A0 is None for site in found.sites.values())
    assert found.config is None


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("holds", [False, True])
def test_experts_are_written_as_their_module_holds_them(transposed, holds, tmp_path) -> None:
    """PEFT's pair is (in, out) of the module's own orientation; squares would hide an error."""
    shape = (3, 5, 7) if transposed else (3, 7, 5)
    spec = SiteSpec("moe.up", "parameter", 5, 7, shape, 2, 4.0, transposed, 3, weight="moe.up")
    state = make_state(spec)
    modules = ["moe"] if holds else []
    path = write_adapter(state, tmp_path / "a", transposed_modules=modules)
    found = load_file(path / MODEL)["base_model.model.moe.lora_A.weight"]
    # PEFT: in = shape[1] of the stack if is_transposed, else shape[2].
    assert tuple(found.shape) == (6, shape[1] if holds else shape[2])
    assert_same_state(read_adapter(path), state)


def test_everything_else_comes_back(tmp_path: Path) -> None:
    specs = [KIND_SPECS["linear"], KIND_SPECS["slices"]]
    sites = {spec.name: make_site(spec, dtype=torch.bfloat16) for spec in specs}
    trained = {
        "h.0.fc.bias": torch.randn(7),
        "ln.weight": torch.randn(3).half(),
        "empty": torch.zeros(0, 4),
        "count": torch.tensor(3),
        "extreme": torch.tensor([torch.finfo().max, -0.0, 1e-45]),
    }
    config = {"rank": 4, "targets": ["a|b", {"match": "ü\n", "alpha": 0.1}]}
    samples = {"w": (math.nan, math.inf, -math.inf, 0.5)}
    for fingerprint in (None, FINGERPRINT, Fingerprint({"w": ()}, samples)):
        state = AdapterState(sites, trained, config, fingerprint)
        for layout in ("peft", "native"):
            path = write_adapter(state, place(tmp_path, layout), format=layout, overwrite=True)
            found = read_adapter(path)
            if fingerprint is not None and fingerprint.samples is samples:
                assert repr(found.fingerprint) == repr(fingerprint)
                continue
            assert_same_state(found, state)


def test_numbers_come_back_exactly(tmp_path: Path) -> None:
    numbers = {"rank": 3, "alpha": 0.1 + 0.2, "scaling": "rslora", "dropout": 0.1}
    options = {**numbers, "init": ("normal", 1e-3), "compute": "float32"}
    state = make_state(dataclasses.replace(KIND_SPECS["linear"], **options))
    assert_same_state(read_adapter(write_adapter(state, tmp_path / "a")), state)


# Random adapters --------------------------------------------------------------------------------

components = st.text(
    st.characters(codec="utf-8", exclude_characters=".", exclude_categories=("Cs",)),
    min_size=1,
    max_size=6,
) | st.sampled_from(
    ["lora_A", "lora_in", "base_layer", "weight", "default", "0", "a+b", "^x$", "modules_to_save"]
)
names = st.lists(components, min_size=1, max_size=3).map(".".join).filter(is_plain_name)
alphas = st.floats(1e-3, 1e3) | st.integers(1, 64).map(float)


@st.composite
def specs(draw: st.DrawFn, name: str) -> SiteSpec:
    kind = draw(st.sampled_from(["linear", "conv1d", "embedding", "conv"]))
    n_in, rank = draw(st.integers(1, 5)), draw(st.integers(1, 3))
    slices, n_out = None, draw(st.integers(1, 5))
    if kind in {"linear", "conv1d"} and draw(st.booleans()):
        widths = draw(st.lists(st.integers(1, 3), min_size=1, max_size=4))
        parts = [f"p{n}" for n in range(len(widths))]
        adapt = draw(st.lists(st.sampled_from(parts), min_size=1, unique=True))
        slices = Slices(
            tuple(zip(parts, widths, strict=True)), tuple(p for p in parts if p in adapt)
        )
        n_out = sum(widths)
    shape: tuple[int, ...] = (n_out, n_in) if kind == "linear" else (n_in, n_out)
    if kind == "conv":
        shape, n_in = (n_out, n_in, 2, 1), n_in * 2
    options = {
        "scaling": draw(st.sampled_from(["standard", "rslora"])),
        "dropout": draw(st.sampled_from([0.0, 0.1])),
        "transposed": kind in {"conv1d", "embedding"},
        "weight": f"{name}.weight",
    }
    return SiteSpec(name, kind, n_in, n_out, shape, rank, draw(alphas), slices=slices, **options)


@st.composite
def states(draw: st.DrawFn) -> AdapterState:
    chosen = draw(st.lists(names, max_size=4, unique=True))
    sites = {
        n: make_site(draw(specs(n)), seed=draw(st.integers(0, 9)), derived=draw(st.booleans()))
        for n in chosen
    }
    extra = [n for n in draw(st.lists(names, max_size=3, unique=True)) if n not in chosen]
    trained = {name: torch.full((2,), float(n)) for n, name in enumerate(extra)}
    biased = draw(st.sets(st.sampled_from(chosen))) if chosen else ()
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


def test_peft_keys_dtypes_and_config(tmp_path: Path) -> None:
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
    text = (path / "adapter_config.json").read_text()
    config = json.loads(text)
    assert text == json.dumps(config, indent=2, sort_keys=True) + "\n"
    assert config["target_modules"] == ["h.0.fc", "wte"]
    assert (config["r"], config["lora_alpha"], config["alpha_pattern"]) == (2, 4, {"wte": 8})
    assert (config["bias"], config["use_rslora"]) == ("lora_only", False)
    assert (config["base_model_name_or_path"], config["task_type"]) == ("org/base", "CAUSAL_LM")
    assert config.keys() <= set(PEFT_0_12.split())
    metadata = read_names(path / MODEL)[1]
    assert metadata["format"] == "pt"
    assert metadata["lora_inject.format_version"] == "1"


@pytest.mark.parametrize(
    ("scaling", "kind", "derived", "alpha", "rank"),
    [
        ("standard", "slices", False, 6.0 * 2, 4),
        ("standard", "slices", True, 6.0 * 4, 8),
        ("standard", "linear", True, 8.0, 4),
        ("rslora", "linear", False, 4.0, 2),
        ("rslora", "linear", True, 4.0 * math.sqrt(2), 4),
        ("rslora", "slices", False, 6.0 * math.sqrt(2), 4),
    ],
)
def test_alpha_of_widened_ranks(scaling, kind, derived, alpha, rank, tmp_path) -> None:
    spec = dataclasses.replace(KIND_SPECS[kind], scaling=scaling)
    path = write_adapter(make_state(spec, derived=derived), tmp_path / "a")
    config = json.loads((path / "adapter_config.json").read_text())
    assert config["lora_alpha"] == pytest.approx(alpha, rel=1e-12)
    assert (config["r"], config["use_rslora"]) == (rank, scaling == "rslora")


@pytest.mark.parametrize(
    ("umask", "file", "directory"), [(0o022, 0o644, 0o755), (0o077, 0o600, 0o700)]
)
def test_permissions_follow_the_umask(umask, file, directory, tmp_path) -> None:
    before = os.umask(umask)
    try:
        state = make_state(KIND_SPECS["linear"])
        path = write_adapter(state, tmp_path / "a")
        single = write_adapter(state, tmp_path / "b.safetensors", format="native")
    finally:
        os.umask(before)
    assert path.stat().st_mode & 0o777 == directory
    assert {p.stat().st_mode & 0o777 for p in [*path.iterdir(), single]} == {file}


def test_the_card_says_what_the_adapter_is(tmp_path: Path) -> None:
    import yaml

    specs = [KIND_SPECS["linear"], KIND_SPECS["embedding"]]
    state = make_state(*specs, trained={"ln.weight": torch.ones(3)})
    path = write_adapter(state, tmp_path / "a", base_model="org/base: 1")
    text = (path / "README.md").read_text()
    front = yaml.safe_load(text.split("---")[1])
    assert front == {
        "base_model": "org/base: 1",
        "base_model_relation": "adapter",
        "library_name": "peft",
        "tags": ["lora", "lora-inject"],
    }
    assert "| `wte` | embedding | 2 | 8 | 4 |" in text
    assert "1 tensors of the base travel in full (3 values)" in text
    assert "base_model" not in (write_adapter(state, tmp_path / "b") / "README.md").read_text()


@pytest.mark.parametrize("value", [1e300, "0.5"])
def test_a_sample_that_is_not_a_float32_is_not_written(value: object, tmp_path: Path) -> None:
    fingerprint = Fingerprint({"w": (1,)}, {"w": (value,)})  # type: ignore[dict-item]
    state = make_state(KIND_SPECS["linear"], fingerprint=fingerprint)
    with pytest.raises(FormatError, match=r"fingerprint of 'w'.*a sample is not a float32"):
        write_adapter(state, tmp_path / "a.safetensors", format="native")


def test_sites_alike_are_stated_once() -> None:
    fc, c = KIND_SPECS["linear"], KIND_SPECS["conv1d"]
    alike = [
        spec.at(f"h.{i}.{spec.name}", f"h.{i}.{spec.weight}") for i in (0, 1) for spec in (fc, c)
    ]
    words = describe(make_state(*alike), "native")
    assert len(json.loads(words["lora_inject.kinds"])) == 2
    assert [kind for *_, kind in json.loads(words["lora_inject.sites"])] == [0, 1, 0, 1]
