"""Two thin linears: `W' = A B`."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from ..encodings.input_gram import InputGram
from ..factorization.factors import Factors, Gauge
from .base import CompressedLinear, QuantizationLoss, RoundingErrors


class LowRankLinear(CompressedLinear):
    """`y = second(first(x))`: `first` (`k x n`) maps inputs to ranks, `second` (`m x k`, bias) to outputs."""

    structure = "low_rank"
    bias_key = "second.bias"
    rank: int
    first: nn.Module
    second: nn.Module

    @classmethod
    def linears(cls, out_features: int, in_features: int, rank: int | None) -> dict[str, tuple[int, int]]:
        if rank is None:
            raise ValueError("structure 'low_rank' needs a rank")
        return {"first": (rank, in_features), "second": (out_features, rank)}

    @classmethod
    def written(cls, source: Factors | Tensor, gauge: Gauge, dtype: torch.dtype) -> dict[str, Tensor]:
        if isinstance(source, Tensor):
            raise TypeError("structure 'low_rank' is written from factors")
        factors = source.in_gauge(gauge, dtype)
        return {"first": factors.first, "second": factors.second}

    @classmethod
    def quantization_loss(cls, weights: Mapping[str, Tensor], gram: InputGram, root: Tensor) -> QuantizationLoss:
        first, second = weights["first"], weights["second"]
        inner = InputGram(cls.input_gram("second", gram.single, weights))
        felt_of_ranks = (root.T @ second).square().sum(0).double()
        felt_of_outputs = root.square().sum(1).double()

        def loss(rounding_errors: RoundingErrors) -> float:
            in_first, in_second = rounding_errors(first, gram, None).total, rounding_errors(second, inner, None).total
            return float(felt_of_ranks @ in_first + felt_of_outputs @ in_second)

        return loss

    @classmethod
    def product(cls, matrices: Mapping[str, Tensor]) -> Tensor:
        return matrices["second"] @ matrices["first"]

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.first(x))

    def factors(self) -> tuple[Tensor, Tensor]:
        matrices = self.matrices()
        return matrices["second"].double(), matrices["first"].double()
