"""The config: what is accepted, what is refused at which place, and the way there and back."""

import copy
import json
import pickle
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from helpers.refusals import refused
from helpers.tables import rows
from hypothesis import example, given
from hypothesis import strategies as st

import lora_inject as li


def test_defaults_are_those_of_the_paper_code() -> None:
    config = li.Config(targets=["q_proj"])
    assert (config.version, config.rank, config.alpha, config.dropout) == (1, 8, 16.0, 0.0)
    assert (config.init, config.scaling, config.compute) == ("kaiming", "standard", "base")
    assert (config.exclude, config.train, config.bias, config.expect) == ((), (), "none", None)


EVERY_FIELD = r"""
version: 1
rank: 4
alpha: 32
dropout: 0.1
init: {normal: 0.02}
scaling: rslora
compute: float32
variant: dora
targets:
  - q_proj
  - match: 'h\.\d+\.attn\.c_attn'
    rank: 2
    alpha: 3.5
    dropout: 0
    init: pissa
    scaling: standard
    compute: base
    variant: lora
    slices: {q: 768, k: 64, v: 64}
    adapt: [v, q]
  - {match: 'experts\.up', layout: in_out, kind: parameter, layers: [16-31]}
  - {match: Wq, layout: {in: [0], out: [1, 2]}, layers: [0, 4-7]}
  - {match: c_attn, slices: [q, k], adapt: [k]}
exclude: [lm_head]
train: ['classifier\..*']
tokens: {embed: [3, 1]}
bias: adapted
expect: {sites: 24, lora: 294912, trainable: 887811}
"""


def test_every_field_of_the_schema_is_read() -> None:
    config = li.Config.from_text(EVERY_FIELD)
    assert config.to_dict() == yaml.safe_load(EVERY_FIELD)
    assert config.targets[1].slices == (("q", 768), ("k", 64), ("v", 64))
    assert config.targets[2].layers == ("16-31",)
    assert config.expect == li.classes.Expect(sites=24, lora=294912, trainable=887811)


def test_configs_are_values() -> None:
    rule = li.classes.Rule(match="c", slices={"q": 3, "k": 4}, adapt=["q"])
    config = li.Config(targets=["q", rule], init={"normal": 1})
    for copied in (copy.deepcopy(config), pickle.loads(pickle.dumps(config))):
        assert copied == config
        assert hash(copied) == hash(config)
    with pytest.raises(ValueError, match="frozen"):
        config.rank = 3  # type: ignore[misc]


# What is refused: the place in the file, what was found there, and the way out.
# A key alone is followed by a line `targets: [q]`.

REFUSED = r"""
rnak: 4 => f:1:1 (rnak) | 'rnak' | 'rank'?
init: {std: 0.1} => f:1:8 (init.std) | 'std' | 'normal'?
targets: [{match: q, alhpa: 3}] => f:1:22 (targets[0].alhpa) | 'alhpa' | 'alpha'?
slices: [q, k] => 'slices' | targets
lora_bias: true => f:1:1 (lora_bias) | does not train | bias: adapted
{foo: 1, rank: 0, alpha: 0, targets: [q]} => (foo) | 'foo' | version, rank, alpha, dropout, init,
    scaling, compute, variant, targets, exclude, train, tokens, bias, expect |
    f:1:16 (rank) | f:1:26 (alpha)
rank: '8' => f:1:7 (rank) | '8' | integer
rank: 010 => '010' | integer
rank: => f:1:6 | remove the key
alpha: 0 => (alpha) | 0 | greater than 0
alpha: 1e999 => (alpha) | inf | finite
dropout: 1 => (dropout) | 1 | less than 1
bias: no => (bias) | 'no' | 'none'?
variant: dor => (variant) | 'dor' | 'dora'?
variant: Dora => (variant) | 'Dora' | 'dora'?
version: '1' => (version) | '1' | should be 1
alpha: 1.0e+308 => (alpha)
init: {normal: 1.0e+308} => (init
targets: q_proj => (targets) | 'q_proj' | [q_proj]
expect: {} => (expect) | sites, lora
targets: [12] => (targets[0]) | 12 | mapping
targets: [{rank: 3}] => (targets[0]) | 'match' | match:
targets: [q, '(q'] => f:1:14 (targets[1]) | '(q' | regex | position 0 | '\.'
targets: ['.*'] => '.*' | empty name | '.+'
targets: [{match: q, slices: [q, k]}] => (targets[0]) | adapt: | q, k
targets: [{match: q, slices: [q, k], adapt: [q, x]}] => 'x' | q, k
targets: [{match: q, slices: ['a b', k], adapt: [k]}] => a b | [A-Za-z_]
targets: [{match: q, layout: {in: [0, 0], out: [1]}}] => (targets[0].layout.in) | [0, 0]
targets: [{match: q, layers: 5-3}] => '5-3' | 16-31
targets: [{match: q, layers: 1-٣}] => '1-٣'
{rank: 3} => no targets, no train, tokens or bias | targets:
!x {targets: [q]} => f:1:1 | !x | tags
targets: ["h\.d"] => f:1:14 | '.' | single quotes
targets: [*q_proj] => f:1:11 | 'q_proj' | quotes
targets: &a [*a] => f:1:10 | recursive
[q_proj] => mapping | targets: [q_proj]
"""


@pytest.mark.parametrize(("text", "named"), rows(REFUSED))
def test_an_error_names_the_place_in_the_file_what_was_found_and_the_way_out(text, named) -> None:
    text += "\ntargets: [q]" if re.fullmatch(r"(?!targets)\w+:.*", text) else ""
    with refused(li.ConfigError, *named.split(" | ")):
        li.Config.from_text(text, source="f")


def unfolding(*, lists: bool, levels: int = 12) -> str:
    """A few lines whose aliases stand for nine to the power of `levels` values."""
    first, each = ("[q]", "[{}]") if lists else ("{match: q}", "{{<<: [{}], match: q}}")
    more = (each.format(", ".join([f"*a{n}"] * 9)) for n in range(levels))
    lines = [f"  - &a{n} {text}" for n, text in enumerate([first, *more])]
    return "\n".join(["rank: 4", "targets:", *lines])


@pytest.mark.parametrize("lists", [True, False])
def test_aliases_that_never_end_are_refused_at_their_entry(lists: bool) -> None:
    with refused(li.ConfigError, "f:7:", "(targets[4]", "aliases", "10,000"):
        li.Config.from_text(unfolding(lists=lists), source="f")
    few = unfolding(lists=lists, levels=3)
    if lists:
        with refused(li.ConfigError, "f:3:5 (targets[0])", "['q']"):
            li.Config.from_text(few, source="f")
    else:
        assert len(li.Config.from_text(few).targets) == 4


KEYS_OF_PEFT = ["r", "lora_alpha", "target_modules", "lora_dropout", "use_rslora", "peft_type"]
KEYS_OF_PEFT += ["modules_to_save", "exclude_modules", "layers_to_transform", "use_dora"]
KEYS_OF_PEFT += ["target_parameters"]
FROM_PEFT = "lora_inject.from_peft"
TWO_RULES: dict[str, Any] = {"targets": ["a", {"match": "b", "alpha": 0}]}
VALUES: list[tuple[Callable[[], Any], list[str]]] = [
    (lambda: li.Config(**TWO_RULES), ["config (targets[1].alpha)", "0"]),
    (lambda: li.Config(targets=["a{99999999999}"]), ["config (targets[0])", "'a{99999999999}'"]),
    (lambda: li.Config.from_dict({1: 2}), ["config ([1])", "Keys should be strings"]),
    (lambda: li.Config.coerce(3), ["config", "int", "YAML"]),
    (lambda: li.Config.from_yaml(5), ["int", "path"]),  # type: ignore[arg-type]
    (lambda: li.Config.from_yaml(None), ["None", "path"]),  # type: ignore[arg-type]
    *(
        (lambda text=text: li.Config.coerce(text), ["text where a path", "from_text"])
        for text in ("{rank: 4, targets: [q]}", f"{{rank: 4, targets: [{'q, ' * 99}]}}")
    ),
    (lambda: li.Config.from_yaml("q" * 300), ["qqq", "no such file"]),
    (lambda: li.Config(targets={"q"}), ["(targets)", "{'q'}", "[q]"]),  # type: ignore[arg-type]
    (lambda: li.Config.coerce("rank: 1\n"), ["config", "YAML text", "path"]),
    (lambda: li.Config.from_yaml("a\0b"), [r"'a\x00b'", "zero byte"]),
    (lambda: li.Config.from_text(""), ["<config>", "empty", "targets:"]),
    (lambda: li.Config.from_text("targets: [q]\n---\nrank: 3"), ["<config>:2:1"]),
    (lambda: li.Config.from_text("rank: 3\nrank: 4"), ["<config>:2:1", "'rank'"]),
    (lambda: li.Config.from_text("targets: " + "[" * 5000), ["<config>", "recursion"]),
    *(
        (lambda key=key: li.Config.from_dict({"targets": ["q"], key: 8}), [f"'{key}'", FROM_PEFT])
        for key in KEYS_OF_PEFT
    ),
]


@pytest.mark.parametrize(("make", "names"), VALUES)
def test_an_error_of_a_value_names_its_key(make: Callable[[], Any], names: list[str]) -> None:
    with refused(li.ConfigError, *names):
        make()


def test_a_key_that_is_none_of_pefts_does_not_hint_at_peft() -> None:
    with pytest.raises(li.ConfigError) as raised:
        li.Config.from_dict({"targets": ["q"], "rnak": 8})
    assert FROM_PEFT not in str(raised.value)


def test_an_unsafe_tag_runs_nothing(tmp_path: Path) -> None:
    target = tmp_path / "pwned"
    text = f"targets: [!!python/object/apply:pathlib.Path.touch [!!python/name:x '{target}']]"
    with refused(li.ConfigError, "tag"):
        li.Config.from_text(text)
    assert not target.exists()


def test_aliases_and_merged_mappings_are_read() -> None:
    config = li.Config.from_text(
        "targets:\n- &wide {match: q, rank: 64, alpha: 2}\n- {<<: *wide, match: k}\n"
        "- {<<: *wide, alpha: 3, match: v}\nexclude: &x [a]\ntrain: *x"
    )
    assert config.targets[1] == li.classes.Rule(match="k", rank=64, alpha=2)
    assert config.targets[2] == li.classes.Rule(match="v", rank=64, alpha=3)
    assert config.train == config.exclude == ("a",)


def test_numbers_and_words_mean_what_people_mean() -> None:
    """PyYAML, which reads YAML 1.1, takes 1e-3 for a text, and `no` for a boolean."""
    numbers = {"1e-3": 1e-3, "1.0e3": 1e3, "2E2": 200.0, ".5": 0.5, "1_000": 1e3, "+4": 4.0}
    for text, alpha in numbers.items():
        assert li.Config.from_text(f"alpha: {text}\ntargets: [q]").alpha == alpha
    words = ("no", "on", "2026-01-01", "010", "1:30", "0x1f", "=")
    config = li.Config.from_text(f"targets: [{', '.join(words)}]")
    assert tuple(rule.match for rule in config.targets) == words


# Files


def test_files_are_read_and_written(tmp_path: Path) -> None:
    path = tmp_path / "lora.yaml"
    config = li.Config(targets=["größe", li.classes.Rule(match="v", rank=2)])
    path.write_text(config.to_yaml(), encoding="utf-8")
    for source in (path, str(path), config, config.to_dict()):
        assert li.Config.coerce(source) == config
    path.write_bytes(b"\xef\xbb\xbf" + config.to_yaml().encode())  # a BOM, as Windows editors write
    assert li.Config.from_yaml(path) == config


UNREADABLE: dict[str, tuple[bytes | None, list[str]]] = {
    "missing": (None, ["No such file", "path of a YAML file"]),
    "not UTF-8": (b"targets: [q]\n\xff\xfe", ["byte 13", "UTF-8"]),
    "faulty": (b"targets: [q]\nrank: 0", [":2:7 (rank)", "0"]),
}


@pytest.mark.parametrize("case", UNREADABLE)
def test_files_that_cannot_be_read(case: str, tmp_path: Path) -> None:
    content, names = UNREADABLE[case]
    path = tmp_path / "lora.yaml"
    if content is not None:
        path.write_bytes(content)
    with refused(li.ConfigError, str(path), *names):
        li.Config.from_yaml(path)
    with refused(li.ConfigError, str(tmp_path), "directory"):
        li.Config.from_yaml(tmp_path)


# There and back

# Text that YAML would read as something else or break, and any other text.
YAML_WORDS = r"""1e3 1.0e-3 10 010 on no null ~ 2026-01-01 << = # ' " !!x &a %a @a 0x1f 1:30
.inf a\.b (?i)q"""
TEXTS = [*YAML_WORDS.split(), "a: b", "- a", "a\nb", "a\x85b", "a\u2028b"]
any_text = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=8)
patterns = any_text.filter(lambda text: made(lambda: li.classes.Rule(match=text)) is not None)


def made(make: Callable[[], Any]) -> Any:
    try:
        return make()
    except li.ConfigError:
        return None


@given(
    st.lists(patterns, min_size=1, max_size=3),
    st.lists(patterns, max_size=2),
    st.floats(min_value=0, exclude_min=True, max_value=1e38),
)
@example(TEXTS, TEXTS, 1.0)
def test_a_config_is_the_same_after_yaml_and_after_json(
    targets: list[str], exclude: list[str], alpha: float
) -> None:
    fields = yaml.safe_load(EVERY_FIELD)
    fields |= {"targets": [*fields["targets"], *targets], "exclude": exclude, "alpha": alpha}
    config = li.Config.from_dict(fields)
    assert li.Config.from_text(config.to_yaml()) == config
    assert li.Config.from_dict(json.loads(json.dumps(config.to_dict()))) == config


WORDS = ["targets", "rank", "match", "init", "&a", "*a", "!!int", "!x", "1e9", "null", "<<: "]
fragments = st.sampled_from([*"[]{},'\"\\|>#8?%q\n", *WORDS, ": ", "- ", "  "])


@given(st.lists(fragments, max_size=25).map("".join) | st.text(max_size=40))
def test_any_text_is_a_config_or_a_config_error(text: str) -> None:
    config = made(lambda: li.Config.from_text(text))
    assert config is None or li.Config.from_text(config.to_yaml()) == config


def test_the_json_schema_describes_every_key_to_an_editor(run: Any) -> None:
    schema = json.loads(run("schema").out)
    assert list(schema["properties"]) == list(li.Config.model_fields)
    rule = schema["$defs"]["Rule"]
    assert list(rule["properties"]) == list(li.classes.Rule.model_fields)
    assert rule["required"] == ["match"]
    for part in (schema, *schema["$defs"].values()):
        assert part["additionalProperties"] is False
        for key, entry in part["properties"].items():
            assert len(entry["description"]) > 15, key
    assert '"null"' not in json.dumps(schema)
