"""The data and objective of scripts/: what training sees, and which tokens carry the loss."""

from typing import Any

import pytest
import torch
from conftest import script
from helpers.models import tiny_llama
from hypothesis import given
from hypothesis import strategies as st

pairs = script("data.pairs")

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
