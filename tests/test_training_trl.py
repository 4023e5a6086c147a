"""TRL's SFTTrainer on a model that carries an adapter: `inject`, then train as usual.

SFTTrainer knows nothing of this package, so what it is to leave alone is compared bit for
bit, and what it is to train is seen to have changed.
"""

import contextlib
import copy
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from conftest import error, fill, same_bits
from helpers.experts import experts
from helpers.versions import needs_transformers_5
from safetensors.torch import load_file
from training_models import CONFIG, as_peft, curve, llama, llama_folder
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

import lora_inject as li

# Their imports raise warnings that do not concern these tests.
pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]
REASON = "TRL is not installed: pip install trl"


def test_sft_trains_the_adapter_and_nothing_else(tmp_path: Path) -> None:
    trl = pytest.importorskip("trl", reason=REASON, exc_type=ImportError)
    datasets = pytest.importorskip("datasets", reason=REASON, exc_type=ImportError)
    folder = llama_folder(tmp_path / "llama")
    pairs = [{"prompt": f"{i} and {i} is", "completion": f" {2 * i}"} for i in range(16)]
    rows = datasets.Dataset.from_list(pairs)

    def train(out: Path, **how: Any) -> tuple[Any, Any]:
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        torch.manual_seed(0)
        li.inject(model, CONFIG)
        settings = {"max_steps": 4, "save_steps": 2, "logging_steps": 1, "learning_rate": 1e-2}
        settings |= {"use_cpu": True, "report_to": "none", "disable_tqdm": True, "bf16": False}
        trainer = trl.SFTTrainer(
            model,
            trl.SFTConfig(str(out), per_device_train_batch_size=4, **settings),
            train_dataset=rows,
            processing_class=AutoTokenizer.from_pretrained(folder),
            callbacks=[li.AdapterCheckpoint()],
        )
        trainer.train(**how)
        return model, trainer

    model, trainer = train(tmp_path / "out")
    base = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    state = model.state_dict()
    assert all(torch.equal(state[key], tensor) for key, tensor in base.state_dict().items())
    B = {k: p for k, p in li.adapter_parameters(model).items() if k.endswith("lora_B")}
    assert len(B) == 6
    assert all(p.abs().max() > 0 for p in B.values())
    assert len(curve(trainer.state.log_history)) == 4

    li.load_adapter(base, tmp_path / "out" / "checkpoint-4")
    ids = torch.arange(9)[None]
    assert torch.equal(base.eval()(ids).logits, model.eval()(ids).logits)

    (tmp_path / "again").mkdir()
    (tmp_path / "out" / "checkpoint-2").rename(tmp_path / "again" / "checkpoint-2")
    again, trainer_again = train(tmp_path / "again", resume_from_checkpoint=True)
    assert curve(trainer_again.state.log_history) == curve(trainer.state.log_history)
    for key, parameter in li.adapter_parameters(model).items():
        assert torch.equal(li.adapter_parameters(again)[key], parameter), key


# The other trainers ------------------------------------------------------------------------------

TEMPLATE = "{% for m in messages %}{{ m['role'][0] }}:{{ m['content'] }}<end>{% endfor %}"
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
TASKS = {
    "chat": ("SFT", CHATS, {}),
    "packed": ("SFT", CHATS, {"packing": True, "packing_strategy": "wrapped", "max_length": 32}),
    "dpo": ("DPO", CHOICES, {}),
    "kto": ("KTO", VERDICTS, {}),
}


@pytest.mark.parametrize("task", TASKS)
def test_losses_are_those_of_peft_with_equal_a_and_b(task: str, tmp_path: Path) -> None:
    trl, folder = pytest.importorskip("trl"), llama_folder(tmp_path / "llama")
    method, data, options = TASKS[task]
    model = li.inject(plain(folder), LORA)
    start = {k: p.detach().clone() for k, p in li.adapter_parameters(model).items()}
    base = {k: t.clone() for k, t in model.state_dict().items() if "lora_" not in k}

    def losses(model: Any, **more: Any) -> list[float]:
        trainer = getattr(trl, f"{method}Trainer")(
            model,
            args=getattr(trl, f"{method}Config")(str(tmp_path / "out"), **SETTINGS, **options),
            train_dataset=dataset(data),
            processing_class=tokenizer(folder),
            **more,
        )
        trainer.train()
        return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]

    more = {} if method == "SFT" else {"ref_model": li.reference(model)}
    found, wanted = losses(model, **more), losses(as_peft(plain(folder), start))
    assert len(found) == 2
    assert found == pytest.approx(wanted, rel=1e-4)
    state = model.state_dict()
    assert all(torch.equal(state[key], tensor) for key, tensor in base.items())
    assert all(not torch.equal(p, start[k]) for k, p in li.adapter_parameters(model).items())


def test_a_reward_model_trains_its_new_head_with_the_adapter(tmp_path: Path) -> None:
    trl, folder = pytest.importorskip("trl"), llama_folder(tmp_path / "llama")
    torch.manual_seed(0)
    model = AutoModelForSequenceClassification.from_pretrained(folder, num_labels=1)
    model.config.pad_token_id = 1
    li.inject(model, {**LORA, "train": ["score"]})
    before = {k: p.detach().clone() for k, p in li.adapter_parameters(model).items()}
    rows = [{"chosen": r["prompt"] + r["chosen"], "rejected": r["prompt"] + " 1"} for r in CHOICES]
    trl.RewardTrainer(
        model,
        args=trl.RewardConfig(str(tmp_path / "out"), **SETTINGS),
        train_dataset=dataset(rows),
        processing_class=tokenizer(folder),
    ).train()
    assert all(not torch.equal(p, before[k]) for k, p in li.adapter_parameters(model).items())


def test_grpo_takes_the_reference_after_construction(tmp_path: Path) -> None:
    """With beta 0 it loads no second base; its losses are PEFT's with the reference set."""
    trl, folder = pytest.importorskip("trl"), llama_folder(tmp_path / "llama")

    def longer(completions: list[str], **_: Any) -> list[float]:
        return [float(sum(map(ord, text)) % 7) for text in completions]

    def run(model: Any, beta: float, reference: Any = None) -> list[Any]:
        config = trl.GRPOConfig(
            str(tmp_path / "out"), **SETTINGS, beta=beta, num_generations=4, max_completion_length=6
        )
        trainer = trl.GRPOTrainer(
            model,
            longer,
            args=config,
            train_dataset=dataset([{"prompt": p["prompt"]} for p in PAIRS]),
            processing_class=tokenizer(folder),
        )
        if reference is not None:
            assert trainer.ref_model is None
            trainer.beta, trainer.ref_model = 0.5, reference
        torch.manual_seed(0)
        trainer.train()
        logged = [entry for entry in trainer.state.log_history if "loss" in entry]
        return [(entry["loss"], entry["kl"]) for entry in logged]

    model = li.inject(plain(folder), LORA)
    start = {k: p.detach().clone() for k, p in li.adapter_parameters(model).items()}
    found = run(model, 0.0, li.reference(model))
    wanted = run(as_peft(plain(folder), start), 0.5)
    assert found[-1][1] > 0
    assert [x for pair in found for x in pair] == pytest.approx(
        [x for pair in wanted for x in pair], rel=1e-3, abs=1e-6
    )


def test_a_reference_is_the_base_in_its_own_mode_and_nothing_of_the_model(tmp_path: Path) -> None:
    folder = llama_folder(tmp_path / "llama")
    model = fill(li.inject(plain(folder), {**LORA, "dropout": 0.5}))
    model.train()
    modes = [module.training for module in model.modules()]
    ids = torch.arange(9)[None]
    reference = li.reference(model)
    assert torch.equal(reference(ids).logits, plain(folder).eval()(ids).logits)
    reference.to(torch.float64).eval().requires_grad_(True)
    assert not list(reference.parameters())
    assert modes == [module.training for module in model.modules()]
    assert reference.config is model.config
    li.merge(model)
    with pytest.raises(li.StateError, match="merged"):
        reference(ids)
    with pytest.raises(li.StateError, match="no adapter"):
        li.reference(li.eject(model))


def test_dropout_that_trl_is_to_disable_and_does_not_reach_is_refused(tmp_path: Path) -> None:
    trl, folder = pytest.importorskip("trl"), llama_folder(tmp_path / "llama")
    model = li.inject(plain(folder), {**LORA, "dropout": 0.1})
    trainer = trl.DPOTrainer(
        model,
        ref_model=li.reference(model),
        args=trl.DPOConfig(str(tmp_path / "out"), **SETTINGS),
        train_dataset=dataset(CHOICES),
        processing_class=tokenizer(folder),
        callbacks=[li.AdapterCheckpoint()],
    )
    with pytest.raises(li.StateError, match=r"disable_dropout is set, and .* \(0\.1\)"):
        trainer.train()


def test_methods_and_parts_of_a_reference_compute_without_adapters(tmp_path: Path) -> None:
    folder = llama_folder(tmp_path / "llama")
    model = fill(li.inject(plain(folder), {**LORA, "targets": ["q_proj", "lm_head"]})).eval()
    reference, base, ids = li.reference(model), plain(folder).eval(), torch.arange(9)[None]
    greedy = {"max_new_tokens": 4, "do_sample": False}
    found, wanted = reference.generate(ids, **greedy), base.generate(ids, **greedy)
    assert torch.equal(found, wanted)
    assert not torch.equal(model.generate(ids, **greedy), wanted)
    assert torch.equal(reference.forward(ids).logits, base(ids).logits)
    assert torch.equal(reference.base_model(ids)[0], base.base_model(ids)[0])
    # A forward of the model reads W + delta, and the weight of the teacher, as TRL's distillation.
    read: list[Any] = []
    heads = [each.get_output_embeddings for each in (model, reference)]
    model.model.norm.register_forward_hook(lambda *_: read.extend(h().weight for h in heads))
    model(ids)
    assert not torch.equal(read[0], base.lm_head.weight)
    assert torch.equal(read[1], base.lm_head.weight)


def plain(folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


def tokenizer(folder: Path) -> Any:
    found = AutoTokenizer.from_pretrained(folder)
    found.chat_template = TEMPLATE
    return found


def dataset(rows: list[dict[str, Any]]) -> Any:
    return pytest.importorskip("datasets").Dataset.from_list(rows)


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


@pytest.mark.parametrize("mode", ["server", "colocate"])
@pytest.mark.parametrize("tied", [False, True])
def test_vllm_gets_the_merged_weights_of_each_step(mode: str, tied: bool, tmp_path: Path) -> None:
    model = llama(tie_word_embeddings=tied).eval()
    names = [name for name, _ in model.named_parameters()]
    plain = copy.deepcopy(model)
    trainer = TrainerWithVllm(fill(li.inject(model, CONFIG)), mode)
    trainer.vllm_generation.sync_weights()
    assert any("lora" in name for name in trainer.engine.received)  # what TRL does on its own
    li.sync_merged(trainer)
    for step in (1, 2):
        fill(model)
        trainer.engine.received.clear()
        trainer.vllm_generation._weight_metadata = None
        trainer.vllm_generation.sync_weights()
        assert list(trainer.engine.received) == names
        plain.load_state_dict(trainer.engine.received, strict=False)
        ids = torch.arange(9)[None]
        assert error(plain(ids).logits, model(ids).logits) < 1e-5
        assert trainer.engine.n_resets == 1 + step


@needs_transformers_5
@pytest.mark.parametrize("mode", ["server", "colocate"])
@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe", "deepseek_v3", "gpt_oss"])
def test_vllm_gets_experts_by_the_names_of_the_checkpoint(
    mode: str, family: str, tmp_path: Path
) -> None:
    """vLLM's loaders know the files; transformers 5 holds experts in stacks of other names."""
    model, _ = experts(family)
    config = {"rank": 2, "targets": ["all-linear", "all-experts"]}
    trainer = li.sync_merged(TrainerWithVllm(fill(li.inject(model, config)), mode))
    trainer.vllm_generation.sync_weights()
    li.merge(model, eject=True)
    model.save_pretrained(tmp_path)
    due = load_file(tmp_path / "model.safetensors")
    buffers = {name for name, _ in model.named_buffers()}  # which TRL does not send either
    assert {*trainer.engine.received} == {*due} - buffers
    for name, tensor in trainer.engine.received.items():
        assert same_bits(tensor, due[name]), name


def test_what_vllm_would_misread_is_refused() -> None:
    model = llama(tie_word_embeddings=True)
    with pytest.raises(li.StateError, match="the model has no adapter"):
        li.sync_merged(TrainerWithVllm(model, "server"))
    with pytest.raises(li.StateError, match="does not generate with vLLM"):
        li.sync_merged(SimpleNamespace(model=model))
    li.inject(model, {"rank": 2, "targets": ["lm_head"]})
    trainer = li.sync_merged(TrainerWithVllm(model, "server"))
    with pytest.raises(li.StateError, match="'lm_head': it is tied to another tensor"):
        trainer.vllm_generation.sync_weights()


def test_a_run_with_vllm_that_would_send_the_base_is_refused() -> None:
    model = fill(li.inject(llama(), CONFIG))
    args = SimpleNamespace(use_vllm=True, disable_dropout=False)
    callback = li.AdapterCheckpoint()
    with pytest.raises(li.StateError, match=r"Call lora_inject\.sync_merged"):
        callback.on_train_begin(args, None, None, model)
    li.sync_merged(TrainerWithVllm(model, "colocate"))
    callback.on_train_begin(args, None, None, model)
