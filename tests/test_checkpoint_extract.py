"""The reverse of merging: differences of checkpoints as adapters."""

import json

import pytest
import torch
from helpers.checkpoints import (
    LLAMA,
    adapter,
    dense,
    llama_adapter,
    llama_tensors,
    load_checkpoint,
    save_checkpoint,
    site,
)

from lora_inject.algebra.svd import decompose
from lora_inject.checkpoint import difference_of, merge_checkpoint, plan_merge
from lora_inject.core.model.base import fingerprint
from lora_inject.errors import CheckpointError
from lora_inject.formats import read_adapter, write_adapter


def case(tmp_path, dtype=torch.float32):
    tensors = llama_tensors(dtype=dtype)
    base = save_checkpoint(tmp_path / "base", tensors, 2, {**LLAMA, "vocab_size": 32})
    state = llama_adapter(tensors, rank=3)
    tuned = save_checkpoint(tmp_path / "tuned", dense(tensors, (state, 1.0)), 3, LLAMA)
    return tensors, base, tuned, state


def test_difference_of_rank_r_comes_back_whole(tmp_path):
    tensors, base, tuned, state = case(tmp_path)
    extracted, report = difference_of(base, tuned, rank=3)
    assert extracted.sites.keys() == state.sites.keys()
    assert all(t.energy == pytest.approx(1.0, abs=1e-6) for t in report.tensors)
    assert report.n_equal == len(tensors) - len(state.sites)
    merge_checkpoint(base, [extracted], tmp_path / "out")
    again = load_checkpoint(tmp_path / "out")
    for name, t in load_checkpoint(tuned).items():
        assert torch.allclose(again[name], t, atol=1e-5), name


def delta(site):
    return site.scale * site.B.double() @ site.A.double()


def test_energy_finds_the_rank(tmp_path):
    _, base, tuned, state = case(tmp_path)
    _, report = difference_of(base, tuned, energy=0.9999)
    for t in report.tensors:
        values = torch.linalg.svdvals(delta(state.sites[t.name.removesuffix(".weight")])).square()
        held = values.cumsum(0) / values.sum()
        assert t.rank == int((held < 0.9999 - 1e-6).sum()) + 1
        assert t.energy >= 0.9999 - 1e-6


def test_energy_lost_is_what_the_report_says(tmp_path):
    _, base, tuned, state = case(tmp_path)
    extracted, report = difference_of(base, tuned, rank=1)
    for t in report.tensors:
        whole, cut = (delta(a.sites[t.name.removesuffix(".weight")]) for a in (state, extracted))
        lost = (whole - cut).square().sum() / whole.square().sum()
        assert 1 - t.energy == pytest.approx(float(lost), abs=1e-5)


@pytest.mark.parametrize("shape", [(300, 200), (200, 300)])
def test_low_rank_svd_is_near_the_best(shape):
    g = torch.Generator().manual_seed(0)
    U, S, Vh = torch.linalg.svd(torch.randn(*shape, generator=g), full_matrices=False)
    D = U @ torch.diag(0.9 ** torch.arange(len(S)) * S[0]) @ Vh
    values = torch.linalg.svdvals(D.double())
    before = torch.random.get_rng_state()
    found = decompose(D, 20)
    assert torch.equal(torch.random.get_rng_state(), before)
    assert not found.exact
    best = float((values[20:] ** 2).sum())
    off = float((D - found.U @ torch.diag(found.S) @ found.V.T).square().sum())
    assert off <= 1.001 * best
    assert found.energy == pytest.approx(1 - best / float((values**2).sum()), abs=1e-4)
    held = (values**2).cumsum(0) / (values**2).sum()
    for energy in (0.9, 0.999):
        enough = decompose(D, None, energy)
        assert len(enough.S) - int((held < energy).sum()) - 1 in {0, 1}


def test_low_rank_svd_of_noise_holds_almost_what_is_possible():
    D = torch.randn(400, 600)
    wanted = float((torch.linalg.svdvals(D.double())[:12] ** 2).sum()) / float(D.square().sum())
    assert decompose(D, 12).energy == pytest.approx(wanted, rel=0.02)


def test_embeddings_conv1d_convolutions_and_experts(tmp_path):
    config = {
        "model_type": "gpt2", "architectures": ["GPT2Model"], "vocab_size": 20, "n_embd": 8,
        "n_layer": 1, "n_head": 2
    }  # fmt: skip
    state = adapter(
        site("wte", (20, 8), kind="embedding", transposed=True),
        site("h.0.attn.c_proj", (8, 8), kind="conv1d", transposed=True),
        site("patch", (6, 3, 4, 4), kind="conv"),
        site("experts.gate_up_proj", (3, 8, 6), experts=3),
    )
    tensors = {s.spec.weight: torch.randn(s.spec.weight_shape) for s in state.sites.values()}
    wanted = dense(tensors, (state, 1.0))
    base, tuned = (
        save_checkpoint(tmp_path / name, values, 1, config)
        for name, values in (("base", tensors), ("tuned", wanted))
    )
    extracted, _ = difference_of(base, tuned, rank=2)
    kinds = [{n: s.spec.kind for n, s in a.sites.items()} for a in (extracted, state)]
    assert kinds[0] == kinds[1]
    merge_checkpoint(base, [extracted], tmp_path / "out")
    again = load_checkpoint(tmp_path / "out")
    for name, t in wanted.items():
        assert torch.allclose(again[name], t, atol=1e-4), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_extracted_adapter_survives_its_files_and_knows_its_base(tmp_path, dtype):
    """The same fingerprint as saving a live adapter takes; another base is refused."""
    tensors, base, tuned, _ = case(tmp_path, dtype)
    extracted, report = difference_of(base, tuned, energy=0.9)
    assert json.loads(json.dumps(report.to_dict()))["left"] == []
    assert extracted.fingerprint == fingerprint(tensors)
    back = read_adapter(write_adapter(extracted, tmp_path / "adapter"))
    ranks = [{n: s.spec.rank for n, s in a.sites.items()} for a in (back, extracted)]
    assert ranks[0] == ranks[1]
    plan_merge(base, [back])
    other = save_checkpoint(tmp_path / "other", llama_tensors(seed=1, dtype=dtype), 1, LLAMA)
    with pytest.raises(CheckpointError, match="made on another base"):
        plan_merge(other, [back])


@pytest.mark.parametrize(
    ("measure", "words"),
    [
        ({}, "neither"),
        ({"rank": 0}, "none at all"),
        ({"energy": 0.0}, "not a share"),
        ({"energy": float("nan")}, "not a share"),
    ],
)
def test_impossible_measures_are_refused(tmp_path, measure, words):
    with pytest.raises(CheckpointError, match=words):
        difference_of(tmp_path, tmp_path, **measure)


def test_equal_checkpoints_and_other_names_are_refused(tmp_path):
    tensors, base, _, _ = case(tmp_path)
    with pytest.raises(CheckpointError, match="13 tensors equal the base's and 0 differ"):
        difference_of(base, base, rank=1)
    other = save_checkpoint(tmp_path / "other", {"more": torch.zeros(2), **tensors}, 1)
    with pytest.raises(CheckpointError, match="'more' is only in the fine-tuned one"):
        difference_of(base, other, rank=1)
