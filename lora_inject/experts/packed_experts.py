"""Stacked experts in few bits, of which each is unpacked where it is used, and never all of them.

The tensor has the shape and dtype of the stack and the memory of its codes. Selected, transposed,
stacked or joined it stays packed. A product unpacks its matrices one by one, and its backward
again, because autograd saves the codes. Any other operation unpacks what it is given.

`packed_experts` has transformers load them so. Its own packed experts run by kernels that pass no
gradient or need a GPU; else it unpacks all experts as it loads. Its classes of unpacked experts
also run on packed ones.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from lora_inject.core.functional.unstored import DEVICE, PICKED, called, unstored, writes
from lora_inject.errors import LayerError
from lora_inject.experts.stack_formats import Mxfp4Stack, StackFormat, read_matrix


class PackedExperts(Tensor):
    """A stack of matrices, or one matrix of it, held by the codes and scales of a format.

    Args:
        form: The format.
        parts: Its parts, of matrices `(..., out, in)`.
        dtype: Dtype of the values.
        is_turned: Whether the tensor's matrices are `(out, in)`, as the parts are, or `(in, out)`.

    Examples:
        >>> from lora_inject.experts.stack_formats import Mxfp4Stack
        >>> codes, scales = torch.full((2, 3, 16), 0x21), torch.full((2, 3, 1), 128)
        >>> parts = {"codes": codes.byte(), "scales": scales.byte()}
        >>> stack = PackedExperts(Mxfp4Stack(), parts, torch.float32)
        >>> stack.shape, (torch.ones(1, 32) @ stack[0]).tolist()
        (torch.Size([2, 32, 3]), [[48.0, 48.0, 48.0]])
    """

    reads_as_sum: ClassVar[bool] = True  # core.functional.weight asks
    form: StackFormat
    is_turned: bool

    @staticmethod
    def __new__(
        cls: type[PackedExperts],
        form: StackFormat,
        parts: Mapping[str, Tensor],
        dtype: torch.dtype,
        is_turned: bool = False,
    ) -> PackedExperts:
        """Make a tensor without memory of its own."""
        codes = parts["codes"]
        *lead, n_out, _ = codes.shape
        n_in = form.n_in(parts)
        size, stride = [*lead, n_out, n_in], [*([n_out * n_in] * len(lead)), n_in, 1]
        if not is_turned:
            size, stride = ([*t[:-2], t[-1], t[-2]] for t in (size, stride))
        made: PackedExperts = unstored(cls, size, stride, dtype=dtype, device=codes.device)
        made.form, made.is_turned = form, is_turned
        for role in form.rows_of:  # attributes, by which torch moves and swaps them
            setattr(made, role, parts[role])
        return made

    __torch_function__ = nn.Parameter.__torch_function__  # none of its own

    @property
    def packed_again_by(self) -> str:
        """What to do where it is to be packed again, as `quantized.libraries` says it."""
        floats = 'write plain floats, merge(model, dequantize="bfloat16")'
        if not self.form.is_written_on_disk:
            return floats.capitalize()
        on_disk = "lora-inject merge BASE ADAPTER --requantize"
        return f"Save the adapter and merge on disk, {on_disk}; or {floats}"

    @property
    def parts(self) -> dict[str, Tensor]:
        """The format's parts."""
        return {role: getattr(self, role) for role in self.form.rows_of}

    def __tensor_flatten__(self) -> tuple[list[str], dict[str, Any]]:
        """Return what torch moves and swaps."""
        settings = {"form": self.form, "dtype": self.dtype, "is_turned": self.is_turned}
        return list(self.form.rows_of), settings

    @staticmethod
    def __tensor_unflatten__(
        inner: dict[str, Tensor], settings: dict[str, Any], size: Any, stride: Any
    ) -> PackedExperts:
        """Make it from what `__tensor_flatten__` returns."""
        del size, stride
        return PackedExperts(parts=inner, **settings)

    def __repr__(self) -> str:  # type: ignore[override]
        """Return format, shape and dtype; a print unpacks nothing."""
        return f"PackedExperts({self.form.title}, {tuple(self.shape)}, {self.dtype}, {self.device})"

    def dequantize(self) -> Tensor:
        """Return the values, a new contiguous tensor."""
        return self.unpacked().contiguous()

    def unpacked(self) -> Tensor:
        """Return the values, a new tensor with the strides of this one."""
        values = self.form.values(self.parts).to(self.dtype)
        return values if self.is_turned else values.mT

    @property
    def is_stack(self) -> bool:
        """Whether there are matrices to pick."""
        return self.dim() == 3

    def part(self, index: int | Tensor) -> PackedExperts:
        """Return one matrix of a stack, or some."""
        return self._like(lambda t: t[index])

    def turned(self) -> PackedExperts:
        """Return it transposed."""
        return PackedExperts(self.form, self.parts, self.dtype, not self.is_turned)

    def _like(
        self, change: Callable[[Tensor], Tensor], dtype: torch.dtype | None = None
    ) -> PackedExperts:
        parts = {role: change(part) for role, part in self.parts.items()}
        return PackedExperts(self.form, parts, dtype or self.dtype, self.is_turned)

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None
    ) -> Any:
        """Copy, pick and multiply packed; unpack for everything else."""
        if func is DEVICE:
            return args[0].parts["codes"].device
        kwargs = kwargs or {}
        if func in _COPIES:
            return _copied(func, *args, **kwargs)
        if func is torch.ops.aten.copy_.default and _alike(*args[:2]):
            for role, part in args[0].parts.items():
                part.copy_(args[1].parts[role])
            return args[0]
        known = PICKED.get(func) or _JOINED.get(func) or _GROUPED.get(str(func))
        result = known(*args, **kwargs) if known else NotImplemented
        if result is not NotImplemented:
            return result
        if writes(func, args, kwargs, PackedExperts):
            raise LayerError(
                f"{func} on experts in {_title_of(args, kwargs)}",
                "their values are packed, and what is written would be lost",
                "Load the base dequantized, outside packed_experts(), to change it",
            )
        return called(func, args, kwargs, PackedExperts, PackedExperts.unpacked)


_COPIES = {
    torch.ops.aten.detach.default,
    torch.ops.aten.clone.default,
    torch.ops.aten.alias.default,
    torch.ops.aten._to_copy.default,
}


def _copied(func: Any, stack: PackedExperts, **kwargs: Any) -> PackedExperts:
    dtype = kwargs.pop("dtype", None)
    return stack._like(lambda t: func(t, **kwargs), dtype)


def _alike(one: Any, two: Any) -> bool:
    both = isinstance(one, PackedExperts) and isinstance(two, PackedExperts)
    return both and one.shape == two.shape and _as(one) == _as(two)


def _as(stack: PackedExperts) -> tuple[StackFormat, bool]:
    return stack.form, stack.is_turned


def _title_of(args: Sequence[Any], kwargs: Mapping[str, Any]) -> str:
    leaves = tree_leaves((tuple(args), dict(kwargs)))
    return next(leaf.form.title for leaf in leaves if isinstance(leaf, PackedExperts))


def _stacked(matrices: Sequence[Any], dim: int = 0) -> Any:
    """`torch.stack` of matrices of one format."""
    first = matrices[0]
    alike = all(_alike(first, matrix) for matrix in matrices)
    if not alike or dim != 0 or first.is_stack:
        return NotImplemented
    return _with_parts(matrices, torch.stack)


def _joined(stacks: Sequence[Any], dim: int = 0) -> Any:
    """`torch.cat` along the outputs, where no block of scales is cut."""
    first = stacks[0]
    packed = all(isinstance(stack, PackedExperts) for stack in stacks)
    if not packed or any(_as(stack) != _as(first) for stack in stacks):
        return NotImplemented
    outputs = first.dim() - (2 if first.is_turned else 1)
    if dim % first.dim() != outputs:
        return NotImplemented
    block = max(first.form.rows_of.values())
    if any(stack.shape[outputs] % block for stack in stacks[:-1]):
        return NotImplemented
    return _with_parts(stacks, lambda parts: torch.cat(parts, dim=-2))


def _with_parts(
    stacks: Sequence[PackedExperts], join: Callable[[list[Tensor]], Tensor]
) -> PackedExperts:
    first = stacks[0]
    parts = {role: join([stack.parts[role] for stack in stacks]) for role in first.parts}
    return PackedExperts(first.form, parts, first.dtype, first.is_turned)


_JOINED: dict[Any, Callable[..., Any]] = {
    torch.ops.aten.stack.default: _stacked,
    torch.ops.aten.cat.default: _joined,
}


def _product(x: Tensor, stack: Any, offs: Any = None, bias: Any = None, out: Any = None) -> Any:
    """`torch._grouped_mm` of rows that are sorted by expert.

    The host has to wait for their numbers, as in transformers' fallback: an expert without rows is
    not unpacked.
    """
    packed = isinstance(stack, PackedExperts) and stack.dim() == 3 and x.dim() == 2
    if not packed or offs is None or bias is not None or out is not None:
        return NotImplemented
    y, start = x.new_zeros(len(x), stack.shape[2]), 0
    for i, end in enumerate(offs.tolist()):
        if start < end:
            torch.mm(x[start:end], stack.part(i).unpacked(), out=y[start:end])
        start = end
    return y


def _backward(x: Tensor, stack: Any, offs: Tensor, g: Tensor) -> Any:
    """Of transformers' operation, which wants a gradient of the frozen stack, too."""
    del x
    return _product(g, stack.turned(), offs), g.new_zeros(()).expand(stack.shape)


# By name: custom operations exist once their library is imported.
_GROUPED: dict[str, Callable[..., Any]] = {
    "aten._grouped_mm.default": _product,
    "transformers.grouped_mm_fallback.default": _product,
    "transformers.grouped_mm_fallback_backward.default": _backward,
}


@contextmanager
def packed_experts() -> Iterator[None]:
    """Have `from_pretrained` keep stacks of experts packed, in a model that trains.

    Experts in MXFP4 or float8 keep the memory of their codes, on any device and without kernels.
    Each is unpacked where it is used, and again in the backward pass. All other layers are unpacked
    as they load, and activations are not quantized. Checkpoints of other formats load as outside.
    Other threads must not load models meanwhile.

    Raises:
        LayerError: transformers is not installed, or older than 5.24; in `from_pretrained`, a
            weight is stored in another format.

    Examples:
        >>> from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING
        >>> with packed_experts():  # model = AutoModelForCausalLM.from_pretrained("gpt-oss-20b")
        ...     AUTO_QUANTIZER_MAPPING["mxfp4"].__name__
        'KeptMxfp4'
    """
    try:
        import transformers
        from packaging.version import Version
    except ImportError:
        remedy = "Run pip install 'transformers>=5.24' accelerate"
        raise LayerError("packed_experts()", "transformers is not installed", remedy) from None
    if Version(transformers.__version__) < Version("5.24"):
        raise LayerError(
            "packed_experts()",
            f"transformers {transformers.__version__} loads packed experts in another way",
            "Install transformers 5.24 or newer",
        )
    from transformers.quantizers import auto

    problems: list[LayerError] = []
    before = dict(auto.AUTO_QUANTIZER_MAPPING)
    auto.AUTO_QUANTIZER_MAPPING.update(_quantizers(problems))
    try:
        yield
    except RuntimeError as error:  # transformers' report of all that went wrong
        if problems:
            raise problems[0] from error
        raise
    finally:
        auto.AUTO_QUANTIZER_MAPPING.clear()
        auto.AUTO_QUANTIZER_MAPPING.update(before)


def _quantizers(problems: list[LayerError]) -> dict[str, Any]:
    """Return quantizers in the place of those that would unpack experts, or run kernels."""
    from transformers.quantizers.quantizer_finegrained_fp8 import FineGrainedFP8HfQuantizer
    from transformers.quantizers.quantizer_mxfp4 import Mxfp4HfQuantizer

    class KeptMxfp4(Mxfp4HfQuantizer):
        def validate_environment(self, *_: Any, **__: Any) -> None:
            self.quantization_config.dequantize = True

        def get_load_operations(self) -> dict[str, Any]:
            return {"dequantize": _operation(_of_gpt_oss, problems)}

    class KeptFloat8(FineGrainedFP8HfQuantizer):
        def validate_environment(self, *_: Any, **__: Any) -> None:
            self.quantization_config.dequantize = True

        def get_load_operations(self) -> dict[str, Any]:
            return {"dequantize": _operation(_of_linears, problems)}

        def postprocess_model(self, model: Any, **more: Any) -> Any:
            for parameter in model.parameters():  # transformers has them get gradients
                if isinstance(parameter, PackedExperts):
                    parameter.requires_grad_(False)
            return super().postprocess_model(model, **more)

    return {"mxfp4": KeptMxfp4, "fp8": KeptFloat8}


def _operation(read: Callable[..., dict[str, Any]], problems: list[LayerError]) -> type:
    """Return an operation of transformers' loading that calls `read` and notes what it raises."""
    from transformers.core_model_loading import ConversionOps
    from transformers.quantizers.quantizers_utils import get_module_from_name

    class Keep(ConversionOps):  # type: ignore[misc]
        def __init__(self, hf_quantizer: Any) -> None:
            self.hf_quantizer = hf_quantizer

        def convert(self, input_dict: dict[str, Any], *_: Any, **more: Any) -> dict[str, Any]:
            full = more["full_layer_name"]
            module, name = get_module_from_name(more["model"], full)
            like: Tensor = getattr(module, name)
            try:
                return read(input_dict, full, like, self.hf_quantizer.quantization_config)
            except LayerError as error:
                problems.append(error)
                raise

    return Keep


def _of_gpt_oss(tensors: Mapping[str, Any], full: str, like: Tensor, _: Any) -> dict[str, Any]:
    """Return a stack that is stored as one, of blocks and scales."""
    name = full.rpartition(".")[2]
    each = (tensors[f"{name}_{part}"] for part in ("blocks", "scales"))
    blocks, scales = (part[0] if isinstance(part, list) else part for part in each)
    parts = {"codes": blocks.flatten(-2), "scales": scales}
    stack = PackedExperts(Mxfp4Stack(), parts, like.dtype)
    return {full: nn.Parameter(stack, requires_grad=False)}


def _of_linears(
    tensors: Mapping[str, Any], full: str, like: Tensor, settings: Any
) -> dict[str, Any]:
    """Return what linear layers store as one matrix for each: packed for a stack, else unpacked.

    The matrices of a stack are stacked and joined by transformers' next operations.
    """
    block = settings.weight_block_size
    made: dict[str, Any] = {}
    for pattern in [key for key in tensors if key.rpartition(".")[2] == "weight"]:
        prefix = pattern.removesuffix("weight")
        beside = {
            key.removeprefix(prefix): _listed(tensors[key])
            for key in tensors
            if key.startswith(prefix)
        }
        matrices = [
            _matrix({name: each[n] for name, each in beside.items()}, full, like, block)
            for n in range(len(beside["weight"]))
        ]
        if like.dim() == 3:
            made[pattern] = matrices
        else:
            made[full] = matrices[0]
    if len(made) > 1:
        _check_joinable(made, full)
    return made


def _listed(tensors: Any) -> list[Tensor]:
    return tensors if isinstance(tensors, list) else [tensors]


def _matrix(
    tensors: Mapping[str, Tensor], full: str, like: Tensor, block: tuple[int, int] | None
) -> Tensor:
    known = read_matrix(tensors, block, f"packed_experts(), '{full}'")
    if known is None:
        return tensors["weight"].to(like.dtype)
    packed = PackedExperts(*known, like.dtype, is_turned=True)
    return packed if like.dim() == 3 else packed.unpacked()


def _check_joinable(made: Mapping[str, list[Tensor]], full: str) -> None:
    """Refuse matrices of which one ends within a block of scales: in a stack they are one."""
    for matrices in made.values():
        first = matrices[0]
        rows = max(first.form.rows_of.values()) if isinstance(first, PackedExperts) else 1
        if len(first) % rows:
            raise LayerError(
                f"packed_experts(), '{full}'",
                f"of the matrices that it joins one has {len(first):,} outputs, and {rows} of them "
                "share a scale",
                "Load it dequantized, outside packed_experts()",
            )
