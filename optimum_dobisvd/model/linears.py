"""The dense linears a model may have: `nn.Linear`, and transformers' `Conv1D` (GPT-2), which stores `W^T`.

Bundled with every checkpoint (see `checkpoint.bundle`).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D


def is_dense_linear(module: nn.Module) -> bool:
    """Whether it is exactly `nn.Linear` or `Conv1D`: a subclass may compute something else."""
    return type(module) is nn.Linear or type(module) is Conv1D


def is_linear(module: nn.Module) -> bool:
    """Whether it is `nn.Linear`, `Conv1D`, or a subclass, which may compute something else."""
    return isinstance(module, nn.Linear | Conv1D)


def is_conv1d(module: nn.Module) -> bool:
    """Whether it is transformers' `Conv1D`, which stores `W^T`."""
    return isinstance(module, Conv1D)


def weight_matrix(module: Any) -> Tensor:
    """Return the weight as `out_features x in_features`, a view."""
    return as_matrix(module, module.weight.detach())


def as_matrix(module: nn.Module, stored: Tensor) -> Tensor:
    """Return a tensor in the layout of a linear's weight (or its gradient) as `out_features x in_features`."""
    return stored.T if is_conv1d(module) else stored


def dense_linear(weight: Tensor, bias: Tensor | None, conv1d: bool) -> nn.Module:
    """Return a dense linear of this matrix (`m x n`), and a copy of this bias."""
    if conv1d:
        new: Any = Conv1D(*weight.shape)  # always with a bias
        new.weight = nn.Parameter(weight.T.contiguous())
    else:
        new = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None, device="meta")
        new.weight = nn.Parameter(weight)
    if bias is not None:
        new.bias = nn.Parameter(bias.detach().clone())
    return new


def require_finite(name: str, parameter: Tensor) -> None:
    """Raise ValueError, naming it, if a parameter in memory has NaN or infinite values."""
    if parameter.device.type == "meta" or not parameter.is_floating_point() or parameter.numel() == 0:
        return
    if parameter.element_size() > 1 and not bool(torch.isfinite(torch.stack(torch.aminmax(parameter.detach()))).all()):
        raise ValueError(f"{name} has NaN or infinite values; the checkpoint is damaged, or its dtype too small")
