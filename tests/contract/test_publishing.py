"""Adapters for others: on a stand-in for the hub, by `save_pretrained`, and in versions."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from conftest import COPIES, fill, same_bits
from helpers.hub import Hub, stand_in_hub
from helpers.models import tiny_llama
from helpers.reference import logits
from helpers.refusals import refused

import lora_inject as li

pytest.importorskip("huggingface_hub")
transformers = pytest.importorskip("transformers")
pytestmark = pytest.mark.recent
CONFIG = {"rank": 2, "alpha": 3, "targets": ["q_proj", "down_proj"]}


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Hub]:
    with stand_in_hub(monkeypatch, tmp_path / "cache") as served:
        yield served


def base() -> Any:
    model = tiny_llama(hidden_size=8, intermediate_size=8, num_hidden_layers=1).eval()
    model.config._name_or_path = "org/tiny-llama"
    return model


def adapted(std: float = 0.5) -> Any:
    return fill(li.inject(base(), CONFIG), std=std)


def assert_loads(source: Any, model: Any, **options: Any) -> None:
    loaded = li.load_adapter(base(), source, **options).eval()
    assert same_bits(logits(loaded), logits(model))


def test_what_is_pushed_is_what_others_load(hub: Hub) -> None:
    model = adapted()
    url = li.push(model, "user/sql", trained_on="org/questions", message="first")
    files = hub.repos["user/sql"]["main"]
    assert url.startswith(f"{hub.url}/user/sql/commit/")
    assert files.keys() == {"README.md", "adapter_config.json", "adapter_model.safetensors"}
    assert_loads("user/sql", model)
    text = files["README.md"].decode()
    assert yaml.safe_load(text.split("---")[1]) == {
        "base_model": "org/tiny-llama",
        "base_model_relation": "adapter",
        "datasets": ["org/questions"],
        "library_name": "peft",
        "pipeline_tag": "text-generation",
        "tags": ["lora", "lora-inject"],
    }
    assert "2 sites, 64 parameters, rank 2 on `org/tiny-llama`" in text


def test_revisions_are_told_apart(hub: Hub) -> None:
    one, two = adapted(), adapted(std=0.1)
    li.push(one, "user/sql")
    li.push(two, "user/sql", revision="next")
    assert_loads("user/sql", two, revision="next")
    assert_loads("user/sql", one)
    with refused(li.FormatError, "'user/sql'", "'none'"):
        li.load_adapter(base(), "user/sql", revision="none")


def test_only_safetensors_and_a_config_are_fetched(hub: Hub) -> None:
    li.push(adapted(), "user/sql")
    files = hub.repos["user/sql"]["main"]
    more = ("pytorch_model.bin", "model.safetensors", "train.py", "training_args.bin")
    files |= dict.fromkeys(more, b"?")
    li.load_adapter(base(), "user/sql")
    assert set(hub.fetched) == {"adapter_config.json", "adapter_model.safetensors"}
    files["adapter_model.bin"] = b"?"
    for name in ("adapter_model.safetensors", "model.safetensors"):
        del files[name]
    with refused(li.FormatError, "user/sql", "pickle"):
        li.load_adapter(base(), "user/sql")


def test_a_single_file_of_another_format_is_found(hub: Hub, tmp_path: Path) -> None:
    model = adapted()
    file = li.save_adapter(model, tmp_path / "a.safetensors", format="native")
    hub.repos["user/one"] = {"main": {"a.safetensors": file.read_bytes(), "README.md": b"-"}}
    assert_loads("user/one", model)
    hub.repos["user/one"]["main"]["b.safetensors"] = b""
    with refused(li.FormatError, "a.safetensors", "b.safetensors"):
        li.load_adapter(base(), "user/one")


def test_every_function_knows_the_names_of_the_hub(hub: Hub, tmp_path: Path) -> None:
    model = adapted()
    li.push(model, "user/sql")
    base().save_pretrained(tmp_path / "base")
    state = li.read_adapter("user/sql")
    assert state == li.adapter_state(model)
    assert li.diff("user/sql", state).cosine == pytest.approx(1)
    assert li.truncate("user/sql", rank=2)[0].sites.keys() == state.sites.keys()
    assert li.combine(["user/sql", "user/sql"], [0.5, 0.5]).sites.keys() == state.sites.keys()
    li.swap_adapter(fill(model, std=1.0), "user/sql")
    assert li.adapter_state(model).sites == state.sites
    li.convert("user/sql", tmp_path / "portable", "portable")
    assert not [found for found in li.check_adapter("user/sql", "vllm==0.32") if found.stops]
    merged = tmp_path / "merged"
    li.merge_checkpoint(tmp_path / "base", ["user/sql"], merged)
    torch.testing.assert_close(logits(type(model).from_pretrained(merged)), logits(model))


class Moving(dict[str, Any]):
    """A repository whose main branch gets another commit whenever it is asked for anything."""

    def items(self) -> Any:
        self[f"commit {len(self)}"] = self["main"]
        (content,) = self["main"].values()
        self["main"] = {f"{len(self)}.safetensors": content}
        return list(super().items())


def test_a_single_file_is_of_the_commit_that_was_listed(hub: Hub, tmp_path: Path) -> None:
    model = adapted()
    file = li.save_adapter(model, tmp_path / "a.safetensors", format="native")
    hub.repos["user/one"] = Moving(main={"a.safetensors": file.read_bytes()})
    assert_loads("user/one", model)


def test_what_cannot_be_had_is_said_in_plain_words(hub, monkeypatch, tmp_path) -> None:
    from huggingface_hub import constants

    with refused(li.FormatError, "user/none", "repository"):
        li.load_adapter(base(), "user/none")
    with refused(li.FormatError, "revision"):
        li.load_adapter(base(), str(tmp_path), revision="main")
    model = adapted()
    li.push(model, "user/sql")
    li.load_adapter(base(), "user/sql")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert_loads("user/sql", model)  # of the cache
    with refused(li.FormatError, "'user/other'", "HF_HUB_OFFLINE"):
        li.load_adapter(base(), "user/other")
    with refused(li.FormatError, "'user/sql'", model=model):
        li.push(model, "user/sql")


@pytest.mark.filterwarnings("ignore")
def test_trainer_pushes_the_adapter(hub: Hub, tmp_path: Path) -> None:
    model = adapted()
    rows = [{"input_ids": torch.arange(6), "labels": torch.arange(6)}] * 4
    settings = {"max_steps": 1, "use_cpu": True, "report_to": "none", "disable_tqdm": True}
    settings |= {"hub_model_id": "user/trained", "save_strategy": "no"}
    args = transformers.TrainingArguments(str(tmp_path / "run"), **settings)
    trainer = transformers.Trainer(model, args, train_dataset=rows)
    trainer.train()
    trainer.push_to_hub()
    files = hub.repos["user/trained"]["main"]
    assert {"adapter_config.json", "adapter_model.safetensors", "README.md"} <= files.keys()
    assert "model.safetensors" not in files
    card = files["README.md"].decode()
    assert yaml.safe_load(card.split("---")[1])["base_model"] == "org/tiny-llama"
    assert_loads("user/trained", model.eval())


# -------------------------------------------------------------------------------- save_pretrained


@pytest.mark.parametrize("again", [lambda m: m, *COPIES.values()], ids=["itself", *COPIES])
def test_save_pretrained_writes_the_adapter_which_loads_onto_the_base(
    again: Any, tmp_path: Path
) -> None:
    model = again(adapted())
    model.save_pretrained(tmp_path)
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {"README.md", "adapter_config.json", "adapter_model.safetensors"}
    assert_loads(tmp_path, model)


def test_a_part_with_save_pretrained_is_refused_unless_it_was_injected_itself(
    tmp_path: Path,
) -> None:
    model = torch.nn.ModuleDict({"lm": base()})
    li.inject(model, CONFIG)
    with refused(li.StateError, "save_pretrained", "given to inject"):
        model["lm"].save_pretrained(tmp_path)
    fill(li.inject(li.eject(model)["lm"], CONFIG))
    model["lm"].save_pretrained(tmp_path)
    assert_loads(tmp_path, model["lm"])


def test_several_adapters_are_laid_out_as_by_peft(tmp_path: Path) -> None:
    model = adapted()
    fill(li.inject(model, CONFIG, "other"), "other")
    others = {"tokenizer.json": "{}", "README.md": "# Mine"}
    for name, text in others.items():
        (tmp_path / name).write_text(text)
    for _ in range(2):
        model.save_pretrained(tmp_path)
    assert all((tmp_path / name).read_text() == text for name, text in others.items())
    assert_loads(tmp_path / "other", model)
    assert_loads(tmp_path, li.activate(model, "default"))


def test_a_merged_model_says_how_it_is_written(tmp_path: Path) -> None:
    model = adapted()
    wanted = logits(model)
    li.merge(model)
    with refused(li.StateError, "merged", "eject(model)", model=model):
        model.save_pretrained(tmp_path / "a")
    li.eject(model).save_pretrained(tmp_path / "b")
    read = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "b").eval()
    assert torch.allclose(logits(read), wanted, atol=1e-5)


def test_eject_gives_the_method_back_and_what_it_cannot_do_is_refused(tmp_path: Path) -> None:
    model = adapted()
    with refused(li.StateError, "model.push_to_hub", model=model):
        model.save_pretrained(tmp_path, push_to_hub=True)
    li.inject(model, CONFIG, "other")
    li.eject(model, "other")
    assert "save_pretrained" in model.__dict__
    li.eject(model)
    assert "save_pretrained" not in model.__dict__
    with refused(li.StateError, "variable"):
        adapted().save_pretrained(tmp_path)


# --------------------------------------------------------------- versions that a server follows


def test_a_server_of_rollouts_finds_each_version_whole(tmp_path: Path) -> None:
    model = adapted()
    for step in (9, 10, 11):
        with torch.no_grad():
            for parameter in li.adapter_parameters(model).values():
                parameter.add_(step)
        assert_loads(li.save_adapter(model, tmp_path / str(step)), model)
    assert li.save_adapter(model, tmp_path / "11") == tmp_path / "11"  # what is there
    li.eject(model)
    with refused(li.FormatError, str(tmp_path / "11")):
        li.save_adapter(li.inject(model, CONFIG), tmp_path / "11")
