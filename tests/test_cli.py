"""The command line: what each command prints, where, and with which exit code.

Numbers are compared with a dense float64 reference made here from the files themselves,
never with what the package says elsewhere.
"""

import json
import os
import re
import shutil
import sys
from pathlib import Path

import pytest
import torch
from conftest import fill
from helpers.checkpoints import load_checkpoint
from helpers.forks import program
from safetensors.torch import load_file, save_file
from transformers import GPT2Config, GPT2LMHeadModel

import lora_inject as li
from lora_inject.checkpoint import merge_files
from lora_inject.cli import app, show
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


def flat(text: str) -> str:
    """Sentences in one line each."""
    return " ".join(text.replace("│", " ").split())


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
    for args in (
        ("plan", files / "lora.yaml", "{}", "--json"),
        ("inspect", files / "one", "--base", "{}"),
    ):
        hub, folder, nowhere = (
            run(*(str(arg).format(model) for arg in args))
            for model in ("user/tiny", files / "base", "gpt3")
        )
        assert hub.out.replace("user/tiny", str(files / "base")) == folder.out != ""
        assert "nor a model of this name in the hub's cache" in flat(nowhere.err)
    (tmp_path / "runs").mkdir()
    said = flat(run("plan", files / "lora.yaml", "runs/mine").err)
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
        A = read_adapter(files / "one").sites[site["name"]].A
        assert site["A"]["norm"] == pytest.approx(float(A.double().norm()), rel=1e-12)
        assert site["A"]["shape"] == list(A.shape)
    said = run("inspect", files / "one").out
    assert said.endswith("\n4 sites: 576 in A and B; base known by 29 tensors; finite\n")
    assert "transformer.h.{0..1}.attn.c_attn x2" in said


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


# -------------------------------------------------------------------------------- merge and verify


@pytest.mark.parametrize("base", ["base", "sharded"])
@pytest.mark.parametrize(
    "parts", [{"one": 1.0}, {"one": 1.0, "two": 1.0}, {"one": 0.5, "two": -0.25}], ids=str
)
def test_merge_adds_the_dense_deltas(run, files, tmp_path, base, parts):
    out, flags = tmp_path / "out", []
    if set(parts.values()) != {1.0}:  # which is what it takes without flags
        flags = [flag for weight in parts.values() for flag in ("--weight", weight)]
    ran = run("merge", files / base, *(files / name for name in parts), "-o", out, *flags)
    assert ran.code == 0, ran.err
    wanted = {name: tensor.double() for name, tensor in load_checkpoint(files / base).items()}
    for adapter, weight in parts.items():
        for name, delta in dense(files / adapter).items():
            wanted[name] = wanted[name] + weight * delta
    merged = load_checkpoint(out)
    assert merged.keys() == wanted.keys()
    for name, tensor in merged.items():
        assert torch.allclose(tensor.double(), wanted[name], rtol=0, atol=1e-7), name
    assert f"merged 4 of {len(wanted)} tensors into {out}" in flat(ran.out)


def test_merge_replaces_a_checkpoint_only_when_asked_and_only_a_checkpoint(
    run, files, tmp_path, monkeypatch
):
    out = tmp_path / "out"
    args = ["merge", files / "base", files / "one", "-o", out]
    assert run(*args).code == 0
    first = (out / "model.safetensors").read_bytes()
    assert "--overwrite replaces a checkpoint" in run(*args, "--weight", "2").err

    def fails(*_):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(merge_files, "rename_folder", fails)  # at the end
        assert run(*args, "--weight", "2", "--overwrite").code == 1
    assert (out / "model.safetensors").read_bytes() == first
    assert run(*args, "--weight", "2", "--overwrite").code == 0
    second = (out / "model.safetensors").read_bytes()
    assert second != first
    assert [path.name for path in tmp_path.glob("*out*")] == ["out"]
    (out / "notes").mkdir()
    assert "what is in it is no checkpoint" in run(*args, "--overwrite").err
    assert (out / "model.safetensors").read_bytes() == second


def test_merge_dry_run_writes_nothing_and_says_what_is_lacking(run, files, tmp_path, monkeypatch):
    args, out = ("merge", files / "base", files / "one", "--dry-run"), tmp_path / "out"
    ran = run(*args, "-o", out)
    assert ran.code == 0
    assert "transformer.h.{0..1}.mlp.c_fc.weight x2" in ran.out
    assert re.search(r"would write .* copied as they are.* nothing was written", flat(ran.out))
    data = json.loads(run(*args, "--json").out)
    assert {t["name"] for t in data["tensors"]} == set(dense(files / "one"))
    assert data["output_bytes"] < data["free_bytes"]
    assert list(tmp_path.iterdir()) == []
    monkeypatch.setattr("lora_inject.checkpoint.free_bytes", lambda folder: 7)
    assert "7 bytes free, which is NOT enough," in run(*args, "-o", out).out


def test_merge_says_loudly_or_refuses_where_rounding_leaves_too_little(run, files, tmp_path):
    args = ("merge", files / "bf16", files / "one", "--weight", 1e-7)  # far below half an ulp
    ran = run(*args, "-o", tmp_path / "out")
    assert ran.code == 0
    assert ran.err.startswith("warning: rounding left 0.0000 of every delta")
    ran = run(*args, "--min-kept", 0.99, "-o", tmp_path / "strict")
    assert (ran.code, (tmp_path / "strict").exists()) == (1, False)
    assert ran.err.startswith("Error: keep at least 0.99 of every delta: rounding leaves")
    assert run(*args[:3], "--min-kept", 0.9, "-o", tmp_path / "w", "--dtype", "float32").code == 0


def test_verify_finds_one_flipped_bit(run, files, tmp_path):
    out, parts = tmp_path / "out", (files / "one", files / "two")
    run("merge", files / "base", *parts, "-w", 1, "-w", 2, "-o", out, "--verify")
    args = ("verify", files / "base", *parts, out, "-w", 1, "-w", 2)
    ran = run(*args)
    assert (ran.code, ran.out.partition(" again")[0]) == (0, "verified: 4 tensors computed")
    tensors = load_file(out / "model.safetensors")
    tensors["transformer.h.1.ln_1.weight"].view(torch.int32)[3] ^= 1
    save_file(tensors, out / "model.safetensors", {"format": "pt"})
    ran = run(*args)
    assert (ran.code, ran.err, "NOT verified" in ran.out) == (1, "", True)
    ran = run(*args, "--json")
    assert (ran.code, len(json.loads(ran.out)["problems"])) == (1, 1)


def test_extract_is_the_reverse_of_merge(run, files, tmp_path):
    tuned, again = tmp_path / "tuned", tmp_path / "again"
    run("merge", files / "base", files / "two", "-o", tuned)
    tensors = load_file(tuned / "model.safetensors")
    tensors["transformer.ln_f.bias"] += 1
    save_file(tensors, tuned / "model.safetensors")
    args = ("extract", files / "base", tuned, "-o", again, "--rank", 1)
    said = run(*args).out
    assert "left behind: transformer.ln_f.bias\n" in said
    assert flat(said).endswith("2 sites, 0 tensors in full; 1 left behind, 25 equal to the base's")
    for name, site in read_adapter(again).sites.items():
        delta = site.scale * (site.B.double() @ site.A.double()).T
        wanted = dense(files / "two")[f"{name}.weight"]
        assert float((delta - wanted).norm() / wanted.norm()) < 1e-5
    assert run(*args).code == 1  # it is there
    data = json.loads(run(*args, "--overwrite", "--full", "--json").out)
    assert (data["output"], data["left"]) == (str(again), [])
    kept = read_adapter(again).trained["transformer.ln_f.bias"]
    assert torch.equal(kept, tensors["transformer.ln_f.bias"])


# ----------------------------------------------------------------- schema, exit codes, interruption


def test_schema_version_and_no_command(run):
    assert json.loads(run("schema").out) == schema.json_schema()
    assert run().code == 2
    assert run("--version").out == f"lora-inject {li.__version__}\n"


def test_every_refusal_of_the_package_is_exit_code_1_and_a_defect_is_none(run, monkeypatch):
    for kind in (li.ConfigError, li.FormatError, RuntimeError):

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


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="has no disk that is always full")
def test_what_becomes_of_the_output_changes_neither_the_work_nor_the_exit_code(
    files, tmp_path, forks
):
    """There is no traceback; a failed check stays a failure, and what was written is not denied."""
    out, combine = tmp_path / "out", ("combine", files / "one", "-o", tmp_path / "sum")
    verify = ("verify", files / "base", files / "one", out)
    for what, args, code, said in (
        ("not read", ("merge", files / "base", files / "one", "-o", out), 0, ""),
        ("not read", verify, 0, ""),
        ("not read", (*verify, "-w", "2"), 1, ""),
        ("closed", ("schema",), 0, ""),
        ("full", ("schema",), 1, "No space left on device. Check the path and the disk"),
        ("full", combine, 1, "No space left on device. The command has done its work"),
    ):
        done = forks.start(program_into, what, *args)
        assert done.wait() == code
        assert said in done.err()
        assert said or not done.err()
        assert "Traceback" not in done.err()
    assert (out / "model.safetensors").exists()
    assert read_adapter(tmp_path / "sum").sites


@pytest.mark.parametrize("info", app.registered_commands, ids=lambda info: info.name)
def test_help_of_every_command_ends_with_an_example(run, info):
    ran = run(info.name, "--help")
    assert ran.code == 0
    assert f"Example:\n  lora-inject {info.name} " in ran.out
