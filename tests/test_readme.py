"""Every block of the documents runs: Python, YAML, console.

A reader copies blocks in order into one session in one folder, and so does this test. The
folder holds a tiny GPT-2 with random weights under the name `gpt2`. What a Python block prints
stands in a block of the language `output` below it, long ones without their middle. After a change
`WRITE_OUTPUTS=1 pytest tests/test_readme.py` writes what is printed now.
"""

import contextlib
import html
import importlib
import io
import json
import os
import re
import shlex
import subprocess
import sys
import tomllib
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import typer.main
import yaml
from conftest import script
from helpers.documents import Block, blocks, commands, output_of, same_output, with_outputs
from pygments import highlight
from pygments.formatters import HtmlFormatter
from pygments.lexers import BashSessionLexer, PythonConsoleLexer, PythonLexer
from pygments.lexers.special import OutputLexer
from transformers import GPT2Config, GPT2LMHeadModel

import lora_inject as li
from lora_inject import formats
from lora_inject.cli import app
from lora_inject.core.adapter.variants import VARIANTS
from lora_inject.core.layers.kinds import KINDS
from lora_inject.core.spec.rooms import REGISTERED
from lora_inject.core.spec.schema import json_schema
from lora_inject.core.spec.sites import ROLES
from lora_inject.integrations import libraries

REPO = Path(__file__).parents[1]
README = REPO / "README.md"
PAGES = sorted(str(p.relative_to(REPO)) for p in REPO.glob("docs/**/*.md"))
OTHERS = [str(p.relative_to(REPO)) for p in (*REPO.glob("*.md"), *REPO.glob("scripts/**/*.md"))]
DOCUMENTS = (*sorted(OTHERS), *PAGES)
docs_pages = script("docs_pages")
WRITES = os.environ.get("WRITE_OUTPUTS") == "1"
LANGUAGES = {"python", "output", "yaml", "console", "text"}


@pytest.fixture
def session(tmp_path, monkeypatch) -> Path:
    """A folder as a reader might have it, with a GPT-2 of two layers."""
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    tiny = GPT2Config(n_layer=2, n_embd=32, n_head=2, n_positions=32)
    GPT2LMHeadModel(tiny).save_pretrained("gpt2")
    return tmp_path


def run_python(block: Block, names: dict[str, Any], source: str) -> str:
    """Run a block in the session so far, and return what it prints."""
    code = compile("\n" * (block.line - 1) + block.text, source, "exec")
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(code, names)
    return printed.getvalue()


def check_printed(block: Block, printed: str, shown: Block | None) -> None:
    if shown is None:
        assert not printed.strip(), f"the block at line {block.line} prints, and nothing is shown"
    else:
        assert same_output(shown.text, printed), (
            f"line {shown.line} shows something else\n{printed}"
        )


def run_command(command: str, output: str, capsys: pytest.CaptureFixture[str]) -> str | None:
    """Check a command, and return what it prints if it is one of ours."""
    words = shlex.split(command)
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
        capsys.readouterr()
        with pytest.raises(SystemExit) as left:
            app(words[1:], prog_name="lora-inject")
        printed, said = capsys.readouterr()
        assert not left.value.code, said
        printed = printed.replace(f"{Path.cwd()}/", "")
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


def write_named_files(all_blocks: list[Block]) -> None:
    for block in all_blocks:
        name = re.match(r"# ([\w.-]+\.yaml)\n", block.text)
        if block.language == "yaml" and name:
            Path(name[1]).write_text(block.text)


def run_document(text: str, source: str, capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    """Run all blocks in order; YAML that begins with `# NAME.yaml` is a file from the start."""
    all_blocks = blocks(text)
    write_named_files(all_blocks)
    names: dict[str, Any] = {"__name__": "readme"}
    printed: dict[int, str] = {}
    results: dict[tuple[int, str], str] = {}
    for block in all_blocks:
        if block.language == "python":
            printed[block.line] = run_python(block, names, source)
            if not WRITES:
                check_printed(block, printed[block.line], output_of(block, all_blocks))
        elif block.language == "yaml":
            schema = li.Space if block.text.startswith("# space.yaml") else li.Config
            schema.from_text(block.text, source=f"{source}:{block.line}")
        elif block.language == "console":
            ran = [(each, run_command(each, shown, capsys)) for each, shown in commands(block)]
            results |= {(block.line, each): output for each, output in ran if output is not None}
    if WRITES and (REPO / source).is_file():
        (REPO / source).write_text(with_outputs(text, printed, results))
    return names


# PEFT asks the model for a property that transformers has renamed.
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
def test_every_block_of_the_readme_runs(session, capsys):
    names = run_document(README.read_text(), "README.md", capsys)
    assert list(li.adapters(names["model"])) == ["sql", "style"]  # the session went to its end


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
@pytest.mark.parametrize("page", [*PAGES, "CONTRIBUTING.md"])
def test_every_block_of_a_page_runs(session, capsys, page):
    run_document((REPO / page).read_text(), page, capsys)


def test_every_step_of_the_architecture_runs(session, capsys):
    """How to add a kind, a variant, a format, another library, ..., as it is written there."""
    before, readers = list(KINDS), dict(formats.FORMATS)
    try:
        names = run_document((REPO / "ARCHITECTURE.md").read_text(), "ARCHITECTURE.md", capsys)
        assert KINDS[0] is names["LoRAPerHead"]
        assert {*formats.FORMATS} - {*readers} == {"text"}
        assert type(VARIANTS["gated"]) is names["Gated"]
        assert [type(kind) for kind in REGISTERED] == [names["FourBit"]]
    finally:
        REGISTERED.clear()
        libraries.GUARDS.pop("lora_inject.integrations.servant", None)
        for name in ("servant", "lora_inject.integrations.servant"):
            sys.modules.pop(name, None)
        KINDS[:] = before
        formats.FORMATS.clear()
        formats.FORMATS.update(readers)
        VARIANTS.pop("gated", None)
        ROLES.pop("gated", None)


def test_the_architecture_names_every_folder():
    text = (REPO / "ARCHITECTURE.md").read_text()
    rows = re.findall(r"^\| `([\w/]+)/` \|", text, re.MULTILINE)
    package = Path(li.__file__).parent
    made = [*package.glob("*/__init__.py"), *package.glob("core/*/__init__.py")]
    folders = {p.parent.relative_to(package).as_posix() for p in made} - {"core"}
    assert len(rows) == len(set(rows))
    assert set(rows) == folders


@pytest.mark.parametrize("name", DOCUMENTS)
def test_every_block_says_what_it_is_and_runs_or_says_why_not(name):
    text = (REPO / name).read_text()
    for block in blocks(text):
        assert block.language in LANGUAGES, f"{name}:{block.line}"
        if block.language == "text":
            assert re.fullmatch(r"<!-- not run: .+ -->", block.before), f"{name}:{block.line}"
    prose = re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL)
    assert not re.search(r"^[^-*\d\s].*\n\n    \S", prose, re.MULTILINE), "code without a fence"


def test_the_first_screen_shows_it():
    first = README.read_text().split("\n## ")[0]
    kinds = [block.language for block in blocks(first)]
    assert kinds == ["python", "yaml", "console"]
    assert "scripts/demo.sh" in first
    assert "scripts/test.sh" in first
    for row in ("object", "class", "keys", "trainable", "undo"):
        assert f"\n| {row} |" in first


def reference(page: str) -> str:
    return docs_pages.on_page_markdown((REPO / "docs" / "reference" / f"{page}.md").read_text())


def rows(table: str) -> dict[str, list[str]]:
    """The cells of each row by its first cell."""
    lines = [line.strip("| ").split(" | ") for line in table.splitlines() if line[:3] == "| `"]
    return {cells[0].strip("`"): cells[1:] for cells in lines}


@pytest.mark.parametrize("name", ["start", "choose_and_analyze"])
def test_a_notebook_is_a_page_with_what_its_cells_printed(name):
    page = docs_pages.on_page_markdown((REPO / "docs" / "notebooks" / f"{name}.md").read_text())
    cells = json.loads((REPO / "scripts" / "examples" / f"{name}.ipynb").read_text())["cells"]
    shown = blocks(page)
    code = ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"]
    assert [block.text.rstrip("\n") for block in shown if block.language == "python"] == code
    printed = "".join(block.text for block in shown if block.language == "output")
    outputs = [out for cell in cells for out in cell.get("outputs", ())]
    for out in outputs:
        for line in "".join(out.get("text", ())).splitlines():
            assert line in printed
    drawn = sum("image/png" in out.get("data", {}) for out in outputs)
    assert page.count("](data:image/png;base64,") == drawn
    assert page.startswith("# ")


SHELL = r"""$ echo 'a < b' && \
    echo "$HOME"
a < b

...
# no prompt of root \
b
$ ls
file
"""
PYTHON = """>>> for x in 'ab':
...     print(x)
a
b
>>> 1 / 0
Traceback (most recent call last):
...
ZeroDivisionError: division by zero
>>> x
'b'
"""
CONSOLES = {
    "a shell": (BashSessionLexer(), SHELL, "echo 'a < b' && \\\n    echo \"$HOME\"\nls"),
    "Python": (PythonConsoleLexer(), PYTHON, "for x in 'ab':\n    print(x)\n1 / 0\nx"),
    "no console": (PythonLexer(), "x = 1\n", None),
    "an output": (OutputLexer(), "$ 5 a month\n", None),
}


@pytest.mark.parametrize("what", CONSOLES)
def test_the_button_of_a_console_copies_what_is_typed(what: str) -> None:
    lexer, text, typed = CONSOLES[what]
    code = highlight(text, lexer, HtmlFormatter(nowrap=True))
    page = docs_pages.on_page_content(f'<div class="highlight"><code>{code}</code></div>')
    copied = re.search(r'data-copy="(.*?)"', page, re.DOTALL)
    assert (copied and html.unescape(copied[1])) == typed
    assert page.endswith(f"<code>{code}</code></div>")


def test_every_config_of_the_repository_is_on_its_page():
    page = reference("configs")
    assert re.findall(r"^### (.*)$", page, re.MULTILINE)
    assert set(re.findall(r"^### (.*)$", page, re.MULTILINE)) == {
        path.stem for path in (REPO / "configs").glob("*.yaml")
    }


def test_the_site_links_the_repository_that_builds_it(monkeypatch):
    monkeypatch.setenv("GITHUB_REPOSITORY", "somebody/lora_inject")
    monkeypatch.setenv("GITHUB_SERVER_URL", "https://example.com")
    config = docs_pages.on_config(SimpleNamespace())
    assert config.repo_url == "https://example.com/somebody/lora_inject"
    monkeypatch.delenv("GITHUB_REPOSITORY")
    assert not hasattr(docs_pages.on_config(SimpleNamespace()), "repo_url")


@pytest.mark.parametrize("module", ["", ".analysis", ".checkpoint", ".formats"])
def test_the_reference_has_every_public_name(module):
    pages = reference("api") + reference("modules")
    for name in {*importlib.import_module(f"lora_inject{module}").__all__} - {"__version__"}:
        assert f"::: lora_inject{module}.{name}\n" in pages + "\n", name


@pytest.mark.parametrize("model", [li.Config, li.Rule, li.Expect])
def test_the_reference_has_every_key_of_the_config_with_its_default(model):
    title = "The file" if model is li.Config else model.__name__
    cells = rows(reference("config").partition(f"## {title}\n")[2].partition("\n## ")[0])
    assert cells.keys() == model.model_fields.keys()
    for key, field in model.model_fields.items():
        shown = cells[key][1].strip("`")
        if field.is_required():
            assert shown == "required"
        elif model is li.Rule and key in li.Config.model_fields:
            assert shown == "the file's"
        elif field.default is None:
            assert shown == "none"
        else:
            value = yaml.safe_load(shown)
            assert value == field.default or (not value and not field.default)


@pytest.mark.skipif(
    tuple(map(int, version("typer").split(".")[:2])) < (0, 20),
    reason="the site is built with a newer typer",
)
def test_the_reference_has_every_command_with_every_option():
    *parts, shared = re.split(r"^## ", reference("cli"), flags=re.MULTILINE)[1:]
    group = typer.main.get_command(app)
    named = [part.split("\n")[0] for part in parts]
    assert named == group.list_commands(None)
    for name, part in zip(named, parts, strict=True):
        listed = part + (shared if "reading adapters" in part else "")
        for parameter in group.commands[name].params:
            argument = parameter.param_type_name == "argument"
            for word in [parameter.metavar.strip("{}.")] if argument else parameter.opts:
                assert f"`{word}`" in listed, f"{name} {word}"
    table = README.read_text().partition("| command |")[2].partition("\n\n")[0]
    assert re.findall(r"^\| `([\w-]+)", table, re.MULTILINE) == named


def test_the_changelog_begins_with_the_version():
    headings = re.findall(r"^## (\S+)", (REPO / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert headings[0] == li.__version__


def test_the_readme_is_short():
    assert len(README.read_text().splitlines()) <= 225


def test_the_reference_has_every_class_of_error():
    page = reference("errors")
    for error in li.LoraInjectError.__subclasses__():
        assert f"`{error.__name__}`: " in page


@pytest.mark.parametrize("name", DOCUMENTS)
def test_links_lead_somewhere(name):
    prose = re.sub(r"^```.*?^```", "", (REPO / name).read_text(), flags=re.MULTILINE | re.DOTALL)
    for target in re.findall(r"\]\(([^)#]+)\)", prose):
        elsewhere = target.startswith(("https://", "../../actions/"))  # a page of the host
        assert elsewhere or ((REPO / name).parent / target).exists(), target
    for path in re.findall(
        r"`((?:scripts|configs|tests|lora_inject)/[\w./*-]*)`", (REPO / name).read_text()
    ):
        assert list(REPO.glob(path.rstrip("/"))), path


def test_the_readme_of_an_index_leads_into_the_repository_and_installs_by_name():
    text = script("index_readme").for_index(README.read_text(), "https://example.com/me/li", "v1")
    outside = re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL)
    targets = re.findall(r"\]\(([^)]+)\)", outside)
    assert all(target.startswith("https://") for target in targets)
    files = [t.partition("/v1/")[2] for t in targets if "/v1/" in t]
    assert len(files) > 20
    assert all((REPO / file).exists() for file in files)
    assert "https://example.com/me/li/raw/v1/docs/pictures/performance.svg" in targets
    assert "https://example.com/me/li/actions/workflows/ci.yml" in targets
    assert "pip install lora-inject\n" in text
    assert "pip install 'lora-inject[transformers,analysis]'" in text
    assert "pip install ." not in text
    assert "checkout:" not in text


def project_files() -> list[Path]:
    folders = ("lora_inject", "tests", "scripts", "configs", "docs", ".github", ".ci")
    kinds = {".py", ".md", ".yaml", ".yml", ".sh", ".toml", ".json", ""}
    found = [p for folder in folders for p in (REPO / folder).rglob("*") if p.suffix in kinds]
    found += [p for p in REPO.iterdir() if p.suffix in kinds]
    return [
        p for p in found if p.is_file() and "__pycache__" not in p.parts and p.name[:4] != ".git"
    ]


def test_no_path_of_some_machine_is_written_anywhere():
    # Places of one machine, not of the system: /proc, /dev and /usr/bin/env are everywhere.
    places = re.compile(r"(?<![\w.:/-])/(?:home|root|work|mnt|Users)/\w")
    assert places.search("in {}home/me".format("/"))
    for path in project_files():
        found = places.search(path.read_text(encoding="utf-8"))
        assert found is None, f"{path.relative_to(REPO)}: {found}"


# ------------------------------------------------------------------------------ the checks can fail


@pytest.mark.parametrize(
    "text",
    [
        "```python\nassert False\n```\n",
        "```yaml\nrnak: 4\n```\n",
        "```python\nprint(1)\n```\n",
        "```python\nprint(1)\n```\n\n```output\n2\n```\n",
        "```python\nprint('a b c d')\n```\n\n```output\na ... d e\n```\n",
        "```python\nprint('3 MB of 3')\n```\n\n```output\n2 GB of 2\n```\n",
        "```console\n$ lora-inject nonsense\n```\n",
        "```console\n$ lora-inject schema\nsomething else\n```\n",
        "```console\n$ bash scripts/nowhere.sh\n```\n",
        "```console\n$ python scripts/bench.py --nonsense\n```\n",
        "```console\n$ pip install '.[nonsense]'\n```\n",
    ],
)
def test_a_wrong_block_is_found(session, capsys, text):
    with pytest.raises((AssertionError, OSError, li.ConfigError)):
        run_document(text, "wrong.md", capsys)


def test_output_may_leave_parts_out(session, capsys):
    schema = json.dumps(json_schema(), indent=2)
    first = schema.splitlines()[0]
    run_document(f"```console\n$ lora-inject schema\n{first}\n...\n```\n", "right.md", capsys)
