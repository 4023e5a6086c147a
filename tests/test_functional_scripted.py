"""Functions that run without Python's lock, beside the same functions in Python, bit for bit."""

from __future__ import annotations

import threading

import pytest
import torch
from conftest import same_bits
from torch import Tensor

from lora_inject.functional import Delta, Tally, Term, fold, fold_rows, scripted
from lora_inject.spec.sites import SiteSpec, Slices

SPECS = {
    "linear": SiteSpec("s", "linear", 24, 40, (40, 24), 3, 6.0),
    "conv1d": SiteSpec("s", "conv1d", 24, 40, (24, 40), 3, 6.0, transposed=True),
    "slices": SiteSpec(
        "s",
        "linear",
        24,
        40,
        (40, 24),
        3,
        6.0,
        slices=Slices((("q", 24), ("k", 6), ("v", 10)), ("q", "v")),
    ),
}


def folded(spec: SiteSpec, dtype: torch.dtype, piece_rows: int) -> tuple[Tensor, list[float]]:
    g = torch.Generator().manual_seed(0)
    A, B = torch.randn(spec.a_shape, generator=g), torch.randn(spec.b_shape, generator=g)
    W = torch.randn(spec.matrix_shape, generator=g).to(dtype)
    tally = Tally()
    merged = fold_rows(W, 0, [Term(spec, A, B)], tally=tally, piece_rows=piece_rows)
    return merged, [tally.weight_norm, tally.delta_norm, tally.kept, tally.error]


@pytest.mark.parametrize("name", SPECS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("piece_rows", [1, 7, 40])
def test_folding_gives_the_same_bits_in_python(
    name: str, dtype: torch.dtype, piece_rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    compiled = [folded(SPECS[name], dtype, piece_rows) for _ in range(3)]
    monkeypatch.setattr(fold, "_fold_pieces", fold._fold_pieces.__wrapped__)
    merged, sums = folded(SPECS[name], dtype, piece_rows)
    for again, counted in compiled:  # torch optimizes a function after it has seen it run
        assert same_bits(again, merged)
        assert counted == sums


def test_it_is_compiled_here() -> None:
    function = fold._fold_pieces.__wrapped__
    assert scripted._compiled(function) is not function
    assert torch._C._get_graph_executor_optimize(), "others' functions are optimized as before"


@pytest.mark.parametrize("error", [RuntimeError, OSError, AttributeError])
def test_without_torchscript_the_function_runs_as_it_is(
    error: type[Exception], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuses(_: object) -> None:
        raise error

    monkeypatch.setattr(torch.jit, "script", refuses)

    @scripted.scripted
    def double(x: Tensor) -> Tensor:
        return x + x

    assert double(torch.ones(2)).tolist() == [2.0, 2.0]


def test_many_threads_may_be_the_first() -> None:
    @scripted.scripted
    def double(x: Tensor) -> Tensor:
        return x + x

    found: list[float] = []
    start = threading.Barrier(8)

    def work() -> None:
        start.wait()
        found.append(float(double(torch.ones(()))))

    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [2.0] * 8


def test_pieces_change_no_merged_bit() -> None:
    spec = SPECS["slices"]
    whole, _ = folded(spec, torch.bfloat16, 40)
    for piece_rows in (1, 2, 3, 11, 39):
        assert same_bits(folded(spec, torch.bfloat16, piece_rows)[0], whole)


def test_a_prepared_delta_tells_what_reaches_some_rows() -> None:
    spec = SPECS["slices"]
    A, B = torch.randn(spec.a_shape), torch.randn(spec.b_shape)
    delta = Delta([Term(spec, A, B)])
    assert delta.on(24, 30) == ([], [], [])
    lefts, rights, places = delta.on(20, 31)
    assert places == [[0, 24, 0, 24], [30, 40, 0, 24]]
    assert [tuple(left.shape) for left in lefts] == [(24, 3), (10, 3)]
    assert all(right.shape == (3, 24) for right in rights)
