"""A linear layer stored as two thin ones."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class LowRankLinear(nn.Module):
    """`y = second(first(x))`: `first` maps `in_features` to `rank`, `second` the `rank` to `out_features`, with bias.

    Both children are exactly `nn.Linear`, because bitsandbytes, GPTQ and PEFT find their layers by that type.
    `conv1d` remembers that the dense layer was transformers' `Conv1D` (GPT-2), whose weight is stored transposed, so
    that the dense form can be put back as it was.

    `weight` is empty, and is saved under the dense weight's old name. A reader that does not know the format would
    build the dense model, find no weights, and fill them at random with a warning; with it, it finds a weight of the
    wrong size and stops. Modelling code can still ask it for dtype and device.
    """

    weight: Tensor

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
        super().__init__()
        self.in_features = in_features
        self.out_features = out_features
        self.rank = rank
        self.conv1d = conv1d
        self.first = nn.Linear(in_features, rank, bias=False, device=device, dtype=dtype)
        self.second = nn.Linear(rank, out_features, bias=bias, device=device, dtype=dtype)
        self.register_buffer("weight", torch.empty(0, device=device, dtype=dtype))

    @property
    def bias(self) -> Tensor | None:
        """The bias, which belongs to `second`."""
        return self.second.bias

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.first(x))

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, rank={self.rank}"
