"""Figures of an adapter, each against its definition in dense float64 numpy."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import fill
from helpers.merging import save_checkpoint
from helpers.refusals import refused
from helpers.states import Site, effect, linear, parameter, state_of
from helpers.versions import needs_transformers_5
from torch import Tensor, nn

import lora_inject as li
from contract.kinds import KINDS, dense_delta, injected

analysis = li.analysis  # noqa: TID251 - a public name


def of_values(figures: Any, delta: np.ndarray) -> None:
    """Hold a spectrum to the definitions of its figures."""
    n = len(figures.values)
    s = np.linalg.svd(delta, compute_uv=False)[:n]
    np.testing.assert_allclose(figures.values.numpy(), s, rtol=1e-9, atol=1e-12)
    assert figures.norm == pytest.approx(float(np.linalg.norm(delta)), rel=1e-9)
    s = s[s > 1e-12 * s[0]]
    assert figures.rank == len(s)
    assert figures.stable_rank == pytest.approx((s**2).sum() / s[0] ** 2, rel=1e-9)
    p = s / s.sum()
    assert figures.effective_rank == pytest.approx(np.exp(-(p * np.log(p)).sum()), rel=1e-9)
    energy = np.cumsum(s**2) / (s**2).sum()
    np.testing.assert_allclose(figures.energy.numpy()[: len(s)], energy, rtol=1e-9)
    for share in (0.5, 0.9, 0.95, 0.99):
        assert figures.rank_for(share) == 1 + int((energy < share - 1e-12).sum())


def of_weight(figures: Any, W: np.ndarray, delta: np.ndarray) -> None:
    """Hold the size of a delta beside its weight to their definitions."""
    assert figures.delta_norm == pytest.approx(np.linalg.norm(delta), rel=1e-9)
    assert figures.weight_norm == pytest.approx(np.linalg.norm(W), rel=1e-9)
    assert figures.relative == pytest.approx(np.linalg.norm(delta) / np.linalg.norm(W), rel=1e-9)


ROUND_TRIPS = {
    "bfloat16": lambda x: torch.from_numpy(x).bfloat16().float().numpy(),
    "float16": lambda x: x.astype(np.float16).astype(np.float32),
}


def of_rounding(figures: Any, W: Tensor, delta: Tensor) -> None:
    """Hold what each format leaves of an update: in its direction, off it, and how like it."""
    assert figures.keys() == ROUND_TRIPS.keys()
    W, d = W.float().numpy(), delta.double().numpy()
    wanted = W + delta.float().numpy()
    for name, trip in ROUND_TRIPS.items():
        left = trip(wanted).astype(np.float64) - trip(W)
        norm, d_norm = np.linalg.norm(left), np.linalg.norm(d)
        # Sums of float32 products, relative to |left| |D| / |D|^2; and W + D rounds in float32,
        # below which nothing counts as kept.
        slack = 1e-4 * (1 + norm / d_norm) + 2**-23 * np.linalg.norm(W) / d_norm
        assert figures[name].kept == pytest.approx((left * d).sum() / d_norm**2, abs=slack), name
        assert figures[name].error == pytest.approx(np.linalg.norm(left - d) / d_norm, abs=slack)
        if norm > 0.1 * d_norm:
            cosine = (left * d).sum() / norm / d_norm
            # The share that was kept, by |D| / |left|: so is what counts as nothing of it.
            part = slack * max(1.0, d_norm / norm)
            assert figures[name].likeness == pytest.approx(cosine, abs=part), name


def blocks(kind: Any, of: Tensor) -> Iterator[np.ndarray]:
    """The matrices of a weight, or of its delta, that have a rank of their own."""
    n_out = kind.sizes[1]
    matrices = of.double().reshape(kind.experts or 1, *kind.sizes[:: 1 if kind.transposed else -1])
    for matrix in matrices:
        for start, stop in kind.spans or ((0, n_out),):
            part = matrix[:, start:stop] if kind.transposed else matrix[start:stop]
            yield part.numpy()


@pytest.mark.parametrize("name", KINDS)
def test_figures_of_every_kind_beside_its_weight(name: str, tmp_path: Path) -> None:
    kind = KINDS[name]
    model = injected(kind, torch.bfloat16)
    W = model.get_parameter(kind.key).detach().clone()
    state = li.adapter_state(model)
    site = state.sites[kind.site]
    base = {k: tensor.contiguous() for k, tensor in li.eject(model).state_dict().items()}
    save_checkpoint(tmp_path, base)
    delta = dense_delta(kind, site.A.double(), site.B.double())

    analyzed = analysis.analyze(state, tmp_path)
    beside = analyzed.weights[kind.site]
    assert beside.stored == "bfloat16"
    assert {each.tensor for each in beside.blocks} == {kind.key}
    figures = zip(analyzed.blocks, beside.blocks, blocks(kind, delta), blocks(kind, W), strict=True)
    for own, with_w, d, w in figures:
        of_values(own.spectrum, d)
        of_weight(with_w, w, d)
    of_rounding(beside.rounded, W.reshape(-1, delta.shape[-1]), delta.reshape(-1, delta.shape[-1]))
    (inspected,) = analysis.inspect_state(state).sites
    assert inspected.delta_norm == pytest.approx(float(delta.norm()), rel=1e-9)


@pytest.mark.parametrize(("size", "columns"), [(1e-4, 51), (0.02, 150), (0.5, 1), (0.5, 64)])
def test_what_a_format_leaves_is_its_definition(size: float, columns: int, tmp_path: Path) -> None:
    state = li.combine([state_of(linear("fc", columns, 3, rank=3))], [size])
    W = torch.randn(3, columns)
    save_checkpoint(tmp_path, {"fc.weight": W})
    rounded = analysis.analyze(state, tmp_path).weights["fc"].rounded
    of_rounding(rounded, W, effect(state.sites["fc"]))


def test_a_frozen_start_is_not_part_of_the_delta() -> None:
    model = nn.Sequential(nn.Linear(8, 6)).double()
    li.inject(model, {"rank": 2, "alpha": 3, "init": "pissa", "targets": ["0"]})
    assert analysis.analyze(li.adapter_state(model)).blocks[0].spectrum.rank == 0
    state = li.adapter_state(fill(model))
    of_values(analysis.analyze(state).blocks[0].spectrum, effect(state.sites["0"]).numpy())


def test_a_spectrum_of_nothing_and_of_a_rank_above_the_widths() -> None:
    wide = state_of(linear("fc", 3, 2, rank=6))
    of_values(analysis.analyze(wide).blocks[0].spectrum, effect(wide.sites["fc"]).numpy())
    wide.sites["fc"].B.zero_()
    none = analysis.analyze(wide).blocks[0].spectrum
    assert (none.rank, none.stable_rank, none.effective_rank, none.rank_for(0.9)) == (0,) * 4


# ----------------------------------------------------------------------------------------- findings


def matrices(*names: str, seed: int = 0, n_out: int = 7, n_in: int = 9, **rule: Any) -> Any:
    rows = [linear(name, n_in, n_out, **{"rank": 4, **rule}) for name in names]
    return state_of(*rows, seed=seed)


def with_values(n_out: int, n_in: int, *values: float, rank: int = 4) -> li.AdapterState:
    """An adapter of one matrix whose delta has these singular values."""
    state = state_of(linear("fc", n_in, n_out, rank=rank, alpha=rank))
    site, n = state.sites["fc"], len(values)
    left, right = (torch.linalg.qr(torch.randn(side, rank)).Q for side in (n_out, n_in))
    site.A.copy_(right.T)
    site.B.zero_()
    site.B[:, :n] = left[:, :n] * torch.tensor(values)
    return state


def codes(analyzed: Any) -> list[str]:
    return [finding.code for finding in analyzed.findings]


@pytest.mark.parametrize(
    ("values", "rank", "told"),
    [
        ((), 4, ["inert"]),
        ((1.0, 0.01), 4, ["one-direction"]),
        ((1.0,), 1, []),  # it is not told that rank 1 would do
        ((1.0, 0.5), 4, ["spare-rank"]),
        ((1.0, 0.9, 0.8), 4, []),
        ((1.0, 1.0, 1.0, 1.0), 4, []),
    ],
)
def test_findings_about_the_adapter_alone(values: Any, rank: int, told: list[str]) -> None:
    assert codes(analysis.analyze(with_values(7, 9, *values, rank=rank))) == told


@pytest.mark.parametrize(
    ("dtype", "size", "scale", "told"),
    [
        (torch.bfloat16, 1, 1e-4, {"lost"}),
        (torch.float32, 1, 1e-3, {"noise"}),  # of a float32 base, rounding has noise and no bias
        (torch.bfloat16, 1, 5.0, set()),
        (torch.bfloat16, 1, 500.0, {"loud"}),
        (torch.float32, 1e5, 1e4, {"overflow"}),
    ],
)
def test_findings_beside_w(tmp_path: Path, dtype: Any, size: Any, scale: Any, told: Any) -> None:
    save_checkpoint(tmp_path, {"fc.weight": (size * torch.randn(32, 64)).to(dtype)})
    assert set(codes(analysis.analyze(with_values(32, 64, *[scale] * 4), tmp_path))) == told


# --------------------------------------------------------------------------------- other bases


@needs_transformers_5
def test_stacked_experts_that_the_file_keeps_apart(tmp_path: Path) -> None:
    """gate_up_proj (E, 2 I, H) against `experts.E.gate_proj` and `experts.E.up_proj`."""
    E, inner, width, where = 2, 6, 8, "model.layers.0.mlp.experts"
    config = {"architectures": ["Qwen2MoeForCausalLM"], "model_type": "qwen2_moe",
              "vocab_size": 16, "hidden_size": width, "intermediate_size": inner,
              "moe_intermediate_size": inner, "num_hidden_layers": 1, "num_attention_heads": 2,
              "num_key_value_heads": 1, "num_experts": E}  # fmt: skip
    shapes = {"gate_proj": (inner, width), "up_proj": (inner, width), "down_proj": (width, inner)}
    tensors = {f"{where}.{e}.{leaf}.weight": torch.randn(shape)
               for e in range(E) for leaf, shape in shapes.items()}  # fmt: skip
    save_checkpoint(tmp_path, tensors, config=config)
    stack: Site = parameter(f"{where}.gate_up_proj", E, 2 * inner, width)
    state = state_of(stack)
    streamed = analysis.analyze(state, tmp_path).weights[stack.name]
    assert [block.label for block in streamed.blocks] == ["expert 0"] * 2 + ["expert 1"] * 2
    for number, block in enumerate(streamed.blocks):
        e, part = divmod(number, 2)
        assert block.tensor == f"{where}.{e}.{('gate_proj', 'up_proj')[part]}.weight"
        delta = effect(state.sites[stack.name])[e][part * inner : (part + 1) * inner]
        of_weight(block, tensors[block.tensor].double().numpy(), delta.numpy())


@pytest.mark.parametrize(
    ("tensors", "names"),
    [
        ({"fc.qweight": torch.ones(7, 9).int()}, ["16-bit"]),
        ({"fc.weight": torch.ones(7, 9).to(torch.int16)}, ["fc.weight", "I16"]),
    ],
)
def test_a_base_without_plain_weights_is_refused(tmp_path: Path, tensors: Any, names: Any) -> None:
    save_checkpoint(tmp_path, {"fc.weight": torch.ones(7, 9)} | tensors)
    with refused(li.CheckpointError, *names):
        analysis.analyze(matrices("fc"), tmp_path)
