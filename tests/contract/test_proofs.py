"""An adapter proves that it is loaded: by what a model computes, or a server returns.

The verdicts are held to states that the test makes itself, of the adapter and of the base.
"""

import copy
import json
import re
import shutil
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import fill
from helpers.models import Net, tiny_llama
from helpers.refusals import refused
from helpers.servers import Answering, Served, ids_of, running, serving
from helpers.states import metadata, tensors_of
from safetensors.torch import load_file, save_file
from torch import nn

import lora_inject as li

CONFIG = {"rank": 4, "alpha": 8, "targets": ["all-linear"]}
TEXTS = ["SELECT A FROM B", "HOW MANY ROWS?", "(X + Y) * Z = 42"]
PROBE = [*map(ids_of, TEXTS)]
IDS = torch.arange(40).view(2, 20)


def build(seed: int = 0, **changes: int) -> Any:
    """A tiny Llama whose weights follow from a seed, with an adapter that does not."""
    model = tiny_llama(hidden_size=32, vocab_size=64, initializer_range=0.2, **changes).eval()
    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.2) if parameter.dim() > 1 else None
    li.inject(model, CONFIG)
    torch.manual_seed(99)
    return fill(model, std=0.1)


def merged_twice() -> Any:
    """A base that holds the adapter already, and gets it once more."""
    model = build()
    state = li.adapter_state(model)
    li.merge(model, eject=True)
    return li.install(model, state, base="any")


STATES = {
    "right": (build, "with", 1.0),
    "missing": (lambda: li.activate(build(), None), "without", 0.0),
    "doubled": (merged_twice, "scaled", 2.0),
    "wrongly scaled": (lambda: li.activate(build(), {"default": 0.25}), "scaled", 0.25),
    "not in full": (lambda: li.activate(build(), {"default": 0.8}), "scaled", 0.8),
    "beyond the proof": (lambda: li.activate(build(), {"default": 3.0}), "scaled", 3.0),
    "another base": (lambda: build(seed=1), "neither", None),
}


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The adapter's folder, whose name is that of the served adapter."""
    return li.save_adapter(build(), tmp_path_factory.mktemp("proof") / "sql", probe=PROBE)


# ------------------------------------------------------------------------------- on a live model


@pytest.mark.parametrize("state", STATES)
def test_each_state_of_an_adapter_is_told_on_a_live_model(state: str, saved: Path) -> None:
    make, word, scale = STATES[state]
    verdict = li.verify_loaded(make(), source=saved)
    assert (verdict.word, verdict.ok) == (word, word == "with")
    assert verdict.scale is scale is None or verdict.scale == pytest.approx(scale, rel=0.1)


@pytest.mark.parametrize(("off", "ok"), [(1e-3, True), (4e-3, False)])
def test_a_live_model_is_held_to_what_programs_differ_by(off: float, ok: bool, saved: Path) -> None:
    effect = li.verify_loaded(build(), source=saved).effect
    model = li.activate(build(), {"default": 1 - off / effect})
    assert li.verify_loaded(model, source=saved).ok == ok


def test_a_loaded_adapter_knows_its_files(
    saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def unproven(name: str, *named: str) -> None:
        with refused(li.StateError, f"'{name}'", *named):
            li.verify_loaded(model, name)

    model = li.eject(build())
    li.load_adapter(model, saved)
    assert li.verify_loaded(model).ok
    li.eject(model)
    li.load_adapter(model, saved, "second")
    assert li.verify_loaded(model, "second").ok
    unproven("default")
    li.save_adapter(model, tmp_path / "plain", "second")
    with refused(li.LoraInjectError, "proof"):
        li.verify_loaded(model, "second")
    monkeypatch.setenv("HOME", str(saved.parent))
    li.swap_adapter(model, f"~/{saved.name}", "second")
    assert li.verify_loaded(model, "second").ok
    li.swap_adapter(model, copy.deepcopy(li.adapter_state(model, "second")), "second")
    unproven("second", "source=")


@pytest.mark.filterwarnings("ignore")  # PEFT's own
def test_models_of_peft_merged_ones_and_ones_in_bfloat16_are_told(saved: Path) -> None:
    peft = pytest.importorskip("peft")
    model = peft.PeftModel.from_pretrained(li.eject(build()), str(saved))
    assert li.verify_loaded(model, source=saved).ok
    with model.disable_adapter():
        assert li.verify_loaded(model, source=saved).word == "without"
    model = build()
    li.merge(model)
    assert li.verify_loaded(model, source=saved).ok
    model = li.activate(build(), {"default": 12.0})  # beyond 8, the last strength of a proof
    assert li.verify_loaded(model, source=saved).word == "neither"
    rounded = li.verify_loaded(build().bfloat16(), source=saved, dtype="bfloat16")
    assert rounded.ok
    assert 1e-3 < rounded.from_adapter < rounded.tolerance


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
    target = li.save_adapter(model, tmp_path / "a", format=layout, probe=IDS)
    assert li.verify_loaded(model).ok
    proof = json.loads(metadata(tensors_of(target))["lora_inject.proof"])
    assert proof["prompts"][0] == [*range(20)]
    assert li.read_adapter(target).sites.keys() == li.adapter_state(model).sites.keys()


def test_where_rounding_explains_the_effect_nothing_is_said(tmp_path: Path) -> None:
    model = build()
    with torch.no_grad():
        for name, parameter in li.adapter_parameters(model).items():
            parameter.mul_(0.03 if "lora_B" in name else 1)
    faint = li.save_adapter(model, tmp_path / "faint", probe=IDS)
    assert li.verify_loaded(model, source=faint).ok
    assert li.verify_loaded(li.activate(model, None), source=faint).word == "without"
    with refused(li.StateError, "bfloat16", model=model):
        li.verify_loaded(model, source=faint, dtype="bfloat16")


def test_a_proof_holds_the_logits_of_one_strength_at_a_time(tmp_path: Path) -> None:
    """Fourteen strengths of eight prompts are gigabytes for a vocabulary of today."""
    model, logits, alive = build(), list[weakref.ref[Any]](), list[int]()

    def note(_: Any, __: Any, out: torch.Tensor) -> None:
        logits.append(weakref.ref(out.untyped_storage()))
        alive.append(sum(each() is not None for each in logits))

    handle = model.lm_head.register_forward_hook(note)
    li.save_adapter(model, tmp_path / "a", probe=IDS)
    handle.remove()
    assert len(alive) > 10
    assert max(alive) <= len(IDS) + 1, "those of one strength, and the next that is computed"


def test_an_adapter_of_which_a_site_is_missing_is_not_with_the_adapter(tmp_path: Path) -> None:
    model = build(num_hidden_layers=8)
    li.save_adapter(model, tmp_path / "a", probe=IDS)
    assert li.verify_loaded(model).word == "with"
    Bs = [p for name, p in li.adapter_parameters(model).items() if name.endswith("lora_B")]
    assert len(Bs) == 56
    for B in (Bs[0], Bs[20], Bs[55]):
        kept = B.detach().clone()
        nn.init.zeros_(B)
        assert li.verify_loaded(model).word != "with"
        B.data.copy_(kept)


# ------------------------------------------------------------------------------------- by a server


@pytest.mark.parametrize("kind", ["vllm", "texts", "llama.cpp"])
@pytest.mark.parametrize("state", STATES)
def test_each_state_of_an_adapter_is_told_by_a_server(state: str, kind: str, saved: Path) -> None:
    make, word, scale = STATES[state]
    served = Served(make(), kind)
    with serving(served) as url:
        verdict = li.verify_served(f"{url}/v1/", saved)
    assert verdict.word == word, str(verdict)
    assert verdict.scale is scale is None or verdict.scale == pytest.approx(scale, rel=0.15)
    assert {(body["model"], body["temperature"]) for body in served.asked} == {("sql", 0)}
    assert bool(verdict.notes) == (kind == "llama.cpp")


def test_the_command_says_it_and_its_exit_code(run: Any, saved: Path) -> None:
    model = build()
    with serving(Served(model, "vllm")) as url:
        ran = run("verify-served", url, saved)
        assert (ran.code, ran.out.startswith("with the adapter: ")) == (0, True)
        li.activate(model, None)
        ran = run("verify-served", url, saved, "--model", "x", "--json")
    told = json.loads(ran.out)
    assert (ran.code, told["word"], told["ok"]) == (1, "without", False)
    assert told["from_adapter"] > 5 * told["tolerance"]


class Halves(Served):
    """Has another tokenizer: it computes with every second token."""

    def complete(self, body: dict[str, Any]) -> dict[str, Any]:
        return super().complete({**body, "prompt": body["prompt"][::2]})


class Gaps(Served):
    """Does not rate every token of a prompt."""

    def _said(self, prompt: list[int], rows: Any, body: dict[str, Any]) -> Any:
        said = super()._said(prompt, rows, body)
        if "echo" in body:
            said["token_logprobs"][3] = None
        return said


def test_a_gap_in_the_ratings_does_not_shift_those_after_it(saved: Path) -> None:
    with serving(Gaps(build(), "vllm")) as url:
        verdict = li.verify_served(url, saved)
    assert (verdict.word, verdict.what) == ("with", "log-probabilities of next tokens")


def test_a_key_does_not_follow_a_redirect_to_another_host(
    saved: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Which is asked all the same, with the body."""
    monkeypatch.setenv("OPENAI_API_KEY", "secret")
    served, keys = Served(build(), "vllm"), dict[str, set[str | None]]()

    class Redirecting(Answering):
        def do_GET(self) -> None:
            self.body()
            keys.setdefault("first", set()).add(self.headers.get("Authorization"))
            self.answer({}, 307, Location=f"{target}{self.path}")

        do_POST = do_GET  # noqa: N815

    class Noting(Answering):
        def do_GET(self) -> None:
            keys.setdefault("second", set()).add(self.headers.get("Authorization"))
            self.answer({"data": [{"id": "sql"}]})

        def do_POST(self) -> None:
            keys["second"].add(self.headers.get("Authorization"))
            self.answer(served.complete(json.loads(self.body())))

    with running(Noting) as target, running(Redirecting) as url:
        assert li.verify_served(url.replace("127.0.0.1", "localhost"), saved).ok
    assert keys == {"first": {"Bearer secret"}, "second": {None}}


class Odd(Served):
    """Answers in a form of its own."""

    def _said(self, prompt: list[int], rows: Any, body: dict[str, Any]) -> Any:
        return {"content": [{"top_logprobs": 3}], "tokens": 3, "token_logprobs": {}}


def broken() -> Any:
    model = build()
    with torch.no_grad():
        model.lm_head.weight[3] = float("nan")
    return model


SERVERS: dict[str, tuple[Any, Any, str]] = {
    "no log-probabilities": (lambda: Served(build(), "silent"), PROBE, "log-prob"),
    "NaN": (lambda: Served(broken(), "vllm"), PROBE, "NaN"),
    "a smaller vocabulary": (lambda: Served(tiny_llama(), "vllm"), PROBE, "400"),
    "other tokens": (lambda: Halves(build(), "vllm"), PROBE, "prompt 1"),
    "no token ids": (lambda: Served(build(), "llama-cpp-python"), PROBE, "token ids"),
    "answers of another form": (lambda: Odd(build(), "vllm"), PROBE, "neither the tokens"),
    "next tokens as text": (lambda: Served(build(), "next, as text"), PROBE, "by id"),
}


@pytest.mark.parametrize("case", SERVERS)
def test_a_server_that_cannot_be_judged_is_refused(case: str, tmp_path: Path) -> None:
    make, probe, named = SERVERS[case]
    adapter = li.save_adapter(build(), tmp_path / "sql", probe=probe)
    with serving(make()) as url, refused(li.LoraInjectError, named):
        li.verify_served(url, adapter)


def test_addresses_and_names_that_lead_nowhere_are_named(saved: Path) -> None:
    with serving(Served(build(), "vllm", ("one", "two"))) as url:
        with refused(li.ServerError, "'one', 'two'", "--model NAME"):
            li.verify_served(url, saved)
        assert li.verify_served(url, saved, model="two").ok
    with refused(li.ServerError, f"{url}/v1/models"):
        li.verify_served(url, saved)
    for none in ("localhost:8000", None, "http://[::1"):
        with refused(li.ServerError, "http://HOST:8000"):
            li.verify_served(none, saved)


# -------------------------------------------------------------------- proofs that cannot be made


def infinite() -> nn.Module:
    model = tiny_llama()
    nn.init.constant_(model.lm_head.weight, float("inf"))
    return model


def fresh(model: nn.Module, *targets: str) -> nn.Module:
    return li.inject(model, {"rank": 2, "targets": [*(targets or ["all-linear"])]})


PROBES: dict[str, tuple[Any, Any, list[str]]] = {
    "a token beyond": (build, [[1, 64]], ["token 64"]),
    "a row of one token": (build, [[1]], ["two tokens"]),
    "text alone": (build, ["some", "texts"], ["tokenizer"]),
    "texts and their tokenizer": (build, (TEXTS, ids_of), ["tuple", "tokenizer(texts)"]),
    "other inputs": (build, {"ids": torch.tensor([[1, 2]])}, ["a dict without token ids"]),
    "no tokens": (build, torch.ones(1, 4), ["Tensor", "other models prove nothing"]),
    "nothing": (build, [], ["empty"]),
    "no effect": (lambda: fresh(tiny_llama()), [[1, 2, 3]], ["0"]),
    "infinite outputs": (lambda: fresh(infinite()), [[1, 2, 3]], ["finite"]),
    "no next token": (lambda: fresh(Net(), "fc"), [[1, 2, 3]], ["(1, 3, 3)"]),
}


@pytest.mark.parametrize("case", PROBES)
def test_a_probe_that_proves_nothing_is_refused(case: str, tmp_path: Path) -> None:
    make, probe, named = PROBES[case]
    model = make()
    with refused(li.StateError, "'default'", *named):
        li.save_adapter(model, tmp_path / "a", probe=probe)
    assert not (tmp_path / "a").exists()


def test_a_format_that_holds_no_proof_is_named(tmp_path: Path) -> None:
    with refused(li.FormatError, "'gguf'", "'native'"):
        li.save_adapter(build(), tmp_path / "a", format="gguf", probe=IDS)


EDITS: dict[str, tuple[Any, str]] = {
    "a later version": (lambda plain: plain.update(version=7), "7"),
    "outputs": (lambda plain: plain.update(prompts=[], digest="of these"), "outputs"),
    "a value less": (lambda plain: plain["values"].pop(), "proof"),
    "a prefix of none": (lambda plain: plain["ahead"][0].update(length=99), "prefix"),
}


@pytest.mark.parametrize("case", EDITS)
def test_an_edited_proof_is_refused(case: str, saved: Path, tmp_path: Path) -> None:
    change, named = EDITS[case]
    path = shutil.copytree(saved, tmp_path / "a")
    file = tensors_of(path)
    said, tensors = metadata(file), load_file(file)
    plain = json.loads(said["lora_inject.proof"])
    change(plain)
    save_file(tensors, file, said | {"lora_inject.proof": json.dumps(plain)})
    with refused(li.LoraInjectError, named):
        li.verify_loaded(build(), source=path)
