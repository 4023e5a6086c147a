"""The wording of errors: what was asked, what was found, what to do, with names and numbers.

A message is part of the interface, so a table holds it word for word, one row for each
kind of mistake, each made the way a user would make it.
"""

import ast
import pkgutil
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conftest import fill
from safetensors.torch import save_file
from torch import nn

import lora_inject as li
from lora_inject import errors
from lora_inject.checkpoint import (
    WeightedAdapter,
    plan_merge,
)
from lora_inject.serving.completions import Server

Q = {"rank": 2, "targets": ["q_proj"]}


def net() -> nn.ModuleDict:
    torch.manual_seed(0)

    def layer() -> nn.ModuleDict:
        projections = {"q_proj": nn.Linear(6, 8), "v_proj": nn.Linear(6, 4)}
        return nn.ModuleDict({**projections, "norm": nn.LayerNorm(6)})

    return nn.ModuleDict(
        {"layers": nn.ModuleList(layer() for _ in range(2)), "head": nn.Linear(8, 3)}
    )


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

    # Matching

    def a_rule_that_matches_nothing(self, path):
        r"""MatchError: rule 1 ('layers\.\d+\.v_prj'): matched none of 25 names. Nearest:
        'layers.0.v_proj', 'layers.0.q_proj'."""
        li.plan(net(), {"targets": [r"layers\.\d+\.v_prj"]})

    # Layers

    def a_class_instead_of_a_model(self, path):
        """LayerError: the model: it is the class Linear. Give an instance: Linear(...)."""
        li.inject(nn.Linear, Q)

    def a_parametrized_weight(self, path):
        """LayerError: 'head', matched by rule 1 ('head'): the weight of ParametrizedLinear is
        computed by a parametrization: W + delta has no tensor to be merged into, and no name in a
        state dict. Name what it is computed of ('parametrizations.weight.original1'), or call
        torch.nn.utils.parametrize.remove_parametrizations first."""
        model = net()
        nn.utils.parametrizations.weight_norm(model["head"])
        li.plan(model, {"rank": 2, "targets": ["head"]})

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

    # State

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

    # Files

    def an_adapter_of_another_shape(self, path):
        """FormatError: load 'TMP/sql', site 'layers.0.q_proj': it maps 6 to 8 features in the
        file, 6 to 9 here. Load the adapter onto the model that it was made for."""
        other = net()
        other["layers"][0]["q_proj"] = nn.Linear(6, 9)
        li.load_adapter(other, saved(path))

    def an_adapter_of_another_base(self, path):
        """FormatError: load 'TMP/sql': the adapter was made on another base:
        'layers.0.q_proj.weight' 16 of 16 sampled values differ, first NUMBER in the file and NUMBER
        here (1 of 14 tensors differ). Load it onto its own base, or pass base="any"."""
        other = net()
        with torch.no_grad():
            other["layers"][0]["q_proj"].weight.add_(0.01)
        li.load_adapter(other, saved(path))

    # Checkpoints

    def an_adapter_of_another_checkpoint(self, path):
        """CheckpointError: merge sql into 'TMP': 2 of 2 tensors have no place in it
        ('layers.0.q_proj.weight' is not in the checkpoint; 'layers.1.q_proj.weight' is not in the
        checkpoint). Use the checkpoint that the adapter was trained on, or say how its names
        differ: --rename OLD=NEW. Nothing was written."""
        save_file({"other.weight": torch.zeros(3, 3)}, path / "model.safetensors")
        plan_merge(path, [WeightedAdapter(li.adapter_state(injected()), label="sql")])

    # Servers

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
    assert error.asked
    assert error.found
    assert not error.found.endswith(".")
    assert error.remedy
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
