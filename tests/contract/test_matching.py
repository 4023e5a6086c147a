"""Matching: which names a pattern means, which sites come of them, and the way out when none do."""

import cProfile
import re
from collections.abc import Callable
from typing import Any

import peft
import pytest
import torch
from helpers import states
from helpers.modules import tree
from helpers.refusals import refused
from helpers.tables import rows
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import lora_inject as li


def matrix(*shape: int) -> nn.Parameter:
    return nn.Parameter(torch.empty(shape, device="meta"))


def linear(n_in: int = 8, n_out: int = 8, **options: Any) -> nn.Linear:
    return nn.Linear(n_in, n_out, device="meta", **options)


class Tower(nn.Module):
    """A small decoder: two layers of q, k, v, out; up, down; norms; an embedding and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.model = tree({"embed": nn.Embedding(32, 8), "norm": nn.Module()})
        self.model.norm.register_buffer("running_mean", torch.empty(8))
        self.model.layers = nn.ModuleList(self.layer() for _ in range(2))
        self.lm_head = nn.Linear(8, 32, bias=False)

    def layer(self) -> nn.Module:
        attention = [f"attn.{name}_proj" for name in ("q", "k", "v", "out")]
        return tree({
            "norm": nn.LayerNorm(8),
            **{name: nn.Linear(8, 8) for name in attention},
            "attn.drop": nn.Dropout(0.1),
            "mlp.up": nn.Linear(8, 16, bias=False),
            "mlp.down": nn.Linear(16, 8, bias=False),
        })  # fmt: skip

    def get_output_embeddings(self) -> nn.Module:
        return self.lm_head


@pytest.fixture(scope="module")
def tower() -> Tower:
    return Tower()


def names_of(plan: li.classes.Plan) -> list[str]:
    return [site.name for site in plan.sites]


def short(names: list[str]) -> list[str]:
    return [name.removeprefix("model.layers.") for name in names]


def test_what_a_plan_says_of_a_and_b_is_of_a_and_b_alone() -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    config = {"rank": 2, "targets": ["0", {"match": "1", "variant": "dora"}], "train": ["0.bias"]}
    plan = li.plan(model, config | {"expect": {"lora": 64, "trainable": 64 + 8 + 8}})
    assert (plan.n_lora, plan.n_further, plan.n_trained) == (64, {"m": 8}, 8)
    assert plan.n_trainable == len(torch.cat([p.flatten() for p in li.adapter_parameters(
        li.inject(model, config)).values()]))  # fmt: skip
    assert "2 sites: 64 in A and B, 8 in m + 8 trained in full = 80 trainable" in str(plan)
    assert plan.to_dict()["n_further"] == {"m": 8}


# Names and patterns


def test_canonical_names_lack_the_segments_of_wrappers_and_of_nobody_else() -> None:
    names = {
        "_orig_mod._orig_mod.q": "q",
        "m._fsdp_wrapped_module.0._checkpoint_wrapped_module.k": "m.0.k",
        "module.my_orig_mod._a_wrapped_module": "module.my_orig_mod._a_wrapped_module",
    }
    model = tree({name: linear() for name in names})
    assert names_of(li.plan(model, {"targets": [".+"]})) == [*names.values()]


PATTERNS = [
    ("Wq", ["Wq", "a.b.Wq"], ["aWq", "a.Wqx", "c.Wq.weight", "wq"]),
    (r"attn\.W[qv]", ["attn.Wq", "h.0.attn.Wv"], ["attn.Wk", "xattn.Wq", "attn_Wq"]),
    ("^a|b", ["a", "x.b"], ["x.a", "ab"]),
    (r"(q)?x(?(1)y|z)", ["qxy", "xz", "a.xz"], ["qxz", "a.xy"]),
    ("(?i:Q)_proj", ["a.q_proj"], ["a.Q_PROJ"]),
    (r"(?<!q\.)weight", ["k.weight", "weight"], ["q.weight"]),
    (r"größe|a\+b \[c]", ["a.größe", "x.a+b [c]"], ["a.grosse", "x.ab [c]"]),
    (r"q{e}|q{1<=e<=2}|[{]k{2}", ["q{e}", "{kk"], ["q", "qx"]),  # text, as Python reads it
]


@pytest.mark.parametrize(("pattern", "hits", "misses"), PATTERNS)
def test_a_pattern_matches_the_end_from_a_dot(pattern, hits, misses) -> None:
    model = tree({name: matrix(8, 8) for name in hits + misses})
    assert {*names_of(li.plan(model, {"targets": [pattern]}))} == {*hits}


# Ways of which `re`, which cannot be stopped, tries more on a name than anybody can wait for.
ENDLESS = [
    ("targets", "(a+)+c", "matched none"),
    ("train", ".*.*.*.*.*.*.*.*.*.*d", "matched none"),
    ("exclude", "(a|aa)+c", "5 s"),
    ("targets", "((a|aa)(b|)){1,40}c", "5 s"),
]


@pytest.mark.slow  # some take the time that they are given
@pytest.mark.parametrize(("field", "pattern", "said"), ENDLESS)
def test_a_pattern_ends_or_is_refused_by_name(field: str, pattern: str, said: str) -> None:
    model = tree({"x": nn.Linear(2, 2), f"c.{'a' * 60}b": nn.Linear(2, 2)})
    with refused(li.MatchError, f"'{pattern}'", said, model=model):
        li.inject(model, {"targets": ["x"]} | {field: [pattern]})


@pytest.mark.slow
def test_a_renaming_ends_or_is_refused_by_its_name() -> None:
    state = states.state_of(states.linear(f"c.{'a' * 60}b"))
    with refused(li.StateError, "rename '(a|aa)+c'", "5 s"):
        li.algebra.rename(state, {"(a|aa)+c": "x"})
    with refused(li.StateError, "rename '(a+)+c'", "no name"):
        li.algebra.rename(state, {"(a+)+c": "x"})


pieces = st.sampled_from(
    [
        *["q", "k", "_", "0", r"\.", ".", "[qk]", "(q|k)", "(?:q|k)*", "(q)", "q?", ".*", r"\w+"],
        *["^", "$", "|", r"\d+", r"\b", r"(?=k)", r"(?<=\.)", "(?i:Q)", r"\Z", "#"],
    ]
)
flags = st.sampled_from(["", "", "(?i)", "(?x)", "(?s)(?i)", "(?m)", "(?a)", "(?xi) "])
parts = st.sampled_from(["q", "k", "qk", "Q_0", "0", "q_k", "\n"])
dotted = st.lists(parts, min_size=1, max_size=4).map(".".join)


@settings(max_examples=200)
@given(flags, st.lists(pieces, min_size=1, max_size=5).map("".join), st.sets(dotted, min_size=1))
def test_wrapping_a_pattern_changes_nothing_inside_it(flag, body, names) -> None:
    def means(name: str) -> bool:
        """Whether the pattern alone matches from the start, or from some dot, to the end."""
        starts = [0, *(dot.end() for dot in re.finditer(r"\.", name))]
        return any(re.compile(flag + body).fullmatch(name, start) for start in starts)

    ends = {n for n in names if not any(other.startswith(f"{n}.") for other in names)}
    model = tree({name: matrix(8, 8) for name in ends})
    try:
        hit = {*names_of(li.plan(model, {"targets": [flag + body]}))}
    except li.ConfigError:
        assert means("")  # such a pattern is refused
        return
    except li.MatchError:
        hit = set()
    assert hit == {name for name in ends if means(name)}


# Sites


def test_a_site_has_the_hyper_parameters_of_its_rule_in_the_order_of_the_model(tower) -> None:
    rule = li.classes.Rule(
        match="v_proj", rank=4, alpha=6, dropout=0.25, init={"normal": 0.5}, scaling="rslora",
        compute="float32",
    )  # fmt: skip
    plan = li.plan(tower, li.Config(rank=2, targets=[rule, "q_proj"]))
    assert [(site.name, site.rule, site.rank, site.scale) for site in plan.sites] == [
        ("model.layers.0.attn.q_proj", 1, 2, 8.0),
        ("model.layers.0.attn.v_proj", 0, 4, 3.0),
        ("model.layers.1.attn.q_proj", 1, 2, 8.0),
        ("model.layers.1.attn.v_proj", 0, 4, 3.0),
    ]
    site = plan.sites[1]
    assert (site.alpha, site.dropout, site.init) == (6.0, 0.25, ("normal", 0.5))
    assert (site.scaling, site.compute) == ("rslora", "float32")
    assert plan.n_sites_by_rule == (2, 2)
    assert plan.n_lora == plan.n_trainable == 2 * (4 * 16 + 2 * 16)


# Names below `model.layers.` are written without it.
SITES = r"""
{targets: [q_proj], exclude: ['layers\.0']} => 1.attn.q_proj
{targets: [q_proj], exclude: ['0\.attn\.q_proj\.weight']} => 1.attn.q_proj
{targets: [q_proj], exclude: ['0\.attn\.q_proj\.bias']} => 0.attn.q_proj 1.attn.q_proj
{targets: ['.*(q|k)_proj(\.weight)?'], exclude: [q_proj]} => 0.attn.k_proj 1.attn.k_proj
{targets: [q_proj, 'up\.weight'], exclude: ['0\.mlp\.up']} => 0.attn.q_proj 1.attn.q_proj
    1.mlp.up.weight
targets: ['0.*q_proj\.weight', '[qk]_proj'] => 0.attn.q_proj.weight 0.attn.k_proj 1.attn.q_proj
    1.attn.k_proj
targets: [{match: .+, kind: embedding}, up] => model.embed 0.mlp.up 1.mlp.up
targets: [{match: all-linear, layers: 1}] => 1.attn.q_proj 1.attn.k_proj 1.attn.v_proj
    1.attn.out_proj 1.mlp.up 1.mlp.down
targets: [{match: '1\.attn\.v_proj', layers: [0, 1]}, {match: up, layers: [0-1]}] => 0.mlp.up
    1.attn.v_proj 1.mlp.up
"""


@pytest.mark.parametrize(("config", "sites"), rows(SITES))
def test_rules_and_excludes_leave_these_sites(config: str, sites: str, tower: Tower) -> None:
    assert short(names_of(li.plan(tower, li.Config.from_text(config)))) == sites.split()


def test_a_shared_module_is_one_site_whichever_name_is_hit() -> None:
    shared = linear()
    model = tree({"encoder.q": shared, "decoder.q": shared, "decoder.k": linear()})
    assert names_of(li.plan(model, {"targets": [r"decoder\.q\.weight"]})) == ["encoder.q.weight"]
    # What is excluded under one of its names would be adapted under the other.
    with refused(li.MatchError, "'q'", "exclude"):
        li.plan(model, {"targets": ["q"], "exclude": ["decoder"]})
    trained = li.plan(model, {"train": [r"decoder\.q"]}).trained
    assert [t.name for t in trained] == ["encoder.q.weight", "encoder.q.bias"]


def test_what_cannot_carry_an_adapter_is_refused_unless_it_is_not_meant() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.LazyLinear(4))
    for target in (".+", "1", r"1\.weight"):
        with refused(li.LayerError, "'1"):
            li.plan(model, {"targets": ["0", target]})
    assert names_of(li.plan(model, {"targets": [".+"], "exclude": ["1"]})) == ["0"]


# Refusals: the rule, what was found, and what to write instead

REFUSED = r"""
targets: [q_proj, v_prj] => rule 2 ('v_prj') | 'model.layers.0.attn.v_proj', 'model.layers.0.attn.q_
targets: ['model\.layer\.\d+\.mlp'] => Nearest: 'model.layers.0.mlp
targets: [zzz] => rule 1 ('zzz') | 'model.layers.{0..1}.attn.q_proj'
{targets: [q_proj], exclude: [lm_haed]} => exclude 1 ('lm_haed') | 'lm_head'
targets: ['q_proj\.weight', q_proj] => rule 2 ('q_proj') | rule 1 (2) | narrower
targets: [mlp] => 'model.layers.0.mlp' (container) | 'model.layers.0.mlp.up'
targets: [running_mean] => 'model.norm.running_mean' | buffer
targets: [{match: up, layers: [0, 2-7]}] => layers 2-7 | 0 to 1
targets: [{match: up, layers: 6-8}] => layers 6-8 | 0 to 1
targets: [{match: up, layers: 0-2}] => layers 0-2 | 0 to 1
targets: [{match: up, layers: [0, 1-5]}] => layers 1-5 | 0 to 1
targets: [{match: lm_head, layers: 0}] => 'lm_head' | Remove layers
targets: [{match: .+proj, kind: linaer}] => 'linaer' | linear (8) | 'linear'
targets: [{match: up, rank: 9, init: pissa}] => 'model.layers.0.mlp.up' | rank 9 | rank: 8
targets: [{match: up, slices: {a: 12, b: 3}, adapt: [a]}] => 12 + 3 = 15 | 16
targets: [{match: embed, slices: [a, b], adapt: [a]}] => 'model.embed' | slices | embedding
targets: [{match: q_proj, layout: in_out}] => 'model.layers.0.attn.q_proj' | layout | (8, 8)
{targets: ['q_proj\.weight'], dropout: 0.1} => 'model.layers.0.attn.q_proj.weight' | dropout 0.1
{targets: [q_proj], train: ['layers\.1']} => 'model.layers.1.attn.q_proj.weight' | Exclude
{targets: [q_proj], train: [drop]} => train 1 ('drop') | no parameters
{targets: [up], bias: adapted} => bias: adapted | bias: none
{targets: [q_proj, k_proj], rank: 2, train: [lm_head], expect: {sites: 3, lora: 128, trainable: 9}}
    => {sites: 3, trainable: 9} | sites: 4, trainable: 384 | rule 1 ('q_proj') 2 sites |
    rule 2 ('k_proj') 2 sites | 256 elements
"""


@pytest.mark.parametrize(("config", "named"), rows(REFUSED))
def test_a_refusal_names_the_rule_what_was_found_and_what_to_write(config, named, tower) -> None:
    with refused(li.MatchError, *named.split(" | "), model=tower):
        li.plan(tower, li.Config.from_text(config))


# Stacked parameters; what their axes mean is computed in the table of kinds


def test_a_stacked_parameter_needs_its_layout() -> None:
    model = tree({"mlp.experts.up": nn.Parameter(torch.randn(4, 12, 8))})
    for layout, n_in, n_out in (("out_in", 8, 12), ("in_out", 12, 8)):
        (site,) = li.plan(model, {"targets": [{"match": "up", "layout": layout}]}).sites
        assert (site.a_shape, site.b_shape) == ((4, 8, n_in), (4, n_out, 8))
    rule = {"match": "up", "layout": "out_in", "slices": ["a", "b"], "adapt": ["a"]}
    for target, names in (("up", ["4 matrices", "out_in", "in_out"]), (rule, ["slices", "stack"])):
        with refused(li.MatchError, "'mlp.experts.up'", *names, model=model):
            li.plan(model, {"targets": [target]})


@pytest.mark.parametrize("axes", [([0], [2]), ([1], [0, 2]), ([0], [0, 1, 2]), ([0], [3])], ids=str)
def test_axes_that_are_not_a_matrix_in_memory_order_are_refused(axes: Any) -> None:
    rule = {"match": "Wq", "layout": {"in": axes[0], "out": axes[1]}}
    with refused(li.MatchError, f"in {axes[0]} and out {axes[1]}", "(6, 4, 3)"):
        li.plan(tree({"Wq": matrix(6, 4, 3)}), {"targets": [rule]})


# What else trains

TRAINED = r"""
{targets: [q_proj], train: [norm, '0\.norm\.bias', mlp], exclude: [norm, '1\.mlp']} =>
    0.mlp.up.weight 0.mlp.down.weight 1.mlp.up.weight 1.mlp.down.weight 0.norm.weight 0.norm.bias
    1.norm.weight 1.norm.bias
{targets: [q_proj, '1.*k_proj\.weight'], bias: adapted} => 0.attn.q_proj.bias 1.attn.q_proj.bias
    1.attn.k_proj.bias
{targets: [q_proj], train: ['0.*q_proj\.bias'], exclude: [mlp], bias: all} => 0.norm.bias
    0.attn.q_proj.bias 0.attn.k_proj.bias 0.attn.v_proj.bias 0.attn.out_proj.bias 1.norm.bias
    1.attn.q_proj.bias 1.attn.k_proj.bias 1.attn.v_proj.bias 1.attn.out_proj.bias
"""


@pytest.mark.parametrize(("config", "names"), rows(TRAINED))
def test_train_names_parameters_or_modules_and_exclude_leaves_them_alone(
    config: str, names: str, tower: Tower
) -> None:
    plan = li.plan(tower, li.Config.from_text(config))
    assert sorted(short([entry.name for entry in plan.trained])) == sorted(names.split())
    assert plan.n_trainable == plan.n_lora + plan.n_trained


def test_biases_are_known_by_their_last_segment() -> None:
    model = tree({
        "q": linear(bias=False),
        "mha.in_proj_weight": matrix(24, 8),
        "mha.in_proj_bias": matrix(24),
        "experts.up_bias": matrix(4, 8),  # stacked, one row for each expert
        "norm.biased": matrix(8),
        "mha.out.bias": matrix(8),
        "relative_attention_bias": nn.Embedding(32, 8, device="meta"),
    })  # fmt: skip
    (adapted,) = li.plan(model, {"targets": ["in_proj_weight"], "bias": "adapted"}).trained
    assert adapted.name == "mha.in_proj_bias"
    every = {entry.name for entry in li.plan(model, {"bias": "all"}).trained}
    assert every == {"mha.in_proj_bias", "experts.up_bias", "mha.out.bias"}


# The plan


NOTED = [
    (linear(dtype=torch.bfloat16), "0.weight", {}, "bfloat16"),
    (linear(8, 1), "0", {}, "'0' (8 -> 1)"),
    (linear(), "0", {}, "more elements than W at '0'"),
    (linear(dtype=torch.bfloat16), "0", {"rank": 2}, None),
]


@pytest.mark.parametrize(("layer", "target", "options", "noted"), NOTED)
def test_the_plan_notes_what_may_not_be_meant(layer, target, options, noted) -> None:
    notes = li.plan(nn.Sequential(layer), {"rank": 6, "targets": [target], **options}).notes
    assert any(noted in note for note in notes) if noted else not notes, notes


# Configs with an entry for each layer

EACH: dict[str, Callable[[list[str]], Any]] = {
    "targets": lambda names: {"targets": [*map(re.escape, names)]},
    "targets as they are": lambda names: {"targets": names},
    "exclude": lambda names: {"targets": ["k"], "exclude": names},
    "train": lambda names: {"targets": ["k"], "train": names},
    "tokens": lambda names: {"targets": ["k"], "tokens": {name: [1] for name in names}},
    "of PEFT": lambda names: peft.LoraConfig(target_modules=names),
}


@pytest.mark.parametrize("what", EACH)
def test_a_plan_costs_each_entry_the_same_however_many_there_are(what: str) -> None:
    counts = []
    for n in (100, 400):
        names = [f"layers.{i}.q" for i in range(n)]
        make = (lambda: nn.Embedding(4, 4, device="meta")) if what == "tokens" else linear
        model = tree({k: v for n in names for k, v in ((n, make()), (f"{n[:-1]}k", linear()))})
        profile = cProfile.Profile()
        profile.runcall(li.plan, model, EACH[what](names))
        counts.append(sum(entry.callcount for entry in profile.getstats()))
    assert counts[1] < 5 * counts[0]


# Any model, any rules

leaf_patterns = st.sampled_from(
    ["q", "k", "q|k", ".+", r"q\.weight", r".*\.weight", r"a\..*", r"b\.q", r"k(\.weight)?", "norm"]
)
leaves = st.sets(st.sampled_from(["a.q", "a.k", "b.q", "b.k", "q"]), min_size=1)


@settings(max_examples=200)
@given(
    leaves, leaves, st.lists(leaf_patterns, min_size=1, max_size=3),
    st.lists(leaf_patterns, max_size=1),
)  # fmt: skip
def test_no_rules_ever_give_one_tensor_two_sites(names, shared, patterns, exclude) -> None:
    layers = {name: linear(bias=False) for name in sorted(names)}
    others = {f"alias.{name}": layers[name] for name in sorted(shared & names)}
    model = tree({**layers, **others, "norm": nn.LayerNorm(8, device="meta")})

    def hit(pattern: str, site: str) -> bool:
        return any(re.search(rf"(^|\.)(?:{pattern})$", name) for name in (site, f"alias.{site}")
                   if name == site or site.removesuffix(".weight") in shared)  # fmt: skip

    try:
        plan = li.plan(model, {"targets": patterns, "exclude": exclude})
    except li.MatchError:
        return
    weights = [site.weight for site in plan.sites]
    assert len(set(weights)) == len(weights)
    for site in plan.sites:
        assert site.rule == [hit(pattern, site.name) for pattern in patterns].index(True)
        assert not any(hit(pattern, site.name) for pattern in exclude)
