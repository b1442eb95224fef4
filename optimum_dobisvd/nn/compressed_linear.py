"""What all compressed forms of a linear have in common.

Bundled with every checkpoint (see `integrations.saving`): nothing but torch.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, ClassVar

import torch
from torch import Tensor, nn


class CompressedLinear(nn.Module, ABC):
    """A linear stored in another form, named `storage` in plans and config.json.

    `conv1d` remembers that the dense layer was transformers' `Conv1D` (GPT-2), whose weight is stored transposed, so
    that the dense form can be put back as it was.

    `weight` is empty, and is saved under the dense weight's old name. A reader that does not know the format would
    build the dense model, find no weights, and fill them at random with a warning; with it, it finds a weight of the
    wrong size and stops. Modeling code can still ask it for dtype and device.
    """

    storage: str
    bias_key: ClassVar[str] = "bias"
    """The name of the bias among the parameters."""
    adapters: ClassVar[str]
    """What PEFT can put adapters on instead of the whole module, in words."""
    weight: Tensor
    rank: int | None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        rank: int | None,
        conv1d: bool,
        device: torch.device | str | None,
        dtype: torch.dtype | None,
    ) -> None:
        super().__init__()
        self.in_features = in_features
        self.out_features = out_features
        self.rank = rank
        self.conv1d = conv1d
        self.register_buffer("weight", torch.empty(0, device=device, dtype=dtype))

    @property
    def macs(self) -> int:
        """Multiply-adds per token."""
        if self.rank is None:
            return self.in_features * self.out_features
        return self.rank * (self.in_features + self.out_features)

    @abstractmethod
    def dense_matrix(self) -> Tensor:
        """The `m x n` matrix this stands for, in float32."""

    def __format__(self, spec: str) -> str:
        # PEFT refuses a module with f"Target module {module} is not supported": the only place in its message where a
        # user can be told what to name instead. print(model), str and repr do not come here.
        return format(f"{self!r} ({self.adapters})", spec)

    def extra_repr(self) -> str:
        rank = "" if self.rank is None else f", rank={self.rank}"
        return f"in_features={self.in_features}, out_features={self.out_features}{rank}, storage={self.storage}"


@torch.no_grad()
def matrix_of(linear: nn.Module) -> Tensor:
    """The `m x n` weight of a linear in float32; of one that another library has quantized, what it computes with."""
    if type(linear) is nn.Linear:
        return linear.weight.detach().float()
    device = next(tensor.device for tensor in (*linear.parameters(), *linear.buffers()))
    columns: Any = linear.in_features
    outputs = linear(torch.eye(columns, device=device)).float()
    bias = getattr(linear, "bias", None)
    return (outputs if bias is None else outputs - bias.float()).T
