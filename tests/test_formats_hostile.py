"""Files that are damaged, contradictory or meant to do harm: an error, at once, that says what."""

import json
import os
import random
import shutil
import struct
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.adapter_states import FINGERPRINT, KIND_SPECS, make_site, make_state
from safetensors.torch import load_file, save_file

import lora_inject as li
from lora_inject.checkpoint import Checkpoint
from lora_inject.core.adapter.state import AdapterState
from lora_inject.core.files.tensors import read_names, read_tensors
from lora_inject.errors import CheckpointError, FormatError
from lora_inject.formats import read_adapter, write_adapter
from lora_inject.formats.peft import targeted

CONFIG, MODEL = "adapter_config.json", "adapter_model.safetensors"
P = "base_model.model."
ROWS = f"{P}e.token_adapter.trainable_tokens_delta"


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


TWO, SIX = torch.ones(2, 4), torch.ones(6, 2)  # an A and a B of rank 2


def pair(name: str, A: torch.Tensor = TWO, B: torch.Tensor = SIX) -> dict[str, torch.Tensor]:
    return {f"{P}{name}.lora_A.weight": A.clone(), f"{P}{name}.lora_B.weight": B.clone()}


def write_foreign(path: Path, tensors: dict[str, torch.Tensor], **config: Any) -> None:
    save_file(tensors, path / MODEL)
    plain = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["fc"], **config}
    (path / CONFIG).write_text(json.dumps({k: v for k, v in plain.items() if v != "absent"}))


def edit_config(path: Path, **changes: Any) -> None:
    config = json.loads((path / CONFIG).read_text())
    (path / CONFIG).write_text(json.dumps({**config, **changes}))


def edit_header(path: Path, change: Callable[[dict[str, Any]], None]) -> None:
    data = path.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + length])
    change(header)
    encoded = json.dumps(header).encode()
    encoded += b" " * (-len(encoded) % 8)
    path.write_bytes(struct.pack("<Q", len(encoded)) + encoded + data[8 + length :])


def edit_metadata(folder: Path, words: dict[str, str]) -> None:
    edit_header(folder / MODEL, lambda header: header["__metadata__"].update(words))


# Contradictions ---------------------------------------------------------------------------------


def test_alpha_in_the_config_differs_from_the_metadata(ours: Path) -> None:
    edit_config(ours, lora_alpha=64, alpha_pattern={})
    with pytest.raises(FormatError) as caught:
        read_adapter(ours)
    message = str(caught.value)
    assert "'h.0.fc'" in message
    assert "adapter_config.json says rank 2 and alpha 64 (scale 32)" in message
    assert "metadata of adapter_model.safetensors says rank 2 and alpha 4 (scale 2)" in message
    assert 'prefer="metadata"' in message
    assert 'prefer="config"' in message
    assert read_adapter(ours, prefer="metadata").sites["h.0.fc"].scale == 2.0
    assert read_adapter(ours, prefer="config").sites["h.0.fc"].scale == 32.0


@pytest.mark.parametrize("change", [{"r": 3}, {"use_rslora": True}, {"rank_pattern": {"fc": 7}}])
def test_other_contradictions(change: dict[str, Any], ours: Path) -> None:
    edit_config(ours, **change)
    with pytest.raises(FormatError, match="the metadata of"):
        read_adapter(ours)


def test_values_outside_the_slices_are_not_dropped(ours: Path) -> None:
    tensors, metadata = load_file(ours / MODEL), read_tensors(ours / MODEL)[1]
    tensors[f"{P}h.0.qkv.lora_B.weight"][4, 0] = 1e-30
    save_file(tensors, ours / MODEL, metadata)
    with pytest.raises(FormatError, match=r"1 values of B lie outside .* slices \['q', 'v'\]"):
        read_adapter(ours)
    assert read_adapter(ours, prefer="config").sites["h.0.qkv"].B[4, 0] == torch.tensor(1e-30)


@pytest.mark.parametrize(
    "change",
    [
        lambda t: t.pop(f"{P}h.0.fc.lora_A.weight"),
        lambda t: t.pop(f"{P}ln.weight"),
        lambda t: t.update(stray=torch.ones(1)),
        lambda t: t.update({f"{P}h.0.fc.lora_A.weight": torch.ones(3, 5)}),
        lambda t: t.update({f"{P}h.0.fc.lora_A.weight": torch.ones(2, 5, dtype=torch.int32)}),
    ],
)
def test_missing_extra_and_misshapen_tensors_of_ours(change, ours) -> None:
    tensors, metadata = load_file(ours / MODEL), read_tensors(ours / MODEL)[1]
    change(tensors)
    save_file(tensors, ours / MODEL, metadata)
    with pytest.raises(FormatError):
        read_adapter(ours)


def test_metadata_of_a_newer_version_is_refused(ours: Path) -> None:
    edit_metadata(ours, {"lora_inject.format_version": "4"})
    with pytest.raises(FormatError, match="newer"):
        read_adapter(ours)


def _spots(node: Any) -> list[tuple[Any, Any]]:
    """Every place in a JSON value: what holds it, and its key there."""
    keys = node if isinstance(node, dict) else range(len(node) if isinstance(node, list) else 0)
    return [(node, key) for key in keys] + [s for key in keys for s in _spots(node[key])]


def test_edited_metadata_is_an_error_or_the_same_adapter(ours: Path) -> None:
    """Random edits of the JSON: never another exception than FormatError."""
    metadata = read_names(ours / MODEL)[1]
    chooser = random.Random(0)
    strange = [None, True, -1, 0, 2**70, 10**400, 1.5, "x", [], {}, [[]], {"a": 1}, "rslora"]
    parts = [f"lora_inject.{p}" for p in ("kinds", "sites", "trained", "fingerprint", "config")]
    n_errors = 0
    for _ in range(400):
        part = chooser.choice(parts)
        root = [json.loads(metadata[part])]
        node, key = chooser.choice(_spots(root))
        node[key] = chooser.choice([*strange, ["normal", 1]])
        edit_metadata(ours, {part: json.dumps(root[0])})
        try:
            read_adapter(ours)
        except FormatError:
            n_errors += 1
        edit_metadata(ours, metadata)
    assert n_errors > 200


@pytest.mark.parametrize(
    ("edit", "found"),
    [
        (lambda kinds, sites: sites[0].__setitem__(2, len(kinds)), "there is no kind"),
        (lambda _, sites: sites[0].__setitem__(2, -1), "0.2: -1 is impossible"),
        (lambda _, sites: sites[0].__setitem__(2, False), "0.2: False is impossible"),
        (lambda _, sites: sites.append(sites[0]), "its name is there twice"),
        (lambda kinds, _: kinds.append(kinds[0]), "a kind of sites that no site has"),
        (lambda kinds, _: kinds[0].update(name="a"), "site '.*': name: there is no such field"),
        (lambda kinds, _: kinds[0].pop("rank"), "site '.*': rank: it is missing"),
        (lambda kinds, _: kinds[0].update(variant="new"), "'new' is not registered here"),
        (lambda kinds, _: kinds[0].update(rank=2.0), "rank: 2.0 is impossible"),
    ],
)
def test_sites_and_their_kinds_must_fit(edit: Any, found: str, ours: Path) -> None:
    metadata = read_names(ours / MODEL)[1]
    kinds, sites = (json.loads(metadata[f"lora_inject.{part}"]) for part in ("kinds", "sites"))
    edit(kinds, sites)
    words = {"lora_inject.kinds": json.dumps(kinds), "lora_inject.sites": json.dumps(sites)}
    edit_metadata(ours, words)
    with pytest.raises(FormatError, match=found):
        read_adapter(ours)


@pytest.mark.parametrize(
    "samples", ["AAAA=", "AAA", "AAAA", "\u00fc\u00fc\u00fc\u00fc", "AAAAAAA=\n", [0.5], None]
)
def test_samples_must_be_float32_in_base64(samples: Any, ours: Path) -> None:
    plain = json.loads(read_names(ours / MODEL)[1]["lora_inject.fingerprint"])
    plain["samples"][next(iter(plain["samples"]))] = samples
    edit_metadata(ours, {"lora_inject.fingerprint": json.dumps(plain)})
    with pytest.raises(FormatError, match=r"samples"):
        read_adapter(ours)


# Damage -----------------------------------------------------------------------------------------


def test_cut_off_configs(ours: Path) -> None:
    whole = (ours / CONFIG).read_bytes()
    for length in {0, 1, 9, 100, len(whole) // 2, len(whole) - 3}:
        (ours / CONFIG).write_bytes(whole[:length])
        with pytest.raises(FormatError):
            read_adapter(ours)


def test_duplicate_config_keys_are_refused(foreign: Path) -> None:
    text = (foreign / CONFIG).read_text()
    (foreign / CONFIG).write_text(text[:-1] + ', "lora_alpha": 400}')
    with pytest.raises(FormatError, match="'lora_alpha' occurs twice"):
        read_adapter(foreign)


@pytest.mark.parametrize(
    "text",
    ["[]", "null", "{", '{"r": NaN}', "[" * 100_000, '{"r": ' + "9" * 5000 + "}", "\xff", '"LORA"'],
)
def test_configs_that_are_none(text: str, foreign: Path) -> None:
    (foreign / CONFIG).write_text(text, encoding="latin-1")
    with pytest.raises(FormatError):
        read_adapter(foreign)


def test_metadata_that_is_not_text(foreign: Path) -> None:
    edit_header(foreign / MODEL, lambda h: h.update(__metadata__={"a": 1}))
    with pytest.raises(FormatError, match="not a table of strings"):
        read_adapter(foreign)


# Foreign configs --------------------------------------------------------------------------------

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
    ],
)
def test_claims_that_are_not_needed_are_not_used(change: dict[str, Any], foreign: Path) -> None:
    edit_config(foreign, **change)
    assert read_adapter(foreign).sites["fc"].scale == 2.0


@pytest.mark.parametrize("field", ["target_modules", "exclude_modules"])
def test_patterns_of_targets_run_under_a_time_limit(
    field: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(targeted, "_SECONDS", 0.05)
    write_foreign(tmp_path, pair("m" * 60), target_modules=["m" * 60])
    edit_config(tmp_path, **{field: "(m|mm)+X"})
    with pytest.raises(FormatError, match=rf"{field}.*it took more than"):
        read_adapter(tmp_path)


@pytest.mark.parametrize("field", ["rank_pattern", "alpha_pattern"])
@pytest.mark.parametrize("key", ["(", "x*" * 600, "\\"])
def test_patterns_that_are_none_are_refused(key: str, field: str, foreign: Path) -> None:
    edit_config(foreign, **{field: {key: 4}})
    with pytest.raises(FormatError, match=f"'{field}', the key"):
        read_adapter(foreign)


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "alpha absent": ({"lora_alpha": "absent"}, "'lora_alpha' is missing"),
    "alpha null": ({"lora_alpha": None}, "'lora_alpha' is missing"),
    "alpha zero": ({"lora_alpha": 0}, "above 0"),
    "alpha text": ({"lora_alpha": "8"}, "above 0"),
    "alpha true": ({"lora_alpha": True}, "above 0"),
    "alpha huge": ({"lora_alpha": 10**400}, "above 0"),
    "rank differs": ({"r": 3}, "rank 2, adapter_config.json says 3"),
    "rank huge": ({"r": 10**9}, "rank 2"),
    "rank negative": ({"r": -1}, "'r' is not"),
    "rank pattern text": ({"rank_pattern": {"fc": "8"}}, "fc: '8' is impossible"),
    "pattern list": ({"alpha_pattern": ["fc"]}, "not a table"),
    "dropout": ({"lora_dropout": 1.0}, "lora_dropout"),
    "rslora text": ({"use_rslora": "yes"}, "use_rslora"),
    "rslora list": ({"use_rslora": []}, "use_rslora"),
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


@pytest.mark.parametrize("init", [True, False, None, "gaussian", "eva", "orthogonal"])
def test_inits_that_leave_the_base_alone(init: Any, foreign: Path) -> None:
    edit_config(foreign, init_lora_weights=init)
    assert list(read_adapter(foreign).sites) == ["fc"]


def test_what_is_let_through_is_named(foreign: Path) -> None:
    edit_config(foreign, init_lora_weights="pissa", some_new_field=3)
    allowed = read_adapter(foreign, allow=["init_lora_weights", "some_new_field"])
    assert list(allowed.sites) == ["fc"]


KEYS: dict[str, tuple[dict[str, torch.Tensor], str]] = {
    "no B": ({f"{P}fc.lora_A.weight": TWO}, "'fc': its B is missing"),
    "no A": ({f"{P}fc.lora_B.weight": SIX}, "'fc': its A is missing"),
    "mixed prefix": ({**pair("fc"), "x.weight": torch.ones(1)}, "does not begin with"),
    "ranks differ": (pair("fc", torch.ones(3, 4)), "the ranks differ"),
    "one dimension": (pair("fc", torch.ones(2)), "not a low-rank pair"),
    "dtypes differ": (pair("fc", TWO.half()), "torch.float16 and B torch.float32"),
    "whole numbers": (pair("fc", TWO.int(), SIX.int()), "must be of one of"),
    "magnitude": ({**pair("fc"), f"{P}fc.lora_magnitude_vector": torch.ones(6)}, "DoRA"),
    "its weight": ({**pair("fc"), f"{P}fc.lora_magnitude_vector.weight": torch.ones(6)}, "DoRA"),
    "tokens": ({**pair("fc"), ROWS: torch.ones(2, 2)}, "does not say which rows"),
    "B bias": ({**pair("fc"), f"{P}fc.lora_B.bias": torch.ones(6)}, "bias of lora_B"),
    "unknown lora": ({**pair("fc"), f"{P}fc.lora_C.weight": torch.ones(6)}, "no known kind"),
    "twice": ({**pair("fc"), f"{P}fc.lora_A.default.weight": TWO}, "a second time"),
    "trained and adapted": (
        {**pair("fc"), f"{P}fc.weight": torch.ones(6, 4)}, "has a site as well",
    ),
    "grouped conv": (pair("c", torch.ones(4, 4, 3), torch.ones(6, 2, 1)), "grouped convolutions"),
    "rows twice": ({ROWS: torch.ones(2, 2), f"{ROWS}.default": torch.ones(2, 2)}, "a second time"),
    "attention's output twice": (
        {**pair("a"), **pair("a.base_layer.out_proj"), **pair("a.out_proj")},
        "two of its pairs are of one site",
    ),
    "attention at a stray level": (
        {**pair("a"), **pair("a.base_layer.out_proj.base_layer")},
        "are not those of 'a.out_proj'",
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


def test_the_config_of_peft_0_12(foreign: Path) -> None:
    """As it wrote it: fewer fields, targets as a list, no version."""
    old = {
        "alpha_pattern": {}, "auto_mapping": None, "base_model_name_or_path": "org/base",
        "bias": "none", "fan_in_fan_out": False, "inference_mode": True, "init_lora_weights": True,
        "layer_replication": None, "layers_pattern": None, "layers_to_transform": None,
        "loftq_config": {}, "lora_alpha": 16, "lora_dropout": 0.1, "megatron_config": None,
        "megatron_core": "megatron.core", "modules_to_save": None, "peft_type": "LORA", "r": 2,
        "rank_pattern": {}, "revision": "main", "target_modules": ["fc"], "task_type": "CAUSAL_LM",
        "use_dora": False, "use_rslora": True,
    }  # fmt: skip
    (foreign / CONFIG).write_text(json.dumps(old))
    spec = read_adapter(foreign).sites["fc"].spec
    assert (spec.rank, spec.dropout) == (2, 0.1)
    assert spec.scale == pytest.approx(16 / 2**0.5, rel=1e-15)


def test_a_module_called_lora_in_may_be_trained(tmp_path: Path) -> None:
    tensors = {**pair("fc"), f"{P}lora_in.weight": torch.ones(2, 2)}
    write_foreign(tmp_path, tensors, modules_to_save=["lora_in"])
    assert list(read_adapter(tmp_path).trained) == ["lora_in.weight"]


def test_keys_without_prefix_and_with_adapter_name(tmp_path: Path) -> None:
    for prefix, end in (("", ""), (P, ".default")):
        keys = (f"{prefix}fc.lora_A{end}.weight", f"{prefix}fc.lora_B{end}.weight")
        write_foreign(tmp_path, dict(zip(keys, (TWO, SIX), strict=True)))
        assert list(read_adapter(tmp_path).sites) == ["fc"]


# Experts of others ------------------------------------------------------------------------------


def experts(tmp_path: Path, **config: Any) -> Path:
    """Two parameters of one module, of PEFT's ranks and order."""
    e, r = 3, 2
    tensors = {
        f"{P}moe.base_layer.lora_A.weight": torch.randn(e * r, 4),
        f"{P}moe.base_layer.lora_B.weight": torch.randn(10, r * e),
        f"{P}moe.lora_A.weight": torch.randn(e * r, 5),
        f"{P}moe.lora_B.weight": torch.randn(4, r * e),
    }
    write_foreign(tmp_path, tensors, target_parameters=["moe.down", "moe.up"], **config)
    return tmp_path


def test_two_parameters_need_the_models_names(tmp_path: Path) -> None:
    with pytest.raises(FormatError, match="tensor_names"):
        read_adapter(experts(tmp_path))
    found = read_adapter(tmp_path, tensor_names=["moe.up", "moe.other", "moe.down"]).sites
    assert {n: s.spec.weight_shape for n, s in found.items()} == {
        "moe.up": (3, 10, 4),
        "moe.down": (3, 4, 5),
    }
    found = read_adapter(tmp_path, tensor_names=["moe.down", "moe.up"]).sites
    assert {n: s.spec.weight_shape for n, s in found.items()} == {
        "moe.down": (3, 10, 4),
        "moe.up": (3, 4, 5),
    }


def test_experts_until_peft_0_18_are_marked(tmp_path: Path) -> None:
    path = experts(tmp_path, peft_version="0.18.1")
    spec = read_adapter(path, tensor_names=["moe.up", "moe.down"]).sites["moe.up"].spec
    assert (spec.transposed, spec.weight_shape) == (True, (3, 4, 10))


def test_columns_ordered_by_expert(tmp_path: Path) -> None:
    path, names = experts(tmp_path), ["moe.up", "moe.down"]
    by_rank = read_adapter(path, tensor_names=names).sites["moe.up"].B
    by_expert = read_adapter(path, tensor_names=names, expert_major=True).sites["moe.up"].B
    columns = read_tensors(path / MODEL)[0][f"{P}moe.base_layer.lora_B.weight"]
    assert torch.equal(by_rank[1, :, 0], columns[:, 1])
    assert torch.equal(by_expert[1, :, 0], columns[:, 2])


def test_experts_of_another_rank(tmp_path: Path) -> None:
    with pytest.raises(FormatError, match="multiple of the rank 4"):
        read_adapter(experts(tmp_path, r=4), tensor_names=["moe.up", "moe.down"])


# Places -----------------------------------------------------------------------------------------


def test_the_parent_of_a_named_adapter(foreign: Path, tmp_path: Path) -> None:
    parent = tmp_path / "parent"
    shutil.copytree(foreign, parent / "sql")
    shutil.copytree(foreign, parent / "early")
    os.utime(parent / "sql" / "adapter_config.json", ns=(2, 2))
    os.utime(parent / "early" / "adapter_config.json", ns=(1, 1))
    remedy = r"such as the newest: '.*sql'"
    with pytest.raises(FormatError, match=rf"in its subfolders 'early', 'sql'.*{remedy}"):
        read_adapter(parent)
    assert list(read_adapter(parent / "sql").sites) == ["fc"]


def test_a_directory_without_its_config(foreign: Path) -> None:
    (foreign / CONFIG).unlink()
    with pytest.raises(FormatError, match=r"there is no adapter_config\.json in it"):
        read_adapter(foreign)


def test_a_pickle_is_refused_with_what_to_do(foreign: Path) -> None:
    (foreign / MODEL).rename(foreign / "adapter_model.bin")
    with pytest.raises(FormatError, match="save it again"):
        read_adapter(foreign)


@pytest.mark.parametrize("name", ["nothing", "file.txt", "empty"])
def test_no_adapter_at_all(name: str, tmp_path: Path) -> None:
    (tmp_path / "file.txt").write_text("x")
    (tmp_path / "empty").mkdir()
    with pytest.raises(FormatError):
        read_adapter(tmp_path / name)
    with pytest.raises(FormatError):
        read_adapter(tmp_path / name, format="peft")


def test_a_json_file_of_a_terabyte_is_refused_before_it_is_read(foreign, tmp_path) -> None:
    os.truncate(foreign / CONFIG, 1 << 40)
    base = tmp_path / "base"
    base.mkdir()
    save_file({"fc.weight": torch.ones(6, 4)}, base / "model.safetensors")
    for read in (read_adapter, partial(li.check_adapter, client="peft")):
        with pytest.raises(FormatError, match="more than 32,000,000 bytes"):
            read(foreign)
    (base / "config.json").touch()
    os.truncate(base / "config.json", 1 << 40)
    with pytest.raises(CheckpointError, match=r"config.json.* more than 20,000,000 bytes"):
        Checkpoint.open(base)


def test_unknown_formats_and_choices(foreign: Path) -> None:
    with pytest.raises(FormatError, match="Nearest: peft"):
        read_adapter(foreign, format="pfet")
    with pytest.raises(FormatError, match="Give 'metadata', 'config' or None"):
        read_adapter(foreign, prefer="config.json")
    with pytest.raises(FormatError, match="Leave prefer out"):
        read_adapter(foreign, prefer="metadata")
    with pytest.raises(FormatError, match=r"'prefers' is not an option .* Its options: prefer,"):
        read_adapter(foreign, prefers="metadata")
    with pytest.raises(FormatError, match=r"'base' is not .* options: proof; facts .*base_model"):
        write_adapter(make_state(KIND_SPECS["linear"]), foreign, format="native", base="org/base")


# What cannot be written -------------------------------------------------------------------------


def test_states_that_peft_cannot_express_are_refused_before_anything_is_written(tmp_path) -> None:
    linear, table = KIND_SPECS["linear"], KIND_SPECS["parameter"]
    cases = {
        "root": [replace(linear, name="")],
        "of kind 'mystery'": [replace(linear, kind="mystery")],
        "together with Conv1D": [KIND_SPECS["conv1d"], table],
        "a module and a parameter of it": [
            linear,
            replace(table, name="h.0.fc.weight", weight="h.0.fc.weight"),
        ],
        "root module or a parameter of it": [replace(table, name="table")],
        "4 dimensions": [replace(table, weight_shape=(7, 5, 1, 1))],
    }
    site, on_meta = make_site(linear), torch.ones(1, device="meta")
    states = {
        r"A has shape \(2, 4\)": AdapterState({"h.0.fc": replace(site, A=torch.ones(2, 4))}),
        "only one of A0 and B0": AdapterState({"h.0.fc": replace(site, A0=site.A)}),
        "not plain data": replace(make_state(linear), config={"x": object()}),
        "meta device": make_state(linear, trained={"x": on_meta}),
        "'x' is not a tensor": make_state(linear, trained={"x": 1.0}),
    }
    states |= {words: make_state(*specs) for words, specs in cases.items()}
    for words, state in states.items():
        with pytest.raises(FormatError, match=words):
            write_adapter(state, tmp_path / "a")
    assert not list(tmp_path.iterdir())


# Files of other trainers ------------------------------------------------------------------------


@pytest.mark.parametrize("wrapper", ["_orig_mod", "_fsdp_wrapped_module"])
def test_wrappers_of_training_are_not_part_of_a_name(wrapper: str, foreign: Path) -> None:
    tensors = {f"{wrapper}.{k}": t for k, t in pair(f"h.{wrapper}.fc").items()}
    write_foreign(foreign, tensors)
    assert list(read_adapter(foreign).sites) == ["h.fc"]
    write_foreign(foreign, tensors | {k: t + 1 for k, t in pair("h.fc").items()})
    with pytest.raises(FormatError, match=r"holds 'h\.fc\.lora_A\.weight' twice"):
        read_adapter(foreign)


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
        ({first: 1}, "not a table of file names"),
    ]:
        index.write_text(json.dumps({"weight_map": table}))
        with pytest.raises(FormatError, match=words):
            read_adapter(foreign)


def test_a_checkpoint_with_an_adapter_among_its_tensors_is_refused(tmp_path: Path) -> None:
    tensors = {**pair("fc"), "fc.base_layer.weight": torch.ones(6, 4)}
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(FormatError, match=r"base and an adapter's tensors together.*adapter alone"):
        read_adapter(tmp_path)


def test_biases_are_asked_of_no_layer_that_has_none(foreign: Path) -> None:
    write_foreign(foreign, pair("fc"), bias="all")
    assert not read_adapter(foreign).trained
