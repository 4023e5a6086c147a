"""Adapters of a model exchanged with PEFT: its files read by us, ours read by it.

The model that wrote the files and the one that read them must have the same outputs. PEFT adapts
what its `all-linear` means, and stacked experts as `target_parameters`; we adapt every target. A
verdict other than SAME is shown to be PEFT's: it raises by itself, or contradicts its own merge.
"""

import copy
import re
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

import lora_inject as li
from zoo.build import build
from zoo.exceptions import BY_NAMES, MERGED, RAISES, REFUSED, SAME
from zoo.inputs import dummy_inputs
from zoo.steps import MOVES, TOLERANCE, distance, randomise_factors, run
from zoo.targets import ALPHA, RANK, targets_of

# What PEFT and transformers raise where they cannot handle a model.
FAULTS = (AttributeError, NotImplementedError, RuntimeError, ValueError)


class Exchange:
    """One model type, in both directions."""

    def __init__(self, model_type: str) -> None:
        self.base = build(model_type).requires_grad_(False)
        model = self.fresh()
        self.calls = dummy_inputs(model, model_type)
        self.targets = targets_of(model)
        self.plain = self.outputs(model)

    def fresh(self) -> nn.Module:
        return copy.deepcopy(self.base)

    def outputs(self, model: nn.Module) -> list[Tensor]:
        with torch.no_grad():
            return run(model.eval(), self.calls)

    def peft(self, modules: str | list[str]) -> Any:
        """PEFT's adapter on a fresh model, with random values and a forward that works."""
        from peft import LoraConfig, get_peft_model

        config = LoraConfig(
            r=RANK,
            lora_alpha=ALPHA,
            target_modules=modules,
            target_parameters=list(self.targets.experts) or None,
        )
        wrapped = get_peft_model(self.fresh(), config).eval()
        named = dict(wrapped.named_parameters())
        A = [p for n, p in named.items() if ".lora_A." in n]
        randomise_factors(zip(A, [p for n, p in named.items() if ".lora_B." in n], strict=True))
        assert distance(self.plain, self.outputs(wrapped)) >= MOVES
        return wrapped

    def read_by_us(self) -> str:
        """Load PEFT's adapter and return the verdict."""
        if not self.targets.has_linear:
            return self.read_of(list(self.targets.modules))
        verdict = self.read_of("all-linear")
        if verdict != RAISES:
            return verdict
        stock = (nn.Linear, nn.Conv1d, nn.Conv2d, Conv1D)
        names = [n for n in self.targets.modules if type(self.base.get_submodule(n)) in stock]
        return self.read_of(names).replace(SAME, BY_NAMES)

    def read_of(self, modules: str | list[str]) -> str:
        with tempfile.TemporaryDirectory() as folder:
            try:
                wrapped = self.peft(modules)
                wrapped.create_or_update_model_card = lambda _: None  # slow
                wrapped.save_pretrained(folder, save_embedding_layers=False)
            except FAULTS:
                return RAISES
            try:
                return self.compare(self.outputs(li.load_adapter(self.fresh(), folder)), wrapped)
            except li.LoraInjectError as error:
                if "PEFT" not in str(error):
                    raise
            modules = self.base.named_modules()
            turned = [name for name, m in modules if getattr(m, "is_transposed", False)]
            facts = {"tensor_names": [*self.base.state_dict()], "transposed_modules": turned}
            value = li.read_adapter(folder, **facts)
            dense = li.write_adapter(value, Path(folder) / "a.safetensors", "native")
            verdict = self.compare(self.outputs(li.load_adapter(self.fresh(), dense)), wrapped)
        # The same where the outputs of the layer are never used.
        assert verdict in (MERGED, SAME), f"refused without need: {verdict}"
        return MERGED

    def read_by_peft(self) -> str:
        """Load our adapter with PEFT and return the verdict."""
        from peft import PeftModel

        model = li.inject(self.fresh(), self.targets.config())
        sites = li.adapter_state(model).sites.values()
        randomise_factors((site.A, site.B) for site in sites)
        due = self.outputs(model)
        assert distance(self.plain, due) >= MOVES
        with tempfile.TemporaryDirectory() as folder:
            try:
                path = li.save_adapter(model, Path(folder) / "adapter")
            except li.FormatError as error:
                if not re.search("nothing would call it|PEFT would load it wrong", str(error)):
                    raise
                return REFUSED
            try:
                wrapped = PeftModel.from_pretrained(self.fresh(), str(path)).eval()
            except FAULTS:
                return RAISES
        return self.compare(due, wrapped)

    def compare(self, ours: list[Tensor], wrapped: Any) -> str:
        theirs = self.outputs(wrapped)
        if distance(ours, theirs) <= TOLERANCE:
            return SAME
        for module in wrapped.modules():  # PEFT would write a tied tensor, and merge for others too
            if isinstance(base := getattr(module, "base_layer", None), (nn.Linear, nn.Embedding)):
                base.weight = nn.Parameter(base.weight.detach().clone())
        merged = self.outputs(wrapped.merge_and_unload())
        off = f"off by {distance(ours, theirs):.1e}, and by {distance(ours, merged):.1e} if merged"
        return MERGED if distance(ours, merged) <= TOLERANCE else off
