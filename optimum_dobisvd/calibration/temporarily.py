"""Contexts that put a model into a state for calibration and restore it afterwards, after an error too."""

from __future__ import annotations

import contextlib
import platform
from collections.abc import Callable, Iterable, Iterator
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from ..model.compute import WIDENED_FOR_SPEED, has_bf16_products
from ..model.states import evaluating as evaluating
from ..model.states import replaced_forward as replaced_forward

R = TypeVar("R")


def is_dispatched(module: nn.Module) -> bool:
    """Return whether Accelerate moves this module's weights or inputs by its own hooks."""
    return any(hasattr(child, "_hf_hook") for child in module.modules())


def weights_device(module: nn.Module) -> torch.device:
    """Return where a module's first weight in memory is; the CPU if it has none."""
    return next((p.device for p in module.parameters() if p.device.type != "meta"), torch.device("cpu"))


@contextlib.contextmanager
def on_device(block: nn.Module, device: torch.device | None) -> Iterator[None]:
    """Move a block to the compute device and back afterwards. One that Accelerate places is left alone."""
    home = next((parameter.device for parameter in block.parameters()), None)
    if device is None or home is None or home == device or is_dispatched(block):
        yield
        return
    try:
        block.to(device)
        yield
    finally:
        block.to(home)


def computes_in_float32(device: torch.device, dtype: torch.dtype) -> bool:
    """Return whether a module is better computed in float32.

    True for bfloat16 on an x86 CPU without instructions for it, where float32 is several times as fast. Not for
    float16, whose overflows must not be hidden.
    """
    slow = device.type == "cpu" and platform.machine() in ("x86_64", "AMD64") and not has_bf16_products()
    return slow and dtype is torch.bfloat16


@contextlib.contextmanager
def in_float32(module: nn.Module, without: Iterable[nn.Module] = (), *, keep_changes: bool = False) -> Iterator[None]:
    """Widen a module's bfloat16 parameters and buffers to float32; afterwards the original tensors are put back.

    Its device must have memory for both. Modules in it that are in `without` are left as they are. With `keep_changes`
    the original tensors take the values that the wide ones have by then, rounded.
    """
    left = {id(tensor) for each in without for tensor in (*each.parameters(), *each.buffers())}
    tensors = (*module.parameters(), *module.buffers())
    held = [tensor for tensor in tensors if tensor.dtype is torch.bfloat16 and id(tensor) not in left]
    values = [tensor.data for tensor in held]
    widened = WIDENED_FOR_SPEED.set(True)
    try:
        for tensor in held:
            tensor.data = tensor.data.float()
        yield
    finally:
        WIDENED_FOR_SPEED.reset(widened)
        for tensor, value in zip(held, values, strict=True):
            tensor.data = value.copy_(tensor.data) if keep_changes else value


@contextlib.contextmanager
def frozen(model: nn.Module) -> Iterator[None]:
    """Turn off the gradients of all parameters, so that a backward pass computes those of the activations only."""
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for parameter in trainable:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in trainable:
            parameter.requires_grad_(True)


def differentiable(module: nn.Module, forward: Callable[[], R]) -> R:
    """Return what a forward pass gives, to be differentiated, though the module may change its tensors in place.

    Where it has changed what the backward pass reads it is run once more, and that is kept as copies, but for the
    weights. (What torch has for this, `allow_mutation_on_saved_tensors`, gives wrong gradients where views are
    changed.)
    """
    seen: list[tuple[Tensor, int]] = []

    def noted(tensor: Tensor) -> Tensor:
        seen.append((tensor, tensor._version))
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(noted, _itself):
        found = forward()
    if all(tensor._version == version for tensor, version in seen):
        return found
    weights = {parameter.untyped_storage().data_ptr() for parameter in module.parameters()}

    def kept(tensor: Tensor) -> Tensor:
        return tensor if tensor.untyped_storage().data_ptr() in weights else tensor.clone()

    with torch.autograd.graph.saved_tensors_hooks(kept, _itself):
        return forward()


def _itself(tensor: Tensor) -> Tensor:
    return tensor


@contextlib.contextmanager
def without_cache(model: nn.Module) -> Iterator[None]:
    """Turn off the key-value cache: nothing is generated, and it would keep every batch's keys in memory."""
    config: Any = getattr(model, "config", None)
    if not hasattr(config, "use_cache"):
        yield
        return
    before, config.use_cache = config.use_cache, False
    try:
        yield
    finally:
        config.use_cache = before
