"""How a refusal is tested: by its class, the places it names, its remedy, and what it leaves."""

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from conftest import snapshot
from torch import nn

import lora_inject as li

FOLDER_OF_A_TEST = re.compile(r"/[^' ]*/pytest-\d+/[^/' ]+")  # which is called as the test is


@contextmanager
def refused(
    kind: type[li.LoraInjectError], *names: str, model: nn.Module | None = None
) -> Iterator[pytest.ExceptionInfo[li.LoraInjectError]]:
    """Hold that the body raises `kind`, names each of `names`, has a remedy, and leaves `model`.

    A name is a place, a value or a way out that the user has to see: a site, a key, a path, an
    option. How the sentence around it reads is free. What is yielded has the error afterwards.
    """
    before = None if model is None else snapshot(model)
    with pytest.raises(kind) as raised:
        yield raised
    error = raised.value
    text = FOLDER_OF_A_TEST.sub("", str(error))
    missing = [name for name in names if name not in (text if "/" not in name else str(error))]
    assert not missing, f"'{error}' does not name {missing}"
    assert error.found, error
    assert error.remedy, error
    if model is not None:
        assert snapshot(model) == before, "the refused call changed the model"


def said(run: Callable[[], Any]) -> str:
    """What a refusal says, with its class; empty where it went through."""
    try:
        run()
    except li.LoraInjectError as raised:
        return f"{type(raised).__name__}: {raised}"
    return ""
