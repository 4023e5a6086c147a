"""Every example in a docstring runs and prints what it says."""

import doctest
import importlib
import inspect
import pkgutil

import pytest
import torch

import lora_inject as li

MODULES = sorted({m.name for m in pkgutil.walk_packages(li.__path__, "lora_inject.")})
MODULES = ["lora_inject", *(name for name in MODULES if name != "lora_inject.__main__")]
PUBLIC = {name: getattr(li, name) for name in li.__all__ if name != "__version__"}


@pytest.mark.parametrize("name", MODULES)
def test_a_module_says_what_it_is_for_and_its_examples_run(name: str) -> None:
    module = importlib.import_module(name)
    first = (module.__doc__ or "").splitlines()[0]
    assert first.endswith((".", "?", "`.")), "the first line is a sentence"
    out: list[str] = []
    runner = doctest.DocTestRunner(optionflags=doctest.NORMALIZE_WHITESPACE)
    for test in doctest.DocTestFinder().find(module, module.__name__):
        torch.manual_seed(0)
        runner.run(test, out=out.append)
    assert runner.summarize(verbose=False).failed == 0, "".join(out)


@pytest.mark.parametrize("name", PUBLIC)
def test_the_public_names_are_documented(name: str) -> None:
    assert inspect.getdoc(PUBLIC[name])
