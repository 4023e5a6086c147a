"""Tiny random models and made-up sentences: what comes out in seconds means nothing."""

from __future__ import annotations

import random
from typing import Any

import torch
from benchmarks.models import llama
from data.pairs import Pair, Split
from data.snippets import Snippet
from transformers import BertConfig, BertModel

OPINIONS = dict.fromkeys(("good", "great", "fine", "funny", "warm", "brilliant"), 2.0)
OPINIONS |= dict.fromkeys(("bad", "dull", "poor", "weak", "cold", "awful"), -2.0)
OTHER = ("the", "film", "a", "story", "of", "actor", "plot", "and", "this", "is")
N_TOKENS = 400


class Words:
    """A tokenizer that knows words only: each is a number that its letters decide."""

    pad_token_id = 0
    eos_token_id = 1

    def encode(self, text: str) -> list[int]:
        return [2 + sum(map(ord, word)) % (N_TOKENS - 2) for word in text.split()]

    def __call__(self, texts: list[str], max_length: int, **_: Any) -> dict[str, list[list[int]]]:
        return {"input_ids": [self.encode(text)[:max_length] for text in texts]}


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


def encoder() -> tuple[Any, Words]:
    """A BERT of three layers."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 128, "max_position_embeddings": 64}
    config = BertConfig(vocab_size=N_TOKENS, num_hidden_layers=3, num_attention_heads=2, **sizes)
    return BertModel(config).eval(), Words()


def decoder() -> tuple[Any, Words]:
    """A Llama of three layers with fewer heads for keys than for queries, and a tied head."""
    sizes = {"hidden_size": 32, "intermediate_size": 64, "max_position_embeddings": 1024}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    return llama(vocab_size=N_TOKENS, num_hidden_layers=3, **sizes, **heads).eval(), Words()
