"""What every format of the table is held to: the same deltas back, and errors instead of damage.

A format that is added needs one row here too.
"""

import contextlib
import json
import shutil
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import gguf
import pytest
import torch
from helpers.adapter_states import KIND_SPECS, effect, make_site, make_state
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor

from lora_inject.core.adapter.state import AdapterState
from lora_inject.core.files.tensors import read_names
from lora_inject.core.spec.sites import SiteSpec
from lora_inject.errors import FormatError
from lora_inject.formats import FORMATS, Format, read_adapter, write_adapter
from lora_inject.formats.lost import losses_of

LLAMA = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "vocab_size": 13}
LLAMA |= {"hidden_size": 8, "intermediate_size": 12, "num_hidden_layers": 2, "head_dim": 2}
LLAMA |= {"num_attention_heads": 4, "num_key_value_heads": 2, "tie_word_embeddings": False}
LINEARS = {  # in and out
    "self_attn.q_proj": (8, 8),
    "self_attn.k_proj": (8, 4),
    "self_attn.v_proj": (8, 4),
    "self_attn.o_proj": (8, 8),
    "mlp.gate_proj": (8, 12),
    "mlp.up_proj": (8, 12),
    "mlp.down_proj": (12, 8),
}
MODULES = [*(f"model.layers.{i}.{name}" for i in range(2) for name in LINEARS), "lm_head"]


def linear(name: str, rank: int, alpha: float, scaling: str = "standard") -> SiteSpec:
    n_in, n_out = LINEARS.get(name.partition("layers.")[2].partition(".")[2], (8, 13))
    shape, weight = (n_out, n_in), f"{name}.weight"
    return SiteSpec(name, "linear", n_in, n_out, shape, rank, alpha, scaling=scaling, weight=weight)


ODD = {
    "embedding": KIND_SPECS["embedding"].at("model.embed_tokens", "model.embed_tokens.weight"),
    "conv": KIND_SPECS["conv"],
    "fused": KIND_SPECS["slices"],
}


@dataclass(frozen=True)
class Case:
    """How one format is called, and which adapters it carries."""

    file: str = "adapter"
    write: Mapping[str, Any] = field(default_factory=dict)
    read: Mapping[str, Any] = field(default_factory=dict)
    odd: tuple[str, ...] = ("embedding", "conv", "fused")
    derived: bool = True
    uniform: bool = False  # one rank, one alpha
    whole: bool = False  # each module in all layers, an MLP as a whole
    damaged: str = ""  # the file of tensors, inside a folder


PICKLED: dict[str, Any] = {"write": {"config": LLAMA}, "odd": (), "whole": True}
PICKLED["read"] = {"config": LLAMA, "allow_pickle": True}
CASES = {
    **dict.fromkeys(
        ("peft", "portable", "vllm", "sglang"), Case(damaged="adapter_model.safetensors")
    ),
    "native": Case("a.safetensors"),
    "kohya": Case("a.safetensors", {"component": "unet"}, odd=("conv", "fused")),
    "diffusers": Case("a.safetensors", {"component": "transformer"}, odd=("conv", "fused")),
    "mlx": Case(
        write={"config": LLAMA}, odd=("embedding", "fused"), damaged="adapters.safetensors"
    ),
    "gguf": Case("a.gguf", {"config": LLAMA}, {"config": LLAMA}, odd=("embedding",)),
    "torchtune": Case(**PICKLED, damaged="adapter_model.pt"),
    "litgpt": Case(**PICKLED, damaged="lit_model.pth.lora"),
    "loralib": Case("a.safetensors", read={"alpha": 3.0}, odd=(), derived=False, uniform=True),
}


@pytest.mark.parametrize(
    ("name", "config", "holds"),
    [
        ("mlx", "adapter_config.json", "the rank and the scale"),
        ("torchtune", "adapter_config.json", "the alpha"),
        ("litgpt", "hyperparameters.yaml", "the rank, the alpha"),
        ("peft", "adapter_config.json", "the alpha"),
    ],
)
def test_one_file_of_a_folder_says_what_is_missing_beside_it(name, config, holds, tmp_path) -> None:
    file = tensors_file(name, written(name, tmp_path))
    lone = [shutil.copy(file, tmp_path / file.name)]
    if file.suffix == ".safetensors":  # known by its keys, whatever its name
        lone.append(shutil.copy(file, tmp_path / "sql.safetensors"))
    with pytest.raises(FormatError, match=rf"one file of .*Give the folder: '{file.parent}'"):
        read_adapter(file)
    words = rf"one file of .*'{name}', is a folder\. Fetch the {config} .*{holds}"
    for path in lone:
        with pytest.raises(FormatError, match=words):
            read_adapter(path)


@st.composite
def states(draw: st.DrawFn, case: Case) -> AdapterState:
    numbers = st.tuples(
        st.integers(1, 3),
        st.floats(0.01, 100) | st.integers(1, 32).map(float),
        st.sampled_from(["standard", "rslora"]),
    )
    same = (2, 3.0, "standard") if case.uniform else None
    names = draw(st.lists(st.sampled_from(MODULES), min_size=1, max_size=5, unique=True))
    if case.whole:
        chosen = {name.split(".", 3)[-1] for name in names}
        chosen |= {name for name in LINEARS if "mlp" in name and any("mlp" in c for c in chosen)}
        names = [name for name in MODULES if name.split(".", 3)[-1] in chosen]
    specs = [linear(name, *(same or draw(numbers))) for name in names]
    odd = draw(st.sets(st.sampled_from(case.odd))) if case.odd else ()
    for kind in odd:
        rank, alpha, _ = same or draw(numbers)
        specs.append(replace(ODD[kind], rank=rank, alpha=alpha))
    derived = case.derived and draw(st.booleans())
    sites = {s.name: make_site(s, seed=n, derived=derived) for n, s in enumerate(specs)}
    return AdapterState(sites)


@pytest.mark.parametrize("name", FORMATS)
def test_deltas_come_back(name: str) -> None:
    """Over ranks, alphas, scalings, shapes and kinds, to float precision."""
    case = CASES[name]

    @settings(max_examples=15, deadline=None, suppress_health_check=list(HealthCheck))
    @given(states(case))
    def comes_back(state: AdapterState) -> None:
        with tempfile.TemporaryDirectory() as parent:
            path = write_adapter(state, Path(parent, case.file), name, **case.write)
            back = read_adapter(path, **case.read)
        assert set(back.sites) == set(state.sites)
        for site, due in state.sites.items():
            wanted = effect(due)
            error = (effect(back.sites[site]) - wanted).abs().max()
            assert error <= 1e-6 * wanted.abs().max(), site

    comes_back()


def written(name: str, parent: Path) -> Path:
    case = CASES[name]
    numbers = (2, 3.0) if case.uniform else (2, 5.0)
    specs = [linear(n, *numbers) for n in MODULES]
    return write_adapter(make_state(*specs), parent / case.file, name, **case.write)


def tensors_file(name: str, path: Path) -> Path:
    return path / CASES[name].damaged if path.is_dir() else path


def read(name: str, path: Path) -> AdapterState:
    return read_adapter(path, format=name, **CASES[name].read)


@pytest.mark.parametrize("name", FORMATS)
def test_what_is_there_is_not_replaced_unasked(name: str, tmp_path: Path) -> None:
    path = written(name, tmp_path)
    before = tensors_file(name, path).read_bytes()
    with pytest.raises(FormatError, match="already"):
        written(name, tmp_path)
    assert tensors_file(name, path).read_bytes() == before
    write_adapter(read(name, path), path, name, overwrite=True, **CASES[name].write)


@pytest.mark.parametrize("name", FORMATS)
def test_damaged_bytes_are_an_error_that_names_the_file_or_harmless(name, tmp_path) -> None:
    """A header that lies raises at once; nothing is allocated by what it says."""
    path = written(name, tmp_path)
    file = tensors_file(name, path)
    whole = file.read_bytes()
    for size in (0, 7, 40, len(whole) // 3, len(whole) - 40):
        file.write_bytes(whole[:size])
        with pytest.raises(FormatError, match=r"adapter|a\.(safetensors|gguf)"):
            read(name, path)
    generator = torch.Generator().manual_seed(0)
    for place in torch.randint(0, min(len(whole), 900), (60,), generator=generator).tolist():
        file.write_bytes(whole[:place] + bytes([whole[place] ^ 0xFF]) + whole[place + 1 :])
        with contextlib.suppress(FormatError):
            read(name, path)


# Damage that is well formed ---------------------------------------------------------------------


def load(file: Path) -> dict[str, Tensor]:
    if file.suffix == ".safetensors":
        return load_file(file)
    if file.suffix == ".gguf":
        return {t.name: torch.tensor(t.data) for t in gguf.GGUFReader(file).tensors}
    tensors = torch.load(file, weights_only=True)
    return dict(tensors.get("model", tensors))


def store(file: Path, tensors: dict[str, Tensor]) -> None:
    if file.suffix == ".safetensors":
        said = read_names(file)[1]
        save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, file, said)
    elif file.suffix == ".gguf":
        write_gguf(file, tensors)
    else:
        torch.save({"model": tensors} if file.suffix == ".lora" else tensors, file)


def write_gguf(file: Path, tensors: dict[str, Tensor]) -> None:
    writer = gguf.GGUFWriter(file, "llama")
    writer.add_type(gguf.GGUFType.ADAPTER)
    writer.add_string("adapter.type", "lora")
    writer.add_float32("adapter.lora.alpha", 5.0)
    for key, tensor in tensors.items():
        writer.add_tensor(key, tensor.numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def a_matrix(tensors: dict[str, Tensor]) -> str:
    return next(key for key in sorted(tensors) if tensors[key].ndim == 2)


DAMAGE: Mapping[str, Callable[[dict[str, Tensor], str], dict[str, Tensor]]] = {
    "mis-shaped": lambda tensors, key: {**tensors, key: torch.ones(3, 5, 2)},
    "cut short": lambda tensors, key: {**tensors, key: tensors[key][:-1, :-1].clone()},
    "a half is missing": lambda tensors, key: {k: t for k, t in tensors.items() if k != key},
    "integers": lambda tensors, key: {**tensors, key: tensors[key].int()},
    "mixed": lambda tensors, key: {**tensors, "model.layers.0.hada_w1_a": torch.ones(2, 2)},
}


@pytest.mark.parametrize("damage", DAMAGE)
@pytest.mark.parametrize("name", FORMATS)
def test_tensors_that_do_not_fit_are_an_error(name: str, damage: str, tmp_path: Path) -> None:
    if (name, damage) == ("loralib", "mixed"):
        pytest.skip("what is not a pair is a trained tensor there")
    path = written(name, tmp_path)
    file = tensors_file(name, path)
    tensors = load(file)
    store(file, DAMAGE[damage](tensors, a_matrix(tensors)))
    with pytest.raises(FormatError) as caught:
        read(name, path)
    assert caught.value.remedy


@pytest.mark.parametrize("name", FORMATS)
def test_nan_is_read_and_not_handed_on(name: str, tmp_path: Path) -> None:
    """`inspect` has to see it; whoever converts is told where it is."""
    path = written(name, tmp_path)
    file = tensors_file(name, path)
    tensors = load(file)
    key = a_matrix(tensors)
    tensors[key] = tensors[key].clone()
    tensors[key][0, 0] = torch.nan
    store(file, tensors)
    state = read(name, path)
    with pytest.raises(FormatError, match=r"[AB] of site '.*': it holds 1 NaN or infinite"):
        write_adapter(state, tmp_path / "portable", "portable")


def test_headers_of_safetensors_that_lie_are_an_error(tmp_path: Path) -> None:
    """Nothing is allocated by a number before it is checked against the size of the file."""
    file = written("native", tmp_path)
    whole = file.read_bytes()
    length = int.from_bytes(whole[:8], "little")
    header, body = whole[8 : 8 + length].decode(), whole[8 + length :]
    key, entry = next((k, e) for k, e in json.loads(header).items() if k != "__metadata__")
    shape = json.dumps(entry["shape"], separators=(",", ":"))
    file.write_bytes((2**62).to_bytes(8, "little") + whole[8:])
    with pytest.raises(FormatError, match="cut off") as cut:
        read_adapter(file)
    assert str(cut.value).count(str(file)) == 1, "a place is said once"
    for text in (
        header.replace(f'"shape":{shape}', f'"shape":[{2**60},{2**60}]', 1),
        header.replace(f'"shape":{shape}', f'"shape":[0,{2**62}]', 1),
        header.replace(f'"{key}":', f'"{key}":{json.dumps(entry)},"{key}":', 1),
    ):
        assert text != header
        file.write_bytes(len(text.encode()).to_bytes(8, "little") + text.encode() + body)
        with pytest.raises(FormatError):
            read_adapter(file)


def test_what_a_format_loses_is_said_and_nothing_else() -> None:
    scales, ranks = "scales are folded into B", "ranks are padded with zeros"
    for alpha, rank, layout, losses in (
        (2.0, 2, "portable", []),
        (4.0, 2, "portable", [scales]),
        (2.0, 3, "portable", [ranks]),
        (2.0, 3, "gguf", []),
        (4.0, 3, "mlx", [scales, ranks]),
    ):
        specs = [linear("a", 2, alpha), linear("b", rank, float(rank))]
        assert losses_of(make_state(*specs), layout) == losses
    state = make_state(KIND_SPECS["slices"], derived=True, config={"rank": 2})
    assert losses_of(state, "native") == losses_of(state, "peft") == []
    lost = [words.split()[0] for words in losses_of(state, "portable")]
    assert lost == ["the", "slices", "frozen", "scales"]


def test_what_any_format_reads_and_writes_is_checked(tmp_path, monkeypatch) -> None:
    state = make_state(KIND_SPECS["linear"])
    [(name, site)] = state.sites.items()
    wrong = replace(state, sites={name: replace(site, A=site.A[:, 1:])})
    own = Format(lambda state, path, facts: b"own", lambda path, facts: wrong, Path.is_file)
    monkeypatch.setitem(FORMATS, "own", own)
    path = write_adapter(state, tmp_path / "a", "own")
    assert path.read_bytes() == b"own"
    with pytest.raises(FormatError, match=f"read own adapter '.*a', site '{name}': A has shape"):
        read_adapter(path, "own")
    with pytest.raises(FormatError, match=f"write own adapter to '.*b', site '{name}': A has"):
        write_adapter(wrong, tmp_path / "b", "own")
    assert not (tmp_path / "b").exists()
