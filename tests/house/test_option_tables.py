"""The tables of options of other programs in the docs: each line is what it says."""

import dataclasses
import re
from pathlib import Path

import pytest
import yaml
from helpers.models import tiny_llama
from helpers.refusals import refused
from peft import LoraConfig

import lora_inject as li

DOCS = Path(__file__).parents[2] / "docs"
BASE = {"target_modules": ["q_proj"], "r": 8, "lora_alpha": 8}
OURS = {"rank": 8, "alpha": 8, "targets": ["q_proj"]}


def rows(page: str, head: str) -> list[tuple[str, str]]:
    """The two cells of each row of the tables with a head like this."""
    listed, inside = [], False
    for line in (DOCS / page).read_text().splitlines():
        cells = [cell.strip().replace("\\|", "|") for cell in re.split(r"(?<!\\)\|", line)[1:-1]]
        if len(cells) == 2 and re.fullmatch(head, cells[0]) and cells[1] == "YAML":
            inside = True
        elif not cells:
            inside = False
        elif inside and cells[0] != "---":
            listed.append((cells[0], cells[1]))
    return listed


OPTIONS = rows("from-peft.md", "`LoraConfig`")


@pytest.mark.parametrize(("left", "right"), OPTIONS)
def test_a_lora_config_becomes_the_line_beside_it(left, right):
    given = eval(f"dict({left.strip('`')})")
    if right.startswith("refused"):
        for key, value in given.items():
            with refused(li.ConfigError, f"'{key}'"):
                li.from_peft(BASE | {key: value})
        return
    line = {} if right.startswith("nothing") else yaml.safe_load(right.strip("`"))
    due = li.Config.from_dict({**OURS, **line})
    assert li.from_peft(BASE | given) == due


def test_the_table_has_every_field_of_this_peft():
    text = " ".join(left + right for left, right in OPTIONS)
    known = {"peft_type", "peft_version", "auto_mapping", "megatron_core", "qalora_group_size"}
    for field in dataclasses.fields(LoraConfig):
        assert field.name in known or re.search(rf"\b{field.name}\b", text), field.name


def test_lines_and_the_whole_config_for_other_programs_can_be_planned():
    lines = rows("from-others.md", r"unsloth|axolotl|LLaMA-Factory|torchtune")
    assert len(lines) > 35
    for _, right in lines:
        config = li.Config.from_dict({"targets": ["q_proj"], **yaml.safe_load(right.strip("`"))})
        assert li.plan(tiny_llama(), config).sites
    [block] = re.findall(r"```yaml\n(.*?)```", (DOCS / "from-others.md").read_text(), re.DOTALL)
    plan = li.plan(tiny_llama(), li.Config.from_text(block))
    assert [t.name for t in plan.trained] == ["model.embed_tokens.weight", "lm_head.weight"]
    assert plan.n_sites == 14
