"""The tables of ways in which a weight is held packed, and of who puts forwards on instances."""

import subprocess
import sys

import pytest
import torch
from torch import nn

from lora_inject.core.layers.forward_owners import ForwardOwner
from lora_inject.core.layers.packed_values import dense, weight_kind
from lora_inject.core.layers.weight_kinds import UNKNOWN, WeightKind
from lora_inject.core.spec.rooms import standing_at
from lora_inject.integrations.libraries import (
    FORWARD_OWNERS,
    WEIGHT_KINDS,
    WEIGHT_KINDS_OF_ANY,
)

LIFE = """
import sys, torch, lora_inject as li
from torch import nn
net = nn.Sequential(nn.Linear(8, 8), nn.Conv1d(8, 8, 1))
li.inject(net, {"rank": 2, "targets": ["0", "1"], "train": ["1.bias"]})
li.train_only(net, "default")
li.save_adapter(net, sys.argv[1], format="native")
li.merge(net)
li.unmerge(net)
dict(li.merged_weights(net, dequantize="bfloat16"))
li.eject(net)
rooms = ("lora_inject.quantized", "lora_inject.integrations.accelerate")
print([name for name in sys.modules if name.startswith(rooms)])
"""


def test_every_row_names_a_class_with_nothing_to_remember() -> None:
    kinds = [*(path for _, path in WEIGHT_KINDS), *WEIGHT_KINDS_OF_ANY]
    owners = [path for _, path in FORWARD_OWNERS]
    assert all(issubclass(standing_at(path), WeightKind) for path in kinds)
    assert all(issubclass(standing_at(path), ForwardOwner) for path in owners)
    assert all(standing_at(path)().__dict__ == {} for path in (*kinds, *owners))


def test_a_process_without_a_quantizer_imports_nothing_about_any(tmp_path) -> None:
    command = [sys.executable, "-c", LIFE, str(tmp_path / "a.safetensors")]
    run = subprocess.run(command, capture_output=True, text=True, check=True)
    assert run.stdout == "[]\n"


def test_what_no_kind_knows_is_refused_by_every_verb_that_needs_its_values() -> None:
    layer, codes = nn.Linear(2, 2), torch.zeros(2, 2, dtype=torch.int8)
    assert weight_kind(layer, codes) is UNKNOWN
    for verb in ("norms", "dequantize", "requantize"):
        reason = UNKNOWN.why_not(verb, layer, codes)
        assert reason.found == "dequantizing a Linear of torch.nn.modules.linear is not supported"
    with pytest.raises(NotImplementedError):
        dense(layer, codes)


def test_a_tensor_that_says_its_values_is_of_any_library() -> None:
    class Halves(torch.Tensor):
        def dequantize(self) -> torch.Tensor:
            return self.as_subclass(torch.Tensor) / 2

    codes = torch.tensor([[3, 4]], dtype=torch.int8).as_subclass(Halves)
    kind = weight_kind(nn.Linear(2, 1), codes)
    assert kind.why_not("dequantize", nn.Linear(2, 1), codes) is None
    assert dense(nn.Linear(2, 1), codes).tolist() == [[1.5, 2.0]]
    assert dense(nn.Linear(2, 1), codes).dtype == torch.float32
