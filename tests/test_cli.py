"""The command line: what each command prints, where, and with which exit code.

Numbers are compared with a dense float64 reference made here from the files themselves,
never with what the package says elsewhere.
"""

import json
import math
import os
import re
import runpy
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
import typer
from conftest import fill
from helpers.adapter_states import spoil
from helpers.forks import program
from helpers.versions import needs_transformers_5
from safetensors.torch import load_file, save_file
from transformers import GPT2Config, GPT2LMHeadModel, MixtralConfig, MixtralForCausalLM

import lora_inject as li
from lora_inject.checkpoint import VerifyReport, merge_files
from lora_inject.cli import app, show
from lora_inject.cli.program import EXAMPLES
from lora_inject.core.spec import schema
from lora_inject.core.spec.schema import json_schema
from lora_inject.core.spec.site_tables import Listing
from lora_inject.formats import read_adapter

CONFIG = """\
rank: 2
alpha: 4
targets:
  - match: 'attn\\.c_attn'
    slices: [q, k, v]
    adapt: [q, v]
  - 'mlp\\.c_fc'
"""
TINY = {"n_layer": 2, "n_embd": 16, "n_head": 2, "n_positions": 8, "vocab_size": 40}
TINY |= {"bos_token_id": 0, "eos_token_id": 0}


def write_config(folder: Path, text: str = CONFIG) -> Path:
    path = folder / "lora.yaml"
    path.write_text(text)
    return path


def tiny_gpt2(dtype: torch.dtype = torch.float32) -> GPT2LMHeadModel:
    torch.manual_seed(0)
    return GPT2LMHeadModel(GPT2Config(**TINY)).to(dtype).eval()


def add_adapter(model: torch.nn.Module, config: str, name: str, std: float) -> None:
    fill(li.inject(model, li.Config.from_text(config), name), name, std)


@dataclass(frozen=True)
class Files:
    """A base, two adapters of it, and a config, on disk."""

    base: Path
    sharded: Path
    bf16: Path
    one: Path
    two: Path
    config: Path


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> Files:
    folder = tmp_path_factory.mktemp("cli")
    model = tiny_gpt2()
    model.save_pretrained(folder / "base")
    model.save_pretrained(folder / "sharded", max_shard_size="8KB")
    tiny_gpt2(torch.bfloat16).save_pretrained(folder / "bf16")
    add_adapter(model, CONFIG, "one", 0.2)
    add_adapter(model, "{rank: 1, alpha: 3, scaling: rslora, targets: ['c_fc']}", "two", 0.1)
    li.save_adapter(model, folder / "one", "one")
    li.save_adapter(model, folder / "two", "two")
    config = write_config(folder)
    names = ("base", "sharded", "bf16", "one", "two")
    return Files(*(folder / name for name in names), config)


def dense(adapter: Path) -> dict[str, torch.Tensor]:
    """Delta of each weight, float64, from the A and B of a PEFT folder (rank and alpha by hand)."""
    tensors = load_file(adapter / "adapter_model.safetensors")
    rank_of_file = {"one": {"c_attn": 4, "c_fc": 2}, "two": {"c_fc": 1}}[adapter.name]
    scale = {"one": 2.0, "two": 3.0}[adapter.name]
    deltas = {}
    for key, A in tensors.items():
        if ".lora_A." not in key:
            continue
        B = tensors[key.replace(".lora_A.", ".lora_B.")]
        name = key.removeprefix("base_model.model.").split(".lora_A")[0]
        assert A.shape[0] == rank_of_file[name.rpartition(".")[2]]
        deltas[f"{name}.weight"] = scale * (B.double() @ A.double()).T  # Conv1D: (in, out)
    return deltas


def unwrapped(text: str) -> str:
    """Sentences in one line each."""
    return " ".join(text.split())


# --------------------------------------------------------------------------------------------- plan


def test_plan_prints_the_table(run, files):
    found = run("plan", files.config, files.base)
    assert found.code == 0
    assert found.err == "planned on GPT2LMHeadModel, built from its config.json\n"
    assert found.out.splitlines() == [
        r"rule 1 'attn\.c_attn': rank 2, scale 4/2, kaiming",
        "  transformer.h.{0..1}.attn.c_attn  x2  conv1d  16 -> 48 [q, v]  128 each  256",
        r"rule 2 'mlp\.c_fc': rank 2, scale 4/2, kaiming",
        "  transformer.h.{0..1}.mlp.c_fc  x2  conv1d  16 -> 64  160 each  320",
        "4 sites: 576 in A and B = 576 trainable, 7.83 % of 7,360; 0.0 MB in float32",
    ]


def test_plan_lists_each_site_on_request(run, files):
    found = run("plan", files.config, files.base, "--all")
    assert found.out.splitlines()[1:3] == [
        "  transformer.h.0.attn.c_attn  x1  conv1d  16 -> 48 [q, v]  128 each  128",
        "  transformer.h.1.attn.c_attn  x1  conv1d  16 -> 48 [q, v]  128 each  128",
    ]


def test_names_of_the_hub_are_found_in_its_local_cache(run, files, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    repo = tmp_path / "hub" / "models--user--tiny"
    shutil.copytree(files.base, repo / "snapshots" / "abc")
    (repo / "refs").mkdir()
    (repo / "refs" / "main").write_text("abc")
    due = run("plan", files.config, files.base, "--json").out
    assert run("plan", files.config, "user/tiny", "--json").out == due
    assert run("merge", "user/tiny", files.one, "-o", tmp_path / "out").code == 0
    for command in ("inspect", "analyze"):
        due = run(command, files.one, "--base", files.base).out
        assert run(command, files.one, "--base", "user/tiny").out == due
    rows = tmp_path / "rows.txt"
    rows.write_text("one\n")
    for words in (
        ("plan", files.config, "gpt3"),
        ("merge", "gpt3", files.one, "-o", "x"),
        ("analyze", files.one, "--base", "gpt3"),
        ("profile", "gpt3", "--data", rows, "-o", "x"),
    ):
        found = run(*words)
        said = " ".join(found.err.split())
        assert found.code == 1
        assert "no such file or folder here, nor a model of this name in the hub's cache" in said
        assert "hf download gpt3" in said
    (tmp_path / "runs").mkdir()
    said = " ".join(run("plan", files.config, "runs/mine").err.split())
    assert "there is no such file or folder. Check the path." in said  # no name of the hub


def test_a_model_without_its_tokenizer_is_said_to_have_none(run, files, tmp_path):
    rows = tmp_path / "rows.txt"
    rows.write_text("one\n")
    found = run("profile", files.base, "--data", rows, "-o", tmp_path / "x")
    said = " ".join(found.err.split())
    assert found.code == 1
    assert "it has no tokenizer. Save the tokenizer beside the model" in said


def test_verify_shows_the_first_problems_in_the_order_of_layers(run, monkeypatch, capsys):
    report = VerifyReport(problems=tuple(f"'h.{n}.fc' is wrong" for n in reversed(range(30))))
    show.print_verification(report, everything=False)
    few = capsys.readouterr().out.splitlines()
    assert few[:3] == [f"wrong: 'h.{n}.fc' is wrong" for n in range(3)]
    assert f"and {30 - show.MOST_NAMES} more (--all)" in few
    show.print_verification(report, everything=True)
    lines = capsys.readouterr().out.splitlines()
    assert lines[:30] == [f"wrong: 'h.{n}.fc' is wrong" for n in range(30)]


@pytest.mark.parametrize(
    ("model", "keys"),
    [
        ("base", ()),
        ("base/config.json", ()),
        ("base", ("--keys",)),
        ("base/config.json", ("--keys",)),
        ("base/model.safetensors", ()),
        ("sharded", ("--keys",)),
        ("sharded/model.safetensors.index.json", ()),
    ],
)
def test_plan_finds_the_same_sites_whatever_it_plans_on(run, files, model, keys):
    found = run("plan", files.config, files.base.parent / model, "--json", *keys)
    assert found.code == 0
    data = json.loads(found.out)
    live = li.plan(tiny_gpt2(), files.config)
    assert [(s["name"], s["kind"]) for s in data["sites"]] == [(s.name, s.kind) for s in live.sites]
    assert data["n_lora"] == live.n_lora == 576
    assert data["n_base"] == live.n_base
    assert data["assumed"] is bool(keys or "model.safetensors" in model)


def memory(key: str) -> int:
    """A figure of this process in bytes: VmRSS is what it holds, VmHWM the most it has held."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line for line in lines if line.startswith(key)).split()[1])


def command_with_its_costs(*args: object) -> tuple[int, float]:
    """Return the growth of the peak in bytes and the seconds of processor time of a command."""
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins again
    held, began = memory("VmRSS"), time.process_time()
    with pytest.raises(SystemExit, match="0"):
        app([str(arg) for arg in args])
    return memory("VmHWM") - held, time.process_time() - began


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="reads the peak in /proc")
def test_plan_of_gpt3_175b_takes_seconds_and_a_third_of_a_gigabyte(tmp_path, forks):
    config = GPT2Config(n_layer=96, n_embd=12288, n_head=96, n_positions=2048, vocab_size=50257)
    config.to_json_file(tmp_path / "config.json")
    run = forks.start(command_with_its_costs, "plan", write_config(tmp_path), tmp_path, "--json")
    peak_bytes, seconds = run.result()
    data = json.loads(run.out())
    assert data["n_sites"] == 192
    # q and v of c_attn: 2 (12,288 + 12,288) each; c_fc: 12,288 + 49,152; times rank 2 and 96 layers
    assert data["n_lora"] == 96 * 2 * (2 * 2 * 12288 + 5 * 12288)
    assert data["n_base"] == 174_604_259_328  # 50,257 d + 2,048 d + 96 (12 d^2 + 13 d) + 2 d
    assert peak_bytes < 300e6
    assert seconds < 20


def test_plan_never_runs_code_of_the_model(run, files, tmp_path):
    folder = tmp_path / "hostile"
    folder.mkdir()
    config = {"model_type": "hostile", "architectures": ["Hostile"]}
    config["auto_map"] = {"AutoConfig": "evil.Hostile", "AutoModel": "evil.Hostile"}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    found = run("plan", files.config, folder)
    assert found.code == 1
    assert not (tmp_path / "ran").exists()
    assert "--keys" in found.err


@pytest.mark.parametrize(
    ("files_in_it", "words"),
    [
        ({}, "it holds no .safetensors weights"),
        ({"config.json": "{"}, "not valid JSON"),
        ({"config.json": '{"model_type": "no_such_model"}'}, "no_such_model"),
        ({"config.json": '{"model_type": "gpt2", "n_embd": "wide"}'}, "transformers"),
        ({"config.json": "[1]"}, "not a JSON object"),
        ({"model.safetensors": "short"}, "model.safetensors"),
    ],
)
def test_plan_refuses_what_is_not_a_model(run, files, tmp_path, files_in_it, words):
    for name, text in files_in_it.items():
        (tmp_path / name).write_text(text)
    found = run("plan", files.config, tmp_path)
    assert found.code == 1
    assert found.out == ""
    assert found.err.startswith("Error: ")
    assert found.err.count("\n") == 1
    assert words in found.err


def test_plan_passes_the_errors_of_config_and_matching_on(run, files, tmp_path):
    wrong = write_config(tmp_path, "rnak: 4\ntargets: [c_attn]")
    found = run("plan", wrong, files.base)
    expected = f"{wrong}:1:1 (rnak): unknown key 'rnak'. Did you mean 'rank'?"
    assert (found.code, found.out, found.err) == (1, "", f"Error: {expected}\n")
    found = run("plan", write_config(tmp_path, "targets: [c_atn]"), files.base)
    assert found.code == 1
    assert "Error: rule 1 ('c_atn'): matched none of" in found.err
    assert "transformer.h.0.attn.c_attn" in found.err


# ------------------------------------------------------------------------------------------ inspect


def test_inspect_reports_the_norms_of_a_dense_reference(run, files):
    found = run("inspect", files.one, "--json")
    assert (found.code, found.err) == (0, "")
    data = json.loads(found.out)
    deltas = dense(files.one)
    assert [f"{site['name']}.weight" for site in data["sites"]] == list(deltas)
    for site in data["sites"]:
        norm = float(deltas[f"{site['name']}.weight"].norm())
        assert site["delta_norm"] == pytest.approx(norm, rel=1e-9)
        assert (site["rank"], site["scale"]) == (2, 2.0)
    assert data["n_lora"] == 576
    assert data["n_nonfinite"] == 0
    A = read_adapter(files.one).sites["transformer.h.0.mlp.c_fc"].A
    fc = next(s for s in data["sites"] if s["name"] == "transformer.h.0.mlp.c_fc")
    assert fc["A"]["norm"] == pytest.approx(float(A.double().norm()), rel=1e-12)
    assert fc["A"]["shape"] == [2, 16]


@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_inspect_leaves_out_the_frozen_start(run, tmp_path, init):
    net = torch.nn.Sequential(torch.nn.Linear(6, 5))
    li.inject(net, {"rank": 2, "alpha": 3, "init": init, "targets": ["0"]})
    for step in range(2):
        found = run("inspect", li.save_adapter(net, tmp_path / f"{init}{step}"), "--json")
        site = json.loads(found.out)["sites"][0]
        state = li.adapter_state(net).sites["0"]
        delta = 1.5 * (state.B.double() @ state.A.double() - state.B0.double() @ state.A0.double())
        # PEFT's folder holds it as one pair of rank 2 r, so cancellation is all that may differ.
        assert site["delta_norm"] == pytest.approx(float(delta.norm()), rel=1e-6, abs=1e-6)
        with torch.no_grad():
            li.adapter_parameters(net)["0.lora_B"].add_(0.1)


def test_inspect_counts_what_is_not_finite(run, tmp_path):
    net = torch.nn.Sequential(torch.nn.Linear(6, 5), torch.nn.LayerNorm(5))
    li.inject(net, {"rank": 2, "targets": ["0"], "train": ["1"]})
    path = li.save_adapter(net, tmp_path / "broken.safetensors", format="native")
    spoil(path, "A/0", math.nan, math.inf, -math.inf)
    spoil(path, "trained/1.weight", math.nan)
    found = run("inspect", path, "--json")
    assert found.code == 0
    data = json.loads(found.out, parse_constant=pytest.fail)  # NaN is no JSON
    assert data["n_nonfinite"] == 4
    assert data["sites"][0]["A"]["n_nonfinite"] == 3
    assert data["sites"][0]["A"]["norm"] is None
    assert data["sites"][0]["B"]["n_nonfinite"] == 0
    assert data["trained"]["1.weight"]["n_nonfinite"] == 1
    table = run("inspect", path).out
    assert "NaN or Inf in 0 (3), 1.weight (1)" in table
    assert unwrapped(table).endswith("4 values NaN or Inf")


@pytest.mark.parametrize(
    ("more", "role", "heads", "said"),
    [
        ({"variant": "dora"}, "m", "|delta| |m|", "without the gain by m"),
        ({"lora_bias": True}, "b", "|delta| |b|", "10 in b"),
    ],
)
def test_inspect_shows_and_counts_the_further_tensors(run, tmp_path, more, role, heads, said):
    net = torch.nn.Sequential(torch.nn.Linear(6, 5), torch.nn.Linear(5, 5))
    li.inject(net, {"rank": 2, "alpha": 4, "targets": ["0", "1"], **more})
    parameters = li.adapter_parameters(net)
    with torch.no_grad():
        for parameter in parameters.values():
            parameter.add_(torch.rand_like(parameter))
    state = li.adapter_state(net)
    site, further = state.sites["0"], state.sites["0"].further[role]
    folder = li.save_adapter(net, tmp_path / "whole")
    figures = json.loads(run("inspect", folder, "--json").out)["sites"][0]
    assert figures["delta_norm"] == pytest.approx(float((2 * site.B @ site.A).norm()), rel=1e-5)
    assert figures["further"][role]["norm"] == pytest.approx(float(further.norm()), rel=1e-6)
    table = run("inspect", folder).out
    assert heads in " ".join(table.split())
    assert said in unwrapped(table)
    assert unwrapped(table).endswith("finite")

    path = li.save_adapter(net, tmp_path / "broken.safetensors", format="native")
    spoil(path, f"{role}/0", math.nan)
    assert "NaN or Inf in 0 (1)" in run("inspect", path).out
    assert f"{role} of site '0': it holds 1 NaN" in unwrapped(run("analyze", path).err)


def test_inspect_prints_one_line_a_kind_or_each_site_and_the_totals(run, files):
    lines = run("inspect", files.one).out.splitlines()
    assert lines[0] == "site"
    assert lines[1].split() == ["kind", "shape", "rank", "scale", "|A|", "|B|", "|delta|"]
    assert lines[2] == "transformer.h.{0..1}.attn.c_attn x2"
    assert lines[3].split()[:8] == ["conv1d", "16", "->", "48", "[q,", "v]", "2", "2"]
    assert lines[-1] == "4 sites: 576 in A and B; base known by 29 tensors; finite"
    each = run("inspect", files.one, "--all").out
    assert "transformer.h.1.attn.c_attn\n" in each


def test_no_name_reaches_the_terminal_raw(run, capsys, files, tmp_path):
    """E29: a terminal obeys escape sequences; readers refuse such tensors, paths may hold them."""
    name = "evil\x1b]0;title\x07\x1b[2J\nfinite\u202e"
    shown = r"evil\x1b]0;title\x07\x1b[2J\nfinite\u202e"
    folder = tmp_path / name
    shutil.copytree(files.one, folder)
    merged = run("merge", files.base, folder, "-o", tmp_path / f"out-{name}", "--dry-run")
    page = run("analyze", folder, "--report", tmp_path / name / "report.html")
    missing = run("inspect", tmp_path / f"{name}2")
    assert (merged.code, page.code, missing.code) == (0, 0, 1)
    capsys.readouterr()
    show.print_rows(Listing(("a", "b"), ((name, name),)))
    show.say_list("names:", [name], everything=True)
    drawn = capsys.readouterr().out
    for text in (merged.out, page.err, missing.err, drawn):
        assert shown in text.replace("\n", r"\n")
        assert all(c.isprintable() or c == "\n" for c in text)


@needs_transformers_5
def test_inspect_asks_the_base_which_stack_of_experts_a_pair_is_on(run, tmp_path):
    sizes = {"hidden_size": 8, "intermediate_size": 6, "num_hidden_layers": 1, "vocab_size": 10}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "num_local_experts": 2}
    model = MixtralForCausalLM(MixtralConfig(**sizes, **heads))
    model.save_pretrained(tmp_path / "base")
    li.inject(model, {"rank": 2, "targets": ["gate_up_proj", "down_proj"]})
    folder = li.save_adapter(model, tmp_path / "experts")
    file = folder / "adapter_model.safetensors"
    save_file(load_file(file), file, {"format": "pt"})  # as PEFT, which does not name the sites
    found = run("inspect", folder)
    assert found.code == 1
    assert "--base BASE" in found.err
    data = json.loads(run("inspect", folder, "--base", tmp_path / "base", "--json").out)
    names = {site["name"].rpartition(".")[2]: site["in_features"] for site in data["sites"]}
    assert names == {"gate_up_proj": 8, "down_proj": 6}


def test_inspect_of_something_else(run, files, tmp_path):
    for path in (tmp_path, tmp_path / "nowhere", files.config, files.base):
        found = run("inspect", path)
        assert (found.code, found.out) == (1, "")
        assert found.err.startswith("Error: ")
    found = run("inspect", files.one, "--format", "pef")
    assert found.code == 2
    assert "did you mean peft?" in found.err


def test_a_folder_that_was_edited_needs_to_be_told_what_to_believe(run, files, tmp_path):
    folder = shutil.copytree(files.two, tmp_path / "edited")
    path = folder / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "lora_alpha": 30}))
    found = run("inspect", folder)
    assert found.code == 1
    assert "--prefer metadata" in found.err
    assert "prefer=" not in found.err
    for believed, scale in (("metadata", 3.0), ("config", 30.0)):
        data = json.loads(run("inspect", folder, "--prefer", believed, "--json").out)
        assert {site["scale"] for site in data["sites"]} == {scale}, believed
    merge = ("merge", files.base, folder, "--dry-run")
    assert run(*merge).code == 1
    assert run(*merge, "--prefer", "config").code == 0
    path.write_text(json.dumps({**json.loads(path.read_text()), "lora_alpha": 3, "shiny": True}))
    assert "--allow shiny" in run("inspect", folder).err
    assert run("inspect", folder, "--allow", "shiny").code == 0


# -------------------------------------------------------------------------------- merge and verify


@pytest.mark.parametrize("base", ["base", "sharded"])
@pytest.mark.parametrize(
    ("adapters", "weights"), [(("one",), ()), (("one", "two"), ()), (("one", "two"), (0.5, -0.25))]
)
def test_merge_adds_the_dense_deltas(run, files, tmp_path, base, adapters, weights):
    folder = files.base.parent
    flags = [flag for w in weights for flag in ("--weight", w)]
    out = tmp_path / "out"
    found = run("merge", folder / base, *(folder / a for a in adapters), "-o", out, *flags)
    assert found.code == 0, found.err
    wanted = {
        k: v.double()
        for p in (folder / base).glob("*.safetensors")
        for k, v in load_file(p).items()
    }
    for name, weight in zip(adapters, weights or (1.0, 1.0), strict=False):
        for key, delta in dense(folder / name).items():
            wanted[key] = wanted[key] + weight * delta
    merged = {k: v for path in out.glob("*.safetensors") for k, v in load_file(path).items()}
    assert merged.keys() == wanted.keys()
    for key, value in merged.items():
        assert torch.allclose(value.double(), wanted[key], rtol=0, atol=1e-7), key
    n = 4 if "one" in adapters else 2
    assert f"merged {n} of {len(wanted)} tensors into {out}" in unwrapped(found.out)


def test_merge_json_is_the_report(run, files, tmp_path):
    args = ("merge", files.bf16, files.one, "-w", 1e-3, "-o", tmp_path / "out")
    found = run(*args, "--json", "--verify")
    data = json.loads(found.out)
    assert data["output"] == str(tmp_path / "out")
    assert data["verified"] is True
    assert {t["name"] for t in data["tensors"]} == set(dense(files.one))
    before = load_file(files.bf16 / "model.safetensors")
    after = load_file(tmp_path / "out" / "model.safetensors")
    for tensor in data["tensors"]:
        D = 1e-3 * dense(files.one)[tensor["name"]]
        moved = after[tensor["name"]].double() - before[tensor["name"]].double()
        assert tensor["kept"] == pytest.approx(float((moved * D).sum() / (D * D).sum()), rel=1e-4)
        assert tensor["error"] == pytest.approx(float((moved - D).norm() / D.norm()), rel=1e-4)


def test_merge_replaces_a_checkpoint_only_when_asked_and_only_a_checkpoint(run, files, tmp_path):
    out = tmp_path / "out"
    args = ["merge", files.base, files.one, "-o", out]
    assert run(*args).code == 0
    first = load_file(out / "model.safetensors")
    refused = run(*args, "--weight", "2")
    assert refused.code == 1
    assert "--overwrite replaces a checkpoint" in refused.err
    assert run(*args, "--weight", "2", "--overwrite").code == 0
    second = load_file(out / "model.safetensors")
    assert any(not torch.equal(first[name], second[name]) for name in first)
    assert [path.name for path in tmp_path.glob("*out*")] == ["out"]

    (out / "notes").mkdir()
    refused = run(*args, "--overwrite")
    assert refused.code == 1
    assert "what is in it is no checkpoint" in refused.err
    assert load_file(out / "model.safetensors").keys() == second.keys()


def test_a_merge_that_fails_at_the_end_leaves_the_checkpoint_that_it_would_replace(
    run, files, tmp_path, monkeypatch
):
    out = tmp_path / "out"
    args = ["merge", files.base, files.one, "-o", out]
    assert run(*args).code == 0
    before = (out / "model.safetensors").read_bytes()

    def fails(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(merge_files, "rename_folder", fails)
    assert run(*args, "--weight", "2", "--overwrite").code == 1
    assert (out / "model.safetensors").read_bytes() == before


def test_merge_dry_run_writes_nothing(run, files, tmp_path):
    out = tmp_path / "out"
    found = run("merge", files.base, files.one, "-o", out, "--dry-run")
    assert found.code == 0
    assert "transformer.h.{0..1}.mlp.c_fc.weight x2" in found.out
    said = unwrapped(found.out)
    assert re.search(r"would write .* copied as they are", said)
    assert re.search(rf"[\d.]+ [kMG]B free on the disk of '{re.escape(str(out))}'", said)
    assert "nothing was written" in said
    data = json.loads(run("merge", files.base, files.one, "--dry-run", "--json").out)
    assert {t["name"] for t in data["tensors"]} == set(dense(files.one))
    assert data["output_bytes"] < data["free_bytes"]
    assert list(tmp_path.iterdir()) == []


def test_merge_dry_run_says_what_would_stop_the_merge(run, files, tmp_path, monkeypatch):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").touch()
    found = run("merge", files.base, files.one, "-o", tmp_path / "out", "--dry-run")
    assert (found.code, found.out) == (1, "")
    assert "it is not empty" in found.err
    monkeypatch.setattr("lora_inject.checkpoint.free_bytes", lambda folder: 7)
    found = run("merge", files.base, files.one, "-o", tmp_path / "new", "--dry-run")
    assert "7 bytes free, which is NOT enough," in found.out


def test_merge_refuses_where_rounding_leaves_too_little(run, files, tmp_path):
    small = ("--weight", 1e-5)  # a delta far below half a unit in the last place of bf16
    args = ("merge", files.bf16, files.one, *small, "--min-kept", 0.99, "-o", tmp_path / "out")
    found = run(*args)
    assert found.code == 1
    assert found.err.startswith("Error: keep at least 0.99 of every delta: rounding leaves")
    assert not (tmp_path / "out").exists()
    assert run(*args[:-1], tmp_path / "wide", "--dtype", "float32").code == 0


def test_merge_that_keeps_nothing_says_so_at_the_end_and_on_stderr(run, files, tmp_path):
    args = ("merge", files.bf16, files.one, "--weight", 1e-7)
    found = run(*args, "-o", tmp_path / "out")
    assert found.code == 0
    assert "; rounding left 0.0000 of every delta" in unwrapped(found.out)
    assert found.err.startswith("warning: rounding left 0.0000 of every delta")
    data = json.loads(run(*args, "-o", tmp_path / "again", "--json").out)
    assert len(data["inert"]) == len(data["tensors"])
    assert "has no effect" in data["warning"]


def test_merge_renames_as_told(run, files, tmp_path):
    """The base without a config, under another prefix."""
    base = load_file(files.base / "model.safetensors")
    (tmp_path / "base").mkdir()
    path = tmp_path / "base" / "model.safetensors"
    save_file({f"inner.{name}": t for name, t in base.items()}, path)
    args = ("merge", tmp_path / "base", files.one, "-o", tmp_path / "out")
    found = run(*args)
    assert found.code == 1
    assert "--rename OLD=NEW" in found.err
    assert run(*args, "--rename", "=inner.", "--any-base").code == 0
    assert run(*args, "--rename", "inner").code == 2
    merged = load_file(tmp_path / "out" / "model.safetensors")
    for name, delta in dense(files.one).items():
        wanted = base[name].double() + delta
        assert torch.allclose(merged[f"inner.{name}"].double(), wanted, atol=1e-6)


def test_verify_finds_one_flipped_bit(run, files, tmp_path):
    out = tmp_path / "out"
    run("merge", files.base, files.one, files.two, "-w", 1, "-w", 2, "-o", out)
    args = ("verify", files.base, files.one, files.two, out, "-w", 1, "-w", 2)
    found = run(*args)
    assert found.code == 0, found.out
    assert found.out.startswith("verified: 4 tensors computed again")
    tensors = load_file(out / "model.safetensors")
    bits = tensors["transformer.h.1.ln_1.weight"].view(torch.int32)
    bits[3] ^= 1
    save_file(tensors, out / "model.safetensors", {"format": "pt"})
    found = run(*args)
    assert (found.code, found.err) == (1, "")
    assert "NOT verified" in found.out
    found = run(*args, "--json")
    assert found.code == 1
    assert any("transformer.h.1.ln_1.weight" in p or "model.safetensors" in p
               for p in json.loads(found.out)["problems"])  # fmt: skip


def test_extract_is_the_reverse_of_merge(run, files, tmp_path):
    run("merge", files.base, files.two, "-o", tmp_path / "tuned")
    args = ("extract", files.base, tmp_path / "tuned", "-o", tmp_path / "again", "--rank", 1)
    found = run(*args)
    assert found.code == 0, found.err
    assert unwrapped(found.out).endswith(
        f"wrote {tmp_path / 'again'}: 2 sites, 0 tensors in full; 0 left behind, 26 equal to the "
        "base's"
    )
    for name, site in read_adapter(tmp_path / "again").sites.items():
        delta = site.scale * (site.B.double() @ site.A.double()).T
        wanted = dense(files.two)[f"{name}.weight"]
        assert float((delta - wanted).norm() / wanted.norm()) < 1e-5
    assert run(*args).code == 1  # it is there
    data = json.loads(run(*args, "--overwrite", "--json").out)
    assert data["output"] == str(tmp_path / "again")
    assert [t["energy"] for t in data["tensors"]] == pytest.approx([1, 1], abs=1e-6)


def test_extract_lists_what_it_leaves_behind(run, files, tmp_path):
    tensors = load_file(files.base / "model.safetensors")
    tuned = shutil.copytree(files.base, tmp_path / "tuned")
    tensors["transformer.ln_f.bias"] += 1
    tensors["transformer.h.0.mlp.c_fc.weight"][0] += 1
    save_file(tensors, tuned / "model.safetensors")
    args = ("extract", files.base, tuned, "--energy", 0.9, "--overwrite", "-o", tmp_path / "a")
    assert "left behind: transformer.ln_f.bias\n" in run(*args).out
    found = run(*args, "--full").out
    assert "1 tensor in full; 0 left behind" in " ".join(found.split())
    state = read_adapter(tmp_path / "a")
    assert torch.equal(state.trained["transformer.ln_f.bias"], tensors["transformer.ln_f.bias"])


# ----------------------------------------------------------------- schema, exit codes, interruption


def test_schema_is_the_schema_of_config(run):
    printed = run("schema")
    assert printed.code == 0
    assert json.loads(printed.out) == json_schema()


def test_version(run):
    assert run("--version").out == f"lora-inject {li.__version__}\n"


@pytest.mark.parametrize(
    "args",
    [
        (),
        ("nonsense",),
        ("plan",),
        ("plan", "a.yaml"),
        ("plan", "a.yaml", "model", "more"),
        ("inspect",),
        ("inspect", "a", "--nonsense"),
        ("analyze",),
        ("analyze", "a", "b", "c"),
        ("analyze", "a", "--any-base"),
        ("analyze", "a", "--report", "."),
        ("merge", "base"),
        ("merge", "base", "adapter"),
        ("merge", "base", "adapter", "-o", "out", "--min-kept", "1.5"),
        ("merge", "base", "adapter", "-o", "out", "--min-kept", "some"),
        ("merge", "base", "adapter", "-o", "out", "--dtype", "int8"),
        ("merge", "base", "adapter", "-o", "out", "--workers", "0"),
        ("merge", "base", "one", "two", "-o", "out", "-w", "1"),
        ("merge", "base", "one", "-o", "out", "-w", "0"),
        ("merge", "base", "one", "-o", "out", "-w", "nan"),
        ("verify", "base", "adapter"),
        ("extract", "base", "tuned", "-o", "out"),
        ("extract", "base", "tuned", "--rank", "2"),
        ("extract", "base", "tuned", "-o", "out", "--rank", "0"),
        ("inspect", "one.safetensors", "--prefer", "config"),
        ("schema", "more"),
    ],
)
def test_wrong_usage_is_exit_code_2(run, args):
    found = run(*args)
    assert found.code == 2
    assert (found.out if not args else found.err) != ""


def test_a_defect_is_not_taken_for_a_refusal(monkeypatch):
    def fail() -> None:
        raise RuntimeError("a defect")

    monkeypatch.setattr(schema, "json_schema", fail)
    with pytest.raises(RuntimeError, match="a defect"):
        app(["schema"])


def test_every_refusal_of_the_package_is_exit_code_1(run, monkeypatch):
    kinds = [kind for kind in (getattr(li, name) for name in li.__all__)
             if isinstance(kind, type) and issubclass(kind, li.LoraInjectError)]  # fmt: skip
    assert len(kinds) >= 7
    for kind in kinds:

        def fail(kind=kind) -> None:
            raise kind("asked", "found", "remedy")

        monkeypatch.setattr(schema, "json_schema", fail)
        found = run("schema")
        assert (found.code, found.out) == (1, "")
        assert found.err == "Error: asked: found. remedy.\n"


def program_into(what: str, *args: object) -> None:
    """The command line with its output on a full disk, closed, or in a pipe that nobody reads."""
    if what == "full":
        os.dup2(os.open("/dev/full", os.O_WRONLY), 1)
    elif what == "closed":
        os.close(1)
        sys.stdout = None
    else:
        read, write = os.pipe()
        os.close(read)
        os.dup2(write, 1)
    program(*args)


FULL = "Error: read or write the output: No space left on device. Check the path and the disk, "


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="has no disk that is always full")
@pytest.mark.parametrize(
    ("what", "code", "error"),
    [("full", 1, f"{FULL}and run again.\n"), ("closed", 0, ""), ("not read", 0, "")],
)
def test_output_that_cannot_be_written_is_no_traceback(what, code, error, forks):
    done = forks.start(program_into, what, "schema")
    assert (done.wait(), done.err()) == (code, error)


def script(path: str, *args: object) -> None:
    sys.argv = [path, *map(str, args)]
    runpy.run_path(path, run_name="__main__")


@pytest.mark.parametrize("way", ["-m", "script"])
def test_both_ways_to_call_it_print_errors_without_a_traceback(way, forks):
    found = shutil.which("lora-inject", path=str(Path(sys.executable).parent))
    if way == "script" and found is None:
        pytest.skip("the package is not installed here, so there is no script")
    start = (program,) if way == "-m" else (script, found)
    done = forks.start(*start, "inspect", "nowhere")
    assert (done.wait(), done.out()) == (1, "")
    words = "Error: read adapter 'nowhere': there is no such file or directory."
    assert done.err().startswith(words)
    assert "Traceback" not in done.err()


def test_a_reader_that_has_gone_changes_neither_the_work_nor_the_exit_code(files, tmp_path, forks):
    """E29: the output is published, and the exit code says so; a failed check stays a failure."""
    out = tmp_path / "out"
    for code, args in (
        (0, ["merge", files.base, files.one, "-o", out]),
        (0, ["verify", files.base, files.one, out]),
        (1, ["verify", files.base, files.one, out, "-w", "2"]),
    ):
        done = forks.start(program_into, "not read", *args)
        assert (done.wait(), done.err()) == (code, "")
    assert (out / "model.safetensors").exists()


# ------------------------------------------------------------------------------------- how it looks


def test_tables_fit_80_columns_and_no_name_is_broken(run, files, tmp_path, monkeypatch):
    monkeypatch.delenv("COLUMNS", raising=False)
    deep = {
        "architectures": ["GPT2LMHeadModel"], "model_type": "gpt2", "n_layer": 12,
        "n_embd": 3072, "n_head": 12,
    }  # fmt: skip
    large = tmp_path / "large"
    large.mkdir()
    (large / "config.json").write_text(json.dumps(deep))
    text = "bias: all\ntargets: ['attn\\.c_attn', 'mlp\\..*', 'lm_head']\n"
    for args in (
        ("plan", write_config(tmp_path, text), large),
        ("inspect", files.one, "--all"),
        ("analyze", files.one, files.two, "--base", files.base),
        ("merge", files.base, files.one, "-o", tmp_path / "out"),
    ):
        lines = run(*args).out.splitlines()
        assert max(map(len, lines)) <= 80 or args[0] == "merge", args  # whose totals hold a path
        assert all(line == line.rstrip() for line in lines)
    long = "a_rather_long_name_of_a_module_" * 4
    net = torch.nn.ModuleDict({long: torch.nn.Linear(6, 5)})
    li.inject(net, {"rank": 2, "targets": [long]})
    assert long in run("inspect", li.save_adapter(net, tmp_path / "long")).out.splitlines()


@pytest.mark.parametrize(
    ("n_bytes", "text"),
    [(0, "0 bytes"), (999, "999 bytes"), (1000, "1.0 kB"), (538_090_408, "538.1 MB"),
     (1_234_567_890_123, "1.2 TB")],
)  # fmt: skip
def test_sizes(n_bytes, text):
    assert show._size(n_bytes) == text


def test_progress_is_silent_where_nobody_looks(capsys):
    with show.progress_bar("merging") as update:
        update(1, 2)
        update(2, 2)
    assert capsys.readouterr() == ("", "")


def test_progress_of_a_terminal_goes_to_stderr(capsys, monkeypatch):
    monkeypatch.setenv("FORCE_COLOR", "1")
    with show.progress_bar("merging") as update:
        update(1, 2)
    out, err = capsys.readouterr()
    assert out == ""
    assert "merging" in err


def test_help_lists_the_commands_as_people_need_them(run):
    found = run("-h")
    names = re.findall(r"^  ([a-z-]+)  ", found.out.partition("Commands:")[2], re.MULTILINE)
    assert names == list(EXAMPLES)
    known = ["plan", "inspect", "analyze", "merge", "verify", "extract", "schema"]
    assert [name for name in names if name in known] == known
    assert "..." not in found.out.partition("Commands:")[2]  # each line is a whole sentence
    assert {info.name for info in app.registered_commands} == set(names)
    assert "Exit codes: 0 done" in found.out


@pytest.mark.parametrize("info", app.registered_commands, ids=lambda info: info.name)
def test_help_of_every_command_names_its_arguments_and_speaks_no_python(run, info):
    name = info.name
    found = run(name, "--help")
    assert found.code == 0
    usage = found.out.partition("\n")[0]
    for argument in set(re.findall(r"\b[A-Z]{4,}\b", info.callback.__doc__)) - {"JSON"}:
        assert argument in usage
    assert not re.search(r"<\w|{|\bbool\b|list\[|\.\.\.\.", found.out)
    assert not re.search(r"^ *--[\w-]+, --", found.out, re.MULTILINE)  # each option has one name
    assert f"Example:\n  lora-inject {name} " in found.out
    assert "Exit codes: 0 done" in found.out


# ----------------------------------------------------------------------------- colors, completion


def test_what_failed_is_red_on_a_terminal_unless_colors_are_unwanted(monkeypatch):
    written = []
    monkeypatch.setattr(show, "_write", lambda text, *, err: written.append((text, err)))
    monkeypatch.delenv("NO_COLOR", raising=False)
    show.note("MatchError: rule 1: nothing", color=show.BAD)
    monkeypatch.setenv("NO_COLOR", "1")
    show.note("MatchError: rule 1: nothing", color=show.BAD)
    red = typer.style("MatchError", fg="red", bold=True)
    assert written == [(f"{red}: rule 1: nothing", True), ("MatchError: rule 1: nothing", True)]


def test_what_is_no_terminal_gets_no_colors(run, files):
    assert "\x1b" not in run("plan", "nowhere.yaml", files.one).err


def test_a_shell_can_complete_commands_and_options():
    completed = subprocess.run(
        [sys.executable, "-m", "lora_inject"],
        env={
            **os.environ,
            "_LORA_INJECT_COMPLETE": "complete_bash",
            "COMP_WORDS": "lora-inject merge --over",
            "COMP_CWORD": "2",
        },
        capture_output=True,
        text=True,
        check=True,
    )
    assert completed.stdout.split() == ["--overwrite"]
