"""Other libraries' private names: each is listed, none is needed by what does not stand on it."""

import ast
import importlib
import re
import sys
from collections.abc import Mapping
from functools import cache, partial
from importlib.metadata import version
from pathlib import Path

import pytest
import torch
from conftest import KINDS, Host, Kind, refusal
from helpers.forks import Forks
from helpers.private_attributes import ATTRIBUTES
from helpers.versions import at_least
from torch import Tensor, nn

import lora_inject as li
from lora_inject.private import look_up
from lora_inject.private_names import NAMES
from lora_inject.private_needed import needed

PACKAGE = Path(li.__file__).parent
NAME = re.compile(r"_[A-Za-z]\w*(?<!__)")
PATH = re.compile(r"[a-z]\w*(\.\w+)+")

# Private by their first letter alone: documented ones of Python, and words that are no names.
DOCUMENTED = {"_asdict", "_exit", "_fields", "_getframe", "_replace"}
ENDS_OF_NAMES = {"_USE_TORCH_KERNEL", "_bias", "_blocks", "_hf_", "_is_"}
ENDS_OF_NAMES |= {"_global_scale", "_scale", "_scale_inv", "_scales", "_svd"}
ENDS_OF_NAMES |= {"_packed", "_wrapped_module"}
KEYS_OF_FILES = {"_class_name"}
# Modules that are asked for in sys.modules, and an operation that is told by its name.
LOADED_BY_OTHERS = {"torch._dynamo", "torch.distributed.fsdp._flat_param"}
LOADED_BY_OTHERS |= {"aten._grouped_mm.default"}


@cache
def trees() -> dict[str, ast.Module]:
    """Return each file of the package but the list itself."""
    paths = {p.relative_to(PACKAGE).as_posix(): p for p in sorted(PACKAGE.rglob("*.py"))}
    del paths["private_names.py"]
    return {name: ast.parse(path.read_text()) for name, path in paths.items()}


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
    own = defined(trees())
    listed = {*ATTRIBUTES, *DOCUMENTED, *ENDS_OF_NAMES, *KEYS_OF_FILES}
    private = {file: used(tree, own) for file, tree in trees().items()}
    for file, names in private.items():
        # The last part of what a file looks up may be written out in it.
        parts = {name.rpartition(".")[2] for name in strings(trees()[file]) & NAMES.keys()}
        assert names - listed - parts == set(), file
    assert set().union(*private.values()) >= listed


def test_what_is_looked_up_is_what_is_listed() -> None:
    written = set().union(*map(strings, trees().values()))
    private = {text for text in written if PATH.fullmatch(text) and "._" in text}
    assert private == NAMES.keys() | LOADED_BY_OTHERS


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


def test_what_stands_on_a_missing_name_is_refused() -> None:
    with pytest.raises(li.LayerError, match="_not_there, which torch"):
        needed("torch._not_there", "a feature")


# ---------------------------------------------------------- the life of an adapter without a name

REFUSED = {
    "torch._C._will_engine_execute_node": {"trials"},
    "torch.Tensor._make_wrapper_subclass": {"packed experts"},
}


def without(name: str) -> dict[str, str]:
    """What fails of kinds of layers, trials and packed experts where a name is missing."""
    for module in [m for m in sys.modules if m.partition(".")[0] == "lora_inject"]:
        del sys.modules[module]
    gate = importlib.import_module("lora_inject.private")  # the package anew, without the name
    there = gate.look_up
    gate.look_up = lambda asked: None if asked == name else there(asked)
    kinds = {kind: partial(life, row) for kind, row in KINDS.items()}
    works = {**kinds, "trials": train, "packed experts": pack}
    raised = {what: refusal(run, Exception) for what, run in works.items()}
    return {what: repr(error) for what, error in raised.items() if error is not None}


def life(kind: Kind) -> None:
    import lora_inject as li

    model, inputs = Host(kind.layer()), kind.inputs(torch.float32)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    li.inject(model, kind.config)
    for parameter in li.adapter_parameters(model).values():
        nn.init.normal_(parameter, std=0.1)
    adapted = model(*inputs)
    adapted.pow(2).sum().backward()
    assert all(p.grad.isfinite().all() for p in li.adapter_parameters(model).values())
    state = li.adapter_state(model)
    li.install(li.eject(model), state)
    li.swap_adapter(model, state)
    torch.testing.assert_close(model(*inputs), adapted)
    li.merge(model)
    torch.testing.assert_close(model(*inputs), adapted, rtol=1e-4, atol=1e-5)
    after = li.eject(li.unmerge(model)).state_dict()
    assert all(torch.equal(after[key], value) for key, value in before.items())


def train() -> None:
    from lora_inject import Trial, Trials

    config = {"rank": 2, "targets": ["0"]}
    dropouts = {"a": 0.0, "b": 0.0, "c": 0.5, "d": 0.5}
    trials = {name: Trial(config | {"dropout": p}, lr=1e-2) for name, p in dropouts.items()}
    step = Trials(nn.Sequential(nn.Linear(4, 4)), trials).step
    step(torch.randn(3, 4), loss=lambda outputs, _: outputs.pow(2).mean())


def pack() -> None:
    from lora_inject.experts.packed_experts import PackedExperts
    from lora_inject.experts.stack_formats import Mxfp4Stack

    parts = {"codes": torch.zeros(2, 4, 16).byte(), "scales": torch.zeros(2, 4, 1).byte()}
    PackedExperts(Mxfp4Stack(), parts, torch.bfloat16).dequantize()


@pytest.mark.slow
@pytest.mark.parametrize("name", [n for n in NAMES if n.startswith("torch.")])
def test_what_does_not_stand_on_a_name_works_without_it(forks: Forks, name: str) -> None:
    wrong = forks.start(without, name).result()
    assert wrong.keys() == REFUSED.get(name, set()), wrong
    assert all(f"it stands on {name}, which torch" in said for said in wrong.values())
