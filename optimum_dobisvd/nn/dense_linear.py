"""The dense linears a model may have: `nn.Linear`, and transformers' `Conv1D` (GPT-2), which stores `W^T`."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from ..storage.inner_forms import inner_form_named
from .compressed_linear import CompressedLinear
from .eight_bit_linear import Int8Linear, Int8LowRankLinear, RemappedLinear
from .low_rank_linear import LowRankLinear
from .whole_linear import WholeLinear


def is_dense_linear(module: nn.Module) -> bool:
    """Exactly `nn.Linear` or `Conv1D`: a subclass may compute something else."""
    return type(module) is nn.Linear or type(module) is Conv1D


def weight_matrix(module: Any) -> Tensor:
    """The weight as `out_features x in_features`, a view."""
    return as_matrix(module, module.weight.detach())


def as_matrix(module: nn.Module, stored: Tensor) -> Tensor:
    """A tensor in the layout of a linear's weight (the weight, its gradient) as `out_features x in_features`."""
    return stored.T if type(module) is Conv1D else stored


def compressed_class(storage: str, rank: int | None = None) -> type[CompressedLinear]:
    """The module that computes from a storage. ValueError lists the known ones.

    For a form of another library it is the shell whose children that library quantizes.
    """
    if inner_form_named(storage) is not None:
        return WholeLinear if rank is None else LowRankLinear
    classes = {found.storage: found for found in (LowRankLinear, RemappedLinear, Int8LowRankLinear, Int8Linear)}
    if storage not in classes:
        raise ValueError(
            f"storage {storage!r} is not known to this version, which reads {', '.join(classes)}: upgrade "
            "optimum-dobisvd"
        )
    return classes[storage]


def empty_compressed(
    module: Any, storage: str, rank: int | None, device: torch.device | str | None = None
) -> CompressedLinear:
    """A compressed linear of the same shape, bias and dtype as a dense or compressed one, its tensors not set."""
    if isinstance(module, CompressedLinear):
        out_features, in_features, conv1d = module.out_features, module.in_features, module.conv1d
    else:
        (out_features, in_features), conv1d = weight_matrix(module).shape, type(module) is Conv1D
    make: Any = compressed_class(storage, rank)
    new = make(
        in_features,
        out_features,
        rank,
        bias=module.bias is not None,
        conv1d=conv1d,
        device=device if device is not None else module.weight.device,
        dtype=module.weight.dtype,
    )
    new.storage = storage
    return new


def to_dense(module: CompressedLinear) -> nn.Module:
    """The dense layer of the same function: the matrix is formed in float32 and rounded once."""
    weight = module.dense_matrix().to(module.weight.dtype)
    bias: Any = module.bias
    if module.conv1d:
        dense: Any = Conv1D(module.out_features, module.in_features)  # always with a bias
        dense.weight = nn.Parameter(weight.T.contiguous())
        dense.bias = nn.Parameter(bias.detach().clone())
        return dense
    dense = nn.Linear(module.in_features, module.out_features, bias=bias is not None, device="meta")
    dense.weight = nn.Parameter(weight)
    if bias is not None:
        dense.bias = nn.Parameter(bias.detach().clone())
    return dense
