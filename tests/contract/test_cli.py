"""The command line: what each command says, where, with which exit code, and what it writes.

The numbers of a function are held elsewhere: here its command prints or writes what it returns.
"""

import json
import os
import re
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import fill
from helpers.forks import program
from helpers.merging import load_checkpoint
from helpers.refusals import refused
from helpers.states import SITES, linear, same_effects, spoil, state_of
from safetensors.torch import load_file, save_file
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
    for one, other in ("ab", "ba"):
        (folder / f"loop-{one}").symlink_to(folder / f"loop-{other}")
    return folder


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


@pytest.mark.parametrize("model", ["base", "base/config.json"])
def test_plan_finds_the_sites_of_the_model(run: Any, files: Path, model: str) -> None:
    ran = run("plan", files / "lora.yaml", files / model, "--json")
    assert ran.code == 0
    data, live = json.loads(ran.out), li.plan(tiny_gpt2(), files / "lora.yaml")
    assert [(s["name"], s["kind"]) for s in data["sites"]] == [(s.name, s.kind) for s in live.sites]
    assert (data["n_lora"], data["n_base"]) == (576, live.n_base)


def test_plan_of_gpt3_175b_allocates_no_weight(run: Any, files: Path, tmp_path: Path) -> None:
    config = GPT2Config(n_layer=96, n_embd=12288, n_head=96, n_positions=2048, vocab_size=50257)
    config.to_json_file(tmp_path / "config.json")
    data = json.loads(run("plan", files / "lora.yaml", tmp_path, "--json").out)
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
    assert "load the model" in ran.err


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


# Commands that print what a function returns ------------------------------------------------------

PRINTED: dict[str, tuple[Callable[[Path, Path], Any], list[str]]] = {
    "inspect {one}": (
        lambda one, two: li.analysis.inspect_state(li.read_adapter(one)),  # noqa: TID251 - a public name
        ["4 sites: 576 in A and B", "transformer.h.{0..1}.attn.c_attn x2"],
    ),
    "diff {one} {two}": (lambda one, two: li.diff(one, two), ["cosine", "over all sites"]),
    "diff {one} {one}": (lambda one, two: li.diff(one, one), ["equal in every bit"]),
}


@pytest.mark.parametrize("command", PRINTED)
def test_json_is_what_the_function_returns_and_words_say_it(
    run: Any, files: Path, command: str
) -> None:
    function, shown = PRINTED[command]
    one, two = files / "one", files / "two"
    args = command.format(one=one, two=two).split()
    due = json.loads(json.dumps(function(one, two).to_dict()))
    ran = run(*args, "--json")
    assert (ran.code, ran.err, json.loads(ran.out)) == (0, "", due)
    said = flat(run(*args).out)
    assert all(words in said for words in shown)


def test_no_name_reaches_the_terminal_raw(run: Any, files: Path, tmp_path: Path) -> None:
    """A terminal obeys escape sequences; readers refuse such tensors, paths may hold them."""
    name = "evil\x1b]0;title\x07\x1b[2J\nfinite\u202e"
    shown = r"evil\x1b]0;title\x07\x1b[2J\nfinite\u202e"
    folder = shutil.copytree(files / "one", tmp_path / name)
    merged = run("merge", files / "base", folder, "-o", tmp_path / f"out-{name}", "--dry-run")
    written = run("convert", folder, tmp_path / f"{name}3", "--to", "portable")
    missing = run("inspect", tmp_path / f"{name}2")
    for text in (merged.out, written.out, missing.err):
        assert shown in text.replace("\n", r"\n")
        assert all(c.isprintable() or c == "\n" for c in text)


# merge, extract -----------------------------------------------------------------------------------


def test_merge_adds_the_updates_of_the_files(run: Any, files: Path, tmp_path: Path) -> None:
    out, parts = tmp_path / "out", {"one": 0.5, "two": -0.25}
    flags = [flag for weight in parts.values() for flag in ("--weight", weight)]
    ran = run("merge", files / "sharded", *(files / name for name in parts), "-o", out, *flags)
    assert ran.code == 0, ran.err
    wanted = {name: tensor.double() for name, tensor in load_checkpoint(files / "base").items()}
    for adapter, weight in parts.items():
        tensors = load_file(files / adapter / "adapter_model.safetensors")
        for key, A in tensors.items():
            name, is_A, _ = key.removeprefix("base_model.model.").partition(".lora_A.")
            if is_A:
                B = tensors[key.replace(".lora_A.", ".lora_B.")]
                update = SCALES[adapter] * (B.double() @ A.double()).T  # Conv1D: (in, out)
                wanted[f"{name}.weight"] += weight * update
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
    assert len(data["tensors"]) == 4
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
    same_effects(li.read_adapter(again), li.read_adapter(files / "two"), within=1e-5)
    assert run(*args).code == 1  # it is there
    data = json.loads(run(*args, "--overwrite", "--full", "--json").out)
    assert (data["output"], data["left"]) == (str(again), [])
    kept = li.read_adapter(again).trained["transformer.ln_f.bias"]
    assert torch.equal(kept, tensors["transformer.ln_f.bias"])


# Commands that write adapters: the value of the function, and a line about it ---------------------


@pytest.fixture
def two(tmp_path: Path) -> list[tuple[Path, li.AdapterState]]:
    """Two adapters of one base on disk, and as values."""
    states = {"one": li.combine([state_of(SITES["linear"], SITES["conv1d"])], [0.5])}
    states["two"] = li.combine([state_of(SITES["linear"])], [-1])
    return [(li.write_adapter(state, tmp_path / name), state) for name, state in states.items()]


def low(*adapters: li.AdapterState) -> li.AdapterState:
    return li.algebra.as_dtype(li.combine(adapters, method="svd", rank=1), torch.bfloat16)


Value = Callable[[li.AdapterState, li.AdapterState], li.AdapterState]
WRITTEN: dict[str, tuple[Value, str]] = {
    "combine {one} {two} -w 2 -w 0.5": (
        lambda a, b: li.combine([a, b], [2, 0.5]), "2 sites, ranks 3 to 4",
    ),
    "combine {one} {two} --method svd --rank 1 --dtype bfloat16": (
        low, "2 sites, rank 1, 0 trained tensors, 23 parameters",
    ),
    "truncate {one} --rank 1": (lambda a, b: li.truncate(a, rank=1).state, "h.0.fc 2 1 0."),
    r"rename {one} h\.0= fc=mlp": (
        lambda a, b: li.algebra.rename(a, {r"h\.0": "", "fc": "mlp"}),
        "its names are now 'mlp', 'c'",
    ),
}  # fmt: skip


@pytest.mark.parametrize("command", WRITTEN)
def test_what_is_written_is_the_value_of_the_function(
    run: Any, two: Any, tmp_path: Path, command: str
) -> None:
    value, said = WRITTEN[command]
    (one, a), (other, b) = two
    args = [*command.format(one=one, two=other).split(), "-o", tmp_path / "out"]
    assert said in flat(run(*args).out)
    due = value(a, b)
    assert li.read_adapter(tmp_path / "out") == due
    data = json.loads(run(*args, "--overwrite", "--json").out)
    assert data["output"] == str(tmp_path / "out")
    assert data["ranks"] == {name: site.spec.rank for name, site in due.sites.items()}


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
    ran = run("convert", path, tmp_path / "b", "--to", "gguf")  # it asks for the base
    assert (ran.code, "dropout" in ran.err, "--base BASE" in flat(ran.err)) == (1, False, True)
    ran = run("convert", path, tmp_path / "c", "--to", "portable")
    assert (ran.code, "dropout" in ran.err) == (0, True)
    same_effects(li.read_adapter(tmp_path / "c"), li.read_adapter(path))


def test_equal_values_are_said_to_be_equal_after_a_trip_through_other_programs(
    run: Any, tmp_path: Path
) -> None:
    state = state_of(linear("0", 64, 64, rank=8, alpha=16.0, dropout=0.05), seed=3)
    path = li.write_adapter(state, tmp_path / "a")
    there = li.convert(path, tmp_path / "there", "kohya", component="unet")
    compared = li.diff(path, there)
    assert compared.distance == 0
    assert [site.distance for site in compared.sites.values()] == [0.0]
    assert compared.cosine == pytest.approx(1, abs=1e-15)
    assert not compared.equal  # the dropout is another
    said = run("diff", path, there).out
    assert "equal values" in said
    assert "not equal" not in said
    assert "|one - two| = 0," in said
    state.sites["0"].A[0, 0] *= 1 + 2**-20
    other = li.write_adapter(state, tmp_path / "b")
    assert 0 < li.diff(path, other).distance < 1e-3
    assert "not equal" in run("diff", path, other).out


# Exit codes: what is refused is 1, wrong usage is 2; nothing is written ---------------------------

EXITS = """
plan {files}/lora.yaml {files}/empty => 1 config.json
plan {files}/lora.yaml {files}/broken => 1 JSON
plan {files}/lora.yaml {files}/unknown => 1 no_such_model
plan {files}/typo.yaml {base} => 1 typo.yaml:1:1 (rnak)
plan {files}/none.yaml {base} => 1 transformer.h.0.attn.c_attn
combine {one} {one} -o {one} => 1 exists already
extract {one} {one} --rank 1 -o {one} => 1 exists already
convert {one} {one} --to peft => 1 exists already
merge {base} {one} -o {one} => 1 not empty
merge {base} {one} -o {files}/loop-a => 1 loop
verify {base} {files}/one {files}/loop-a => 1 loop
rename {one} x=y -o {out} => 1 'x'
combine {one} {two} -o {out} --method ties => 1 density
merge {one} {base} -o {out} => 1 adapter
inspect {base} => 1 model
inspect {out} => 1 {out}
truncate {one} -o {out} => 2 --rank
rename {one} nothing -o {out} => 2 nothing
check {one} --for all => 2 vllm
truncate runs/rank=8 --energy 0.9 -o {out} => 1 'runs/rank=8'
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
    "combine {good} {bad} --method linear -o {out}", "diff {good} {bad}", "analyze {bad}",
    "convert {bad} {out} --to native",
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
        run("doctor", "--json")


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
        ("not read", (*verify, "-w", "2"), 1, ""),
        ("closed", ("schema",), 0, ""),
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
    assert len(commands) > 9
    for command in commands:
        ran = run(command, "--help")
        assert ran.code == 0
        assert re.search(rf"Example:\s+lora-inject {command} ", ran.out)


def test_check_says_what_stops_a_program_and_takes_those_that_it_knows(run, two) -> None:
    path = two[0][0]
    with refused(li.FormatError, "'ollama'", "vllm"):
        li.check_adapter(path, "ollama")
    stopped = run("check", path, "--for", "llama.cpp")
    assert (stopped.code, "stop: " in stopped.out) == (1, True)
    told = json.loads(run("check", path, "--for", "peft", "--json").out)
    assert told == {"client": "peft", "accepted": True, "findings": []}
