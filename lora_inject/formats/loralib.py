"""State dicts of microsoft/loralib, the paper's own package.

Its files hold `PATH.lora_A`, `PATH.lora_B` and full tensors, and nothing else. So the caller gives
alpha and the kinds of the layers; they are never guessed. A fused `MergedLinear` with some of its
parts enabled is exactly a site with slices.

Source: microsoft/LoRA, loralib/layers.py and utils.py (`lora_state_dict`).
Its convolutions are not read, because their factors have another shape than in other programs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from torch import Tensor

from lora_inject.core.adapter.file_keys import check_no_clash, one_line
from lora_inject.core.adapter.site_state import SiteState
from lora_inject.core.adapter.state import AdapterState
from lora_inject.core.files.tensors import read_tensors, serialize
from lora_inject.core.spec.names import leaf, parent, show
from lora_inject.core.spec.sites import Slices
from lora_inject.errors import FormatError, within
from lora_inject.formats.format import Files
from lora_inject.formats.model_facts import ModelFacts
from lora_inject.formats.pairs import by_module, plain_site
from lora_inject.formats.pickles import pickled, read_pickle

PICKLES = (".pt", ".bin", ".pth")
_EDITED = "The file is incomplete or was edited; fetch it again"
_OTHER = 'Use format="peft"'


def detects(files: Files) -> bool:
    """Whether a path may be such a file: a pickle, or safetensors with bare `lora_A` keys."""
    if any(key.endswith(".lora_A") for key in files.tensor_names()):
        return True
    return files.path.suffix in PICKLES and files.path.is_file()


def read(
    path: Path,
    _facts: ModelFacts,
    *,
    alpha: float | None = None,
    allow_pickle: bool = False,
    fan_in_fan_out: bool = False,
    enable_lora: Sequence[bool] | None = None,
) -> AdapterState:
    """Read a loralib state dict; embeddings are recognized when it is loaded onto a model.

    Args:
        path: A `.safetensors` file, or a pickled `.pt`, `.bin` or `.pth`.
        _facts: Not needed.
        alpha: The `lora_alpha` that the layers were made with; the file does not hold it.
        allow_pickle: Read a pickle, by torch.load(weights_only=True), which builds tensors only.
        fan_in_fan_out: Whether the layers' weights are (in, out).
        enable_lora: The argument of `MergedLinear`, where the file has fused layers.

    Returns:
        The adapter; parts of a fused layer are called '0', '1', ...

    Raises:
        FormatError: alpha is not given, the file is a pickle and that is not allowed, or tensors
            are missing or do not fit.
    """
    if alpha is None or not 0 < alpha < float("inf"):
        remedy = "Read it in Python: li.read_adapter(path, alpha=...), with the layers' lora_alpha"
        raise FormatError("", "loralib files do not hold alpha", remedy)
    if enable_lora is not None and not _are_flags(enable_lora):
        remedy = "Give the list that MergedLinear was made with, such as [True, False, True]"
        raise FormatError("", f"enable_lora is {show(enable_lora)}", remedy)
    if enable_lora is not None and sum(enable_lora) < 2:
        problem = "a fused layer with one part in enable_lora looks like a plain layer"
        raise FormatError("", problem, "Load it with loralib and merge it")
    if path.suffix in PICKLES:
        tensors = read_pickle(path, allow=allow_pickle)
    else:
        tensors = read_tensors(path)[0]
    factors = {k: t for k, t in tensors.items() if leaf(k) in ("lora_A", "lora_B")}
    trained = {k: t for k, t in tensors.items() if k not in factors}
    kind = "conv1d" if fan_in_fan_out else "linear"
    sites: dict[str, SiteState] = {}
    for name, of in by_module(factors, lambda key: (parent(key), key[-1])).items():
        with within(f"site '{name}'"):
            sites[name] = _site(name, of["A"], of["B"], kind, alpha, enable_lora)
    return AdapterState(sites, trained)


def _are_flags(given: object) -> bool:
    return isinstance(given, list | tuple) and all(type(flag) is bool for flag in given)


def _site(
    name: str, a: Tensor, b: Tensor, kind: str, alpha: float, enable_lora: Sequence[bool] | None
) -> SiteState:
    """Return a site; of a fused layer, whose A has several times the rank, with slices."""
    if a.ndim != 2 or b.ndim != 2 or 0 in (*a.shape, *b.shape) or len(a) % b.shape[1]:
        problem = f"the shapes {tuple(a.shape)} and {tuple(b.shape)} do not fit"
        raise FormatError("", problem, _EDITED)
    rank = b.shape[1]
    n, spec = len(a) // rank, plain_site(name, a[:rank], b, alpha, kind).spec
    if n > 1:
        flags = enable_lora or ()
        if sum(flags) != n or len(b) % n:
            problem = f"it is a fused layer with {n} adapted parts, and enable_lora says {flags}"
            raise FormatError("", problem, "Pass the list that MergedLinear was made with")
        parts = {str(place): len(b) // n for place in range(len(flags))}
        adapt = tuple(part for part, flag in zip(parts, flags, strict=True) if flag)
        n_in, n_out = spec.in_features, sum(parts.values())
        shape = (n_in, n_out) if spec.transposed else (n_out, n_in)
        slices = Slices(tuple(parts.items()), adapt)
        spec = replace(spec, out_features=n_out, weight_shape=shape, slices=slices)
    return SiteState(spec, a, b)


def loses(state: AdapterState) -> list[str]:
    """Return that the file does not hold alpha, which a reader has to know."""
    numbers = {(site.spec.alpha, site.spec.rank) for site in state.sites.values()}
    return [
        f"alpha, {alpha:g} of rank {rank}, is left out: whoever reads the file has to give it"
        for alpha, rank in sorted(numbers)
    ]


def write(state: AdapterState, path: Path, _facts: ModelFacts) -> bytes:
    """Write a loralib state dict: `.safetensors`, or pickled as `.pt`, `.bin` or `.pth`.

    The sites must be linear, conv1d or embedding ones, with one rank and one alpha, as loralib's
    layers are made. The file does not hold alpha; readers must know it.
    """
    if state.rows:
        problem = f"loralib cannot train single rows, as of {one_line(state.rows)}"
        raise FormatError("", problem, _OTHER)
    numbers = {(s.spec.rank, s.spec.alpha, s.spec.scaling) for s in state.sites.values()}
    if len(numbers) > 1 or any(scaling != "standard" for _, _, scaling in numbers):
        problem = "its sites do not all have one rank, one alpha and standard scaling"
        raise FormatError("", problem, f"{_OTHER}; a loralib file holds neither number")
    for name, site in state.sites.items():
        if reason := _inexpressible(site):
            raise FormatError(f"site '{name}'", reason, _OTHER)
    pairs = {f"{name}.lora_A": site.A for name, site in state.sites.items()}
    pairs |= {f"{name}.lora_B": site.B for name, site in state.sites.items()}
    check_no_clash([*pairs, *state.trained])
    tensors = {name: t.detach().cpu() for name, t in (pairs | dict(state.trained)).items()}
    return pickled(tensors) if path.suffix in PICKLES else serialize(tensors, {"format": "pt"})


def _inexpressible(site: SiteState) -> str:
    """Why loralib cannot hold a site, or an empty text."""
    spec, slices = site.spec, site.spec.slices
    if spec.kind not in {"linear", "conv1d", "embedding"}:
        return f"loralib has no {spec.kind}"
    if site.further:
        return f"loralib has no variant '{spec.variant}'"
    if site.A0 is not None:
        return "its init was derived from the base"
    if slices is not None and len({width for _, width in slices.sizes}) > 1:
        return f"the parts {one_line(name for name, _ in slices.sizes)} are of unequal widths"
    return ""
