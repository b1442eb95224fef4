"""A linear layer left whole, for another library to quantize."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .compressed_linear import CompressedLinear, matrix_of


class WholeLinear(CompressedLinear):
    """`y = whole(x)`, with one child that is an `nn.Linear` until it is quantized.

    A shell of ours around it, because a checkpoint whose matrices were all quantized in place would be taken for a
    dense one by a reader that knows neither format.
    """

    storage = "dense"  # an instance's own once its child is quantized
    bias_key = "whole.bias"
    adapters = "left whole: name its child, as in target_modules=['q_proj.whole']"
    rank: None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        rank: int | None = None,
        bias: bool = True,
        conv1d: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(in_features, out_features, rank, conv1d, device, dtype)
        self.whole = nn.Linear(in_features, out_features, bias=bias, device=device, dtype=dtype)

    @property
    def bias(self) -> Tensor | None:
        """The bias, which belongs to the child."""
        return self.whole.bias

    def forward(self, x: Tensor) -> Tensor:
        return self.whole(x)

    def dense_matrix(self) -> Tensor:
        return matrix_of(self.whole)
