"""Weights of dense linears wherever Accelerate keeps them."""

from __future__ import annotations

from typing import Any

from accelerate.utils import align_module_device
from torch import Tensor

from .linears import weight_matrix


def dense_weight(module: Any) -> Tensor:
    """Return a dense linear's weight, `m x n`, brought back from cpu or disk offload if need be."""
    if module.weight.device.type != "meta":
        return weight_matrix(module)
    with align_module_device(module, execution_device="cpu"):
        return weight_matrix(module).clone()


def dense_bias(module: Any) -> Tensor | None:
    """Return a dense linear's bias in float64 if it has one, brought back from offload if need be."""
    if not isinstance(module.bias, Tensor):
        return None
    if module.bias.device.type != "meta":
        return module.bias.detach().double()
    with align_module_device(module, execution_device="cpu"):
        return module.bias.detach().double()
