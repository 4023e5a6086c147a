"""Folders of checkpoints: which files belong to one, and the difference of two as an adapter."""

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from conftest import error
from helpers.experts import experts
from helpers.merging import (
    LLAMA,
    adapter_of,
    dense,
    hold_merged,
    llama_tensors,
    load_checkpoint,
    merge,
    save_checkpoint,
)
from helpers.models import tiny
from helpers.refusals import refused
from helpers.states import SITES, Site, effect, state_of
from helpers.versions import needs_transformers_5
from torch import Tensor

import lora_inject as li
from contract.kinds import conv1d

TENSORS = llama_tensors()
STATE = adapter_of(TENSORS)


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    return save_checkpoint(tmp_path / "base", TENSORS, 2, LLAMA)


def edit_index(folder: Path, edit: Callable[[dict[str, Any]], object]) -> None:
    path = folder / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    edit(index["weight_map"])
    path.write_text(json.dumps(index))


HEAD = "lm_head.weight"
OUTSIDE = ["../x.safetensors", "/etc/x.safetensors", "a/b.safetensors", "..\\x.safetensors"]
WRONG_NAMES = [*OUTSIDE, "x.bin", "", "x.safetensors\n", 7, None]
INDEXES: dict[str, tuple[Callable[[dict[str, Any]], object], list[str]]] = {
    **{
        f"names {name!r}": (lambda table, name=name: table.update({HEAD: name}), ["plain name"])
        for name in WRONG_NAMES
    },
    "a tensor less": (lambda table: table.pop(HEAD), [f"'{HEAD}'"]),
    "a tensor more": (lambda table: table.update(more=table[HEAD]), ["'more'"]),
}


@pytest.mark.parametrize("case", INDEXES)
def test_an_index_names_files_of_its_folder_and_agrees_with_them(case, sharded, tmp_path) -> None:
    edit, named = INDEXES[case]
    edit_index(sharded, edit)
    with refused(li.CheckpointError, *named):
        merge(sharded, [STATE], tmp_path / "out")


@pytest.mark.parametrize("one", ["sql", STATE], ids=["a path", "a value"])
def test_adapters_are_given_in_a_list(one: Any, sharded: Path, tmp_path: Path) -> None:
    with refused(li.CheckpointError, "adapters", "list"):
        li.merge_checkpoint(sharded, one, tmp_path / "out")


def test_which_files_are_the_checkpoint(sharded: Path, tmp_path: Path) -> None:
    save_checkpoint(sharded, {"other": torch.zeros(2)}, 1, stem="consolidated")
    merge(sharded, [STATE], tmp_path / "out")
    hold_merged(tmp_path / "out", TENSORS, STATE)

    def refused_by(*named: str, folder: Path = sharded) -> None:
        with refused(li.CheckpointError, *named):
            merge(folder, [STATE], tmp_path / "no")

    save_checkpoint(sharded, TENSORS, 1)
    refused_by("both")
    (sharded / "model-00002-of-00002.safetensors").unlink()
    (sharded / "model.safetensors").unlink()
    refused_by("model-00002-of-00002")
    cache = tmp_path / "models--a--b"
    cache.mkdir()
    (cache / "pytorch_model.bin").write_bytes(b"x")
    refused_by("save_pretrained", folder=cache)
    (cache / "snapshots" / "abc").mkdir(parents=True)
    refused_by("'snapshots/abc'", folder=cache)


@pytest.mark.parametrize("variant", ["model.fp16", "model.00"])
def test_a_variant_is_not_taken_for_the_checkpoint(variant: str, tmp_path: Path) -> None:
    """Folders of diffusers' pipelines hold both; loaders read `model` unless told otherwise."""
    base = save_checkpoint(tmp_path / "base", TENSORS)
    save_checkpoint(base, {"other.weight": torch.ones(2, 2)}, stem=variant)
    merge(base, [STATE], tmp_path / "out")
    hold_merged(tmp_path / "out", TENSORS, STATE)
    (base / "model.safetensors").rename(base / "model.fp32.safetensors")
    with refused(li.CheckpointError, "several", f"{variant}.safetensors"):
        merge(base, [STATE], tmp_path / "no")


def test_a_part_of_several_without_an_index_is_no_checkpoint(sharded: Path, tmp_path: Path) -> None:
    """As a broken download leaves it."""
    (sharded / "model.safetensors.index.json").unlink()
    (sharded / "model-00002-of-00002.safetensors").unlink()
    with refused(li.CheckpointError, "'model-00001-of-00002.safetensors'", "1 of 2"):
        merge(sharded, [STATE], tmp_path / "no")


def test_links_are_followed_inside_the_folder_and_the_cache_of_the_hub_only(tmp_path) -> None:
    cache = tmp_path / "models--a--b"
    snapshot, outside = cache / "snapshots" / "0123", tmp_path / "outside"
    save_checkpoint(cache / "blobs", TENSORS, 1, LLAMA)
    for folder in (snapshot, outside):
        folder.mkdir(parents=True)
        for name in ("model.safetensors", "config.json"):
            (folder / name).symlink_to(cache / "blobs" / name)
    merge(snapshot, [STATE], tmp_path / "out")
    hold_merged(tmp_path / "out", TENSORS, STATE)
    with refused(li.CheckpointError, "outside the folder"):
        merge(outside, [STATE], tmp_path / "no")
    (cache / "blobs" / "config.json").unlink()  # which says the class, and with it the ties
    with refused(li.CheckpointError, "'config.json'"):
        merge(snapshot, [STATE], tmp_path / "no")


def test_side_files_that_belong_come_along(sharded: Path, tmp_path: Path) -> None:
    belong = {"generation_config.json", "tokenizer.json", "tokenizer.model", "chat_template.jinja"}
    belong |= {"special_tokens_map.json", "merges.txt", "LICENSE", "1_Pooling/config.json"}
    others = ["pytorch_model.bin", "optimizer.pt", "model.gguf", ".git/HEAD", ".secret.json"]
    others += ["adapter_config.json", "adapter_model.safetensors", "trainer_state.json"]
    others += ["pytorch_model.bin.index.json", "flax_model.msgpack", "modeling_x.py"]
    others += ["tokenizer.model.v3", "vocab.pkl", "a/b/c/d.json"]  # as Mistral ships the first
    for name in [*belong, *others]:
        (sharded / name).parent.mkdir(exist_ok=True, parents=True)
        (sharded / name).write_text("{}")
    report = merge(sharded, [STATE], tmp_path / "out")
    out = {p.relative_to(tmp_path / "out").as_posix() for p in (tmp_path / "out").rglob("*.*")}
    assert belong - {"LICENSE"} <= out
    assert (tmp_path / "out" / "LICENSE").exists()
    assert not out & {*others}
    (left,) = (note for note in report.notes if "left out" in note)
    named = ["tokenizer.model.v3", "vocab.pkl", "a/b/c/", "trainer_state.json", "optimizer.pt"]
    assert all(f"'{name}'" in left for name in named), left
    assert not any(name in left for name in (".git", ".secret", "modeling_x.py")), left


def test_of_a_folder_that_one_file_is_of_nothing_comes_along(tmp_path: Path) -> None:
    """Its other files are about other things; nobody asked to publish them."""
    base = save_checkpoint(tmp_path / "base", TENSORS, stem="x")
    for name in ("secrets.json", "notes.txt"):
        (base / name).write_text("{}")
    merge(base / "x.safetensors", [STATE], tmp_path / "alone")
    assert [path.name for path in (tmp_path / "alone").iterdir()] == ["x.safetensors"]
    (base / "config.json").write_text(json.dumps(LLAMA))
    merge(base / "x.safetensors", [STATE], tmp_path / "with its config")
    assert (tmp_path / "with its config" / "config.json").exists()
    save_checkpoint(base, {"y": torch.zeros(2)}, stem="y")  # which the config may be of
    merge(base / "x.safetensors", [STATE], tmp_path / "of several")
    assert [path.name for path in (tmp_path / "of several").iterdir()] == ["x.safetensors"]


@pytest.mark.parametrize("stem", ["model", "diffusion_pytorch_model", "x"])
def test_a_merge_is_replaced_by_another_whatever_its_files_are_called(
    stem: str, tmp_path: Path
) -> None:
    base = save_checkpoint(tmp_path / "base", TENSORS, stem=stem, config=LLAMA)
    (base / "1_Pooling").mkdir()
    (base / "1_Pooling" / "config.json").write_text("{}")
    for weight in (0.5, 1.0):
        adapter = li.combine([STATE], [weight])
        li.merge_checkpoint(base, [adapter], tmp_path / "out", overwrite=True)
        hold_merged(tmp_path / "out", TENSORS, (STATE, weight))
    for name in ("optimizer.pt", "1_Pooling/adapter_model.safetensors", ".git/"):
        place = tmp_path / "out" / name
        place.mkdir() if name.endswith("/") else place.write_text("weeks of work")
        with refused(li.CheckpointError, f"'{name}'"):
            li.merge_checkpoint(base, [STATE], tmp_path / "out", overwrite=True)
        place.rmdir() if name.endswith("/") else place.unlink()


# The reverse of merging ---------------------------------------------------------------------------


def pair_of(folder: Path, tensors: dict[str, Tensor], state: li.AdapterState, **config: Any) -> Any:
    """A base, and what it is with an adapter in it."""
    tuned = dense(tensors, (state, 1.0), turned=("h.0.attn.c_proj",))
    said = {**LLAMA, "vocab_size": 32, **config}
    return save_checkpoint(folder / "base", tensors, 2, said), save_checkpoint(
        folder / "tuned", tuned, 3, said
    )


def extracted(tmp_path: Path, base: Path, tuned: Path, **measure: Any) -> Any:
    file = tmp_path / "adapter.safetensors"
    report = li.extract_adapter(base, tuned, file, format="native", overwrite=True, **measure)
    return li.read_adapter(file), report


def test_a_difference_of_rank_r_comes_back_whole(tmp_path: Path) -> None:
    tensors = llama_tensors(dtype=torch.float32)
    state = adapter_of(tensors, rank=3)
    base, tuned = pair_of(tmp_path, tensors, state)
    back, report = extracted(tmp_path, base, tuned, rank=3)
    assert {*back.sites} == {*state.sites}
    assert all(t.energy == pytest.approx(1.0, abs=1e-6) for t in report.tensors)
    assert report.n_equal == len(tensors) - len(state.sites)
    assert json.loads(json.dumps(report.to_dict()))["left"] == []
    merge(base, [tmp_path / "adapter.safetensors"], tmp_path / "out")
    again = load_checkpoint(tmp_path / "out")
    for name, tensor in load_checkpoint(tuned).items():
        assert torch.allclose(again[name], tensor, atol=1e-5), name


@pytest.mark.parametrize("measure", [{"rank": 1}, {"energy": 0.9}, {"energy": 0.9999}], ids=str)
def test_the_energy_that_is_held_is_what_the_report_says(tmp_path: Path, measure: Any) -> None:
    tensors = llama_tensors(dtype=torch.float32)
    state = adapter_of(tensors, rank=3)
    back, report = extracted(tmp_path, *pair_of(tmp_path, tensors, state), **measure)
    for told in report.tensors:
        name = told.name.removesuffix(".weight")
        whole, cut = effect(state.sites[name]), effect(back.sites[name])
        lost = (whole - cut).square().sum() / whole.square().sum()
        assert 1 - told.energy == pytest.approx(float(lost), abs=1e-5)
        squares = torch.linalg.svdvals(whole).square()
        held = squares.cumsum(0) / squares.sum()
        wanted = measure.get("energy")
        assert told.rank == (int((held < wanted - 1e-6).sum()) + 1 if wanted else 1)


@pytest.mark.parametrize("shape", [(300, 200), (200, 300)])
def test_a_difference_of_full_rank_is_cut_near_the_best(tmp_path: Path, shape: Any) -> None:
    torch.manual_seed(0)
    U, S, Vh = torch.linalg.svd(torch.randn(*shape), full_matrices=False)
    difference = U @ torch.diag(0.9 ** torch.arange(len(S)) * S[0]) @ Vh
    base = save_checkpoint(tmp_path / "base", {"q.weight": torch.zeros(shape)})
    tuned = save_checkpoint(tmp_path / "tuned", {"q.weight": difference})
    squares = torch.linalg.svdvals(difference.double()).square()
    back, report = extracted(tmp_path, base, tuned, rank=20)
    best = float(squares[20:].sum())
    lost = (difference.double() - effect(back.sites["q"])).square().sum()
    assert float(lost) <= 1.001 * best
    (told,) = report.tensors
    assert told.energy == pytest.approx(1 - best / float(squares.sum()), abs=1e-4)
    held = squares.cumsum(0) / squares.sum()
    for energy in (0.9, 0.999):
        _, report = extracted(tmp_path, base, tuned, energy=energy)
        assert report.tensors[0].rank - int((held < energy).sum()) - 1 in {0, 1}


def test_every_kind_that_the_class_knows_comes_back(tmp_path: Path) -> None:
    config = {"model_type": "gpt2", "architectures": ["GPT2Model"], "vocab_size": 11, "n_embd": 4}
    config |= {"n_layer": 1, "n_head": 2}
    rows = [SITES["embedding"], Site("h.0.attn.c_proj", lambda: conv1d(4, 4), 4)]
    rows += [SITES["conv"], SITES["experts"].at("experts.gate_up_proj")]
    state = state_of(*rows, size=0.3)
    tensors = {
        "wte.weight": torch.randn(11, 4), "h.0.attn.c_proj.weight": torch.randn(4, 4),
        "stem.weight": torch.randn(4, 2, 3, 3), "experts.gate_up_proj": torch.randn(3, 7, 5),
    }  # fmt: skip
    base, tuned = pair_of(tmp_path, tensors, state, **config)
    back, _ = extracted(tmp_path, base, tuned, rank=2)
    kinds = [{n: s.spec.kind for n, s in a.sites.items()} for a in (back, state)]
    assert kinds[0] == kinds[1]
    merge(base, [tmp_path / "adapter.safetensors"], tmp_path / "out")
    again = load_checkpoint(tmp_path / "out")
    for name, tensor in load_checkpoint(tuned).items():
        assert torch.allclose(again[name], tensor, atol=1e-4), name


SQUARE: dict[str, Callable[[], torch.nn.Module]] = {
    "linear": lambda: torch.nn.Linear(8, 8, bias=False),
    "conv1d": lambda: conv1d(8, 8),
    "embedding": lambda: torch.nn.Embedding(8, 8),
}


@pytest.mark.parametrize("kind", SQUARE)
def test_what_a_square_matrix_is_the_user_says_where_no_class_does(kind: str, tmp_path) -> None:
    """A Conv1D was taken for a linear layer, and the adapter computed something else."""
    torch.manual_seed(0)
    net = torch.nn.Sequential(SQUARE[kind]())
    tensors = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    tuned = {**tensors, "0.weight": tensors["0.weight"] + torch.randn(8, 8)}
    places = [save_checkpoint(tmp_path / n, t) for n, t in (("base", tensors), ("tuned", tuned))]
    with refused(li.CheckpointError, "'0.weight'", "square='linear'", "config.json"):
        li.extract_adapter(*places, tmp_path / "a", rank=8)
    with refused(li.CheckpointError, "square", "'linaer'", "'linear'"):
        li.extract_adapter(*places, tmp_path / "a", rank=8, square="linaer")
    report = li.extract_adapter(*places, tmp_path / "a", rank=8, square=kind)
    assert all(t.energy is None or t.energy <= 1 for t in report.tensors)
    found = dict(li.merged_weights(li.load_adapter(net, tmp_path / "a")))["0.weight"]
    torch.testing.assert_close(found, tuned["0.weight"], rtol=0, atol=1e-5)


def test_a_small_difference_of_float64_is_no_rounding(tmp_path: Path) -> None:
    W = torch.randn(6, 4, dtype=torch.float64)
    delta = 1e-9 * torch.outer(torch.arange(1.0, 7.0), torch.ones(4)).double()
    base = save_checkpoint(tmp_path / "base", {"q.weight": W})
    tuned = save_checkpoint(tmp_path / "tuned", {"q.weight": W + delta})
    back, _ = extracted(tmp_path, base, tuned, rank=1)
    assert error(effect(back.sites["q"]), delta) < 1e-6


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_an_extracted_adapter_knows_its_base(tmp_path: Path, dtype: torch.dtype) -> None:
    tensors = llama_tensors(dtype=dtype)
    base, tuned = pair_of(tmp_path, tensors, adapter_of(tensors, rank=3))
    extracted(tmp_path, base, tuned, energy=0.9)
    merge(base, [tmp_path / "adapter.safetensors"], tmp_path / "out")
    other = save_checkpoint(tmp_path / "other", llama_tensors(seed=1, dtype=dtype), 1, LLAMA)
    with refused(li.CheckpointError, "another base"):
        merge(other, [tmp_path / "adapter.safetensors"], tmp_path / "no")


BITS = torch.randint(0, 2, (5, 3), generator=torch.Generator().manual_seed(0))
UNEQUAL: dict[str, tuple[Tensor, Tensor]] = {
    str(dtype): (BITS.to(dtype), (1 - BITS).to(dtype))
    for dtype in (torch.float8_e4m3fn, torch.int8, torch.int64, torch.bool)
} | {"another dtype": (BITS.to(torch.int8), BITS.float())}


@pytest.mark.parametrize("case", UNEQUAL)
def test_what_is_no_plain_float_is_compared_too(case: str, tmp_path: Path) -> None:
    codes, others = UNEQUAL[case]
    base = {"fc.weight": torch.zeros(6, 4), "codes": codes, "same": codes.clone()}
    delta = torch.outer(torch.arange(6.0), torch.ones(4))
    files = {"base": base, "alone": base | {"codes": others}}
    files["tuned"] = files["alone"] | {"fc.weight": delta}
    folders = {name: save_checkpoint(tmp_path / name, each) for name, each in files.items()}
    with refused(li.CheckpointError, "alone"):
        extracted(tmp_path, folders["base"], folders["alone"], rank=1)
    _, report = extracted(tmp_path, folders["base"], folders["tuned"], rank=1)
    assert (report.left, report.n_equal) == (("codes",), 1)


def test_a_transposed_convolution_is_extracted_as_the_model_takes_it(tmp_path: Path) -> None:
    """It was extracted as a convolution, the other way round, and no model took the adapter."""
    sizes = {"hidden_size": 8, "intermediate_size": 8, "num_attention_heads": 2}
    sizes |= {"num_hidden_layers": 4, "image_size": 32, "fusion_hidden_size": 4}
    outs = {"neck_hidden_sizes": [4] * 4, "backbone_out_indices": [*range(4)]}
    model = transformers.DPTForDepthEstimation(transformers.DPTConfig(**sizes, **outs))
    name = "neck.reassemble_stage.layers.0.resize"
    weight = model.get_parameter(f"{name}.weight")
    model.save_pretrained(tmp_path / "base")
    with torch.no_grad():
        weight += torch.outer(torch.randn(4), torch.randn(weight[0].numel())).view_as(weight)
    model.save_pretrained(tmp_path / "tuned")
    extracted(tmp_path, tmp_path / "base", tmp_path / "tuned", rank=1)
    fresh = transformers.DPTForDepthEstimation.from_pretrained(tmp_path / "base")
    li.load_adapter(fresh, tmp_path / "adapter.safetensors")
    merged = dict(li.merged_weights(fresh))[f"{name}.weight"]
    torch.testing.assert_close(merged, weight.detach(), rtol=0, atol=1e-5)
    with refused(li.FormatError, f"'{name}'", "conv_transpose"):
        li.extract_adapter(tmp_path / "base", tmp_path / "tuned", tmp_path / "b", rank=1)


IDS = torch.arange(6)[None]


def saved_before_and_after(model: Any, folder: Path, *names: str) -> Any:
    """Save a model, and a copy some of whose parameters, or all, have moved; return the copy."""
    model.save_pretrained(folder / "base")
    tuned = copy.deepcopy(model)
    with torch.no_grad():
        for name, parameter in tuned.named_parameters():
            if not names or name.endswith(names):
                parameter.add_(0.1 * torch.randn_like(parameter))
    tuned.save_pretrained(folder / "tuned")
    return tuned


@needs_transformers_5
@pytest.mark.parametrize(
    "family", ["gpt_oss", "qwen3_moe", pytest.param("jetmoe", marks=pytest.mark.recent)]
)  # transformers 5.0 builds no JetMoe
def test_the_difference_of_routers_and_of_biases_of_experts_goes_onto_the_model(
    family: str, tmp_path: Path
) -> None:
    """A router is no linear layer, and no adapter holds low ranks of a bias, whatever its shape."""
    base = experts(family)[0]
    due = saved_before_and_after(base, tmp_path)(IDS).logits
    li.extract_adapter(tmp_path / "base", tmp_path / "tuned", tmp_path / "a", rank=8, full=True)
    assert error(li.load_adapter(base, tmp_path / "a")(IDS).logits, due) < 1e-4


def test_the_difference_of_a_tied_bias_is_under_each_of_its_names(tmp_path: Path) -> None:
    """The head of a BERT adds the one that the files lack."""
    base = tiny(transformers.BertForMaskedLM, hidden_size=8).eval()
    ends = ("predictions.bias", "word_embeddings.weight")
    due = saved_before_and_after(base, tmp_path, *ends)(IDS).logits
    li.extract_adapter(tmp_path / "base", tmp_path / "tuned", tmp_path / "a", rank=8, full=True)
    merge(tmp_path / "base", [tmp_path / "a"], tmp_path / "out")
    merged = transformers.BertForMaskedLM.from_pretrained(tmp_path / "out")
    for found in (merged, li.load_adapter(base, tmp_path / "a")):
        assert error(found(IDS).logits, due) < 1e-4


MEASURES: list[tuple[str, dict[str, float], list[str]]] = [
    ("base", {"rank": 1}, ["13 tensors", "0 differ"]),
    ("other", {"rank": 1}, ["'more'"]),
    ("other", {}, ["rank", "energy"]),
    ("other", {"rank": 0}, ["rank"]),
    ("other", {"energy": 0.0}, ["energy", "0"]),
    ("other", {"energy": float("nan")}, ["nan"]),
]


@pytest.mark.parametrize(("tuned", "measure", "named"), MEASURES)
def test_what_has_no_difference_or_no_measure_is_refused(tuned, measure, named, tmp_path) -> None:
    save_checkpoint(tmp_path / "base", TENSORS, 2, LLAMA)
    save_checkpoint(tmp_path / "other", {"more": torch.zeros(2), **TENSORS}, 1)
    with refused(li.CheckpointError, *named):
        li.extract_adapter(tmp_path / "base", tmp_path / tuned, tmp_path / "a", **measure)
    assert not (tmp_path / "a").exists()
