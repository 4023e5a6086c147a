"""TRL's trainers on a model that carries an adapter: `inject`, then train as usual."""

import contextlib
import copy
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from conftest import error, fill, same_bits
from helpers.documents import blocks
from helpers.experts import experts
from helpers.refusals import refused
from helpers.training import CONFIG, as_peft, llama, llama_folder
from helpers.trials import values
from helpers.versions import needs_transformers_5
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

import lora_inject as li

# Their imports raise warnings that do not concern these tests.
pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]
REASON = "TRL is not installed: pip install trl"
TEMPLATE = "{% for m in messages %}{{ m['role'][0] }}:{{ m['content'] }}<end>{% endfor %}"
IDS = torch.arange(9)[None]
PAIRS = [{"prompt": f"{i} and {i} is", "completion": f" {2 * i}"} for i in range(8)]
CHATS = [
    {"messages": [{"role": "user", "content": p["prompt"]},
                  {"role": "assistant", "content": p["completion"]}]} for p in PAIRS
]  # fmt: skip
CHOICES = [{"prompt": p["prompt"], "chosen": p["completion"], "rejected": " 1"} for p in PAIRS]
VERDICTS = [{**p, "label": i % 2 == 0} for i, p in enumerate(PAIRS)]
SETTINGS = {"max_steps": 2, "logging_steps": 1, "learning_rate": 1e-2, "use_cpu": True} | {
    "report_to": "none", "disable_tqdm": True, "bf16": False, "save_strategy": "no",
    "per_device_train_batch_size": 4, "gradient_checkpointing": False,
}  # fmt: skip
LORA = {"rank": 2, "alpha": 4, "targets": ["q_proj", "v_proj"]}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return llama_folder(tmp_path_factory.mktemp("models") / "llama")


def plain(folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


def trainer(
    method: str, folder: Path, out: Path, model: Any, data: Any, *given: Any, **changes: Any
) -> Any:
    """One of TRL's trainers as a user sets it up; what is no setting of it is an argument."""
    trl = pytest.importorskip("trl", reason=REASON, exc_type=ImportError)
    datasets = pytest.importorskip("datasets", reason=REASON, exc_type=ImportError)
    more = {key: changes.pop(key) for key in ("ref_model", "callbacks") if key in changes}
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.chat_template = TEMPLATE
    return getattr(trl, f"{method}Trainer")(
        model,
        *given,
        args=getattr(trl, f"{method}Config")(str(out), **SETTINGS | changes),
        train_dataset=datasets.Dataset.from_list(data),
        processing_class=tokenizer,
        **more,
    )


TASKS = {
    "completions": ("SFT", PAIRS, {}),
    "packed": ("SFT", CHATS, {"packing": True, "packing_strategy": "wrapped", "max_length": 32}),
    "dpo": ("DPO", CHOICES, {}),
    "kto": ("KTO", VERDICTS, {}),
}


@pytest.mark.parametrize("task", TASKS)
def test_losses_are_those_of_peft_with_equal_a_and_b(
    task: str, folder: Path, tmp_path: Path
) -> None:
    method, data, options = TASKS[task]
    model = li.inject(plain(folder), LORA)
    start = values(model, "default")
    base = {k: t.clone() for k, t in model.state_dict().items() if "lora_" not in k}

    def losses(model: Any, **more: Any) -> list[float]:
        made = trainer(method, folder, tmp_path, model, data, **options, **more)
        made.train()
        return [entry["loss"] for entry in made.state.log_history if "loss" in entry]

    more: dict[str, Any] = {"callbacks": [li.AdapterCheckpoint()]}
    more |= {} if method == "SFT" else {"ref_model": li.reference(model)}
    ours, theirs = losses(model, **more), losses(as_peft(plain(folder), start))
    assert len(ours) == 2
    assert ours == pytest.approx(theirs, rel=1e-4)
    state = model.state_dict()
    assert all(torch.equal(state[key], tensor) for key, tensor in base.items())
    assert all(not torch.equal(p, start[k]) for k, p in li.adapter_parameters(model).items())


def test_a_reward_model_trains_its_new_head_with_the_adapter(folder: Path, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = AutoModelForSequenceClassification.from_pretrained(folder, num_labels=1)
    model.config.pad_token_id = 1
    li.inject(model, {**LORA, "train": ["score"]})
    before = values(model, "default")
    rows = [{"chosen": r["prompt"] + r["chosen"], "rejected": r["prompt"] + " 1"} for r in CHOICES]
    trainer("Reward", folder, tmp_path, model, rows).train()
    assert all(not torch.equal(p, before[k]) for k, p in li.adapter_parameters(model).items())


def test_grpo_takes_the_reference_after_construction(folder: Path, tmp_path: Path) -> None:
    """With beta 0 it loads no second base; its losses are PEFT's with the reference set."""

    def longer(completions: list[str], **_: Any) -> list[float]:
        return [float(sum(map(ord, text)) % 7) for text in completions]

    def run(model: Any, beta: float, reference: Any = None) -> list[float]:
        prompts = [{"prompt": p["prompt"]} for p in PAIRS]
        how = {"beta": beta, "num_generations": 4, "max_completion_length": 6}
        made = trainer("GRPO", folder, tmp_path, model, prompts, longer, **how)
        if reference is not None:
            assert made.ref_model is None
            made.beta, made.ref_model = 0.5, reference
        torch.manual_seed(0)
        made.train()
        logged = [entry for entry in made.state.log_history if "loss" in entry]
        return [entry[key] for key in ("loss", "kl") for entry in logged]

    model = li.inject(plain(folder), LORA)
    start = values(model, "default")
    ours = run(model, 0.0, li.reference(model))
    theirs = run(as_peft(plain(folder), start), 0.5)
    assert ours[-1] > 0
    assert ours == pytest.approx(theirs, rel=1e-3, abs=1e-6)


def test_dropout_that_trl_is_to_disable_and_does_not_reach_is_refused(
    folder: Path, tmp_path: Path
) -> None:
    model = li.inject(plain(folder), {**LORA, "dropout": 0.1})
    how = {"ref_model": li.reference(model), "callbacks": [li.AdapterCheckpoint()]}
    made = trainer("DPO", folder, tmp_path, model, CHOICES, **how)
    with refused(li.StateError, "disable_dropout", "0.1"):
        made.train()


def test_a_reference_is_the_base_in_its_own_mode_and_nothing_of_the_model(folder: Path) -> None:
    rules = {**LORA, "targets": [{"match": "q_proj", "dropout": 0.5}, "lm_head"]}
    model, base = fill(li.inject(plain(folder), rules)).train(), plain(folder).eval()
    modes = [module.training for module in model.modules()]
    reference = li.reference(model)
    for run in (reference, reference.forward):
        assert torch.equal(run(IDS).logits, base(IDS).logits)
    assert torch.equal(reference.base_model(IDS)[0], base.base_model(IDS)[0])
    greedy = {"max_new_tokens": 4, "do_sample": False}
    assert torch.equal(reference.generate(IDS, **greedy), base.generate(IDS, **greedy))
    assert not torch.equal(model.generate(IDS, **greedy), base.generate(IDS, **greedy))
    reference.to(torch.float64).eval().requires_grad_(True)
    assert not list(reference.parameters())
    assert modes == [module.training for module in model.modules()]
    assert reference.config is model.config
    # A forward of the model reads W + delta, and the weight of the teacher, as TRL's distillation.
    read: list[Any] = []
    heads = [each.get_output_embeddings for each in (model, reference)]
    model.model.norm.register_forward_hook(lambda *_: read.extend(h().weight for h in heads))
    model(IDS)
    assert not torch.equal(read[0], base.lm_head.weight)
    assert torch.equal(read[1], base.lm_head.weight)
    li.merge(model)
    with refused(li.StateError, "merged"):
        reference(IDS)
    with refused(li.StateError, "adapter"):
        li.reference(li.eject(model))


class Recorder:
    """TRL's client of a server, or the model inside a colocated engine: keeps what it gets."""

    def __init__(self) -> None:
        self.received: dict[str, torch.Tensor] = {}
        self.llm_engine = self.model_executor = self.driver_worker = self.model_runner = self
        self.model, self.n_resets = self, 0

    def update_named_params(self, metadata: Any, pairs: Any) -> None:
        pairs = [(name, tensor.clone()) for name, tensor in pairs]
        said = [(n, str(t.dtype).removeprefix("torch."), list(t.shape)) for n, t in pairs]
        assert said == metadata
        self.load_weights(pairs)

    def load_weights(self, pairs: Any) -> None:
        self.received |= {name: tensor.clone() for name, tensor in pairs}

    def reset_prefix_cache(self) -> None:
        self.n_resets += 1


class TrainerWithVllm:
    """What a trainer holds of vLLM, without the engine."""

    def __init__(self, model: Any, mode: str) -> None:
        trl = pytest.importorskip("trl.generation.vllm_generation", reason=REASON)
        self.model, self.engine = model, Recorder()
        self.vllm_generation = generation = trl.VLLMGeneration.__new__(trl.VLLMGeneration)
        generation.model, generation.mode, generation.enable_sleep_mode = model, mode, False
        generation.accelerator = SimpleNamespace(is_main_process=True)
        generation.vllm_client = generation.llm = self.engine
        generation._weight_metadata = None
        generation._dist = SimpleNamespace(
            is_fsdp=False, gather_params=lambda _: contextlib.nullcontext()
        )


def recipe() -> Any:
    """What the cookbook's page of TRL with vLLM defines."""
    page = Path(__file__).parents[2] / "docs" / "cookbook" / "trl-vllm.md"
    names: dict[str, Any] = {}
    exec(blocks(page.read_text(encoding="utf-8"))[0].text, names)
    return names["send_merged"]


@needs_transformers_5
@pytest.mark.parametrize("mode", ["server", "colocate"])
@pytest.mark.parametrize("tied", [False, True])
def test_vllm_gets_the_merged_weights_of_each_step(mode: str, tied: bool) -> None:
    model = llama(tie_word_embeddings=tied).eval()
    names = [name for name, _ in model.named_parameters()]
    plain = copy.deepcopy(model)
    made = TrainerWithVllm(fill(li.inject(model, CONFIG)), mode)
    made.vllm_generation.sync_weights()
    assert any("lora" in name for name in made.engine.received)  # what TRL does on its own
    recipe()(made)
    for step in (1, 2):
        fill(model)
        made.engine.received.clear()
        made.vllm_generation._weight_metadata = None
        made.vllm_generation.sync_weights()
        assert list(made.engine.received) == names
        plain.load_state_dict(made.engine.received, strict=False)
        assert error(plain(IDS).logits, model(IDS).logits) < 1e-5
        assert made.engine.n_resets == 1 + step


@needs_transformers_5
@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe", "deepseek_v3", "gpt_oss"])
def test_vllm_gets_experts_by_the_names_of_the_checkpoint(family: str, tmp_path: Path) -> None:
    """vLLM's loaders know the files; transformers 5 holds experts in stacks of other names."""
    model, _ = experts(family)
    config = {"rank": 2, "targets": ["all-linear", "all-experts"]}
    made = recipe()(TrainerWithVllm(fill(li.inject(model, config)), "server"))
    made.vllm_generation.sync_weights()
    li.merge(model, eject=True)
    model.save_pretrained(tmp_path)
    due = load_file(tmp_path / "model.safetensors")
    buffers = {name for name, _ in model.named_buffers()}  # which TRL does not send either
    assert {*made.engine.received} == {*due} - buffers
    for name, tensor in made.engine.received.items():
        assert same_bits(tensor, due[name]), name


def test_what_vllm_would_misread_is_refused() -> None:
    model = llama(tie_word_embeddings=True)
    li.inject(model, {"rank": 2, "targets": ["lm_head"]})
    made = recipe()(TrainerWithVllm(model, "server"))
    args = SimpleNamespace(use_vllm=True, disable_dropout=False)
    with refused(li.StateError, "sends_merged"):  # else it would send the base
        li.AdapterCheckpoint().on_train_begin(args, None, None, model)
    li.AdapterCheckpoint(sends_merged=True).on_train_begin(args, None, None, model)
    with pytest.raises(ValueError, match="lm_head"):
        made.vllm_generation.sync_weights()
