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


@pytest.mark.parametrize("measure", [{"rank": 1}, {"energy": 0.9}, {"energy": 0.9999}], ids=str)
def test_the_energy_that_is_held_is_what_the_report_says(tmp_path, measure):
    _, base, tuned, state = case(tmp_path)
    extracted, report = difference_of(base, tuned, **measure)
    for t in report.tensors:
        whole, cut = (
            s.scale * s.B.double() @ s.A.double()
            for s in (a.sites[t.name.removesuffix(".weight")] for a in (state, extracted))
        )
        lost = (whole - cut).square().sum() / whole.square().sum()
        assert 1 - t.energy == pytest.approx(float(lost), abs=1e-5)
        squares = torch.linalg.svdvals(whole).square()
        held = squares.cumsum(0) / squares.sum()
        wanted = measure.get("energy")
        assert t.rank == (int((held < wanted - 1e-6).sum()) + 1 if wanted else 1)


@pytest.mark.parametrize("shape", [(300, 200), (200, 300)])
def test_low_rank_svd_is_near_the_best(shape):
    U, S, Vh = torch.linalg.svd(torch.randn(*shape), full_matrices=False)
    D = U @ torch.diag(0.9 ** torch.arange(len(S)) * S[0]) @ Vh
    squares = torch.linalg.svdvals(D.double()).square()
    near = decompose(D, 20)
    assert not near.exact
    best = float(squares[20:].sum())
    assert float((D - near.U @ torch.diag(near.S) @ near.V.T).square().sum()) <= 1.001 * best
    assert near.energy == pytest.approx(1 - best / float(squares.sum()), abs=1e-4)
    held = squares.cumsum(0) / squares.sum()
    for energy in (0.9, 0.999):
        rank = len(decompose(D, None, energy).S)
        assert rank - int((held < energy).sum()) - 1 in {0, 1}


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


def test_what_has_no_difference_or_no_measure_is_refused(tmp_path):
    tensors, base, _, _ = case(tmp_path)
    other = save_checkpoint(tmp_path / "other", {"more": torch.zeros(2), **tensors}, 1)
    for tuned, measure, words in (
        (base, {"rank": 1}, "13 tensors equal the base's and 0 differ"),
        (other, {"rank": 1}, "'more' is only in the fine-tuned one"),
        (other, {}, "neither"),
        (other, {"rank": 0}, "none at all"),
        (other, {"energy": 0.0}, "not a share"),
        (other, {"energy": float("nan")}, "not a share"),
    ):
        with pytest.raises(CheckpointError, match=words):
            difference_of(base, tuned, **measure)
