"""Tiny random models and made-up sentences: what comes out in seconds means nothing."""

from __future__ import annotations

import random
from typing import Any

import torch
from benchmarks.models import llama
from data.pairs import Pair, Split
from data.snippets import Snippet
from transformers import BertConfig, BertModel, ByT5Tokenizer

OPINIONS = dict.fromkeys(("good", "great", "fine", "funny", "warm", "brilliant"), 2.0)
OPINIONS |= dict.fromkeys(("bad", "dull", "poor", "weak", "cold", "awful"), -2.0)
OTHER = ("the", "film", "a", "story", "of", "actor", "plot", "and", "this", "is")
N_TOKENS = 400  # more than the bytes, which are the toys' tokens


def sentences(kind: str) -> list[Snippet]:
    """400 sentences whose one opinionated word decides the score."""
    choose = random.Random(kind)  # noqa: S311 - made-up sentences, no secret
    found = {}
    for number in range(400):
        word = choose.choice([*OPINIONS])
        text = " ".join([*choose.choices(OTHER, k=5), word, *choose.choices(OTHER, k=3)])
        found[text] = Snippet(str(number), text, OPINIONS[word])
    return list(found.values())


def pairs() -> Split:
    """Pairs of one word in and the same word out, every fourth of 60 held out."""
    made = [Pair("toy", f"f{i}", f"def f{i} x : {OTHER[i % 10]}", OTHER[i % 10]) for i in range(60)]
    return Split([p for i, p in enumerate(made) if i % 4], made[::4])


def encoder() -> tuple[Any, Any]:
    """A BERT of three layers."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 128, "max_position_embeddings": 64}
    config = BertConfig(vocab_size=N_TOKENS, num_hidden_layers=3, num_attention_heads=2, **sizes)
    return BertModel(config).eval(), ByT5Tokenizer()


def decoder() -> tuple[Any, Any]:
    """A Llama of three layers with fewer heads for keys than for queries, and a tied head."""
    sizes = {"hidden_size": 32, "num_attention_heads": 4, "num_key_value_heads": 2}
    model = llama(vocab_size=N_TOKENS, num_hidden_layers=3, intermediate_size=64, **sizes)
    return model.eval(), ByT5Tokenizer()
