"""States a model is put into for calibration and taken out of afterwards, whatever happens in between."""

from __future__ import annotations

import contextlib
import platform
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import nn

from ..model.compute import WIDENED_FOR_SPEED, has_bf16_products


def is_dispatched(module: nn.Module) -> bool:
    """Whether Accelerate moves this module's weights or inputs by its own hooks."""
    return any(hasattr(child, "_hf_hook") for child in module.modules())


@contextlib.contextmanager
def on_device(block: nn.Module, device: torch.device | None) -> Iterator[None]:
    """The block on the compute device, and afterwards back where it was. Accelerate's own placement is left alone."""
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
    """Whether a module is better computed in float32 there: an x86 CPU without instructions for bfloat16, where
    float32 is several times as fast. Not float16, in which overflows are to be seen."""
    slow = device.type == "cpu" and platform.machine() in ("x86_64", "AMD64") and not has_bf16_products()
    return slow and dtype is torch.bfloat16


@contextlib.contextmanager
def in_float32(module: nn.Module, without: Iterable[nn.Module] = ()) -> Iterator[None]:
    """What a module holds in bfloat16 in float32, and afterwards the very same values again.

    Args:
        module: on a device that can hold both.
        without: modules in it that are left as they are.
    """
    left = {id(tensor) for each in without for tensor in _tensors(each)}
    held = [tensor for tensor in _tensors(module) if tensor.dtype is torch.bfloat16 and id(tensor) not in left]
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


def _tensors(module: nn.Module) -> Iterator[torch.Tensor]:
    yield from module.parameters()
    yield from module.buffers()


@contextlib.contextmanager
def replaced_forward(forwards: dict[nn.Module, Any]) -> Iterator[None]:
    """Give modules another `forward`, on the instance, as Accelerate's hooks do; put the old one back afterwards."""
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
    """Evaluation mode, and afterwards each module's own mode again; modules that came in between take the model's."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module in model.modules():
            module.training = modes.get(module, modes[model])


@contextlib.contextmanager
def frozen(model: nn.Module) -> Iterator[None]:
    """No parameter asks for a gradient, so that a backward pass computes those of the activations only."""
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for parameter in trainable:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in trainable:
            parameter.requires_grad_(True)


@contextlib.contextmanager
def without_cache(model: nn.Module) -> Iterator[None]:
    """No key-value cache: nothing is generated, and it would keep every batch's keys alive."""
    config = getattr(model, "config", None)
    if config is None or not hasattr(config, "use_cache"):
        yield
        return
    before = config.use_cache
    config.use_cache = False
    try:
        yield
    finally:
        config.use_cache = before
