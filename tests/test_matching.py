"""Matching: which names a pattern means, which sites come of them, and the words when none do."""

import re
from typing import Any

import pytest
from helpers.tables import rows
from hypothesis import given, settings
from hypothesis import strategies as st

from lora_inject.core.spec import bounded_patterns
from lora_inject.core.spec.config import Config, Rule
from lora_inject.core.spec.inventory import Candidate, Inventory
from lora_inject.core.spec.key_lists import inventory_of
from lora_inject.core.spec.matching import resolve
from lora_inject.core.spec.names import canonical
from lora_inject.core.spec.patterns import matching
from lora_inject.core.spec.plan import Plan
from lora_inject.errors import LayerError, MatchError


def linear(name: str, n_in: int = 8, n_out: int = 8, **more: Any) -> Candidate:
    return Candidate(name, "linear", n_in, n_out, (n_out, n_in), f"{name}.weight", **more)


def embedding(name: str, num: int = 32, dim: int = 8) -> Candidate:
    weight = f"{name}.weight"
    return Candidate(name, "embedding", num, dim, (num, dim), weight, transposed=True)


def parameter(name: str, *shape: int) -> Candidate:
    owner = name.rpartition(".")[0]
    experts = {"experts": shape[0], "needs_layout": True} if len(shape) > 2 else {}
    n_out, n_in = shape[-2:]
    more = {"owner": owner, "update": "weight", **experts}
    return Candidate(name, "parameter", n_in, n_out, shape, name, **more)


def inventory(
    *candidates: Candidate,
    others: dict[str, str] | None = None,
    parameters: dict[str, tuple[int, ...]] | None = None,
    **more: Any,
) -> Inventory:
    shapes = {c.weight: c.weight_shape for c in candidates if c.weight} | (parameters or {})
    aliases = {
        alias + name.removeprefix(candidate.name): name
        for candidate in candidates
        for name in shapes
        for alias in candidate.aliases
        if name.startswith(f"{candidate.name}.")
    }
    return Inventory(candidates, others or {}, shapes, aliases=aliases, **more)


def tower() -> Inventory:
    """A small decoder: two layers of q, k, v, out; up, down; norms; an embedding and a head."""
    candidates, others, extra = [embedding("model.embed")], {"model": "container"}, {}
    for i in range(2):
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


# Names and patterns


def test_canonical_names_lack_the_segments_of_wrappers_and_of_nobody_else() -> None:
    names = {
        "_orig_mod._orig_mod.q": "q",
        "_orig_mod": "",
        "m._fsdp_wrapped_module.0._checkpoint_wrapped_module.q": "m.0.q",
        "q.parametrizations.weight.original": "q.parametrizations.weight.original",
        "module.my_orig_mod._a_wrapped_module": "module.my_orig_mod._a_wrapped_module",
    }
    assert {name: canonical(name) for name in names} == names


@pytest.mark.parametrize(
    ("pattern", "hits", "misses"),
    [
        ("Wq", ["Wq", "a.b.Wq"], ["aWq", "a.Wqx", "a.Wq.weight", "wq", "Wq."]),
        (r"attn\.W[qv]", ["attn.Wq", "h.0.attn.Wv"], ["attn.Wk", "xattn.Wq", "attn_Wq"]),
        ("^a|b", ["a", "x.b"], ["x.a", "ab"]),
        (r"(q)?x(?(1)y|z)", ["qxy", "xz", "a.xz"], ["qxz", "a.xy"]),
        ("(?i:Q)_proj", ["a.q_proj"], ["a.Q_PROJ"]),
        (r"(?<!q\.)weight", ["k.weight", "weight"], ["q.weight"]),
        ("größe|a\\+b \\[c]", ["a.größe", "x.a+b [c]"], ["a.grosse", "x.ab [c]"]),
        (r"q{e}|q{1<=e<=2}|[{]k{2}", ["q{e}", "{kk"], ["q", "qx"]),  # text, as Python reads it
        ("^$", [""], ["a"]),
    ],
)  # fmt: skip
def test_a_pattern_matches_the_end_from_a_dot(pattern, hits, misses) -> None:
    assert matching(pattern, hits + misses, asked="here") == hits


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
    def means(name: str) -> bool:
        """Whether the pattern alone matches from the start, or from some dot, to the end."""
        starts = [0, *(dot.end() for dot in re.finditer(r"\.", name))]
        return any(re.compile(flag + body).fullmatch(name, start) for start in starts)

    assert matching(flag + body, names, asked="here") == [n for n in names if means(n)]


@pytest.mark.parametrize("pattern", ["(a|a)+b|(a|a)+c", "(?x) (a|a) +[bc]"])
def test_a_pattern_that_backtracks_without_end_is_refused_in_time(pattern: str) -> None:
    with pytest.raises(MatchError, match=r"here: it took more than 0.05 s .*on 'h.0.aaa"):
        matching(pattern, [f"h.0.{'a' * 40}"], asked="here", seconds=0.05)


@pytest.mark.parametrize("pattern", ["(?x:(a+) +)X", "(?i-s:(?x: (a+)\n+ ))X", ".*" * 60 + "X"])
def test_a_pattern_that_may_explode_is_matched_with_a_clock(pattern: str) -> None:
    assert bounded_patterns.steps_of(pattern, 28) > bounded_patterns.FEW_STEPS


# Sites


def test_a_site_has_the_hyper_parameters_of_its_rule_in_the_order_of_the_model() -> None:
    rule = Rule(
        match="v_proj", rank=4, alpha=6, dropout=0.25, init={"normal": 0.5}, scaling="rslora",
        compute="float32",
    )  # fmt: skip
    plan = resolve(Config(rank=2, targets=[rule, "q_proj"]), tower())
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
def test_rules_and_excludes_leave_these_sites(config: str, sites: str) -> None:
    plan = resolve(Config.from_text(config), tower())
    assert [name.removeprefix("model.layers.") for name in site_names(plan)] == sites.split()


def test_the_weight_of_an_embedding_is_a_parameter_that_is_turned() -> None:
    (embed,) = resolve(Config(targets=["embed.weight"], rank=2), tower()).sites
    assert (embed.kind, embed.update, embed.transposed) == ("parameter", "weight", True)
    assert (embed.a_shape, embed.b_shape) == ((2, 32), (8, 2))


def test_a_shared_module_is_one_site_whichever_name_is_hit() -> None:
    shared = linear("encoder.q", aliases=("decoder.q",))
    names = inventory(shared, linear("decoder.k"), parameters={"encoder.q.bias": (8,)})
    weight = resolve(Config(targets=[r"decoder\.q\.weight"]), names)
    assert site_names(weight) == ["encoder.q.weight"]
    # What is excluded under one of its names would be adapted under the other.
    assert "taken by exclude (1)" in refused(Config(targets=["q"], exclude=["decoder"]), names)
    trained = resolve(Config(train=[r"decoder\.q"]), names).trained
    assert [t.name for t in trained] == ["encoder.q.weight", "encoder.q.bias"]


def test_a_module_counts_before_a_candidate_of_its_weight() -> None:
    weight = parameter("q.weight", 8, 8)._replace(owner="q")
    for order in ((linear("q"), weight), (weight, linear("q"))):
        (site,) = resolve(Config(targets=[".+"]), inventory(*order)).sites
        assert (site.name, site.kind) == ("q", "linear")


# Refusals

REFUSED = r"""
targets: [q_proj, v_prj] => rule 2 ('v_prj'): matched none of 51 names. Nearest:
    'model.layers.0.attn.v_proj', 'model.layers.0.attn.q_proj', 'model.layers.0.attn.k_proj'.
targets: ['model\.layer\.\d+\.mlp'] => Nearest: 'model.layers.0.mlp.up',
targets: [zzz] => Nothing is spelled like it; there is 'model.embed',
    'model.layers.{0..1}.attn.q_proj', 'model.layers.{0..1}.attn.k_proj',
{targets: [q_proj], exclude: [lm_haed]} => exclude 1 ('lm_haed'): matched none of 52 names. Nearest:
    'lm_head'.
targets: ['q_proj\.weight', q_proj] => rule 2 ('q_proj'): all that it matches is taken by rule 1
    (2). Put the narrower rule first, or remove this one.
targets: [mlp] => matches only what cannot take an adapter: 'model.layers.0.mlp' (container),
    'model.layers.1.mlp' (container). Name what is in it: 'model.layers.0.mlp.up',
targets: [running_mean] => matches only buffers: 'model.norm.running_mean'. Name a module
targets: [{match: up, layers: [0, 2-7]}] => all of layers 2-7. Its layers are 0 to 1.
targets: [{match: lm_head, layers: 0}] => Remove layers; no name that it matches has one.
targets: [{match: .+proj, kind: linaer}] => of kind 'linaer', but of linear (8). Did you mean
targets: [{match: up, rank: 9, init: pissa}] => 'model.layers.0.mlp.up', matched by rule 1 ('up'):
    init pissa with rank 9, but W has a rank of at most 8. Give the rule rank: 8, or another init.
targets: [{match: up, slices: {a: 12, b: 3}, adapt: [a]}] => slices of 12 + 3 = 15, but it has 16
    outputs. Give the widths along its output.
targets: [{match: embed, slices: [a, b], adapt: [a]}] => slices, but it is of kind embedding.
targets: [{match: q_proj, layout: in_out}] => a layout, but a linear of shape (8, 8) has its own.
{targets: ['q_proj\.weight'], dropout: 0.1} => dropout 0.1 on a weight that is read, not called with
{targets: [q_proj], train: ['layers\.1']} => 'model.layers.1.attn.q_proj.weight' is the weight of
    the site 'model.layers.1.attn.q_proj': adapted and trained both. Exclude
{targets: [q_proj], train: [drop]} => with no parameters. Name what has parameters.
{targets: [up], bias: adapted} => none of 2 adapted modules is or has a bias. Set bias: none, or all
{targets: [q_proj, k_proj], rank: 2, train: [lm_head], expect: {sites: 3, lora: 128, trainable: 9}}
    => expect {sites: 3, trainable: 9}: found sites: 4, trainable: 384 (rule 1 ('q_proj') 2 sites;
    rule 2 ('k_proj') 2 sites; train and bias 256 elements). Correct the rules, or the counts.
"""


@pytest.mark.parametrize(("config", "words"), rows(REFUSED))
def test_a_refusal_says_what_was_asked_what_was_found_and_what_to_do(config, words) -> None:
    assert words in refused(Config.from_text(config), tower())


def test_a_candidate_that_is_refused_says_why_unless_it_is_not_meant() -> None:
    refusal = ("is read by its MultiheadAttention, never called", "Target 'attn' instead")
    names = inventory(linear("attn.out_proj", refusal=refusal), linear("attn.q_proj"))
    # Its weight is refused with it: a packed or parametrized weight is not W.
    for pattern in (".*proj", r"out_proj\.weight"):
        message = refused(Config(targets=[pattern]), names, LayerError)
        assert "MultiheadAttention, never called. Target 'attn' instead." in message
    config = Config(targets=[".*proj"], exclude=["out_proj"])
    assert site_names(resolve(config, names)) == ["attn.q_proj"]


def test_a_pattern_for_stacked_experts_is_told_that_experts_are_modules() -> None:
    names = [f"h.{i}.mlp.experts.{e}.{w}" for i in "01" for e in "01" for w in ("w1", "w2")]
    model = inventory(*map(linear, names))
    message = refused(Config(targets=[r"h\.\d+\.mlp\.experts\.(gate_up|down)_proj"]), model)
    assert "experts are modules here, each of its own" in message
    pattern = message.partition("Match those: ")[2].rstrip(".")
    assert resolve(Config(targets=[pattern]), model).n_sites == len(names)


# Stacked parameters; what their axes mean is computed in test_layouts.py


def test_a_stacked_parameter_needs_its_layout() -> None:
    names = inventory(parameter("mlp.experts.up", 4, 12, 8))
    for layout, n_in, n_out in (("out_in", 8, 12), ("in_out", 12, 8)):
        (site,) = resolve(Config(targets=[Rule(match="up", rank=2, layout=layout)]), names).sites
        assert (site.a_shape, site.b_shape) == ((4, 2, n_in), (4, n_out, 2))
    message = refused(Config(targets=["up"]), names)
    assert "a stack of 4 matrices, 12 x 8. Say with layout: out_in (x @ W.T, as Mix" in message
    rule = Rule(match="up", layout="out_in", slices=["a", "b"], adapt=["a"])
    assert "slices, but it is a stack of matrices" in refused(Config(targets=[rule]), names)


@pytest.mark.parametrize("axes", [([0], [2]), ([1], [0, 2]), ([0], [0, 1, 2]), ([0], [3])], ids=str)
def test_axes_that_are_not_a_matrix_in_memory_order_are_refused(axes: Any) -> None:
    config = Config(targets=[Rule(match="Wq", layout={"in": axes[0], "out": axes[1]})])
    message = refused(config, inventory(parameter("Wq", 6, 4, 3)))
    assert f"a layout of in {axes[0]} and out {axes[1]}, but the shape is (6, 4, 3)" in message


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
def test_train_names_parameters_or_modules_and_exclude_leaves_them_alone(config, names) -> None:
    plan = resolve(Config.from_text(config), tower())
    short = [entry.name.removeprefix("model.layers.") for entry in plan.trained]
    assert sorted(short) == sorted(names.split())
    assert plan.n_trainable == plan.n_lora + plan.n_trained


def test_biases_are_known_by_their_last_segment() -> None:
    parameters = {
        "mha.in_proj_bias": (24,),
        "mha.bias_k": (1, 1, 8),
        "experts.up_bias": (4, 8),  # stacked, one row for each expert
        "norm.biased": (8,),
        "mha.out.bias": (8,),
    }
    raw, table = parameter("mha.in_proj_weight", 24, 8), embedding("relative_attention_bias")
    names = inventory(linear("q"), raw, table, parameters=parameters)
    (adapted,) = resolve(Config(targets=["in_proj_weight"], bias="adapted"), names).trained
    assert (adapted.name, adapted.why) == ("mha.in_proj_bias", "bias: adapted")
    every = [entry.name for entry in resolve(Config(bias="all"), names).trained]
    assert every == ["mha.in_proj_bias", "experts.up_bias", "mha.out.bias"]


# The plan


def test_the_plan_prints_what_each_rule_meets_and_what_trains() -> None:
    up = Rule(match="up", slices=["a", "b"], adapt=["b"], rank=4, scaling="rslora", dropout=0.1)
    config = Config(rank=2, targets=["[qk]_proj", up], train=["lm_head"], bias="adapted")
    text = str(resolve(config, tower()))
    for line in (
        "  model.layers.{0..1}.attn.k_proj  x2  linear  8 -> 8  32 each  64\n",
        "rule 2 'up': rank 4, scale 16/sqrt(4), kaiming, dropout 0.1\n",
        "  model.layers.{0..1}.mlp.up  x2  linear  8 -> 16 [b]  64 each  128\n",
        "  lm_head.weight  x1  trained  32 x 8  256 each  256\n",
        "6 sites: 256 in A and B + 288 trained in full = 544 trainable, ",
    ):
        assert line in text


def test_the_plan_notes_what_may_not_be_meant() -> None:
    half = linear("out", update="weight", dtype="bfloat16")
    for targets, candidate, note in (
        (["out"], half, "1 weight update over bfloat16: W + delta is rounded on every read"),
        (["gate"], linear("gate", 8, 1), "the smaller side of 'gate' (8 -> 1); "),
        (["a"], linear("a"), "A and B have more elements than W at 'a'"),
    ):
        assert note in str(resolve(Config(targets=targets, rank=6), inventory(candidate)))
    wide = Config(targets=["out"], rank=2, compute="float32")
    assert not resolve(wide, inventory(half)).notes
    assert "dropout 0.1" in refused(Config(targets=["out"], dropout=0.1), inventory(half))


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


def test_of_keys_only_a_bias_says_which_side_is_the_output() -> None:
    keys = {
        "wte.weight": (50, 8),
        "h.0.ln_1.weight": (8,),
        "h.0.c_attn.weight": (8, 24),
        "h.0.c_attn.bias": (24,),
        "h.0.c_proj.weight": (8, 8),
        "h.0.c_proj.bias": (8,),
        "h.0.experts.gate_up": (4, 32, 8),
        "h.0.empty.weight": (0, 8),
        "patch.weight": (8, 3, 4, 4),
    }
    names = inventory_of(keys)
    assert {c.name: (c.kind, c.in_features, c.out_features) for c in names.candidates} == {
        "wte": ("linear", 8, 50),  # no name says that it is an embedding
        "h.0.c_attn": ("conv1d", 8, 24),
        "h.0.c_proj": ("linear", 8, 8),  # square: its bias says nothing
        "h.0.experts.gate_up": ("parameter", 8, 32),
        "patch": ("conv", 48, 8),
    }
    assert "a stack of 4 matrices" in refused(Config(targets=["gate_up"]), names)
    for rule in ("all-linear", {"match": "c_proj", "kind": "linear"}):
        assert "does not say which kind of layer" in refused(Config(targets=[rule]), names)


def test_keys_with_wrapper_segments_keep_their_tensor_names() -> None:
    names = inventory_of({"_orig_mod.h.q.weight": (8, 8), "_orig_mod.h.q.bias": (8,)})
    plan = resolve(Config(targets=[r"^h\.q"], bias="adapted"), names)
    assert (plan.sites[0].name, plan.sites[0].weight) == ("h.q", "_orig_mod.h.q.weight")
    assert [t.name for t in plan.trained] == ["h.q.bias"]
    assert "adapted and trained both" in refused(Config(targets=["q"], train=["h"]), names)


def test_names_as_deep_as_a_file_can_make_them() -> None:
    deep = ".".join(["a"] * 3_000)
    names = inventory_of({f"{deep}.weight": (8, 8), "b.weight": (8, 8)})
    assert site_names(resolve(Config(targets=["a"], exclude=["b"]), names)) == [deep]
