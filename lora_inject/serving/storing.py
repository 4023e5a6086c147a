"""A proof of behavior, stored in the files of an adapter that were written without one."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any

from torch import nn

from lora_inject.core.files.atomic import write_file
from lora_inject.core.files.safetensors_file import build_header, header_of
from lora_inject.core.model.eject import eject
from lora_inject.core.model.load import load_adapter
from lora_inject.core.model.probing import refuse_without_room, take_proof
from lora_inject.core.roots.root import Injected
from lora_inject.core.spec.names import counted
from lora_inject.core.spec.tables import Report, wrapped
from lora_inject.errors import FormatError, user_path
from lora_inject.formats.exchange import detected, read_adapter
from lora_inject.formats.proof import KEY, Proof, parse_proof, proof_file

_NAME = "default"  # of the adapter while it is on the model


@dataclass(frozen=True)
class Stored(Report):
    """What was stored.

    Attributes:
        file: The file that holds the proof now.
        proof: The proof.
        replaced: Whether the file held one before.
        knows_base: Whether the file says on which base the adapter was made, so that another one
            was refused; files of PEFT do not.
    """

    file: Path
    proof: Proof
    replaced: bool
    knows_base: bool

    def to_dict(self) -> dict[str, Any]:
        """Return it as plain data."""
        return {
            "file": str(self.file),
            "prompts": len(self.proof.prompts),
            "values": len(self.proof.values[0]),
            "effect": self.proof.effect,
            "noise": self.proof.noise(),
            "dtype": self.proof.dtype,
            "replaced": self.replaced,
            "knows_base": self.knows_base,
        }

    def _lines(self, width: int) -> list[str]:
        proof = self.proof
        words = (
            f"stored: {len(proof.values[0]):,} log-probabilities of "
            f"{counted(len(proof.prompts), 'text')}, which the adapter moves by {proof.effect:.2g} "
            f"(rounding in {proof.dtype}: {proof.noise():.2g}), in '{self.file}'"
        )
        return wrapped(words, width)


def store_proof(path: str | PathLike[str], model: nn.Module, probe: Any, **reading: Any) -> Stored:
    """Store in an adapter's files what it does to a few inputs, as `save_adapter(probe=)` does.

    The tensors keep their bytes, and the file is replaced in one step.

    Args:
        path: What `save_adapter` or PEFT wrote: a folder, or a native file.
        model: The base that the adapter was made on, without adapters; it is left as it was.
        probe: As of `save_adapter`.
        **reading: Options of `load_adapter`.

    Raises:
        FormatError: The files hold no adapter, have no room for a proof, or cannot be written.
        FingerprintError: The adapter was made on another base.
        StateError: The probe is none, is of another tokenizer, or is not changed by the adapter.
    """
    asked = _asked(path)
    layout, file = check_room(path)
    place = user_path(asked, path)
    load_adapter(model, place, _NAME, **reading)
    try:
        text = take_proof(Injected(model, asked), _NAME, probe, layout, f"{asked}, probe")
    finally:
        eject(model, _NAME)
    before = _with_text(file, text)
    knows = read_adapter(place, **reading).fingerprint is not None
    return Stored(file, parse_proof(text, asked), KEY in before, knows)


def check_room(path: str | PathLike[str]) -> tuple[str, Path]:
    """Return the format of an adapter's files, and the one that takes a proof.

    Raises:
        FormatError: There is no adapter, or it has no room for a proof.
    """
    asked = _asked(path)
    place = user_path(asked, path)
    layout = detected(place)
    refuse_without_room(layout, asked)
    return layout, proof_file(place, asked)


def _asked(path: str | PathLike[str]) -> str:
    return f"store a proof in '{path}'"


def _with_text(file: Path, text: Mapping[str, str]) -> Mapping[str, str]:
    """Write text into the header of a safetensors file, in one step; return what was there."""
    with file.open("rb") as opened:
        header = header_of(opened, file, FormatError)
        opened.seek(len(header.raw))
        values = opened.read()
    before = header.metadata or {}
    rows = [(entry.name, entry.dtype, entry.shape) for entry in header.tensors.values()]
    made = build_header(rows, dict(sorted({**before, **text}.items())))
    write_file(file, made.raw + values, overwrite=True)
    return before
