"""Contexts that put a model into a state for calibration and restore it afterwards, after an error too."""

from __future__ import annotations

import contextlib
import platform
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from ..model.compute import WIDENED_FOR_SPEED, has_bf16_products


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
def in_float32(module: nn.Module, without: Iterable[nn.Module] = ()) -> Iterator[None]:
    """Widen a module's bfloat16 parameters and buffers to float32; afterwards the original tensors are put back.

    Its device must have memory for both. Modules in it that are in `without` are left as they are.
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
            tensor.data = value


@contextlib.contextmanager
def replaced_forward(forwards: dict[nn.Module, Any]) -> Iterator[None]:
    """Replace the `forward` of module instances, as Accelerate's hooks do, and restore it afterwards."""
    previous = {module: module.__dict__.get("forward") for module in forwards}
    for module, forward in forwards.items():
        module.forward = forward
    try:
        yield
    finally:
        for module, old in previous.items():
            if old is None:
                del module.__dict__["forward"]
            else:
                module.forward = old


@contextlib.contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Put a model into evaluation mode, and restore each module's own; modules added meanwhile get the model's."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module in model.modules():
            module.training = modes.get(module, modes[model])


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


@contextlib.contextmanager
def saved_as_copies(module: nn.Module) -> Iterator[None]:
    """A context for forward passes, to be differentiated, through a module that may change its tensors in place.

    What the backward pass reads is kept as copies, which the forward pass cannot change; but for the weights. (What
    torch has for this, `allow_mutation_on_saved_tensors`, gives wrong gradients where views are changed.)
    """
    weights = {parameter.untyped_storage().data_ptr() for parameter in module.parameters()}

    def kept(tensor: Tensor) -> Tensor:
        return tensor if tensor.untyped_storage().data_ptr() in weights else tensor.clone()

    with torch.autograd.graph.saved_tensors_hooks(kept, lambda tensor: tensor):
        yield


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
