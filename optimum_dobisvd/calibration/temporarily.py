"""States a model is put into for calibration and taken out of afterwards, whatever happens in between."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn


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
