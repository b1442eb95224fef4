"""The weight as it is, in the model's own dtype."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from .base import Encoding, LinearShape, stacked


class Float(Encoding):
    """Plain `nn.Linear`: what PEFT, GPTQ and bitsandbytes find by its type, and what can be trained."""

    name = "float"
    roundings: ClassVar[tuple[str, ...]] = ()
    trainable = True
    sliceable = True

    @classmethod
    def named(cls, name: str, settings: Any = None) -> Float | None:
        return cls() if name == cls.name else None

    def as_applied(self) -> None:
        """There is nothing to remember: it is what a model without a setting has."""

    def bytes(self, shape: LinearShape, element_size: int) -> int:
        return shape.numel * element_size

    def tensors(self, shape: LinearShape) -> dict[str, tuple[list[int], str | None]]:
        return {"weight": ([shape.out_features, shape.in_features], None)}

    def quantize(
        self, linear: nn.Linear, full_rank: int, dtype: torch.dtype, gram: Tensor | None = None
    ) -> tuple[nn.Module, Tensor]:
        """Cast the weight to the model's dtype. ValueError if a value overflows there."""
        weight = linear.weight.detach().to(dtype).contiguous()
        if not bool(torch.isfinite(weight).all()):
            raise ValueError(
                f"a factor does not fit into {dtype}: its values overflow; load the model in bfloat16 or float32"
            )
        linear.weight = nn.Parameter(weight, requires_grad=linear.weight.requires_grad)
        return linear, weight

    def is_row_scaled(self, linear: nn.Module) -> bool:
        return type(linear) is nn.Linear

    def for_inference(self, linears: Sequence[nn.Module], dtype: torch.dtype) -> nn.Module | None:
        plain = [linear for linear in linears if type(linear) is nn.Linear]
        if len(plain) < 2 or len(plain) < len(linears):
            return None
        rows = [linear.out_features for linear in plain]
        new = nn.Linear(plain[0].in_features, sum(rows), bias=False, device="meta")
        new.register_parameter("weight", stacked([linear.weight for linear in plain], rows))
        new.register_parameter("bias", stacked([linear.bias for linear in plain], rows))
        return new.eval()
