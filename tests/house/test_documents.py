"""Every block of the documents runs: Python, YAML, console.

A page is one session in one folder. What a Python block prints stands in a block `output` below it,
long ones without their middle; `WRITE_OUTPUTS=1 pytest tests/house/test_documents.py` writes them.
"""

import contextlib
import importlib
import io
import os
import re
import shlex
import subprocess
import tomllib
from pathlib import Path
from typing import Any

import pytest
import torch
import typer.main
from conftest import script
from helpers.documents import Block, blocks, commands, output_of, renewed, same_output, with_texts
from transformers import GPT2Config, GPT2LMHeadModel

import lora_inject as li
from lora_inject.cli import app

REPO = Path(__file__).parents[2]
PAGES = sorted(str(p.relative_to(REPO)) for p in REPO.glob("docs/**/*.md"))
OTHERS = [str(p.relative_to(REPO)) for p in (*REPO.glob("*.md"), *REPO.glob("scripts/**/*.md"))]
DOCUMENTS = (*sorted(OTHERS), *PAGES)
EXTENDING = "docs/extending.md"
docs_pages = script("docs_pages")
WRITES = os.environ.get("WRITE_OUTPUTS") == "1"
MODULES = ("algebra", "analysis", "checkpoint", "classes", "extending", "formats")
LANGUAGES = {"python", "output", "yaml", "console", "text"}


def run_python(block: Block, names: dict[str, Any], source: str) -> str:
    """Run a block in the session so far, and return what it prints."""
    code = compile("\n" * (block.line - 1) + block.text, source, "exec")
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(code, names)
    return printed.getvalue()


def run_command(command: str, output: str) -> str | None:
    """Check a command, and return what it prints if it is one of ours."""
    words = shlex.split(command.replace("\\\n", ""))
    if "=" in words[0]:  # a variable of the environment
        words.pop(0)
    if words[0] in ("bash", "python"):
        check_options(REPO / words[1], command)
    elif words[0] == "head":
        assert list(REPO.glob(words[-1]))
    elif words[:2] == ["pip", "install"]:
        extras = tomllib.loads((REPO / "pyproject.toml").read_text())["project"]
        for extra in re.findall(r"\.\[([\w,]+)\]", command):
            assert set(extra.split(",")) <= extras["optional-dependencies"].keys()
    elif words[0] == "lora-inject":
        out, err = io.StringIO(), io.StringIO()
        with (
            contextlib.redirect_stdout(out),
            contextlib.redirect_stderr(err),
            pytest.raises(SystemExit) as left,
        ):
            app(words[1:], prog_name="lora-inject")
        assert not left.value.code, err.getvalue()
        printed = out.getvalue().replace(f"{Path.cwd()}/", "")
        if output and not WRITES:
            assert same_output(output, printed), f"{command}\n{printed}"
        return printed
    else:
        pytest.fail(f"do not know how to check: {command}")
    return None


def check_options(program: Path, command: str) -> None:
    """Scripts take too long to run here; their own tests do that."""
    source = program.read_text()
    if program.suffix == ".sh":
        assert subprocess.run(["bash", "-n", program], check=False).returncode == 0
        source += "".join((REPO / p).read_text() for p in re.findall(r"scripts/[\w/]+\.py", source))
    for option in re.findall(r"(?<= )--[\w-]+", command):
        assert f'"{option}"' in source, option


def run_document(source: str, folder: Path) -> None:
    """Run all blocks in order, in a folder as a reader has it, with a GPT-2 of two layers.

    YAML that begins with `# NAME.yaml` is a file from the start.
    """
    os.chdir(folder)
    torch.manual_seed(0)
    tiny = GPT2Config(n_layer=2, n_embd=32, n_head=2, n_positions=32)
    GPT2LMHeadModel(tiny).save_pretrained("gpt2")
    text = (REPO / source).read_text()
    all_blocks = blocks(text)
    for block in all_blocks:
        name = re.match(r"# ([\w.-]+\.yaml)\n", block.text)
        if block.language == "yaml" and name:
            Path(name[1]).write_text(block.text)
    names: dict[str, Any] = {"__name__": "readme"}
    texts: dict[Block, str] = {}
    for block in all_blocks:
        if block.language == "python":
            printed = run_python(block, names, source)
            shown = output_of(block, all_blocks)
            if WRITES and shown is not None:
                texts[shown] = renewed(shown.text, printed)
            else:
                same = same_output(shown.text if shown else "", printed)
                assert same, f"the block at line {block.line} prints\n{printed}"
        elif block.language == "yaml":
            li.Config.from_text(block.text, source=f"{source}:{block.line}")
        elif block.language == "console":
            texts[block] = ""
            for command, shown in commands(block):
                printed = run_command(command, shown)
                is_ours = shown and printed is not None
                texts[block] += f"$ {command}{renewed(shown, printed) if is_ours else shown}"
    if WRITES:
        (REPO / source).write_text(with_texts(text, texts))


# PEFT asks the model for a property that transformers has renamed.
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
@pytest.mark.parametrize("page", sorted({"README.md", "CONTRIBUTING.md", *PAGES} - {EXTENDING}))
def test_every_block_of_a_page_runs(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # and back, afterwards
    run_document(page, tmp_path)


def test_every_extension_runs(tmp_path, forks):
    """How to add a kind, a variant, a format, another library: in a process that ends with them."""
    forks.start(run_document, EXTENDING, tmp_path).result()


@pytest.mark.parametrize("name", DOCUMENTS)
def test_every_block_runs_or_says_why_not_and_links_lead_somewhere(name):
    text = (REPO / name).read_text()
    public = {"lora_inject", *(f"lora_inject.{module}" for module in MODULES)}
    for block in blocks(text):
        imported = re.findall(r"^ *(?:from|import) (lora_inject[\w.]*)", block.text, re.MULTILINE)
        assert {*imported} <= public, f"{name}:{block.line}"
        assert block.language in LANGUAGES, f"{name}:{block.line}"
        if block.language == "text":
            assert re.fullmatch(r"<!-- not run: .+ -->", block.before), f"{name}:{block.line}"
    prose = re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL)
    assert not re.search(r"^[^-*\d\s].*\n\n    \S", prose, re.MULTILINE), "code without a fence"
    for target in re.findall(r"\]\(([^)#]+)\)", prose):
        elsewhere = target.startswith(("https://", "../../actions/"))  # a page of the host
        assert elsewhere or ((REPO / name).parent / target).exists(), target
    for path in re.findall(r"`((?:scripts|configs|tests|lora_inject)/[\w./*-]*)`", text):
        assert list(REPO.glob(path.rstrip("/"))), path
    for test in re.findall(r"`(test_\w+\.py)`", text):
        assert list((REPO / "tests").rglob(test)), test


def test_the_reference_has_every_name_key_command_and_error():
    pages = [docs_pages.on_page_markdown((REPO / page).read_text()) for page in PAGES]
    assert not any("<!-- generated" in page for page in pages)
    words = {*re.findall(r"^::: (\S+)$|`([\w.-]+)`", "\n".join(pages), re.MULTILINE)}
    words = {word for pair in words for word in pair}
    modules = ("lora_inject", *(f"lora_inject.{m}" for m in MODULES))
    names = {f"{m}.{name}" for m in modules for name in importlib.import_module(m).__all__}
    assert names - {"lora_inject.__version__"} <= words
    schemas = (li.Config, li.classes.Rule, li.classes.Expect)
    assert {key for schema in schemas for key in schema.model_fields} <= words
    assert {error.__name__ for error in li.LoraInjectError.__subclasses__()} <= words
    group = typer.main.get_command(app)
    every = [group.get_command(None, name) for name in group.list_commands(None)]
    options = {*re.findall(r"(?<=[` ])--?[a-z][\w-]*", "\n".join(pages))}
    assert {o for c in every for p in c.params for o in p.opts if o[0] == "-"} <= options


def test_no_path_of_some_machine_is_written_anywhere():
    # Places of one machine, not of the system: /proc, /dev and /usr/bin/env are everywhere.
    places = re.compile(r"(?<![\w.:/-])/(?:home|root|work|mnt|Users)/\w")
    kinds = {".py", ".md", ".yaml", ".yml", ".sh", ".toml", ".json", ""}
    folders = ("lora_inject", "tests", "scripts", "configs", "docs", ".github", ".ci")
    paths = [*REPO.iterdir(), *(p for folder in folders for p in (REPO / folder).rglob("*"))]
    for path in paths:
        ours = path.suffix in kinds and "__pycache__" not in path.parts and path.name[:4] != ".git"
        if ours and path.is_file():
            place = places.search(path.read_text(encoding="utf-8"))
            assert place is None, f"{path.relative_to(REPO)}: {place}"
