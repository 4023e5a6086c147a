"""Methods besides `forward` that read a parameter of their own module, and how they are called.

They are found in the code of the classes. The arguments are those of the model's own calls in a
forward, or else the model's inputs, by the names in the method's signature.
"""

import contextlib
import copy
import inspect
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from zoo.inputs import dummy_inputs
from zoo.steps import run, tensors_in

NOT_ASKED = {"__init__", "forward", "extra_repr"}


class Reader(NamedTuple):
    """A method of a module, and a parameter that it reads."""

    path: str
    method: str
    parameter: str

    @property
    def name(self) -> str:
        """The parameter's name in the model."""
        return f"{self.path}.{self.parameter}".lstrip(".")


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


def readers(model: nn.Module) -> list[Reader]:
    """Return all methods of a model that read a parameter of their own, but for norms'."""
    return [
        Reader(path, method, parameter)
        for path, module in model.named_modules()
        for method, names in _methods(type(module))
        for parameter in module._parameters
        if parameter in names
    ]


def _methods(cls: type) -> Iterator[tuple[str, tuple[str, ...]]]:
    """Yield the methods that transformers defines of a class, and what their code names."""
    seen = set(NOT_ASKED)
    for one in cls.__mro__:
        for name, value in vars(one).items() if one.__module__.startswith("transformers.") else ():
            if inspect.isfunction(value) and name not in seen and "init" not in name:
                yield name, inspect.unwrap(value).__code__.co_names
            seen.add(name)


def calls_of(model: nn.Module, model_type: str, wanted: list[Reader]) -> list[Called]:
    """Return a call of each method whose arguments can be derived."""
    inputs = dummy_inputs(model, model_type)
    recorded: dict[tuple[str, str], Called] = {}
    larger = [{**one, "interpolate_pos_encoding": True} for one in inputs]
    for calls, training in ((inputs, False), (larger, False), (inputs, True)):
        with _recording(model.train(training), wanted, recorded), contextlib.suppress(Exception):
            run(model, calls)
    model.eval()
    for reader in wanted:
        key = (reader.path, reader.method)
        method = getattr(model.get_submodule(reader.path), reader.method)
        for given in inputs if key not in recorded else ():
            names = inspect.signature(method).parameters
            kwargs = {name: given[name] for name in names if name in given}
            call = Called(*key, (), kwargs)
            with contextlib.suppress(Exception):
                if kwargs and call.on(model):
                    recorded[key] = call
    return list(recorded.values())


@contextlib.contextmanager
def _recording(
    model: nn.Module, wanted: list[Reader], recorded: dict[tuple[str, str], Called]
) -> Iterator[None]:
    modules = {reader.path: model.get_submodule(reader.path) for reader in wanted}
    for path, method in {(reader.path, reader.method) for reader in wanted}:
        real = getattr(modules[path], method)

        def note(
            *args: Any, _path: str = path, _method: str = method, _real: Any = real, **kwargs: Any
        ) -> Any:
            with contextlib.suppress(Exception):  # what cannot be copied cannot be called again
                call = Called(_path, _method, *copy.deepcopy((args, kwargs)))
                if "mask_time_indices" in inspect.signature(_real).parameters:  # else at random
                    call.kwargs["mask_time_indices"] = torch.ones(args[0].shape[:2]).bool()
                recorded.setdefault((_path, _method), call)
            return _real(*args, **kwargs)

        modules[path].__dict__[method] = note
    try:
        with torch.no_grad():
            yield
    finally:
        for reader in wanted:
            modules[reader.path].__dict__.pop(reader.method, None)


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
