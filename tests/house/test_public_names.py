"""The public names: each is there, and importing or asking for them brings in nothing heavy."""

import ast
import json
import os
import pkgutil
import subprocess
import sys
from pathlib import Path

import pytest
from helpers.merging import LLAMA, adapter_of, llama_tensors, save_checkpoint
from helpers.tables import rows

import lora_inject

PACKAGE = Path(lora_inject.__file__).parent
HEAVY = ("transformers", "peft", "accelerate", "gguf", "loralib", "huggingface_hub", "datasets")
HEAVY += ("bitsandbytes", "torchao", "matplotlib")
NAMES = (*HEAVY, "torch", "torch._dynamo")

REPORT = """
import json, sys
steps, names, path = json.loads(sys.argv[1])
report = []
for step in steps:
    before = {*sys.modules}
    try:
        if isinstance(step, str):
            exec(step, {})
        else:
            from lora_inject.cli import app
            app(step)
    except SystemExit as left:
        assert not left.code, step
    report.append([name for name in names if name in sys.modules and name not in before])
with open(path, "w") as file:
    json.dump(report, file)
"""


def test_imports_and_commands_bring_in_what_they_use_and_nothing_heavy(tmp_path):
    tensors = llama_tensors()
    base = save_checkpoint(tmp_path / "base", tensors, 2, LLAMA)
    adapter = lora_inject.write_adapter(adapter_of(tensors), tmp_path / "adapter", format="peft")
    (tmp_path / "config.json").write_text('{"model_type": "gpt2", "n_layer": 1, "n_embd": 12}')
    (tmp_path / "lora.yaml").write_text("{rank: 2, targets: [c_attn]}")
    every = "from lora_inject import *; assert callable(inject) and callable(swap_adapter)"
    life = """
import os, torch, lora_inject as li
model = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Conv1d(2, 2, 1))
li.inject(model, {"rank": 1, "targets": ["0", "1"], "train": ["1.bias"]})
li.train_only(model, "default")
li.save_adapter(model, os.environ["SAVED"], format="native")
li.merge(model)
li.unmerge(model)
dict(li.merged_weights(model, dequantize="bfloat16"))
li.eject(model)
"""
    steps = (
        ("import lora_inject; lora_inject.Config", set()),
        ("import lora_inject; hasattr(lora_inject, 'x'), hasattr(lora_inject, '')", set()),
        (["--help"], set()),
        ("import lora_inject.checkpoint", {"torch"}),
        (["schema"], set()),
        (["merge", str(base), str(adapter), "-o", str(tmp_path / "out")], set()),
        (life, set()),
        (f"{every}; import lora_inject.formats", set()),
    )
    plan = ["plan", str(tmp_path / "lora.yaml"), str(tmp_path)]
    asked = json.dumps([[step for step, _ in steps] + [plan], NAMES, str(tmp_path / "report")])
    variables = {**os.environ, "SAVED": str(tmp_path / "saved.safetensors")}
    words = [sys.executable, "-c", REPORT, asked]
    subprocess.run(words, cwd=PACKAGE.parent, check=True, env=variables)
    *brought, by_plan = json.loads((tmp_path / "report").read_text())
    for (step, wanted), new in zip(steps, brought, strict=True):
        assert set(new) == wanted, step
    assert "transformers" in by_plan, "the check sees what a command brings in"
    assert "peft" not in by_plan


# Where PEFT and transformers have a name, and ours for it.
OTHERS = """
peft => LoraConfig Config, get_peft_model inject, PeftModel load_adapter,
    AutoPeftModelForCausalLM load_adapter, get_peft_model_state_dict adapter_state,
    set_peft_model_state_dict swap_adapter, prepare_model_for_kbit_training inject
peft.PeftModel => set_adapter activate, disable_adapter disabled, delete_adapter eject,
    print_trainable_parameters summary
peft.LoraModel => merge_and_unload merge, unload eject, merge_adapter merge,
    unmerge_adapter unmerge, add_weighted_adapter combine
peft.utils.hotswap => hotswap_adapter swap_adapter
transformers.PreTrainedModel => add_adapter inject, enable_adapters activate,
    disable_adapters disabled, active_adapters summary
"""
CALLED = [(where, *pair.split()) for where, pairs in rows(OTHERS) for pair in pairs.split(",")]


@pytest.mark.parametrize(("where", "name", "ours"), CALLED)
def test_a_name_of_others_gets_ours_for_it(where: str, name: str, ours: str) -> None:
    assert ours in lora_inject.__all__
    assert hasattr(pkgutil.resolve_name(where), name)
    with pytest.raises(AttributeError, match=rf"'{name}'\. Did you mean '{ours}'\?"):
        getattr(lora_inject, name)


def test_a_name_that_is_not_there_gets_the_nearest() -> None:
    for name, ours in {"injct": "inject", "Plan": "classes.Plan"}.items():
        with pytest.raises(AttributeError, match=rf"'{name}'\. Did you mean '{ours}'\?"):
            getattr(lora_inject, name)


def test_every_public_name_is_there_and_type_checkers_see_it_at_its_home() -> None:
    stub = ast.parse((PACKAGE / "__init__.pyi").read_text())
    imports = [node for node in stub.body if isinstance(node, ast.ImportFrom)]
    homes = {alias.asname: node.module for node in imports for alias in node.names}
    assert homes.keys() == {*lora_inject.__all__}
    modules = {name for name, home in homes.items() if home == "lora_inject"}
    for name in homes.keys() - modules - {"__version__"}:
        assert getattr(lora_inject, name).__module__ == homes[name]
    for name in modules:
        assert getattr(lora_inject, name).__all__
    with pytest.raises(AttributeError, match=r"'lora_inject' has no attribute 'nonsense'$"):
        lora_inject.nonsense  # noqa: B018
    # Importing a subpackage sets an attribute of its name on the package.
    assert {path.stem for path in PACKAGE.iterdir()} & {*lora_inject.__all__} == modules
