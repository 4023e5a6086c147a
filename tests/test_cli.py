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
import sys
from pathlib import Path

import pytest
import torch
from conftest import fill
from helpers.adapter_states import spoil
from helpers.forks import program
from safetensors.torch import load_file, save_file
from transformers import GPT2Config, GPT2LMHeadModel

import lora_inject as li
from lora_inject.checkpoint import merge_files
from lora_inject.cli import app, show
from lora_inject.cli.program import EXAMPLES
from lora_inject.core.spec import schema
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
CONFIGS = {"one": CONFIG, "two": "{rank: 1, alpha: 3, scaling: rslora, targets: ['c_fc']}"}
SCALES = {"one": 2.0, "two": 3.0}  # of CONFIGS, by hand
TINY = {"n_layer": 2, "n_embd": 16, "n_head": 2, "n_positions": 8, "vocab_size": 40}
TINY |= {"bos_token_id": 0, "eos_token_id": 0}


def tiny_gpt2() -> GPT2LMHeadModel:
    torch.manual_seed(0)
    return GPT2LMHeadModel(GPT2Config(**TINY)).eval()


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> Path:
    """A folder: a base in three forms, two adapters of it, the config of the first."""
    folder = tmp_path_factory.mktemp("cli")
    model = tiny_gpt2()
    model.save_pretrained(folder / "base")
    model.save_pretrained(folder / "sharded", max_shard_size="8KB")
    tiny_gpt2().bfloat16().save_pretrained(folder / "bf16")
    for name, config in CONFIGS.items():
        fill(li.inject(model, li.Config.from_text(config), name), name, 0.2)
        li.save_adapter(model, folder / name, name)
    (folder / "lora.yaml").write_text(CONFIG)
    return folder


def dense(adapter: Path) -> dict[str, torch.Tensor]:
    """Delta of each weight, float64, from the A and B of a PEFT folder."""
    tensors = load_file(adapter / "adapter_model.safetensors")
    deltas = {}
    for key, A in tensors.items():
        if ".lora_A." in key:
            B = tensors[key.replace(".lora_A.", ".lora_B.")]
            name = key.removeprefix("base_model.model.").split(".lora_A")[0]
            delta = SCALES[adapter.name] * (B.double() @ A.double())
            deltas[f"{name}.weight"] = delta.T  # Conv1D: (in, out)
    return deltas


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return {k: v for path in folder.glob("*.safetensors") for k, v in load_file(path).items()}


def flat(text: str) -> str:
    """Sentences in one line each."""
    return " ".join(text.replace("│", " ").split())


# --------------------------------------------------------------------------------------------- plan


def test_plan_prints_the_table(run, files):
    ran = run("plan", files / "lora.yaml", files / "base")
    assert (ran.code, ran.err) == (0, "planned on GPT2LMHeadModel, built from its config.json\n")
    assert ran.out.splitlines() == [
        r"rule 1 'attn\.c_attn': rank 2, scale 4/2, kaiming",
        "  transformer.h.{0..1}.attn.c_attn  x2  conv1d  16 -> 48 [q, v]  128 each  256",
        r"rule 2 'mlp\.c_fc': rank 2, scale 4/2, kaiming",
        "  transformer.h.{0..1}.mlp.c_fc  x2  conv1d  16 -> 64  160 each  320",
        "4 sites: 576 in A and B = 576 trainable, 7.83 % of 7,360; 0.0 MB in float32",
    ]
    each = run("plan", files / "lora.yaml", files / "base", "--all").out
    assert "\n  transformer.h.1.attn.c_attn  x1  conv1d  16 -> 48 [q, v]  128 each  128\n" in each


@pytest.mark.parametrize("keys", [(), ("--keys",)], ids=" ".join)
@pytest.mark.parametrize(
    "model",
    ["base", "base/config.json", "base/model.safetensors", "sharded/model.safetensors.index.json"],
)
def test_plan_finds_the_same_sites_whatever_it_plans_on(run, files, model, keys):
    ran = run("plan", files / "lora.yaml", files / model, "--json", *keys)
    assert ran.code == 0
    data, live = json.loads(ran.out), li.plan(tiny_gpt2(), files / "lora.yaml")
    assert [(s["name"], s["kind"]) for s in data["sites"]] == [(s.name, s.kind) for s in live.sites]
    assert data["n_lora"] == live.n_lora == 576
    assert data["n_base"] == live.n_base
    assert data["assumed"] is bool(keys or "model.safetensors" in model)


def test_plan_of_gpt3_175b_allocates_no_weight(run, files, tmp_path):
    config = GPT2Config(n_layer=96, n_embd=12288, n_head=96, n_positions=2048, vocab_size=50257)
    config.to_json_file(tmp_path / "config.json")
    data = json.loads(run("plan", files / "lora.yaml", tmp_path, "--json").out)
    assert data["n_sites"] == 192
    # q and v of c_attn: 2 (12,288 + 12,288) each; c_fc: 12,288 + 49,152; times rank 2 and 96 layers
    assert data["n_lora"] == 96 * 2 * (2 * 2 * 12288 + 5 * 12288)
    assert data["n_base"] == 174_604_259_328  # 50,257 d + 2,048 d + 96 (12 d^2 + 13 d) + 2 d


def test_plan_never_runs_code_of_the_model(run, files, tmp_path):
    config = {"model_type": "hostile", "architectures": ["Hostile"]}
    config["auto_map"] = {"AutoConfig": "evil.Hostile", "AutoModel": "evil.Hostile"}
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    ran = run("plan", files / "lora.yaml", tmp_path)
    assert (ran.code, (tmp_path / "ran").exists()) == (1, False)
    assert "--keys" in ran.err


@pytest.mark.parametrize(
    ("name", "text", "words"),
    [
        ("nothing.txt", "", "it holds no .safetensors weights"),
        ("config.json", "{", "not valid JSON"),
        ("config.json", '{"model_type": "no_such_model"}', "no_such_model"),
        ("config.json", '{"model_type": "gpt2", "n_embd": "wide"}', "transformers"),
        ("config.json", "[1]", "not a JSON object"),
        ("model.safetensors", "short", "model.safetensors"),
    ],
)
def test_plan_refuses_what_is_not_a_model(run, files, tmp_path, name, text, words):
    (tmp_path / name).write_text(text)
    ran = run("plan", files / "lora.yaml", tmp_path)
    assert (ran.code, ran.out, ran.err.count("\n")) == (1, "", 1)
    assert ran.err.startswith("Error: ")
    assert words in ran.err


def test_plan_passes_the_errors_of_config_and_matching_on(run, files, tmp_path):
    config = tmp_path / "lora.yaml"
    config.write_text("rnak: 4\ntargets: [c_attn]")
    ran = run("plan", config, files / "base")
    expected = f"{config}:1:1 (rnak): unknown key 'rnak'. Did you mean 'rank'?"
    assert (ran.code, ran.out, ran.err) == (1, "", f"Error: {expected}\n")
    config.write_text("targets: [c_atn]")
    said = run("plan", config, files / "base").err
    assert "Error: rule 1 ('c_atn'): matched none of" in said
    assert "transformer.h.0.attn.c_attn" in said


def test_names_of_the_hub_are_looked_up_in_its_local_cache(run, files, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    repo = tmp_path / "hub" / "models--user--tiny"
    shutil.copytree(files / "base", repo / "snapshots" / "abc")
    (repo / "refs").mkdir()
    (repo / "refs" / "main").write_text("abc")
    (tmp_path / "rows.txt").write_text("one\n")
    config, one = files / "lora.yaml", files / "one"
    for before, after in (
        (("plan", config), ("--json",)),
        (("inspect", one, "--base"), ()),
        (("analyze", one, "--base"), ()),
        (("merge",), (one, "-o", "merged")),
        (("profile",), ("--data", "rows.txt", "-o", "x")),
    ):
        ran = run(*before, "user/tiny", *after)
        if before[0] not in ("merge", "profile"):
            assert ran.out == run(*before, files / "base", *after).out != ""
        said = flat(run(*before, "gpt3", *after).err)
        assert "no such file or folder here, nor a model of this name in the hub's cache" in said
        assert "hf download gpt3" in said
    assert weights(tmp_path / "merged").keys() == weights(files / "base").keys()
    assert "it has no tokenizer. Save the tokenizer beside the model" in flat(ran.err)
    (tmp_path / "runs").mkdir()
    said = flat(run("plan", config, "runs/mine").err)
    assert "there is no such file or folder. Check the path." in said  # no name of the hub


# ------------------------------------------------------------------------------------------ inspect


def test_inspect_reports_the_norms_of_a_dense_reference(run, files):
    ran = run("inspect", files / "one", "--json")
    assert (ran.code, ran.err) == (0, "")
    data, deltas = json.loads(ran.out), dense(files / "one")
    assert [f"{site['name']}.weight" for site in data["sites"]] == list(deltas)
    for site in data["sites"]:
        norm = float(deltas[f"{site['name']}.weight"].norm())
        assert site["delta_norm"] == pytest.approx(norm, rel=1e-9)
        assert (site["rank"], site["scale"]) == (2, 2.0)
    assert (data["n_lora"], data["n_nonfinite"]) == (576, 0)
    A = read_adapter(files / "one").sites["transformer.h.0.mlp.c_fc"].A
    fc = next(s for s in data["sites"] if s["name"] == "transformer.h.0.mlp.c_fc")
    assert fc["A"]["norm"] == pytest.approx(float(A.double().norm()), rel=1e-12)
    assert fc["A"]["shape"] == [2, 16]


def test_inspect_prints_one_line_a_kind_or_each_site_and_the_totals(run, files):
    lines = run("inspect", files / "one").out.splitlines()
    assert lines[1].split() == ["kind", "shape", "rank", "scale", "|A|", "|B|", "|delta|"]
    assert lines[2] == "transformer.h.{0..1}.attn.c_attn x2"
    assert lines[3].split()[:8] == ["conv1d", "16", "->", "48", "[q,", "v]", "2", "2"]
    assert lines[-1] == "4 sites: 576 in A and B; base known by 29 tensors; finite"
    assert "transformer.h.1.attn.c_attn\n" in run("inspect", files / "one", "--all").out


def test_inspect_counts_what_is_not_finite(run, tmp_path):
    net = torch.nn.Sequential(torch.nn.Linear(6, 5), torch.nn.LayerNorm(5))
    li.inject(net, {"rank": 2, "targets": ["0"], "train": ["1"]})
    path = li.save_adapter(net, tmp_path / "broken.safetensors", format="native")
    spoil(path, "A/0", math.nan, math.inf, -math.inf)
    spoil(path, "trained/1.weight", math.nan)
    data = json.loads(run("inspect", path, "--json").out, parse_constant=pytest.fail)
    assert data["n_nonfinite"] == 4
    assert data["sites"][0]["A"]["n_nonfinite"] == 3
    assert data["sites"][0]["A"]["norm"] is None  # NaN is no JSON
    assert data["trained"]["1.weight"]["n_nonfinite"] == 1
    table = run("inspect", path).out
    assert "NaN or Inf in 0 (3), 1.weight (1)" in table
    assert flat(table).endswith("4 values NaN or Inf")


@pytest.mark.parametrize(
    ("more", "role", "heads", "said"),
    [
        ({"variant": "dora"}, "m", "|delta| |m|", "without the gain by m"),
        ({"lora_bias": True}, "b", "|delta| |b|", "10 in b"),
    ],
)
def test_inspect_shows_the_further_tensors(run, tmp_path, more, role, heads, said):
    net = torch.nn.Sequential(torch.nn.Linear(6, 5), torch.nn.Linear(5, 5))
    li.inject(net, {"rank": 2, "alpha": 4, "targets": ["0", "1"], **more})
    with torch.no_grad():
        for parameter in li.adapter_parameters(net).values():
            parameter.add_(torch.rand_like(parameter))
    site = li.adapter_state(net).sites["0"]
    folder = li.save_adapter(net, tmp_path / "whole")
    figures = json.loads(run("inspect", folder, "--json").out)["sites"][0]
    assert figures["delta_norm"] == pytest.approx(float((2 * site.B @ site.A).norm()), rel=1e-5)
    norm = float(site.further[role].norm())
    assert figures["further"][role]["norm"] == pytest.approx(norm, rel=1e-6)
    table = flat(run("inspect", folder).out)
    assert heads in table
    assert said in table
    path = li.save_adapter(net, tmp_path / "broken.safetensors", format="native")
    spoil(path, f"{role}/0", math.nan)
    assert "NaN or Inf in 0 (1)" in run("inspect", path).out
    assert f"{role} of site '0': it holds 1 NaN" in flat(run("analyze", path).err)


def test_no_name_reaches_the_terminal_raw(run, capsys, files, tmp_path):
    """A terminal obeys escape sequences; readers refuse such tensors, paths may hold them."""
    name = "evil\x1b]0;title\x07\x1b[2J\nfinite\u202e"
    shown = r"evil\x1b]0;title\x07\x1b[2J\nfinite\u202e"
    folder = shutil.copytree(files / "one", tmp_path / name)
    merged = run("merge", files / "base", folder, "-o", tmp_path / f"out-{name}", "--dry-run")
    page = run("analyze", folder, "--report", tmp_path / name / "report.html")
    missing = run("inspect", tmp_path / f"{name}2")
    show.print_rows(Listing(("a", "b"), ((name, name),)))
    show.say_list("names:", [name], everything=True)
    for text in (merged.out, page.err, missing.err, capsys.readouterr().out):
        assert shown in text.replace("\n", r"\n")
        assert all(c.isprintable() or c == "\n" for c in text)


def test_a_folder_that_was_edited_needs_to_be_told_what_to_believe(run, files, tmp_path):
    folder = shutil.copytree(files / "two", tmp_path / "edited")
    path = folder / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "lora_alpha": 30}))
    said = run("inspect", folder).err
    assert "--prefer metadata" in said
    assert "prefer=" not in said
    for believed, scale in (("metadata", 3.0), ("config", 30.0)):
        data = json.loads(run("inspect", folder, "--prefer", believed, "--json").out)
        assert {site["scale"] for site in data["sites"]} == {scale}, believed
    merge = ("merge", files / "base", folder, "--dry-run")
    assert [run(*merge, *more).code for more in ((), ("--prefer", "config"))] == [1, 0]
    path.write_text(json.dumps({**json.loads(path.read_text()), "lora_alpha": 3, "shiny": True}))
    assert "--allow shiny" in run("inspect", folder).err
    assert run("inspect", folder, "--allow", "shiny").code == 0


# -------------------------------------------------------------------------------- merge and verify


@pytest.mark.parametrize("base", ["base", "sharded"])
@pytest.mark.parametrize(
    "parts", [{"one": 1.0}, {"one": 1.0, "two": 1.0}, {"one": 0.5, "two": -0.25}], ids=str
)
def test_merge_adds_the_dense_deltas(run, files, tmp_path, base, parts):
    flags = [flag for w in parts.values() for flag in ("--weight", w) if set(parts.values()) != {1}]
    out = tmp_path / "out"
    ran = run("merge", files / base, *(files / name for name in parts), "-o", out, *flags)
    assert ran.code == 0, ran.err
    wanted = {name: tensor.double() for name, tensor in weights(files / base).items()}
    for adapter, weight in parts.items():
        for name, delta in dense(files / adapter).items():
            wanted[name] = wanted[name] + weight * delta
    merged = weights(out)
    assert merged.keys() == wanted.keys()
    for name, tensor in merged.items():
        assert torch.allclose(tensor.double(), wanted[name], rtol=0, atol=1e-7), name
    assert f"merged 4 of {len(wanted)} tensors into {out}" in flat(ran.out)


def test_merge_json_is_the_report(run, files, tmp_path):
    args = ("merge", files / "bf16", files / "one", "-w", 1e-3, "-o", tmp_path / "out")
    data = json.loads(run(*args, "--json", "--verify").out)
    assert (data["output"], data["verified"]) == (str(tmp_path / "out"), True)
    assert {t["name"] for t in data["tensors"]} == set(dense(files / "one"))
    before, after = weights(files / "bf16"), weights(tmp_path / "out")
    for tensor in data["tensors"]:
        D = 1e-3 * dense(files / "one")[tensor["name"]]
        moved = after[tensor["name"]].double() - before[tensor["name"]].double()
        assert tensor["kept"] == pytest.approx(float((moved * D).sum() / (D * D).sum()), rel=1e-4)
        assert tensor["error"] == pytest.approx(float((moved - D).norm() / D.norm()), rel=1e-4)


def test_merge_replaces_a_checkpoint_only_when_asked_and_only_a_checkpoint(
    run, files, tmp_path, monkeypatch
):
    out = tmp_path / "out"
    args = ["merge", files / "base", files / "one", "-o", out]
    assert run(*args).code == 0
    first = (out / "model.safetensors").read_bytes()
    assert "--overwrite replaces a checkpoint" in run(*args, "--weight", "2").err
    with monkeypatch.context() as patch:  # it fails at the end
        patch.setattr(merge_files, "rename_folder", lambda *_: Path("/no/such").stat())
        assert run(*args, "--weight", "2", "--overwrite").code == 1
    assert (out / "model.safetensors").read_bytes() == first
    assert run(*args, "--weight", "2", "--overwrite").code == 0
    second = (out / "model.safetensors").read_bytes()
    assert second != first
    assert [path.name for path in tmp_path.glob("*out*")] == ["out"]
    (out / "notes").mkdir()
    assert "what is in it is no checkpoint" in run(*args, "--overwrite").err
    assert (out / "model.safetensors").read_bytes() == second


def test_merge_dry_run_writes_nothing_and_says_what_would_stop_the_merge(
    run, files, tmp_path, monkeypatch
):
    args, out = ("merge", files / "base", files / "one", "--dry-run"), tmp_path / "out"
    ran = run(*args, "-o", out)
    assert ran.code == 0
    assert "transformer.h.{0..1}.mlp.c_fc.weight x2" in ran.out
    said = flat(ran.out)
    assert re.search(r"would write .* copied as they are", said)
    assert re.search(rf"[\d.]+ [kMG]B free on the disk of '{re.escape(str(out))}'", said)
    assert "nothing was written" in said
    data = json.loads(run(*args, "--json").out)
    assert {t["name"] for t in data["tensors"]} == set(dense(files / "one"))
    assert data["output_bytes"] < data["free_bytes"]
    assert list(tmp_path.iterdir()) == []
    monkeypatch.setattr("lora_inject.checkpoint.free_bytes", lambda folder: 7)
    assert "7 bytes free, which is NOT enough," in run(*args, "-o", out).out
    out.mkdir()
    (out / "mine.txt").touch()
    ran = run(*args, "-o", out)
    assert (ran.code, ran.out) == (1, "")
    assert "it is not empty" in ran.err


def test_merge_says_loudly_or_refuses_where_rounding_leaves_too_little(run, files, tmp_path):
    args = ("merge", files / "bf16", files / "one", "--weight", 1e-7)  # far below half an ulp
    ran = run(*args, "-o", tmp_path / "out")
    assert ran.code == 0
    assert "; rounding left 0.0000 of every delta" in flat(ran.out)
    assert ran.err.startswith("warning: rounding left 0.0000 of every delta")
    data = json.loads(run(*args, "-o", tmp_path / "again", "--json").out)
    assert len(data["inert"]) == len(data["tensors"])
    assert "has no effect" in data["warning"]
    strict = (*args, "--min-kept", 0.99, "-o", tmp_path / "strict")
    ran = run(*strict)
    assert (ran.code, (tmp_path / "strict").exists()) == (1, False)
    assert ran.err.startswith("Error: keep at least 0.99 of every delta: rounding leaves")
    assert run(*args[:3], "--min-kept", 0.9, "-o", tmp_path / "w", "--dtype", "float32").code == 0


def test_merge_renames_as_told(run, files, tmp_path):
    """The base without a config, under another prefix."""
    base = weights(files / "base")
    (tmp_path / "base").mkdir()
    renamed = {f"inner.{name}": tensor for name, tensor in base.items()}
    save_file(renamed, tmp_path / "base" / "model.safetensors")
    args = ("merge", tmp_path / "base", files / "one", "-o", tmp_path / "out")
    assert "--rename OLD=NEW" in run(*args).err
    assert run(*args, "--rename", "=inner.", "--any-base").code == 0
    for name, delta in dense(files / "one").items():
        merged = weights(tmp_path / "out")[f"inner.{name}"].double()
        assert torch.allclose(merged, base[name].double() + delta, atol=1e-6)


def test_verify_finds_one_flipped_bit(run, files, tmp_path):
    out, parts = tmp_path / "out", (files / "one", files / "two")
    run("merge", files / "base", *parts, "-w", 1, "-w", 2, "-o", out)
    args = ("verify", files / "base", *parts, out, "-w", 1, "-w", 2)
    ran = run(*args)
    assert (ran.code, ran.out.partition(" again")[0]) == (0, "verified: 4 tensors computed")
    tensors = load_file(out / "model.safetensors")
    tensors["transformer.h.1.ln_1.weight"].view(torch.int32)[3] ^= 1
    save_file(tensors, out / "model.safetensors", {"format": "pt"})
    ran = run(*args)
    assert (ran.code, ran.err) == (1, "")
    assert "NOT verified" in ran.out
    ran = run(*args, "--json")
    assert ran.code == 1
    assert "transformer.h.1.ln_1.weight" in json.loads(ran.out)["problems"][0]


def test_extract_is_the_reverse_of_merge(run, files, tmp_path):
    tuned, again = tmp_path / "tuned", tmp_path / "again"
    run("merge", files / "base", files / "two", "-o", tuned)
    args = ("extract", files / "base", tuned, "-o", again, "--rank", 1)
    said = "2 sites, 0 tensors in full; 0 left behind, 26 equal to the base's"
    assert flat(run(*args).out).endswith(f"wrote {again}: {said}")
    for name, site in read_adapter(again).sites.items():
        delta = site.scale * (site.B.double() @ site.A.double()).T
        wanted = dense(files / "two")[f"{name}.weight"]
        assert float((delta - wanted).norm() / wanted.norm()) < 1e-5
    assert run(*args).code == 1  # it is there
    data = json.loads(run(*args, "--overwrite", "--json").out)
    assert data["output"] == str(again)
    assert [t["energy"] for t in data["tensors"]] == pytest.approx([1, 1], abs=1e-6)

    tensors = load_file(tuned / "model.safetensors")
    tensors["transformer.ln_f.bias"] += 1
    save_file(tensors, tuned / "model.safetensors")
    assert "left behind: transformer.ln_f.bias\n" in run(*args, "--overwrite").out
    assert "1 tensor in full; 0 left behind" in flat(run(*args, "--overwrite", "--full").out)
    kept = read_adapter(again).trained["transformer.ln_f.bias"]
    assert torch.equal(kept, tensors["transformer.ln_f.bias"])


# ----------------------------------------------------------------- schema, exit codes, interruption


def test_schema_and_version(run):
    assert json.loads(run("schema").out) == schema.json_schema()
    assert run("--version").out == f"lora-inject {li.__version__}\n"


@pytest.mark.parametrize(
    "args",
    [
        "",
        "nonsense",
        "plan a.yaml",
        "plan a.yaml model more",
        "inspect",
        "inspect a --nonsense",
        "inspect one.safetensors --prefer config",
        "analyze a b c",
        "analyze a --any-base",
        "analyze a --report .",
        "merge base adapter",
        "merge base adapter -o out --min-kept 1.5",
        "merge base adapter -o out --dtype int8",
        "merge base adapter -o out --workers 0",
        "merge base adapter -o out --rename inner",
        "merge base one two -o out -w 1",
        "merge base one -o out -w nan",
        "verify base adapter",
        "extract base tuned -o out",
        "extract base tuned --rank 2",
        "extract base tuned -o out --rank 0",
        "schema more",
    ],
)
def test_wrong_usage_is_exit_code_2(run, args):
    ran = run(*args.split())
    assert ran.code == 2
    assert ran.err if args else ran.out


def test_every_refusal_of_the_package_is_exit_code_1_and_a_defect_is_none(run, monkeypatch):
    kinds = [kind for kind in (getattr(li, name) for name in li.__all__)
             if isinstance(kind, type) and issubclass(kind, li.LoraInjectError)]  # fmt: skip
    assert len(kinds) >= 7
    for kind in (*kinds, RuntimeError):

        def fail(kind=kind) -> None:
            raise kind("asked", "found", "remedy")

        monkeypatch.setattr(schema, "json_schema", fail)
        if kind is RuntimeError:
            with pytest.raises(RuntimeError, match="asked"):
                app(["schema"])
        else:
            ran = run("schema")
            assert (ran.code, ran.out, ran.err) == (1, "", "Error: asked: found. remedy.\n")


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


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="has no disk that is always full")
def test_what_becomes_of_the_output_changes_neither_the_work_nor_the_exit_code(
    files, tmp_path, forks
):
    """A failed check stays a failure, and a full disk does not deny what was written."""
    out = tmp_path / "out"
    for code, args in (
        (0, ["merge", files / "base", files / "one", "-o", out]),
        (0, ["verify", files / "base", files / "one", out]),
        (1, ["verify", files / "base", files / "one", out, "-w", "2"]),
    ):
        done = forks.start(program_into, "not read", *args)
        assert (done.wait(), done.err()) == (code, "")
    assert (out / "model.safetensors").exists()
    done = forks.start(program_into, "full", "combine", files / "one", "-o", tmp_path / "sum")
    assert done.wait() == 1
    assert "No space left on device. The command has done its work" in done.err()
    assert read_adapter(tmp_path / "sum").sites


def script(path: str, *args: object) -> None:
    sys.argv = [path, *map(str, args)]
    runpy.run_path(path, run_name="__main__")


@pytest.mark.parametrize("way", ["-m", "script"])
def test_both_ways_to_call_it_print_errors_without_a_traceback(way, forks):
    path = shutil.which("lora-inject", path=str(Path(sys.executable).parent))
    if way == "script" and path is None:
        pytest.skip("the package is not installed here, so there is no script")
    start = (program,) if way == "-m" else (script, path)
    done = forks.start(*start, "inspect", "nowhere")
    assert (done.wait(), done.out()) == (1, "")
    words = "Error: read adapter 'nowhere': there is no such file or directory."
    assert done.err().startswith(words)
    assert "Traceback" not in done.err()


# ------------------------------------------------------------------------------------- how it looks


def test_tables_fit_80_columns_and_no_name_is_broken(run, files, tmp_path, monkeypatch):
    monkeypatch.delenv("COLUMNS", raising=False)
    large = GPT2Config(n_layer=12, n_embd=3072, architectures=["GPT2LMHeadModel"])
    large.to_json_file(tmp_path / "config.json")
    text = "bias: all\ntargets: ['attn\\.c_attn', 'mlp\\..*', 'lm_head']\n"
    (tmp_path / "lora.yaml").write_text(text)
    for args in (
        ("plan", tmp_path / "lora.yaml", tmp_path),
        ("inspect", files / "one", "--all"),
        ("analyze", files / "one", files / "two", "--base", files / "base"),
    ):
        lines = run(*args).out.splitlines()
        assert max(map(len, lines)) <= 80, args
        assert all(line == line.rstrip() for line in lines)
    long = "a_rather_long_name_of_a_module_" * 4
    net = torch.nn.ModuleDict({long: torch.nn.Linear(6, 5)})
    li.inject(net, {"rank": 2, "targets": [long]})
    assert long in run("inspect", li.save_adapter(net, tmp_path / "long")).out.splitlines()


def test_progress_and_colors_are_for_terminals_and_go_to_stderr(capsys, monkeypatch, run, files):
    for terminal in (False, True):
        if terminal:
            monkeypatch.setenv("FORCE_COLOR", "1")
        with show.progress_bar("merging") as update:
            update(1, 2)
        out, err = capsys.readouterr()
        assert (out, "merging" in err) == ("", terminal)
    monkeypatch.delenv("FORCE_COLOR")
    assert "\x1b" not in run("plan", "nowhere.yaml", files / "one").err


def test_help_lists_the_commands_as_people_need_them(run):
    text = run("-h").out
    names = re.findall(r"^  ([a-z-]+)  ", text.partition("Commands:")[2], re.MULTILINE)
    assert names == list(EXAMPLES)
    known = ["plan", "inspect", "analyze", "merge", "verify", "extract", "schema"]
    assert [name for name in names if name in known] == known
    assert "..." not in text.partition("Commands:")[2]  # each line is a whole sentence
    assert {info.name for info in app.registered_commands} == set(names)
    assert "Exit codes: 0 done" in text


@pytest.mark.parametrize("info", app.registered_commands, ids=lambda info: info.name)
def test_help_of_every_command_names_its_arguments_and_speaks_no_python(run, info):
    ran = run(info.name, "--help")
    assert ran.code == 0
    usage = ran.out.partition("\n")[0]
    for argument in set(re.findall(r"\b[A-Z]{4,}\b", info.callback.__doc__)) - {"JSON"}:
        assert argument in usage
    assert not re.search(r"<\w|{|\bbool\b|list\[|\.\.\.\.", ran.out)
    assert not re.search(r"^ *--[\w-]+, --", ran.out, re.MULTILINE)  # each option has one name
    assert f"Example:\n  lora-inject {info.name} " in ran.out
    assert "Exit codes: 0 done" in ran.out
