"""The config: what is accepted, what is refused with which words, and the way there and back."""

import copy
import json
import pickle
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from helpers.tables import rows
from hypothesis import given
from hypothesis import strategies as st

from lora_inject.core.spec.config import Axes, Config, Expect, Normal, Rule
from lora_inject.core.spec.schema import json_schema
from lora_inject.errors import ConfigError


def test_defaults_are_those_of_the_paper_code() -> None:
    config = Config(targets=["q_proj"])
    assert (config.version, config.rank, config.alpha, config.dropout) == (1, 8, 16.0, 0.0)
    assert (config.init, config.scaling, config.compute) == ("kaiming", "standard", "base")
    assert (config.exclude, config.train, config.bias, config.expect) == ((), (), "none", None)


def test_every_field_of_the_schema_is_read() -> None:
    text = r"""
        version: 1
        rank: 4
        alpha: 32
        dropout: 0.1
        init: {normal: 0.02}
        scaling: rslora
        compute: float32
        variant: dora
        lora_bias: true
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
            lora_bias: true
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
    config = Config.from_text(text)
    assert config.to_dict() == yaml.safe_load(text)
    assert config.init == Normal(normal=0.02)
    assert config.targets[1].slices == (("q", 768), ("k", 64), ("v", 64))
    assert config.targets[2].layers == ("16-31",)
    assert config.targets[3].layout == Axes(in_=[0], out=[1, 2])
    assert config.expect == Expect(sites=24, lora=294912, trainable=887811)


def test_configs_are_values() -> None:
    rule = Rule(match="c", slices={"q": 3, "k": 4}, adapt=["q"])
    config = Config(targets=["q", rule], init={"normal": 1})
    for copied in (copy.deepcopy(config), pickle.loads(pickle.dumps(config))):
        assert copied == config
        assert hash(copied) == hash(config)
    with pytest.raises(ValueError, match="frozen"):
        config.rank = 3  # type: ignore[misc]


# What is refused, and the words. A key alone is followed by a line `targets: [q]`.

REFUSED = r"""
rnak: 4 => f:1:1 (rnak): unknown key 'rnak'. Did you mean 'rank'?
init: {std: 0.1} => f:1:8 (init.std): unknown key 'std'. Did you mean 'normal'? Also: f:1:7 (init):
    'normal' is missing.
targets: [{match: q, alhpa: 3}] => f:1:22 (targets[0].alhpa): unknown key 'alhpa'. Did you mean
    'alpha'?
rnak: &rank 4 => A key cannot only hold an anchor: put it where its value is used first.
slices: [q, k] => 'slices' belongs under targets.
{foo: 1, rank: 0, alpha: 0, targets: [q]} => (foo): unknown key 'foo'. The keys are version, rank,
    alpha, dropout, init, scaling, compute, variant, lora_bias, targets, exclude, train, tokens,
    bias, expect. Also: f:1:16 (rank): 0 is not accepted; f:1:26 (alpha): 0 is not accepted.
rank: '8' => '8' is a word. Write 8, without quotes and leading zeros.
rank: 010 => '010' is a word. Write 10, without quotes and leading zeros.
rank: => there is no value. Write one, or remove the key.
alpha: 0 => 0 is not accepted. Write more than 0.
alpha: 1e999 => inf is not accepted. Write a finite number.
dropout: 1 => 1 is not accepted. Write less than 1.
bias: no => 'no' is not accepted. Did you mean 'none'?
variant: dor => there is no variant 'dor'. Did you mean 'dora'?
targets: q_proj => 'q_proj' is not accepted. Write a list: [q_proj].
expect: {} => nothing is expected. Give sites, lora or trainable.
targets: [12] => (targets[0]): 12 is not a rule. Write a pattern in single quotes, or a mapping with
targets: [{rank: 3}] => 'match' is missing. Add match: with its value.
targets: [q, '(q'] => f:1:14 (targets[1]): '(q' is not a regex: missing ), unterminated subpattern
    at position 0. Patterns are Python regexes; a literal dot is '\.'.
targets: ['.*'] => '.*' also matches an empty name. Write what must be there; '.+' matches every
targets: [{match: q, slices: [q, k]}] => not which of them to adapt. Add adapt: with some of q, k.
targets: [{match: q, slices: [q, k], adapt: [q, x]}] => there is no slice 'x'. The slices are q, k.
targets: [{match: q, slices: ['a b', k], adapt: [k]}] => Write a name of letters, digits and _
targets: [{match: q, layout: {in: [0, 0], out: [1]}}] => (targets[0].layout.in): [0, 0] has a
targets: [{match: q, layers: 5-3}] => '5-3' is not a range of layers. Write 16-31, or [0, 4, 8-11].
targets: [{match: q, layers: 1-٣}] => '1-٣' is not a range of layers.
{rank: 3} => it selects nothing: no targets, no train, tokens or bias. Add targets: with patterns
!x {targets: [q]} => the tag !x is not allowed. A config has strings, numbers, lists and mappings
targets: ["h\.d"] => found unknown escape character '.'. Write patterns in single quotes: there a
targets: [*q_proj] => found undefined alias 'q_proj'. Define the anchor before it is used; a pattern
    that begins with * needs quotes.
targets: &a [*a] => an alias contains itself. Write the value out.
[q_proj] => the config is not a mapping. Write keys and values, such as targets: [q_proj].
"""


@pytest.mark.parametrize(("text", "words"), rows(REFUSED))
def test_an_error_names_the_place_in_the_file_what_was_found_and_the_way_out(text, words) -> None:
    text += "\ntargets: [q]" if re.fullmatch(r"(?!targets)\w+:.*", text) else ""
    with pytest.raises(ConfigError) as caught:
        Config.from_text(text, source="f")
    assert words in str(caught.value)


VALUES: list[tuple[Callable[[], Any], str]] = [
    (lambda: Config(targets=["a", {"match": "b", "alpha": 0}]), "config (targets[1].alpha): 0 is "),
    (lambda: Config.from_dict({1: 2}), "config ([1]): 1 is not accepted. Write keys that are text"),
    (lambda: Config.coerce(3), "config: it is an int. Give a Config, a dict, the path of a YAML "),
    (lambda: Config.coerce("rank: 1\n"), "config: YAML text where a path "),
    (lambda: Config.from_yaml("a\0b"), "read a config, path: 'a\\x00b' has a zero byte. "),
    (lambda: Config.from_text(""), "<config>: the config is empty. Add targets: with patterns."),
    (lambda: Config.from_text("targets: [q]\n---\nrank: 3"), "<config>:2:1: this is not valid YAM"),
    (lambda: Config.from_text("rank: 3\nrank: 4"), "<config>:2:1 (rank): the key 'rank' is given "),
    (lambda: Config.from_text("targets: " + "[" * 5000), "<config>:1:25: this is not valid YAML: "),
    (lambda: Config(targets=["a{99999999999}"]), "config (targets[0]): 'a{99999999999}' is not a "),
]


@pytest.mark.parametrize(("make", "message"), VALUES)
def test_an_error_of_a_value_names_its_key(make: Callable[[], Any], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        make()
    assert str(caught.value).startswith(message)


def test_an_unsafe_tag_runs_nothing(tmp_path: Path) -> None:
    target = tmp_path / "pwned"
    text = f"targets: [!!python/object/apply:pathlib.Path.touch [!!python/name:x '{target}']]"
    with pytest.raises(ConfigError, match="not allowed"):
        Config.from_text(text)
    assert not target.exists()


def test_a_billion_laughs_are_refused_and_a_few_aliases_are_not() -> None:
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]" for i in range(1, 9)]
    with pytest.raises(ConfigError, match="more than 50,000 values once its aliases are written"):
        Config.from_text("\n".join(lines))
    config = Config.from_text(
        "targets:\n- &wide {match: q, rank: 64, alpha: 2}\n- {<<: *wide, match: k}\n"
        "- {<<: [*wide, {rank: 1, dropout: 0.5}], alpha: 3, match: v}\nexclude: &x [a]\ntrain: *x"
    )
    assert config.targets[1] == Rule(match="k", rank=64, alpha=2)
    assert config.targets[2] == Rule(match="v", rank=64, alpha=3, dropout=0.5)
    assert config.train == config.exclude == ("a",)


def test_numbers_and_words_mean_what_people_mean() -> None:
    """PyYAML, which reads YAML 1.1, takes 1e-3 for a text, and `no` for a boolean."""
    numbers = {"1e-3": 1e-3, "1.0e3": 1e3, "2E2": 200.0, ".5": 0.5, "1_000": 1e3, "+4": 4.0}
    for text, alpha in numbers.items():
        assert Config.from_text(f"alpha: {text}\ntargets: [q]").alpha == alpha
    words = ("no", "on", "2026-01-01", "010", "1:30", "0x1f", "=")
    config = Config.from_text(f"targets: [{', '.join(words)}]")
    assert tuple(rule.match for rule in config.targets) == words


# Files


def test_files_are_read_and_written(tmp_path: Path) -> None:
    path = tmp_path / "lora.yaml"
    config = Config(targets=["größe", Rule(match="v", rank=2)])
    path.write_text(config.to_yaml(), encoding="utf-8")
    for source in (path, str(path), config, config.to_dict()):
        assert Config.coerce(source) == config
    path.write_bytes(b"\xef\xbb\xbf" + config.to_yaml().encode())  # a BOM, as Windows editors write
    assert Config.from_yaml(path) == config


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    missing, binary, huge = tmp_path / "no.yaml", tmp_path / "model.bin", tmp_path / "huge.yaml"
    faulty = tmp_path / "faulty.yaml"
    faulty.write_text("targets: [q]\nrank: 0")
    binary.write_bytes(b"targets: [q]\n\xff\xfe")
    huge.write_bytes(b"#" * (1 << 20) + b"\ntargets: [q]")
    for path, problem in {
        missing: " there is no such file. Give the path of a YAML file.",
        tmp_path: " it is a folder.",
        binary: " byte 13 is not UTF-8. Save it as UTF-8 text.",
        faulty: "2:7 (rank): 0 is not accepted",
        huge: " more than 1,048,576 characters. ",
    }.items():
        with pytest.raises(ConfigError) as caught:
            Config.from_yaml(path)
        assert str(caught.value).startswith(f"{path}:{problem}")


# There and back

alphas = st.floats(min_value=0, exclude_min=True, max_value=1e38)
dropouts = st.floats(min_value=0, max_value=1, exclude_max=True, allow_nan=False)
inits = st.sampled_from(["kaiming", "gaussian", "pissa", "olora"]) | alphas.map(
    lambda std: Normal(normal=std)
)
names = st.from_regex(r"[A-Za-z_][A-Za-z0-9_]{0,5}", fullmatch=True)
# Text that YAML would read as something else, and any other text; both as literal patterns.
YAML_WORDS = r"""1e3 1.0e-3 10 010 on no null ~ 2026-01-01 << = # ' " !!x &a %a @a 0x1f 1:30
.inf a\.b (?i)q"""
patterns = st.one_of(
    st.sampled_from([*YAML_WORDS.split(), "a: b", "- a"]),
    st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=8),
).filter(lambda text: _made(lambda: Rule(match=text)) is not None)


def _made(make: Callable[[], Any]) -> Any:
    try:
        return make()
    except ConfigError:
        return None


@st.composite
def rules(draw: st.DrawFn) -> Rule:
    optional = {
        "rank": st.integers(1, 2**20),
        "alpha": alphas,
        "dropout": dropouts,
        "init": inits,
        "scaling": st.sampled_from(["standard", "rslora"]),
        "compute": st.sampled_from(["base", "float32"]),
        "layout": st.sampled_from(["out_in", "in_out", {"in": [1], "out": [0, 2]}]),
        "kind": names,
        "layers": st.sampled_from([3, "0-7", [1, "4-5"]]),
    }
    data = draw(st.fixed_dictionaries({"match": patterns}, optional=optional))
    if draw(st.booleans()):
        parts = draw(st.lists(names, min_size=2, max_size=4, unique=True))
        sized = draw(st.booleans())
        data["slices"] = {name: draw(st.integers(1, 99)) for name in parts} if sized else parts
        data["adapt"] = draw(st.lists(st.sampled_from(parts), min_size=1, unique=True))
    return Rule(**data)


counts = st.none() | st.integers(0, 2**50)
configs = st.builds(
    Config,
    rank=st.integers(1, 2**20),
    alpha=alphas,
    dropout=dropouts,
    init=inits,
    scaling=st.sampled_from(["standard", "rslora"]),
    compute=st.sampled_from(["base", "float32"]),
    targets=st.lists(rules() | patterns, min_size=1, max_size=3),
    exclude=st.lists(patterns, max_size=2),
    train=st.lists(patterns, max_size=2),
    bias=st.sampled_from(["none", "adapted", "all"]),
    expect=st.none() | st.builds(Expect, sites=st.integers(0, 99), lora=counts, trainable=counts),
)


@given(configs)
def test_a_config_is_the_same_after_yaml_and_after_json(config: Config) -> None:
    assert Config.from_text(config.to_yaml()) == config
    assert Config.from_dict(json.loads(json.dumps(config.to_dict()))) == config


WORDS = ["targets", "rank", "match", "init", "&a", "*a", "!!int", "!x", "1e9", "null", "<<: "]
fragments = st.sampled_from([*"[]{},'\"\\|>#8?%q\n", *WORDS, ": ", "- ", "  "])


@given(st.lists(fragments, max_size=25).map("".join) | st.text(max_size=40))
def test_any_text_is_a_config_or_a_config_error(text: str) -> None:
    config = _made(lambda: Config.from_text(text))
    assert config is None or Config.from_text(config.to_yaml()) == config


def test_the_json_schema_describes_every_key_to_an_editor() -> None:
    schema = json_schema()
    assert list(schema["properties"]) == list(Config.model_fields)
    rule = schema["$defs"]["Rule"]
    assert list(rule["properties"]) == list(Rule.model_fields)
    assert rule["required"] == ["match"]
    for part in (schema, *schema["$defs"].values()):
        assert part["additionalProperties"] is False
        for key, entry in part["properties"].items():
            assert len(entry["description"]) > 15, key
    assert '"null"' not in json.dumps(schema)
