"""Contexts that put modules into a state, and restore it afterwards, after an error too."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

from torch import nn


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
