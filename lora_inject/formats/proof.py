"""What an adapter's file says about behavior: what a model predicts with and without it.

It stands as text in the header of the safetensors file, where no other program looks:
log-probabilities of the next token, at several strengths of the adapter. 0 is the base, 1 the
adapter, 2 the adapter counted twice. So what a server computes can be told from the base, and a
wrong scale can be named.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from os import PathLike
from typing import Annotated, Self

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from lora_inject.core.files.strict_json import parse_table
from lora_inject.core.files.tensors import is_safetensors, read_names
from lora_inject.errors import FormatError, user_path
from lora_inject.formats.pairs import DTYPES

KEY = "lora_inject.proof"
VERSION = 1
STRENGTHS = (0.0, *(2 ** (n / 2) for n in range(-6, 7)))
"""0, and 1/8 to 8 in steps of the root of 2."""

LEAST_NOISE = 2e-3
"""What programs differ by that compute the same in float32, in log-probabilities:
docs/evidence/clients.md has figures for a model of 30 layers."""

_EDITED = "The file was edited; save the adapter again with probe="
_Index = Annotated[int, Field(ge=0, lt=2**31)]
_Number = Annotated[float, Field(allow_inf_nan=False, gt=-1e30, lt=1e30)]


class _Strict(BaseModel):
    # Earlier versions also wrote the texts of prompts and tokens.
    model_config = ConfigDict(extra="ignore", frozen=True, strict=True, defer_build=True)


class Ahead(_Strict):
    """The most probable tokens after a prefix of a prompt.

    Attributes:
        prompt: Number of the prompt.
        length: How many of its tokens stand before.
        tokens: Token ids: the most probable ones at any of the strengths.
        values: For each strength the log-probability of each token.
    """

    prompt: _Index
    length: _Index
    tokens: list[_Index]
    values: list[list[_Number]]


class Proof(_Strict):
    """What a model predicts for a few prompts, at several strengths of an adapter.

    Attributes:
        strengths: By how much the adapter was multiplied; 0 and 1 are among them.
        values: For each strength the log-probability of each token of each prompt but the first,
            given those before it.
        prompts: Token ids.
        ahead: Probable tokens after some prefixes, for servers that do not rate a prompt.
        vocabulary: How many tokens there are.
        dtype: What the model computed in.
        size: The typical largest logit: what one rounding is relative to.
    """

    strengths: list[_Number]
    values: list[list[_Number]]
    prompts: Annotated[list[list[_Index]], Field(min_length=1)]
    ahead: list[Ahead]
    vocabulary: _Index
    dtype: str
    size: _Number

    @model_validator(mode="after")
    def _fits(self) -> Self:
        strengths, prompts = self.strengths, self.prompts
        if not {0.0, 1.0} <= {*strengths} or sorted({*strengths}) != strengths:
            raise ValueError("its strengths are not in order, or lack 0 or 1")
        n = sum(len(prompt) - 1 for prompt in prompts)
        if not n or not _are_even(self.values, len(strengths), n):
            raise ValueError("it has not one value for each place and strength")
        if self.dtype not in DTYPES:
            raise ValueError(f"it computed in {self.dtype[:20]!r}")
        for each in self.ahead:
            inside = each.prompt < len(prompts)
            if not inside or not 0 < each.length <= len(prompts[each.prompt]):
                raise ValueError("it rates tokens after a prefix that no prompt has")
            if not _are_even(each.values, len(strengths), len(each.tokens)):
                raise ValueError("it has not one value for each token and strength")
        return self

    @property
    def effect(self) -> float:
        """How far the adapter moves the values: a root of a mean square."""
        return rms(self.at(1.0) - self.at(0.0))

    def at(self, strength: float) -> torch.Tensor:
        """Return the values at a strength that was measured, float64 `(n,)`."""
        row = self.values[self.strengths.index(strength)]
        return torch.tensor(row, dtype=torch.float64)

    def noise(self, dtype: str | None = None) -> float:
        """Return what two programs that compute the same in a dtype may differ by.

        Logits are rounded to a share of the largest, and so are their log-probabilities.
        """
        eps = torch.finfo(DTYPES[dtype or self.dtype]).eps
        return max(eps * self.size, LEAST_NOISE)

    def to_text(self) -> str:
        """Return it as a text for the header of a file."""
        return json.dumps({"version": VERSION, **self.model_dump()}, allow_nan=False)


def rms(values: torch.Tensor) -> float:
    """Return the root of the mean square; 0 for no values."""
    return math.sqrt(float(values.square().mean())) if len(values) else 0.0


def read_proof(path: str | PathLike[str], asked: str) -> Proof:
    """Read the proof that an adapter's file holds.

    Args:
        path: A folder with `adapter_model.safetensors`, or a safetensors file.
        asked: What asks, for the errors.

    Raises:
        FormatError: There is no such file, it holds no proof, or the proof was edited.
    """
    place = user_path(asked, path)
    file = place / "adapter_model.safetensors" if place.is_dir() else place
    if not is_safetensors(file):
        problem = f"there is no safetensors file at '{place}'"
        raise FormatError(asked, problem, "Give what save_adapter(model, path, probe=...) wrote")
    return _parse(read_names(file)[1], f"{asked}, '{file}'")


def _parse(metadata: Mapping[str, str], asked: str) -> Proof:
    """Read a proof from the metadata of a file, strictly."""
    if KEY not in metadata:
        remedy = "Save the adapter with one: save_adapter(model, path, probe=batch)"
        raise FormatError(asked, "it holds no proof of behavior", remedy)
    plain = parse_table(metadata[KEY], asked)
    if (version := plain.get("version")) != VERSION:
        problem = f"its proof has version {str(version)[:20]}, and this package reads {VERSION}"
        raise FormatError(asked, problem, "Install a newer lora-inject, or save the adapter again")
    if plain.get("prompts") == []:  # as earlier versions wrote them
        problem = "its proof is of the outputs of a model that predicts no tokens"
        raise FormatError(asked, problem, "Compare the outputs with li.disabled(model)")
    try:
        return Proof(**plain)
    except ValidationError as error:
        wrong = error.errors()[0]
        place = ".".join(map(str, wrong["loc"]))
        problem = f"{place}: {wrong['msg']}".lstrip(": ")
        raise FormatError(f"{asked}, proof", problem, _EDITED) from None


def _are_even(rows: Sequence[Sequence[float]], n_rows: int, width: int) -> bool:
    return len(rows) == n_rows and all(len(row) == width for row in rows)
