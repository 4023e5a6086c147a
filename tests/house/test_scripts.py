"""Programs of scripts/, as far as whoever runs one would miss it: data, loss, resuming, output."""

import itertools
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from operator import attrgetter
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from conftest import script
from helpers.forks import Forks
from helpers.models import tiny_llama
from hypothesis import given
from hypothesis import strategies as st

REPO = Path(__file__).parents[2]

with mock.patch.dict(os.environ):  # which these set, for programs of their own
    bench = script("bench")
    reproduce = script("reproduction.__main__").main
    sentences = script("reproduction.sentences")
    directions = script("reproduction.directions")
pairs = script("data.pairs")

# ------------------------------------------------------------------------------- the environment


@pytest.fixture
def shell(tmp_path: Path) -> Any:
    """Run a command in a shell that has sourced scripts/environment.sh of a bare checkout."""
    shutil.copytree(REPO / "scripts", tmp_path / "scripts")
    shutil.copy(REPO / "pyproject.toml", tmp_path)
    variables = {**os.environ, "PYTHON": sys.executable, "PYTHONDONTWRITEBYTECODE": "1"}
    how = {"cwd": tmp_path, "capture_output": True, "text": True, "env": variables}

    def shell(command: str) -> subprocess.CompletedProcess[str]:
        words = ["bash", "-euo", "pipefail", "-c", f"source scripts/environment.sh; {command}"]
        return subprocess.run(words, check=False, **how)

    return shell


def test_a_folder_that_the_scripts_did_not_make_stays(shell: Any, tmp_path: Path) -> None:
    (tmp_path / ".venv").mkdir()
    (tmp_path / ".venv" / "mine").touch()
    done = shell("make_environment")
    assert done.returncode == 1
    assert ".venv is in the way" in done.stderr
    assert (tmp_path / ".venv" / "mine").exists()


FILL = 'fill() { echo "${@:2}"; mkdir -p "$venv"; }; '


def test_an_environment_is_made_once_for_the_same_versions(shell: Any, tmp_path: Path) -> None:
    made = [shell(FILL + "make_environment").stdout for _ in range(2)]
    assert "--constraint" in made[0]
    assert made[1] == ""
    with (tmp_path / "scripts" / "constraints.txt").open("a") as file:
        file.write("another==1.0\n")
    assert "--constraint" in shell(FILL + "make_environment").stdout


def test_a_set_is_made_with_its_versions_and_is_a_job_of_ci(shell: Any) -> None:
    assert "torch==2.6.0 transformers==4.57.6" in shell(f"{FILL} make_environment 2.6").stdout
    lines = (REPO / "scripts" / "sets.txt").read_text().splitlines()
    names = [line.split()[0] for line in lines if not line.startswith("#")]
    done = shell(f"{FILL} make_environment 1.0")
    assert done.returncode == 1
    assert f"There are {' '.join(names)}." in done.stderr
    workflow = (REPO / ".github" / "workflows" / "ci.yml").read_text()
    assert f"set: {json.dumps(names)}" in workflow


# ------------------------------------------------------------------------- data and its objective

some_pairs = st.lists(
    st.builds(
        pairs.Pair,
        st.integers(0, 30).map("module{}".format),
        st.sampled_from([f"{c}f{i}" for i in range(40) for c in ("", "A.", "B.")]),
        st.integers(0, 60).map("code {}".format),
        st.integers(0, 60).map("Summary {}.".format),
    ),
    max_size=80,
)


def bare_name(pair: Any) -> str:
    return pair.name.split(".")[-1]


@given(some_pairs, st.randoms())
def test_what_is_held_out_shares_nothing_with_what_is_trained(some: Any, random: Any) -> None:
    split = pairs.split_by_module(some)
    for of in (*map(attrgetter, ("module", "code", "summary")), bare_name):
        assert {*map(of, split.train)}.isdisjoint(map(of, split.held_out)), of
    assert {*split.train, *split.held_out} <= {*some}
    unique = [*{(p.module, p.name): p for p in some}.values()]  # as within one installation
    mixed = random.sample(unique, len(unique))
    assert pairs.split_by_module(mixed) == pairs.split_by_module(unique), "no order matters"


@pytest.mark.parametrize("pad", [0, 39])
def test_the_loss_of_pairs_is_eq_2_one_token_at_a_time(pad: int) -> None:
    """Each pair alone, no padding, no batch: log p(y_t | x, y_<t) from a forward of its own."""
    texts = (([5, 6, 7, 8, 9], 3), ([11, 12, 13, 14, 15, 16, 17, 18], 4), ([21, 22], 1))
    batch = [pairs.Example(tokens, n_prompt) for tokens, n_prompt in texts]
    decoder = tiny_llama(vocab_size=40, tie_word_embeddings=True).double().eval()
    wanted = [
        decoder(torch.tensor([tokens[:t]])).logits[0, -1].log_softmax(-1)[tokens[t]]
        for tokens, n_prompt in texts
        for t in range(n_prompt, len(tokens))
    ]
    log_probs = pairs.target_log_probs(decoder, *pairs.collate(batch, pad=pad))
    torch.testing.assert_close(log_probs, torch.stack(wanted).float(), rtol=1e-6, atol=1e-6)


# ------------------------------------------------------------- the paper's runs, and measurements


def records(folder: Path) -> dict[str, int]:
    """Names of the records there are, and when each was written."""
    files = (folder / "records").rglob("*.json")
    return {str(path.relative_to(folder)): path.stat().st_mtime_ns for path in files}


def run_reproduction(argv: list[str]) -> None:
    sys.exit(reproduce(argv))


@pytest.mark.zoo
def test_the_reproduction_survives_a_kill_and_prints_all_claims(
    tmp_path: Path, forks: Forks, capsys: pytest.CaptureFixture[str]
) -> None:
    """On tiny models and made-up sentences; what it finds is never tested."""
    pytest.importorskip("matplotlib")
    words = ["--quick", "--folder", str(tmp_path)]
    fork = forks.start(run_reproduction, words)
    while len(records(tmp_path)) < 3:
        time.sleep(0.01)
    os.kill(fork.pid, signal.SIGKILL)
    fork.wait()
    kept = records(tmp_path)
    assert all("result" in json.loads((tmp_path / name).read_text()) for name in kept)
    assert reproduce(words) == 0
    assert kept.items() <= records(tmp_path).items(), "none of them was run again"
    assert list(tmp_path.rglob("*.partial")) == []
    claims = capsys.readouterr().out.partition("## All claims")[2].strip().splitlines()
    page = (REPO / "docs" / "evidence" / "reproduction.md").read_text()
    frozen = page.partition("## All claims")[2].partition("\n## ")[0].strip().splitlines()
    assert [line.split(" | ")[0] for line in claims] == [line.split(" | ")[0] for line in frozen]


def test_a_gap_is_paired_by_row_and_has_the_error_of_rows_and_seeds() -> None:
    def scores(*right: list[int]) -> Any:
        return sentences.Scores("full fine-tuning", 0, torch.tensor(right, dtype=torch.float64))

    gap = sentences.gap(scores([1, 1, 1, 1], [1, 1, 1, 0]), scores([1, 1, 0, 0], [1, 0, 1, 0]))
    assert gap.difference == pytest.approx((2 / 4 + 1 / 4) / 2)
    rows = torch.tensor([0.0, 0.5, 0.5, 0.5])  # mean over seeds of one minus other
    of_seeds = torch.tensor([0.5, 0.25]).std() / 2**0.5
    assert gap.error == pytest.approx(math.hypot(rows.std() / 4**0.5, of_seeds))


def test_phi_is_equation_4_as_it_is_written() -> None:
    one, other = (torch.randn(rank, 9, dtype=torch.float64) for rank in (4, 6))
    found = directions.similarity(*map(directions.right_directions, (one, other)))
    assert found.shape == (4, 6)
    tops = [np.linalg.svd(matrix.numpy())[2].T for matrix in (one, other)]
    for i, j in itertools.product(range(1, 5), range(1, 7)):
        both = tops[0][:, :i].T @ tops[1][:, :j]
        wanted = np.linalg.norm(both) ** 2 / min(i, j)
        assert float(found[i - 1, j - 1]) == pytest.approx(wanted, abs=1e-10)
    assert directions.right_directions(torch.zeros(2, 9)).shape == (9, 0)


def benchmark(*words: object) -> None:
    with mock.patch("sys.argv", ["bench", "--quick", *map(str, words)]):
        bench.main()


@pytest.mark.zoo  # a minute
@pytest.mark.filterwarnings("default")  # torch's and PEFT's own
def test_a_benchmark_keeps_earlier_rows_and_runs_every_row(tmp_path: Path) -> None:
    path = tmp_path / "results.json"
    benchmark("saved-bytes", "--json", path)
    lines = json.loads(path.read_text())["rows"]["saved-bytes"]["lines"]
    kept = {(line["case"], line["variant"]): line["mid"] for line in lines}
    assert 0 < kept["Llama tiny bf16", "lora_inject"] < kept["Llama tiny bf16", "PEFT"]
    others = [name for name in bench.ROWS if name not in ("saved-bytes", "launches", "compile")]
    benchmark(*others, "--json", path)
    assert [*json.loads(path.read_text())["rows"]] == ["saved-bytes", *others]


def test_measurements_of_another_machine_are_not_joined_into_one_file(tmp_path: Path) -> None:
    path = tmp_path / "results.json"
    path.write_text('{"machine": {"processor": "another"}, "rows": {}}')
    with pytest.raises(SystemExit, match="was measured on another"):
        benchmark("switch", "--json", path)


def test_the_picture_and_the_table_of_the_page_are_of_its_numbers(capsys: Any) -> None:
    folder = REPO / "docs" / "evidence"
    benchmark("none", "--json", folder / "performance.json")
    assert capsys.readouterr().out.strip() in (folder / "performance.md").read_text()
