"""Matching: which names a pattern means, which sites come of them, and the words when none do."""

import json
import math
import re
from dataclasses import replace
from itertools import product
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import lora_inject as li
from lora_inject.core.spec import bounded_patterns
from lora_inject.core.spec.config import Config, Expect, Rule
from lora_inject.core.spec.inventory import Candidate, Inventory
from lora_inject.core.spec.key_lists import inventory_of
from lora_inject.core.spec.matching import resolve
from lora_inject.core.spec.names import canonical
from lora_inject.core.spec.patterns import matching
from lora_inject.core.spec.plan import Plan
from lora_inject.core.spec.spellings import templates as templates_of
from lora_inject.errors import LayerError, MatchError


def linear(name: str, n_in: int = 8, n_out: int = 8, **more: Any) -> Candidate:
    return Candidate(name, "linear", n_in, n_out, (n_out, n_in), f"{name}.weight", **more)


def embedding(name: str, num: int = 32, dim: int = 8, **more: Any) -> Candidate:
    weight = f"{name}.weight"
    return Candidate(name, "embedding", num, dim, (num, dim), weight, transposed=True, **more)


def parameter(name: str, *shape: int, **more: Any) -> Candidate:
    owner = name.rpartition(".")[0]
    experts = {"experts": shape[0], "needs_layout": True} if len(shape) > 2 else {}
    n_out, n_in = shape[-2:]
    return Candidate(
        name, "parameter", n_in, n_out, shape, name, owner=owner, update="weight", **experts, **more
    )


def inventory(
    *candidates: Candidate,
    others: dict[str, str] | None = None,
    parameters: dict[str, tuple[int, ...]] | None = None,
    aliases: dict[str, str] | None = None,
    **more: Any,
) -> Inventory:
    shapes = {c.weight: c.weight_shape for c in candidates if c.weight} | (parameters or {})
    further = dict(aliases or {})
    for candidate in candidates:  # a tied tensor is listed under its first name
        for name in sorted({candidate.weight, *candidate.tied} & shapes.keys())[1:]:
            further[name] = min({candidate.weight, *candidate.tied} & shapes.keys())
        inside = [name for name in shapes if name.startswith(f"{candidate.name}.")]
        for alias in candidate.aliases:
            further |= {alias + name.removeprefix(candidate.name): name for name in inside}
    shapes = {name: shape for name, shape in shapes.items() if name not in further}
    return Inventory(candidates, others or {}, shapes, aliases=further, **more)


def tower(n_layers: int = 2) -> Inventory:
    """A small decoder: q, k, v, out; up, down; norms; an embedding and a head."""
    candidates, others, extra = [embedding("model.embed")], {"model": "container"}, {}
    for i in range(n_layers):
        layer = f"model.layers.{i}"
        others |= {layer: "container", f"{layer}.attn": "container", f"{layer}.mlp": "container"}
        others |= {f"{layer}.norm": "LayerNorm", f"{layer}.attn.drop": "Dropout"}
        extra |= {f"{layer}.norm.weight": (8,), f"{layer}.norm.bias": (8,)}
        for name in ("attn.q_proj", "attn.k_proj", "attn.v_proj", "attn.out_proj"):
            candidates.append(linear(f"{layer}.{name}"))
            extra |= {f"{layer}.{name}.bias": (8,)}
        candidates += [linear(f"{layer}.mlp.up", 8, 16), linear(f"{layer}.mlp.down", 16, 8)]
    candidates.append(linear("lm_head", 8, 32))
    more = {"heads": ("lm_head",), "buffers": ("model.norm.running_mean",)}
    return inventory(*candidates, others=others, parameters=extra, **more)


def site_names(plan: Plan) -> list[str]:
    return [site.name for site in plan.sites]


def refused(config: Config, names: Inventory, error: type[Exception] = MatchError) -> str:
    with pytest.raises(error) as caught:
        resolve(config, names)
    return str(caught.value)


# Names


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("model.layers.0.q", "model.layers.0.q"),
        ("_orig_mod.model.q", "model.q"),
        ("_orig_mod._orig_mod.q", "q"),
        ("m._fsdp_wrapped_module.0._checkpoint_wrapped_module.q", "m.0.q"),
        ("module.q", "module.q"),
        ("q.parametrizations.weight.original", "q.parametrizations.weight.original"),
        ("my_orig_mod.q", "my_orig_mod.q"),
        ("_orig_mod", ""),
        ("", ""),
    ],
)
def test_canonical_names(name: str, expected: str) -> None:
    assert canonical(name) == expected


@pytest.mark.parametrize(
    ("pattern", "hits", "misses"),
    [
        ("Wq", ["Wq", "a.Wq", "a.b.Wq"], ["aWq", "a.Wqx", "a.Wq.weight", "wq", "Wq."]),
        ("q_proj", ["a.q_proj"], ["a.q_proj_norm", "a.my_q_proj", "q_proj.x", "a.q-q_proj"]),
        (r"attn\.W[qv]", ["attn.Wq", "h.0.attn.Wv"], ["attn.Wk", "xattn.Wq", "attn_Wq"]),
        (r"^enc\.layer\.0\..*", ["enc.layer.0.q"], ["x.enc.layer.0.q", "enc.layer.0"]),
        ("^q", ["q"], ["a.q"]),
        ("q$", ["q", "a.q"], ["q.a"]),
        ("a|b", ["a", "x.a", "x.b"], ["ab", "x.ab", "a.x"]),
        ("^a|b", ["a", "x.b"], ["x.a"]),
        ("(a)(b)\\2", ["abb", "x.abb"], ["aba"]),
        ("(?P<n>[qk])_(?P=n)", ["x.q_q"], ["x.q_k"]),
        (r"(q)?x(?(1)y|z)", ["qxy", "xz", "a.xz"], ["qxz", "a.xy"]),
        ("(?i)Q_PROJ", ["a.q_proj"], ["a.q_projx"]),
        ("(?i)(?s)Q", ["a.q"], ["a.k"]),
        ("(?i:Q)_proj", ["a.q_proj"], ["a.Q_PROJ"]),
        ("(?x) q _ proj  # the query", ["a.q_proj"], ["a.k_proj"]),
        ("(?x)\n q  # query\n | k  # key", ["a.q", "a.k"], ["a.v"]),
        (".+", ["a", "a.b"], [""]),
        (r"\d+", ["a.0", "12"], ["a.b0"]),
        ("a.c", ["abc", "a.c", "x.a-c"], ["ac"]),
        (r"(?<=q\.)weight", ["q.weight"], ["k.weight", "weight"]),
        (r"(?<!q\.)weight", ["k.weight", "weight"], ["q.weight"]),
        (r"h\.\d+\.(?!1\b)\w+", ["h.0.q"], ["h.0.1"]),
        ("größe", ["a.größe"], ["a.grosse"]),
        ("a\\+b \\[c]", ["x.a+b [c]"], ["x.ab [c]"]),
        ("^$", [""], ["a"]),
    ],
)  # fmt: skip
def test_a_pattern_matches_the_end_from_a_dot(pattern, hits, misses) -> None:
    assert matching(pattern, hits + misses, asked="here") == hits


def _reference(pattern: str, name: str) -> bool:
    """The definition: the pattern alone matches from the start, or from some dot, to the end."""
    starts = [0, *(m.end() for m in re.finditer(r"\.", name))]
    return any(re.compile(pattern).fullmatch(name, start) for start in starts)


pieces = st.sampled_from(
    [
        *["q", "k", "_", "0", r"\.", ".", "[qk]", "(q|k)", "(?:q|k)*", "(q)", "q?", ".*", r"\w+"],
        *["^", "$", "|", r"\d+", r"\b", r"(?=k)", r"(?<=\.)", "(?i:Q)", r"\Z", "#"],
    ]
)
flags = st.sampled_from(["", "", "(?i)", "(?x)", "(?s)(?i)", "(?m)", "(?a)", "(?xi) "])
parts = st.sampled_from(["q", "k", "qk", "Q_0", "0", "q_k", "\n"])
dotted = st.lists(parts, max_size=4).map(".".join)


@settings(max_examples=200)
@given(flags, st.lists(pieces, min_size=1, max_size=5).map("".join), st.lists(dotted, max_size=8))
def test_wrapping_a_pattern_changes_nothing_inside_it(flag, body, names) -> None:
    pattern = flag + body
    assert matching(pattern, names, asked="here") == [n for n in names if _reference(pattern, n)]


def test_a_pattern_that_backtracks_without_end_is_refused_by_name_in_time() -> None:
    names = [f"h.{i}.{'a' * 40}" for i in range(9)]
    with pytest.raises(MatchError, match=r"here: it took more than 0.05 s .*'h.0.aaa.*\(a\+\)\+"):
        matching("(a|a)+b|(a|a)+c", names, asked="here", seconds=0.05)
    assert matching(r"h\.\d+\.a{40}", names, asked="here") == names


@pytest.mark.parametrize("pattern", ["(a|a)" * 30 + "[bc]", "(?x) (a|a) +[bc]"])
def test_a_pattern_without_a_quantifier_at_a_group_may_take_too_long_as_well(pattern: str) -> None:
    with pytest.raises(MatchError, match=r"here: it took more than 0.05 s to match \(on 'h.0.aaa"):
        matching(pattern, [f"h.0.{'a' * 40}"], asked="here", seconds=0.05)


def test_many_repetitions_are_matched_in_time_and_many_names_are_limited_together() -> None:
    assert matching("a*" * 9 + "[bc]", [f"h.0.b{'a' * 60}"], asked="here") == []
    with pytest.raises(MatchError, match=r"here: it took more than 0 s to match \(on 'h.0.q'"):
        matching("[q]", ["h.0.q"], asked="here", seconds=0)


def test_a_brace_is_text_where_python_reads_it_as_text() -> None:
    names = ["q", "qx", "q{e}", "{kk"]
    pattern = r"q{e}|q{1<=e<=2}|[{]k{2}|q\\{e}"
    assert matching(pattern, names, asked="") == ["q{e}", "{kk"]
    with pytest.raises(MatchError, match="here: it is not a regex: "):
        matching("[a[:alpha:]", names, asked="here")


# Rules


def test_sites_come_in_the_order_of_the_model_with_the_hyper_parameters_of_their_rule() -> None:
    config = Config(rank=2, targets=[Rule(match="v_proj", rank=4, alpha=2), "q_proj"])
    plan = resolve(config, tower())
    found = [(site.name, site.rule, site.rank, site.scale) for site in plan.sites]
    assert found == [
        ("model.layers.0.attn.q_proj", 1, 2, 8.0),
        ("model.layers.0.attn.v_proj", 0, 4, 0.5),
        ("model.layers.1.attn.q_proj", 1, 2, 8.0),
        ("model.layers.1.attn.v_proj", 0, 4, 0.5),
    ]
    site = plan.sites[0]
    assert (site.kind, site.weight, site.update) == ("linear", f"{site.name}.weight", "forward")
    assert plan.n_sites_by_rule == (2, 2)
    assert plan.n_lora == 2 * (4 * 16 + 2 * 16)
    assert plan.n_trainable == plan.n_lora


def test_all_hyper_parameters_reach_the_site() -> None:
    rule = Rule(
        match="q_proj", rank=4, alpha=6, dropout=0.25, init={"normal": 0.5}, scaling="rslora",
        compute="float32",
    )  # fmt: skip
    site = resolve(Config(targets=[rule]), tower()).sites[0]
    assert (site.rank, site.alpha, site.dropout, site.init) == (4, 6.0, 0.25, ("normal", 0.5))
    assert (site.scaling, site.compute, site.scale) == ("rslora", "float32", 3.0)


@pytest.mark.parametrize(
    ("exclude", "left"),
    [
        (r"layers\.0", ["model.layers.1.attn.q_proj"]),  # a container, with all that lies below
        (r"0\.attn", ["model.layers.1.attn.q_proj"]),
        (r"0\.attn\.q_proj\.weight", ["model.layers.1.attn.q_proj"]),  # the tensor that it adapts
        (r"0\.attn\.q_proj\.bias", ["model.layers.0.attn.q_proj", "model.layers.1.attn.q_proj"]),
        ("lm_head", ["model.layers.0.attn.q_proj", "model.layers.1.attn.q_proj"]),
    ],
)
def test_exclude_takes_out_what_it_names_and_all_below(exclude: str, left: list[str]) -> None:
    assert site_names(resolve(Config(targets=["q_proj"], exclude=[exclude]), tower())) == left


def test_an_excluded_module_is_not_a_parameter_either() -> None:
    config = Config(targets=["q_proj", r"up\.weight"], exclude=[r"0\.mlp\.up"])
    assert "model.layers.0.mlp.up.weight" not in site_names(resolve(config, tower()))


def test_a_module_and_its_weight_are_excluded_once() -> None:
    config = Config(targets=[r".*(q|k)_proj(\.weight)?"], exclude=["q_proj"])
    skipped = [(s.name, s.rule, s.reason) for s in resolve(config, tower()).skipped]
    assert skipped == [(f"model.layers.{i}.attn.q_proj", 0, "excluded") for i in range(2)]


def test_exclude_leaves_train_and_bias_alone() -> None:
    config = Config(targets=["q_proj"], exclude=["norm", "lm_head"], train=["norm", "lm_head"])
    assert len(resolve(config, tower()).trained) == 5


def test_a_module_counts_before_its_own_weight() -> None:
    plan = resolve(Config(targets=[r".*q_proj(\.weight)?"]), tower())
    assert [(s.name, s.kind) for s in plan.sites] == [
        ("model.layers.0.attn.q_proj", "linear"),
        ("model.layers.1.attn.q_proj", "linear"),
    ]


def test_a_pattern_that_matches_the_weight_alone_makes_a_site_of_the_parameter() -> None:
    plan = resolve(Config(targets=[r"0\.mlp\.up\.weight", "embed.weight"], rank=2), tower())
    up, embed = plan.sites[1], plan.sites[0]
    assert (up.name, up.kind, up.update) == ("model.layers.0.mlp.up.weight", "parameter", "weight")
    assert (up.weight, up.in_features, up.out_features) == ("model.layers.0.mlp.up.weight", 8, 16)
    assert not up.transposed
    assert (embed.kind, embed.transposed, embed.a_shape, embed.b_shape) == (
        "parameter", True, (2, 32), (8, 2),
    )  # fmt: skip


def test_no_tensor_gets_two_sites() -> None:
    config = Config(targets=[r"q_proj\.weight", "q_proj"])
    assert refused(config, tower()) == (
        "rule 2 ('q_proj'): all that it matches is taken by rule 1 (2). "
        "Put the narrower rule first, or remove this one."
    )
    plan = resolve(Config(targets=[r"q_proj\.weight", "[qk]_proj"]), tower())
    assert [(s.name, s.rule) for s in plan.sites][:2] == [
        ("model.layers.0.attn.q_proj.weight", 0),
        ("model.layers.0.attn.k_proj", 1),
    ]


def test_a_shared_module_is_one_site_whichever_name_is_hit() -> None:
    names = inventory(
        linear("encoder.q", aliases=("decoder.q",)),
        linear("decoder.k"),
        parameters={"encoder.q.bias": (8,)},
    )
    for pattern in ("q", r"decoder\.q", r"encoder\.q"):
        plan = resolve(Config(targets=[pattern]), names)
        assert [(s.name, s.aliases) for s in plan.sites] == [("encoder.q", ("decoder.q",))]
    weight = resolve(Config(targets=[r"decoder\.q\.weight"]), names)
    assert site_names(weight) == ["encoder.q.weight"]
    # What is excluded under one of its names would be adapted under the other.
    assert "taken by exclude (1)" in refused(Config(targets=["q"], exclude=["decoder"]), names)
    trained = resolve(Config(train=[r"decoder\.q"]), names).trained
    assert [t.name for t in trained] == ["encoder.q.weight", "encoder.q.bias"]


def test_a_raw_parameter_is_a_site() -> None:
    names = inventory(parameter("attn.in_proj", 24, 8), linear("attn.out"))
    rule = Rule(match="in_proj", slices=["q", "k", "v"], adapt=["v", "q"], rank=2)
    site = resolve(Config(targets=[rule]), names).sites[0]
    assert (site.name, site.kind, site.weight) == ("attn.in_proj", "parameter", "attn.in_proj")
    assert site.slices.adapt == ("q", "v")  # in the order of the output
    assert site.spans == ((0, 8), (16, 24))


def test_an_explicit_weight_candidate_is_not_a_second_site() -> None:
    weight = parameter("q.weight", 8, 8)._replace(owner="q")
    for order in ((linear("q"), weight), (weight, linear("q"))):
        names = inventory(*order)
        everything = resolve(Config(targets=[".+"]), names)
        assert [(s.name, s.kind) for s in everything.sites] == [("q", "linear")]
        alone = resolve(Config(targets=[r"q\.weight"]), names)
        assert [s.kind for s in alone.sites] == ["parameter"]


def test_a_name_that_stands_for_others_means_them() -> None:
    attention = Candidate("attn", "attention", 0, 0, (), "", members=("attn.in_w", "attn.out"))
    names = inventory(attention, parameter("attn.in_w", 24, 8), linear("attn.out"), linear("up"))
    assert site_names(resolve(Config(targets=["attn"]), names)) == ["attn.in_w", "attn.out"]
    config = Config(targets=["attn"], exclude=["out"])
    assert site_names(resolve(config, names)) == ["attn.in_w"]


def test_what_else_a_rule_hits_is_listed_as_skipped() -> None:
    plan = resolve(Config(targets=[r"^model\.layers\.0\..*"]), tower())
    assert len(plan.sites) == 6
    # The biases and weights of q_proj and its like are their module's, not skipped names.
    assert [(s.name, s.reason) for s in plan.skipped] == [
        ("model.layers.0.attn", "container"),
        ("model.layers.0.mlp", "container"),
        ("model.layers.0.norm", "LayerNorm"),
        ("model.layers.0.attn.drop", "Dropout"),
    ]
    alone = resolve(Config(targets=[r"(q_proj|norm\.bias|norm\.weight)"]), tower())
    assert {s.reason for s in alone.skipped} == {"bias", "1-d parameter"}


# Refusals of rules

REFUSED = r"""
targets: [q_proj, v_prj]
=> rule 2 ('v_prj'): matched none of 51 names. Nearest: 'model.layers.0.attn.v_proj',
   'model.layers.0.attn.q_proj', 'model.layers.0.attn.k_proj'.

targets: ['model\.layer\.\d+\.mlp']
=> rule 1 ('model\.layer\.\d+\.mlp'): matched none of 51 names. Nearest: 'model.layers.0.mlp.up',
   'model.layers.0.attn.q_proj'.

targets: ['^model\.layers\.\d+\.attention\.(k|v)_proj$']
=> rule 1 ('^model\.layers\.\d+\.attention\.(k|v)_proj$'): matched none of 51 names. Nearest:
   'model.layers.0.attn.k_proj', 'model.layers.0.attn.v_proj', 'model.layers.0.attn.q_proj'.

targets: [zzz]
=> rule 1 ('zzz'): matched none of 51 names. Nothing is spelled like it; there is 'model.embed',
   'model.layers.{0..1}.attn.q_proj', 'model.layers.{0..1}.attn.k_proj',
   'model.layers.{0..1}.attn.v_proj'.

{targets: [q_proj], exclude: [lm_haed]}
=> exclude 1 ('lm_haed'): matched none of 52 names. Nearest: 'lm_head'.

{targets: [q_proj], train: [norms]}
=> train 1 ('norms'): matched none of 52 names. Nearest: 'model.layers.0.norm'.

{targets: ['[qk]_proj', q_proj], exclude: ['layers\.0']}
=> rule 2 ('q_proj'): all that it matches is taken by exclude (1), rule 1 (1). Put the narrower rule
   first, or remove this one.

targets: [mlp]
=> rule 1 ('mlp'): matches only what cannot take an adapter: 'model.layers.0.mlp' (container),
   'model.layers.1.mlp' (container). Name what is in it: 'model.layers.0.mlp.up',
   'model.layers.0.mlp.down'.

targets: [norm]
=> rule 1 ('norm'): matches only what cannot take an adapter: 'model.layers.0.norm' (LayerNorm),
   'model.layers.1.norm' (LayerNorm). Name modules or parameters that hold a matrix.

targets: [running_mean]
=> rule 1 ('running_mean'): matches only buffers: 'model.norm.running_mean'. Name a module or a
   parameter; buffers do not train.

{targets: [q_proj], train: [running_mean]}
=> train 1 ('running_mean'): matches only buffers: 'model.norm.running_mean'. Name a module or a
   parameter; buffers do not train.

targets: [{match: up, layers: 2-3}]
=> rule 1 ('up'): nothing that it matches is in layers 2-3. Its layers are 0 to 1.

targets: [{match: up, layers: [0, 7]}]
=> rule 1 ('up'): nothing that it matches is in layers 7. Its layers are 0 to 1.

targets: [{match: lm_head, layers: 0}]
=> rule 1 ('lm_head'): nothing that it matches is in layers 0. Remove layers; no name that it
   matches has one.

targets: [{match: .+proj, kind: linaer}]
=> rule 1 ('.+proj'): nothing that it matches is of kind 'linaer', but of linear (8). Did you mean
   'linear'?

targets: [{match: .+, kind: conv, layers: [1]}]
=> rule 1 ('.+'): nothing that it matches is of kind 'conv', but of linear (6). Correct kind.

targets: [{match: up, rank: 9, init: pissa}]
=> 'model.layers.0.mlp.up', matched by rule 1 ('up'): init pissa with rank 9, but W has a rank of at
   most 8. Give the rule rank: 8, or another init.

targets: [{match: up, slices: {a: 13, b: 3}, adapt: [b], rank: 4, init: olora}]
=> 'model.layers.0.mlp.up', matched by rule 1 ('up'): init olora with rank 4, but W has a rank of at
   most 3. Give the rule rank: 3, or another init.

targets: [{match: up, slices: {a: 12, b: 3}, adapt: [a]}]
=> 'model.layers.0.mlp.up', matched by rule 1 ('up'): slices of 12 + 3 = 15, but it has 16 outputs.
   Give the widths along its output.

targets: [{match: up, slices: [a, b, c], adapt: [a]}]
=> 'model.layers.0.mlp.up', matched by rule 1 ('up'): 3 equal slices, but 16 outputs do not divide.
   Give the widths: {a: ..., ...}.

targets: [{match: embed, slices: [a, b], adapt: [a]}]
=> 'model.embed', matched by rule 1 ('embed'): slices, but it is of kind embedding. Slices are for
   linear layers, Conv1D and 2-d parameters.

targets: [{match: q_proj, layout: in_out}]
=> 'model.layers.0.attn.q_proj', matched by rule 1 ('q_proj'): a layout, but a linear of shape (8,
   8) has its own. Remove layout; it is for parameters.

{targets: ['q_proj\.weight'], dropout: 0.1}
=> 'model.layers.0.attn.q_proj.weight', matched by rule 1 ('q_proj\.weight'): dropout 0.1 on a
   weight that is read, not called with inputs. Give the rule dropout: 0.

{targets: [q_proj], train: ['layers\.1']}
=> train 1 ('layers\.1'): 'model.layers.1.attn.q_proj.weight' is the weight of the site
   'model.layers.1.attn.q_proj': adapted and trained both. Exclude 'model.layers.1.attn.q_proj', or
   narrow the pattern.

{targets: [q_proj], train: [drop]}
=> train 1 ('drop'): matches 'model.layers.0.attn.drop', 'model.layers.1.attn.drop', with no
   parameters. Name what has parameters.

{targets: [up], bias: adapted}
=> bias: adapted: none of 2 adapted modules is or has a bias. Set bias: none, or all.

{targets: [q_proj, k_proj], rank: 2, train: [lm_head],
  expect: {sites: 3, lora: 128, trainable: 400}}
=> expect {sites: 3, trainable: 400}: found sites: 4, trainable: 384 (rule 1 ('q_proj') 2 sites;
   rule 2 ('k_proj') 2 sites; train and bias 256 elements). Correct the rules, or the counts.
"""


@pytest.mark.parametrize("case", REFUSED.strip().split("\n\n"))
def test_a_refusal_says_what_was_asked_what_was_found_and_what_to_do(case: str) -> None:
    text, message = case.split("\n=> ")
    assert refused(Config.from_text(text), tower()) == " ".join(message.split())


def test_nearest_names_do_not_repeat_the_layers() -> None:
    message = refused(Config(targets=["v_prj"]), tower(12))
    assert message.count("layers.0") == 3
    assert "layers.1" not in message


def test_a_candidate_that_is_refused_says_why_unless_it_is_not_meant() -> None:
    refusal = ("is read by its MultiheadAttention, never called", "Target 'attn' instead")
    names = inventory(linear("attn.out_proj", refusal=refusal), linear("attn.q_proj"))
    assert refused(Config(targets=[".*proj"]), names, LayerError) == (
        "'attn.out_proj', matched by rule 1 ('.*proj'): is read by its MultiheadAttention, never "
        "called. Target 'attn' instead."
    )
    # Its weight is refused with it: a packed or parametrized weight is not W.
    assert "never called" in refused(Config(targets=[r"out_proj\.weight"]), names, LayerError)
    config = Config(targets=[".*proj"], exclude=["out_proj"])
    assert site_names(resolve(config, names)) == ["attn.q_proj"]


def test_nothing_is_there_at_all() -> None:
    message = "rule 1 ('q'): matched none of 0 names. There is nothing to adapt."
    assert refused(Config(targets=["q"]), inventory()) == message


def test_the_root_module_is_a_site() -> None:
    root = Candidate("", "linear", 8, 8, (8, 8), "weight")
    names = inventory(root, parameters={"bias": (8,)})
    plan = resolve(Config(targets=["^$"], bias="adapted"), names)
    assert [(s.name, s.weight) for s in plan.sites] == [("", "weight")]
    assert [t.name for t in plan.trained] == ["bias"]
    assert site_names(resolve(Config(targets=["weight"]), names)) == ["weight"]


# Stacked parameters


@pytest.mark.parametrize(
    ("layout", "n_in", "n_out", "transposed"), [("out_in", 8, 12, False), ("in_out", 12, 8, True)]
)
def test_a_stacked_parameter_needs_its_layout(layout, n_in, n_out, transposed) -> None:
    names = inventory(parameter("mlp.experts.up", 4, 12, 8))
    plan = resolve(Config(targets=[Rule(match="up", rank=2, layout=layout)]), names)
    site = plan.sites[0]
    assert (site.in_features, site.out_features) == (n_in, n_out)
    assert (site.transposed, site.experts) == (transposed, 4)
    assert (site.a_shape, site.b_shape) == ((4, 2, n_in), (4, n_out, 2))
    assert plan.n_lora == 4 * 2 * 20
    assert "stack of 4: " in str(plan)
    assert refused(Config(targets=["up"]), names) == (
        "'mlp.experts.up', matched by rule 1 ('up'): a stack of 4 matrices, 12 x 8. Say with "
        "layout: out_in (x @ W.T, as Mixtral) or in_out (x @ W, as Llama 4) which side is the "
        "input; or give the axes of one matrix, such as {in: [0], out: [1, 2]}."
    )


def test_a_layout_that_the_class_states_need_not_be_given_and_cannot_be_contradicted() -> None:
    stated = {"needs_layout": False, "in_features": 12, "out_features": 8, "transposed": True}
    known = inventory(parameter("experts.up", 4, 12, 8)._replace(**stated))
    for layout in (None, "in_out", {"in": [1], "out": [2]}):
        config = Config(targets=[Rule(match="up", layout=layout)])
        assert resolve(config, known).sites[0].a_shape == (4, 8, 12)
    message = refused(Config(targets=[Rule(match="up", layout="out_in")]), known)
    assert "a layout other than in_out, which is the one that its class states" in message


@pytest.mark.parametrize(
    ("axes", "shape", "maps", "transposed"),
    [
        ({"in": [0], "out": [1, 2]}, (6, 4, 3), (None, 6, 12), True),
        ({"in": [1, 2], "out": [0]}, (6, 4, 3), (None, 12, 6), False),
        ({"in": [0, 1], "out": [2]}, (6, 4, 3), (None, 24, 3), True),
        ({"in": [2], "out": [0, 1]}, (6, 4, 3), (None, 3, 24), False),
        ({"in": [1], "out": [2, 3]}, (5, 6, 4, 3), (5, 6, 12), True),
        ({"in": [0], "out": [1]}, (6, 4), (None, 6, 4), True),
    ],
)
def test_a_layout_may_say_which_axes_are_in_and_which_are_out(
    axes: Any, shape: tuple[int, ...], maps: tuple[Any, ...], transposed: bool
) -> None:
    config = Config(targets=[Rule(match="Wq", rank=2, layout=axes)])
    (site,) = resolve(config, inventory(parameter("Wq", *shape))).sites
    assert (site.experts, site.in_features, site.out_features) == maps
    assert site.transposed is transposed
    assert math.prod(site.matrix_shape) == math.prod(shape)


@pytest.mark.parametrize(
    "axes", [([0], [2]), ([1], [0, 2]), ([0], [0, 1, 2]), ([0], [2, 1]), ([0], [3])]
)
def test_axes_that_are_not_a_matrix_in_memory_order_are_refused(axes: Any) -> None:
    config = Config(targets=[Rule(match="Wq", layout={"in": axes[0], "out": axes[1]})])
    message = refused(config, inventory(parameter("Wq", 6, 4, 3)))
    assert f"a layout of in {axes[0]} and out {axes[1]}, but the shape is (6, 4, 3)" in message


def test_a_layout_of_a_convolution_and_slices_of_a_stack_are_refused() -> None:
    conv = Candidate("conv", "conv", 24, 4, (4, 8, 3), "conv.weight")
    names = inventory(parameter("up", 4, 12, 8), conv)
    config = Config(targets=[Rule(match=r"conv\.weight", layout="out_in")])
    found = "a layout, but a parameter of shape (4, 8, 3) has its own"
    assert found in refused(config, names)
    rule = Rule(match="up", layout="out_in", slices=["a", "b"], adapt=["a"])
    assert "slices, but it is a stack of matrices" in refused(Config(targets=[rule]), names)


# all-linear, kind and layers


def test_all_linear_is_every_linear_layer_but_the_head_that_the_model_states() -> None:
    plan = resolve(Config(targets=["all-linear"]), tower())
    assert len(plan.sites) == 12
    assert {site.kind for site in plan.sites} == {"linear"}
    assert "lm_head" not in site_names(plan)
    assert plan.notes[0] == "all-linear leaves out the output head 'lm_head'"
    plan = resolve(Config(targets=["all-linear"]), replace(tower(), heads=()))
    assert site_names(plan)[-1] == "lm_head"
    assert "the model states no output head" in plan.notes[0]
    for rule in ("all-linear", {"match": "q", "kind": "linear"}):
        keys = inventory_of({"h.0.q.weight": (8, 8)})
        message = refused(Config(targets=[rule]), keys)
        assert "a list of keys does not say which kind of layer" in message
    head_only = inventory(linear("head"), heads=("head",))
    message = refused(Config(targets=["all-linear"]), head_only)
    assert "no linear layers but its output head" in message


def test_a_rule_need_not_match_in_each_of_its_layers_if_the_model_has_them() -> None:
    rules = [Rule(match=r"1\.attn\.v_proj", layers=[0, 1]), Rule(match="q_proj", layers=[0, 1])]
    names = [site.name for site in resolve(Config(targets=rules), tower()).sites]
    layers = ["model.layers.0.attn.q_proj", "model.layers.1.attn.q_proj"]
    assert sorted(names) == [*layers, "model.layers.1.attn.v_proj"]
    beyond = Config(targets=[Rule(match="q_proj", layers=[0, "2-7"])])
    with pytest.raises(MatchError, match=r"in layers 2-7\. Its layers are 0 to 1"):
        resolve(beyond, tower())


def test_kind_and_layers_narrow_a_rule() -> None:
    rule = Rule(match="all-linear", layers=[0, "2-3"])
    plan = resolve(Config(targets=[rule, r".+\.weight"], exclude=["lm_head"]), tower(5))
    assert {s.name.split(".")[2] for s in plan.sites if s.rule == 0} == {"0", "2", "3"}
    plan = resolve(Config(targets=[Rule(match=".+", kind="embedding"), "up"]), tower())
    assert [s.rule for s in plan.sites] == [0, 1, 1]
    assert plan.skipped == ()


# Ranks


def test_a_rank_above_the_smaller_side_is_allowed_and_noted() -> None:
    names = inventory(linear("gate", 8, 1), linear("up", 8, 12))
    plan = resolve(Config(targets=["gate", "up"], rank=4), names)
    assert [s.b_shape for s in plan.sites] == [(1, 4), (12, 4)]
    (note,) = plan.notes
    assert note.startswith("the rank is above the smaller side of 'gate' (8 -> 1); ")


def test_a_and_b_that_have_more_elements_than_w_are_noted() -> None:
    names = inventory(linear("a", 8, 8), linear("b", 8, 8))
    plan = resolve(Config(targets=[".+"], rank=6), names)
    assert plan.notes == ("A and B have more elements than W at 2 sites, first 'a' (8 -> 8)",)


def test_a_flat_parameter_may_state_its_layout() -> None:
    names = inventory(parameter("w", 12, 8))
    rule = Rule(match="w", layout="in_out", rank=1, slices=["a", "b"], adapt=["b"])
    site = resolve(Config(targets=[rule]), names).sites[0]
    assert (site.in_features, site.out_features, site.transposed) == (12, 8, True)
    assert (site.experts, site.spans) == (None, ((4, 8),))


def test_weight_derived_inits_are_allowed_block_by_block() -> None:
    # Each block of a site is a matrix of its own, so its singular vectors are well defined.
    names = inventory(parameter("up", 4, 12, 8), linear("qkv", 8, 24))
    rules = [
        Rule(match="up", layout="out_in", init="pissa", rank=2),
        Rule(match="qkv", slices=["q", "k", "v"], adapt=["q"], init="olora", rank=2),
    ]
    assert [s.init for s in resolve(Config(targets=rules), names).sites] == ["pissa", "olora"]


def test_weight_updates_refuse_dropout_and_note_their_rounding() -> None:
    half = linear("attn.out", update="weight", dtype="bfloat16")
    names = inventory(half, linear("q", dtype="bfloat16"))
    assert "dropout 0.1" in refused(Config(targets=["out"], dropout=0.1), names)
    (note,) = resolve(Config(targets=["out", "q"], rank=2), names).notes
    assert note.startswith("1 weight update over bfloat16: W + delta is rounded on every read; ")
    assert not resolve(Config(targets=["out", "q"], rank=2, compute="float32"), names).notes


# What else trains


def test_train_names_parameters_or_whole_modules() -> None:
    plan = resolve(Config(targets=["q_proj"], train=["norm", r"1\.norm\.bias", "mlp"]), tower())
    wanted = {
        "mlp.up.weight": ((16, 8), "train 3 ('mlp')"),
        "mlp.down.weight": ((8, 16), "train 3 ('mlp')"),
        "norm.weight": ((8,), "train 1 ('norm')"),
        "norm.bias": ((8,), "train 1 ('norm')"),
    }
    assert {t.name: (t.shape, t.why) for t in plan.trained} == {
        f"model.layers.{i}.{name}": found for i in range(2) for name, found in wanted.items()
    }
    assert plan.n_trained == 4 * 128 + 4 * 8
    assert plan.n_trainable == plan.n_lora + plan.n_trained


def test_train_knows_every_name_of_a_parameter() -> None:
    names = inventory(
        linear("q"),
        others={"a.norm": "LayerNorm"},
        parameters={"a.norm.weight": (8,)},
        aliases={"b.norm.weight": "a.norm.weight"},
    )
    for pattern in ("a", r"b\.norm", r"b\.norm\.weight"):
        (trained,) = resolve(Config(train=[pattern]), names).trained
        assert trained.name == "a.norm.weight"


def test_biases_of_adapted_modules_or_all() -> None:
    adapted = resolve(Config(targets=["q_proj", r"k_proj\.weight"], bias="adapted"), tower())
    assert [t.name for t in adapted.trained] == [
        f"model.layers.{i}.attn.{n}_proj.bias" for i in range(2) for n in "qk"
    ]
    assert {t.why for t in adapted.trained} == {"bias: adapted"}
    everything = resolve(Config(targets=["q_proj"], bias="all"), tower())
    assert len(everything.trained) == 2 * (4 + 1)


def test_biases_are_known_by_their_last_segment() -> None:
    names = inventory(
        linear("q"),
        parameter("mha.in_proj_weight", 24, 8),
        embedding("relative_attention_bias", 32, 8),
        parameters={
            "mha.in_proj_bias": (24,),
            "mha.bias_k": (1, 1, 8),
            "experts.up_bias": (4, 8),  # stacked, one row for each expert
            "norm.biased": (8,),
            "mha.out.bias": (8,),
        },
    )
    plan = resolve(Config(targets=["in_proj_weight"], bias="adapted"), names)
    assert [t.name for t in plan.trained] == ["mha.in_proj_bias"]
    plan = resolve(Config(bias="all"), names)
    assert [t.name for t in plan.trained] == ["mha.in_proj_bias", "experts.up_bias", "mha.out.bias"]


def test_train_and_bias_name_a_tensor_once() -> None:
    config = Config(targets=["q_proj"], train=[r"q_proj\.bias"], bias="all")
    plan = resolve(config, tower())
    assert len(plan.trained) == 10
    assert {t.why for t in plan.trained if "q_proj" in t.name} == {"train 1 ('q_proj\\.bias')"}
    assert {t.why for t in plan.trained if "q_proj" not in t.name} == {"bias: all"}


def test_expect_passes_when_the_counts_come_out() -> None:
    counts = Expect(sites=4, lora=128, trainable=384)
    config = Config(targets=["q_proj", "k_proj"], rank=2, train=["lm_head"], expect=counts)
    assert resolve(config, tower()).n_trainable == 384


# The plan


def test_the_plan_prints_as_a_table() -> None:
    config = Config(
        rank=2,
        targets=[
            "[qk]_proj",
            Rule(match="up", slices=["a", "b"], adapt=["b"], rank=4, scaling="rslora", dropout=0.1),
            r"norm|embed\.weight",
        ],
        train=["lm_head"],
        bias="adapted",
    )
    assert str(resolve(config, tower())) == (
        "rule 1 '[qk]_proj': rank 2, scale 16/2, kaiming\n"
        "  model.layers.{0..1}.attn.q_proj  x2  linear  8 -> 8  32 each  64\n"
        "  model.layers.{0..1}.attn.k_proj  x2  linear  8 -> 8  32 each  64\n"
        "rule 2 'up': rank 4, scale 16/sqrt(4), kaiming, dropout 0.1\n"
        "  model.layers.{0..1}.mlp.up  x2  linear  8 -> 16 [b]  64 each  128\n"
        "rule 3 'norm|embed\\.weight': rank 2, scale 16/2, kaiming\n"
        "  model.embed.weight  x1  parameter  32 -> 8  80 each  80\n"
        "train 1 ('lm_head'): trained in full\n"
        "  lm_head.weight  x1  trained  32 x 8  256 each  256\n"
        "bias: adapted: trained in full\n"
        "  model.layers.{0..1}.attn.q_proj.bias  x2  trained  8  8 each  16\n"
        "  model.layers.{0..1}.attn.k_proj.bias  x2  trained  8  8 each  16\n"
        "skipped, LayerNorm: model.layers.{0..1}.norm\n"
        "7 sites: 336 in A and B + 288 trained in full = 624 trainable, 38.2 % of 1,632;\n"
        "  0.0 MB in float32"
    )


def tied() -> Inventory:
    return inventory(
        embedding("embed", 32, 8, tied=("head.weight",)),
        linear("head", 8, 32, tied=("embed.weight",)),
    )


def test_the_plan_prints_ties_notes_and_assumptions() -> None:
    text = str(resolve(Config(targets=["embed", "head"]), tied()))
    assert "tied: embed.weight = head.weight; adapted at embed and head, each with its own" in text
    text = str(resolve(Config(targets=["head"]), tied()))
    assert "tied: embed.weight = head.weight; adapted at head only\n" in text
    text = str(resolve(Config(train=["head"]), tied()))
    assert "tied: embed.weight = head.weight; trained under all its names\n" in text
    half = inventory(linear("out", update="weight", dtype="float16"))
    text = str(resolve(Config(targets=["out"], rank=2), half))
    assert "linear (weight)" in text
    assert "\nnote: 1 weight update over float16" in text
    guessed = resolve(Config(targets=["q"]), inventory_of({"q.weight": (8, 8)}))
    assert str(guessed).startswith("kinds are assumed from names and shapes\n")


def test_the_plan_is_json() -> None:
    config = Config(
        targets=["q_proj", Rule(match="up", slices=["a", "b"], adapt=["b"]), "norm|embed"],
        init={"normal": 0.02},
        train=["lm_head"],
    )
    plan = resolve(config, tower())
    data = json.loads(json.dumps(plan.to_dict()))
    assert Config.from_dict(data["config"]) == config
    assert len(data["sites"]) == data["n_sites"] == 5
    assert sum(site["n_parameters"] for site in data["sites"]) == data["n_lora"] == plan.n_lora
    assert data["sites"][2]["slices"] == {"sizes": {"a": 8, "b": 8}, "adapt": ["b"]}
    assert data["sites"][0]["init"] == ["normal", 0.02]
    row = {"name": "lm_head.weight", "shape": [32, 8], "why": "train 1 ('lm_head')", "rows": None}
    assert data["trained"] == [row]
    assert data["skipped"][0] == {"name": "model.layers.0.norm", "rule": 2, "reason": "LayerNorm"}


def _expand(template: str) -> list[str]:
    """`a.{0..2,5}.b` written out, independently of how it was made."""
    parts: list[list[str]] = []
    for piece in re.split(r"(\{[^}]*\})", template):
        if not piece.startswith("{"):
            parts.append([piece])
            continue
        numbers: list[str] = []
        for run in piece[1:-1].split(","):
            low, _, high = run.partition("..")
            numbers += map(str, range(int(low), int(high or low) + 1))
        parts.append(numbers)
    return ["".join(choice) for choice in product(*parts)]


segments = st.sampled_from(["0", "1", "2", "3", "10", "007", "q", "k"])


@given(st.sets(st.lists(segments, min_size=1, max_size=4).map(".".join), max_size=30))
def test_collapsed_names_stand_for_exactly_the_names(names: set[str]) -> None:
    templates = templates_of(sorted(names))
    expanded = [name for template in templates for name in _expand(template)]
    assert sorted(expanded) == sorted(names)
    assert all(len(_expand(template)) == n for template, n in templates.items())


def test_a_grid_of_experts_is_one_line() -> None:
    names = [f"h.{i}.experts.{e}.up" for i in range(32) for e in range(8)]
    assert templates_of(names) == {"h.{0..31}.experts.{0..7}.up": 256}
    assert templates_of(["h.0.q", "h.1.q", "h.2.q", "h.5.q"]) == {"h.{0..2,5}.q": 4}
    assert templates_of(["h.3.q"]) == {"h.3.q": 1}


# Any inventory, any rules

leaf_patterns = st.sampled_from(
    ["q", "k", "q|k", ".+", r"q\.weight", r".*\.weight", r"a\..*", r"b\.q", r"k(\.weight)?", "norm"]
)


@st.composite
def inventories(draw: st.DrawFn) -> Inventory:
    candidates: list[Candidate] = []
    for name in draw(st.lists(st.sampled_from(["a.q", "a.k", "b.q", "b.k", "q"]), unique=True)):
        aliases = (f"alias.{name}",) if draw(st.booleans()) else ()
        candidates.append(linear(name, aliases=aliases))
        if draw(st.booleans()):
            candidates.append(parameter(f"{name}.weight", 8, 8)._replace(owner=name))
    return inventory(*candidates, others={"a": "container", "norm": "LayerNorm"})


@settings(max_examples=200)
@given(
    inventories(),
    st.lists(leaf_patterns, min_size=1, max_size=3),
    st.lists(leaf_patterns, max_size=1),
)
def test_no_rules_ever_give_one_tensor_two_sites(names, patterns, exclude) -> None:
    try:
        plan = resolve(Config(targets=patterns, exclude=exclude), names)
    except MatchError:
        return
    weights = [site.weight for site in plan.sites]
    assert len(set(weights)) == len(weights)
    for site in plan.sites:
        known = {site.name, *site.aliases}
        hit_by = [i for i, p in enumerate(patterns) if matching(p, known, asked="")]
        assert site.rule == hit_by[0]
        assert not any(matching(p, known, asked="") for p in exclude)


# From a checkpoint's keys


def kinds(names: Inventory) -> dict[str, tuple[str, int, int]]:
    return {c.name: (c.kind, c.in_features, c.out_features) for c in names.candidates}


def test_of_keys_only_a_bias_says_which_side_is_the_output() -> None:
    keys = {
        "wte.weight": (50, 8),
        "wpe.weight": (16, 8),
        "h.0.ln_1.weight": (8,),
        "h.0.ln_1.bias": (8,),
        "h.0.attn.c_attn.weight": (8, 24),
        "h.0.attn.c_attn.bias": (24,),
        "h.0.attn.c_proj.weight": (8, 8),
        "h.0.attn.c_proj.bias": (8,),
    }
    names = inventory_of(keys)
    assert names.assumed
    assert kinds(names) == {
        "wte": ("linear", 8, 50),  # no name says that it is an embedding
        "wpe": ("linear", 8, 16),
        "h.0.attn.c_attn": ("conv1d", 8, 24),
        "h.0.attn.c_proj": ("linear", 8, 8),  # square: its bias says nothing
    }
    biases = ["h.0.ln_1.bias", "h.0.attn.c_attn.bias", "h.0.attn.c_proj.bias"]
    assert names.others == {
        **dict.fromkeys(biases, "bias"),
        **dict.fromkeys(["h.0.attn", "h.0", "h"], "container"),
        "h.0.ln_1.weight": "1-d tensor",
        "h.0.ln_1": "no matrix",
    }
    rule = Rule(match="c_attn", slices=["q", "k", "v"], adapt=["q", "v"], rank=4)
    plan = resolve(Config(targets=[rule]), names)
    assert plan.n_lora == 4 * (8 + 8) * 2
    assert plan.sites[0].transposed


def test_keys_of_other_models() -> None:
    keys = {
        "model.layers.0.q_proj.weight": (16, 8),
        "model.layers.0.q_proj.bias": (16,),
        "model.layers.0.experts.gate_up": (4, 32, 8),
        "model.layers.0.experts.up_bias": (4, 32),
        "model.layers.0.scale": (),
        "model.layers.0.empty.weight": (0, 8),
        "patch.weight": (8, 3, 4, 4),
        "table": (5, 8),
    }
    names = inventory_of(keys)
    assert kinds(names) == {
        "model.layers.0.q_proj": ("linear", 8, 16),
        "model.layers.0.experts.gate_up": ("parameter", 8, 32),
        "patch": ("conv", 48, 8),
        "table": ("parameter", 8, 5),
    }
    stack, table = (c for c in names.candidates if c.kind == "parameter")
    assert (stack.needs_layout, stack.experts, table.needs_layout) == (True, 4, False)
    assert stack.owner == "model.layers.0.experts"
    assert names.others["model.layers.0.experts.up_bias"] == "bias"
    assert names.parameters == keys


def test_names_as_deep_as_a_file_can_make_them() -> None:
    deep = ".".join(["a"] * 3_000)
    names = inventory_of({f"{deep}.weight": (8, 8), "b.weight": (8, 8)})
    plan = resolve(Config(targets=["a"], exclude=["b"]), names)
    assert site_names(plan) == [deep]


def test_keys_with_wrapper_segments_keep_their_tensor_names() -> None:
    names = inventory_of({"_orig_mod.h.q.weight": (8, 8), "_orig_mod.h.q.bias": (8,)})
    plan = resolve(Config(targets=[r"^h\.q"], bias="adapted"), names)
    assert (plan.sites[0].name, plan.sites[0].weight) == ("h.q", "_orig_mod.h.q.weight")
    assert [t.name for t in plan.trained] == ["h.q.bias"]
    with pytest.raises(MatchError, match="adapted and trained both"):
        resolve(Config(targets=["q"], train=["h"]), names)


def test_a_pattern_for_stacked_experts_is_told_that_experts_are_modules() -> None:
    names = [f"h.{i}.mlp.experts.{e}.{w}" for i in range(2) for e in range(2) for w in ("w1", "w2")]
    model = inventory(*map(linear, names))
    for pattern in (r"experts\.gate_up_proj", r"h\.\d+\.mlp\.experts\.(gate_up|down)_proj"):
        with pytest.raises(MatchError) as caught:
            resolve(Config(targets=[pattern]), model)
        assert "experts are modules here, each of its own" in str(caught.value)
        fits = str(caught.value).partition("Match those: ")[2].rstrip(".")
        assert fits == r"experts\.\d+\.(w1|w2)"
        assert resolve(Config(targets=[fits]), model).n_sites == len(names)
    with pytest.raises(MatchError, match="Nearest"):
        resolve(Config(targets=[r"experts\.\d+\.w3"]), model)


def test_names_that_end_like_a_wrapper_s_stay_what_they_are() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self._a_wrapped_module = nn.Linear(4, 4)
            self._b_wrapped_module = nn.Linear(4, 4)

    names = [site.name for site in li.plan(Two(), {"targets": ["all-linear"]}).sites]
    assert names == ["_a_wrapped_module", "_b_wrapped_module"]


@pytest.mark.parametrize("pattern", ["(?x:(a+) +)X", "(?i-s:(?x: (a+)\n+ ))X", ".*" * 60 + "X"])
def test_a_pattern_that_may_explode_is_matched_with_a_clock(pattern: str) -> None:
    assert bounded_patterns.steps_of(pattern, 28) > bounded_patterns.FEW_STEPS
    assert matching(pattern, ["a" * 28], asked="rule 1") == []
