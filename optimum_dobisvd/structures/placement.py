"""Putting compressed linears in the place of dense ones, under Accelerate too."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import torch
from accelerate.hooks import AlignDevicesHook, SequentialHook, add_hook_to_module, attach_align_device_hook
from accelerate.utils import align_module_device
from torch import Tensor, nn

from ..factorization.factors import Factors
from ..model.linears import is_conv1d
from .base import CompressedLinear, matrix_shape
from .format import AS_IS, Format


def replace_linear(
    model: nn.Module,
    name: str,
    format: Format,
    rank: int | None,
    source: Factors | Tensor,
    gram: Tensor | None = None,
) -> dict[str, Tensor] | None:
    """Put a compressed linear in the place of another, on its device, in its dtype, offloaded if it was.

    `source` are factors (`m x k`, `k x n`), or the matrix for a structure without rank; `gram` is `H` of its inputs,
    for structures that refit what is not rounded yet.

    Returns what `structure.product` takes: the matrices that its linears compute with; None where they are still plain
    linears, for an encoding that waits. ValueError where values or scales overflow in the
    model's dtype.
    """
    module: Any = model.get_submodule(name)
    hook = _align_hook(module)
    away = hook is not None and hook.offload
    with align_module_device(module, execution_device="cpu") if away else nullcontext():
        new, matrices = _built(module, format, rank, source, gram)
    new.train(module.training)
    if hook is not None:
        _hook_alike(new, hook)
    model.set_submodule(name, new)
    return None if format.encoding.waits else matrices


def _built(
    module: Any, format: Format, rank: int | None, source: Factors | Tensor, gram: Tensor | None
) -> tuple[CompressedLinear, dict[str, Tensor]]:
    """The compressed linear on the device of the one it stands for, with memory of its own."""
    device, dtype = module.weight.device, module.weight.dtype
    compressed, (outputs, inputs) = isinstance(module, CompressedLinear), matrix_shape(module)
    conv1d = module.conv1d if compressed else is_conv1d(module)
    trained = compressed or module.weight.requires_grad
    bias = module.bias
    if bias is not None:
        bias = nn.Parameter(bias.detach().clone(), requires_grad=bias.requires_grad)
    new = format.structure(inputs, outputs, rank, bias=bias is not None, conv1d=conv1d, device="meta", dtype=dtype)
    new.encoding = format.encoding.name
    new.weight = torch.empty(0, device=device, dtype=dtype)
    weights = format.structure.written(source, format.encoding.gauge, dtype)
    now = Format(format.structure, AS_IS.encoding) if format.encoding.waits else format
    here = {child: weight.to(device) for child, weight in weights.items()}
    felt = None if gram is None else gram.to(device)
    children, matrices = now.quantize(here, bias, dtype, min(outputs, inputs), felt)
    new.put_own(here, bias)
    for child, built in children.items():
        built.to(device)
        if type(built) is nn.Linear:
            built.weight = nn.Parameter(_own(built.weight), requires_grad=trained)
        new.set_submodule(child, built)
    return new, matrices


def _own(tensor: Tensor) -> Tensor:
    """The same values in memory that nothing else looks at: factors may be views of a whole decomposition."""
    data = tensor.detach()
    return data.clone() if data.untyped_storage().nbytes() != data.numel() * data.element_size() else data


def _hook_alike(module: nn.Module, hook: AlignDevicesHook) -> None:
    """Have Accelerate place a module as it placed another one."""
    if hook.offload:
        values = {key: value.to("cpu") for key, value in module.state_dict().items()}
        attach_align_device_hook(module, execution_device=hook.execution_device, offload=True, weights_map=values)
        return
    add_hook_to_module(module, AlignDevicesHook(hook.execution_device, io_same_device=hook.io_same_device))


def _align_hook(module: nn.Module) -> AlignDevicesHook | None:
    hook = getattr(module, "_hf_hook", None)
    hooks = hook.hooks if isinstance(hook, SequentialHook) else [hook]
    return next((each for each in hooks if isinstance(each, AlignDevicesHook)), None)
