"""What every format is held to: the same updates back, and errors instead of damage.

A format that is added needs one row here.
"""

import contextlib
import json
import re
import shutil
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.refusals import refused
from helpers.states import (
    SITES,
    Site,
    as_of_peft,
    effect,
    linear,
    metadata,
    same_effects,
    state_of,
)
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor

import lora_inject as li

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
ODD = {
    "embedding": SITES["embedding"].at("model.embed_tokens"),
    "conv": SITES["conv"],
    "fused": SITES["slices"],
}


def of_llama(name: str, rank: int = 2, alpha: float = 5.0, scaling: str = "standard") -> Site:
    sizes = LINEARS.get(name.partition("layers.")[2].partition(".")[2], (8, 13))
    return linear(name, *sizes, rank=rank, alpha=alpha, scaling=scaling)


@dataclass(frozen=True)
class Case:
    """How one format is called, and which adapters it carries."""

    file: str = "adapter"
    write: Mapping[str, Any] = field(default_factory=dict)
    read: Mapping[str, Any] = field(default_factory=dict)
    odd: tuple[str, ...] = ("embedding", "conv", "fused")
    derived: bool = True
    uniform: bool = False  # one rank, one alpha
    tensors: str = ""  # the file of tensors, inside a folder
    config: tuple[str, str] | None = None  # the file beside it, and what only that one says
    is_read: bool = True


FOLDER = Case(tensors="adapter_model.safetensors", config=("adapter_config.json", "alpha"))
CASES = {
    **dict.fromkeys(("peft", "portable", "vllm", "sglang"), FOLDER),
    "native": Case("a.safetensors"),
    "kohya": Case("a.safetensors", {"component": "unet"}, odd=("conv", "fused")),
    "diffusers": Case("a.safetensors", {"component": "transformer"}, odd=("conv", "fused")),
    "mlx": Case(
        write={"config": LLAMA}, odd=("embedding", "fused"), tensors="adapters.safetensors",
        config=("adapter_config.json", "scale"),
    ),
    "gguf": Case("a.gguf", {"config": LLAMA}, is_read=False),
    "loralib": Case("a.safetensors", read={"alpha": 3.0}, odd=(), derived=False, uniform=True),
}  # fmt: skip
FOLDERS = ("peft", "mlx")
READ = [name for name, case in CASES.items() if case.is_read]


def test_every_format_has_a_row(run: Any) -> None:
    said = " ".join(run("convert", "--help").out.split())
    (known,) = re.findall(r"Format to write: ([\w, ]+)\.", said)
    assert {*known.split(", ")} == {*CASES}


def written_state(name: str) -> li.AdapterState:
    numbers = {"rank": 2, "alpha": 3.0 if CASES[name].uniform else 5.0}
    return state_of(*(of_llama(module, **numbers) for module in MODULES))


def written(name: str, parent: Path) -> Path:
    case = CASES[name]
    return li.write_adapter(written_state(name), parent / case.file, name, **case.write)


def tensors_file(name: str, path: Path) -> Path:
    return path / CASES[name].tensors if path.is_dir() else path


def read(name: str, path: Path) -> li.AdapterState:
    return li.read_adapter(path, format=name, **CASES[name].read)


# The same updates back ---------------------------------------------------------------------------


@st.composite
def rows_of(draw: st.DrawFn, case: Case) -> list[Site]:
    numbers = st.fixed_dictionaries({
        "rank": st.integers(1, 3),
        "alpha": st.floats(0.01, 100) | st.integers(1, 32).map(float),
        "scaling": st.sampled_from(["standard", "rslora"]),
    })  # fmt: skip
    same = {"rank": 2, "alpha": 3.0} if case.uniform else None
    names = draw(st.lists(st.sampled_from(MODULES), min_size=1, max_size=5, unique=True))
    rows = [of_llama(name, **(same or draw(numbers))) for name in names]
    odd = draw(st.sets(st.sampled_from(case.odd))) if case.odd else ()
    rows += [ODD[kind].by(**(same or draw(numbers))) for kind in sorted(odd)]
    derived = case.derived and draw(st.booleans())
    return [row.by(init="pissa") for row in rows] if derived else rows


@pytest.mark.parametrize("name", READ)
def test_updates_come_back(name: str) -> None:
    """Over ranks, alphas, scalings, shapes and kinds, to float precision."""
    case = CASES[name]

    @settings(max_examples=15, deadline=None, suppress_health_check=list(HealthCheck))
    @given(rows_of(case))
    def come_back(rows: list[Site]) -> None:
        state = state_of(*rows)
        with tempfile.TemporaryDirectory() as parent:
            path = li.write_adapter(state, Path(parent, case.file), name, **case.write)
            same_effects(li.read_adapter(path, **case.read), state, *rows)

    come_back()


@pytest.mark.parametrize("kind", SITES)
@pytest.mark.parametrize("derived", [False, True])
def test_a_folder_of_peft_means_the_same_without_our_metadata(
    kind: str, derived: bool, tmp_path: Path
) -> None:
    """Slices and frozen starts, read as the plain PEFT adapter that the file also is."""
    if kind in ("turned experts", "turned parameter"):
        pytest.skip("PEFT's files do not say which way round a parameter is held")
    row = SITES[kind].by(init="pissa") if derived else SITES[kind]
    state = state_of(row)
    plain = li.read_adapter(as_of_peft(li.write_adapter(state, tmp_path / "a")))
    same_effects(plain, state, row)
    assert all(site.A0 is None for site in plain.sites.values())
    assert plain.config is None


EXACT = ("peft", "native")  # which keep everything


@pytest.mark.parametrize("name", EXACT)
def test_everything_else_comes_back(name: str, tmp_path: Path) -> None:
    """Config, numbers, dtypes, marks of the base, and tensors of any dtype and value."""
    odd = {"alpha": 0.1 + 0.2, "scaling": "rslora", "dropout": 0.1, "compute": "float32"}
    rows = [SITES["linear"], SITES["slices"], SITES["conv1d"].by(**odd, init={"normal": 1e-3})]
    made = li.algebra.as_dtype(state_of(*rows), torch.bfloat16)
    marked = li.adapter_state(li.inject(rows[0].layer(), {"targets": ["weight"]})).fingerprint
    assert marked
    trained = {
        "h.0.fc.bias": torch.randn(7),
        "ln.weight": torch.randn(3).half(),
        "empty": torch.zeros(0, 4),
        "count": torch.tensor(3),
        "extreme": torch.tensor([torch.finfo().max, -0.0, 1e-45]),
    }
    config = {"rank": 4, "targets": ["a|b", {"match": "ü\n", "alpha": 0.1}]}
    state = li.AdapterState(made.sites, trained, config, marked)
    back = li.read_adapter(li.write_adapter(state, tmp_path / CASES[name].file, name))
    assert back == state
    file = tensors_file(name, tmp_path / CASES[name].file)
    (held,) = (t for key, t in load_file(file).items() if key.endswith("ln.weight"))
    assert torch.equal(held, trained["ln.weight"])


components = st.text(
    st.characters(codec="utf-8", exclude_characters=".", exclude_categories=("C", "Z")),
    min_size=1,
    max_size=6,
) | st.sampled_from(
    ["lora_A", "lora_in", "base_layer", "weight", "default", "0", "a+b", "^x$", "modules_to_save"]
)
paths = st.lists(components, min_size=1, max_size=3).map(".".join)
plain_kinds = st.sampled_from(["linear", "conv1d", "embedding", "conv", "slices"])


@st.composite
def states(draw: st.DrawFn) -> li.AdapterState:
    """Sites, tensors and biases under names that keys of files use themselves."""
    rows: list[Site] = []
    for name in draw(st.lists(paths, max_size=4, unique=True)):
        if any(f"{name}.".startswith(f"{row.name}.") for row in rows):
            continue
        if any(row.name.startswith(f"{name}.") for row in rows):
            continue
        alpha = draw(st.floats(1e-3, 1e3) | st.integers(1, 64).map(float))
        numbers = {"alpha": alpha, "scaling": draw(st.sampled_from(["standard", "rslora"]))}
        init = draw(st.sampled_from(["kaiming", "pissa"]))
        row = SITES[draw(plain_kinds)].at(name)
        rows.append(row.by(rank=draw(st.integers(1, 3)), init=init, **numbers))
    names = [row.name for row in rows]
    extra = [n for n in draw(st.lists(paths, max_size=3, unique=True)) if n not in names]
    trained = {name: torch.full((2,), float(n)) for n, name in enumerate(extra)}
    biased = draw(st.sets(st.sampled_from(names))) if names else ()
    trained |= {f"{name}.bias": torch.ones(1) for name in biased}
    config = draw(st.none() | st.just({"rank": 2}))
    return state_of(*rows, seed=draw(st.integers(0, 9)), trained=trained, config=config)


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(state=states(), name=st.sampled_from(EXACT))
def test_adapters_of_any_names_come_back(state: li.AdapterState, name: str) -> None:
    with tempfile.TemporaryDirectory() as parent:
        try:
            path = li.write_adapter(state, Path(parent, CASES[name].file), name)
        except li.FormatError as error:
            assert name == "peft"
            assert "two tensors would be called" in str(error)  # noqa: PT017
            return
        assert li.read_adapter(path) == state


# What is lost, and what is not written -----------------------------------------------------------


def test_frozen_starts_and_the_config_are_lost_where_they_have_no_place(tmp_path) -> None:
    state = state_of(SITES["slices"].by(init="pissa"), config={"rank": 2})
    for name in ("native", "peft", "portable"):
        told: list[str] = []
        li.convert(state, tmp_path / name, name, tell=told.append)
        assert len(told) == (2 if name == "portable" else 0), told


@pytest.mark.parametrize("name", ["kohya", "peft"])
def test_an_adapter_of_another_base_is_not_converted_for_this_one(name: str, tmp_path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(LLAMA))

    def converted(site: str, out: str) -> None:
        path = tmp_path / f"{out}.safetensors" if name == "kohya" else tmp_path / f"from-{out}"
        state = state_of(linear(site, 8, 8))
        path = li.write_adapter(state, path, name, **CASES[name].write)
        li.convert(path, tmp_path / out, "portable", base=tmp_path)

    (tmp_path / "model.safetensors").write_bytes(b"garbage")
    with refused(li.CheckpointError, "model.safetensors"):
        converted("model.layers.1.self_attn.q_proj", "none")
    (tmp_path / "model.safetensors").unlink()
    converted("model.layers.1.self_attn.q_proj", "own")
    converted("layers.1.self_attn.q_proj", "bare")  # of LlamaModel, the same layer
    with refused(li.FormatError, "convert", "'layers.7.self_attn.q_proj'", "lora-inject rename"):
        converted("layers.7.self_attn.q_proj", "other")
    assert not (tmp_path / "other").exists()


@pytest.mark.parametrize("name", CASES)
def test_what_is_there_is_not_replaced_unasked(name: str, tmp_path: Path) -> None:
    path = written(name, tmp_path)
    assert written(name, tmp_path) == path  # what has the same bytes is written
    state, file = written_state(name), tensors_file(name, path)
    file.write_bytes(b"other")
    with refused(li.FormatError, str(path), "overwrite=True"):
        written(name, tmp_path)
    assert file.read_bytes() == b"other"
    li.write_adapter(state, path, name, overwrite=True, **CASES[name].write)


@pytest.mark.parametrize("name", ["portable", "kohya"])
def test_a_dtype_that_rounds_the_update_away_is_refused(name: str, tmp_path: Path) -> None:
    state = state_of(SITES["linear"])
    state.sites["h.0.fc"].B.mul_(1e-9)  # float16 counts in steps of 6e-8
    with refused(li.FormatError, "site 'h.0.fc'", "float16"):
        li.convert(state, tmp_path / "a", name, dtype="float16", **CASES[name].write)
    assert not list(tmp_path.iterdir())


def test_a_scale_that_is_folded_into_b_does_not_round_it_away(tmp_path: Path) -> None:
    state = li.algebra.as_dtype(state_of(SITES["linear"].by(alpha=1e-6)), torch.float16)
    with refused(li.FormatError, "site 'h.0.fc'", "float16"):
        li.write_adapter(state, tmp_path / "a", "portable")
    path = li.write_adapter(state, tmp_path / "a", "portable", dtype="float32")
    same_effects(li.read_adapter(path), state, within=1e-5)


UNFIT = {
    "together with Conv1D": [SITES["conv1d"], SITES["parameter"]],
    "'h.0.fc.table'": [SITES["linear"], SITES["parameter"].at("h.0.fc.table")],
}


@pytest.mark.parametrize("named", UNFIT)
def test_states_that_peft_cannot_express_are_refused_before_anything_is_written(
    named: str, tmp_path: Path
) -> None:
    one, two = (state_of(row) for row in UNFIT[named])
    both = li.AdapterState({**one.sites, **two.sites})
    with refused(li.FormatError, named):
        li.write_adapter(both, tmp_path / "a")
    assert not list(tmp_path.iterdir())


# Damage ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", READ)
def test_damaged_bytes_are_an_error_that_names_the_file_or_harmless(name, tmp_path) -> None:
    """A header that lies raises at once; nothing is allocated by what it says."""
    path = written(name, tmp_path)
    file = tensors_file(name, path)
    whole = file.read_bytes()
    for size in (0, 7, 40, len(whole) // 3, len(whole) - 40):
        file.write_bytes(whole[:size])
        with refused(li.FormatError, str(path)):
            read(name, path)
    generator = torch.Generator().manual_seed(0)
    for place in torch.randint(0, min(len(whole), 900), (60,), generator=generator).tolist():
        file.write_bytes(whole[:place] + bytes([whole[place] ^ 0xFF]) + whole[place + 1 :])
        with contextlib.suppress(li.FormatError):
            read(name, path)


def store(file: Path, tensors: dict[str, Tensor]) -> None:
    contiguous = {key: tensor.contiguous() for key, tensor in tensors.items()}
    save_file(contiguous, file, metadata(file))


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
@pytest.mark.parametrize("name", READ)
def test_tensors_that_do_not_fit_are_an_error(name: str, damage: str, tmp_path: Path) -> None:
    if (name, damage) == ("loralib", "mixed"):
        pytest.skip("what is not a pair is a trained tensor there")
    path = written(name, tmp_path)
    file = tensors_file(name, path)
    tensors = load_file(file)
    store(file, DAMAGE[damage](tensors, a_matrix(tensors)))
    with refused(li.FormatError, str(path)):
        read(name, path)


@pytest.mark.parametrize("name", READ)
def test_nan_is_read_and_not_handed_on(name: str, tmp_path: Path) -> None:
    """`inspect` has to see it; whoever converts is told where it is."""
    path = written(name, tmp_path)
    file = tensors_file(name, path)
    tensors = load_file(file)
    key = a_matrix(tensors)
    tensors[key] = tensors[key].clone()
    tensors[key][0, 0] = torch.nan
    store(file, tensors)
    state = read(name, path)
    with refused(li.FormatError, " of site '", "1 NaN"):
        li.write_adapter(state, tmp_path / "portable", "portable")


@pytest.mark.parametrize("name", FOLDERS)
def test_one_file_of_a_folder_is_the_folder_if_it_is_there(name: str, tmp_path: Path) -> None:
    file = tensors_file(name, written(name, tmp_path))
    config, _ = CASES[name].config
    assert read(name, file) == read(name, file.parent)
    lone = [shutil.copy(file, tmp_path / file.name)]
    lone.append(shutil.copy(file, tmp_path / "sql.safetensors"))  # known by its keys
    for path in lone:
        if name == "peft":  # its header holds the config
            assert li.read_adapter(path) == read(name, file)
            save_file(load_file(path), path)
        with refused(li.FormatError, config):
            li.read_adapter(path)


NOT_READ = {
    "lit_model.pth.lora": "litgpt convert_from_litgpt",
    "adapter_model.pt": "FullModelHFCheckpointer",
    "adapter_0.pt": "FullModelHFCheckpointer",
}


@pytest.mark.parametrize("file", NOT_READ)
def test_files_that_are_not_read_are_told_what_to_do_instead(file: str, tmp_path: Path) -> None:
    (tmp_path / file).touch()
    (tmp_path / "config.json").touch()  # such a folder has the base's beside it
    for path in (tmp_path, tmp_path / file):
        with refused(li.FormatError, str(path), NOT_READ[file]):
            li.read_adapter(path)


def test_a_file_of_llama_cpp_is_told_to_be_written_only(tmp_path: Path) -> None:
    path = written("gguf", tmp_path)
    for options in ({}, {"format": "gguf"}, {"config": LLAMA}):
        with refused(li.FormatError, str(path), "PEFT folder that it was converted from"):
            li.read_adapter(path, **options)


# The folder of PEFT ------------------------------------------------------------------------------

MODEL = "adapter_model.safetensors"
# The fields of LoraConfig in PEFT 0.12, which fails on others.
PEFT_0_12 = """
alpha_pattern auto_mapping base_model_name_or_path bias fan_in_fan_out inference_mode
init_lora_weights layer_replication layers_pattern layers_to_transform loftq_config lora_alpha
lora_dropout megatron_config megatron_core modules_to_save peft_type r rank_pattern revision
target_modules task_type use_dora use_rslora
"""


def test_the_folder_is_one_that_peft_0_12_reads(tmp_path: Path) -> None:
    half = li.algebra.as_dtype(state_of(SITES["linear"]), torch.bfloat16)
    sites = {**half.sites, **state_of(SITES["embedding"]).sites}
    state = li.AdapterState(sites, {"h.0.fc.bias": torch.ones(7)})
    path = li.write_adapter(state, tmp_path / "a", base_model="org/base", task_type="CAUSAL_LM")
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
    assert metadata(path / MODEL)["format"] == "pt"


@pytest.mark.parametrize("kind", ["experts", "turned experts"])
@pytest.mark.parametrize("holds", [False, True])
def test_experts_are_written_as_their_module_holds_them(kind, holds, tmp_path) -> None:
    """PEFT's pair is (in, out) of the module's own orientation; squares would hide an error."""
    state = state_of(SITES[kind])
    path = li.write_adapter(state, tmp_path / "a", transposed_modules=["moe"] if holds else [])
    A = load_file(path / MODEL)["base_model.model.moe.lora_A.weight"]
    # PEFT: in = shape[1] of the stack if is_transposed, else shape[2].
    shape = tuple(SITES[kind].layer().shape)
    assert tuple(A.shape) == (6, shape[1] if holds else shape[2])
    assert li.read_adapter(path) == state


def test_values_outside_the_slices_are_not_dropped(tmp_path: Path) -> None:
    row = SITES["slices"]
    path = li.write_adapter(state_of(row), tmp_path / "a")
    tensors, said = load_file(path / MODEL), metadata(path / MODEL)
    tensors["base_model.model.h.0.qkv.lora_B.weight"][4, 0] = 1e-30
    save_file(tensors, path / MODEL, said)
    with refused(li.FormatError, "'h.0.qkv'", "1 values of B", "['q', 'v']"):
        li.read_adapter(path)
    plain = li.read_adapter(as_of_peft(path)).sites["h.0.qkv"]
    assert (effect(plain)[4] != 0).any()


def without(key: str) -> Callable[[dict[str, Tensor], dict[str, str]], object]:
    return lambda tensors, said: tensors.pop(f"base_model.model.{key}")


def with_part(part: str, edit: Callable[[Any], object]) -> Callable[[Any, dict[str, str]], None]:
    def change(tensors: dict[str, Tensor], said: dict[str, str]) -> None:
        plain = json.loads(said[f"lora_inject.{part}"])
        edit(plain)
        said[f"lora_inject.{part}"] = json.dumps(plain)

    return change


CONTRADICTIONS: dict[str, tuple[Callable[..., Any], list[str]]] = {
    "a rank below 0": (with_part("sites", lambda s: s["h.0.fc"].__setitem__(1, -1)), ["fc", "-1"]),
    "a form that is none": (with_part("sites", lambda s: s["h.0.fc"].__setitem__(1, 99)), ["99"]),
    "a field twice": (with_part("kinds", lambda k: k[0].update(name="a")), ["name"]),
    "an unknown variant": (with_part("kinds", lambda k: k[0].update(variant="new")), ["'new'"]),
    "an unknown init": (with_part("kinds", lambda k: k[0].update(init="eva")), ["init", "'eva'"]),
    "an init that has no number": (
        with_part("kinds", lambda k: k[0].update(init=["pissa", 1.0])), ["init", "'pissa'"],
    ),
    "a tensor less": (without("ln.weight"), ["ln.weight"]),
    "a tensor more": (lambda t, said: t.update(stray=torch.ones(1)), ["stray"]),
    "a field without end": (
        lambda t, said: said.update({"lora_inject.sites": "[" * 5000 + "]" * 5000}), ["sites"],
    ),
    "a newer format": (
        lambda t, said: said.update({"lora_inject.format_version": "4"}), ["newer"],
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", CONTRADICTIONS)
def test_a_file_of_ours_that_contradicts_itself_is_refused(case: str, tmp_path: Path) -> None:
    change, named = CONTRADICTIONS[case]
    trained = {"ln.weight": torch.ones(3)}
    path = li.write_adapter(state_of(SITES["linear"], trained=trained), tmp_path / "a")
    tensors, said = load_file(path / MODEL), metadata(path / MODEL)
    change(tensors, said)
    save_file(tensors, path / MODEL, said)
    with refused(li.FormatError, *named):
        li.read_adapter(path)


OPTIONS: list[tuple[dict[str, Any], list[str]]] = [
    ({"format": "pfet"}, ["'pfet'", "peft"]),
    ({"allows": ["r"]}, ["'allows'", "allow;"]),
]


@pytest.mark.parametrize(("options", "named"), OPTIONS)
def test_unknown_formats_and_options_are_told_the_known_ones(options, named, tmp_path) -> None:
    path = li.write_adapter(state_of(SITES["linear"]), tmp_path / "a")
    with refused(li.FormatError, *named):
        li.read_adapter(path, **options)
    with refused(li.FormatError, "'base'", "proof", "base_model"):
        li.write_adapter(li.read_adapter(path), tmp_path / "b", format="native", base="org/base")
