"""Search: what is tried, rung by rung, what comes out, and what is refused."""

import json
import math
from itertools import count
from pathlib import Path
from statistics import fmean
from typing import Any

import pytest
import torch
from conftest import snapshot
from helpers.refusals import refused
from helpers.tables import rows
from helpers.training import llama_folder
from torch import Tensor, nn

import lora_inject as li
from lora_inject import search

pytestmark = pytest.mark.recent

SPACE = {
    "targets": {"both": ["all-linear"], "last": ["2"]},
    "rank": [1, 2],
    "lr": [1e-3, 1e-2, 0.1],
    "config": {"dropout": 0.2},
    "training": {"clip": 1.0},
    "budget": {"steps": 20},
}


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2)).eval()


def data(n: int, seed: int) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n, 6, 4, generator=generator)
    return [(rows, rows[:, :2] - rows[:, 2:]) for rows in x]


TRAIN, HELD_OUT = data(5, 1), data(3, 2)
NAN = (torch.full((6, 4), math.nan), torch.ones(6, 2))


def squared(out: Tensor, batch: tuple[Tensor, Tensor]) -> Tensor:
    return nn.functional.mse_loss(out, batch[1])


def searched(model: nn.Module, space: Any = SPACE, **more: Any) -> li.classes.Search:
    options: dict[str, Any] = {"train": TRAIN, "held_out": HELD_OUT, "loss": squared, **more}
    batches = options.pop("train"), options.pop("held_out")
    return search(model, space, *batches, **{"forward": lambda b: model(b[0]), **options})


def test_each_rung_is_a_whole_run_equal_to_the_same_run_alone() -> None:
    model = net()
    before = snapshot(model)
    result = searched(model)
    assert result.plan == [(12, 4), (2, 20)]
    assert snapshot(model) == before
    for (size, steps), rung in zip(result.plan, result.rungs, strict=True):
        assert len(rung.held_out) == size
        for name, values in rung.held_out.items():
            lone = net()
            trials = li.Trials(lone, {name: result.trial(name, steps)})
            how: dict[str, Any] = {"forward": lambda b, m=lone: m(b[0]), "loss": squared}
            losses = [trials.step(TRAIN[i % 5], **how)[name] for i in range(steps)]
            assert losses == pytest.approx(rung.losses[name], rel=1e-4)
            judged = HELD_OUT[::3] if steps == 4 else HELD_OUT
            alone = [trials.evaluate(batch, **how)[name] for batch in judged]
            assert values == pytest.approx(alone, rel=1e-4)
    first, last = ({n: fmean(v) for n, v in rung.held_out.items()} for rung in result.rungs)
    assert set(last) == set(sorted(first, key=first.__getitem__)[:2])
    assert result.best == min(last, key=last.__getitem__)


def test_the_result_is_a_config_that_injects_and_an_adapter_with_its_loss() -> None:
    found = searched(net())
    text = found.to_yaml()
    config = li.Config.from_text(text)
    assert config == found.config
    model = net()
    li.inject(model, config, "plain")  # whose counts are expected
    li.eject(model, "plain")
    li.install(model, found.adapter)
    loss = fmean(nn.functional.mse_loss(model(x), y).item() for x, y in HELD_OUT)
    assert loss == pytest.approx(fmean(found.rungs[-1].held_out[found.best]), rel=1e-5)
    assert f"Held-out loss {loss:.4f}; the base {fmean(found.base):.4f}; batches: 3" in text


def test_an_interrupted_search_goes_on_to_the_same_result(tmp_path, monkeypatch) -> None:
    clock = count(0, 3600)  # each look at it is an hour later: it is saved after every step
    monkeypatch.setattr("time.monotonic", lambda: float(next(clock)))
    whole = searched(net())

    def stop_at(rung: int, step: int) -> Any:
        def watch(search: li.classes.Search) -> None:
            if (len(search.rungs), max(map(len, search.rungs[-1].losses.values()))) == (rung, step):
                raise KeyboardInterrupt

        return watch

    for place in ((1, 3), (2, 1), (2, 9)):
        model = net()
        with pytest.raises(KeyboardInterrupt) as left:
            searched(model, folder=tmp_path, watch=stop_at(*place))
        assert "goes on from what is saved" in left.value.__notes__[0]
        assert not li.adapters(model)
    for _ in ("interrupted", "ended"):
        other = searched(net(), folder=tmp_path)
        assert [r.held_out for r in other.rungs] == [r.held_out for r in whole.rungs]
        assert [r.losses for r in other.rungs] == [r.losses for r in whole.rungs]
        assert other.adapter == whole.adapter
    others = {
        "data": {"train": TRAIN[::-1]},
        "loss": {"loss": lambda out, b: nn.functional.l1_loss(out, b[1])},
        "forward": {"forward": lambda b: net()(2 * b[0])},
        "max_tokens": {"max_tokens": 7},
    }
    for what, more in others.items():
        with refused(li.FormatError, str(tmp_path), what):
            searched(net(), folder=tmp_path, **more)
    with refused(li.FormatError, str(tmp_path), "space"):
        searched(net(), SPACE | {"seed": 1}, folder=tmp_path)
    (tmp_path / "rung-2.pt").write_text("junk")
    with refused(li.FormatError, "rung-2.pt"):
        searched(net(), folder=tmp_path)


def test_trials_of_a_search_whose_state_is_missing_are_not_used(tmp_path) -> None:
    space = SPACE | {"budget": {"steps": 4}}
    searched(net(), space, folder=tmp_path)
    (tmp_path / "search.json").unlink()
    other = space | {"seed": 1}
    again = searched(net(), other, folder=tmp_path)
    assert again.rungs[0].losses == searched(net(), other).rungs[0].losses


def test_the_budget_leaves_out_what_is_too_large() -> None:
    found = searched(net(), SPACE | {"budget": {"steps": 4, "parameters": 22}})
    assert {c.parameters for c in found.candidates.values()} == {10, 20, 22}
    assert len(found.over_budget) == 3
    with refused(li.MatchError, "'last r1 lr 0.001'", "10 parameters"):
        searched(net(), SPACE | {"budget": {"steps": 4, "parameters": 9}})


def test_trials_that_equal_others_are_told() -> None:
    """Ranks from 1 to 4 are four trials, however many are asked for."""
    ranks = {"targets": {"all": ["all-linear"]}, "rank": {"from": 1, "to": 4}, "lr": 1e-2}
    found = searched(net(), SPACE | ranks | {"trials": 16, "budget": {"steps": 6}})
    assert len(found.candidates) + found.to_dict()["equal"] == 16
    assert "12 more were equal to others" in found.to_yaml()


def test_a_trial_that_diverges_is_reported_and_all_of_them_are_an_error() -> None:
    found = searched(net(), SPACE | {"rank": 1, "lr": [1e-2, 1e30]})
    assert all("1e+30" in name for rung in found.rungs for name in rung.stopped)
    assert found.rungs[0].stopped
    assert "stopped, its" in found.to_yaml()
    model = net()
    with refused(li.StateError, "learning rates"):
        searched(model, SPACE | {"rank": 1, "lr": [1e30, 1e31]})
    assert not li.adapters(model)


def test_points_follow_from_the_seed_and_cover_the_ranges() -> None:
    text = "{targets: {all: [all-linear], last: ['2']}, lr: {from: 1e-4, to: 1e-2}, trials: 8, "
    space = li.classes.Space.from_text(text + "budget: {steps: 8}}")
    points = space.points()
    assert points == space.points()
    assert sorted(p["targets"] for p in points) == ["all"] * 4 + ["last"] * 4
    pieces = [math.floor(8 * math.log(p["lr"] / 1e-4) / math.log(100)) for p in points]
    assert sorted(pieces) == list(range(8))


# What is not said here is `targets: {all: [all-linear]}`, `lr: [1, 2]` and `budget: {steps: 8}`.
WRONG = """
lr: 1e-3 => two
lr: [1e-3, -1] => s.yaml:1:12 (lr[1])
lr: {from: 1e-2, to: 1e-4} => 0.01
lr: {from: 1e-4, to: 1e-2} => trials
budget: {} => steps
budget: {step: 8} => 'steps'
config: {rank: 2} => 'rank'
targets: {'a b': [q]} => a b
"""


@pytest.mark.parametrize(("text", "name"), rows(WRONG))
def test_a_wrong_space_is_an_error_at_its_place(tmp_path: Path, text: str, name: str) -> None:
    path = tmp_path / "s.yaml"
    usual = ["targets: {all: [all-linear]}", "lr: [1, 2]", "budget: {steps: 8}"]
    key = text.partition(":")[0]
    path.write_text("\n".join([text, *(line for line in usual if line.partition(":")[0] != key)]))
    with refused(li.ConfigError, "s.yaml", name):
        li.classes.Space.from_yaml(path)


CANNOT: dict[str, tuple[dict[str, Any], dict[str, Any], list[str]]] = {
    "an iterator": (SPACE, {"train": iter(TRAIN)}, ["list_iterator"]),
    "rows that differ": (
        SPACE, {"held_out": [(torch.ones(2, 4), torch.ones(3, 2))]}, ["held_out[0]"],
    ),
    "NaN of the base": (SPACE, {"held_out": [*HELD_OUT, NAN]}, ["held_out[3]", "nan"]),
    "NaN in training": (SPACE, {"train": [*TRAIN[:3], NAN]}, ["nan", "step 3"]),
    "a loss that is no tensor": (SPACE, {"loss": lambda out, batch: 1.0}, ["float"]),
    "no match": (SPACE | {"targets": {"a": ["q_proj"]}}, {}, ["q_proj"]),
}  # fmt: skip


@pytest.mark.parametrize("case", CANNOT)
def test_what_cannot_be_searched_leaves_nothing_behind(case: str) -> None:
    model, (space, more, names) = net(), CANNOT[case]
    with refused(li.LoraInjectError, *names, model=model):
        searched(model, space, **more)


def test_a_search_runs_on_the_plain_base_only() -> None:
    model = li.inject(net(), {"rank": 1, "targets": ["0"]}, "mine")
    with refused(li.StateError, "'mine'", model=model):
        searched(model)
    assert li.adapters(model)["mine"].trainable


# ------------------------------------------------------------------------------- the command line


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    llama_folder(Path("base"))
    space = "{targets: {qv: ['[qv]_proj'], all: [all-linear]}, lr: [1e-3, 1e-2], rank: 2, "
    Path("space.yaml").write_text(space + "budget: {steps: 4}}")
    rows = [{"prompt": f"{i} and {i}", "completion": f" is {2 * i}"} for i in range(12)]
    rows += [{"text": f"{i} is a number"} for i in range(12)]
    Path("rows.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    return tmp_path


WORDS = ("search", "base", "space.yaml", "--data", "rows.jsonl", "--output", "out", "--batch", "4")


def test_the_command_writes_config_and_adapter(folder, run) -> None:
    done = run(*WORDS)
    assert done.code == 0, done.err
    assert "rung 1 of 1: 4 trials, 4 steps" in done.err
    config = li.Config.from_yaml("out/config.yaml")
    assert li.read_adapter("out/adapter").config["rank"] == config.rank
    trials = [line.split("  ")[0] for line in done.out.splitlines()[1:5]]
    assert sorted(trials) == ["all lr 0.001", "all lr 0.01", "qv lr 0.001", "qv lr 0.01"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"text": "a"}\n', "it has 1 row, and two batches take 8, one held out"),
        ('{"txt": "a"}\n', "line 1: it holds {'txt': str}. Write"),
    ],
)
def test_the_command_refuses_bad_rows(folder, run, text, message) -> None:
    Path("rows.jsonl").write_text(text)
    done = run(*WORDS)
    assert done.code == 1
    assert message in done.err
    assert not Path("out").exists()


def test_a_line_ends_at_a_newline_alone_and_rows_that_fill_no_batch_are_told(folder, run) -> None:
    rows = [{"text": f"{i} is a\u2028num\u2029b\u0085e\fr\x1c"} for i in range(15)]
    text = "".join(f"{json.dumps(row, ensure_ascii=False)}\n" for row in rows)
    Path("rows.jsonl").write_text(text, encoding="utf-8")
    done = run(*WORDS)
    assert done.code == 0, done.err
    assert "3 rows" in done.err
    Path("rows.txt").write_text("\r\n".join(row["text"] for row in rows[:7]), encoding="utf-8")
    done = run(*(word.replace("jsonl", "txt") for word in WORDS))
    assert (done.code, "it has 7 rows" in done.err) == (1, True), done.err
