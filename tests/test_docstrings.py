"""Every example in a docstring runs and prints what it says, and docstrings say what is due.

Documentation that a test runs cannot go stale. ruff checks the form (Google style); here
it is checked that sections and signatures agree.
"""

import doctest
import importlib
import inspect
import pkgutil
import re
import types

import pytest
import torch

import lora_inject as li

MODULES = sorted(
    {"lora_inject"}
    | {m.name for m in pkgutil.walk_packages(li.__path__, "lora_inject.")
       if m.name != "lora_inject.__main__"}
)  # fmt: skip


def run_examples(module: types.ModuleType) -> tuple[doctest.TestResults, str]:
    """Run the examples of a module; the text says what went wrong."""
    out: list[str] = []
    runner = doctest.DocTestRunner(optionflags=doctest.NORMALIZE_WHITESPACE)
    for test in doctest.DocTestFinder().find(module, module.__name__):
        torch.manual_seed(0)
        runner.run(test, out=out.append)
    return runner.summarize(verbose=False), "".join(out)


@pytest.mark.parametrize("name", MODULES)
def test_examples_run(name):
    results, text = run_examples(importlib.import_module(name))
    assert results.failed == 0, text


def test_there_are_examples():
    find = doctest.DocTestFinder().find
    tests = [test for name in MODULES for test in find(importlib.import_module(name), name)]
    assert sum(len(test.examples) for test in tests) > 100


def test_a_wrong_example_is_found():
    module = types.ModuleType("wrong", ">>> 1 + 1\n3\n")
    assert run_examples(module)[0].failed == 1


@pytest.mark.parametrize("name", MODULES)
def test_a_module_says_what_it_is_for(name):
    text = importlib.import_module(name).__doc__ or ""
    assert text.splitlines()[0].endswith((".", "?", "`.")), "the first line is a sentence"


def public() -> dict[str, object]:
    return {name: getattr(li, name) for name in li.__all__ if name != "__version__"}


@pytest.mark.parametrize("name", list(public()))
def test_the_public_names_are_documented(name):
    thing = public()[name]
    doc = inspect.getdoc(thing) or ""
    assert doc
    if not inspect.isfunction(thing):
        return
    signature = inspect.signature(thing)
    stated = re.findall(r"^    \*{0,2}(\w+):", _section(doc, "Args"), re.MULTILINE)
    parameters = list(signature.parameters)
    if len(parameters) > 1 or stated:
        assert stated == parameters
    if "raise " in inspect.getsource(thing):
        assert _section(doc, "Raises")


def _section(doc: str, name: str) -> str:
    found = re.search(rf"^{name}:\n((?:    .*\n?|\n)*)", doc, re.MULTILINE)
    return found.group(1) if found else ""
