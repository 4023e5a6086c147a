"""The data and objective of scripts/: which functions are pairs, which tokens carry the loss."""

import shutil
import sys
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


# ------------------------------------------------------------------------------------- objective


@pytest.fixture(scope="module")
def decoder() -> torch.nn.Module:
    return tiny_llama(vocab_size=40, tie_word_embeddings=True).double().eval()


BATCH = [
    pairs.Example([5, 6, 7, 8, 9], 3),
    pairs.Example([11, 12, 13, 14, 15, 16, 17, 18], 4),
    pairs.Example([21, 22], 1),
]


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
