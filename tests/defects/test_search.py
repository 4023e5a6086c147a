"""Search: what is tried is what was asked for, or it is said."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.training import llama_folder
from torch import Tensor, nn

import lora_inject as li
from lora_inject import search

SPACE = {"targets": {"all": ["all-linear"]}, "rank": 2, "lr": [1e-3, 1e-2]}
SPACE |= {"budget": {"steps": 6}}


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2)).eval()


def data(n: int, seed: int) -> list[tuple[Tensor, Tensor]]:
    x = torch.randn(n, 6, 4, generator=torch.Generator().manual_seed(seed))
    return [(rows, rows[:, :2] - rows[:, 2:]) for rows in x]


def squared(out: Tensor, batch: tuple[Tensor, Tensor]) -> Tensor:
    return nn.functional.mse_loss(out, batch[1])


def searched(model: nn.Module, **more: Any) -> li.classes.Search:
    given: dict[str, Any] = {"forward": lambda b: model(b[0]), "loss": squared, **more}
    return search(model, given.pop("space", SPACE), data(3, 1), data(2, 2), **given)


OTHERS: dict[str, Any] = {
    "loss": lambda model: {"loss": lambda out, b: nn.functional.l1_loss(out, b[1])},
    "forward": lambda model: {"forward": lambda b: model(2 * b[0])},
    "max_tokens": lambda model: {"max_tokens": 7},
}


@pytest.mark.parametrize("what", OTHERS)
def test_a_search_does_not_go_on_with_another_question(what: str, tmp_path: Path) -> None:
    stopped, model = net(), net()

    def stop(search: li.classes.Search) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        searched(stopped, folder=tmp_path, watch=stop)
    with pytest.raises(li.FormatError) as raised:
        searched(model, folder=tmp_path, **OTHERS[what](model))
    assert what in str(raised.value)
    assert raised.value.remedy
    assert searched(model, folder=tmp_path).best == searched(net()).best


def test_trials_that_equal_others_are_told() -> None:
    """Ranks from 1 to 4 are four trials, however many are asked for."""
    space = SPACE | {"rank": {"from": 1, "to": 4}, "lr": 1e-2, "trials": 16}
    found = searched(net(), space=space)
    assert len(found.candidates) + found.to_dict()["equal"] == 16
    assert "12 more were equal to others" in found.to_yaml()


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    llama_folder(Path("base"))
    space = "{targets: {qv: ['[qv]_proj']}, lr: [1e-3, 1e-2], rank: 2, budget: {steps: 4}}"
    Path("space.yaml").write_text(space)
    return tmp_path


WORDS = ("search", "base", "space.yaml", "--output", "out", "--batch", "4", "--data")


@pytest.mark.parametrize("separator", ["\u2028", "\u2029", "\u0085", "\f", "\x1c"])
def test_a_line_of_a_file_ends_at_a_newline_alone(folder: Path, run: Any, separator: str) -> None:
    rows = [{"text": f"{i} is a{separator}number"} for i in range(12)]
    text = "".join(f"{json.dumps(row, ensure_ascii=False)}\n" for row in rows)
    Path("rows.jsonl").write_text(text, encoding="utf-8")
    Path("rows.txt").write_text("\r\n".join(row["text"] for row in rows[:7]), encoding="utf-8")
    done = run(*WORDS, "rows.jsonl")
    assert done.code == 0, done.err
    done = run(*WORDS, "rows.txt")
    assert (done.code, "it has 7 rows" in done.err) == (1, True), done.err


def test_rows_that_fill_no_batch_are_told(folder: Path, run: Any) -> None:
    text = "".join(f"{json.dumps({'text': f'{i} is a number'})}\n" for i in range(15))
    Path("rows.jsonl").write_text(text)
    done = run(*WORDS, "rows.jsonl")
    assert done.code == 0, done.err
    assert "3 rows" in done.err
