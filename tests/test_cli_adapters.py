"""The commands on adapters' files: combine, truncate, diff, rename, convert."""

import json
import re
from dataclasses import replace

import pytest
import torch
from helpers.adapter_states import KIND_SPECS, dense, make_state, spoil
from helpers.checkpoints import save_checkpoint
from safetensors.torch import save_file

import lora_inject as li
from lora_inject.algebra import renaming
from lora_inject.algebra.combining import METHODS
from lora_inject.cli import given
from lora_inject.formats import FORMATS, diffusers, kohya
from lora_inject.formats.clients import CLIENTS
from lora_inject.formats.plain import DTYPES


@pytest.fixture
def files(tmp_path):
    """Two adapters of one base on disk, and as values."""
    one = make_state(KIND_SPECS["linear"], KIND_SPECS["conv1d"]) * 0.5
    two = -make_state(KIND_SPECS["linear"])
    return [(li.write_adapter(s, tmp_path / n), s) for n, s in (("one", one), ("two", two))]


def flat(text: str) -> str:
    return " ".join(text.replace("│", " ").split())


def test_combine_writes_the_weighted_sum(run, files, tmp_path):
    (one, a), (two, b) = files
    ran = run("combine", one, two, "-w", 2, "-w", 0.5, "-o", tmp_path / "sum", "--json")
    assert ran.code == 0, ran.err
    said = json.loads(ran.out)
    assert said == {"output": str(tmp_path / "sum"), "ranks": {"h.0.fc": 4, "h.0.c": 3}}
    written = li.read_adapter(tmp_path / "sum")
    for name, site in (a * 2 + b * 0.5).sites.items():
        assert (dense(written.sites[name]) - dense(site)).abs().max() < 1e-6
    again = ("combine", one, two, "-o", tmp_path / "sum", "--overwrite")
    ran = run(*again, "--method", "svd", "--rank", 1, "--dtype", "bfloat16")
    assert ran.out.endswith("sum: 2 sites, rank 1, 0 trained tensors, 23 parameters\n")
    assert li.read_adapter(tmp_path / "sum").sites["h.0.fc"].A.dtype == torch.bfloat16


@pytest.mark.parametrize(
    "command",
    ["combine {bad} {good} -o {out}", "combine {good} {bad} --method linear -o {out}",
     "diff {good} {bad}", "analyze {bad} {good}", "truncate {bad} --rank 1 -o {out}",
     "rename {bad} h=x -o {out}", "convert {bad} {out} --to native"],
)  # fmt: skip
def test_the_adapter_that_holds_nan_is_named_and_nothing_is_written(run, files, tmp_path, command):
    good, bad = (path for path, _ in files)
    spoil(bad, "fc.lora_B.weight", torch.nan, -torch.inf)
    ran = run(*command.format(good=good, bad=bad, out=tmp_path / "out").split())
    assert (ran.code, ran.out, list(tmp_path.glob("out*"))) == (1, "", [])
    said = "".join(ran.err.split())
    assert re.search(r"Bofsite'\w\.0\.fc':itholds2NaNorinfinitevalues", said)
    assert str(good) not in said
    assert str(bad) in said or "{good}" not in command
    assert "NaN or Inf in h.0.fc (2)" in flat(run("inspect", bad).out)
    shown = json.loads(run("inspect", bad, "--json").out, parse_constant=pytest.fail)
    assert (shown["n_nonfinite"], shown["sites"][0]["B"]["norm"]) == (2, None)


def test_truncate_says_the_error_of_each_site(run, files, tmp_path):
    one, a = files[0]
    ran = run("truncate", one, "-o", tmp_path / "cut", "--rank", 1)
    due = li.truncate(a, rank=1)
    rows = dict(line.split(maxsplit=1) for line in ran.out.splitlines()[1:3])
    for name, cut in due.sites.items():
        assert rows[name].split() == [str(cut.before), "1", f"{cut.error:.3g}"]
    assert li.diff(tmp_path / "cut", due.state).distance < 1e-6


def test_diff_compares_site_by_site(run, files):
    (one, a), (two, b) = files
    text = run("diff", one, two, "--all").out
    (row,) = (line.split() for line in text.splitlines() if line.startswith("h.0.c "))
    assert row[1:4] == ["3", "and", "0"]
    assert f"cosine {li.diff(a, b).cosine:.6f}, over all sites" in text
    due = json.loads(json.dumps(li.diff(a, b).to_dict()))
    assert json.loads(run("diff", one, two, "--json").out) == due
    assert run("diff", one, one).out.endswith(
        "equal in every bit; |one - two| = 0, cosine 1.000000, over all sites\n"
    )


def test_rename_writes_other_names(run, files, tmp_path):
    one, a = files[0]
    table = {"h.wte.weight": torch.ones(1, 4)}
    rows = replace(a, trained=table, rows={"h.wte.weight": (3,)})
    path = li.write_adapter(rows, tmp_path / "rows")
    ran = run("rename", path, "h=model.layers", "fc=mlp", "-o", tmp_path / "new", "--json")
    names = {"h.0.fc": "model.layers.0.mlp", "h.0.c": "model.layers.0.c"}
    names["h.wte.weight"] = "model.layers.wte.weight"
    assert json.loads(ran.out)["names"] == names
    written = li.read_adapter(tmp_path / "new")
    assert [*written.sites, *written.rows] == [*names.values()]
    shorter = run("rename", one, r"h\.0=", "-o", tmp_path / "short")  # it removes segments
    assert "its names are now 'fc', 'c'" in shorter.out


def test_a_regex_that_would_take_forever_is_refused(run, files, tmp_path, monkeypatch):
    monkeypatch.setattr(renaming, "MATCH_SECONDS", 0.05)
    run("rename", files[0][0], "h=model.decoder.layers.self_attention", "-o", tmp_path / "long")
    ran = run("rename", tmp_path / "long", r"(\w|\w\w|.)*\1\1[^\w.]=y", "-o", tmp_path / "x")
    assert ran.code == 1
    assert "it took more than 0.05 s" in ran.err


def test_a_file_of_a_pipeline_is_read_part_by_part(run, tmp_path):
    path = tmp_path / "both.safetensors"
    pairs = {"unet.a.lora_A": (2, 4), "unet.a.lora_B": (6, 2)}
    pairs |= {key.replace("unet", "text_encoder"): shape for key, shape in pairs.items()}
    save_file({f"{key}.weight": torch.ones(shape) for key, shape in pairs.items()}, path)
    for args in (("inspect", path), ("convert", path, tmp_path / "out", "--to", "peft")):
        ran = run(*args)
        assert (ran.code, ran.out) == (1, "")
        assert "onto its own model: --from-component text_encoder." in ran.err
        assert run(*args, "--from-component", "unet").code == 0
    assert run("inspect", tmp_path / "out", "--from-component", "unet").code == 2
    to = ("convert", tmp_path / "out", tmp_path / "unet.safetensors", "--to", "kohya")
    ran = run(*to)
    assert (ran.code, "--component" in ran.err) == (2, True)
    assert "kohya: " not in ran.err, "no losses of a file that is not written"
    assert run(*to, "--component", "unet").code == 0


def test_what_is_lost_is_said_of_what_was_written_only(run, tmp_path):
    spec = replace(KIND_SPECS["linear"], rank=2, alpha=3.0, dropout=0.5)
    path = li.write_adapter(make_state(spec), tmp_path / "a")
    ran = run("convert", path, tmp_path / "b", "--to", "torchtune")  # it asks for the base
    assert (ran.code, "left out" in ran.err, "Python" in ran.err) == (1, False, False)
    assert "--base BASE." in flat(ran.err)
    ran = run("convert", path, tmp_path / "c", "--to", "portable")
    assert (ran.code, "dropout" in ran.err) == (0, True)


# ----------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("args", "words"),
    [
        ("combine {one} {one} -o {one}", "exists already"),
        ("extract {one} {one} --rank 1 -o {one}", "exists already"),
        ("convert {one} {one} --to peft", "exists already"),
        ("merge {base} {one} -o {one}", "it is not empty"),
        ("rename {one} x=y -o {out}", "rename 'x': it occurs in no name"),
        ("combine {one} {two} -o {out} --method ties", "density is missing"),
        ("merge {one} {base} -o {out}", "it is an adapter, and a model is due here"),
        ("inspect {base}", "it is a model, and an adapter is due here"),
        ("inspect {out}", "there is no such file or directory"),
    ],
)
def test_what_is_refused_says_why_and_leaves_the_files_alone(run, files, tmp_path, args, words):
    base = save_checkpoint(tmp_path / "base", {"fc.weight": torch.ones(2, 2)}, config={})
    (one, value), (two, _) = files
    ran = run(*args.format(one=one, two=two, base=base, out=tmp_path / "out").split())
    assert (ran.code, ran.out, (tmp_path / "out").exists()) == (1, "", False)
    assert words in flat(ran.err)
    assert li.read_adapter(one) == value


@pytest.mark.parametrize(
    ("args", "words"),
    [
        ("truncate one -o out", "--rank"),
        ("rename one nothing -o out", "nothing"),
        ("check one --for all", "'all' is not known. Known are vllm"),
        ("inspect one --format pefd", "'pefd' is not known, did you mean peft?"),
        ("combine one two -o out --method tis", "dare_ties_svd"),
        ("combine one two -o out --density 2", "give a number, 0 to 1"),
        ("combine one two -o out --rank 0", "give a whole number, at least 1"),
        ("combine one two -o out -w 1", "1 weight for 2 adapters"),
        ("combine one two -o out -w 1 -w 0", "0 is not a weight"),
        ("merge one two", "--output"),
        ("merge one two -o out --min-kept 1.5", "--min-kept"),
        ("merge one two -o out --rename inner", "inner"),
        ("inspect one.safetensors --prefer config", "--prefer"),
        ("analyze one --any-base", "--base"),
    ],
)
def test_a_wrong_value_is_wrong_usage_and_the_right_ones_are_named(
    run, files, tmp_path, monkeypatch, args, words
):
    monkeypatch.chdir(tmp_path)
    ran = run(*args.split())
    assert (ran.code, (tmp_path / "out").exists()) == (2, False)
    assert words in flat(ran.err)


def test_the_values_that_the_command_line_knows_are_those_of_the_package(run):
    assert set(given.FORMATS) == set(FORMATS)
    assert set(given.CLIENTS) == set(CLIENTS)
    assert set(given.DTYPES) == set(DTYPES)
    assert set(given.COMPONENTS) == {*kohya.COMPONENTS, *diffusers.COMPONENTS, ""}
    assert set(given.METHODS) == set(METHODS)
    text = run("convert", "--help").out
    assert all(name in text for name in FORMATS)
