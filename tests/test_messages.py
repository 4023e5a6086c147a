"""The words of errors: whole where users meet them often, and what wrong types are told."""

import ast
import pkgutil
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import fill, snapshot
from safetensors.torch import save_file
from torch import nn

import lora_inject as li
from lora_inject import errors
from lora_inject.checkpoint import WeightedAdapter, plan_merge
from lora_inject.serving.completions import Server

Q = {"rank": 2, "targets": ["q_proj"]}


def net() -> nn.ModuleDict:
    torch.manual_seed(0)
    names = {"q_proj": 8, "v_proj": 4}
    layers = [nn.ModuleDict({n: nn.Linear(6, out) for n, out in names.items()}) for _ in range(2)]
    return nn.ModuleDict({"layers": nn.ModuleList(layers), "head": nn.Linear(8, 3)})


def injected() -> nn.ModuleDict:
    return li.inject(net(), Q)


def saved(tmp_path: Path) -> Path:
    return li.save_adapter(injected(), tmp_path / "sql")


class Mistakes:
    """Each makes one, the way a user would; its docstring is the whole message."""

    def an_unknown_key(self, path):
        """ConfigError: lora.yaml:3:1 (expct): unknown key 'expct'. Did you mean 'expect'?"""
        text = "rank: 4\ntargets: [q_proj]\nexpct: {sites: 2}\n"
        li.Config.from_text(text, source="lora.yaml")

    def a_rule_that_matches_nothing(self, path):
        r"""MatchError: rule 1 ('layers\.\d+\.v_prj'): matched none of 19 names. Nearest:
        'layers.0.v_proj', 'layers.0.q_proj'."""
        li.plan(net(), {"targets": [r"layers\.\d+\.v_prj"]})

    def a_class_instead_of_a_model(self, path):
        """LayerError: the model: it is the class Linear. Give an instance: Linear(...)."""
        li.inject(nn.Linear, Q)

    def a_delta_that_rounding_eats(self, path):
        """LayerError: merge with min_kept=0.9: rounding would leave 0.000 of the delta of
        'layers.0.q_proj.weight', and less than asked at 2 of 2 tensors. Stay unmerged, or merge in
        float32."""
        li.merge(fill(li.inject(net().bfloat16(), Q), std=1e-4), min_kept=0.9)

    def rows_that_are_not_the_batch(self, path):
        """LayerError: routed() with 3 rows: a Linear got an input of shape (2, 4), whose first
        dimension is not the number of rows. Give one adapter for each row of the batch; for beams
        use repeat=n, for sequences that are packed into one row tokens=[...], the length of
        each."""
        model = li.inject(nn.Sequential(nn.Linear(4, 4)), {"rank": 1, "targets": ["0"]})
        with li.routed(model, ["default", None, "default"]):
            model(torch.zeros(2, 4))

    def a_name_in_use(self, path):
        """StateError: adapter 'default': the model has one of that name. Eject it, or choose
        another name."""
        li.inject(injected(), Q)

    def unmerging_what_was_not_kept(self, path):
        """StateError: unmerge: the merge kept nothing to restore (undo=False). Eject the adapters,
        load the base weights, then load the adapters again."""
        model = injected()
        li.merge(model, undo=False)
        li.unmerge(model)

    def saving_what_training_left_out(self, path):
        """StateError: save adapter 'default': neither a forward nor training has reached 'head' (1
        such site): the adapter is inert there. Inject without them, or give patterns of all that
        may be without use: unused=['head']."""
        model = li.inject(net(), {"rank": 2, "targets": ["q_proj", "head"]})
        for layer in model["layers"]:
            layer["q_proj"](torch.ones(1, 6)).sum().backward()
        torch.optim.SGD(li.adapter_parameters(model).values(), lr=1.0).step()
        li.save_adapter(model, path / "sql")

    def an_adapter_of_another_base(self, path):
        """FormatError: load 'TMP/sql': the adapter was made on another base:
        'layers.0.q_proj.weight' 16 of 16 sampled values differ, first NUMBER in the file and NUMBER
        here (1 of 10 tensors differ). Load it onto its own base, or pass base="any"."""
        other = net()
        with torch.no_grad():
            other["layers"][0]["q_proj"].weight.add_(0.01)
        li.load_adapter(other, saved(path))

    def an_adapter_of_another_checkpoint(self, path):
        """CheckpointError: merge sql into 'TMP': 2 of 2 tensors have no place in it
        ('layers.0.q_proj.weight' is not in the checkpoint; 'layers.1.q_proj.weight' is not in the
        checkpoint). Use the checkpoint that the adapter was trained on, or say how its names
        differ: --rename OLD=NEW. Nothing was written."""
        save_file({"other.weight": torch.zeros(3, 3)}, path / "model.safetensors")
        plan_merge(path, [WeightedAdapter(li.adapter_state(injected()), label="sql")])

    def a_server_without_its_scheme(self, path):
        """ServerError: ask 'localhost:8000': it is no URL. Give one, such as http://HOST:8000."""
        Server.at("localhost:8000", None, "sql")


MISTAKES = [method for name, method in vars(Mistakes).items() if name[0] != "_"]


def parts(mistake: Callable[..., object]) -> tuple[str, str]:
    """The kind of error, and its message."""
    kind, _, text = " ".join(str(mistake.__doc__).split()).partition(": ")
    return kind, text


@pytest.mark.parametrize("mistake", MISTAKES, ids=lambda mistake: mistake.__name__)
def test_the_message_is_word_for_word(mistake, tmp_path):
    kind, text = parts(mistake)
    with pytest.raises(li.LoraInjectError) as raised:
        mistake(Mistakes(), tmp_path)
    error = raised.value
    assert isinstance(error, getattr(li, kind))
    said = str(error).replace(str(tmp_path), "TMP")
    if "NUMBER" in text:
        said = re.sub(r"-?\d+\.\d+(?:e-?\d+)?", "NUMBER", said)
    assert said == text
    assert error.args == (error.asked, error.found, error.remedy)


def test_what_a_message_names_in_the_package_exists():
    """Names in strings of the source: what is called, and what lies in a module."""
    package = Path(li.__file__).parent
    pattern = re.compile(r"\blora_inject(?:\.\w+)+(?=\()|\blora_inject\.\w+\.[\w.]*\w")
    named = set()
    for path in package.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                named |= {*pattern.findall(node.value)}
    assert len(named) > 5
    for name in sorted(named):
        file = (package.parent / name.replace(".", "/")).with_suffix(".py")
        assert file.exists() or pkgutil.resolve_name(name) is not None, name


def test_every_class_of_error_has_a_row():
    classes = (kind for kind in vars(errors).values() if isinstance(kind, type))
    kinds = {kind.__name__ for kind in classes if issubclass(kind, li.LoraInjectError)}
    assert {parts(mistake)[0] for mistake in MISTAKES} == kinds - {"LoraInjectError"}


# words of the refusal: a call with a model of two layers and an adapter of it
CALLS: dict[str, Callable[[Any, Any], Any]] = {
    r"trial 'a': it is a dict.*Trial\(config, lr": lambda m, s: li.Trials(m, {"a": Q}),
    "it is a str. Give a whole number": lambda m, s: li.advise(m, "10k"),
    "adapters: it is an AdapterState": lambda m, s: li.combine(s),
    "weights: it is a float": lambda m, s: li.combine([s], 0.5),
    "2 of 2: it is an int. Give an AdapterState": lambda m, s: s + 3,
    "routed: it is a str. Give .* in a list": lambda m, s: li.routed(m, "aa"),
    "merge, name: it is an int": lambda m, s: li.merge(m, name=3),
    "it is not a regex": lambda m, s: li.subset(s, "("),
    "width of 'a' is -1": lambda m, s: li.split(s, "1", {"a": -1, "b": 7}),
    "as_dtype zz: it is a str": lambda m, s: li.as_dtype(s, "zz"),
    "rank: it is a float": lambda m, s: li.truncate(s, rank=1.5),
    "it is a str. Give an AdapterState": lambda m, s: li.install(m, "x", "b"),
    "load .*path: it is None": lambda m, s: li.load_adapter(m, None, "b"),
    "save .*has a zero byte": lambda m, s: li.save_adapter(m, "a\0b"),
    "rank.*1048576": lambda m, s: li.inject(m, {"rank": 10**11, "targets": ["1"]}, "b"),
    "it is a list. Give the name": lambda m, s: li.train_only(m, [["a"]]),
    "eject .*: it is a list": lambda m, s: li.eject(m, ["default"]),
    "lr: it is -1": lambda m, s: li.parameter_groups(m, {"default": -1}),
    "b_lr_ratio: it is 0. Give a pos": lambda m, s: li.parameter_groups(m, 1.0, 0),
    "Trial.lr: it is None. Give a pos": lambda m, s: li.Trial(Q, lr=None),
    "there is no row -1. Rows are counted from 0": (
        lambda m, s: li.plan(m, {"targets": ["1"], "tokens": {"0": [-1]}})
    ),
}


@pytest.mark.parametrize("words", CALLS)
def test_a_value_of_a_wrong_type_is_an_error_of_this_package(words: str) -> None:
    model = li.inject(
        nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 6)), {"rank": 2, "targets": ["1"]}
    )
    before, state = snapshot(model), li.adapter_state(model)
    with pytest.raises(li.LoraInjectError, match=words):
        CALLS[words](model, state)
    assert snapshot(model) == before
