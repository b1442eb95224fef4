"""Products of GPTQ's linears on CPUs: few rows through PyTorch's kernel that reads 4 bits, many unpacked part by part.

Their tensors stay as they are. What PyTorch's kernel reads is packed in another order and kept beside them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

_WORD_BITS = 32
_KERNEL_GROUPS = (256, 128, 64, 32)
"""Group sizes that the kernel has code for."""
_KERNEL_ROWS = 64
"""Above so many rows it is slower than unpacking and a product by bf16 instructions."""
_COLUMNS = 256
"""Outputs that are unpacked at once: few enough to stay in the cache until they are multiplied."""


class GPTQOnCPU(nn.Module):
    """The outputs of one or several linears in GPTQ's encoding, one after the other, `y = x W^T + bias`.

    Of a single linear it has the same buffers by the same names. `scales` and `offsets` (`groups x m`) are its grid in
    the model's dtype: `w = code * scale + offset`. `packed` and `grid` are what PyTorch's kernel takes.
    """

    shifts: Tensor
    steps: Tensor
    offsets: Tensor
    groups: Tensor | None
    order: Tensor | None
    joined_bias: Tensor | None
    packed: Tensor | None
    grid: Tensor | None

    def __init__(self, linears: Sequence[Any], bits: int, dtype: torch.dtype) -> None:
        super().__init__()
        self._linears = tuple(linears)
        self.in_features = linears[0].in_features
        self.out_features = sum(linear.out_features for linear in linears)
        self.bits = bits
        if len(linears) == 1:
            for name, buffer in linears[0].named_buffers(recurse=False):
                self.register_buffer(name, buffer, name not in linears[0]._non_persistent_buffers_set)
        self._keep("shifts", torch.arange(0, _WORD_BITS, bits, dtype=torch.int32)[:, None])
        group_of_input = linears[0].g_idx.long()
        self._keep("groups", None if _is_in_order(group_of_input) else group_of_input)
        steps = torch.cat([linear.scales for linear in linears], dim=1).float()
        zeros = torch.cat([self._zeros(linear) for linear in linears], dim=1)
        self._keep("steps", steps.to(dtype))
        self._keep("offsets", (-zeros * steps).to(dtype))
        biases = [linear.bias for linear in linears]
        whole = None if biases[0] is None else torch.cat(biases).to(dtype)
        self._keep("joined_bias", whole)
        self._keep("order", None)
        self._keep("packed", None)
        self._keep("grid", None)
        if bits == 4 and dtype is torch.bfloat16:
            self._pack(zeros, steps)

    def forward(self, x: Tensor) -> Tensor:
        rows = x.reshape(-1, x.shape[-1])
        if self.packed is not None and len(rows) <= _KERNEL_ROWS and x.dtype is torch.bfloat16:
            y = self._by_kernel(rows)
        else:
            y = self._unpacking(rows)
        y = y.view(*x.shape[:-1], self.out_features)
        return y if self.joined_bias is None else y + self.joined_bias.to(y.dtype)

    def _by_kernel(self, rows: Tensor) -> Tensor:
        assert self.grid is not None
        if self.order is not None:
            rows = rows.index_select(1, self.order)
        size = self.in_features // len(self.grid)
        return torch.ops.aten._weight_int4pack_mm_for_cpu(rows.contiguous(), self.packed, size, self.grid)

    def _unpacking(self, rows: Tensor) -> Tensor:
        # A compiler fuses the unpacking of a whole matrix; by itself, PyTorch would write it to memory.
        step = self.out_features if torch.compiler.is_compiling() else _COLUMNS
        parts, begin = [], 0
        for linear in self._linears:
            for first in range(0, linear.out_features, step):
                words = linear.qweight[:, first : first + step]
                columns = slice(begin + first, begin + first + words.shape[1])
                parts.append(rows @ self._unpacked(words, columns, rows.dtype))
            begin += linear.out_features
        return torch.cat(parts, dim=1)

    def _unpacked(self, words: Tensor, columns: slice, dtype: torch.dtype) -> Tensor:
        """The columns of `W^T`, `n x columns`."""
        codes = self._codes(words).to(dtype)
        steps, offsets = self.steps[:, columns].to(dtype), self.offsets[:, columns].to(dtype)
        if self.groups is not None:
            return torch.addcmul(offsets[self.groups], codes, steps[self.groups])
        codes = codes.view(len(steps), -1, codes.shape[1])
        return torch.addcmul(offsets[:, None], codes, steps[:, None]).flatten(0, 1)

    def _codes(self, words: Tensor) -> Tensor:
        """`n x columns` codes of `n bits / 32 x columns` words, int32."""
        codes = torch.bitwise_right_shift(words[:, None], self.shifts).bitwise_and_(2**self.bits - 1)
        return codes.flatten(0, 1)

    def _zeros(self, linear: Any) -> Tensor:
        """The zero points of one linear, `groups x m`, float32."""
        codes = torch.bitwise_right_shift(linear.qzeros[:, :, None], self.shifts[:, 0])
        return codes.bitwise_and_(2**self.bits - 1).flatten(1).float()

    def _pack(self, zeros: Tensor, steps: Tensor) -> None:
        """Put the codes into the kernel's order, and the grid into its form: `w = (code - 8) step + offset`."""
        size = self.in_features // len(steps)
        fitting = next((group for group in _KERNEL_GROUPS if size % group == 0), None)
        if fitting is None:
            return
        codes = torch.cat([self._codes(linear.qweight) for linear in self._linears], dim=1)
        if self.groups is not None:
            self.order = self.groups.argsort(stable=True)
            codes = codes[self.order]
        self.packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes.T.contiguous(), 1)
        grid = torch.stack([steps, (2 ** (self.bits - 1) - zeros) * steps], dim=-1).repeat_interleave(
            size // fitting, dim=0
        )
        self.grid = grid.to(torch.bfloat16).contiguous()

    def _keep(self, name: str, value: Tensor | None) -> None:
        self.register_buffer(name, value, persistent=False)

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, bits={self.bits}"


def can_run_on_cpu(linears: Sequence[Any], bits: int) -> bool:
    """Whether `GPTQOnCPU` computes what these linears compute, together."""
    first = linears[0]
    return (
        _WORD_BITS % bits == 0
        and all(linear.qweight.device.type == "cpu" for linear in linears)
        and all((linear.bias is None) == (first.bias is None) for linear in linears)
        and all(torch.equal(linear.g_idx, first.g_idx) for linear in linears)
        and len(set(torch.bincount(first.g_idx.long()).tolist())) == 1
    )


def _is_in_order(group_of_input: Tensor) -> bool:
    return bool((group_of_input.diff() >= 0).all())
