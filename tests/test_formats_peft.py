"""Exchange with PEFT itself, both ways: a file means what PEFT computes from it.

Two tables: adapters of PEFT, which are read live, written back, merged live and in files; and
adapters of ours, which PEFT reads. After them, what a file alone does not say, and refusals.
"""

import copy
import json
import re
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import error, fill
from helpers.architectures import ARCHITECTURES, Architecture
from helpers.checkpoints import (
    assert_verified,
    load_checkpoint,
    merge,
    merged_on_disk,
    save_checkpoint,
    ulps,
)
from helpers.versions import needs_peft_reads_experts, needs_transformers_5
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

import lora_inject as li
from lora_inject.checkpoint import Checkpoint, read_weighted
from lora_inject.errors import FormatError
from lora_inject.formats import read_adapter

transformers = pytest.importorskip("transformers")
peft = pytest.importorskip("peft")

# PEFT warns of much that is none of this package's business.
pytestmark = pytest.mark.filterwarnings("ignore")

# ------------------------------------------------------------------------------- models of our own


class Chain(nn.Sequential):
    """Layers one after the other, by their names."""

    def __init__(self, **layers: nn.Module) -> None:
        super().__init__()
        for name, layer in layers.items():
            self.add_module(name, layer)


class EmbConv1D(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.emb, self.conv1d, self.lin0 = nn.Embedding(20, 5), Conv1D(1, 5), nn.Linear(2, 2)

    def forward(self, ids: Tensor) -> Tensor:
        return self.lin0(torch.relu(self.conv1d(self.emb(ids))).flatten(1))


class Mha(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.mha, self.lin0 = nn.MultiheadAttention(10, 2), nn.Linear(10, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.lin0(self.mha(x, x, x)[0])


class Held(nn.Module):
    """A weight that is read."""

    def __init__(self, *shape: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(shape))

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight if self.weight.dim() == 2 else x @ self.weight[0].t()


class Suffixes(nn.Module):
    """Names that are ends of each other, and names that are regular expressions."""

    def __init__(self) -> None:
        super().__init__()
        self.lin, self.xlin = nn.Linear(4, 4), nn.Linear(4, 4)
        self.blk = nn.ModuleDict({name: nn.Linear(4, 4) for name in ("lin", "l+n", "lxin")})

    def forward(self, x: Tensor) -> Tensor:
        for layer in (self.lin, *self.blk.values(), self.xlin):
            x = layer(x).tanh()
        return x


def convolution(layer: Callable[[], nn.Module], width: int, *shape: int) -> Architecture:
    """A convolution and a linear layer behind it."""

    tail = {"relu": nn.ReLU(), "flat": nn.Flatten()}
    return Architecture(
        lambda: Chain(conv=layer(), **tail, lin0=nn.Linear(width, 2)), (wave(*shape),)
    )


def mlp() -> nn.Module:
    return Chain(lin0=nn.Linear(10, 20), relu=nn.ReLU(), lin1=nn.Linear(20, 2))


def wave(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(2))


IMAGE, CUBE = (2, 5, 10, 10), (2, 5, 6, 6, 6)
OWN = {
    "mlp": Architecture(mlp, (wave(3, 10),)),
    "table": Architecture(EmbConv1D, (torch.arange(10).view(5, 2),)),
    "conv1d": convolution(lambda: nn.Conv1d(1, 1, 2), 9, 2, 1, 10),
    "conv2d": convolution(lambda: nn.Conv2d(5, 10, 3), 640, *IMAGE),
    "groups": convolution(lambda: nn.Conv2d(5, 5, 3, groups=5), 320, *IMAGE),
    "groups 2": convolution(lambda: nn.Conv2d(5, 10, 3, groups=5), 640, *IMAGE),
    "conv3d": convolution(lambda: nn.Conv3d(5, 10, 3), 640, *CUBE),
    "conv3d 1x1": convolution(lambda: nn.Conv3d(5, 10, 1), 2160, *CUBE),
    "mha": Architecture(Mha, (wave(3, 2, 10),)),
    "held": Architecture(lambda: Chain(lin0=Held(10, 20), lin1=Held(20, 2)), (wave(3, 10),)),
    "stack of one": Architecture(
        lambda: Chain(up=Held(1, 6, 4), out=nn.Linear(6, 3)), (wave(2, 4),)
    ),
    "suffixes": Architecture(Suffixes, (wave(3, 4),)),
}  # fmt: skip
MODELS = ARCHITECTURES | OWN

# ---------------------------------------------------------------------------- adapters of PEFT


def on(*targets: str, **options: Any) -> dict[str, Any]:
    """The options of a LoraConfig."""
    return {"target_modules": [*targets], **options}


DORA, BIAS = {"use_dora": True}, {"lora_bias": True, "lora_alpha": 32}
STACKS = {"target_parameters": ["experts.gate_up_proj", "experts.down_proj"]}
PATTERNS: dict[str, Any] = {
    "rank_pattern": {
        "q_proj": 3, "c_attn": 5, r"^encoder\.block\.0\.layer\.0\.SelfAttention\.q": 5,
        r"layers?\.\d+\..*(query|v_proj)": 3,
    },
    "alpha_pattern": {"layers.1.mlp.up_proj": 5, ".*val[ue]+": 9, "v": 11, r"embed_tokens": 1},
}  # fmt: skip
OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "rslora": {"use_rslora": True},
    "patterns": PATTERNS,
    "bias": {"bias": "lora_only"},
    "bias all": {"bias": "all"},
}
VIEWS = on("q_proj", "v_proj", "query", "value", "projection", modules_to_save=["classifier"])
FAMILIES = {
    "gpt2": on("c_attn", "c_proj", "wte", fan_in_fan_out=True),
    "llama with biases": on("q_proj", "down_proj", "up_proj", "embed_tokens", "lm_head"),
    "classifier": on("query", "value", "word_embeddings", modules_to_save=["classifier"]),
    "t5": on("q", "v", "wo"),
    "vit": VIEWS,
}
# The list of peft 0.21.2, tests/test_custom_models.py, but for variants that only change how a
# model trains (VeLoRA) or what a file needs of the base (KaSA, MiCA, MonteCLoRA).
OF_PEFT = {
    "1": ("mlp", {"target_modules": "lin0"}),
    "2": ("mlp", on("lin0")),
    "3": ("mlp", on("lin1")),
    "4": ("mlp", on("lin0", "lin1")),
    "5": ("mlp", on("lin0", modules_to_save=["lin1"])),
    "6": ("mlp", on("lin0", lora_alpha=4, lora_dropout=0.1)),
    "7": ("mlp", on("lin0", **DORA)),
    "8": ("mlp", on("lin0", "lin1", **DORA)),
    "9": ("mlp", {"target_modules": "lin1", **DORA, "lora_alpha": 32}),
    "bias of B": ("mlp", on("lin0", "lin1", **BIAS)),
    "a parameter beside a module": ("mlp", on("lin0", target_parameters=["lin1.weight"])),
    "parameters": ("held", {"target_parameters": ["lin0.weight"]}),
    "a stack of one": ("stack of one", on("out", target_parameters=["up.weight"])),
    "1 ": ("table", on("conv1d")),
    "2 ": ("table", on("emb")),
    "3 ": ("table", on("emb", "conv1d")),
    "1 DoRA": ("table", on("conv1d", **DORA)),
    "2 DoRA": ("table", on("emb", **DORA)),
    "3 DoRA": ("table", on("emb", "conv1d", **DORA)),
    "tokens": ("table", on("conv1d", trainable_token_indices={"emb": [0, 10]})),
    "kernel ": ("conv1d", on("conv")),
    "kernel DoRA": ("conv1d", on("conv", **DORA)),
    **{
        f"{dim} {n} {name}": (dim, on("conv", *also, **option))
        for dim in ("conv2d", "conv3d")
        for n, also in enumerate(([], ["lin0"]))
        for name, option in (("", {}), ("DoRA", DORA))
    },
    "1x1": ("conv3d 1x1", on("conv")),
    "1x1 DoRA": ("conv3d 1x1", on("conv", **DORA)),
    "2d bias of B": ("conv2d", on("conv", **BIAS)),
    "3d bias of B": ("conv3d", on("conv", **BIAS)),
    "attention 1": ("mha", on("mha")),
    "attention 2": ("mha", on("mha", "lin0")),
}
STACKED = ("mixtral", "gpt-oss", "llama4", "aria")  # square ones
WITH_EXPERTS = {
    **{f"{name}, stacks": (name, on("q_proj", **STACKS)) for name in STACKED},
    **{
        f"{name}, the second": (name, {"target_parameters": ["experts.down_proj"]})
        for name in STACKED
    },
    "stacks in the other order": (
        "mixtral", {"target_parameters": STACKS["target_parameters"][::-1]},
    ),
    "qwen moe, stacks": ("qwen moe", on("q_proj", **STACKS)),
    "deepseek, stacks": ("deepseek", on("q_a_proj", "o_proj", **STACKS)),
    # PEFT turns them into `gate_up_proj` and `down_proj`, with no module before them.
    "names of before transformers 5": ("mixtral", on("q_proj", "w1", "w2", "w3")),
    "likewise": ("qwen moe", on("q_proj", "gate_proj", "up_proj", "down_proj")),
}  # fmt: skip
THEIRS: dict[str, tuple[str, dict[str, Any]]] = {
    **{
        f"{name}, {option}": (name, {**targets, **options})
        for name, targets in FAMILIES.items()
        for option, options in OPTIONS.items()
    },
    **{f"{which}: {case}": (which, options) for case, (which, options) in OF_PEFT.items()},
    **WITH_EXPERTS,
    "llama, head trained": ("llama", on("q_proj", modules_to_save=["lm_head", "norm"])),
    "a classifier's task": ("classifier", on("query", "dense", task_type="SEQ_CLS")),
    "llava": ("llava", on("q_proj", "v_proj", "linear_1", "lm_head")),
    "gemma3": ("gemma3", on("q_proj", "v_proj", "fc1")),
    "gemma3, tied embedding": ("gemma3", on("q_proj", "embed_tokens")),
    "gemma3, tied head": ("gemma3", on("q_proj", "lm_head")),
    "tied ends": ("tied llama", on("embed_tokens", "lm_head")),
    "tied ends of bert": ("bert", on("word_embeddings", "decoder")),
    "qwen2-vl": ("qwen2-vl", on("q_proj", "qkv", "fc1")),
    "phi3": ("phi3", on("qkv_proj", "gate_up_proj")),
    "dora": ("llama", on("q_proj", "down_proj", use_dora=True)),
    "dora, gpt2": ("gpt2", on("c_attn", "c_proj", fan_in_fan_out=True, use_dora=True)),
    "dora, rslora": ("llama", on("v_proj", use_dora=True, use_rslora=True)),
    "bias of B": ("llama with biases", on("q_proj", "v_proj", lora_bias=True)),
    "trainable tokens": ("llama", on("q_proj", trainable_token_indices=[3, 60, 7])),
}
NEAR = 2e-5


def marked(cases: Any, marks: Any = needs_peft_reads_experts) -> list[Any]:
    """Cases, of which those with experts or with the tie of Gemma 3 need newer libraries."""
    needy = {*WITH_EXPERTS, "gemma3, tied embedding", "gemma3, tied head"}
    needy |= {case for case in cases if case.startswith(("mixtral", *BESIDE_EXPERTS))}
    return [pytest.param(case, marks=marks if case in needy else ()) for case in cases]


# Whose `down_proj`, `up_proj` and the like PEFT on transformers 5 takes for experts.
BESIDE_EXPERTS = ("qwen moe, dense first", "deepseek", "glm4 moe", "ernie")


def moved(model: nn.Module, std: float) -> Any:
    """Give all that PEFT trains random values."""
    torch.manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_magnitude" in name:
                parameter.mul_(0.5 + torch.rand_like(parameter))
            elif "lora_" in name or (parameter.requires_grad and "original_module" not in name):
                parameter.normal_(0.0, std)
    return model.eval()


def of_peft(plain: nn.Module, folder: Path, options: dict[str, Any], std: float = 0.3) -> Any:
    """PEFT's model with an adapter, which is saved."""
    config = peft.LoraConfig(**{"r": 4, "lora_alpha": 6, **options})
    wrapped = moved(peft.get_peft_model(copy.deepcopy(plain), config), std)
    wrapped.save_pretrained(folder)
    return wrapped


def read_by_peft(plain: nn.Module, path: Path) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        warnings.filterwarnings("ignore", message="fan_in_fan_out is set to")
        warnings.filterwarnings("ignore", message="Model has `tie_word_embeddings=True`")
        return peft.PeftModel.from_pretrained(copy.deepcopy(plain), str(path))


def read_here(plain: nn.Module, path: Path, **options: Any) -> Any:
    return li.load_adapter(copy.deepcopy(plain), path, **options)


def merged_in_files(plain: Any, path: Path, folder: Path) -> Any:
    """The model of the files that a merge leaves, which are verified."""
    if isinstance(plain, transformers.PreTrainedModel):
        model = merged_on_disk(plain, path, folder)
    else:
        save_checkpoint(folder / "base", {k: v.clone() for k, v in plain.state_dict().items()})
        merge(folder / "base", [path], folder / "merged")
        model = copy.deepcopy(plain)
        model.load_state_dict(load_checkpoint(folder / "merged"))
    base = Checkpoint.open(folder / "base")
    assert_verified(base, [read_weighted(path, base)], folder / "merged")
    return model


@pytest.mark.parametrize("case", marked(THEIRS))
def test_an_adapter_of_peft_means_the_same_to_everybody(case: str, tmp_path: Path) -> None:
    which, options = THEIRS[case]
    row, path = MODELS[which], tmp_path / "theirs"
    plain = row.build()
    names = [name for name, _ in plain.named_parameters()]
    if options.keys() == {"target_parameters"} and not any(
        name.endswith(target) for name in names for target in options["target_parameters"]
    ):
        pytest.skip(f"this transformers has no such parameter in {which}")
    due = row.outputs(of_peft(plain, path, options))
    assert error(row.outputs(plain), due) > 1e-3
    model = read_here(plain, path)
    assert error(row.outputs(model), due) < NEAR
    ours = li.save_adapter(model, tmp_path / "ours")
    for prefer in ("metadata", "config"):
        assert error(row.outputs(read_here(plain, ours, prefer=prefer)), due) < NEAR
    theirs = read_by_peft(plain, ours)
    assert error(row.outputs(theirs), due) < NEAR
    if which == "mha":  # whose merge adds an update twice, as its forward does
        assert error(row.outputs(theirs.merge_and_unload()), due) < NEAR
    li.merge(model)
    li.eject(model)
    assert error(row.outputs(model), due) < NEAR
    if which != "stack of one":  # files without a class do not say that it is a stack
        assert error(row.outputs(merged_in_files(plain, path, tmp_path)), due) < NEAR


# B works in groups on what A has made of all channels: a map that the weight of a convolution in
# groups has no place for, so that PEFT does not merge it either. The norms of its DoRA are those of
# a product of other shapes, laid out anew (tuners/lora/dora.py).
@pytest.mark.parametrize("which", ["groups", "groups 2"])
@pytest.mark.parametrize("dora", [False, True])
def test_grouped_convolutions_of_peft_are_refused(which: str, dora: bool, tmp_path: Path) -> None:
    plain = OWN[which].build()
    of_peft(plain, tmp_path, on("conv", r=5, use_dora=dora))
    with pytest.raises(FormatError, match="grouped convolutions"):
        li.load_adapter(plain, tmp_path)


BITS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", on("q_proj", "v_proj", "gate_proj", "down_proj")),
    "llama, patterns": ("llama", on("q_proj", "o_proj", "up_proj", use_rslora=True, **PATTERNS)),
    "llama, all biases": ("llama with biases", on("q_proj", bias="all")),
    "llama, head trained": ("llama", on("q_proj", modules_to_save=["lm_head", "norm"])),
    "gpt2": ("gpt2", on("c_attn", "c_proj", "c_fc", fan_in_fan_out=True)),
    "classifier": ("classifier", on("query", "value", "dense", task_type="SEQ_CLS")),
    "vit": ("vit", VIEWS),
    "mixtral, stacks": ("mixtral", on("q_proj", **STACKS)),
    "qwen moe, stacks": ("qwen moe", on("q_proj", **STACKS)),
}


@pytest.mark.parametrize("case", marked(BITS))
def test_a_bfloat16_merge_of_files_equals_pefts(case: str, tmp_path: Path) -> None:
    """At most one ulp apart anywhere; fewer than one value in a thousand apart at all."""
    which, options = BITS[case]
    plain = MODELS[which].build().bfloat16()
    wrapped = of_peft(plain, tmp_path / "adapter", options, 0.05)
    merged_in_files(plain, tmp_path / "adapter", tmp_path)
    wrapped.merge_and_unload().save_pretrained(tmp_path / "theirs")
    before, ours, theirs = (load_checkpoint(tmp_path / n) for n in ("base", "merged", "theirs"))
    if transformers.__version__.startswith("5.0."):  # it saves a LayerNorm's as gamma and beta
        new = {"gamma": "weight", "beta": "bias"}
        theirs = {".".join(new.get(p, p) for p in n.split(".")): t for n, t in theirs.items()}
    assert ours.keys() == theirs.keys()
    off = total = changed = 0
    for name, t in theirs.items():
        assert ours[name].dtype == t.dtype, name
        if "experts" in name:  # PEFT rounds the delta before it adds it, here and only here
            apart = (ours[name].float() - t.float()).abs()
            unit = 2.0 ** (before[name].float().abs().maximum(t.float().abs()).log2().floor() - 7)
            assert float((apart / unit).max()) <= 1, name
        else:
            distance = ulps(ours[name], t)
            assert int(distance.max()) <= 1, name
            off, total = off + int((distance > 0).sum()), total + t.numel()
        changed += not torch.equal(t, before[name]) if name in before else 1
    assert off <= 1e-3 * total + 1, f"{off} of {total}"
    assert changed > 1


# ------------------------------------------------------------------------------ adapters of ours


def each_its_own(names: list[str], *scalings: str) -> dict[str, Any]:
    """Sites of different ranks and scales."""
    rules = [
        {"match": f"^{re.escape(name)}", "rank": 1 + n % 3, "alpha": 1 + n % 4,
         "scaling": scalings[n % len(scalings)]}
        for n, name in enumerate(names)
    ]  # fmt: skip
    return {"targets": rules}


HALVES = [f"{half}.block.0.layer.0.SelfAttention" for half in ("encoder", "decoder")]
SITES = {
    "gpt2": [*(f"transformer.h.{n}.attn.c_attn" for n in range(2)), "transformer.wte"],
    "llama": ["model.embed_tokens", *(f"model.layers.{n}.self_attn.q_proj" for n in range(2)),
              "lm_head"],
    "classifier": [f"bert.encoder.layer.{n}.attention.self.{m}" for n in range(2)
                   for m in ("query", "value")],
    "t5": [f"{half}.{m}" for half in HALVES for m in "qv"],
    "vit": ["vit.embeddings.patch_embeddings.projection"],
    "mixtral": [f"model.layers.{n}.{m}" for n in range(2)
                for m in ("self_attn.q_proj", "mlp.experts.gate_up_proj", "mlp.experts.down_proj")],
}  # fmt: skip
SCALINGS = {"standard": ["standard"], "rslora": ["rslora"], "both": ["standard", "rslora"]}
NAMES = [
    ["lin"],
    ["lin", "xlin", "blk.lin"],
    ["blk.lin", "lin"],
    ["blk.l+n", "blk.lin", "xlin"],
    ["lin", "blk.lin", "blk.l+n", "blk.lxin", "xlin"],
]
FUSED = {"match": "c_attn", "slices": {"q": 32, "k": 32, "v": 32}, "adapt": ["q", "v"]}
DENSE_LAYERS = r"(self_attn|mlp|shared_experts?)\.(?!gate_up)\w+_proj(_with_mqa)?"
NORM = r"0\.output\.LayerNorm\.weight"
OURS: dict[str, tuple[str, dict[str, Any]]] = {
    **{
        f"{which}, {name}": (which, each_its_own(sites, *scalings))
        for which, sites in SITES.items()
        for name, scalings in SCALINGS.items()
    },
    **{" ".join(names): ("suffixes", each_its_own(names, "standard")) for names in NAMES},
    **{name: (name, {"rank": 2, "alpha": 4, "targets": [DENSE_LAYERS]}) for name in BESIDE_EXPERTS},
    "slices": ("gpt2", {"rank": 2, "targets": [FUSED]}),
    "slices and a frozen start": ("gpt2", {"rank": 2, "init": "pissa", "targets": [FUSED]}),
    "likewise, rslora": (
        "gpt2", {"rank": 2, "init": "olora", "scaling": "rslora", "targets": [FUSED, "c_proj"]},
    ),
    "a whole module, a part of one, biases of a site and of none": (
        "classifier",
        {"rank": 2, "targets": [r"0\.attention\.self\.query"],
         "train": ["classifier", NORM, r"pooler\.dense\.bias", r"0\.attention\.self\.query\.bias"]},
    ),
    "no sites": ("classifier", {"train": [r"pooler\.dense\.bias"]}),
    "a parameter of attention": ("mha", {"rank": 2, "targets": [r"mha\.in_proj_weight"]}),
}  # fmt: skip


@pytest.mark.parametrize("case", marked(OURS))
def test_an_adapter_of_ours_means_the_same_to_peft(case: str, tmp_path: Path) -> None:
    which, config = OURS[case]
    row = MODELS[which]
    plain = row.build()
    model = fill(li.inject(copy.deepcopy(plain), config), std=0.3)
    due = row.outputs(model)
    assert error(row.outputs(plain), due) > 1e-3
    path = li.save_adapter(model, tmp_path / "a")
    assert error(row.outputs(read_by_peft(plain, path)), due) < NEAR
    for prefer in ("metadata", "config"):
        assert error(row.outputs(read_here(plain, path, prefer=prefer)), due) < NEAR


def test_what_peft_cannot_hold_of_attention_is_refused(tmp_path: Path) -> None:
    plain = OWN["mha"].build()
    model = li.inject(copy.deepcopy(plain), {"targets": [r"in_proj_weight", r"out_proj\.weight"]})
    with pytest.raises(FormatError, match="nothing would call it"):
        li.save_adapter(model, tmp_path / "a")
    path = li.save_adapter(model, tmp_path / "a.safetensors", format="native")
    assert list(read_adapter(path).sites) == list(li.adapter_state(model).sites)
    for change in ({"rank": 3}, {"alpha": 5.0}):
        rules = [{"match": r"mha\.in_proj_weight"}, {"match": "out_proj", **change}]
        other = li.inject(copy.deepcopy(plain), {"rank": 2, "targets": rules})
        with pytest.raises(FormatError, match=r"one rank and scale for the parts of 'mha'.*native"):
            li.save_adapter(other, tmp_path / "a")


# ------------------------------------------------------------------ what a file alone does not say


def edit(folder: Path, **fields: Any) -> Path:
    file = folder / "adapter_config.json"
    config = {**json.loads(file.read_text()), **fields}
    file.write_text(json.dumps({key: value for key, value in config.items() if value is not ...}))
    return folder


def test_peft_base_embeddings_are_recognized_as_copies(tmp_path: Path) -> None:
    model = ARCHITECTURES["llama"].build()
    half, other = (copy.deepcopy(model).to(torch.bfloat16) for _ in range(2))
    of_peft(model, tmp_path, on("embed_tokens"))
    state = read_adapter(tmp_path)
    assert not state.trained
    (copied,) = state.base_copies.items()
    assert copied[0] == "model.embed_tokens.weight"
    assert torch.equal(copied[1], model.get_input_embeddings().weight)
    with torch.no_grad():
        other.model.embed_tokens.weight[3] *= 1.01
    with pytest.raises(FormatError, match="a copy of this base tensor that is not the model's"):
        li.load_adapter(other, tmp_path)
    li.load_adapter(half, tmp_path)  # the copy in float32 is rounded as the base was
    li.swap_adapter(half, tmp_path, "default")


def test_adapter_of_a_subfolder(tmp_path: Path) -> None:
    wrapped = peft.get_peft_model(OWN["mlp"].build(), peft.LoraConfig(**on("lin0")))
    wrapped.add_adapter("sql", peft.LoraConfig(**on("lin1")))
    wrapped.save_pretrained(tmp_path)
    assert set(read_adapter(tmp_path / "sql").sites) == {"lin1"}


@needs_transformers_5
def test_stacks_are_refused_where_nothing_says_which_way_round_or_whose(tmp_path: Path) -> None:
    second = {"target_parameters": ["experts.down_proj"]}
    model = ARCHITECTURES["gpt-oss"].build()
    of_peft(model, tmp_path / "square", second)
    with pytest.raises(FormatError, match=r"does not say whether .* pass transposed_modules"):
        read_adapter(tmp_path / "square")
    turned = [f"model.layers.{n}.mlp.experts" for n in range(2)]
    sites = read_adapter(tmp_path / "square", transposed_modules=turned).sites
    assert all(site.spec.transposed for site in sites.values())
    # PEFT before 0.18 wrote no version, and took A and B the other way round.
    model = ARCHITECTURES["mixtral"].build()
    of_peft(model, tmp_path / "old", second)
    with pytest.raises(FormatError, match=r"matrices are square .* as 'peft_version'"):
        li.load_adapter(model, edit(tmp_path / "old", peft_version=...))
    of_peft(model, tmp_path / "renamed", on("w1", "w2", "w3"))
    with pytest.raises(FormatError, match=r"experts': .* not say which pair is whose.*--base"):
        read_adapter(tmp_path / "renamed")


UNSLOTH = {
    "auto_mapping": {"base_model_class": "LlamaForCausalLM", "unsloth_fixed": True},
    "base_model_name_or_path": "unsloth/llama-3.2-1b-unsloth-bnb-4bit",
    "target_modules": "(?:.*?(?:language|text).*?(?:self_attn|mlp).*?(?:q_proj|down_proj).*?)"
    "|(?:\\bmodel\\.layers\\.[\\d]{1,}\\.(?:self_attn|mlp)\\.(?:(?:q_proj|down_proj)))",
    "task_type": "CAUSAL_LM",
}


@pytest.mark.parametrize("trained", [None, ["embed_tokens", "lm_head"]], ids=str)
def test_folder_of_unsloth(trained: Any, tmp_path: Path) -> None:
    """PEFT's folder, with the config that unsloth writes: its own mark, a regex for the targets."""
    row, path = ARCHITECTURES["llama"], tmp_path / "adapter"
    plain = row.build()
    due = row.outputs(of_peft(plain, path, on("q_proj", "down_proj", modules_to_save=trained)))
    edit(path, **UNSLOTH)
    for model in (read_here(plain, path), merged_in_files(plain, path, tmp_path)):
        assert error(row.outputs(model), due) < NEAR


@needs_transformers_5
def test_experts_of_unsloth_go_by_expert_first_when_told(run: Any, tmp_path: Path) -> None:
    """The columns of its B are ordered otherwise than PEFT's, and no shape tells."""
    plain, path = ARCHITECTURES["qwen moe"].build(), tmp_path / "adapter"
    of_peft(plain, path, on("q_proj", **STACKS))
    wanted = merged_in_files(plain, path, tmp_path).state_dict()
    file = path / "adapter_model.safetensors"
    tensors, experts = load_file(file), plain.config.num_experts
    for name, B in tensors.items():
        if "experts" in name and name.endswith("lora_B.weight"):
            tensors[name] = B.view(len(B), -1, experts).transpose(1, 2).reshape(B.shape)
    save_file(tensors, file)
    words = ("merge", tmp_path / "base", path, "--expert-major", "-o", tmp_path / "cli")
    assert run(*words).code == 0
    merged_state = type(plain).from_pretrained(tmp_path / "cli").state_dict()
    for name, tensor in wanted.items():
        torch.testing.assert_close(merged_state[name], tensor)


# -------------------------------------------------------------------------------------- refusals

_RESIDUAL = r"init_lora_weights.*path_initial_model_for_weight_conversion.*allow="
REFUSED = {
    "pissa": ("llama", on("q_proj", init_lora_weights="pissa"), {}, _RESIDUAL),
    "olora": ("llama", on("q_proj", init_lora_weights="olora"), {}, _RESIDUAL),
    "alora": (
        "llama", on("q_proj", alora_invocation_tokens=[1], task_type="CAUSAL_LM"), {}, "aLoRA",
    ),
    "replication": ("llama", on("q_proj", layer_replication=[[0, 2], [1, 2]]), {}, "replicated"),
    "attention of a later PEFT": ("mha", on("mha"), {"peft_version": "0.22.0"}, "twice"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_what_peft_writes_and_no_file_can_mean_here_is_refused(case: str, tmp_path: Path) -> None:
    which, options, edited, words = REFUSED[case]
    model = peft.get_peft_model(MODELS[which].build(), peft.LoraConfig(**options))
    model.save_pretrained(tmp_path)
    with pytest.raises(FormatError, match=words):
        read_adapter(edit(tmp_path, **edited))


def test_the_call_that_messages_advise_exists() -> None:
    assert callable(peft.convert_to_lora)
