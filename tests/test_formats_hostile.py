"""Files that are damaged, contradictory or meant to do harm: an error, at once, that says what."""

import functools
import json
import os
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.adapter_states import FINGERPRINT, KIND_SPECS, edit_config, make_site, make_state
from safetensors.torch import load_file, save_file

import lora_inject as li
from lora_inject.core.adapter.state import AdapterState
from lora_inject.core.files.strict_json import misfit
from lora_inject.core.files.tensors import read_names
from lora_inject.errors import FormatError
from lora_inject.formats import read_adapter, write_adapter
from lora_inject.formats.peft import targeted

CONFIG, MODEL = "adapter_config.json", "adapter_model.safetensors"
P = "base_model.model."
ROWS = f"{P}e.token_adapter.trainable_tokens_delta"
TWO, SIX = torch.ones(2, 4), torch.ones(6, 2)  # an A and a B of rank 2


@pytest.fixture
def ours(tmp_path: Path) -> Path:
    """A file of this package: a plain site, a fused one, a trained tensor."""
    sites = {
        "h.0.fc": make_site(KIND_SPECS["linear"]),
        "h.0.qkv": make_site(KIND_SPECS["slices"], derived=True),
    }
    state = AdapterState(sites, {"ln.weight": torch.ones(3)}, {"rank": 2}, FINGERPRINT)
    return write_adapter(state, tmp_path / "ours")


@pytest.fixture
def foreign(tmp_path: Path) -> Path:
    """The least that PEFT writes."""
    path = tmp_path / "foreign"
    path.mkdir()
    write_foreign(path, pair("fc"))
    return path


def pair(name: str, A: torch.Tensor = TWO, B: torch.Tensor = SIX) -> dict[str, torch.Tensor]:
    return {f"{P}{name}.lora_A.weight": A.clone(), f"{P}{name}.lora_B.weight": B.clone()}


def write_foreign(path: Path, tensors: dict[str, torch.Tensor], **config: Any) -> None:
    save_file(tensors, path / MODEL)
    plain = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["fc"]}
    (path / CONFIG).write_text(json.dumps(plain))
    edit_config(path, **config)


# Files of ours that contradict themselves -------------------------------------------------------


def test_alpha_in_the_config_differs_from_the_metadata(ours: Path) -> None:
    edit_config(ours, lora_alpha=64, alpha_pattern={})
    with pytest.raises(FormatError) as caught:
        read_adapter(ours)
    for words in (
        "'h.0.fc'",
        "adapter_config.json says rank 2 and alpha 64 (scale 32)",
        "metadata of adapter_model.safetensors says rank 2 and alpha 4 (scale 2)",
        'prefer="metadata"',
        'prefer="config"',
    ):
        assert words in str(caught.value)
    assert read_adapter(ours, prefer="metadata").sites["h.0.fc"].scale == 2.0
    assert read_adapter(ours, prefer="config").sites["h.0.fc"].scale == 32.0
    for change in ({"r": 3}, {"use_rslora": True}, {"rank_pattern": {"fc": 7}}):
        edit_config(ours, **{"r": 2, "use_rslora": False, "rank_pattern": {}, **change})
        with pytest.raises(FormatError, match="the metadata of"):
            read_adapter(ours)


def test_values_outside_the_slices_are_not_dropped(ours: Path) -> None:
    tensors, metadata = load_file(ours / MODEL), read_names(ours / MODEL)[1]
    tiny = tensors[f"{P}h.0.qkv.lora_B.weight"][4, 0].fill_(1e-30)
    save_file(tensors, ours / MODEL, metadata)
    with pytest.raises(FormatError, match=r"1 values of B lie outside .* slices \['q', 'v'\]"):
        read_adapter(ours)
    assert read_adapter(ours, prefer="config").sites["h.0.qkv"].B[4, 0] == tiny


@pytest.mark.parametrize(
    ("part", "edit", "words"),
    [
        ("sites", lambda sites: sites["h.0.fc"].__setitem__(1, -1), "fc.1: -1 is impossible"),
        ("sites", lambda sites: sites["h.0.fc"].__setitem__(1, 99), "there is no kind 99"),
        ("kinds", lambda kinds: kinds[0].update(name="a"), "name: there is no such field"),
        ("kinds", lambda kinds: kinds[0].update(variant="new"), "'new' is not registered here"),
        ("fingerprint", lambda plain: plain["h.0.fc.weight"].__setitem__(1, "AAAA"), "samples"),
    ],
)
def test_sites_kinds_and_samples_of_ours_must_fit(part, edit, words, ours: Path) -> None:
    tensors, metadata = load_file(ours / MODEL), read_names(ours / MODEL)[1]
    plain = json.loads(metadata[f"lora_inject.{part}"])
    edit(plain)
    save_file(tensors, ours / MODEL, metadata | {f"lora_inject.{part}": json.dumps(plain)})
    with pytest.raises(FormatError, match=words):
        read_adapter(ours)


def test_what_a_field_must_not_be_is_told_however_deep_it_is() -> None:
    """JSON may be read so deep that Python's own words of it go beyond its limit."""
    deep = functools.reduce(lambda inside, _: [inside], range(5000), [])
    assert misfit(deep, float) == ": [[[[[[[...]]]]]]] is impossible"


def test_tensors_and_versions_that_ours_do_not_say_are_refused(ours: Path) -> None:
    tensors, metadata = load_file(ours / MODEL), read_names(ours / MODEL)[1]
    without = {key: t for key, t in tensors.items() if key != f"{P}ln.weight"}
    newer = metadata | {"lora_inject.format_version": "4"}
    for held, header, words in (
        (without, metadata, "ln.weight"),
        (tensors | {"stray": torch.ones(1)}, metadata, "stray"),
        (tensors, newer, "newer"),
    ):
        save_file(held, ours / MODEL, header)
        with pytest.raises(FormatError, match=words):
            read_adapter(ours)


# Foreign configs --------------------------------------------------------------------------------


TEXTS = ["", "[]", "null", "{", '{"r": NaN}', "[" * 100_000, '{"r": ' + "9" * 5000 + "}", "\xff"]
TEXTS += ['{"peft_type": "LORA", "r": 2, "lora_alpha": 4, "lora_alpha": 400}']


@pytest.mark.parametrize("text", TEXTS, ids=lambda text: text[:9])
def test_configs_that_are_none_or_say_a_number_twice(text: str, foreign: Path) -> None:
    (foreign / CONFIG).write_text(text, encoding="latin-1")
    with pytest.raises(FormatError, match="twice" if "400" in text else None):
        read_adapter(foreign)


BOMB = "(([a-z_.0-9])+)+X"


@pytest.mark.parametrize(
    "change",
    [
        {"target_modules": None},
        {"target_modules": "all-linear"},
        {"exclude_modules": BOMB, "layers_pattern": [BOMB]},
        {"layers_to_transform": [0]},
        {"auto_mapping": {"parent_library": "os", "base_model_class": "system"}},
        {"some_new_field": None, "another": False, "third": {}},
        {"rank_pattern": {"nothing": 4}},
        {"bias": "all"},  # of a layer that has none
        *({"init_lora_weights": init} for init in (False, "gaussian", "eva")),
    ],
)
def test_claims_that_are_not_needed_are_not_used(change: dict[str, Any], foreign: Path) -> None:
    state = read_adapter(edit_config(foreign, **change))
    assert (state.sites["fc"].scale, state.trained) == (2.0, {})


@pytest.mark.parametrize("field", ["target_modules", "exclude_modules"])
def test_patterns_of_targets_run_under_a_time_limit(
    field: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(targeted, "_SECONDS", 0.05)
    write_foreign(tmp_path, pair("m" * 60), **{"target_modules": ["m" * 60], field: "(m|mm)+X"})
    with pytest.raises(FormatError, match=rf"{field}.*it took more than"):
        read_adapter(tmp_path)


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "alpha absent": ({"lora_alpha": ...}, "'lora_alpha' is missing"),
    "alpha zero": ({"lora_alpha": 0}, "above 0"),
    "alpha huge": ({"lora_alpha": 10**400}, "above 0"),
    "rank differs": ({"r": 3}, "rank 2, adapter_config.json says 3"),
    "a pattern that is none": ({"rank_pattern": {"(": 4}}, "'rank_pattern', the key"),
    "a pattern too long": ({"alpha_pattern": {"x*" * 600: 4}}, "'alpha_pattern', the key"),
    "dropout": ({"lora_dropout": 1.0}, "lora_dropout"),
    "rslora text": ({"use_rslora": "yes"}, "use_rslora"),
    "bias": ({"bias": "some"}, "'bias' is not one of"),
    "modules": ({"modules_to_save": "head"}, "not a list"),
    "other method": ({"peft_type": "LOHA"}, r"'LOHA', not 'LORA'.*peft\.convert_to_lora"),
    "no method": ({"peft_type": None}, "not 'LORA'"),
    "dora": ({"use_dora": True}, "no DoRA magnitude"),
    "qalora": ({"use_qalora": True}, "QALoRA"),
    "lora_bias": ({"lora_bias": True}, "no bias of lora_B"),
    "alora": ({"alora_invocation_tokens": [1]}, "aLoRA"),
    "replication": ({"layer_replication": [[0, 1]]}, "replicated"),
    "tokens": ({"trainable_token_indices": [1]}, "it lacks the rows"),
    "megatron": ({"megatron_config": {"a": 1}}, "Megatron"),
    "unknown": ({"some_new_field": 3}, "'some_new_field'"),
    **{
        f"init {init}": ({"init_lora_weights": init}, "init_lora_weights")
        for init in ("pissa", "pissa_niter_4", "olora", "corda", "loftq", "lora_ga", "mica", ["x"])
    },
}


@pytest.mark.parametrize("case", REFUSED)
def test_foreign_configs_are_refused_by_name(case: str, tmp_path: Path) -> None:
    change, words = REFUSED[case]
    write_foreign(tmp_path, pair("fc"), **change)
    with pytest.raises(FormatError, match=words):
        read_adapter(tmp_path)
    if case in ("init pissa", "unknown"):  # what may be let through is named
        assert list(read_adapter(tmp_path, allow=[*change]).sites) == ["fc"]


# Foreign tensors --------------------------------------------------------------------------------

OUTPUT = "a.base_layer.out_proj"
KEYS: dict[str, tuple[dict[str, torch.Tensor], str]] = {
    "mixed prefix": ({**pair("fc"), "x.weight": torch.ones(1)}, "does not begin with"),
    "ranks differ": (pair("fc", torch.ones(3, 4)), "the ranks differ"),
    "one dimension": (pair("fc", torch.ones(2)), "not a low-rank pair"),
    "dtypes differ": (pair("fc", TWO.half()), "torch.float16 and B torch.float32"),
    "whole numbers": (pair("fc", TWO.int(), SIX.int()), "must be of one of"),
    "magnitude": ({**pair("fc"), f"{P}fc.lora_magnitude_vector": torch.ones(6)}, "DoRA"),
    "tokens": ({**pair("fc"), ROWS: torch.ones(2, 2)}, "does not say which rows"),
    "B bias": ({**pair("fc"), f"{P}fc.lora_B.bias": torch.ones(6)}, "bias of lora_B"),
    "unknown lora": ({**pair("fc"), f"{P}fc.lora_C.weight": torch.ones(6)}, "no known kind"),
    "twice": ({**pair("fc"), f"{P}fc.lora_A.default.weight": TWO}, "a second time"),
    "trained and adapted": ({**pair("fc"), f"{P}fc.weight": TWO}, "has a site as well"),
    # B works in groups on what A has made of all channels: no weight of a convolution says that.
    "grouped conv": (pair("c", torch.ones(4, 4, 3), torch.ones(6, 2, 1)), "grouped convolutions"),
    "rows twice": ({ROWS: torch.ones(2, 2), f"{ROWS}.default": torch.ones(2, 2)}, "a second time"),
    "attention's output twice": (
        {**pair("a"), **pair(OUTPUT), **pair("a.out_proj")}, "two of its pairs are of one site",
    ),
    "attention at a stray level": (
        {**pair("a"), **pair(f"{OUTPUT}.base_layer")}, "are not those of 'a.out_proj'",
    ),
    "stray level": (pair("fc.base_layer"), "are not those of 'fc'"),
}  # fmt: skip


@pytest.mark.parametrize("case", KEYS)
def test_foreign_keys_are_strict(case: str, tmp_path: Path) -> None:
    tensors, words = KEYS[case]
    version = "0.21.2" if case.startswith("attention") else None
    targets = ["fc", "c", "a", "out_proj"]
    write_foreign(tmp_path, tensors, peft_version=version, target_modules=targets)
    with pytest.raises(FormatError, match=words):
        read_adapter(tmp_path)


@pytest.mark.parametrize("wrapper", ["_orig_mod", "_fsdp_wrapped_module"])
def test_wrappers_of_training_are_not_part_of_a_name(wrapper: str, foreign: Path) -> None:
    tensors = {f"{wrapper}.{k}": t for k, t in pair(f"h.{wrapper}.fc").items()}
    write_foreign(foreign, tensors)
    assert list(read_adapter(foreign).sites) == ["h.fc"]
    write_foreign(foreign, tensors | {k: t + 1 for k, t in pair("h.fc").items()})
    with pytest.raises(FormatError, match=r"holds 'h\.fc\.lora_A\.weight' twice"):
        read_adapter(foreign)


def test_other_spellings_of_keys_are_read(tmp_path: Path) -> None:
    """Without the prefix, with the adapter's name, and beside a module called `lora_in`."""
    for prefix, end in (("", ""), (P, ".default")):
        keys = (f"{prefix}fc.lora_A{end}.weight", f"{prefix}fc.lora_B{end}.weight")
        write_foreign(tmp_path, dict(zip(keys, (TWO, SIX), strict=True)), lora_dropout=0.1)
        assert read_adapter(tmp_path).sites["fc"].spec.dropout == 0.1
    tensors = {**pair("fc"), f"{P}lora_in.weight": torch.ones(2, 2)}
    write_foreign(tmp_path, tensors, modules_to_save=["lora_in"])
    assert list(read_adapter(tmp_path).trained) == ["lora_in.weight"]


def test_two_parameters_need_the_models_names(tmp_path: Path) -> None:
    """PEFT wraps them in the order of the model, which no file says."""
    tensors = pair("moe.base_layer", torch.randn(6, 4), torch.randn(10, 6))
    tensors |= pair("moe", torch.randn(6, 5), torch.randn(4, 6))
    write_foreign(tmp_path, tensors, target_parameters=["moe.down", "moe.up"])
    with pytest.raises(FormatError, match="tensor_names"):
        read_adapter(tmp_path)
    for first, second in (("up", "down"), ("down", "up")):
        names = [f"moe.{first}", "moe.other", f"moe.{second}"]
        sites = read_adapter(tmp_path, tensor_names=names).sites
        assert sites[f"moe.{first}"].spec.weight_shape == (3, 10, 4)
        assert sites[f"moe.{second}"].spec.weight_shape == (3, 4, 5)
    edit_config(tmp_path, peft_version="0.18.1")  # until which A and B were the other way round
    spec = read_adapter(tmp_path, tensor_names=["moe.up", "moe.down"]).sites["moe.up"].spec
    assert (spec.transposed, spec.weight_shape) == (True, (3, 4, 10))
    edit_config(tmp_path, r=4)
    with pytest.raises(FormatError, match="multiple of the rank 4"):
        read_adapter(tmp_path, tensor_names=["moe.up", "moe.down"])


# Places -----------------------------------------------------------------------------------------


def test_the_parent_of_a_named_adapter(foreign: Path, tmp_path: Path) -> None:
    parent = tmp_path / "parent"
    for name, time in (("sql", 2), ("early", 1)):
        shutil.copytree(foreign, parent / name)
        os.utime(parent / name / CONFIG, ns=(time, time))
    remedy = r"such as the newest: '.*sql'"
    with pytest.raises(FormatError, match=rf"in its subfolders 'early', 'sql'.*{remedy}"):
        read_adapter(parent)


def test_a_folder_that_is_no_whole_adapter(foreign: Path, tmp_path: Path) -> None:
    (foreign / MODEL).rename(foreign / "adapter_model.bin")
    with pytest.raises(FormatError, match="save it again"):
        read_adapter(foreign)
    (foreign / CONFIG).rename(tmp_path / "file.txt")
    with pytest.raises(FormatError, match=r"there is no adapter_config\.json in it"):
        read_adapter(foreign)
    (tmp_path / "empty").mkdir()
    for name in ("nothing", "file.txt", "empty"):
        for chosen in (None, "peft"):
            with pytest.raises(FormatError):
                read_adapter(tmp_path / name, format=chosen)


def test_tensors_in_several_files(foreign: Path) -> None:
    tensors = {**pair("a"), **pair("b")}
    shards = {key: f"{MODEL[:-12]}-{n % 2}.safetensors" for n, key in enumerate(sorted(tensors))}
    for name in set(shards.values()):
        save_file({k: t for k, t in tensors.items() if shards[k] == name}, foreign / name)
    (foreign / MODEL).unlink()
    index = foreign / f"{MODEL}.index.json"
    index.write_text(json.dumps({"weight_map": shards}))
    edit_config(foreign, target_modules=["a", "b"])
    assert list(read_adapter(foreign).sites) == ["a", "b"]
    first = next(iter(shards))
    for table, words in [
        ({**shards, "x": shards[first]}, "its files lack 'x'"),
        ({k: n for k, n in shards.items() if k != first}, "which it does not list"),
        ({**shards, first: "../other.safetensors"}, "not a table of file names"),
    ]:
        index.write_text(json.dumps({"weight_map": table}))
        with pytest.raises(FormatError, match=words):
            read_adapter(foreign)


def test_a_checkpoint_with_an_adapter_among_its_tensors_is_refused(tmp_path: Path) -> None:
    tensors = {**pair("fc"), "fc.base_layer.weight": torch.ones(6, 4)}
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(FormatError, match=r"base and an adapter's tensors together.*adapter alone"):
        read_adapter(tmp_path)


def test_a_json_file_of_a_terabyte_is_refused_before_it_is_read(foreign: Path) -> None:
    os.truncate(foreign / CONFIG, 1 << 40)
    for read in (read_adapter, lambda path: li.check_adapter(path, client="peft")):
        with pytest.raises(FormatError, match="more than 32,000,000 bytes"):
            read(foreign)


# Options, and what cannot be written ------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"format": "pfet"}, "Nearest: peft"),
        ({"prefer": "config.json"}, "Give 'metadata', 'config' or None"),
        ({"prefer": "metadata"}, "Leave prefer out"),
        ({"prefers": "metadata"}, r"'prefers' is not an option .* Its options: prefer,"),
    ],
)
def test_unknown_formats_and_options(options: dict[str, Any], words: str, foreign: Path) -> None:
    with pytest.raises(FormatError, match=words):
        read_adapter(foreign, **options)
    with pytest.raises(FormatError, match=r"'base' is not .* options: proof; facts .*base_model"):
        write_adapter(make_state(KIND_SPECS["linear"]), foreign, format="native", base="org/base")


def test_states_that_peft_cannot_express_are_refused_before_anything_is_written(tmp_path) -> None:
    linear, table = KIND_SPECS["linear"], KIND_SPECS["parameter"]
    part = table.at("h.0.fc.weight", "h.0.fc.weight")
    site = make_site(linear)
    for words, state in {
        "of kind 'mystery'": make_state(replace(linear, kind="mystery")),
        "together with Conv1D": make_state(KIND_SPECS["conv1d"], table),
        "a module and a parameter of it": make_state(linear, part),
        r"A has shape \(2, 4\)": AdapterState({"h.0.fc": replace(site, A=torch.ones(2, 4))}),
        "none of A0 and B0": AdapterState({"h.0.fc": replace(site, A0=site.A)}),
    }.items():
        with pytest.raises(FormatError, match=words):
            write_adapter(state, tmp_path / "a")
    assert not list(tmp_path.iterdir())
