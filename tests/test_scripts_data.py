"""The data and objective of scripts/: which functions are pairs, which tokens carry the loss."""

from pathlib import Path
from typing import Any

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
CODE = """@property
def area(self):
    width = self.right - self.left
    return width * (self.bottom - self.top)"""


def test_context_is_signature_and_body_and_target_is_the_first_line() -> None:
    summary = "Return the area of this box in pixels."
    assert pairs.pairs_in(GOOD, "boxes") == [pairs.Pair("boxes", "Box.area", CODE, summary)]


def source(
    summary: str = "Return the sum of both numbers.",
    name: str = "combine",
    body: str = "total = first + second\n    return total if total else None",
) -> str:
    """One function long enough to count."""
    arguments = "first_number: int=0, second_number: int=0, third_number: int=0"
    return f'def {name}({arguments}):\n    """{summary}"""\n    {body}\n'


LEFT_OUT = {
    "no full stop": source("Return the sum of both numbers"),
    "too short": source("Return the sum."),
    "too long": source(f"Return {'very ' * 20}long sums."),
    "a reference": source("See the sum of both numbers."),
    "markup": source("Return the :class:`Sum` of both numbers."),
    "special method": source(name="__add__"),
    "test": source(name="test_combine"),
    "stub": source(body="pass"),
    "abstract": source(body="raise NotImplementedError('to be done by every subclass of it')"),
    "code too long": source(body="value = 1\n    " * 60 + "return value"),
    "target in the code": source(body="return 'Return the sum of both numbers.'"),
    "does not parse": source() + "def (",
}


@pytest.mark.parametrize("case", LEFT_OUT)
def test_what_is_no_pair_is_left_out_for_its_reason_alone(case: str) -> None:
    assert pairs.pairs_in(LEFT_OUT[case], "m") == []
    assert len(pairs.pairs_in(source(), "m")) == 1


some_pairs = st.lists(
    st.builds(
        pairs.Pair,
        st.integers(0, 30).map("module{}".format),
        st.sampled_from([f"{c}f{i}" for i in range(40) for c in ("", "A.", "B.")]),
        st.integers(0, 60).map("code {}".format),
        st.integers(0, 60).map("Summary {}.".format),
    ),
    max_size=80,
)


@given(some_pairs, st.randoms())
def test_split_shares_nothing_and_depends_on_no_order(some: list[Any], random: Any) -> None:
    split = pairs.split_by_module(some)
    for key in ("module", "code", "summary"):
        sides = [{getattr(pair, key) for pair in side} for side in (split.train, split.held_out)]
        assert sides[0].isdisjoint(sides[1]), key
    bare = [{p.name.split(".")[-1] for p in side} for side in (split.train, split.held_out)]
    assert bare[0].isdisjoint(bare[1])
    assert {*split.train, *split.held_out} <= {*some}
    unique = [*{(p.module, p.name): p for p in some}.values()]  # as within one installation
    mixed = random.sample(unique, len(unique))
    assert pairs.split_by_module(mixed) == pairs.split_by_module(unique)


BATCH = [
    pairs.Example([5, 6, 7, 8, 9], 3),
    pairs.Example([11, 12, 13, 14, 15, 16, 17, 18], 4),
    pairs.Example([21, 22], 1),
]


@pytest.mark.parametrize("pad", [0, 39])
def test_loss_is_the_sum_of_eq_2_one_token_at_a_time(pad: int) -> None:
    """Each pair alone, no padding, no batch: log p(y_t | x, y_<t) from a forward of its own."""
    decoder = tiny_llama(vocab_size=40, tie_word_embeddings=True).double().eval()
    log_probs = pairs.target_log_probs(decoder, *pairs.collate(BATCH, pad=pad))
    wanted = [
        decoder(torch.tensor([e.tokens[:t]])).logits[0, -1].log_softmax(-1)[e.tokens[t]]
        for e in BATCH
        for t in range(e.n_prompt, len(e.tokens))
    ]
    torch.testing.assert_close(log_probs, torch.stack(wanted).float(), rtol=1e-6, atol=1e-6)


@pytest.mark.real
@pytest.mark.slow
@pytest.mark.filterwarnings("default")  # transformers' own
def test_real_decoder_is_read_right_and_saved_plain(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    smollm2 = script("data.smollm2")
    try:
        file = smollm2.find()
    except SystemExit as error:
        pytest.skip(str(error))
    assert smollm2.save(file, tmp_path / "base") < 6
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "base")
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    for layer in model.model.layers:  # the rows as llama.cpp keeps them must not pass
        for projection, heads in ((layer.self_attn.q_proj, 9), (layer.self_attn.k_proj, 3)):
            rows = projection.weight.data.view(heads, 2, 32, 576)
            projection.weight.data = rows.transpose(1, 2).reshape(projection.weight.shape)
    with pytest.raises(SystemExit, match="perplexity 13"):
        smollm2.check_sound(model, tokenizer)
