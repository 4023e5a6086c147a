"""The commands on adapters' files: combine, truncate, diff, rename."""

import json
import os
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from helpers.adapter_states import KIND_SPECS, dense, make_state, spoil
from helpers.checkpoints import save_checkpoint
from helpers.forks import program
from safetensors.torch import save_file

import lora_inject as li
from lora_inject.algebra import renaming
from lora_inject.core.adapter.site_state import SiteState


@pytest.fixture
def files(tmp_path):
    """Two adapters of one base on disk, and as values."""
    one = make_state(KIND_SPECS["linear"], KIND_SPECS["conv1d"]) * 0.5
    two = -make_state(KIND_SPECS["linear"])
    return [(li.write_adapter(s, tmp_path / n), s) for n, s in (("one", one), ("two", two))]


def test_combine_writes_the_weighted_sum(run, files, tmp_path):
    (one, a), (two, b) = files
    found = run("combine", one, two, "-w", 2, "-w", 0.5, "-o", tmp_path / "sum", "--json")
    assert found.code == 0, found.err
    said = json.loads(found.out)
    assert said == {"output": str(tmp_path / "sum"), "ranks": {"h.0.fc": 4, "h.0.c": 3}}
    written = li.read_adapter(tmp_path / "sum")
    for name, site in (a * 2 + b * 0.5).sites.items():
        assert (dense(written.sites[name]) - dense(site)).abs().max() < 1e-6

    again = ("combine", one, two, "-o", tmp_path / "sum")
    found = run(*again)
    assert (found.code, found.out) == (1, "")
    found = run(*again, "--overwrite", "--method", "svd", "--rank", 1, "--dtype", "bfloat16")
    assert found.out.endswith("sum: 2 sites, rank 1, 0 trained tensors, 23 parameters\n")
    assert li.read_adapter(tmp_path / "sum").sites["h.0.fc"].A.dtype == torch.bfloat16
    found = run("combine", one, two, "-o", tmp_path / "x", "--method", "ties")
    assert (found.code, (tmp_path / "x").exists()) == (1, False)
    assert "density is missing" in found.err


def test_combine_adds_what_was_trained_after_the_first_was_merged(run, tmp_path):
    net = torch.nn.Sequential(torch.nn.Linear(6, 8, dtype=torch.float64))
    x, paths = torch.randn(5, 6, dtype=torch.float64), []
    plain = net[0].weight.detach().clone()
    for name in ("first", "second"):
        li.inject(net, {"rank": 2, "targets": ["0"]})
        for parameter in li.adapter_parameters(net).values():
            torch.nn.init.normal_(parameter)
        paths.append(li.save_adapter(net, tmp_path / name, format="native"))
        li.merge(net, eject=True)
    due = net(x)
    refused = run("combine", *paths, "-o", tmp_path / "both", "--format", "native")
    assert (refused.code, (tmp_path / "both").exists()) == (1, False)
    assert "combine them with --any-base" in " ".join(refused.err.split())
    run("combine", *paths, "-o", tmp_path / "both", "--format", "native", "--any-base")
    net[0].weight.data.copy_(plain)
    li.load_adapter(net, tmp_path / "both.safetensors")
    torch.testing.assert_close(net(x), due)


@pytest.mark.parametrize("bad", [0, 1])
@pytest.mark.parametrize("command", ["combine", "combine --method linear", "diff", "analyze"])
def test_the_one_of_two_adapters_that_holds_nan_is_named(run, files, tmp_path, command, bad):
    paths = [path for path, _ in files]
    spoil(paths[bad], "fc.lora_B.weight", torch.nan, -torch.inf)
    verb, *options = command.split()
    options += ["-o", tmp_path / "sum"] * (verb == "combine")
    found = run(verb, *paths, *options)
    assert (found.code, found.out, (tmp_path / "sum").exists()) == (1, "", False)
    said = "".join(found.err.split())
    assert "Bofsite'h.0.fc':itholds2NaNorinfinitevalues" in said
    assert (str(paths[bad]) in said, str(paths[1 - bad]) in said) == (True, False)


@pytest.mark.parametrize("command", ["truncate {} --rank 1", "rename {} h=x", "convert {}"])
def test_an_adapter_with_nan_is_shown_and_not_written(run, files, tmp_path, command):
    one, out = spoil(files[0][0], "fc.lora_A.weight", torch.inf), tmp_path / "out.safetensors"
    verb, *rest = command.format(one).split()
    found = run(verb, *rest, *([out, "--to", "native"] if verb == "convert" else ["-o", out]))
    assert (found.code, found.out, out.exists()) == (1, "", False)
    assert "A of site" in found.err
    assert "NaN or Inf in h.0.fc (1)" in " ".join(run("inspect", one).out.split())


def test_truncate_says_the_error_of_each_site(run, files, tmp_path):
    one, a = files[0]
    found = run("truncate", one, "-o", tmp_path / "cut", "--rank", 1)
    due = li.truncate(a, rank=1)
    rows = dict(line.split(maxsplit=1) for line in found.out.splitlines()[1:3])
    for name, cut in due.sites.items():
        assert rows[name].split() == [str(cut.before), "1", f"{cut.error:.3g}"]
    assert li.read_adapter(tmp_path / "cut").distance(due.state) < 1e-6
    found = run("truncate", one, "-o", tmp_path / "cut2", "--energy", 0.5, "--json")
    sites = json.loads(found.out)["sites"]
    assert sites == {n: c._asdict() for n, c in li.truncate(a, energy=0.5).sites.items()}
    assert run("truncate", one, "-o", tmp_path / "cut3").code == 2


def test_diff_compares_site_by_site(run, files):
    (one, a), (two, b) = files
    found = run("diff", one, two, "--all")
    assert found.out.splitlines()[0].split() == [
        *("site", "ranks", "|one|", "|two|", "|one", "-", "two|", "cosine")
    ]
    (row,) = (line.split() for line in found.out.splitlines() if line.startswith("h.0.c "))
    assert row[1:4] == ["3", "and", "0"]
    assert f"cosine {a.cosine(b):.6f}, over all sites" in found.out
    assert json.loads(run("diff", one, two, "--json").out) == json.loads(
        json.dumps(li.diff(a, b).to_dict())
    )
    assert run("diff", one, one).out.endswith(
        "equal in every bit; |one - two| = 0, cosine 1.000000, over all sites\n"
    )


@pytest.mark.parametrize(
    "args",
    ["combine x x -o", "truncate x --rank 1 -o", "rename x a=b -o", "extract x x --rank 1 -o",
     "convert x --to peft", "merge BASE x -o"],
)  # fmt: skip
def test_an_output_that_exists_is_noticed_before_an_adapter_is_read(run, files, tmp_path, args):
    save_checkpoint(tmp_path / "base", {"fc.weight": torch.ones(2, 2)})
    (command, *rest), path = args.replace("BASE", str(tmp_path / "base")).split(), files[0][0]
    if command == "convert":
        rest.insert(1, path)
        found = run(command, *rest)
    else:
        found = run(command, *rest, path)
    assert found.code == 1
    assert "it is not empty" in found.err if command == "merge" else "exists already" in found.err
    assert li.read_adapter(path) == files[0][1]


def program_on_a_full_disk(*args):
    os.dup2(os.open("/dev/full", os.O_WRONLY), 1)
    program(*args)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="has no disk that is always full")
def test_a_full_disk_on_stdout_does_not_deny_what_was_written(files, tmp_path, forks):
    done = forks.start(program_on_a_full_disk, "combine", files[0][0], "-o", tmp_path / "sum")
    assert done.wait() == 1
    assert "No space left on device. The command has done its work" in done.err()
    assert li.read_adapter(tmp_path / "sum").sites


def test_rename_writes_other_names(run, files, tmp_path):
    one = files[0][0]
    found = run("rename", one, "h=model.layers", "fc=mlp", "-o", tmp_path / "new", "--json")
    assert json.loads(found.out)["names"] == {
        "h.0.fc": "model.layers.0.mlp",
        "h.0.c": "model.layers.0.c",
    }
    assert list(li.read_adapter(tmp_path / "new").sites) == [
        "model.layers.0.mlp",
        "model.layers.0.c",
    ]
    shorter = run("rename", one, r"h\.0=", "-o", tmp_path / "short")
    assert "its names are now 'fc', 'c'" in shorter.out  # an empty one removes segments: it is told
    rows = replace(
        files[0][1], trained={"h.wte.weight": torch.ones(1, 4)}, rows={"h.wte.weight": (3,)}
    )
    li.write_adapter(rows, tmp_path / "rows")
    found = run("rename", tmp_path / "rows", "h=m", "-o", tmp_path / "r", "--json")
    assert json.loads(found.out)["names"]["h.wte.weight"] == "m.wte.weight"
    assert run("rename", one, "nothing", "-o", tmp_path / "x").code == 2
    found = run("rename", one, "x=y", "-o", tmp_path / "x")
    assert "rename 'x': it occurs in no name" in found.err


def test_a_regex_that_would_take_forever_is_refused(run, files, tmp_path, monkeypatch):
    monkeypatch.setattr(renaming, "MATCH_SECONDS", 0.05)
    run("rename", files[0][0], "h=model.decoder.layers.self_attention", "-o", tmp_path / "long")
    found = run("rename", tmp_path / "long", r"(\w|\w\w|.)*\1\1[^\w.]=y", "-o", tmp_path / "x")
    assert found.code == 1
    assert "it took more than 0.05 s" in found.err


def test_a_file_of_a_pipeline_is_read_part_by_part(run, tmp_path):
    path = tmp_path / "both.safetensors"
    pairs = {"unet.a.lora_A": (2, 4), "unet.a.lora_B": (6, 2)}
    pairs |= {key.replace("unet", "text_encoder"): shape for key, shape in pairs.items()}
    save_file({f"{key}.weight": torch.ones(shape) for key, shape in pairs.items()}, path)
    for args in (("inspect", path), ("convert", path, tmp_path / "out", "--to", "peft")):
        found = run(*args)
        assert (found.code, found.out) == (1, "")
        assert "onto its own model: --from-component text_encoder." in found.err
        assert run(*args, "--from-component", "unet").code == 0
    assert run("inspect", tmp_path / "out", "--from-component", "unet").code == 2
    to = tmp_path / "unet.safetensors"
    found = run("convert", tmp_path / "out", to, "--to", "kohya")
    assert found.code == 2
    assert "kohya: " not in found.err, "no losses of a file that is not written"
    assert "--component" in found.err
    assert run("convert", tmp_path / "out", to, "--to", "kohya", "--component", "unet").code == 0


def test_wrong_values_are_wrong_usage_and_the_right_ones_are_named(run, files, tmp_path):
    from lora_inject.algebra.combining import METHODS
    from lora_inject.cli import given
    from lora_inject.formats import diffusers, kohya
    from lora_inject.formats.clients import CLIENTS
    from lora_inject.formats.plain import DTYPES

    assert set(given.CLIENTS) == set(CLIENTS)
    assert set(given.DTYPES) == set(DTYPES)
    assert set(given.COMPONENTS) == {*kohya.COMPONENTS, *diffusers.COMPONENTS, ""}
    assert set(given.METHODS) == set(METHODS)
    path, out = files[0][0], tmp_path / "x"
    for words, known in (
        (("check", path, "--for", "all"), "llama.cpp"),
        (("convert", path, out, "--to", "portable", "--dtype", "fp16"), "float16"),
        (("combine", path, path, "-o", out, "--method", "tis"), "dare_ties_svd"),
        (("combine", path, path, "-o", out, "--majority-sign", "most"), "frequency"),
        (("combine", path, path, "-o", out, "--prefer", "both"), "metadata"),
        (("combine", path, path, "-o", out, "--dtype", "floats16"), "did you mean float16?"),
        (("inspect", path, "--format", "pefd"), "did you mean peft?"),
        (("convert", path, out, "--to", "kohya", "--component", "unett"), "did you mean unet?"),
        (("advise", path, "--budget", "9k", "--for", "sfd"), "did you mean sft?"),
    ):
        found = run(*words)
        said = " ".join(found.err.replace("│", " ").split())
        assert (found.code, out.exists()) == (2, False)
        assert "is not known" in said
        assert known in said


def test_a_number_out_of_its_bounds_is_said_as_the_help_says_them(run, files, tmp_path):
    path, out = files[0][0], tmp_path / "x"
    for words, said in (
        (("combine", path, path, "-o", out, "--density", "2"), "give a number, 0 to 1"),
        (("combine", path, path, "-o", out, "--rank", "0"), "give a whole number, at least 1"),
        (("combine", path, path, "-o", out, "--rank", "x"), "give a whole number, at least 1"),
        (("combine", path, path, "-o", out, "--seed", "x"), "give a whole number"),
        (("combine", path, path, "-o", out, "-w", "x"), "give a number"),
        (("combine", path, path, "-o", out, "-w", "1"), "1 weight for 2 adapters"),
        (("combine", path, path, "-o", out, "-w", "1", "-w", "0"), "0 is not a weight"),
        (("verify-served", "url", path, "--timeout", "0"), "give a number, at least 0.1"),
    ):
        found = run(*words)
        shown = " ".join(found.err.replace("│", " ").split())
        assert (found.code, out.exists()) == (2, False)
        assert shown.endswith(said) or f"{said};" in shown
        bounds = said.partition(", ")[2]
        assert bounds in " ".join(run(words[0], "--help").out.split())


def test_a_command_does_not_speak_of_arguments_of_functions(run, tmp_path):
    path = li.write_adapter(make_state(KIND_SPECS["linear"]), tmp_path / "a")
    found = run("convert", path, tmp_path / "b", "--to", "torchtune")
    assert found.code == 1
    assert "--base BASE." in " ".join(found.err.split())
    assert "Python" not in found.err


def test_a_group_of_sites_that_were_cut_differently_shows_each_rank(run, tmp_path):
    spec = replace(KIND_SPECS["linear"], rank=2)
    sites = {}
    for i, values in enumerate(([1.0, 1.0], [1.0, 0.01])):
        A = torch.eye(2, spec.in_features)
        B = torch.eye(spec.out_features, 2) * torch.tensor(values)
        sites[f"h.{i}.fc"] = SiteState(replace(spec, name=f"h.{i}.fc"), A, B)
    path = li.write_adapter(li.AdapterState(sites), tmp_path / "a")
    found = run("truncate", path, "-o", tmp_path / "b", "--energy", "0.99")
    assert re.search(r"h\.\{0\.\.1\}\.fc x2 +2 +1 to 2 ", found.out), found.out


def test_formats_are_listed_and_another_one_is_wrong_usage(run, files, tmp_path):
    from lora_inject.cli import given
    from lora_inject.formats import FORMATS

    assert set(given.FORMATS) == set(FORMATS)
    path = files[0][0]
    for words in (
        ("convert", path, tmp_path / "x", "--to"),
        ("truncate", path, "--rank", 1, "-o", tmp_path / "x", "--format"),
    ):
        assert all(name in run(words[0], "--help").out for name in FORMATS)
        found = run(*words, "pefd")
        said = " ".join(found.err.replace("│", " ").split())
        assert (found.code, (tmp_path / "x").exists()) == (2, False)
        assert "'pefd' is not known, did you mean peft?" in said
        assert "litgpt" in said


def test_what_is_lost_is_said_of_what_was_written_only(run, tmp_path):
    spec = replace(KIND_SPECS["linear"], rank=2, alpha=3.0, dropout=0.5)
    path = li.write_adapter(make_state(spec), tmp_path / "a")
    found = run("convert", path, tmp_path / "b", "--to", "torchtune")  # it asks for the base
    assert (found.code, "left out" in found.err) == (1, False)
    found = run("convert", path, tmp_path / "c", "--to", "portable")
    assert (found.code, "dropout" in found.err) == (0, True)


def test_a_base_and_an_adapter_that_changed_places_are_told_apart(run, files, tmp_path):
    base, adapter = tmp_path / "base", files[0][0]
    save_checkpoint(base, {"fc.weight": torch.ones(2, 2)})
    (base / "config.json").write_text("{}")
    found = run("merge", adapter, base, "-o", tmp_path / "out")
    assert found.code == 1
    assert "it is an adapter, and a model is due here" in " ".join(found.err.split())
    for words in (("inspect", base), ("analyze", base), ("diff", base, adapter)):
        found = run(*words)
        assert found.code == 1
        assert "it is a model, and an adapter is due here" in " ".join(found.err.split())
