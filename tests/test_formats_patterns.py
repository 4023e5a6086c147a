"""PEFT's name patterns hit the same sites as in PEFT."""

import re
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lora_inject.errors import FormatError
from lora_inject.formats.model_facts import ModelFacts
from lora_inject.formats.peft import name_patterns
from lora_inject.formats.peft.name_patterns import pattern_keys, values_of, whole_modules

NAMES = [
    "lin", "xlin", "a.lin", "a.b.lin", "a.bxlin", "a-b", "a.l+n", "lin.a", "a.b", "aXb", "x.aXb",
    "^lin",
]  # fmt: skip
KEYS = r"""
lin a\.lin a.lin ^lin ^a\.lin$ .*\.lin .*lin (.*\.)?lin lin$ a\.l\+n a-b a\-b a.b a\.b b.lin \^lin
^\^lin ... ^ a|lin [ab]+ .*[.]l\w+ a(?!X)\S l.n a?
"""


def peft_takes(key: str, name: str) -> bool:
    """The line of PEFT, peft/utils/other.py."""
    return re.match(rf"(.*\.)?({key})$", name) is not None


@pytest.mark.parametrize("key", ["", *KEYS.split()])
def test_a_key_hits_what_it_hits_in_peft(key: str) -> None:
    assert values_of({key: 1}, NAMES, 0) == {name: int(peft_takes(key, name)) for name in NAMES}


def test_a_key_that_takes_forever_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(name_patterns, "MATCH_SECONDS", 0.2)
    bombs = {f"(a|a)+b|(a|a)+c{n}": 4 for n in range(50)}
    start = time.process_time()
    with pytest.raises(FormatError, match="to match"):
        values_of(bombs, ["a" * 40], 8)
    assert time.process_time() - start < 2


components = st.text("ab.+x0", min_size=1, max_size=5)


@settings(max_examples=100)
@given(st.dictionaries(components, st.integers(1, 3), min_size=1, max_size=6), st.integers(1, 3))
def test_written_tables_give_each_site_its_value_in_any_order(values, default) -> None:
    keys = pattern_keys(values, default)
    for table in (list(keys.items()), list(keys.items())[::-1]):
        for name, value in values.items():
            in_peft = next((v for k, v in table if peft_takes(k, name)), default)
            here = values_of(dict(table), [name], default)[name]
            assert in_peft == here == value


TENSORS = [
    "h.ln.weight", "h.ln.bias", "h.norm.weight", "h.fc.weight", "h.fc.bias", "bn.weight", "root",
    "bn.running_mean", "classifier.dense.weight", "classifier.dense.bias", "classifier.out.weight",
    "xh.norm.weight", "axb.fc.weight", "a.b.weight", "axb.d.weight", "e.b.weight",
]  # fmt: skip


@pytest.mark.parametrize(
    ("trained", "whole"),
    [
        ("h.ln.weight h.ln.bias", ["h.ln"]),
        ("h.ln.weight", []),
        ("bn.weight", []),
        ("root", []),
        ("h.norm.weight", []),  # PEFT would take xh.norm as well
        ("xh.norm.weight", ["xh.norm"]),
        ("classifier.dense.weight classifier.dense.bias classifier.out.weight", ["classifier"]),
        ("classifier.dense.weight classifier.dense.bias", ["classifier.dense"]),
        ("a.b.weight", []),  # as an expression it hits axb, where PEFT would adapt nothing
        ("e.b.weight", ["e.b"]),
    ],
)
def test_a_module_is_kept_whole_where_peft_keeps_the_same_one(trained: str, whole: str) -> None:
    facts = ModelFacts(None, TENSORS)
    assert whole_modules(trained.split(), facts, sites=["h.fc", "axb.fc"]) == whole
