"""TRL's SFTTrainer on a model that carries an adapter: `inject`, then train as usual.

SFTTrainer knows nothing of this package, so what it is to leave alone is compared bit for
bit, and what it is to train is seen to have changed.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from training_models import CONFIG, curve, llama_folder
from transformers import AutoModelForCausalLM, AutoTokenizer

import lora_inject as li

# Their imports warn of things that are no concern of a test here.
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
