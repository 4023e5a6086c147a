"""Hold PEFT to the zoo's steps, compared with this package: two counts and two run times.

`tests/zoo/steps.py` knows no library, so PEFT gets the same models, targets, random
numbers and checks. Counted are the steps that both could meet: zero start, freezing, an effect of
every site, save and load, merged equals unmerged, eject exact in values, keys and classes. What
this package promises beyond them is not asked of PEFT.

Run from the root of the repository: `python scripts/zoo_peft.py [MODEL_TYPE ...]`.
"""

from __future__ import annotations

import re
import sys
import time
import warnings
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from zoo import MODEL_TYPES  # noqa: E402 - found by the path above
from zoo.build import build  # noqa: E402
from zoo.exceptions import EXEMPTIONS  # noqa: E402
from zoo.steps import Calls, Held, Ours  # noqa: E402
from zoo.targets import ALPHA, RANK, Targets, targets_of  # noqa: E402

# What a library may raise on a model that it cannot handle.
FAULTS = (ArithmeticError, AssertionError, AttributeError, LookupError, NotImplementedError)
FAULTS += (RuntimeError, TypeError, ValueError, OSError)


class Peft:
    """PEFT, by its documented calls."""

    def inject(self, model: nn.Module, targets: Targets, calls: Calls) -> nn.Module:  # noqa: ARG002
        from peft import LoraConfig, get_peft_model

        config = LoraConfig(
            r=RANK,
            lora_alpha=ALPHA,
            target_modules=list(targets.modules),
            rank_pattern={re.escape(n): r for n, r in targets.modules.items() if r != RANK},
            target_parameters=list(targets.experts) or None,
        )
        return get_peft_model(model, config).eval()

    def factors(self, model: nn.Module) -> dict[str, tuple[Tensor, Tensor]]:
        found = {}
        for name, module in model.named_modules():
            if "default" in getattr(module, "lora_A", ()):
                site = name.replace(".base_layer", "").removeprefix("base_model.model.")
                site += f".{module.parameter_name}" if hasattr(module, "parameter_name") else ""
                found[site] = (module.lora_A["default"].weight, module.lora_B["default"].weight)
        return found

    def save(self, model: nn.Module, folder: Path) -> Path:
        model.save_pretrained(folder)
        return folder

    def load(self, fresh: nn.Module, path: Path) -> nn.Module:
        from peft import PeftModel

        return PeftModel.from_pretrained(fresh, str(path))

    def merge(self, model: nn.Module) -> None:
        model.merge_adapter()

    def unmerge(self, model: nn.Module) -> None:
        model.unmerge_adapter()

    def eject(self, model: nn.Module) -> nn.Module:
        return model.unload()


class PeftUntied(Peft):
    """PEFT, spared the modules whose weight is tied to another's."""

    def inject(self, model: nn.Module, targets: Targets, calls: Calls) -> nn.Module:
        holders = Counter(id(p) for _, p in model.named_parameters(remove_duplicate=False))
        for name in list(targets.modules):
            if holders[id(model.get_submodule(name).weight)] > 1:
                del targets.modules[name]
        return super().inject(model, targets, calls)


def try_one(model_type: str, library: Any) -> tuple[list[str], float]:
    """Return what failed, and the seconds that it took."""
    start = time.perf_counter()
    try:
        failures = Held(model_type, library).failures
    except FAULTS as error:
        failures = [f"{type(error).__name__}: {str(error)[:150]}"]
    return failures, time.perf_counter() - start


def has_linear(model_type: str) -> bool:
    """Whether a model type has any Linear or Conv1D; imports and warms up its code as well."""
    return targets_of(build(model_type)).has_linear


def row(name: str, failures: Mapping[str, list[str]], seconds: float, linear: set[str]) -> str:
    """One line of the table."""
    passed = {model_type for model_type, found in failures.items() if not found}
    excused = passed & EXEMPTIONS.keys()
    return (
        f"{name:24}{len(passed - excused):8}{len(excused):10}{len(failures) - len(passed):8}"
        f"{len((passed - excused) & linear):12} of {len(linear)}{seconds:10.0f} s"
    )


def main() -> None:
    import peft
    import transformers

    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    torch.set_num_threads(1)
    chosen = sys.argv[1:] or MODEL_TYPES
    libraries: dict[str, Any] = {
        "lora_inject": Ours(),
        f"peft {peft.__version__}": Peft(),
        "peft, no tied targets": PeftUntied(),
    }
    failures: dict[str, dict[str, list[str]]] = {name: {} for name in libraries}
    seconds = dict.fromkeys(libraries, 0.0)
    linear = {model_type for model_type in chosen if has_linear(model_type)}
    for model_type in chosen:
        for name, library in libraries.items():
            failures[name][model_type], took = try_one(model_type, library)
            seconds[name] += took
            for failure in failures[name][model_type]:
                print(f"{name:24}{model_type:32}{failure[:200]}", flush=True)
    print(
        f"\n{'of ' + str(len(chosen)):24}{'pass':>8}{'excused':>10}{'fail':>8}{'with Linear':>18}"
    )
    for name in libraries:
        print(row(name, failures[name], seconds[name], linear))


if __name__ == "__main__":
    main()
