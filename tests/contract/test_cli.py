"""The command line: what each command says, where, with which exit code, and what it writes.

Numbers are compared with updates that are formed here from the files themselves.
"""

import json
import os
import re
import shutil
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import fill
from helpers.forks import program
from helpers.merging import load_checkpoint
from helpers.refusals import refused
from helpers.states import SITES, edit_config, effect, linear, same_effects, spoil, state_of
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import GPT2Config, GPT2LMHeadModel

import lora_inject as li

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
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder: a base in three forms, two adapters of it, the config of the first."""
    folder = tmp_path_factory.mktemp("cli")
    model = tiny_gpt2()
    model.save_pretrained(folder / "base")
    model.save_pretrained(folder / "sharded", max_shard_size="8KB")
    tiny_gpt2().bfloat16().save_pretrained(folder / "bf16")
    for name, config in CONFIGS.items():
        fill(li.inject(model, li.Config.from_text(config), name), name, 0.2)
        li.save_adapter(model, folder / name, name)
    texts = {
        "lora.yaml": CONFIG,
        "typo.yaml": "rnak: 4\ntargets: [c_attn]",
        "none.yaml": "targets: [c_atn]",
        "empty/nothing.txt": "",
        "broken/config.json": "{",
        "unknown/config.json": '{"model_type": "no_such_model"}',
    }
    for name, text in texts.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(text)
    return folder


def updates(adapter: Path) -> dict[str, Tensor]:
    """The update of each weight, float64, from the A and B of a PEFT folder."""
    tensors, found = load_file(adapter / "adapter_model.safetensors"), {}
    for key, A in tensors.items():
        name, is_A, _ = key.removeprefix("base_model.model.").partition(".lora_A.")
        if is_A:
            B = tensors[key.replace(".lora_A.", ".lora_B.")]
            found[f"{name}.weight"] = SCALES[adapter.name] * (B.double() @ A.double()).T
    return found  # Conv1D: (in, out)


def flat(text: str) -> str:
    """Sentences in one line each."""
    return " ".join(text.replace("│", " ").split())


# plan ---------------------------------------------------------------------------------------------


def test_plan_prints_what_each_rule_meets(run: Any, files: Path) -> None:
    ran = run("plan", files / "lora.yaml", files / "base")
    assert ran.code == 0
    assert "GPT2LMHeadModel" in ran.err
    for shown in (
        r"rule 1 'attn\.c_attn': rank 2, scale 4/2, kaiming",
        "transformer.h.{0..1}.attn.c_attn  x2  conv1d  16 -> 48 [q, v]  128 each  256",
        "transformer.h.{0..1}.mlp.c_fc  x2  conv1d  16 -> 64  160 each  320",
        "4 sites: 576 in A and B = 576 trainable, 7.83 % of 7,360",
    ):
        assert shown in ran.out


@pytest.mark.parametrize("keys", [(), ("--keys",)], ids=" ".join)
@pytest.mark.parametrize(
    "model",
    ["base", "base/config.json", "base/model.safetensors", "sharded/model.safetensors.index.json"],
)
def test_plan_finds_the_same_sites_whatever_it_plans_on(run, files, model, keys) -> None:
    ran = run("plan", files / "lora.yaml", files / model, "--json", *keys)
    assert ran.code == 0
    data, live = json.loads(ran.out), li.plan(tiny_gpt2(), files / "lora.yaml")
    assert [(s["name"], s["kind"]) for s in data["sites"]] == [(s.name, s.kind) for s in live.sites]
    assert (data["n_lora"], data["n_base"]) == (576, live.n_base)
    assert data["assumed"] is bool(keys or "model.safetensors" in model)


def test_plan_of_gpt3_175b_allocates_no_weight(run: Any, files: Path, tmp_path: Path) -> None:
    config = GPT2Config(n_layer=96, n_embd=12288, n_head=96, n_positions=2048, vocab_size=50257)
    config.to_json_file(tmp_path / "config.json")
    data = json.loads(run("plan", files / "lora.yaml", tmp_path, "--json").out)
    assert data["n_sites"] == 192
    # q and v of c_attn: 2 (12,288 + 12,288) each; c_fc: 12,288 + 49,152; times rank 2 and 96 layers
    assert data["n_lora"] == 96 * 2 * (2 * 2 * 12288 + 5 * 12288)
    assert data["n_base"] == 174_604_259_328  # 50,257 d + 2,048 d + 96 (12 d^2 + 13 d) + 2 d


def test_plan_never_runs_code_of_the_model(run: Any, files: Path, tmp_path: Path) -> None:
    config = {"model_type": "hostile", "architectures": ["Hostile"]}
    config["auto_map"] = {"AutoConfig": "evil.Hostile", "AutoModel": "evil.Hostile"}
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    ran = run("plan", files / "lora.yaml", tmp_path)
    assert (ran.code, (tmp_path / "ran").exists()) == (1, False)
    assert "--keys" in ran.err


def test_names_of_the_hub_are_looked_up_in_its_local_cache(
    run, files, tmp_path, monkeypatch
) -> None:
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
        assert "hub" in flat(nowhere.err)
    (tmp_path / "runs").mkdir()
    assert "hub" not in flat(run("plan", files / "lora.yaml", "runs/mine").err)


# inspect ------------------------------------------------------------------------------------------


def test_inspect_reports_the_norms_of_the_updates_in_the_files(run: Any, files: Path) -> None:
    ran = run("inspect", files / "one", "--json")
    assert (ran.code, ran.err) == (0, "")
    data, due = json.loads(ran.out), updates(files / "one")
    assert [f"{site['name']}.weight" for site in data["sites"]] == list(due)
    for site in data["sites"]:
        assert site["delta_norm"] == pytest.approx(
            float(due[f"{site['name']}.weight"].norm()), rel=1e-9
        )
        assert (site["rank"], site["scale"]) == (2, 2.0)
        A = li.read_adapter(files / "one").sites[site["name"]].A
        assert site["A"]["norm"] == pytest.approx(float(A.double().norm()), rel=1e-12)
        assert site["A"]["shape"] == list(A.shape)
    said = run("inspect", files / "one").out
    assert "4 sites: 576 in A and B" in said
    assert "transformer.h.{0..1}.attn.c_attn x2" in said


def test_no_name_reaches_the_terminal_raw(run: Any, files: Path, tmp_path: Path) -> None:
    """A terminal obeys escape sequences; readers refuse such tensors, paths may hold them."""
    name = "evil\x1b]0;title\x07\x1b[2J\nfinite\u202e"
    shown = r"evil\x1b]0;title\x07\x1b[2J\nfinite\u202e"
    folder = shutil.copytree(files / "one", tmp_path / name)
    merged = run("merge", files / "base", folder, "-o", tmp_path / f"out-{name}", "--dry-run")
    page = run("analyze", folder, "--report", tmp_path / name / "report.html")
    missing = run("inspect", tmp_path / f"{name}2")
    for text in (merged.out, page.err, missing.err):
        assert shown in text.replace("\n", r"\n")
        assert all(c.isprintable() or c == "\n" for c in text)


def test_a_folder_that_was_edited_is_read_as_its_config_says(run, files, tmp_path) -> None:
    folder = edit_config(shutil.copytree(files / "two", tmp_path / "edited"), lora_alpha=30)
    data = json.loads(run("inspect", folder, "--json").out)
    assert {site["scale"] for site in data["sites"]} == {30.0}


# merge, verify, extract ---------------------------------------------------------------------------


@pytest.mark.parametrize("base", ["base", "sharded"])
@pytest.mark.parametrize(
    "parts", [{"one": 1.0}, {"one": 1.0, "two": 1.0}, {"one": 0.5, "two": -0.25}], ids=str
)
def test_merge_adds_the_updates_of_the_files(run, files, tmp_path, base, parts) -> None:
    out, flags = tmp_path / "out", []
    if set(parts.values()) != {1.0}:  # which is what it takes without flags
        flags = [flag for weight in parts.values() for flag in ("--weight", weight)]
    ran = run("merge", files / base, *(files / name for name in parts), "-o", out, *flags)
    assert ran.code == 0, ran.err
    wanted = {name: tensor.double() for name, tensor in load_checkpoint(files / base).items()}
    for adapter, weight in parts.items():
        for name, update in updates(files / adapter).items():
            wanted[name] = wanted[name] + weight * update
    merged = load_checkpoint(out)
    assert merged.keys() == wanted.keys()
    for name, tensor in merged.items():
        assert torch.allclose(tensor.double(), wanted[name], rtol=0, atol=1e-7), name
    assert f"merged 4 of {len(wanted)} tensors into {out}" in flat(ran.out)


def test_merge_replaces_a_checkpoint_only_when_asked_and_only_a_checkpoint(
    run: Any, files: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    weights = out / "model.safetensors"
    args = ["merge", files / "base", files / "one", "-o", out]
    assert run(*args).code == 0
    first = weights.read_bytes()
    assert "--overwrite" in run(*args, "--weight", "2").err
    real = os.rename

    def fails(source: Any, target: Any, **kwargs: Any) -> None:
        if str(target) == str(out) and "merging" in str(source):
            raise OSError(28, "No space left on device")
        real(source, target, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(os, "rename", fails)  # at the end
        assert run(*args, "--weight", "2", "--overwrite").code == 1
    assert weights.read_bytes() == first
    assert run(*args, "--weight", "2", "--overwrite").code == 0
    second = weights.read_bytes()
    assert second != first
    assert [path.name for path in tmp_path.glob("*out*")] == ["out"]
    (out / "notes").mkdir()
    assert run(*args, "--overwrite").code == 1
    assert weights.read_bytes() == second


def test_merge_dry_run_writes_nothing_and_says_what_is_lacking(run, files, tmp_path, monkeypatch):
    args, out = ("merge", files / "base", files / "one", "--dry-run"), tmp_path / "out"
    ran = run(*args, "-o", out)
    assert ran.code == 0
    assert "transformer.h.{0..1}.mlp.c_fc.weight x2" in ran.out
    data = json.loads(run(*args, "--json").out)
    assert {t["name"] for t in data["tensors"]} == set(updates(files / "one"))
    assert data["output_bytes"] < data["free_bytes"]
    assert list(tmp_path.iterdir()) == []
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=7))
    assert "7 bytes free, which is NOT enough" in run(*args, "-o", out).out


def test_merge_says_loudly_or_refuses_where_rounding_leaves_too_little(
    run, files, tmp_path
) -> None:
    args = ("merge", files / "bf16", files / "one", "--weight", 1e-7)  # far below half an ulp
    ran = run(*args, "-o", tmp_path / "out")
    assert (ran.code, ran.err.startswith("warning: ")) == (0, True)
    ran = run(*args, "--min-kept", 0.99, "-o", tmp_path / "strict")
    assert (ran.code, (tmp_path / "strict").exists()) == (1, False)
    assert "0.99" in ran.err
    assert run(*args[:3], "--min-kept", 0.9, "-o", tmp_path / "w", "--dtype", "float32").code == 0


def test_extract_is_the_reverse_of_merge(run: Any, files: Path, tmp_path: Path) -> None:
    tuned, again = tmp_path / "tuned", tmp_path / "again"
    run("merge", files / "base", files / "two", "-o", tuned)
    tensors = load_file(tuned / "model.safetensors")
    tensors["transformer.ln_f.bias"] += 1
    save_file(tensors, tuned / "model.safetensors")
    args = ("extract", files / "base", tuned, "-o", again, "--rank", 1)
    said = flat(run(*args).out)
    assert "left behind: transformer.ln_f.bias" in said
    assert "2 sites, 0 tensors in full; 1 left behind, 25 equal" in said
    for name, site in li.read_adapter(again).sites.items():
        wanted = updates(files / "two")[f"{name}.weight"]
        assert float((effect(site).T - wanted).norm() / wanted.norm()) < 1e-5
    assert run(*args).code == 1  # it is there
    data = json.loads(run(*args, "--overwrite", "--full", "--json").out)
    assert (data["output"], data["left"]) == (str(again), [])
    kept = li.read_adapter(again).trained["transformer.ln_f.bias"]
    assert torch.equal(kept, tensors["transformer.ln_f.bias"])


# Adapters' files: combine, truncate, diff, rename, convert ----------------------------------------


@pytest.fixture
def two(tmp_path: Path) -> list[tuple[Path, li.AdapterState]]:
    """Two adapters of one base on disk, and as values."""
    states = {"one": state_of(SITES["linear"], SITES["conv1d"]) * 0.5}
    states["two"] = -state_of(SITES["linear"])
    return [(li.write_adapter(state, tmp_path / name), state) for name, state in states.items()]


def test_combine_writes_the_weighted_sum(run: Any, two: Any, tmp_path: Path) -> None:
    (one, a), (other, b) = two
    out = tmp_path / "sum"
    ran = run("combine", one, other, "-w", 2, "-w", 0.5, "-o", out, "--json")
    assert json.loads(ran.out) == {"output": str(out), "ranks": {"h.0.fc": 4, "h.0.c": 3}}
    found = li.read_adapter(out).sites
    wanted = 2 * effect(a.sites["h.0.fc"]) + 0.5 * effect(b.sites["h.0.fc"])
    assert (effect(found["h.0.fc"]) - wanted).abs().max() < 1e-6
    assert (effect(found["h.0.c"]) - 2 * effect(a.sites["h.0.c"])).abs().max() < 1e-6
    again = ("combine", one, other, "-o", out, "--overwrite")
    ran = run(*again, "--method", "svd", "--rank", 1, "--dtype", "bfloat16")
    assert "2 sites, rank 1, 0 trained tensors, 23 parameters" in ran.out
    assert li.read_adapter(out).sites["h.0.fc"].A.dtype == torch.bfloat16


def test_truncate_says_the_error_of_each_site(run: Any, two: Any, tmp_path: Path) -> None:
    one, a = two[0]
    ran = run("truncate", one, "-o", tmp_path / "cut", "--rank", 1)
    rows = dict(line.split(maxsplit=1) for line in ran.out.splitlines()[1:3])
    cut = li.read_adapter(tmp_path / "cut")
    for name, site in a.sites.items():
        whole = effect(site)
        lost = (whole - effect(cut.sites[name])).norm() / whole.norm()
        assert rows[name].split() == [str(len(site.A)), "1", f"{float(lost):.3g}"]


def test_diff_compares_site_by_site(run: Any, two: Any) -> None:
    (one, a), (other, b) = two
    text = run("diff", one, other, "--all").out
    (row,) = (line.split() for line in text.splitlines() if line.startswith("h.0.c "))
    assert row[1:4] == ["3", "and", "0"]
    assert f"cosine {li.diff(a, b).cosine:.6f}, over all sites" in text
    due = json.loads(json.dumps(li.diff(a, b).to_dict()))
    assert json.loads(run("diff", one, other, "--json").out) == due
    assert "equal in every bit" in run("diff", one, one).out


def test_rename_writes_other_names(run: Any, two: Any, tmp_path: Path) -> None:
    one, a = two[0]
    rows = replace(a, trained={"h.wte.weight": torch.ones(1, 4)}, rows={"h.wte.weight": (3,)})
    path = li.write_adapter(rows, tmp_path / "rows")
    ran = run("rename", path, "h=model.layers", "fc=mlp", "-o", tmp_path / "new", "--json")
    names = {"h.0.fc": "model.layers.0.mlp", "h.0.c": "model.layers.0.c"}
    names["h.wte.weight"] = "model.layers.wte.weight"
    assert json.loads(ran.out)["names"] == names
    written = li.read_adapter(tmp_path / "new")
    assert [*written.sites, *written.rows] == [*names.values()]
    shorter = run("rename", one, r"h\.0=", "-o", tmp_path / "short")  # it removes segments
    assert "'fc', 'c'" in shorter.out


def test_a_file_of_a_pipeline_is_read_part_by_part(run: Any, tmp_path: Path) -> None:
    path = tmp_path / "both.safetensors"
    pairs = {"unet.a.lora_A": (2, 4), "unet.a.lora_B": (6, 2)}
    pairs |= {key.replace("unet", "text_encoder"): shape for key, shape in pairs.items()}
    save_file({f"{key}.weight": torch.ones(shape) for key, shape in pairs.items()}, path)
    for args in (("inspect", path), ("convert", path, tmp_path / "out", "--to", "peft")):
        ran = run(*args)
        assert (ran.code, ran.out) == (1, "")
        assert "--from-component text_encoder" in ran.err
        assert run(*args, "--from-component", "unet").code == 0
    assert run("inspect", tmp_path / "out", "--from-component", "unet").code == 2
    to = ("convert", tmp_path / "out", tmp_path / "unet.safetensors", "--to", "kohya")
    ran = run(*to)
    assert (ran.code, "--component unet" in ran.err) == (1, True)
    assert run(*to, "--component", "unet").code == 0


def test_what_is_lost_is_said_of_what_was_written_only(run: Any, tmp_path: Path) -> None:
    path = li.write_adapter(state_of(linear("h.0.fc", alpha=3.0, dropout=0.5)), tmp_path / "a")
    ran = run("convert", path, tmp_path / "b", "--to", "litgpt")  # it asks for the base
    assert (ran.code, "dropout" in ran.err, "--base BASE" in flat(ran.err)) == (1, False, True)
    ran = run("convert", path, tmp_path / "c", "--to", "portable")
    assert (ran.code, "dropout" in ran.err) == (0, True)
    same_effects(li.read_adapter(tmp_path / "c"), li.read_adapter(path))


# Exit codes: what is refused is 1, wrong usage is 2; nothing is written ---------------------------

EXITS = """
plan {files}/lora.yaml {files}/empty => 1 .safetensors
plan {files}/lora.yaml {files}/broken => 1 JSON
plan {files}/lora.yaml {files}/unknown => 1 no_such_model
plan {files}/typo.yaml {base} => 1 typo.yaml:1:1 (rnak)
plan {files}/none.yaml {base} => 1 transformer.h.0.attn.c_attn
combine {one} {one} -o {one} => 1 exists already
extract {one} {one} --rank 1 -o {one} => 1 exists already
convert {one} {one} --to peft => 1 exists already
merge {base} {one} -o {one} => 1 not empty
rename {one} x=y -o {out} => 1 'x'
combine {one} {two} -o {out} --method ties => 1 density
merge {one} {base} -o {out} => 1 adapter
inspect {base} => 1 model
inspect {out} => 1 {out}
truncate {one} -o {out} => 2 --rank
rename {one} nothing -o {out} => 2 nothing
check {one} --for all => 2 vllm
inspect {one} --format pefd => 2 peft
combine {one} {two} -o {out} --method tis => 2 dare_ties_svd
combine {one} {two} -o {out} --density 2 => 2 --density
combine {one} {two} -o {out} --rank 0 => 2 --rank
combine {one} {two} -o {out} -w 1 => 2 2 adapters
combine {one} {two} -o {out} -w 1 -w 0 => 2 0 is not a weight
merge {one} {two} => 2 --output
merge {one} {two} -o {out} --min-kept 1.5 => 2 --min-kept
merge {one} {two} -o {out} --rename inner => 2 inner
inspect {one}.safetensors --allow x => 2 --allow
analyze {one} --any-base => 2 --base
"""
ROWS = [row.partition(" => ")[::2] for row in EXITS.strip().splitlines()]


@pytest.mark.parametrize(("command", "due"), ROWS)
def test_what_is_refused_says_why_by_its_exit_code_and_writes_nothing(
    run: Any, two: Any, files: Path, tmp_path: Path, command: str, due: str
) -> None:
    (one, value), (other, _) = two
    out = tmp_path / "out"
    places = {"one": one, "two": other, "files": files, "base": files / "base", "out": out}
    ran = run(*command.format(**places).split())
    code, _, named = due.partition(" ")
    assert (ran.code, ran.out, out.exists()) == (int(code), "", False)
    assert code == "2" or "Error: " in ran.err
    assert named.format(**places) in flat(ran.err)
    assert li.read_adapter(one) == value


NAN = [
    "combine {bad} {good} -o {out}", "combine {good} {bad} --method linear -o {out}",
    "diff {good} {bad}", "analyze {bad} {good}", "truncate {bad} --rank 1 -o {out}",
    "rename {bad} h=x -o {out}", "convert {bad} {out} --to native",
]  # fmt: skip


@pytest.mark.parametrize("command", NAN)
def test_the_adapter_that_holds_nan_is_named_and_nothing_is_written(run, two, tmp_path, command):
    good, bad = (path for path, _ in two)
    spoil(bad, "fc.lora_B.weight", torch.nan, -torch.inf)
    ran = run(*command.format(good=good, bad=bad, out=tmp_path / "out").split())
    assert (ran.code, ran.out, list(tmp_path.glob("out*"))) == (1, "", [])
    said = "".join(ran.err.split())
    assert re.search(r"Bofsite'\w\.0\.fc':itholds2NaN", said)
    assert str(good) not in said
    assert str(bad) in said or "{good}" not in command
    assert "h.0.fc (2)" in flat(run("inspect", bad).out)
    shown = json.loads(run("inspect", bad, "--json").out, parse_constant=pytest.fail)
    assert (shown["n_nonfinite"], shown["sites"][0]["B"]["norm"]) == (2, None)


def test_version_no_command_and_a_defect(run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    assert run().code == 2
    assert run("--version").out == f"lora-inject {li.__version__}\n"

    def broken(*_: Any, **__: Any) -> None:
        raise RuntimeError("a defect")

    monkeypatch.setattr(json, "dumps", broken)
    with pytest.raises(RuntimeError, match="a defect"):  # no refusal: its traceback is shown
        run("schema")


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
    files: Path, tmp_path: Path, forks: Any
) -> None:
    """There is no traceback; a failed check stays a failure, and what was written is not denied."""
    out, combine = tmp_path / "out", ("combine", files / "one", "-o", tmp_path / "sum")
    verify = ("verify", files / "base", files / "one", out)
    for what, args, code, said in (
        ("not read", ("merge", files / "base", files / "one", "-o", out), 0, ""),
        ("not read", verify, 0, ""),
        ("not read", (*verify, "-w", "2"), 1, ""),
        ("closed", ("schema",), 0, ""),
        ("full", ("schema",), 1, "No space left on device"),
        ("full", combine, 1, "has done its work"),
    ):
        done = forks.start(program_into, what, *args)
        assert done.wait() == code
        assert said in done.err()
        assert said or not done.err()
        assert "Traceback" not in done.err()
    assert (out / "model.safetensors").exists()
    assert li.read_adapter(tmp_path / "sum").sites


def test_the_help_of_every_command_ends_with_an_example(run: Any) -> None:
    listed = run("--help").out.partition("Commands:\n")[2].partition("\n\n")[0]
    commands = re.findall(r"^  ([a-z-]+)  ", listed, re.MULTILINE)
    assert len(commands) > 15
    for command in commands:
        ran = run(command, "--help")
        assert ran.code == 0
        assert re.search(rf"Example:\s+lora-inject {command} ", ran.out)


def test_check_takes_programs_that_it_knows(run: Any, two: Any) -> None:
    path = two[0][0]
    with refused(li.FormatError, "'ollama'", "vllm"):
        li.check_adapter(path, "ollama")
    stopped = run("check", path, "--for", "llama.cpp")
    assert stopped.code == 1
    assert "stop: " in stopped.out
    told = json.loads(run("check", path, "--for", "peft", "--json").out)
    assert told == {"client": "peft", "accepted": True, "findings": []}
