"""Checks of adapter files for programs that load them.

A program is a row of `CLIENTS` with its facts: functions of the config and of the names and shapes
of the tensors, each with the versions in which it holds. Of values they read only alphas; that all
are finite is checked here, and that this package reads the folder: what its own reader refuses, no
program is said to take. Anything that a program would refuse, ignore or scale differently is an
objection with a remedy. Without a version they are those of any version from the oldest that is
known. `scripts/interop/clients.py` runs the programs themselves and compares.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from lora_inject.core.adapter.file_keys import one_line
from lora_inject.core.files.strict_json import parse_table
from lora_inject.core.files.tensors import is_safetensors, read_tensors
from lora_inject.core.functional.finite import all_finite
from lora_inject.core.spec.names import Below, leaf, nearest, parent
from lora_inject.errors import FormatError, within
from lora_inject.formats import gguf, mlx, pipelines
from lora_inject.formats.exchange import detected, read_adapter
from lora_inject.formats.format import Files, part_of_folder
from lora_inject.formats.model_facts import ModelFacts, NotKnownError
from lora_inject.formats.peft.fields import LAYOUTS_OF_B, UNSUPPORTED, LoraFields, read_fields
from lora_inject.formats.peft.folder import CONFIG, CONFIG_KEY, MODEL, opened
from lora_inject.formats.peft.tensor_layout import PREFIX
from lora_inject.formats.single_experts import (
    as_single_experts,
    block_and_part,
    has_server_stacks,
    missing_matrices,
)

CONVERT = "Write it with `lora-inject convert --to "
PORTABLE = f"{CONVERT}portable`"
MERGE = "Fold it into the base with `lora-inject merge` and serve the result"
_PAIR = re.compile(r"(.+?)\.lora_(?:embedding_)?([ABab])(?:\.weight)?")
# Kohya's names of layers that ComfyUI does not look up.
_COMFYUI_LACKS = re.compile(
    r"lora_unet_(single_)?transformer_blocks_\d+_|lora_te_(text_projection|encoder_block_)"
    r"|lora_te\d?_encoder_layers_\d+_(self_attn_(q|k|v|out)_proj|mlp_fc[12])"
)
# What vLLM takes for --max-lora-rank (0.30 to 0.32, config/lora.py, `MaxLoRARanks`).
VLLM_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
# Models whose stacks of experts vLLM adapts as PEFT stacks them (`is_3d_moe_weight`).
VLLM_STACKS = ("gpt_oss", "interns1_pro", "qwen3_5_moe", "qwen3_omni_moe", "qwen3_vl_moe")


@dataclass(frozen=True)
class Objection:
    """One thing that a program would refuse, ignore or compute differently.

    Attributes:
        problem: What the program would do, and where.
        fix: The remedy.
        stops: Whether the program cannot use the adapter as it is; otherwise the finding is a note.
    """

    problem: str
    fix: str
    stops: bool = True


Objections = Iterator[Objection]
Version = tuple[int, ...]
Shape = tuple[int, ...] | None


class Checked:
    """An adapter's files and what is known of the base.

    Attributes:
        path: The folder, or the file.
        layout: The name of the format.
        tensors: The tensors by their keys, and `metadata` beside them.
        config: The config of PEFT's or mlx-lm's folder, and its `fields` if it is LoRA's.
        pairs: For such folders the shapes of A and B by module, with None for a missing one; those
            of each expert for servers' stacks.
        others: The names of all other tensors there.
        shared: Whether there are stacks `experts.w1` with shared factors.
        said: The rank and the alpha of each module by the config, with PEFT's defaults.
        ranks: Rank of each complete pair by its tensors; for a stack that of one expert.
        modules: The names of the base's modules, None if they are not known.
        base: The config of the base's language model, with all defaults.
        kind: The base's `model_type`, which servers go by.
        transposed: The names of the base's modules that have `is_transposed`, None if not known.
        unfit: Says why PEFT's layers cannot stand in a module's place.
        language_model: What is in the language model of a base that has other parts, or None.
    """

    def __init__(self, path: Path, facts: ModelFacts) -> None:
        self.layout, self.path = detected(path), Files(path).path
        self.modules = facts.modules_in_files()
        self.base = facts.text_config("") if facts.config else {}
        self.kind = (facts.config or {}).get("model_type")
        self.transposed = facts.transposed_modules if facts.orientation_known else None
        self.unfit = facts.unfit or (lambda _: "")
        inside = facts.language_model
        self.language_model = None if inside is None else Below(inside)
        self.config: Mapping[str, Any] = {}
        self.fields = LoraFields()
        with within(f"check '{path}'"):
            self._read()
            self.shared = has_server_stacks(self.tensors)
            single = as_single_experts(self.tensors, self.config) if self.config else {}
            self._sort(single)

    def _sort(self, tensors: Mapping[str, Tensor]) -> None:
        self.pairs: dict[str, list[Shape]] = {}
        self.others: list[str] = []
        for key, tensor in tensors.items():
            if match := _PAIR.fullmatch(key.removeprefix(PREFIX)):
                of_b = match[2] in "Bb"
                self.pairs.setdefault(match[1], [None, None])[of_b] = tuple(tensor.shape)
            else:
                self.others.append(key.removeprefix(PREFIX))
        self.rank, self.alpha = self.fields.r or 8, self.fields.lora_alpha or 8
        numbers = self.fields.numbers(self.pairs).items()
        self.said = {n: (rank or self.rank, alpha or self.alpha) for n, (rank, alpha) in numbers}
        self.ranks = {n: self._rank(n, a[0]) for n, (a, b) in self.pairs.items() if a and b}

    def in_tower(self, name: str) -> bool:
        """Whether a module is outside of the language model of a base that has other parts."""
        return self.language_model is not None and name not in self.language_model

    def is_stack(self, name: str) -> bool:
        """Whether A and B of a complete pair hold those of several matrices."""
        a, _ = self.pairs[name]
        return a is not None and a[0] > self.ranks[name]

    def _rank(self, name: str, rank: int) -> int:
        """Return the rank of a pair whose A has so many rows: several times its own in a stack."""
        said, _ = self.said[name]
        return said if self.fields.target_parameters and rank % said == 0 else rank

    def _read(self) -> None:
        inside = {"mlx": mlx.FILE, "diffusers": pipelines.FILE}.get(self.layout, "")
        file = self.path / inside if self.path.is_dir() else self.path
        self.tensors: Mapping[str, Tensor] = {}
        self.metadata: Mapping[str, str] = {}
        if self.layout == "peft":
            self.config, self.tensors, self.metadata = opened(self.path)
        elif self.layout == "gguf":
            self.tensors = gguf.tensors_of(file)
        elif is_safetensors(file):
            self.tensors, self.metadata = read_tensors(file)
        if self.layout == "mlx":
            self.config = parse_table(part_of_folder(self.path, CONFIG).read_bytes(), CONFIG)
        if self.config.get("peft_type") == "LORA":
            self.fields = read_fields(self.config, CONFIG, allow={*self.config})


@dataclass(frozen=True)
class Fact:
    """A rule about a program.

    Attributes:
        rule: What it yields for an adapter's files.
        since: The first version in which it holds; empty for every one before.
        until: The last one, with all that begin so; empty for every one after.
    """

    rule: Callable[[Checked], Objections]
    since: str = ""
    until: str = ""

    def holds(self, version: Version | None) -> bool:
        """Whether it holds in a version; if none is given, in any."""
        if version is None:
            return True
        first, last = _numbers(self.since), _numbers(self.until)
        return first <= version and (not last or version[: len(last)] <= last)


@dataclass(frozen=True)
class Program:
    """A program that loads adapters.

    Attributes:
        seen: The version that was read, and run by scripts/interop, last.
        source: Where in it the facts are.
        facts: What it would refuse, ignore or compute differently.
        oldest: The first version that the facts are known of; empty for `seen`.
    """

    seen: str
    source: str
    facts: tuple[Fact, ...]
    oldest: str = ""

    def version(self, text: str, asked: str) -> Version:
        """Return a version that was asked for, and of which the facts are known."""
        if not re.fullmatch(r"\d+(\.\d+)*", text):
            raise FormatError(asked, f"{text!r} is not a version", "Write it as in vllm==0.32")
        version, oldest = _numbers(text), self.oldest or self.seen
        if version < _numbers(oldest)[: len(version)]:
            problem = f"what version {text} does is not known, the oldest known one is {oldest}"
            raise FormatError(asked, problem, "Leave the version out, or take a newer program")
        return version


def _numbers(version: str) -> Version:
    return tuple(map(int, version.split("."))) if version else ()


def objections(path: Path, client: str, facts: ModelFacts) -> list[Objection]:
    """Return what a program would refuse, ignore or compute differently.

    `client` is a name of `CLIENTS`, or one with a version: `vllm==0.32`. Those that stop come
    first. The base's module names and config are compared if given.
    """
    asked, (name, equals, text) = f"check '{path}'", client.partition("==")
    if name not in CLIENTS:
        problem = f"there is no client '{client}'"
        raise FormatError(asked, problem, f"Known are {', '.join(CLIENTS)}")
    program = CLIENTS[name]
    version = program.version(text, f"{asked} for '{client}'") if equals else None
    files = Checked(path, facts)
    bad = (key.removeprefix(PREFIX) for key, t in files.tensors.items() if not all_finite(t))
    remedy = "Its training diverged; take an earlier checkpoint of the adapter"
    found = [*_about(bad, "NaN or Inf, which makes all outputs NaN, is in {}", remedy)]
    for fact in program.facts:
        found += fact.rule(files) if fact.holds(version) else ()
    found += _unread(files, path, facts)
    return sorted(found, key=lambda objection: not objection.stops)


def _unread(files: Checked, path: Path, facts: ModelFacts) -> Objections:
    """Find what this package's reader refuses in a PEFT folder, whoever else would read it.

    PEFT's further methods, and an init that changes the base, are the programs' own matter; what
    only the base says is not asked.
    """
    if files.config.get("peft_type") != "LORA" or files.layout != "peft":
        return
    allowed = [*UNSUPPORTED, "init_lora_weights"]
    try:
        read_adapter(path, files.layout, facts=facts, allow=allowed)
    except NotKnownError:
        return
    except FormatError as error:
        place = error.asked.partition(f"adapter '{path}'")[2].removeprefix(", ")
        what = f"{place}: {error.found}" if place else error.found
        yield Objection(f"it contradicts itself, {what}", error.remedy)


# What several programs have in common -------------------------------------------------------------

_METHODS = {
    "use_dora": "DoRA",
    "lora_bias": "a bias of lora_B",
    "layer_replication": "replicated layers",
    "use_bdlora": "block-diagonal LoRA",
    "use_qalora": "QALoRA",
    "trainable_token_indices": "single rows of an embedding",
}
_ALL = {**_METHODS, "alora_invocation_tokens": "activated LoRA", "bias": "trained biases"}


def _about(
    names: Iterable[str], problem: str, fix: str, *, n: int = 3, stops: bool = True
) -> Objections:
    """Yield an objection about some names, `{}` in the problem, if there are any."""
    if listed := list(names):
        yield Objection(problem.replace("{}", one_line(listed, n)), fix, stops)


def _in_peft(
    client: str, methods: Mapping[str, str], *rules: Callable[[Checked], Objections], also: str = ""
) -> Callable[[Checked], Objections]:
    """Return a rule that holds `rules` to LoRA in PEFT folders, which a program reads alone.

    `methods` are the fields of the config that it refuses, with their meaning. `also` is a format
    that it reads as it is.
    """

    def rule(files: Checked) -> Objections:
        kind = files.config.get("peft_type")
        if files.layout == also:
            return
        if files.layout != "peft":
            problem = f"{client} reads PEFT folders, and this has the format '{files.layout}'"
            yield Objection(problem, PORTABLE)
        elif kind is None:
            yield Objection(f"'peft_type' is missing, without which {client} refuses it", "Add it")
        elif kind == "LORA":
            for name, what in methods.items():
                if files.config.get(name) not in (None, False, [], {}, "none"):
                    yield Objection(f"{client} does not know {what} ('{name}' is set)", MERGE)
            for each in (_halves, *rules, _names):
                yield from each(files)
        elif client != "PEFT":
            yield Objection(f"{client} reads LoRA, and 'peft_type' is {str(kind)[:40]!r}", MERGE)

    return rule


def _halves(files: Checked) -> Objections:
    lost = (name for name, pair in files.pairs.items() if None in pair)
    return _about(lost, "A or B is missing of {}", "Fetch the file again")


def _names(files: Checked) -> Objections:
    """Find modules that the base lacks: their updates would be ignored silently."""
    known = set(files.modules or ())
    bare = (
        re.sub(r"\.experts\.\d+\..+", ".experts", name.removesuffix(".base_layer"))
        for name in files.pairs
    )
    whole = (name for name, own in zip(bare, files.pairs, strict=True) if own not in known)
    lost = [name for name in dict.fromkeys(whole) if name not in known]
    if lost and files.modules is not None:
        near = one_line(nearest(lost[0], sorted(known), 1)) or "none"
        problem = f"the base has no module {one_line(lost)}, so that the update would be ignored"
        yield Objection(problem, f"Rename it (lora-inject rename); nearest to the first: {near}")


def _scaled(
    files: Checked, client: str, scale: Callable[[int], float], fix: str = PORTABLE
) -> Objections:
    """Compare the scale that a program applies with PEFT's."""
    due = {n: files.said[n][1] / files.fields.divisor(r) for n, r in files.ranks.items()}
    wrong = (
        f"{name} ({scale(rank):.4g} for {due[name]:.4g})"
        for name, rank in files.ranks.items()
        if not math.isclose(scale(rank), due[name], rel_tol=1e-6)
    )
    return _about(wrong, f"{client} would apply another scale to {{}}", fix, n=2)


def _full(files: Checked, client: str, does: str, allowed: tuple[str, ...] = ("\0",)) -> Objections:
    stray = (key for key in files.others if not key.endswith(allowed))
    return _about(stray, f"{client} {does} tensors that are not A or B: {{}}", MERGE)


def _stacks(files: Checked, client: str, fix: str) -> Objections:
    stacks = (n for n in files.pairs if re.search(r"\.experts(\.base_layer)?$", n))
    return _about(stacks, f"{client} refuses stacks of experts: {{}}", fix)


def _no_shared_stacks(files: Checked, client: str, fix: str = PORTABLE) -> Objections:
    if files.shared:
        yield Objection(f"{client} does not know stacks of experts named w1, w2 and w3", fix)


# One function for each program --------------------------------------------------------------------


_HEADS_IN_VLLM = ("classifier", "score")


def _heads_in_vllm(files: Checked) -> Objections:
    saved = [name for name in files.fields.modules_to_save if name in _HEADS_IN_VLLM]
    yield from _about(saved, "vLLM up to 0.30 refuses 'modules_to_save' {}", MERGE)


def _one_scale_in_vllm(files: Checked) -> Objections:
    divisor = files.fields.divisor(files.rank)
    if files.config.get("peft_type") == "LORA":
        yield from _scaled(files, "vLLM up to 0.31", lambda _: files.alpha / divisor)


def _vllm(files: Checked) -> Objections:
    saved = {*files.fields.modules_to_save} - {*_HEADS_IN_VLLM}
    yield from _about(sorted(saved), "vLLM refuses 'modules_to_save' {}", MERGE)
    heads = tuple(f"{head}.{end}" for head in _HEADS_IN_VLLM for end in ("weight", "bias"))
    copies = tuple(f"{name}.base_layer.weight" for name in ("embed_tokens", "lm_head"))
    yield from _full(files, "vLLM", "refuses", (*heads, *copies))
    if "target_modules" not in files.config:
        yield Objection("vLLM refuses a config without 'target_modules'", PORTABLE)
    init = str(files.config.get("init_lora_weights", "")).lower()
    if init.startswith(("pissa", "olora", "corda", "loftq")):
        fix = "Save it with PEFT's path_initial_model_for_weight_conversion"
        problem = f"vLLM does not change the base as PEFT does for init_lora_weights {init!r}"
        yield Objection(problem, fix)
    if files.shared:
        yield _started_with("vLLM", "--enable-moe-shared-loras")
    yield from _columns_by_expert(files, "vLLM")
    towers = (name for name in files.pairs if files.in_tower(name))
    problem = "vLLM adapts a tower beside the language model only with an option: {}"
    option = "Start it with --enable-tower-connector-lora"
    yield from _about(towers, problem, option, stops=False)
    yield from _stacks_in_vllm(files)
    yield from _ranks_in_vllm(max([*files.ranks.values(), 0]))


def _columns_by_expert(files: Checked, client: str) -> Objections:
    if files.fields.lora_B_layout == LAYOUTS_OF_B[1]:
        problem = f"{client} reads a stack's B by rank, and 'lora_B_layout' is {LAYOUTS_OF_B[1]!r}"
        yield Objection(problem, f"{CONVERT}peft --base BASE`")


def _stacks_in_vllm(files: Checked) -> Objections:
    """Find stacks of experts of which only one is adapted, or that it may read wrong."""
    modules = {name.removesuffix(".base_layer") for name in files.pairs}
    stacks = {name for name in modules if name.endswith(".experts")}
    half = [n for n in sorted(stacks) if not {n, f"{n}.base_layer"} <= files.pairs.keys()]
    yield from _about(half, "vLLM wants both stacks of experts adapted: {}", MERGE)
    yield from _forms_of_experts(files, bool(stacks) and not half)
    if files.kind in (None, *VLLM_STACKS):
        yield from _turned_stacks(files, "vLLM", stacks)
    lost = missing_matrices(files.pairs, files.modules or ())
    yield from _about(
        lost, "vLLM wants every matrix of every expert adapted, and stops at {}", MERGE
    )


def _forms_of_experts(files: Checked, has_stacks: bool) -> Objections:
    """Find stacks for a model whose experts vLLM adapts singly, or the other way round."""
    kind, singly = files.kind, f"{CONVERT}vllm --base BASE`"
    if has_stacks and kind is None:
        problem = "vLLM reads stacks of experts only for models whose files hold stacks"
        yield Objection(problem, f"For others: {singly}", stops=False)
    elif has_stacks and kind not in VLLM_STACKS:
        problem = f"vLLM refuses stacks of experts for the model_type {kind!r}, or ignores them"
        yield Objection(problem, singly)
    single = [name for name in files.pairs if block_and_part(name)]
    if kind in VLLM_STACKS and not files.shared:
        problem = f"vLLM has stacks of experts for the model_type {kind!r}, and refuses {{}}"
        yield from _about(single, problem, "Write it in PEFT's format (--to peft)")


def _turned_stacks(files: Checked, client: str, stacks: set[str]) -> Objections:
    """Find stacks whose A is of the output, as PEFT until 0.18 took each for (in, out)."""
    known = files.transposed
    if files.fields.takes_every_stack_turned:
        problem = f"{client} takes a stack's A for the factor of the input, as PEFT until 0.18 "
        problem += "wrote it only for modules that have is_transposed: {}"
        fix = f"{CONVERT}peft --base BASE`"
        wrong = sorted(stacks - {*(known or ())})
        yield from _about(wrong, problem, fix, stops=known is not None)


def _ranks_in_vllm(largest: int) -> Objections:
    if largest > VLLM_RANKS[-1]:
        problem = f"rank {largest} is above vLLM's {VLLM_RANKS[-1]}"
        yield Objection(problem, "Run lora-inject truncate")
    elif largest > 16:
        need = next(rank for rank in VLLM_RANKS if rank >= largest)
        problem = f"rank {largest} is above vLLM's default of 16"
        yield Objection(problem, f"Start it with --max-lora-rank {need}", stops=False)


def _sglang(files: Checked) -> Objections:
    yield from _full(files, "SGLang", "ignores")
    yield from _scaled(files, "SGLang", lambda _: files.alpha / files.rank)
    targets = files.config.get("target_modules")
    if isinstance(targets, str) and targets not in ("all", "all-linear"):
        yield Objection("SGLang reads 'target_modules' as a list, and it is a regex", PORTABLE)
    unequal = (n for n, rank in files.ranks.items() if rank != files.rank)
    problem = f"SGLang refuses ranks other than 'r', which is {files.rank}: {{}}"
    yield from _about(unequal, problem, PORTABLE)
    if files.shared:
        yield _started_with("SGLang", "--experts-shared-outer-loras")
    else:
        yield from _stacks(files, "SGLang", f"For single experts: {CONVERT}vllm --base BASE`")
    there: dict[str, set[str]] = {}
    for name in files.pairs:
        there.setdefault(parent(name), set()).add(leaf(name))
    for needed, packed in (({"q_proj", "v_proj"}, {"k_proj"}), ({"gate_proj"}, {"up_proj"})):
        lost = (
            f"{place}.{part}"
            for place, parts in there.items()
            if parts & (needed | packed)
            for part in sorted(needed - parts)
        )
        names = " and ".join(sorted(needed | packed))
        fix = "Train these layers too, or fold the adapter into the base (lora-inject merge)"
        yield from _about(lost, f"SGLang packs {names}, and there is no update of {{}}", fix)
    if (files.path / "added_tokens.json").exists():
        problem = "SGLang refuses an added_tokens.json with numbers beyond the base's vocabulary"
        yield Objection(problem, "Leave the file out if the base has these tokens", stops=False)


def _started_with(client: str, flag: str) -> Objection:
    problem = f"its experts share factors, which {client} loads right only with an option"
    return Objection(problem, f"Start it with {flag}", stops=False)


def _llama_cpp(files: Checked) -> Objections:
    norms = [key for key in files.others if re.search(r"_layernorm|\.norm", key)]
    yield from _about(norms, "llama.cpp ignores trained norms: {}", MERGE)
    stray = (k for k in files.others if k not in norms and not k.endswith(".base_layer.weight"))
    yield from _about(stray, "llama.cpp's converter stops at {}", MERGE)
    yield from _stacks(files, "llama.cpp's converter", MERGE)
    yield from _no_shared_stacks(files, "llama.cpp's converter", MERGE)
    fix = f"{CONVERT}gguf --base BASE`"
    yield from _scaled(files, "llama.cpp", lambda rank: files.alpha / rank, fix)
    tied = files.base.get("tie_word_embeddings")
    if tied and {"lm_head", "model.embed_tokens"} & files.pairs.keys():
        yield Objection("llama.cpp holds a tied head and embedding as one tensor", MERGE)
    kind = files.base.get("model_type")
    if files.base and kind not in gguf.FAMILIES:
        fix = "Run its convert_lora_to_gguf.py on a portable folder"
        yield Objection(f"llama.cpp may not support the model_type {kind!r}", fix, stops=False)


def _unfit(files: Checked, names: Iterable[str], client: str) -> Objections:
    """Find layers in whose place PEFT's cannot stand; only the base's own classes say it."""
    for name in names:
        if reason := files.unfit(name):
            yield Objection(f"{client} would load it wrong: '{name}': {reason}", MERGE)


def _peft(files: Checked) -> Objections:
    bare = (key for key in files.tensors if not key.startswith(PREFIX))
    yield from _about(bare, f"PEFT finds no key without '{PREFIX}': {{}}", PORTABLE)
    yield from _no_shared_stacks(files, "PEFT")
    yield from _columns_by_expert(files, "PEFT")
    parameters = {parent(name) for name in files.fields.target_parameters}
    modules = (n for n in files.pairs if n not in parameters and not n.endswith(".base_layer"))
    yield from _unfit(files, modules, "PEFT")
    stacks = {name.removesuffix(".base_layer") for name in files.ranks if files.is_stack(name)}
    yield from _turned_stacks(files, "PEFT since 0.19", stacks & parameters)
    if not files.fields.target_parameters:
        due = {name: rank for name, (rank, _) in files.said.items()}
        wrong = (f"{n} ({r} for {due[n]})" for n, r in files.ranks.items() if r != due[n])
        yield from _about(wrong, "the ranks of tensors and config differ: {}", PORTABLE)


def _diffusers(files: Checked) -> Objections:
    fix = f"{CONVERT}diffusers --component unet`"
    if files.layout == "peft":
        yield from _peft_in_diffusers(files, fix)
    elif files.layout == "kohya":
        problem = "diffusers misreads some names of kohya's, and applies the most frequent alpha"
        yield Objection(problem, fix)
    elif files.layout != "diffusers":
        yield Objection(f"diffusers does not read the format '{files.layout}'", fix)


def _peft_in_diffusers(files: Checked, fix: str) -> Objections:
    yield from _halves(files)
    yield from _no_shared_stacks(files, "diffusers")
    yield from _unfit(files, files.pairs, "diffusers, which uses PEFT,")
    known = (".weight", ".bias", ".lora_magnitude_vector")
    yield from _full(files, "diffusers", "ignores", known)
    if CONFIG_KEY not in files.metadata:
        client = "diffusers (which reads no adapter_config.json)"
        yield from _scaled(files, client, lambda _: 1.0, fix)
    if files.fields.use_dora and "model_type" in files.base:
        problem = "the load_adapter of transformers' models leaves out the magnitudes of DoRA"
        yield Objection(problem, f"Load it with PEFT, or: {MERGE}")
    options = f'prefix="{PREFIX[:-1]}", weight_name="{MODEL}"'
    load = f"Load it with model.load_lora_adapter(path, {options})"
    load += ", or onto a text encoder with model.load_adapter(path)"
    yield Objection("it is a PEFT folder", load, stops=False)


def _comfyui(files: Checked) -> Objections:
    fix = f"{CONVERT}kohya --component unet` (transformer for Flux and SD3)"
    if files.layout != "kohya":
        problem = (
            f"ComfyUI reads kohya's file, and of the format '{files.layout}' little or nothing"
        )
        yield Objection(problem, fix)
        return
    lost = [name for name in files.tensors if _COMFYUI_LACKS.match(name)]
    yield from _about(lost, "ComfyUI does not know these names and ignores them: {}", fix)
    kind = files.base.get("_class_name")
    whole = kind not in ("FluxTransformer2DModel", "SD3Transformer2DModel")
    if whole and any(name.startswith("lora_transformer_") for name in files.tensors):
        problem = "ComfyUI reads kohya files of a transformer for Flux and SD3 only"
        yield Objection(problem, MERGE, stops=kind is not None)


def _mlx(files: Checked) -> Objections:
    if files.layout != "mlx":
        problem = f"mlx-lm reads {mlx.FILE}, and this has the format '{files.layout}'"
        yield Objection(problem, f"{CONVERT}mlx`")
    elif files.base.get("tie_word_embeddings") and "lm_head" in files.pairs:
        yield Objection("mlx-lm refuses an adapter of a tied head", MERGE)
    else:
        yield from _names(files)


CLIENTS: Mapping[str, Program] = {
    "vllm": Program(
        "0.32.0",
        "lora/peft_helper.py, lora/lora_model.py, lora/utils.py, lora/model_manager.py",
        (
            Fact(_in_peft("vLLM", _ALL, _vllm)),
            Fact(_one_scale_in_vllm, until="0.31"),
            Fact(_heads_in_vllm, until="0.30"),
        ),
        oldest="0.30",
    ),
    "sglang": Program(
        "0.5.23",
        "srt/lora/lora_config.py, lora.py, utils.py",
        (Fact(_in_peft("SGLang", _ALL, _sglang)),),
    ),
    "llama.cpp": Program(
        "0.3.36",  # of llama-cpp-python
        "convert_lora_to_gguf.py, src/llama-adapter.cpp",
        (Fact(_in_peft("llama.cpp", _METHODS, _llama_cpp, also="gguf")),),
    ),
    "diffusers": Program("0.42.1", "loaders/peft.py", (Fact(_diffusers),)),
    "mlx": Program("0.32.2", "mlx_lm/tuner/utils.py", (Fact(_mlx),)),
    "comfyui": Program("0.3.64", "comfy/lora.py", (Fact(_comfyui),)),
    "peft": Program("0.21.2", "utils/save_and_load.py", (Fact(_in_peft("PEFT", {}, _peft)),)),
}
"""Programs by the names that `lora-inject check --for` knows."""
