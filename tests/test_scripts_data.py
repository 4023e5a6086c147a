"""The data and objective of scripts/: which functions are pairs, which tokens carry the loss."""

import ast
import math
import shutil
import sys
import warnings
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from conftest import script
from helpers.models import tiny_llama
from hypothesis import given
from hypothesis import strategies as st

pairs = script("data.pairs")

GOOD = '''
class Box:
    @property
    def area(self):
        """Return the area of this box in pixels.

        More about it, which is not the target.
        """
        # a comment
        width = self.right - self.left
        return width * (self.bottom - self.top)
'''


def source(
    summary: str = "Return the sum of both numbers.",
    name: str = "combine",
    body: str = "total = first + second\n    return total if total else None",
) -> str:
    """One function long enough to count."""
    arguments = "first_number: int=0, second_number: int=0, third_number: int=0"
    return f'def {name}({arguments}):\n    """{summary}"""\n    {body}\n'


# ------------------------------------------------------------------------------------ extraction


def test_context_is_signature_and_body_and_target_is_the_first_line() -> None:
    (pair,) = pairs.pairs_in(GOOD, "boxes")
    assert (pair.module, pair.name) == ("boxes", "Box.area")
    assert pair.summary == "Return the area of this box in pixels."
    assert pair.code == (
        "@property\n"
        "def area(self):\n"
        "    width = self.right - self.left\n"
        "    return width * (self.bottom - self.top)"
    )


def test_context_is_code_that_parses_and_holds_no_docstring() -> None:
    for text in (source(), f"async {source()}", f"if True:\n{_indent(source())}"):
        (pair,) = pairs.pairs_in(text, "m")
        (node,) = ast.parse(pair.code).body
        assert isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        assert ast.get_docstring(node) is None
        assert pair.summary not in pair.code


def _indent(text: str) -> str:
    return "".join(f"    {line}\n" for line in text.splitlines())


LONG = "value = 1\n    " * 60 + "return value"


@pytest.mark.parametrize(
    ("case", "text"),
    [
        ("no docstring", source().replace('"""Return the sum of both numbers."""', "'a'; x = 1")),
        ("no full stop", source("Return the sum of both numbers")),
        ("no capital", source("return the sum of both numbers.")),
        ("not ASCII", source("Return the sum of both numbérs.")),
        ("too short", source("Return the sum.")),
        ("too few words", source("Straightforwardly commutative addition.")),
        ("too long", source(f"Return {'very ' * 20}long sums.")),
        ("a reference", source("See the sum of both numbers.")),
        ("markup", source("Return the :class:`Sum` of both numbers.")),
        ("special method", source(name="__add__")),
        ("test", source(name="test_combine")),
        ("stub", source(body="pass")),
        (
            "abstract",
            source(body="raise NotImplementedError('to be done by every subclass of it')"),
        ),
        ("only calls", source(body="print('nothing to be learned from this one, or too little')")),
        ("code too long", source(body=LONG)),
        ("code too short", 'def f(x):\n    """Return the sum of both numbers."""\n    return x\n'),
        ("target in the code", source(body="return 'Return the sum of both numbers.'")),
        ("inside a function", f"def outer():\n{_indent(source())}"),
        ("does not parse", source() + "def ("),
        ("null byte", source() + "\0"),
    ],
)
def test_left_out(case: str, text: str) -> None:
    assert pairs.pairs_in(text, "m") == [], case


def test_the_cases_above_are_left_out_for_their_reason_alone() -> None:
    assert len(pairs.pairs_in(source(), "m")) == 1


def test_warnings_of_foreign_sources_stay_inside() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert len(pairs.pairs_in("x = '\\d'\n" + source(), "m")) == 1


# ----------------------------------------------------------------------------------------- split


def _pair(module: int, name: str, code: str, summary: str) -> object:
    return pairs.Pair(f"module{module}", name, code, summary)


some_pairs = st.lists(
    st.builds(
        _pair,
        st.integers(0, 30),
        st.sampled_from([f"{c}f{i}" for i in range(40) for c in ("", "A.", "B.")]),
        st.integers(0, 60).map("code {}".format),
        st.integers(0, 60).map("Summary {}.".format),
    ),
    max_size=80,
)


@given(some_pairs, st.randoms())
def test_split_shares_nothing_and_depends_on_no_order(some: list, random: object) -> None:
    split = pairs.split_by_module(some)
    for key in ("module", "code", "summary"):
        sides = [{getattr(pair, key) for pair in side} for side in (split.train, split.held_out)]
        assert sides[0].isdisjoint(sides[1]), key
    bare = [{p.name.split(".")[-1] for p in side} for side in (split.train, split.held_out)]
    assert bare[0].isdisjoint(bare[1])
    assert set(split.train) | set(split.held_out) <= set(some)

    unique = {(p.module, p.name): p for p in some}.values()  # as within one installation
    mixed = list(unique)
    random.shuffle(mixed)  # type: ignore[attr-defined]
    assert pairs.split_by_module(mixed) == pairs.split_by_module(unique)


def test_split_counts_twins_once_whatever_their_capitals() -> None:
    twins = [_pair(i, f"f{i}", f"code {i}", ("Same.", "SAME.")[i % 2]) for i in range(6)]
    split = pairs.split_by_module(twins)
    assert len(split.train) + len(split.held_out) == 1


def test_split_holds_out_the_share_that_was_asked_for() -> None:
    many = [_pair(i, f"f{i}", f"code {i}", f"Summary {i}.") for i in range(3000)]
    split = pairs.split_by_module(many, share=0.2)
    assert len(split.train) + len(split.held_out) == 3000
    assert abs(len(split.held_out) - 600) < 4 * math.sqrt(3000 * 0.2 * 0.8)
    assert not pairs.split_by_module(many, share=0.0).held_out
    assert not pairs.split_by_module(many, share=1.0).train


def test_collect_reads_the_standard_library_without_importing_it(tmp_path, monkeypatch) -> None:
    """A part of it: all of it takes seconds."""
    library = Path(pairs.sysconfig.get_path("stdlib"))
    for name in ("asyncio", "email", "http", "importlib", "logging", "unittest"):
        shutil.copytree(library / name, tmp_path / name)
    for name in ("calendar", "poplib", "textwrap", "idlelib/help", "test/test_abc"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        shutil.copy(library / f"{name}.py", (tmp_path / name).with_suffix(".py"))
    monkeypatch.setattr(pairs.sysconfig, "get_path", {"stdlib": tmp_path}.__getitem__)
    before = set(sys.modules)
    split = pairs.collect(packages=("a_package_that_is_not_installed",))
    assert len(split.train) > 100
    assert len(split.held_out) > 15
    modules = {pair.module for pair in split.train + split.held_out}
    assert {"textwrap", "calendar"} & modules
    assert not any({"test", "tests", "idlelib"} & set(m.split(".")) for m in modules)
    assert not {"calendar", "poplib", "nntplib"} & (set(sys.modules) - before)


# --------------------------------------------------------------------------------------- masking


class Letters:
    """A tokenizer with one token for each character."""

    eos_token_id = 1

    def encode(self, text: str) -> list[int]:
        return [2 + ord(c) for c in text]


PAIR = pairs.Pair("m", "f", "code", "Target.")


@pytest.mark.parametrize("ended", [True, False])
def test_encode_keeps_prompt_and_target_apart(ended: bool) -> None:
    letters = Letters()
    example = pairs.encode(letters, PAIR, ended=ended)
    prompt, target = example.tokens[: example.n_prompt], example.tokens[example.n_prompt :]
    assert prompt == letters.encode("code\n\n# Summary:")
    assert target == letters.encode(" Target.") + [1] * ended


some_examples = st.lists(
    st.tuples(st.integers(1, 9), st.integers(1, 5)).map(
        lambda sizes: pairs.Example(list(range(10, 10 + sum(sizes))), sizes[0])
    ),
    min_size=1,
    max_size=7,
)


@given(some_examples)
def test_labels_are_exactly_the_targets(batch: list) -> None:
    tokens, labels = pairs.collate(batch, pad=0)
    assert tokens.shape == labels.shape == (len(batch), max(len(e.tokens) for e in batch))
    for row, example in enumerate(batch):
        end = len(example.tokens)
        assert tokens[row, :end].tolist() == example.tokens
        assert tokens[row, end:].eq(0).all()
        carries = labels[row] != pairs.IGNORED
        assert carries.nonzero().flatten().tolist() == list(range(example.n_prompt, end))
        assert labels[row][carries].tolist() == example.tokens[example.n_prompt :]


@given(some_examples, st.integers(1, 4))
def test_batches_hold_every_example_once_and_like_lengths(examples: list, size: int) -> None:
    cut = pairs.batches(examples, size)
    key = repr
    assert sorted((e for batch in cut for e in batch), key=key) == sorted(examples, key=key)
    assert all(len(batch) <= size for batch in cut)
    assert len(cut) == math.ceil(len(examples) / size)
    spans = sorted((len(b[0].tokens), len(b[-1].tokens)) for b in cut)
    assert all(one[1] <= other[0] for one, other in pairwise(spans))


# ------------------------------------------------------------------------------------- objective


@pytest.fixture(scope="module")
def decoder() -> torch.nn.Module:
    return tiny_llama(vocab_size=40, tie_word_embeddings=True).double().eval()


BATCH = [
    pairs.Example([5, 6, 7, 8, 9], 3),
    pairs.Example([11, 12, 13, 14, 15, 16, 17, 18], 4),
    pairs.Example([21, 22], 1),
]


def test_loss_is_the_library_s_own_with_labels(decoder: torch.nn.Module) -> None:
    tokens, labels = pairs.collate(BATCH, pad=0)
    mine = -pairs.target_log_probs(decoder, tokens, labels).mean()
    theirs = decoder(tokens, labels=labels).loss
    torch.testing.assert_close(mine, theirs.float(), rtol=1e-6, atol=0)


def test_loss_is_the_sum_of_eq_2_one_token_at_a_time(decoder: torch.nn.Module) -> None:
    """Each pair alone, no padding, no batch: log p(y_t | x, y_<t) from a forward of its own."""
    tokens, labels = pairs.collate(BATCH, pad=0)
    found = pairs.target_log_probs(decoder, tokens, labels)
    wanted = [
        decoder(torch.tensor([e.tokens[:t]])).logits[0, -1].log_softmax(-1)[e.tokens[t]]
        for e in BATCH
        for t in range(e.n_prompt, len(e.tokens))
    ]
    torch.testing.assert_close(found, torch.stack(wanted).float(), rtol=1e-6, atol=1e-6)


def test_padding_and_batch_mates_change_nothing(decoder: torch.nn.Module) -> None:
    alone = [pairs.target_log_probs(decoder, *pairs.collate([e], pad=0)) for e in BATCH]
    for pad in (0, 39):
        together = pairs.target_log_probs(decoder, *pairs.collate(BATCH, pad=pad))
        torch.testing.assert_close(together, torch.cat(alone), rtol=1e-6, atol=1e-6)


# ------------------------------------------------------------------------------- the real decoder


@pytest.fixture(scope="module")
def gguf_file() -> Path:
    smollm2 = script("data.smollm2")
    try:
        return smollm2.find()
    except SystemExit as error:
        pytest.skip(str(error))


@pytest.mark.real
@pytest.mark.slow
@pytest.mark.filterwarnings("default")  # transformers' own
def test_real_decoder_is_read_right_and_saved_plain(gguf_file: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    smollm2 = script("data.smollm2")
    assert smollm2.save(gguf_file, tmp_path / "base") < 6
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "base")
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert sum(p.numel() for p in model.parameters()) == 134_515_008
    assert [p.name for p in tmp_path.iterdir()] == ["base"]

    for layer in model.model.layers:  # the rows as llama.cpp keeps them must not pass
        for projection, heads in ((layer.self_attn.q_proj, 9), (layer.self_attn.k_proj, 3)):
            rows = projection.weight.data.view(heads, 2, 32, 576)
            projection.weight.data = rows.transpose(1, 2).reshape(projection.weight.shape)
    with pytest.raises(SystemExit, match="perplexity 13"):
        smollm2.check_sound(model, tokenizer)
