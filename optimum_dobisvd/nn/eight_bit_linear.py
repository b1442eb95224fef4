"""Linear layers in 8 bits, on disk and in memory: two int8 factors, Dobi-SVD's remapped factors, one int8 matrix."""

from __future__ import annotations

from abc import abstractmethod

import torch
from torch import Tensor, nn

from ..kernels.int8_matmul import int8_matmul
from ..storage.eight_bit import (
    TensorSpec,
    dense_int8_tensors,
    int8_tensors,
    remap_tensors,
    remapped_matrices,
    unpack_dense_int8,
    unpack_int8,
    unpack_remapped,
)
from .compressed_linear import CompressedLinear


class EightBitLinear(CompressedLinear):
    """Its parameters are the tensors of its storage, and the bias. They are not trained.

    Parameters and not buffers, because Accelerate offloads only these.
    """

    adapters = (
        "stored in 8 bits, which take no adapter: name linears that are dense, or call store_as(model, 'plain') first"
    )
    bias: Tensor | None

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
        specs = self.specs()
        self._keys = tuple(specs)
        for key, spec in specs.items():
            values = torch.empty(spec.shape, device=device, dtype=dtype if spec.dtype is None else spec.dtype)
            self.register_parameter(key, nn.Parameter(values, requires_grad=False))
        values = torch.empty(out_features, device=device, dtype=dtype)
        self.register_parameter("bias", nn.Parameter(values) if bias else None)

    @abstractmethod
    def specs(self) -> dict[str, TensorSpec]:
        """Its tensors by name, without the bias."""

    def tensors(self) -> dict[str, Tensor]:
        """These tensors."""
        return {key: getattr(self, key) for key in self._keys}

    def freeze(self) -> None:
        """Loading marks every floating-point parameter as one to train; these are not."""
        for tensor in self.tensors().values():
            tensor.requires_grad_(False)

    def _with_bias(self, y: Tensor) -> Tensor:
        return y if self.bias is None else y + self.bias


class Int8LowRankLinear(EightBitLinear):
    """Both factors in int8, with one scale per rank between the two products and one per output row after them."""

    storage = "int8"
    rank: int
    first: Tensor
    second: Tensor
    scale: Tensor
    row_scale: Tensor

    def specs(self) -> dict[str, TensorSpec]:
        return int8_tensors(self.out_features, self.in_features, self.rank)

    def forward(self, x: Tensor) -> Tensor:
        return self._with_bias(int8_matmul(int8_matmul(x, self.first, self.scale), self.second, self.row_scale))

    def dense_matrix(self) -> Tensor:
        second, first = unpack_int8(self.tensors())
        return second @ first


class RemappedLinear(EightBitLinear):
    """Dobi-SVD's remapped storage (Alg. 3), computed from as it lies in its 16-bit slots."""

    storage = "remap"
    rank: int
    packed: Tensor
    scale: Tensor
    row_scale: Tensor
    rest: Tensor

    def specs(self) -> dict[str, TensorSpec]:
        return remap_tensors(self.out_features, self.in_features, self.rank)

    def forward(self, x: Tensor) -> Tensor:
        second, first = remapped_matrices(self.packed)
        if self.out_features >= self.in_features:
            inner = int8_matmul(x, first, self.scale)
            y = int8_matmul(inner, second, self.row_scale)
            if self.out_features > self.in_features:
                y = torch.cat([y, nn.functional.linear(inner, self.rest)], dim=-1)
            return self._with_bias(y)
        eight, sixteen = x[..., : self.out_features], x[..., self.out_features :]
        inner = int8_matmul(eight, first) + nn.functional.linear(sixteen, self.rest)
        return self._with_bias(int8_matmul(inner * self.scale, second, self.row_scale))

    def dense_matrix(self) -> Tensor:
        second, first = unpack_remapped(self.tensors(), self.out_features, self.in_features)
        return second @ first


class Int8Linear(EightBitLinear):
    """The whole matrix in int8, with a scale per row."""

    storage = "dense_int8"
    rank: None
    quantized: Tensor
    scale: Tensor

    def specs(self) -> dict[str, TensorSpec]:
        return dense_int8_tensors(self.out_features, self.in_features)

    def forward(self, x: Tensor) -> Tensor:
        return self._with_bias(int8_matmul(x, self.quantized, self.scale))

    def dense_matrix(self) -> Tensor:
        return unpack_dense_int8(self.tensors())
