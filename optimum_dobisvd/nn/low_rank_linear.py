"""A linear layer stored as two thin ones."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .compressed_linear import CompressedLinear, matrix_of


class LowRankLinear(CompressedLinear):
    """`y = second(first(x))`: `first` maps `in_features` to `rank`, `second` the `rank` to `out_features`, with bias.

    Both children are exactly `nn.Linear`, because bitsandbytes, GPTQ and PEFT find their layers by that type.
    """

    storage = "plain"  # an instance's own where another library has quantized its children
    bias_key = "second.bias"
    adapters = "two factors: name these, as in target_modules=['q_proj.first', 'q_proj.second'], or 'all-linear'"
    rank: int

    def __init__(
        self,
        in_features: int,
        out_features: int,
        rank: int,
        bias: bool = True,
        conv1d: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(in_features, out_features, rank, conv1d, device, dtype)
        self.first = nn.Linear(in_features, rank, bias=False, device=device, dtype=dtype)
        self.second = nn.Linear(rank, out_features, bias=bias, device=device, dtype=dtype)

    @property
    def bias(self) -> Tensor | None:
        """The bias, which belongs to `second`."""
        return self.second.bias

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.first(x))

    def dense_matrix(self) -> Tensor:
        return matrix_of(self.second) @ matrix_of(self.first)
