"""The words of errors: `messages.yaml` has them whole where users meet them often."""

import ast
import pkgutil
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import yaml
from conftest import fill
from helpers.models import tiny_llama
from safetensors.torch import save_file
from torch import nn

import lora_inject as li

TABLE = yaml.safe_load((Path(__file__).parent / "messages.yaml").read_text(encoding="utf-8"))
MESSAGES = {what: (kind, text) for kind, rows in TABLE.items() for what, text in rows.items()}
Q = {"rank": 2, "targets": ["q_proj"]}


def net() -> nn.ModuleDict:
    torch.manual_seed(0)
    names = {"q_proj": 8, "v_proj": 4}
    layers = [nn.ModuleDict({n: nn.Linear(6, out) for n, out in names.items()}) for _ in range(2)]
    return nn.ModuleDict({"layers": nn.ModuleList(layers), "head": nn.Linear(8, 3)})


def injected() -> nn.ModuleDict:
    return li.inject(net(), Q)


def saved(folder: Path) -> Path:
    return li.save_adapter(injected(), folder / "sql", unused=[".*"])


def rows_that_are_not_the_batch(folder: Path) -> None:
    model = li.inject(nn.Sequential(nn.Linear(4, 4)), {"rank": 1, "targets": ["0"]})
    with li.routed(model, ["default", None, "default"]):
        model(torch.zeros(2, 4))


def unmerging_what_was_not_kept(folder: Path) -> None:
    model = injected()
    li.merge(model, undo=False)
    li.unmerge(model)


def adding_adapters_of_two_bases(folder: Path) -> None:
    """Which differ in one value, of those that the adapters move."""
    states = []
    for value in (0.0, 0.5):
        model = net()
        weight = model["layers"][0]["q_proj"].weight
        with torch.no_grad():
            weight[3, 1] = value
            li.inject(model, Q)
            li.adapter_parameters(model)["layers.0.q_proj.lora_B"][3] = 1.0
        states.append(li.adapter_state(model))
    li.combine(states)


def saving_what_training_left_out(folder: Path) -> None:
    model = li.inject(net(), {"rank": 2, "targets": ["q_proj", "head"]})
    for layer in model["layers"]:
        layer["q_proj"](torch.ones(1, 6)).sum().backward()
    torch.optim.SGD(li.adapter_parameters(model).values(), lr=1.0).step()
    li.save_adapter(model, folder / "sql")


def an_adapter_of_another_base(folder: Path) -> None:
    other = net()
    with torch.no_grad():
        other["layers"][0]["q_proj"].weight.add_(0.01)
    li.load_adapter(other, saved(folder))


def an_adapter_of_another_checkpoint(folder: Path) -> None:
    save_file({"other.weight": torch.zeros(3, 3)}, folder / "model.safetensors")
    li.merge_checkpoint(folder, [saved(folder)], folder.parent / "merged")


def a_server_without_its_scheme(folder: Path) -> None:
    model = fill(li.inject(tiny_llama(initializer_range=0.2), {"targets": ["all-linear"]}))
    path = li.save_adapter(model, folder / "sql", probe=[[1, 2, 3, 4]])
    li.verify_served("localhost:8000", path)


def an_unknown_key(folder: Path) -> None:
    text = "rank: 4\ntargets: [q_proj]\nexpct: {sites: 2}\n"
    li.Config.from_text(text, source="lora.yaml")


def a_delta_that_rounding_eats(folder: Path) -> None:
    li.merge(fill(li.inject(net().bfloat16(), Q), std=1e-4), min_kept=0.9)


# Each makes one, the way a user would.
MISTAKES: dict[str, Callable[[Path], object]] = {
    "An unknown key": an_unknown_key,
    "A rule that matches nothing": lambda _: li.plan(net(), {"targets": [r"layers\.\d+\.v_prj"]}),
    "A class instead of a model": lambda _: li.inject(nn.Linear, Q),
    "A delta that rounding eats": a_delta_that_rounding_eats,
    "Rows that are not the batch": rows_that_are_not_the_batch,
    "A name in use": lambda _: li.inject(injected(), Q),
    "Unmerging what was not kept": unmerging_what_was_not_kept,
    "Adding adapters of two bases": adding_adapters_of_two_bases,
    "Saving what training left out": saving_what_training_left_out,
    "An adapter of another base": an_adapter_of_another_base,
    "An adapter of another checkpoint": an_adapter_of_another_checkpoint,
    "A server without its scheme": a_server_without_its_scheme,
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_the_message_is_word_for_word(mistake: str, tmp_path: Path) -> None:
    kind, text = MESSAGES[mistake]
    with pytest.raises(li.LoraInjectError) as raised:
        MISTAKES[mistake](tmp_path)
    error = raised.value
    assert type(error) is getattr(li, kind)
    said = str(error).replace(str(tmp_path), "TMP")
    if "NUMBER" in text:
        said = re.sub(r"-?\d+\.\d+(?:e-?\d+)?", "NUMBER", said)
    assert said == text
    assert error.args == (error.asked, error.found, error.remedy)


def test_every_class_of_error_has_a_message_and_every_message_a_mistake() -> None:
    kinds = {name for name in li.__all__ if name.endswith("Error")} - {"LoraInjectError"}
    assert TABLE.keys() == kinds
    assert MESSAGES.keys() == MISTAKES.keys()


def attending_in_a_nested_batch() -> None:
    attention = nn.MultiheadAttention(4, 2, batch_first=True)
    x = torch.nested.as_nested_tensor([torch.ones(1, 4), torch.ones(2, 4)])
    attention(x, x, x)


# What a user does to see a message that is a heading of docs/questions.md, in its order.
QUESTIONS: tuple[Callable[[], object], ...] = (
    lambda: net()["head"].requires_grad_(False)(torch.ones(8)).sum().backward(),
    lambda: net().load_state_dict(injected().state_dict()),
    attending_in_a_nested_batch,
    lambda: li.unmerge(net()),
    lambda: li.inject(net(), {"targets": ["head"], "train": ["head"]}),
)


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors:UserWarning")
def test_headings_of_questions_are_what_is_seen(tmp_path: Path) -> None:
    """A search for a message has to find it; `...` stands for what differs."""
    page = Path(__file__).parents[2] / "docs" / "questions.md"
    quoted = re.findall(r'^## "(.+)"$', page.read_text(encoding="utf-8"), re.MULTILINE)
    mistakes = (*QUESTIONS, lambda: an_adapter_of_another_base(tmp_path))
    for heading, mistake in zip(quoted, mistakes, strict=True):
        with pytest.raises(Exception) as raised:  # noqa: PT011 - torch's own words, too
            mistake()
        parts = [part.strip() for part in heading.split("...")]
        assert [part for part in parts if part not in str(raised.value)] == []


def test_what_a_message_names_in_the_package_exists() -> None:
    """Names in strings of the source: what is called, and what lies in a module."""
    package = Path(li.__file__).parent
    pattern = re.compile(r"\blora_inject(?:\.\w+)+(?=\()|\blora_inject\.\w+\.[\w.]*\w")
    named: set[str] = set()
    for path in package.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                named |= {*pattern.findall(node.value)}
    assert len(named) > 5
    for name in sorted(named):
        file = (package.parent / name.replace(".", "/")).with_suffix(".py")
        assert file.exists() or pkgutil.resolve_name(name) is not None, name
