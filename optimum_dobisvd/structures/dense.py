"""The whole matrix, for an encoding to store in fewer bits."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from ..encodings.input_gram import InputGram
from ..factorization.factors import Factors, Gauge
from .base import CompressedLinear, QuantizationLoss


class DenseLinear(CompressedLinear):
    """`y = linear(x)`.

    A wrapper of ours around it, because a checkpoint whose matrices were all quantized in place would be taken for a
    dense one by a reader that knows neither format.
    """

    structure = "dense"
    has_rank = False
    bias_key = "linear.bias"
    rank: None
    linear: nn.Module

    @classmethod
    def linears(cls, out_features: int, in_features: int, rank: int | None) -> dict[str, tuple[int, int]]:
        return {"linear": (out_features, in_features)}

    @classmethod
    def written(cls, source: Factors | Tensor, gauge: Gauge, dtype: torch.dtype) -> dict[str, Tensor]:
        return {"linear": source.product() if isinstance(source, Factors) else source}

    @classmethod
    def quantization_loss(cls, weights: Mapping[str, Tensor], gram: InputGram, root: Tensor) -> QuantizationLoss:
        felt = root.square().sum(1).double()
        return lambda rounding_errors: float(felt @ rounding_errors(weights["linear"], gram, None).total)

    @classmethod
    def product(cls, matrices: Mapping[str, Tensor]) -> Tensor:
        return matrices["linear"]

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x)
