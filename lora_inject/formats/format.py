"""One format of files: what a row of the table of formats is."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lora_inject.core.adapter.state import AdapterState
from lora_inject.core.spec.sites import SiteSpec

SAFE = (".safetensors",)
NUMBERS, ONE, RANKS = "numbers", "one", "ranks"
"""What a row may keep: rank, alpha and scaling of each site; or these only if all sites agree; or
the rank of each site alone.

Besides: `config` and `fingerprint` of the state; `training`: dropout, init and compute of each
site; `slices` of fused projections; `start`: the frozen start of pissa and olora.
"""


@dataclass(frozen=True)
class Format:
    """One row of the table `FORMATS` (`formats.exchange`).

    Attributes:
        write: `write(state, path, facts, **options)`: the content of the file that `path` will be,
            or of each file of the folder, by name. The adapter's shapes and dtypes are checked.
        read: `read(path, facts, **options) -> AdapterState`; its tensors are checked afterwards.
        detects: `detects(path) -> bool`, by content; the first row that returns True reads. It
            raises for one file of an adapter whose format is a folder.
        keeps: What its files can express besides the deltas (`formats.lost`); None: everything.
        endings: The endings that a file's name may have to be written; empty for any.
        takes_facts: Whether `write` and `read` look at the facts about the model.
        check_sites: `check_sites(specs, facts)`: raises where files of the format cannot hold such
            sites, whatever their values; asked before training. `facts` as for `write`.
        check_save: `check_save(survey, name)`: raises where a reader of the format would compute
            something else from the file than the live model does.
        check_load: `check_load(survey, state, fitted, asked)`: raises where the adapter of the
            file, as it fits the live model, meant something else where it was made.
    """

    write: Callable[..., bytes | Mapping[str, bytes]]
    read: Callable[..., AdapterState]
    detects: Callable[[Path], bool]
    keeps: frozenset[str] | None = None
    endings: tuple[str, ...] = ()
    takes_facts: bool = True
    check_sites: Callable[[Sequence[SiteSpec], Any], None] | None = None
    check_save: Callable[[Any, str], None] | None = None
    check_load: Callable[[Any, AdapterState, AdapterState, str], None] | None = None
