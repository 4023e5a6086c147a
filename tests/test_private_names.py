"""Other libraries' private names: each is listed, none is needed by what does not stand on it."""

import ast
import importlib
import re
import sys
import tempfile
from collections.abc import Mapping
from functools import cache, partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import KINDS, Host
from helpers.forks import Forks
from helpers.private_attributes import ATTRIBUTES
from helpers.versions import at_least
from torch import Tensor, nn

import lora_inject as li
from lora_inject import private_needed
from lora_inject.distributed import sharding
from lora_inject.private import look_up
from lora_inject.private_names import NAMES
from lora_inject.private_needed import needed

PACKAGE = Path(li.__file__).parent
NAME = re.compile(r"_[A-Za-z]\w*(?<!__)")

# Private by their first letter alone: documented ones of Python, and words that are no names.
DOCUMENTED = {"_asdict", "_exit", "_fields", "_getframe", "_replace"}
ENDS_OF_NAMES = {"_USE_TORCH_KERNEL", "_bias", "_blocks", "_hf_", "_is_"}
ENDS_OF_NAMES |= {"_global_scale", "_scale", "_scale_inv", "_scales", "_svd"}
ENDS_OF_NAMES |= {"_packed", "_wrapped_module"}
KEYS_OF_FILES = {"_class_name"}


@cache
def trees() -> dict[str, ast.Module]:
    paths = sorted(PACKAGE.rglob("*.py"))
    return {p.relative_to(PACKAGE).as_posix(): ast.parse(p.read_text()) for p in paths}


def defined(files: Mapping[str, ast.Module]) -> set[str]:
    """Every name that the package gives to something of its own."""
    names = set()
    for node in (node for tree in files.values() for node in ast.walk(tree)):
        match node:
            case ast.FunctionDef(name=name) | ast.ClassDef(name=name) | ast.arg(arg=name):
                names.add(name)
            case ast.Name(id=name, ctx=ast.Store()):
                names.add(name)
            case ast.Attribute(value=ast.Name(id="self"), attr=name, ctx=ast.Store()):
                names.add(name)
    return names


def of_torch() -> set[str]:
    """Private members of what the package makes subclasses of, or gets handed."""
    objects = (Tensor, nn.Module(), nn.LSTM(1, 1), nn.Conv1d(1, 1, 1), torch, torch._C)
    return {name for thing in objects for name in (*dir(thing), *getattr(thing, "__dict__", ()))}


def used(tree: ast.Module, own: set[str]) -> set[str]:
    """Private names of others in a file: attributes, imports, and strings that are such a name."""
    others, names = of_torch() - {"_values", "_base", "_indices"}, set()
    for node in ast.walk(tree):
        match node:
            case ast.Attribute(value=ast.Name(id="self" | "cls"), attr=name) if name in own:
                pass
            case ast.Attribute(attr=name) | ast.Constant(value=str(name)):
                names.add(name)
            case ast.ImportFrom(module=str(module), names=imported) if "lora_inject" not in module:
                names |= {*module.split("."), *(alias.name for alias in imported)}
            case ast.Import(names=imported):
                names |= {part for alias in imported for part in alias.name.split(".")}
    private_names = {name for name in names if NAME.fullmatch(name)}
    return {n for n in private_names if (n not in own or n in others) and n[:5] != "_lora"}


def strings(tree: ast.Module) -> set[str]:
    return {str(node.value) for node in ast.walk(tree) if isinstance(node, ast.Constant)}


def test_every_private_name_is_listed() -> None:
    files = {name: tree for name, tree in trees().items() if name != "private_names.py"}
    own = defined(files)
    listed = {*ATTRIBUTES, *DOCUMENTED, *ENDS_OF_NAMES, *KEYS_OF_FILES}
    private = {file: used(tree, own) for file, tree in files.items()}
    for file, names in private.items():
        # The last part of what a file looks up may be written out in it.
        parts = {name.rpartition(".")[2] for name in strings(files[file]) & NAMES.keys()}
        assert names - listed - parts == set(), file
    assert set().union(*private.values()) >= listed


def test_what_is_looked_up_is_what_is_listed() -> None:
    files = [tree for name, tree in trees().items() if name != "private_names.py"]
    assert set().union(*map(strings, files)) & NAMES.keys() == NAMES.keys()
    assert set().union(*map(looked_up, files)) <= NAMES.keys()


def looked_up(tree: ast.Module) -> set[str]:
    """The names that a file looks up: written there, or as a constant of the file."""
    assigned = {node.targets[0].id: node.value for node in tree.body if is_constant(node)}
    calls = (node for node in ast.walk(tree) if isinstance(node, ast.Call) and node.args)
    named = (c.args[0] for c in calls if getattr(c.func, "id", "") in ("look_up", "needed"))
    values = (assigned.get(getattr(first, "id", ""), first) for first in named)
    return {str(value.value) for value in values if isinstance(value, ast.Constant)}


def is_constant(node: ast.AST) -> bool:
    return isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name)


def test_the_walk_sees_each_way_to_use_a_name() -> None:
    source = "import torch._a\nfrom torch._b import _c\nx._d\ngetattr(x, '_e')\nself._f\nx._own\n"
    assert used(ast.parse(source), {"_own", "_f"}) == {"_a", "_b", "_c", "_d", "_e"}
    assert used(ast.parse("module._parameters"), {"_parameters"}) == {"_parameters"}


SHARD = "torch.distributed.tensor._utils.compute_local_shape_and_global_offset"
# The oldest version of its library that was seen to have a name; all others were in torch 2.6,
# transformers 5.0 and the oldest version of each other library that is admitted.
SINCE = {
    "torch._C._autograd._top_saved_tensors_default_hooks": "2.8",
    "torch._grouped_mm": "2.8",
    "torch.fx._symbolic_trace.is_fx_symbolic_tracing": "2.9",
    "transformers.conversion_mapping._MODEL_TO_CONVERSION_PATTERN": "5.0",
    "transformers.integrations.finegrained_fp8._dequantize_fp8_weight": "5.24",
}


@pytest.mark.parametrize("name", NAMES)
def test_each_name_is_in_the_versions_that_are_said_to_have_it(name: str) -> None:
    """A name that leaves a library fails here first, on the version that lacks it."""
    assert SINCE.keys() <= NAMES.keys()
    library = name.partition(".")[0]
    pytest.importorskip(library)
    numbers = [int(n) for n in SINCE.get(name, "0").split(".")]
    if at_least(version(library.replace("_", "-")), *numbers):
        assert look_up(name) is not None


@pytest.mark.parametrize(
    ("name", "use"),
    [
        ("torch._C._not_there_at_all", lambda: needed("torch._C._not_there_at_all", "a feature")),
        (SHARD, lambda: sharding._local_samples(torch.zeros(1))),
    ],
)
def test_what_stands_on_a_name_is_refused_without_it(monkeypatch, name: str, use: Any) -> None:
    monkeypatch.setattr(private_needed, "look_up", lambda asked: None if asked == name else 1 / 0)
    with pytest.raises(li.LayerError, match=f"it stands on {name}, which torch"):
        use()


# ---------------------------------------------------------- the life of an adapter without a name

REFUSED = {
    "torch._C._will_engine_execute_node": {"trials", "dropout"},
    "torch.Tensor._make_wrapper_subclass": {"packed experts"},
}


def import_without(name: str) -> None:
    """Import the package anew, as if its library had no such name."""
    for module in [m for m in sys.modules if m.partition(".")[0] == "lora_inject"]:
        del sys.modules[module]
    path = Path(importlib.util.find_spec("lora_inject").origin).parent / "private.py"
    spec = importlib.util.spec_from_file_location("lora_inject.private", path)
    gate = importlib.util.module_from_spec(spec)
    sys.modules["lora_inject.private"] = gate
    spec.loader.exec_module(gate)
    there = gate.look_up
    gate.look_up = lambda asked: None if asked == name else there(asked)
    importlib.import_module("lora_inject")


def lives(name: str) -> dict[str, str]:
    """What happened to each kind of layer, and to trials, where a name is missing."""
    import_without(name)
    kinds = {kind: outcome(partial(life, kind)) for kind in KINDS}
    trials = {"trials": outcome(partial(train, 0.0)), "dropout": outcome(partial(train, 0.5))}
    return {**kinds, **trials, "packed experts": outcome(pack)}


def outcome(run: Any) -> str:
    try:
        run()
    except Exception as error:  # noqa: BLE001 - told apart by the test
        return f"{type(error).__name__}: {error}"
    return "works"


def life(kind_name: str) -> None:
    """Inject, train, save, load, merge, unmerge and eject."""
    import lora_inject as li

    kind = KINDS[kind_name]
    torch.manual_seed(0)
    model = Host(kind.layer())
    before = {key: value.clone() for key, value in model.state_dict().items()}
    inputs = kind.inputs(torch.float32)
    li.inject(model, kind.config)
    for parameter in li.adapter_parameters(model).values():
        nn.init.normal_(parameter, std=0.1)
    adapted = model(*inputs)
    adapted.pow(2).sum().backward()
    assert all(p.grad.isfinite().all() for p in li.adapter_parameters(model).values())
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "adapter.safetensors"
        li.save_adapter(model, path, format="native")
        li.eject(model)
        li.load_adapter(model, path)
    torch.testing.assert_close(model(*inputs), adapted)
    li.merge(model)
    torch.testing.assert_close(model(*inputs), adapted, rtol=1e-4, atol=1e-5)
    li.eject(li.unmerge(model))
    after = model.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[key], value) for key, value in before.items())


def train(dropout: float) -> None:
    from lora_inject import Trial, Trials

    config = {"rank": 2, "dropout": dropout, "targets": ["0"]}
    trials = Trials(nn.Sequential(nn.Linear(4, 4)), {n: Trial(config, lr=1e-2) for n in "ab"})
    trials.step(torch.randn(3, 4), loss=lambda outputs, _: outputs.pow(2).mean())


def pack() -> None:
    from lora_inject.experts.packed_experts import PackedExperts
    from lora_inject.experts.stack_formats import Mxfp4Stack

    codes, scales = torch.zeros(2, 4, 16).byte(), torch.zeros(2, 4, 1).byte()
    parts = {"codes": codes, "scales": scales}
    PackedExperts(Mxfp4Stack(), parts, torch.bfloat16).dequantize()


@pytest.mark.slow
@pytest.mark.parametrize("name", [n for n in NAMES if n.startswith("torch.")])
def test_what_does_not_stand_on_a_name_works_without_it(forks: Forks, name: str) -> None:
    outcomes = forks.start(lives, name).result()
    wrong = {what: said for what, said in outcomes.items() if said != "works"}
    assert wrong.keys() == REFUSED.get(name, set()), wrong
    assert all(f"it stands on {name}, which torch" in said for said in wrong.values())
