"""Dobi-SVD's remapped storage (Algorithm 3): a factor's first `min(m, n)` rows and columns in 8 bits, the rest in 16.

A rank-k matrix then takes `k max(m, n)` slots of 16 bits, and scales: one per row of each factor's 8-bit part, which
for `first` is Alg. 3's scale per rank. Which two values share a slot is nobody's business: they are stored as int8.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..factorization.factors import Gauge
from .base import Encoding, ErrorMetric, LinearShape
from .int8 import NO_ADAPTERS, IntegerLinear, fake_quantize_rows, quantize_rows, read_offloaded_as_stored
from .int8_matmul import UNIT, int8_matmul


class Remap(Encoding):
    """8 bits where a factor is no longer than the matrix's short side, the model's dtype beyond."""

    name = "remap"
    gauge = Gauge.EQUAL_LEADING_COLUMNS
    relative_error = 8e-5
    adapter_refusal = NO_ADAPTERS
    scales = ("scale",)

    @classmethod
    def named(cls, name: str, settings: Any = None) -> Remap | None:
        return cls() if name == cls.name else None

    @property
    def rank_multiple(self) -> int:
        """What PyTorch's CPU kernel and the GPU's matrix units take without padding."""
        return 16

    def bytes(self, shape: LinearShape, element_size: int) -> int:
        rows, columns = _eight_bit_part(shape.out_features, shape.in_features, shape.full_rank)
        return rows * columns + (shape.numel - rows * columns) * element_size + rows * element_size

    def quantization_loss(self, weight: Tensor, full_rank: int, metric: ErrorMetric) -> float:
        rows, columns = _eight_bit_part(len(weight), weight.shape[1], full_rank)
        rounded = weight.clone()
        rounded[:rows, :columns] = fake_quantize_rows(weight[:rows, :columns])
        return metric.each_value_alone(rounded - weight)

    def quantize(
        self, linear: nn.Linear, full_rank: int, dtype: torch.dtype, gram: Tensor | None = None
    ) -> tuple[nn.Module, Tensor]:
        """Round every value of the 8-bit part on its own; columns beyond it are kept in units of their row's scale."""
        weight = linear.weight.detach()
        rows, columns = _eight_bit_part(len(weight), weight.shape[1], full_rank)
        integers, scale = quantize_rows(weight[:rows, :columns], dtype)
        tensors = {"weight": integers, "scale": scale}
        if rows < len(weight):
            tensors["rest"] = weight[rows:].to(dtype)
        elif columns < weight.shape[1]:
            tensors["rest"] = (weight[:, columns:].double() / scale.double()[:, None]).to(dtype)
        if "rest" in tensors and not bool(torch.isfinite(tensors["rest"]).all()):
            raise ValueError(
                f"a factor does not fit into {dtype}: its values overflow; load the model in bfloat16 or float32"
            )
        new = RemappedLinear(
            linear.in_features, linear.out_features, full_rank, bias=linear.bias is not None, device="meta"
        )
        new.set_tensors(linear, **tensors)
        return new, new.dense_matrix()

    def empty(self, linear: nn.Linear, full_rank: int) -> nn.Module:
        return RemappedLinear(
            linear.in_features,
            linear.out_features,
            full_rank,
            bias=linear.bias is not None,
            device=linear.weight.device,
            dtype=linear.weight.dtype,
        )

    def tensors(self, shape: LinearShape) -> dict[str, tuple[list[int], str | None]]:
        rows, columns = _eight_bit_part(shape.out_features, shape.in_features, shape.full_rank)
        found: dict[str, tuple[list[int], str | None]] = {"weight": ([rows, columns], "I8"), "scale": ([rows], None)}
        if rows < shape.out_features:
            found["rest"] = ([shape.out_features - rows, shape.in_features], None)
        elif columns < shape.in_features:
            found["rest"] = ([rows, shape.in_features - columns], None)
        return found

    def loaded(self, name: str, module: nn.Module) -> nn.Module:
        if isinstance(module, IntegerLinear):
            module.freeze()
            read_offloaded_as_stored(name, module)
        return module


class RemappedLinear(IntegerLinear):
    """An 8-bit part (`weight`, `scale` per row) and a `rest`: the rows below it, or the columns right of it.

    Columns right of it are in units of their row's scale.
    """

    scale: Tensor
    rest: Tensor

    def __init__(
        self,
        in_features: int,
        out_features: int,
        full_rank: int,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(in_features, out_features)
        rows, columns = self._part = _eight_bit_part(out_features, in_features, full_rank)
        self._add("weight", (rows, columns), device, torch.int8)
        self._add("scale", (rows,), device, dtype)
        if rows < out_features:
            self._add("rest", (out_features - rows, in_features), device, dtype)
        elif columns < in_features:
            self._add("rest", (rows, in_features - columns), device, dtype)
        self._add_bias(bias, device, dtype)

    def forward(self, x: Tensor) -> Tensor:
        rows, columns = self._part
        if columns < self.in_features:
            eight, sixteen = x[..., :columns], x[..., columns:]
            y = (int8_matmul(eight, self.weight) + nn.functional.linear(sixteen, self.rest)) * self.scale
        else:
            y = int8_matmul(x, self.weight, self.scale)
            if rows < self.out_features:
                y = torch.cat([y, nn.functional.linear(x, self.rest)], dim=-1)
        return y if self.bias is None else y + self.bias

    def dense_matrix(self) -> Tensor:
        """Return the matrix it stands for, float32."""
        rows, columns = self._part
        scale = self.scale.float()[:, None]
        part = self.weight.float() * (scale / UNIT)
        if rows < self.out_features:
            return torch.cat([part, self.rest.float()])
        return torch.cat([part, self.rest.float() * scale], dim=1) if columns < self.in_features else part


def _eight_bit_part(out_features: int, in_features: int, full_rank: int) -> tuple[int, int]:
    """Rows and columns of the part in 8 bits."""
    return min(out_features, full_rank), min(in_features, full_rank)
