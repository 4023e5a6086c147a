"""Checks of adapter files for programs that load them.

Each program is one function of the config and of the names and shapes of the tensors; no values are
read. What the program would refuse, ignore or scale differently is a finding with a remedy.

Sources: vLLM 0.33, lora/peft_helper.py, lora/lora_model.py, lora/utils.py; SGLang 0.5.23,
srt/lora/lora_config.py, lora.py, utils.py; llama.cpp, convert_lora_to_gguf.py,
src/llama-adapter.cpp; LoRAX, adapters/lora.py; diffusers 0.42.1, loaders/peft.py; mlx-lm 0.32.2,
tuner/utils.py; ComfyUI, comfy/lora.py; peft 0.21.2, utils/save_and_load.py.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lora_inject.errors import FormatError, nearest
from lora_inject.formats import detected, mlx
from lora_inject.formats.base_config import text_config
from lora_inject.formats.checks import one_line
from lora_inject.formats.gguf_file import FAMILIES
from lora_inject.formats.peft.files import CONFIG, MODEL
from lora_inject.formats.peft.number_patterns import values_of
from lora_inject.formats.peft.tensor_layout import PREFIX
from lora_inject.storage.safetensors_file import read_header
from lora_inject.storage.strict_json import parse_json

PORTABLE = "Write it with `lora-inject convert --to portable`"
MERGE = "Fold it into the base with `lora-inject merge` and serve the result"
_PAIR = re.compile(r"(.+?)\.(lora_A|lora_B|lora_embedding_A|lora_embedding_B)(?:\.weight)?")
VLLM_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)


@dataclass(frozen=True)
class Finding:
    """One thing that a program would refuse, ignore or compute differently.

    Attributes:
        problem: What the program would do, and where.
        fix: The remedy.
        stops: Whether the adapter cannot be used there as it is; else it is a note.
    """

    problem: str
    fix: str
    stops: bool = True


@dataclass(frozen=True)
class Files:
    """An adapter as a program that reads PEFT's folder sees it.

    `pairs` are the shapes of A and B by module, None for a missing one; `others` the names of all
    other tensors; `modules` and `base` the names and the config of the base, if known.
    """

    layout: str
    config: Mapping[str, Any] = field(default_factory=dict)
    pairs: Mapping[str, tuple[tuple[int, ...] | None, tuple[int, ...] | None]] = field(
        default_factory=dict
    )
    others: tuple[str, ...] = ()
    unprefixed: tuple[str, ...] = ()
    metadata: Mapping[str, str] = field(default_factory=dict)
    modules: Collection[str] | None = None
    base: Mapping[str, Any] | None = None

    @property
    def ranks(self) -> dict[str, int]:
        """Rank of each complete pair by its tensors; for a stack that of one expert."""
        found = {name: a[0] for name, (a, b) in self.pairs.items() if a and b}
        if not self.config.get("target_parameters"):
            return found
        said = self.numbers("rank_pattern", "r", found)
        return {
            n: int(said[n]) if said[n] and rank % said[n] == 0 else rank
            for n, rank in found.items()
        }

    def numbers(self, table: str, default: str, names: Collection[str]) -> dict[str, Any]:
        """Return the config's value for each module."""
        return values_of(
            self.config.get(table) or {}, names, self.config.get(default), f"check {CONFIG}"
        )

    def scales(self) -> dict[str, float]:
        """The scale that PEFT applies to each module."""
        alphas = self.numbers("alpha_pattern", "lora_alpha", self.ranks)
        root = bool(self.config.get("use_rslora"))
        return {
            name: alphas[name] / (math.sqrt(rank) if root else rank)
            for name, rank in self.ranks.items()
        }


def findings(
    path: Path,
    client: str,
    *,
    module_names: Collection[str] | None = None,
    config: Mapping[str, Any] | None = None,
) -> list[Finding]:
    """Return what a program would refuse, ignore or compute differently in an adapter.

    Args:
        path: The adapter's files.
        client: A name of `CLIENTS`.
        module_names: All module names of the base, where they are known.
        config: The base's config as plain data.

    Returns:
        The findings, those that stop first.

    Raises:
        FormatError: The program is unknown, or the files are damaged.
    """
    if client not in CLIENTS:
        found = f"there is no client '{client}'"
        raise FormatError(f"check '{path}'", found, f"Known are {', '.join(CLIENTS)}")
    files = _files(path, module_names, config)
    return sorted(CLIENTS[client](files), key=lambda finding: not finding.stops)


def _files(path: Path, modules: Collection[str] | None, base: Mapping[str, Any] | None) -> Files:
    layout = detected(path)
    if layout != "peft":
        return Files(layout, modules=modules, base=base)
    asked = f"check '{path}'"
    for name in (CONFIG, MODEL):
        if not (path / name).is_file():
            raise FormatError(asked, f"there is no {name} in it", "Give the whole folder")
    config: Any = parse_json((path / CONFIG).read_bytes(), f"{asked}, {CONFIG}")
    if not isinstance(config, dict):
        raise FormatError(f"{asked}, {CONFIG}", "it is not a table of fields", "Fetch it again")
    _check_numbers(config, asked)
    header = read_header(path / MODEL, FormatError)
    pairs: dict[str, list[tuple[int, ...] | None]] = {}
    others = []
    for key, entry in header.tensors.items():
        match = _PAIR.fullmatch(key.removeprefix(PREFIX))
        if match is None:
            others.append(key.removeprefix(PREFIX))
        else:
            pairs.setdefault(match[1], [None, None])[match[2].endswith("B")] = entry.shape
    return Files(
        layout,
        config,
        {name: (a, b) for name, (a, b) in pairs.items()},
        tuple(others),
        tuple(key for key in header.tensors if not key.startswith(PREFIX)),
        header.metadata or {},
        modules,
        base,
    )


def _check_numbers(config: Mapping[str, Any], asked: str) -> None:
    """Refuse a LoRA's config whose ranks and alphas are not numbers."""
    if config.get("peft_type") != "LORA":
        return
    for name in ("r", "lora_alpha"):
        _positive(config.get(name), name, asked)
    for name in ("rank_pattern", "alpha_pattern"):
        table = config.get(name) or {}
        for value in table.values() if isinstance(table, dict) else [table]:
            _positive(value, name, asked)
    saved = config.get("modules_to_save") or []
    if not (isinstance(saved, list) and all(isinstance(name, str) for name in saved)):
        found = "'modules_to_save' is not a list of names"
        raise FormatError(f"{asked}, {CONFIG}", found, "Correct the file")


# What several programs have in common -------------------------------------------------------------


def _of_peft(
    client: str, methods: Mapping[str, str], own: Callable[[Files], Iterator[Finding]]
) -> Callable[[Files], Iterator[Finding]]:
    """Return the rules of a program that reads PEFT folders; `own` are rules of its own.

    `methods` are the fields of the config that it refuses, with what they mean.
    """

    def rules(files: Files) -> Iterator[Finding]:
        if files.layout != "peft":
            found = f"{client} reads PEFT folders, and this has the format '{files.layout}'"
            yield Finding(found, PORTABLE)
            return
        yield from _halves(files)
        for name, what in methods.items():
            if files.config.get(name) not in (None, False, [], {}, "none"):
                yield Finding(f"{client} does not know {what} ('{name}' is set)", MERGE)
        yield from own(files)
        yield from _names(files)

    return rules


def _halves(files: Files) -> Iterator[Finding]:
    lost = [name for name, pair in files.pairs.items() if None in pair]
    if lost:
        yield Finding(f"A or B is missing of {one_line(lost)}", "Fetch the file again")


def _names(files: Files) -> Iterator[Finding]:
    """Find modules that the base lacks: their updates would be ignored silently."""
    if files.modules is None:
        return
    known = set(files.modules)
    bare = (
        re.sub(r"\.experts\.\d+\..+", ".experts", name.removesuffix(".base_layer"))
        for name in files.pairs
    )
    lost = [name for name in dict.fromkeys(bare) if name not in known]
    if lost:
        near = one_line(nearest(lost[0], known, 1)) or "none"
        yield Finding(
            f"the base has no module {one_line(lost)}, so that the update would be ignored",
            f"Rename it (lora-inject rename); nearest to the first: {near}",
        )


def _scaled(
    files: Files, client: str, scale: Callable[[int], float], fix: str = PORTABLE
) -> Iterator[Finding]:
    """Compare the scale that a program applies with PEFT's."""
    wrong = [
        f"{name} ({scale(files.ranks[name]):.4g} for {due:.4g})"
        for name, due in files.scales().items()
        if not math.isclose(scale(files.ranks[name]), due, rel_tol=1e-6)
    ]
    if wrong:
        yield Finding(f"{client} would apply another scale to {one_line(wrong, 2)}", fix)


def _full(files: Files, client: str, does: str, allowed: tuple[str, ...] = ()) -> Iterator[Finding]:
    stray = [key for key in files.others if not key.endswith(allowed or ("\0",))]
    if stray:
        yield Finding(f"{client} {does} tensors that are not A or B: {one_line(stray)}", MERGE)


def _positive(value: Any, name: str, asked: str) -> float:
    if type(value) not in (int, float) or not 0 < value < 1e300:
        found = f"{str(value)[:40]!r} in '{name}' is not a number above 0"
        raise FormatError(f"{asked}, {CONFIG}", found, "Correct the file")
    return float(value)


def _number(files: Files, name: str) -> float:
    return _positive(files.config.get(name), name, "check")


_METHODS = {
    "use_dora": "DoRA",
    "lora_bias": "a bias of lora_B",
    "alora_invocation_tokens": "activated LoRA",
    "layer_replication": "replicated layers",
    "use_bdlora": "block-diagonal LoRA",
    "use_qalora": "QALoRA",
    "trainable_token_indices": "single rows of an embedding",
}
_ALL = {**_METHODS, "bias": "trained biases"}
_FOR_GGUF = {name: what for name, what in _METHODS.items() if name != "alora_invocation_tokens"}


# One function for each program --------------------------------------------------------------------


def _vllm(files: Files) -> Iterator[Finding]:
    saved = set(files.config.get("modules_to_save") or ()) - {"classifier", "score"}
    if saved:
        yield Finding(f"vLLM refuses 'modules_to_save' {one_line(sorted(saved))}", MERGE)
    heads = tuple(f"{head}.{end}" for head in ("classifier", "score") for end in ("weight", "bias"))
    copies = tuple(f"{name}.base_layer.weight" for name in ("embed_tokens", "lm_head"))
    yield from _full(files, "vLLM", "refuses", (*heads, *copies))
    init = str(files.config.get("init_lora_weights", "")).lower()
    if init.startswith(("pissa", "olora", "corda", "loftq")):
        fix = "Save it with PEFT's path_initial_model_for_weight_conversion"
        yield Finding(f"vLLM refuses init_lora_weights {init!r}", fix)
    modules = {name.removesuffix(".base_layer") for name in files.pairs}
    stacks = {name for name in modules if name.endswith(".experts")}
    half = [n for n in sorted(stacks) if not {n, f"{n}.base_layer"} <= files.pairs.keys()]
    if half:
        yield Finding(f"vLLM wants both stacks of experts adapted: {one_line(half)}", MERGE)
    elif stacks:
        yield Finding(
            "vLLM reads stacks of experts right only for models whose files hold stacks",
            "For others write it with `lora-inject convert --to vllm --base BASE`",
            stops=False,
        )
    largest = max([*files.ranks.values(), 0])
    if largest > VLLM_RANKS[-1]:
        yield Finding(
            f"rank {largest} is above vLLM's {VLLM_RANKS[-1]}", "Run lora-inject truncate"
        )
    elif largest > 16:
        need = next(rank for rank in VLLM_RANKS if rank >= largest)
        yield Finding(
            f"rank {largest} is above vLLM's default of 16",
            f"Start it with --max-lora-rank {need}",
            stops=False,
        )


def _sglang(files: Files) -> Iterator[Finding]:
    yield from _full(files, "SGLang", "ignores")
    scale = _number(files, "lora_alpha") / _number(files, "r")
    yield from _scaled(files, "SGLang", lambda _: scale)
    targets = files.config.get("target_modules")
    if isinstance(targets, str) and targets not in ("all", "all-linear"):
        yield Finding("SGLang reads 'target_modules' as a list, and it is a regex", PORTABLE)
    parts = {name.rpartition(".")[2] for name in files.pairs}
    if parts & {"q_proj", "k_proj"} and "v_proj" not in parts:
        yield Finding(
            "SGLang packs q, k and v, and can fill in k only: v_proj has no update",
            "Train v_proj too, or fold it into the base (lora-inject merge)",
        )


def _llama_cpp(files: Files) -> Iterator[Finding]:
    to_gguf = "Write it with `lora-inject convert --to gguf --base BASE`"
    norms = [key for key in files.others if re.search(r"_layernorm|\.norm", key)]
    if norms:
        yield Finding(f"llama.cpp ignores trained norms: {one_line(norms)}", MERGE)
    stray = [k for k in files.others if k not in norms and not k.endswith(".base_layer.weight")]
    if stray:
        yield Finding(f"llama.cpp's converter stops at {one_line(stray)}", MERGE)
    alpha = _number(files, "lora_alpha")
    yield from _scaled(files, "llama.cpp", lambda rank: alpha / rank, to_gguf)
    if files.base is not None:
        config = text_config(files.base, "check", "")
        if config.get("tie_word_embeddings") and {"lm_head", "model.embed_tokens"} & set(
            files.pairs
        ):
            yield Finding("llama.cpp holds a tied head and embedding as one tensor", MERGE)
        if config.get("model_type") not in FAMILIES:
            yield Finding(
                f"llama.cpp may not support the model_type {config.get('model_type')!r}",
                "Run its convert_lora_to_gguf.py on a portable folder",
                stops=False,
            )


def _lorax(files: Files) -> Iterator[Finding]:
    yield from _full(files, "LoRAX", "ignores")
    if files.unprefixed:
        yield Finding(
            f"LoRAX finds no key without '{PREFIX}': {one_line(files.unprefixed)}", PORTABLE
        )
    r, alpha = _number(files, "r"), _number(files, "lora_alpha")
    scale = alpha / (math.sqrt(r) if files.config.get("use_rslora") else r)
    yield from _scaled(files, "LoRAX", lambda _: scale)
    if len(set(files.ranks.values())) > 1:
        yield Finding("LoRAX stacks the layers, which have unequal ranks", PORTABLE)
    yield from _layers(files)


def _layers(files: Files) -> Iterator[Finding]:
    """LoRAX drops a module that some layers lack from all layers."""
    layers: dict[str, set[int]] = {}
    for name in files.pairs:
        if found := re.fullmatch(r"(.*?\.)(\d+)(\..+)", name):
            layers.setdefault(found[1] + "*" + found[3], set()).add(int(found[2]))
    n_layers = len(set().union(*layers.values())) if layers else 0
    if files.base is not None:
        n_layers = text_config(files.base, "check", "").get("num_hidden_layers", n_layers)
    partial = [name for name, there in layers.items() if len(there) < n_layers]
    if partial:
        yield Finding(
            f"LoRAX drops a module that some layers lack from all: {one_line(partial)}",
            "Adapt all layers, or fold it into the base (lora-inject merge)",
        )


def _diffusers(files: Files) -> Iterator[Finding]:
    if files.layout in ("diffusers", "kohya"):
        return
    if files.layout != "peft":
        fix = "Write it with `lora-inject convert --to diffusers --component unet`"
        yield Finding(f"diffusers does not read the format '{files.layout}'", fix)
        return
    yield from _halves(files)
    yield from _full(files, "diffusers", "ignores")
    if "lora_adapter_metadata" not in files.metadata:
        fix = "Write it with `lora-inject convert --to diffusers --component unet`"
        yield from _scaled(
            files, "diffusers (which reads no adapter_config.json)", lambda _: 1.0, fix
        )
    yield Finding(
        "it is a PEFT folder",
        f'Load it with model.load_lora_adapter(path, prefix="{PREFIX[:-1]}", '
        f'weight_name="{MODEL}")',
        stops=False,
    )


def _comfyui(files: Files) -> Iterator[Finding]:
    if files.layout == "kohya":
        return
    fix = "Write it with `lora-inject convert --to kohya --component unet`"
    if files.layout == "diffusers":
        yield Finding(
            "ComfyUI takes scale 1 where a file has no alpha; scales in the header are not read",
            f"{fix}, unless it was written by this package, which folds scales into B",
            stops=False,
        )
        return
    yield Finding(f"ComfyUI reads one file, and this has the format '{files.layout}'", fix)


def _mlx(files: Files) -> Iterator[Finding]:
    if files.layout != "mlx":
        fix = "Write it with `lora-inject convert --to mlx`"
        yield Finding(f"mlx-lm reads {mlx.FILE}, and this has the format '{files.layout}'", fix)


def _peft(files: Files) -> Iterator[Finding]:
    if files.config.get("peft_type") is None:
        yield Finding("'peft_type' is missing, without which PEFT refuses it", "Fetch it again")
        return
    if files.config["peft_type"] != "LORA":
        return
    if files.unprefixed:
        yield Finding(
            f"PEFT finds no key without '{PREFIX}': {one_line(files.unprefixed)}", PORTABLE
        )
    if not files.config.get("target_parameters"):
        due = files.numbers("rank_pattern", "r", files.ranks)
        wrong = [f"{n} ({r} for {due[n]})" for n, r in files.ranks.items() if r != due[n]]
        if wrong:
            yield Finding(f"the ranks of tensors and config differ: {one_line(wrong)}", PORTABLE)


def _gguf_or(
    rules: Callable[[Files], Iterator[Finding]],
) -> Callable[[Files], Iterator[Finding]]:
    """Return the rules of a program that reads GGUF files, and folders after conversion."""
    return lambda files: iter(()) if files.layout == "gguf" else rules(files)


CLIENTS: Mapping[str, Callable[[Files], Iterator[Finding]]] = {
    "vllm": _of_peft("vLLM", _ALL, _vllm),
    "sglang": _of_peft("SGLang", _ALL, _sglang),
    "llama.cpp": _gguf_or(_of_peft("llama.cpp", _FOR_GGUF, _llama_cpp)),
    "lorax": _of_peft("LoRAX", _ALL, _lorax),
    "diffusers": _diffusers,
    "mlx": _mlx,
    "comfyui": _comfyui,
    "peft": _of_peft("PEFT", {}, _peft),
}
"""Programs by the names that `lora-inject check --for` knows."""
