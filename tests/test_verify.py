"""An adapter proves that it is loaded: by what a model computes, or a server returns.

The verdicts are held to states that the test makes itself, of the adapter and of the base.
"""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import fill
from helpers.models import Net, tiny_llama
from helpers.servers import Letters, Served, serving
from safetensors import safe_open
from torch import nn
from typer.testing import CliRunner

import lora_inject as li
from lora_inject.cli import app
from lora_inject.formats import read_adapter

CONFIG = {"rank": 4, "alpha": 8, "targets": ["all-linear"]}
TEXTS = ["SELECT A FROM B", "HOW MANY ROWS?", "(X + Y) * Z = 42"]


def build(seed: int = 0, config: dict[str, Any] = CONFIG) -> Any:
    """A tiny Llama whose weights follow from a seed, with an adapter that does not."""
    model = tiny_llama(hidden_size=32, vocab_size=64, initializer_range=0.2).eval()
    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.2) if parameter.dim() > 1 else None
    li.inject(model, config)
    torch.manual_seed(99)
    with torch.no_grad():
        for parameter in li.adapter_parameters(model).values():
            parameter.normal_(std=0.1)
    return model


def merged_twice(model: Any) -> Any:
    """A base that holds the adapter already, and gets it once more."""
    state = li.adapter_state(model)
    li.merge(model, eject=True)
    return li.install(model, state, base="any")


STATES = {
    "right": (build, "with", 1.0),
    "missing": (lambda: li.activate(build(), None), "without", 0.0),
    "doubled": (lambda: merged_twice(build()), "scaled", 2.0),
    "wrongly scaled": (lambda: li.activate(build(), {"default": 0.25}), "scaled", 0.25),
    "another base": (lambda: build(seed=1), "neither", None),
}


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The adapter's folder, whose name is that of the served adapter."""
    return li.save_adapter(
        build(), tmp_path_factory.mktemp("proof") / "sql", probe=(TEXTS, Letters())
    )


# ------------------------------------------------------------------------------- on a live model


@pytest.mark.parametrize("state", STATES)
def test_each_state_of_an_adapter_is_told_on_a_live_model(state: str, saved: Path) -> None:
    make, word, scale = STATES[state]
    found = li.verify_loaded(make(), source=saved)
    assert (found.word, found.ok) == (word, word == "with")
    assert found.scale is scale is None or found.scale == pytest.approx(scale, rel=0.1)


def test_a_loaded_adapter_knows_its_files(saved: Path, tmp_path: Path) -> None:
    model = li.eject(build())
    li.load_adapter(model, saved)
    assert li.verify_loaded(model).ok
    li.eject(model)
    li.load_adapter(model, saved, "second")
    assert li.verify_loaded(model, "second").ok
    assert "no files are known of it" in refused(lambda: li.verify_loaded(model))
    li.save_adapter(model, tmp_path / "plain", "second")
    assert "holds no proof of behavior" in refused(lambda: li.verify_loaded(model, "second"))
    li.swap_adapter(model, saved, "second")
    assert li.verify_loaded(model, "second").ok
    li.swap_adapter(model, li.adapter_state(model, "second"), "second")
    assert "no files are known of it" in refused(lambda: li.verify_loaded(model, "second"))


@pytest.mark.filterwarnings("ignore")  # PEFT's own
def test_a_model_of_peft_is_verified_by_the_same_file(saved: Path) -> None:
    peft = pytest.importorskip("peft")
    model = peft.PeftModel.from_pretrained(li.eject(build()), str(saved))
    assert li.verify_loaded(model, source=saved).ok
    with model.disable_adapter():
        assert li.verify_loaded(model, source=saved).word == "without"


def test_a_merged_model_and_one_in_bfloat16_are_told(saved: Path) -> None:
    model = build()
    li.merge(model)
    assert li.verify_loaded(model, source=saved).ok
    found = li.verify_loaded(build().bfloat16(), source=saved, dtype="bfloat16")
    assert found.ok
    assert 1e-3 < found.from_adapter < found.tolerance


def test_saving_leaves_the_model_as_it_was(tmp_path: Path) -> None:
    model = build().train()
    model.model.layers[0].eval()
    li.activate(model, None)
    modes = [module.training for module in model.modules()]
    numbers = torch.random.get_rng_state()
    li.save_adapter(model, tmp_path / "a", probe=[[1, 2, 3, 4]] * 2)
    assert [module.training for module in model.modules()] == modes
    assert torch.equal(torch.random.get_rng_state(), numbers)
    assert re.search("default .* no +yes", str(li.summary(model)))  # neither active nor frozen


@pytest.mark.parametrize("layout", ["peft", "portable", "native"])
def test_the_proof_is_text_that_other_readers_pass_over(layout: str, tmp_path: Path) -> None:
    model = build()
    target = li.save_adapter(
        model, tmp_path / "a", format=layout, probe=torch.arange(12).view(2, 6)
    )
    assert li.verify_loaded(model).ok
    file = target / "adapter_model.safetensors" if target.is_dir() else target
    with safe_open(file, "pt") as opened:
        assert json.loads(opened.metadata()["lora_inject.proof"])["prompts"][0] == [*range(6)]
    sites = read_adapter(target).sites
    assert sites.keys() == li.adapter_state(model).sites.keys()


def test_dora_is_told_from_its_base(tmp_path: Path) -> None:
    model = build(config=CONFIG | {"variant": "dora"})
    li.save_adapter(model, tmp_path / "a", probe=torch.arange(40).view(2, 20))
    assert li.verify_loaded(model).ok
    assert li.verify_loaded(li.activate(model, None)).word == "without"


def test_a_model_without_a_vocabulary_proves_its_outputs(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = li.inject(nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3)), CONFIG)
    with torch.no_grad():
        for parameter in li.adapter_parameters(model).values():
            parameter.normal_(std=0.3)
    x = torch.randn(5, 4)
    li.save_adapter(model, tmp_path / "a", probe=x)
    assert li.verify_loaded(model, probe=x).ok
    doubled = li.verify_loaded(li.activate(model, {"default": 2.0}), probe=x)
    assert (doubled.word, doubled.scale) == ("scaled", pytest.approx(2.0, rel=0.1))
    assert "Pass probe=" in refused(lambda: li.verify_loaded(model))
    assert "not the inputs" in refused(lambda: li.verify_loaded(model, probe=x + 1))
    said = refused(lambda: li.verify_served("http://127.0.0.1:9", tmp_path / "a"))
    assert "the adapter's proof is not over tokens" in said


# ------------------------------------------------------------------------------------- by a server


@pytest.mark.parametrize("kind", ["vllm", "texts", "llama.cpp"])
@pytest.mark.parametrize("state", STATES)
def test_each_state_of_an_adapter_is_told_by_a_server(state: str, kind: str, saved: Path) -> None:
    make, word, scale = STATES[state]
    served = Served(make(), kind)
    with serving(served) as url:
        found = li.verify_served(f"{url}/v1/", saved)
    assert found.word == word, str(found)
    assert found.scale is scale is None or found.scale == pytest.approx(scale, rel=0.15)
    assert {body["model"] for body in served.asked} == {"sql"}
    assert {body["temperature"] for body in served.asked} == {0}
    assert bool(found.notes) == (kind == "llama.cpp")


@pytest.mark.parametrize("kind", ["llama.cpp", "llama-cpp-python"])
@pytest.mark.parametrize("scale", [0.3, 1.7, 3.0])
def test_a_scale_between_those_of_the_proof_is_told_by_next_tokens(
    scale: float, kind: str, saved: Path
) -> None:
    """Tokens that the proof does not rate are among the server's best there."""
    with serving(Served(li.activate(build(), {"default": scale}), kind)) as url:
        verdict = li.verify_served(url, saved)
    assert verdict.word == "scaled", str(verdict)
    assert verdict.scale == pytest.approx(scale, rel=0.05)


class Begun(Letters):
    """A tokenizer whose texts begin with a token of their own."""

    first = 63

    def __call__(self, text: str) -> dict[str, list[int]]:
        return {"input_ids": [self.first, *super().__call__(text)["input_ids"]]}


class Words(Letters):
    """A tokenizer that decodes a token without the space before it."""

    def decode(self, ids: list[int]) -> str:
        return super().decode(ids).strip()


@pytest.mark.parametrize("tokenizer", [Letters, Begun, Words])
@pytest.mark.parametrize("state", STATES)
def test_ratings_one_place_late_are_seen_and_not_believed(
    state: str, tokenizer: Any, tmp_path: Path
) -> None:
    """llama-cpp-python's server, whose ratings of a prompt are right only after a first token."""
    adapter = li.save_adapter(build(), tmp_path / "sql", probe=(TEXTS, tokenizer()))
    make, word, scale = STATES[state]
    served = Served(make(), "llama-cpp-python")
    served.first = getattr(tokenizer, "first", None)
    with serving(served) as url:
        verdict = li.verify_served(url, adapter)
    assert verdict.word == word, str(verdict)
    assert verdict.scale is scale is None or verdict.scale == pytest.approx(scale, rel=0.15)
    if tokenizer is Begun:  # the token after the first has no rating
        assert (verdict.n, verdict.notes) == (sum(len(text) - 1 for text in TEXTS), ())
    else:
        assert "by a text that holds it already" in verdict.notes[0]
        assert verdict.what == "log-probabilities of next tokens"


def test_a_server_that_takes_only_text_needs_a_proof_with_texts(tmp_path: Path) -> None:
    adapter = li.save_adapter(build(), tmp_path / "sql", probe=torch.arange(12).view(2, 6))
    for kind in ("texts", "llama-cpp-python"):
        with serving(Served(build(), kind)) as url:
            said = refused(lambda: li.verify_served(url, adapter))
        assert (
            "it takes only text as a prompt, and the proof has only ids. Save the adapter" in said
        )


def test_a_prefix_that_a_server_cuts_otherwise_is_not_compared(tmp_path: Path) -> None:
    class Pairs(Served):
        def complete(self, body: dict[str, Any]) -> dict[str, Any]:
            answer = super().complete(body)
            if body["prompt"] not in TEXTS:  # a prefix: what it says is of other tokens
                answer["usage"]["prompt_tokens"] -= 1
                for row in answer["choices"][0]["logprobs"]["top_logprobs"]:
                    row.update(dict.fromkeys(row, -9.0))
            return answer

    adapter = li.save_adapter(build(), tmp_path / "sql", probe=(TEXTS, Letters()))
    with serving(Pairs(build(), "llama-cpp-python")) as url:
        verdict = li.verify_served(url, adapter)
    assert verdict.ok
    assert verdict.n == 5 * len(TEXTS)


def test_the_command_says_it_and_its_exit_code(saved: Path) -> None:
    model = build()
    with serving(Served(model, "vllm")) as url:
        run = CliRunner().invoke(app, ["verify-served", url, str(saved)])
        assert run.exit_code == 0
        assert run.stdout.startswith("with the adapter: ")
        li.activate(model, None)
        run = CliRunner().invoke(app, ["verify-served", url, str(saved), "--model", "x", "--json"])
    said = json.loads(run.stdout)
    assert (run.exit_code, said["word"], said["ok"]) == (1, "without", False)
    assert said["from_adapter"] > 5 * said["tolerance"]


# ------------------------------------------------------------------------------------- bad input


def refused(run: Any) -> str:
    with pytest.raises(li.LoraInjectError) as raised:
        run()
    return f"{type(raised.value).__name__}: {raised.value}"


def test_a_server_that_is_down_is_named(saved: Path) -> None:
    with serving(Served(None, "vllm")) as url:
        pass
    said = refused(lambda: li.verify_served(url, saved))
    assert said.startswith(f"ServerError: ask {url}/v1/models: it does not answer (")
    assert "it is no URL" in refused(lambda: li.verify_served("localhost:8000", saved))
    assert "it is no URL" in refused(lambda: li.verify_served(None, saved))
    assert "it does not answer" in refused(lambda: li.verify_served("http://localhost:80a", saved))


def test_a_server_that_says_tokens_as_text_needs_a_proof_with_texts(tmp_path: Path) -> None:
    adapter = li.save_adapter(build(), tmp_path / "sql", probe=torch.arange(12).view(2, 6))

    class TextsOfNextTokens(Served):
        def complete(self, body: dict[str, Any]) -> dict[str, Any]:
            made = super().complete(body)
            for row in made["choices"][0]["logprobs"]["content"][0]["top_logprobs"]:
                del row["id"]
            return made

    with serving(TextsOfNextTokens(build(), "llama.cpp")) as url:
        said = refused(lambda: li.verify_served(url, adapter))
    assert "it says tokens as text, and the proof knows only their ids" in said


def test_where_rounding_explains_the_effect_nothing_is_said(tmp_path: Path) -> None:
    model = build()
    with torch.no_grad():
        for name, parameter in li.adapter_parameters(model).items():
            if "lora_B" in name:
                parameter.mul_(0.03)
    saved = li.save_adapter(model, tmp_path / "faint", probe=torch.arange(40).view(2, 20))
    assert li.verify_loaded(model, source=saved).ok
    assert li.verify_loaded(li.activate(model, None), source=saved).word == "without"
    said = refused(lambda: li.verify_loaded(model, source=saved, dtype="bfloat16"))
    assert "they tell nothing" in said


def test_outputs_that_prove_nothing_are_refused(tmp_path: Path) -> None:
    class Ids(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(4, 4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.fc(x).argmax(-1)

    def save(model: nn.Module) -> None:
        li.save_adapter(li.inject(model, CONFIG), tmp_path / "a", probe=torch.ones(1, 4))

    assert "returns no tensor of floats" in refused(lambda: save(Ids()))
    infinite = nn.Sequential(nn.Linear(4, 4))
    with torch.no_grad():
        infinite[0].bias.fill_(float("-inf"))
    assert "are not finite" in refused(lambda: save(infinite))
    assert not (tmp_path / "a").exists()


def test_a_server_without_log_probabilities_is_named(saved: Path) -> None:
    with serving(Served(build(), "silent")) as url:
        said = refused(lambda: li.verify_served(url, saved))
    assert "the server returns no log-probabilities (choices[0].logprobs)" in said


class TextsWithoutIds(Served):
    """Takes ids, names tokens as text, and puts a token before each prompt."""

    def complete(self, body: dict[str, Any]) -> dict[str, Any]:
        self.kind = "texts"
        self.prefix: list[int] = getattr(self, "prefix", [])
        prompt = body["prompt"]
        if not isinstance(prompt, str):
            prompt = Letters().decode(self.prefix + prompt)
        return super().complete({**body, "prompt": prompt})


def test_where_neither_may_be_for_other_tokens_it_is_said_what_is_missing(tmp_path: Path) -> None:
    ids = torch.arange(12).view(2, 6)
    without = li.save_adapter(build(), tmp_path / "sql", probe=ids)
    served = TextsWithoutIds(build(), "texts")
    with serving(served) as url:
        assert li.verify_served(url, without).ok
        served.prefix = [7, 9]
        said = refused(lambda: li.verify_served(url, without))
        assert "it says tokens as text, and the proof knows only their ids" in said
        assert "Save the adapter with a pair of texts and their tokenizer as probe" in said
        texts = [Letters().decode(row) for row in ids.tolist()]
        told = li.save_adapter(build(), tmp_path / "told" / "sql", probe=(texts, Letters()))
        assert "another vocabulary" in refused(lambda: li.verify_served(url, told))


def test_log_probabilities_that_are_nan_are_named(saved: Path) -> None:
    model = build()
    with torch.no_grad():
        model.lm_head.weight[3] = float("nan")
    with serving(Served(model, "vllm")) as url:
        assert "it returns NaN as log-probabilities" in refused(
            lambda: li.verify_served(url, saved)
        )


@pytest.mark.parametrize("url", ["http://", "http://[::1", "http://a b", "https:///v1"])
def test_addresses_that_are_none_are_named(url: str, saved: Path) -> None:
    said = refused(lambda: li.verify_served(url, saved))
    assert "it is no URL. Give one, such as http://HOST:8000" in said


def test_a_server_that_asks_for_a_key_is_given_one(saved: Path, monkeypatch: Any) -> None:
    class Locked(Served):
        def models(self) -> dict[str, Any]:
            raise PermissionError

    with serving(Locked(build(), "vllm")) as url:
        assert "it answers 401" in (said := refused(lambda: li.verify_served(url, saved)))
        assert "Set OPENAI_API_KEY" in said


def test_a_server_of_several_models_asks_for_a_name(saved: Path) -> None:
    with serving(Served(build(), "vllm", ("one", "two"))) as url:
        assert "it serves 'one', 'two'. Name the one to ask: --model NAME" in refused(
            lambda: li.verify_served(url, saved)
        )
        assert li.verify_served(url, saved, model="two").ok


def test_a_server_of_another_vocabulary_is_named(saved: Path) -> None:
    with serving(Served(tiny_llama(vocab_size=17), "vllm")) as url:
        said = refused(lambda: li.verify_served(url, saved))
    assert "it answers 400: Token id" in said
    assert "that it serves the adapter's base" in said

    class Pairs(Served):
        def complete(self, body: dict[str, Any]) -> dict[str, Any]:
            return super().complete({**body, "prompt": body["prompt"][::2]})

    for kind in ("vllm", "texts"):
        with serving(Pairs(build(), kind)) as url:
            said = refused(lambda: li.verify_served(url, saved))
        assert "it makes other tokens of prompt 1" in said
        assert "another vocabulary" in said


@pytest.mark.parametrize(
    ("probe", "found"),
    [
        ([[1, 64]], "it has the token 64, and the model has 64 tokens"),
        ([[1]], "a row has fewer than two tokens"),
        ([], "it is empty"),
        ({}, "it is empty"),
        ([[]], "it is empty"),
        ({"input_ids": torch.zeros(0, 5, dtype=torch.long)}, "it is empty"),
        ("text", "it is text without a tokenizer"),
        (["some", "texts"], "it is text without a tokenizer"),
        (("text", None), "it is text without a tokenizer"),
        (3, "it is an int of an unknown form"),
        ({"ids": torch.tensor([[1, 2]])}, "with these inputs the model raises ValueError: "),
        ({"input_ids": torch.tensor([[1, 64]])}, "it has the token 64, and the model has 64"),
        (([""], Letters()), "it has no texts"),
        ((["a b"], lambda text: {"input_ids": [1, 2]}), "its tokenizer has no decode"),
        ([["a", "b"]], "its rows are not token ids"),
        (torch.zeros(2, 0, dtype=torch.long), "it is empty"),
        (torch.tensor(3), "a row has fewer than two tokens"),
        (
            {"input_ids": torch.tensor([[1, 2, 3]]), "attention_mask": [[1, 1, 1]]},
            "its attention_mask is no tensor of the shape of input_ids",
        ),
    ],
)
def test_a_probe_that_proves_nothing_is_refused(probe: Any, found: str, tmp_path: Path) -> None:
    said = refused(lambda: li.save_adapter(build(), tmp_path / "a", probe=probe))
    assert said.startswith("StateError: save adapter 'default', probe: ")
    assert found in said
    assert not (tmp_path / "a").exists()


def test_what_a_model_without_a_known_vocabulary_raises_is_said(tmp_path: Path) -> None:
    class Rating(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table, self.fc = nn.Embedding(9, 4), nn.Linear(4, 9)

        def forward(self, ids: torch.Tensor) -> torch.Tensor:
            return self.fc(self.table(ids))

    model = fill(li.inject(Rating(), CONFIG))
    said = refused(lambda: li.save_adapter(model, tmp_path / "a", probe=[[1, 9]]))
    assert "with these inputs the model raises IndexError: " in said
    li.save_adapter(model, tmp_path / "a", probe=[[1, 8, 3]])
    assert li.verify_loaded(model).ok


def test_an_untrained_adapter_has_no_proof(tmp_path: Path) -> None:
    model = li.inject(tiny_llama(), CONFIG)
    said = refused(lambda: li.save_adapter(model, tmp_path / "a", probe=[[1, 2, 3]]))
    assert "the adapter changes its outputs by 0," in said
    assert not (tmp_path / "a").exists()


def test_a_format_without_room_for_a_proof_is_refused(tmp_path: Path) -> None:
    said = refused(lambda: li.save_adapter(build(), tmp_path / "a", format="gguf", probe=[[1, 2]]))
    assert "files of the format 'gguf' hold no proof" in said


def test_token_ids_for_a_model_that_rates_none_are_refused(tmp_path: Path) -> None:
    model = li.inject(Net(), {"rank": 2, "targets": ["fc"]})
    said = refused(lambda: li.save_adapter(model, tmp_path / "a", probe=[[1, 2, 3]]))
    assert "for 3 tokens the model returns (1, 3, 3), which rates no next token" in said


def test_the_card_says_how_to_verify_an_adapter_with_a_proof(saved: Path, tmp_path: Path) -> None:
    line = "lora-inject verify-served http://localhost:8000 path/to/this/folder --model adapter"
    assert line in (saved / "README.md").read_text()
    kinds = {"none": {}, "portable": {"format": "portable", "probe": [[1, 2, 3]]}}
    for name, options in kinds.items():
        card = (li.save_adapter(build(), tmp_path / name, **options) / "README.md").read_text()
        assert (line in card) is bool(options)
        assert ("li.verify_loaded(model)" in card) is bool(options)
    help_of = [*line.split()[1:2], "--help"]
    assert CliRunner().invoke(app, help_of).exit_code == 0


def test_the_card_of_a_model_without_a_vocabulary_asks_for_its_inputs(tmp_path: Path) -> None:
    model = fill(li.inject(nn.Sequential(nn.Linear(4, 6)), {"rank": 2, "targets": ["0"]}))
    folder = li.save_adapter(model, tmp_path / "a", probe=torch.randn(5, 4))
    card = (folder / "README.md").read_text()
    assert "li.verify_loaded(model, probe=...)" in card
    assert "verify-served" not in card


@pytest.mark.parametrize(
    ("change", "found"),
    [
        (lambda plain: plain.update(version=7), "its proof has version 7"),
        (lambda plain: plain.update(dtype="int8"), "dtype: 'int8' is impossible"),
        (lambda plain: plain["values"].pop(), "not one value for each place and strength"),
        (lambda plain: plain["strengths"].reverse(), "its strengths are not in order"),
        (lambda plain: plain["ahead"][0].update(length=99), "a prefix that no prompt has"),
        (lambda plain: plain["ahead"][0]["tokens"].pop(), "each token and strength"),
    ],
)
def test_an_edited_proof_is_refused(change: Any, found: str, saved: Path) -> None:
    from lora_inject.core.files.tensors import read_names
    from lora_inject.serving.proof import parse_proof

    metadata = read_names(saved / "adapter_model.safetensors")[1]
    plain = json.loads(metadata["lora_inject.proof"])
    change(plain)
    edited = metadata | {"lora_inject.proof": json.dumps(plain)}
    assert found in refused(lambda: parse_proof(edited, "verify"))
