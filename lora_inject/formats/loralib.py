"""State dicts of microsoft/loralib, the paper's own package.

Its files hold `PATH.lora_A` and `PATH.lora_B` and full tensors beside them, and nothing
else, so alpha and the kinds of the layers are asked of the caller; they are never guessed. A fused
`MergedLinear` with some of its parts enabled is exactly a site with slices.

Source: microsoft/LoRA, loralib/layers.py and utils.py (`lora_state_dict`).
Its convolutions are not read: their factors have another shape than everybody else's.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from pathlib import Path

from torch import Tensor

from lora_inject.adapter.site_state import SiteState
from lora_inject.adapter.state import AdapterState
from lora_inject.errors import FormatError
from lora_inject.formats.checks import check_no_clash, check_site, check_state, one_line
from lora_inject.formats.pickles import pickled, read_pickle
from lora_inject.spec.sites import SiteSpec, Slices
from lora_inject.storage.atomic import write_file
from lora_inject.storage.tensors import read_names, read_tensors, serialize

_PICKLES = {".pt", ".bin", ".pth"}
_EDITED = "The file is incomplete or was edited; fetch it again"


def detects(path: Path) -> bool:
    """Whether a path may be such a file: a pickle, or safetensors with bare `lora_A` keys."""
    if not path.is_file():
        return False
    if path.suffix in _PICKLES:
        return True
    if path.suffix != ".safetensors":
        return False
    return any(key.endswith(".lora_A") for key in read_names(path)[0])


def read(
    path: Path,
    *,
    alpha: float | None = None,
    allow_pickle: bool = False,
    fan_in_fan_out: bool | Collection[str] = False,
    embeddings: Collection[str] = (),
    enable_lora: Sequence[bool] | Mapping[str, Sequence[bool]] | None = None,
    on_disk: bool = False,
) -> AdapterState:
    """Read a loralib state dict.

    Args:
        path: A `.safetensors` file, or a pickled `.pt`, `.bin` or `.pth`.
        alpha: The `lora_alpha` that the layers were made with; the file does not hold it.
        allow_pickle: Read a pickle, by torch.load(weights_only=True), which builds tensors only.
        fan_in_fan_out: Whether the layers' weights are (in, out): for all, or the names, or ends of
            names after a dot, of those that are.
        embeddings: Names, or ends of names after a dot, of the embeddings: their A and B look like
            a linear layer's.
        enable_lora: The argument of `MergedLinear`, for all fused layers of the file, or by name or
            end of name after a dot. Needed for fused layers.
        on_disk: Leave the values in the file until they are used; not those of a pickle.

    Returns:
        The adapter; parts of a fused layer are called '0', '1', ...

    Raises:
        FormatError: alpha is not given, the file is a pickle and that is not allowed, or tensors
            are missing or do not fit.
    """
    path = Path(path)
    asked = f"read loralib adapter '{path}'"
    if alpha is None or not 0 < alpha < float("inf"):
        raise FormatError(
            asked, "loralib files do not hold alpha", "Pass alpha=..., the layers' lora_alpha"
        )
    tensors = _load(path, asked, allow_pickle=allow_pickle, on_disk=on_disk)
    sites: dict[str, SiteState] = {}
    trained: dict[str, Tensor] = {}
    for key, tensor in tensors.items():
        name, _, part = key.rpartition(".")
        if part == "lora_A":
            if f"{name}.lora_B" not in tensors:
                raise FormatError(f"{asked}, site '{name}'", "its lora_B is missing", _EDITED)
            pair = tensor, tensors[f"{name}.lora_B"]
            flags = _flags(name, *pair, enable_lora, f"{asked}, site '{name}'")
            turned = fan_in_fan_out is True or _named(name, fan_in_fan_out or ())
            kind = "embedding" if _named(name, embeddings) else "conv1d" if turned else "linear"
            sites[name] = _site(name, *pair, kind, alpha, flags)
            check_site(sites[name], asked)
        elif part == "lora_B":
            if f"{name}.lora_A" not in tensors:
                raise FormatError(f"{asked}, site '{name}'", "its lora_A is missing", _EDITED)
        else:
            trained[key] = tensor
    if not sites:
        raise FormatError(asked, "it holds no lora_A", "Give a state dict of loralib's layers")
    named = [*embeddings]
    named += fan_in_fan_out if not isinstance(fan_in_fan_out, bool) else ()
    named += enable_lora if isinstance(enable_lora, Mapping) else ()
    lost = [end for end in named if not any(_named(name, (end,)) for name in sites)]
    if lost:
        raise FormatError(
            asked, f"no site is called {one_line(lost)}", f"Its sites are {one_line(sites)}"
        )
    return AdapterState(sites, trained)


def write(state: AdapterState, path: Path, *, overwrite: bool = False) -> Path:
    """Write a loralib state dict.

    Args:
        state: An adapter of linear, conv1d and embedding sites with one rank and one alpha, which
            is what loralib's layers are made with.
        path: A `.safetensors` file, or a `.pt` or `.bin` to pickle.
        overwrite: Replace a file that is there already.

    Returns:
        The file that was written. It does not hold alpha, which readers must know.

    Raises:
        FormatError: loralib cannot express the adapter.
    """
    path = Path(path)
    asked = f"write loralib adapter to '{path}'"
    if path.suffix not in _PICKLES | {".safetensors"}:
        raise FormatError(
            asked, "its name does not end in .safetensors, .pt, .bin or .pth", "Rename it"
        )
    check_state(state, asked)
    if state.rows:
        found = f"loralib cannot train single rows, as of {one_line(state.rows)}"
        raise FormatError(asked, found, 'Use format="peft"')
    numbers = {(s.spec.rank, s.spec.alpha, s.spec.scaling) for s in state.sites.values()}
    if len(numbers) > 1 or any(scaling != "standard" for _, _, scaling in numbers):
        raise FormatError(
            asked,
            "its sites do not all have one rank, one alpha and standard scaling",
            'Use format="peft"; a loralib file holds neither number',
        )
    for site in state.sites.values():
        _check_expressible(site, asked)
    pairs = {f"{name}.lora_A": site.A for name, site in state.sites.items()}
    pairs.update((f"{name}.lora_B", site.B) for name, site in state.sites.items())
    check_no_clash([*pairs, *state.trained], asked)
    tensors = {name: t.detach().cpu() for name, t in (pairs | dict(state.trained)).items()}
    if path.suffix == ".safetensors":
        return write_file(path, serialize(tensors, {"format": "pt"}), overwrite=overwrite)
    return write_file(path, pickled(tensors), overwrite=overwrite)


def _load(path: Path, asked: str, *, allow_pickle: bool, on_disk: bool) -> dict[str, Tensor]:
    if path.suffix in _PICKLES:
        return read_pickle(path, asked, allow=allow_pickle)
    return read_tensors(path, on_disk=on_disk)[0]


def _named(name: str, names: Collection[str] | bool) -> bool:
    """Whether a name, or its end after a dot, is among `names`."""
    return not isinstance(names, bool) and any(f".{name}".endswith(f".{end}") for end in names)


def _flags(
    name: str,
    a: Tensor,
    b: Tensor,
    enable_lora: Sequence[bool] | Mapping[str, Sequence[bool]] | None,
    where: str,
) -> tuple[bool, ...] | None:
    """Which parts of a fused layer are enabled; None for a plain layer."""
    if a.ndim != 2 or b.ndim != 2 or 0 in a.shape or 0 in b.shape:
        raise FormatError(where, f"shapes {tuple(a.shape)} and {tuple(b.shape)}", _EDITED)
    n_parts, stray = divmod(a.shape[0], b.shape[1])
    if stray or not n_parts:
        raise FormatError(where, f"ranks {a.shape[0]} and {b.shape[1]} do not fit", _EDITED)
    if isinstance(enable_lora, Mapping):
        flags = next((v for end, v in enable_lora.items() if _named(name, (end,))), None)
    elif enable_lora is not None and sum(enable_lora) == 1:
        raise FormatError(
            where,
            "a fused layer with one part enabled cannot be distinguished from a plain layer",
            "Say which are fused: enable_lora={'c_attn': [...]}",
        )
    else:
        flags = enable_lora if n_parts > 1 else None
    if n_parts > 1 and flags is None:
        raise FormatError(
            where,
            f"it is a fused layer with {n_parts} adapted parts",
            "Pass enable_lora, the list that MergedLinear was made with",
        )
    if flags is None:
        return None
    if sum(flags) != n_parts or b.shape[0] % n_parts:
        raise FormatError(
            where,
            f"its tensors are of {n_parts} adapted parts and enable_lora says {list(flags)}",
            "Give the list that MergedLinear was made with",
        )
    return tuple(bool(flag) for flag in flags)


def _site(
    name: str, a: Tensor, b: Tensor, kind: str, alpha: float, flags: tuple[bool, ...] | None
) -> SiteState:
    n_in, n_out, slices = int(a.shape[1]), int(b.shape[0]), None
    if flags is not None:
        width = n_out // sum(flags)
        n_out = width * len(flags)
        names = [str(n) for n in range(len(flags))]
        adapt = tuple(n for n, flag in zip(names, flags, strict=True) if flag)
        slices = Slices(tuple((n, width) for n in names), adapt)
    turned = kind != "linear"
    spec = SiteSpec(
        name=name,
        kind=kind,
        in_features=n_in,
        out_features=n_out,
        weight_shape=(n_in, n_out) if turned else (n_out, n_in),
        rank=int(b.shape[1]),
        alpha=float(alpha),
        transposed=turned,
        slices=slices,
        weight=f"{name}.weight",
    )
    return SiteState(spec, a, b)


def _check_expressible(site: SiteState, asked: str) -> None:
    check_site(site, asked)
    spec = site.spec
    where = f"{asked}, site '{spec.name}'"
    if spec.kind not in {"linear", "conv1d", "embedding"}:
        raise FormatError(where, f"loralib has no {spec.kind}", 'Use format="peft"')
    if site.further:
        raise FormatError(where, f"loralib has no variant '{spec.variant}'", 'Use format="peft"')
    if site.A0 is not None:
        raise FormatError(where, "its init was derived from the base", 'Use format="peft"')
    if spec.slices is not None and len({width for _, width in spec.slices.sizes}) > 1:
        widths = one_line(name for name, _ in spec.slices.sizes)
        raise FormatError(where, f"the parts {widths} are of unequal widths", 'Use format="peft"')
