"""Folders that other programs wrote in PEFT's format: read as PEFT means them, or refused by name.

Nothing that a stranger writes into them takes forever, fills the memory, or runs.
"""

import json
import os
import re
import shutil
import tempfile
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.refusals import refused
from helpers.states import SITES, as_of_peft, edit_config, linear, state_of
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import Tensor

import lora_inject as li

CONFIG, MODEL = "adapter_config.json", "adapter_model.safetensors"
P = "base_model.model."
ROWS = f"{P}e.token_adapter.trainable_tokens_delta"
TWO, SIX = torch.ones(2, 4), torch.ones(6, 2)  # an A and a B of rank 2


def pair(name: str, A: Tensor = TWO, B: Tensor = SIX) -> dict[str, Tensor]:
    return {f"{P}{name}.lora_A.weight": A.clone(), f"{P}{name}.lora_B.weight": B.clone()}


def foreign(path: Path, tensors: dict[str, Tensor], **config: Any) -> Path:
    """The least that PEFT writes."""
    path.mkdir(exist_ok=True)
    save_file(tensors, path / MODEL)
    plain = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["fc"]}
    (path / CONFIG).write_text(json.dumps(plain))
    return edit_config(path, **config)


# Configs ------------------------------------------------------------------------------------------

TEXTS = ["", "[]", "null", "{", '{"r": NaN}', "[" * 100_000, '{"r": ' + "9" * 5000 + "}", "\xff"]


@pytest.mark.parametrize("text", TEXTS, ids=lambda text: text[:9])
def test_configs_that_are_none(text: str, tmp_path: Path) -> None:
    path = foreign(tmp_path / "a", pair("fc"))
    (path / CONFIG).write_text(text, encoding="latin-1")
    with refused(li.FormatError, CONFIG):
        li.read_adapter(path)


BOMB = "(([a-z_.0-9])+)+X"
NOT_NEEDED: list[dict[str, Any]] = [
    {"target_modules": None},
    {"target_modules": "all-linear"},
    {"exclude_modules": BOMB},
    {"auto_mapping": {"parent_library": "os", "base_model_class": "system"}},
    {"some_new_field": None, "another": False, "third": {}},
    {"rank_pattern": {"nothing": 4}},
    {"bias": "all"},  # of a layer that has none
    *({"init_lora_weights": init} for init in (False, "gaussian", "eva")),
]


@pytest.mark.parametrize("change", NOT_NEEDED)
def test_claims_that_are_not_needed_are_not_used(change: dict[str, Any], tmp_path: Path) -> None:
    state = li.read_adapter(foreign(tmp_path / "a", pair("fc"), **change))
    assert (state.sites["fc"].scale, state.trained) == (2.0, {})


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "alpha absent": ({"lora_alpha": ...}, "'lora_alpha'"),
    "alpha zero": ({"lora_alpha": 0}, "lora_alpha"),
    "alpha huge": ({"lora_alpha": 10**400}, "lora_alpha"),
    "rank differs": ({"r": 3}, "rank 2 | 3"),
    "a pattern that is none": ({"rank_pattern": {"(": 4}}, "'rank_pattern' | '('"),
    "a pattern too long": ({"alpha_pattern": {"x*" * 600: 4}}, "'alpha_pattern' | 1,200"),
    "dropout": ({"lora_dropout": 1.0}, "lora_dropout"),
    "rslora text": ({"use_rslora": "yes"}, "use_rslora"),
    "bias": ({"bias": "some"}, "'bias'"),
    "modules": ({"modules_to_save": "head"}, "modules_to_save"),
    "other method": ({"peft_type": "LOHA"}, "'LOHA' | 'LORA' | peft.convert_to_lora"),
    "no method": ({"peft_type": None}, "'LORA'"),
    "dora": ({"use_dora": True}, "DoRA magnitude"),
    "qalora": ({"use_qalora": True}, "QALoRA"),
    "lora_bias": ({"lora_bias": True}, "bias of lora_B"),
    "alora": ({"alora_invocation_tokens": [1]}, "aLoRA"),
    "replication": ({"layer_replication": [[0, 1]]}, "layer_replication"),
    "tokens": ({"trainable_token_indices": [1]}, "rows"),
    "megatron": ({"megatron_config": {"a": 1}}, "Megatron"),
    "unknown": ({"some_new_field": 3}, "'some_new_field' | allow="),
    **{
        f"init {init}": ({"init_lora_weights": init}, "init_lora_weights")
        for init in ("pissa", "pissa_niter_4", "olora", "corda", "loftq", "lora_ga", "mica", ["x"])
    },
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_a_config_must_not_say_is_refused_by_its_field(case: str, tmp_path: Path) -> None:
    change, named = REFUSED[case]
    path = foreign(tmp_path / "a", pair("fc"), **change)
    with refused(li.FormatError, *named.split(" | ")):
        li.read_adapter(path)
    if case in ("init pissa", "unknown"):  # what may be let through
        assert list(li.read_adapter(path, allow=[*change]).sites) == ["fc"]


@pytest.mark.slow
def test_a_stranger_s_patterns_are_given_seconds_together(tmp_path: Path) -> None:
    name, said = "m" * 60, {f"(m|mm)+X{n}": 4 for n in range(50)}
    path = foreign(tmp_path / "a", pair(name), target_modules=[name], rank_pattern=said)
    start = time.process_time()
    with refused(li.FormatError, "rank_pattern"):
        li.read_adapter(path)
    assert time.process_time() - start < 20


# Names in patterns --------------------------------------------------------------------------------

NAMES = ["lin", "xlin", "a.lin", "a.b.lin", "a.bxlin", "a-b", "a.l+n", "lin.a", "a.b", "aXb"]
NAMES += ["x.aXb", "^lin"]
KEYS = r"""
lin a\.lin a.lin ^lin ^a\.lin$ .*\.lin .*lin (.*\.)?lin lin$ a\.l\+n a-b a\-b a.b a\.b b.lin \^lin
^\^lin ... ^ a|lin [ab]+ .*[.]l\w+ a(?!X)\S l.n a?
"""


def peft_takes(key: str, name: str) -> bool:
    """The line of PEFT, peft/utils/other.py."""
    return re.match(rf"(.*\.)?({key})$", name) is not None


@pytest.mark.parametrize("key", ["", *KEYS.split()])
def test_a_key_hits_what_it_hits_in_peft(key: str, tmp_path: Path) -> None:
    tensors = {k: t for name in NAMES for k, t in pair(name).items()}
    path = foreign(tmp_path / "a", tensors, target_modules=NAMES, alpha_pattern={key: 8})
    sites = li.read_adapter(path).sites
    assert {name: sites[name].scale == 4.0 for name in NAMES} == {
        name: peft_takes(key, name) for name in NAMES
    }


parts = st.text("ab+x0-", min_size=1, max_size=2)
dotted = st.lists(parts, min_size=1, max_size=3).map(".".join)


@settings(max_examples=40, deadline=None)
@given(st.dictionaries(dotted, st.integers(1, 3), min_size=1, max_size=6))
def test_written_tables_give_each_site_its_rank_in_any_order(ranks: dict[str, int]) -> None:
    apart = [n for n in ranks if not any(n.startswith(f"{other}.") for other in ranks)]
    state = state_of(*(linear(name, rank=ranks[name]) for name in apart))
    with tempfile.TemporaryDirectory() as parent:
        path = as_of_peft(li.write_adapter(state, f"{parent}/a"))
        said = json.loads((path / CONFIG).read_text())
        back = li.read_adapter(path).sites
    for table in (list(said["rank_pattern"].items()), list(said["rank_pattern"].items())[::-1]):
        for name in apart:
            in_peft = next((rank for key, rank in table if peft_takes(key, name)), said["r"])
            assert in_peft == len(back[name].A) == ranks[name]


TENSORS = [
    "h.ln.weight", "h.ln.bias", "h.norm.weight", "h.fc.weight", "h.fc.bias", "bn.weight", "root",
    "bn.running_mean", "classifier.dense.weight", "classifier.dense.bias", "classifier.out.weight",
    "xh.norm.weight", "axb.fc.weight", "a.b.weight", "axb.d.weight", "e.b.weight",
]  # fmt: skip
WHOLE: list[tuple[str, list[str]]] = [
    ("h.ln.weight h.ln.bias", ["h.ln"]),
    ("h.ln.weight", []),
    ("bn.weight", []),
    ("h.norm.weight", []),  # PEFT would take xh.norm as well
    ("xh.norm.weight", ["xh.norm"]),
    ("classifier.dense.weight classifier.dense.bias classifier.out.weight", ["classifier"]),
    ("classifier.dense.weight classifier.dense.bias", ["classifier.dense"]),
    ("a.b.weight", []),  # as an expression it hits axb, where PEFT would adapt nothing
    ("e.b.weight", ["e.b"]),
]


@pytest.mark.parametrize(("trained", "whole"), WHOLE)
def test_a_module_is_kept_whole_where_peft_keeps_the_same_one(trained, whole, tmp_path) -> None:
    held = {name: torch.ones(2) for name in trained.split()}
    state = state_of(linear("h.fc"), linear("axb.fc"), trained=held)
    path = li.write_adapter(state, tmp_path / "a", tensor_names=TENSORS)
    assert (json.loads((path / CONFIG).read_text())["modules_to_save"] or []) == whole


# Tensors ------------------------------------------------------------------------------------------

TENSORS_REFUSED: dict[str, tuple[dict[str, Tensor], str]] = {
    "mixed prefix": ({**pair("fc"), "x.weight": torch.ones(1)}, "'x.weight'"),
    "ranks differ": (pair("fc", torch.ones(3, 4)), "'fc | ranks"),
    "one dimension": (pair("fc", torch.ones(2)), "'fc"),
    "dtypes differ": (pair("fc", TWO.half()), "torch.float16 | torch.float32"),
    "whole numbers": (pair("fc", TWO.int(), SIX.int()), "fc | int32"),
    "magnitude": ({**pair("fc"), f"{P}fc.lora_magnitude_vector": torch.ones(6)}, "DoRA"),
    "tokens": ({**pair("fc"), ROWS: torch.ones(2, 2)}, "trainable_token"),
    "B bias": ({**pair("fc"), f"{P}fc.lora_B.bias": torch.ones(6)}, "bias of lora_B"),
    "unknown lora": ({**pair("fc"), f"{P}fc.lora_C.weight": torch.ones(6)}, "lora_C"),
    "twice": ({**pair("fc"), f"{P}fc.lora_A.default.weight": TWO}, "fc | a second time"),
    "trained and adapted": ({**pair("fc"), f"{P}fc.weight": TWO}, "fc.weight"),
    # B works in groups on what A has made of all channels: no weight of a convolution says that.
    "grouped conv": (pair("c", torch.ones(4, 4, 3), torch.ones(6, 2, 1)), "'c | grouped"),
    "rows twice": ({ROWS: torch.ones(2, 2), f"{ROWS}.default": torch.ones(2, 2)}, "a second time"),
    "inside another": (
        {**pair("a"), **pair("a.base_layer.q")}, "base_layer.q' | MultiheadAttention",
    ),
    "stray level": (pair("fc.base_layer"), "'fc'"),
}  # fmt: skip


@pytest.mark.parametrize("case", TENSORS_REFUSED)
def test_tensors_that_peft_does_not_write_so_are_refused(case: str, tmp_path: Path) -> None:
    tensors, named = TENSORS_REFUSED[case]
    targets = ["fc", "c", "a", "out_proj"]
    path = foreign(tmp_path / "a", tensors, target_modules=targets)
    with refused(li.FormatError, *named.split(" | ")):
        li.read_adapter(path)


@pytest.mark.parametrize("wrapper", ["_orig_mod", "_fsdp_wrapped_module"])
def test_wrappers_of_training_are_not_part_of_a_name(wrapper: str, tmp_path: Path) -> None:
    tensors = {f"{wrapper}.{k}": t for k, t in pair(f"h.{wrapper}.fc").items()}
    assert list(li.read_adapter(foreign(tmp_path / "a", tensors)).sites) == ["h.fc"]
    path = foreign(tmp_path / "a", tensors | {k: t + 1 for k, t in pair("h.fc").items()})
    with refused(li.FormatError, "'h.fc.lora_A.weight'"):
        li.read_adapter(path)


def test_other_spellings_of_keys_are_read(tmp_path: Path) -> None:
    """Without the prefix, with the adapter's name, and beside a module called `lora_in`."""
    for prefix, end in (("", ""), (P, ".default")):
        keys = (f"{prefix}fc.lora_A{end}.weight", f"{prefix}fc.lora_B{end}.weight")
        path = foreign(tmp_path / "a", dict(zip(keys, (TWO, SIX), strict=True)), lora_dropout=0.1)
        assert li.read_adapter(path).sites["fc"].spec.dropout == 0.1
    tensors = {**pair("fc"), f"{P}lora_in.weight": torch.ones(2, 2)}
    path = foreign(tmp_path / "a", tensors, modules_to_save=["lora_in"])
    assert list(li.read_adapter(path).trained) == ["lora_in.weight"]


def test_two_parameters_need_the_models_names(tmp_path: Path) -> None:
    """PEFT wraps them in the order of the model, which no file says."""
    tensors = pair("moe.base_layer", torch.randn(6, 4), torch.randn(10, 6))
    tensors |= pair("moe", torch.randn(6, 5), torch.randn(4, 6))
    path = foreign(tmp_path / "a", tensors, target_parameters=["moe.down", "moe.up"])
    with refused(li.FormatError, "tensor_names"):
        li.read_adapter(path)
    for first, second in (("up", "down"), ("down", "up")):
        names = [f"moe.{first}", "moe.other", f"moe.{second}"]
        sites = li.read_adapter(path, tensor_names=names).sites
        shapes = {name: (tuple(s.A.shape), tuple(s.B.shape)) for name, s in sites.items()}
        assert shapes[f"moe.{first}"] == ((3, 2, 4), (3, 10, 2))
        assert shapes[f"moe.{second}"] == ((3, 2, 5), (3, 4, 2))
    edit_config(path, peft_version="0.18.1")  # until which A and B were the other way round
    site = li.read_adapter(path, tensor_names=["moe.up", "moe.down"]).sites["moe.up"]
    assert site.spec.transposed
    edit_config(path, r=4)
    with refused(li.FormatError, "rank 4"):
        li.read_adapter(path, tensor_names=["moe.up", "moe.down"])


# Places -------------------------------------------------------------------------------------------


def test_the_parent_of_a_named_adapter_names_its_subfolders(tmp_path: Path) -> None:
    parent, path = tmp_path / "parent", foreign(tmp_path / "a", pair("fc"))
    for name, when in (("sql", 2), ("early", 1)):
        shutil.copytree(path, parent / name)
        os.utime(parent / name / CONFIG, ns=(when, when))
    with refused(li.FormatError, "'early', 'sql'") as raised:
        li.read_adapter(parent)
    assert "sql'" in raised.value.remedy  # the newest


def test_a_folder_that_is_no_whole_adapter(tmp_path: Path) -> None:
    path = foreign(tmp_path / "a", pair("fc"))
    (path / MODEL).rename(path / "adapter_model.bin")
    with refused(li.FormatError, "adapter_model.bin"):
        li.read_adapter(path)
    (path / CONFIG).rename(tmp_path / "file.txt")
    with refused(li.FormatError, CONFIG):
        li.read_adapter(path)
    (tmp_path / "empty").mkdir()
    for name in ("nothing", "file.txt", "empty"):
        for chosen in (None, "peft"):
            with refused(li.FormatError, name):
                li.read_adapter(tmp_path / name, format=chosen)


def test_a_site_of_ours_is_no_stranger(tmp_path: Path) -> None:
    """The control: what is edited above reads as it is."""
    state = state_of(SITES["linear"])
    assert li.read_adapter(li.write_adapter(state, tmp_path / "a")) == state
    assert li.read_adapter(foreign(tmp_path / "b", pair("fc"))).sites["fc"].scale == 2.0
