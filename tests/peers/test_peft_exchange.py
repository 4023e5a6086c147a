"""Exchange with PEFT itself, both ways: a file means what PEFT computes from it.

Two tables: adapters of PEFT, which are read, written back and merged; and ours, which PEFT reads.
"""

import copy
import itertools
import re
import time
import warnings
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import error, fill
from helpers.architectures import ARCHITECTURES, Architecture
from helpers.merging import load_checkpoint, merge, merged_model, save_checkpoint
from helpers.refusals import refused
from helpers.states import as_of_peft, edit_config
from helpers.versions import needs_peft_reads_experts, needs_transformers_5
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

import lora_inject as li

transformers = pytest.importorskip("transformers")
peft = pytest.importorskip("peft")

# PEFT warns of much that is none of this package's business.
pytestmark = pytest.mark.filterwarnings("ignore")

# ------------------------------------------------------------------------------- models of our own


def chain(**layers: nn.Module) -> nn.Module:
    return nn.Sequential(OrderedDict(layers))


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


def wave(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(2))


def own(*inputs: Tensor, **layers: Callable[[], nn.Module]) -> Architecture:
    return Architecture(lambda: chain(**{name: make() for name, make in layers.items()}), inputs)


def convolution(layer: Callable[[], nn.Module], width: int, *shape: int) -> Architecture:
    """A convolution and a linear layer behind it."""
    tail = {"relu": nn.ReLU, "flat": nn.Flatten, "lin0": lambda: nn.Linear(width, 2)}
    return own(wave(*shape), conv=layer, **tail)


def block() -> nn.Module:
    return chain(**{name: nn.Linear(4, 4) for name in ("lin", "l+n", "lxin")})


OWN = {
    "mlp": own(
        wave(3, 10), lin0=lambda: nn.Linear(10, 20), relu=nn.ReLU, lin1=lambda: nn.Linear(20, 2)
    ),
    "table": own(
        torch.arange(10).view(5, 2), emb=lambda: nn.Embedding(20, 5),
        conv1d=lambda: Conv1D(1, 5), relu=nn.ReLU, flat=nn.Flatten, lin0=lambda: nn.Linear(2, 2),
    ),
    "conv1d": convolution(lambda: nn.Conv1d(1, 1, 2), 9, 2, 1, 10),
    "conv2d": convolution(lambda: nn.Conv2d(5, 10, 3), 640, 2, 5, 10, 10),
    "conv3d": convolution(lambda: nn.Conv3d(5, 10, 3), 640, 2, 5, 6, 6, 6),
    "mha": Architecture(Mha, (wave(3, 2, 10),)),
    "held": own(wave(3, 10), lin0=lambda: Held(10, 20), lin1=lambda: Held(20, 2)),
    "stack of one": own(wave(2, 4), up=lambda: Held(1, 6, 4), out=lambda: nn.Linear(6, 3)),
    # Names that are ends of each other, and names that are regular expressions.
    "suffixes": own(
        wave(3, 4), lin=lambda: nn.Linear(4, 4), tanh=nn.Tanh, blk=block,
        xlin=lambda: nn.Linear(4, 4),
    ),
}  # fmt: skip
MODELS = ARCHITECTURES | OWN

# ---------------------------------------------------------------------------- adapters of PEFT


def on(*targets: str, **options: Any) -> dict[str, Any]:
    """The options of a LoraConfig."""
    return {"target_modules": [*targets], **options}


DORA, BIAS = {"use_dora": True}, {"lora_bias": True, "lora_alpha": 32}
STACKS = {"target_parameters": ["experts.gate_up_proj", "experts.down_proj"]}
TURNED = {"target_parameters": ["experts.down_proj", "experts.gate_up_proj"]}
SECOND = {"target_parameters": ["experts.down_proj"]}
PATTERNS: dict[str, Any] = {
    "rank_pattern": {
        "q_proj": 3, "c_attn": 5, r"^encoder\.block\.0\.layer\.0\.SelfAttention\.q": 5,
        r"layers?\.\d+\..*(query|v_proj)": 3,
    },
    "alpha_pattern": {"layers.1.mlp.up_proj": 5, ".*val[ue]+": 9, "v": 11, r"embed_tokens": 1},
}  # fmt: skip
OPTIONS: dict[str, dict[str, Any]] = {
    "rslora": {"use_rslora": True},
    "bias": {"bias": "lora_only"},
    "bias all": {"bias": "all"},
}
FAMILIES: dict[str, dict[str, Any]] = {
    "gpt2": on("c_attn", "c_proj", "wte", fan_in_fan_out=True),
    "llama with biases": on("q_proj", "down_proj", "up_proj", "embed_tokens", "lm_head"),
    "classifier": on("query", "value", "word_embeddings", modules_to_save=["classifier"]),
    "t5": on("q", "v", "wo"),
    "vit": on("q_proj", "v_proj", "query", "value", "projection", modules_to_save=["classifier"]),
}
STACKED = ("mixtral", "gpt-oss", "llama4", "aria")  # square ones
WITH_EXPERTS = {
    **{f"{name}, stacks": (name, on("q_proj", **STACKS)) for name in STACKED},
    **{f"{name}, the second": (name, SECOND) for name in STACKED},
    "stacks in the other order": ("mixtral", TURNED),
    "qwen moe, stacks": ("qwen moe", on("q_proj", **STACKS)),
    "deepseek, stacks": ("deepseek", on("q_a_proj", "o_proj", **STACKS)),
    # PEFT turns them into `gate_up_proj` and `down_proj`, with no module before them.
    "names of before transformers 5": ("mixtral", on("q_proj", "w1", "w2", "w3")),
    "likewise": ("qwen moe", on("q_proj", "gate_proj", "up_proj", "down_proj")),
}
THEIRS: dict[str, tuple[str, dict[str, Any]]] = {
    **{name: (name, targets) for name, targets in FAMILIES.items()},
    **{f"{name}, patterns": (name, {**of, **PATTERNS}) for name, of in FAMILIES.items()},
    **{
        f"{name}, {option}": (name, {**FAMILIES[name], **options})
        for name in ("gpt2", "classifier")
        for option, options in OPTIONS.items()
    },
    # As in peft's own tests/test_custom_models.py.
    "a module saved": ("mlp", on("lin0", modules_to_save=["lin1"])),
    "a regex": ("mlp", {"target_modules": "lin1", **DORA, "lora_alpha": 32}),
    "a parameter beside a module": ("mlp", on("lin0", target_parameters=["lin1.weight"])),
    "parameters": ("held", {"target_parameters": ["lin0.weight"]}),
    "a stack of one": ("stack of one", on("out", target_parameters=["up.weight"])),
    "a table, DoRA": ("table", on("emb", "conv1d", **DORA)),
    "attention": ("mha", on("mha", "lin0")),
    "attention of its own rank": ("mha", on("mha", "lin0", rank_pattern={"mha": 3}, lora_alpha=5)),
    "rows": ("table", on("conv1d", trainable_token_indices={"emb": [0, 10]})),
    **{
        f"{which}, {name}": (which, on("conv", "lin0", **option))
        for which in ("conv1d", "conv2d", "conv3d")
        for name, option in (("plain", {}), ("DoRA", DORA))
    },
    "conv2d, bias of B": ("conv2d", on("conv", **BIAS)),
    **WITH_EXPERTS,
    "llama, head trained": ("llama", on("q_proj", modules_to_save=["lm_head", "norm"])),
    "a classifier's task": ("classifier", on("query", "dense", task_type="SEQ_CLS")),
    "gemma3, tied embedding": ("gemma3", on("q_proj", "embed_tokens")),
    "gemma3, tied head": ("gemma3", on("q_proj", "lm_head")),
    "tied ends": ("tied llama", on("embed_tokens", "lm_head")),
    "a tied embedding that PEFT ties": (
        "tied llama",
        on("q_proj", "embed_tokens", ensure_weight_tying=True),
    ),
    "a tied head that PEFT ties": (
        "tied llama",
        on("q_proj", "lm_head", ensure_weight_tying=True),
    ),
    "layers that PEFT chose": ("llama", on("q_proj", layers_to_transform=[1])),
    "tied ends of bert": ("bert", on("word_embeddings", "decoder")),
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
BESIDE_EXPERTS = ("qwen moe, dense first", "deepseek")


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
        return merged_model(plain, path, folder)
    save_checkpoint(folder / "base", {k: v.clone() for k, v in plain.state_dict().items()})
    merge(folder / "base", [path], folder / "merged")
    model = copy.deepcopy(plain)
    model.load_state_dict(load_checkpoint(folder / "merged"))
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
    assert error(row.outputs(read_here(plain, ours)), due) < NEAR
    assert error(row.outputs(read_by_peft(plain, ours)), due) < NEAR
    assert error(row.outputs(read_here(plain, as_of_peft(ours))), due) < NEAR
    li.merge(model)
    li.eject(model)
    assert error(row.outputs(model), due) < NEAR
    if which != "stack of one":  # files without a class do not say that it is a stack
        assert error(row.outputs(merged_in_files(plain, path, tmp_path)), due) < NEAR


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
NAMES = [["blk.lin", "lin"], ["blk.l+n", "blk.lin", "xlin"]]
NAMES += [["lin", "blk.lin", "blk.l+n", "blk.lxin", "xlin"]]
FUSED = {"match": "c_attn", "slices": {"q": 32, "k": 32, "v": 32}, "adapt": ["q", "v"]}
DENSE_LAYERS = r"(self_attn|mlp|shared_experts?)\.(?!gate_up)\w+_proj(_with_mqa)?"
NORM = r"0\.output\.LayerNorm\.weight"
OURS: dict[str, tuple[str, dict[str, Any]]] = {
    **{which: (which, each_its_own(of, "standard", "rslora")) for which, of in SITES.items()},
    "gpt2, standard": ("gpt2", each_its_own(SITES["gpt2"], "standard")),
    "gpt2, rslora": ("gpt2", each_its_own(SITES["gpt2"], "rslora")),
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
    "attention": ("mha", {"rank": 2, "targets": ["mha", "lin0"]}),
    "attention from pissa": ("mha", {"rank": 2, "init": "pissa", "targets": ["mha"]}),
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
    for folder in (path, as_of_peft(path)):
        assert error(row.outputs(read_here(plain, folder)), due) < NEAR


def test_what_peft_cannot_hold_of_attention_or_may_hold_otherwise_is_refused(
    tmp_path: Path,
) -> None:
    """PEFT adapts both projections, with one rank and scale, and the output's update twice."""
    others = [{"match": "out_proj", "alpha": 5.0}, r"out_proj\.weight"]
    for targets in (["out_proj"], *(["in_proj_weight", other] for other in others)):
        model = li.inject(OWN["mha"].build(), {"rank": 2, "targets": targets})
        with refused(li.FormatError, "'mha.out_proj", "same rank and scale", "native"):
            li.save_adapter(model, tmp_path / "a")
    model = li.inject(OWN["mha"].build(), {"rank": 2, "targets": ["out_proj"]})
    with refused(li.FormatError, "'mha.out_proj'", "native"):  # it uses PEFT's layers
        li.save_adapter(model, tmp_path / "a", format="diffusers", component="unet")
    of_peft(OWN["mha"].build(), tmp_path / "theirs", on("mha"))
    with refused(li.FormatError, "'mha'", "0.21.2"):
        li.read_adapter(edit_config(tmp_path / "theirs", peft_version="0.22.0"))


@pytest.mark.filterwarnings("ignore")
def test_a_grouped_convolution_of_peft_is_refused(tmp_path: Path) -> None:
    """PEFT's A reads the inputs of all groups: no weight of the layer's shape computes that."""
    net = chain(conv=nn.Conv2d(4, 8, 3, groups=2))
    of_peft(net, tmp_path / "a", on("conv"))
    save_checkpoint(tmp_path / "base", net.state_dict())
    for read in (
        lambda: li.load_adapter(net, tmp_path / "a"),
        lambda: merge(tmp_path / "base", [tmp_path / "a"], tmp_path / "out"),
    ):
        with refused(li.FormatError, "'conv", "grouped"):
            read()


# ------------------------------------------------------------------ what a file alone does not say


def test_peft_base_embeddings_are_recognized_as_copies(tmp_path: Path) -> None:
    model = ARCHITECTURES["llama"].build()
    half, other = (copy.deepcopy(model).to(torch.bfloat16) for _ in range(2))
    of_peft(model, tmp_path, on("embed_tokens"))
    state = li.read_adapter(tmp_path)
    assert not state.trained
    ((name, held),) = state.base_copies.items()
    assert name == "model.embed_tokens.weight"
    assert torch.equal(held, model.get_input_embeddings().weight)
    with torch.no_grad():
        other.model.embed_tokens.weight[3] *= 1.01
    with refused(li.FormatError, "'model.embed_tokens.weight'", model=other):
        li.load_adapter(other, tmp_path)
    li.load_adapter(half, tmp_path)  # the copy in float32 is rounded as the base was
    li.swap_adapter(half, tmp_path, "default")


@needs_transformers_5
def test_stacks_are_refused_where_nothing_says_which_way_round_or_whose(tmp_path: Path) -> None:
    of_peft(ARCHITECTURES["gpt-oss"].build(), tmp_path / "square", SECOND)
    with refused(li.FormatError, "transposed_modules"):
        li.read_adapter(tmp_path / "square")
    turned = [f"model.layers.{n}.mlp.experts" for n in range(2)]
    sites = li.read_adapter(tmp_path / "square", transposed_modules=turned).sites
    assert all(site.spec.transposed for site in sites.values())
    # PEFT before 0.18 wrote no version, and took A and B the other way round.
    model = ARCHITECTURES["mixtral"].build()
    of_peft(model, tmp_path / "old", SECOND)
    with refused(li.FormatError, "square", "'peft_version'", model=model):
        li.load_adapter(model, edit_config(tmp_path / "old", peft_version=...))
    of_peft(model, tmp_path / "renamed", on("w1", "w2", "w3"))
    with refused(li.FormatError, "experts'", "--base"):
        li.read_adapter(tmp_path / "renamed")


@pytest.mark.parametrize("fields", [
    {"layers_to_transform": [0]}, {"layers_to_transform": 1},
    {"layers_to_transform": [1], "layers_pattern": "layers"},
    {"layers_to_transform": [0, 1], "layers_pattern": ["blocks"]},
])  # fmt: skip
def test_layers_that_an_edited_config_leaves_out_are_told(fields: Any, tmp_path: Path) -> None:
    plain = ARCHITECTURES["llama"].build()
    of_peft(plain, tmp_path, on("q_proj"))
    edit_config(tmp_path, **fields)
    with refused(li.FormatError, "q_proj", "'layers_to_transform'", "target_modules", model=plain):
        li.load_adapter(plain, tmp_path)


def test_other_threads_do_not_use_up_the_time_of_a_pattern(tmp_path, monkeypatch) -> None:
    """The processor's time of the process runs on while others compute."""
    plain = ARCHITECTURES["llama"].build()
    of_peft(plain, tmp_path, on("q_proj", rank_pattern={r"layers\.\d\..*q_proj": 4}))
    ahead = itertools.count(time.process_time(), 100)
    monkeypatch.setattr(time, "process_time", lambda: next(ahead))
    read_here(plain, tmp_path)


def test_rows_of_both_ends_of_a_tie_are_not_written_so_that_peft_uses_one_for_both(
    tmp_path: Path,
) -> None:
    row = ARCHITECTURES["bert"]
    plain = row.build()
    nn.init.zeros_(plain.cls.predictions.bias)  # which PEFT 0.21 leaves out where it trains rows
    rows = {"word_embeddings": [3], "decoder": [3]}
    of_peft(plain, tmp_path / "theirs", on("query", trainable_token_indices=rows))
    due = row.outputs(peft.PeftModel.from_pretrained(copy.deepcopy(plain), tmp_path / "theirs"))
    model = read_here(plain, tmp_path / "theirs")
    assert error(row.outputs(model), due) < NEAR
    with refused(li.FormatError, "word_embeddings", "decoder", "native", model=model):
        li.save_adapter(model, tmp_path / "ours")
    path = li.save_adapter(model, tmp_path / "ours", format="native")
    assert error(row.outputs(read_here(plain, path)), due) < NEAR


@pytest.mark.parametrize("end", ["word_embeddings", "decoder"])
def test_rows_of_a_head_with_a_bias_which_peft_leaves_out_are_not_written(end, tmp_path) -> None:
    """PEFT 0.21, tuners/trainable_tokens/layer.py: `F.linear(input=x, weight=W)`."""
    model = ARCHITECTURES["bert"].build()
    li.inject(model, {"rank": 2, "targets": ["query"], "tokens": {end: [3]}})
    with refused(li.FormatError, "decoder", "bias", "native", model=model):
        li.save_adapter(model, tmp_path / "ours")


# ------------------------------------------------------------- unsloth's order of the columns of B


@pytest.fixture
def both(tmp_path: Path) -> tuple[Any, dict[str, Path], Tensor]:
    """A model, one adapter of its stacks in either order of the columns of B, and its outputs."""
    row, file = ARCHITECTURES["qwen moe"], "adapter_model.safetensors"
    plain, paths = row.build(), {way: tmp_path / way for way in ("rank_major", "grouped_by_expert")}
    for way, path in paths.items():
        due = row.outputs(of_peft(plain, path, on("q_proj", **STACKS)))
        tensors, n = load_file(path / file), plain.config.num_experts
        for name, B in tensors.items():
            if way == "grouped_by_expert" and "experts" in name and "lora_B" in name:
                tensors[name] = B.view(len(B), -1, n).transpose(1, 2).reshape(B.shape)
        save_file(tensors, path / file)
    plain.save_pretrained(tmp_path / "base")
    return plain, paths, due


@needs_transformers_5
def test_the_layout_of_b_that_unsloth_states_is_the_one_that_is_read(both, run, tmp_path) -> None:
    (plain, paths, due), outputs = both, ARCHITECTURES["qwen moe"].outputs
    for layout, path in paths.items():
        edit_config(path, lora_B_layout=layout, auto_mapping={"unsloth_fixed": True})
        assert error(outputs(read_here(plain, path)), due) < NEAR
        out = tmp_path / f"out {layout}"
        assert run("merge", tmp_path / "base", path, "--output", out).code == 0
        assert error(outputs(type(plain).from_pretrained(out)), due) < NEAR
    edit_config(path, lora_B_layout="by_column")
    with refused(li.FormatError, "lora_B_layout", "rank_major", "grouped_by_expert"):
        li.read_adapter(path)


@needs_transformers_5
@pytest.mark.parametrize("sign", [
    {"auto_mapping": {"unsloth_fixed": True}}, {"base_model_name_or_path": "unsloth/Qwen3"},
])  # fmt: skip
def test_a_file_of_unsloth_that_does_not_state_it_asks(both: Any, sign: Any) -> None:
    plain, paths, _ = both
    for path in paths.values():
        edit_config(path, **sign)
        with refused(li.FormatError, "unsloth", "'lora_B_layout'", "by_expert'", model=plain):
            li.load_adapter(plain, path)


@needs_transformers_5
@pytest.mark.parametrize("client", ["peft", "vllm"])
def test_a_program_that_would_read_columns_by_expert_by_rank_is_told(both, client, tmp_path):
    plain, paths, due = both
    for layout, path in paths.items():
        edit_config(path, lora_B_layout=layout)
        stops = [found.problem for found in li.check_adapter(path, client) if found.stops]
        assert any("lora_B_layout" in said for said in stops) == (layout == "grouped_by_expert")
    there = li.convert(path, tmp_path / "there", "peft", base=tmp_path / "base")
    assert error(ARCHITECTURES["qwen moe"].outputs(read_by_peft(plain, there)), due) < NEAR
