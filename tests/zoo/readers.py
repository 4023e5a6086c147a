"""Methods besides `forward` that read a parameter of their own module, and how they are called.

They are found in the code of the classes. The arguments are those of the model's own calls in a
forward, or else the model's inputs, by the names in the method's signature.
"""

import contextlib
import copy
import inspect
from collections import defaultdict
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn

from zoo.inputs import dummy_inputs
from zoo.steps import run, tensors_in

Method = tuple[str, str]  # name of a module, name of its method


class Called(NamedTuple):
    """A method of a module, with arguments."""

    path: str
    method: str
    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    def on(self, model: nn.Module) -> list[Tensor]:
        """Call it, with the same random numbers each time."""
        args, kwargs = copy.deepcopy((self.args, self.kwargs))
        torch.manual_seed(0)
        return [*tensors_in(getattr(model.get_submodule(self.path), self.method)(*args, **kwargs))]


def readers(model: nn.Module) -> dict[Method, set[str]]:
    """Return all methods that read parameters of their own module, and the names of these."""
    read: dict[Method, set[str]] = defaultdict(set)
    for path, module in model.named_modules():
        for method, names in _methods(type(module)):
            for parameter in module._parameters.keys() & set(names):
                read[path, method].add(f"{path}.{parameter}".lstrip("."))
    return read


def _methods(cls: type) -> Iterator[tuple[str, tuple[str, ...]]]:
    """Yield the methods that transformers defines of a class, and what their code names."""
    seen = {"forward", "extra_repr"}
    for one in cls.__mro__:
        for name, value in vars(one).items() if one.__module__.startswith("transformers.") else ():
            if inspect.isfunction(value) and name not in seen and "init" not in name:
                yield name, inspect.unwrap(value).__code__.co_names
            seen.add(name)


def calls_of(model: nn.Module, model_type: str, wanted: set[Method]) -> list[Called]:
    """Return a call of each method whose arguments can be derived."""
    inputs = dummy_inputs(model, model_type)
    calls: dict[Method, Called] = {}

    def noting(path: str, method: str, real: Callable[..., Any]) -> Callable[..., Any]:
        def note(*args: Any, **kwargs: Any) -> Any:
            with contextlib.suppress(Exception):  # what cannot be copied cannot be called again
                call = Called(path, method, *copy.deepcopy((args, kwargs)))
                if "mask_time_indices" in inspect.signature(real).parameters:  # else at random
                    call.kwargs["mask_time_indices"] = torch.ones(args[0].shape[:2]).bool()
                calls.setdefault((path, method), call)
            return real(*args, **kwargs)

        return note

    larger = [{**one, "interpolate_pos_encoding": True} for one in inputs]
    for given, training in ((inputs, False), (larger, False), (inputs, True)):
        with pytest.MonkeyPatch.context() as patch, contextlib.suppress(Exception), torch.no_grad():
            for path, method in wanted:
                module = model.get_submodule(path)
                patch.setitem(vars(module), method, noting(path, method, getattr(module, method)))
            run(model.train(training), given)
    model.eval()
    for path, method in wanted - calls.keys():
        names = inspect.signature(getattr(model.get_submodule(path), method)).parameters
        for one in inputs:
            call = Called(path, method, (), {name: one[name] for name in names if name in one})
            with contextlib.suppress(Exception):
                if call.kwargs and call.on(model):
                    calls[path, method] = call
    return list(calls.values())


# Model types with such a method, called with what `calls_of` derives.
# fmt: off
READERS = (
    "apertus", "blip", "blip-2", "data2vec-audio", "deepseek_vl_hybrid", "deit", "dinov2",
    "dinov2_with_registers", "funnel", "glm5_next", "hiera", "hubert", "ijepa", "internvl",
    "internvl_vision", "jetmoe", "levit", "llava_next", "llava_next_video", "llava_onevision",
    "mllama", "pixio", "qianfan_ocr", "qianfan_ocr_vision", "radio", "rf_detr", "rwkv",
    "sam3_lite_text_text_model", "sew", "sew-d", "speecht5", "tipsv2", "tipsv2_vision_model",
    "unispeech", "unispeech-sat", "vilt", "vit", "vit_mae", "vit_msn", "wav2vec2",
    "wav2vec2-conformer", "wavlm", "xlnet",
)
# fmt: on
