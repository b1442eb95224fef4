"""Codes and scales of bitsandbytes' 4-bit linears while they are learned."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from .bitsandbytes_rounding import quantized_linear, scales_of, set_codes, set_scales
from .learned_rounding import LearnableLinear, straight_through

_BLOCK = 64


class LearnableBlocks(LearnableLinear):
    """A table of 16 values, in units of a scale of 64 neighbors; the scale is learned through how it is stored.

    An offset is in units of the distance between the values of the table that a weight lies between.
    """

    def __init__(self, linear: nn.Linear, settings: Any, dtype: torch.dtype) -> None:
        super().__init__(linear, _BLOCK, dtype)
        # What is learned goes into this one; bitsandbytes has laid out its tensors, and says what the table is.
        self._made = [quantized_linear(linear, settings, dtype)]
        state = self._made[0].weight.quant_state
        code, places = state.code.float().sort()
        distinct = torch.cat([torch.ones_like(code[:1], dtype=torch.bool), code.diff() > 0])  # fp4 has zero twice
        self.register_buffer("_code", code[distinct], persistent=False)
        self.register_buffer("_places", places[distinct], persistent=False)

    _code: Tensor
    _places: Tensor

    def _scale(self) -> Tensor:
        wanted = self._groups.abs().amax(-1, keepdim=True) * self.highest
        wanted = torch.where(wanted > 0, wanted, 1)
        with torch.no_grad():
            state = self._made[0].weight.quant_state
            set_scales(state, wanted.flatten().to(state.code))
            stored = scales_of(state).to(wanted).view_as(wanted)
        return straight_through(wanted, stored)

    def _indices(self, scale: Tensor) -> tuple[Tensor, Tensor]:
        """Return which value of the table every weight becomes, and where between them it is, with a gradient."""
        units = self._groups / torch.where(scale > 0, scale, 1)  # 8 bits of a scale may leave nothing of it
        below = (torch.bucketize(units.detach(), self._code, right=True) - 1).clamp(0, len(self._code) - 2)
        gap = self._code[below + 1] - self._code[below]
        place = (units.detach() - self._code[below]) / gap + self.offsets.detach()
        moved = (units + self.offsets * gap).clamp(self._code[0], self._code[-1])
        return (below + place.round().long()).clamp(0, len(self._code) - 1), moved

    @property
    def weight(self) -> Tensor:
        scale = self._scale()
        indices, moved = self._indices(scale)
        return (straight_through(moved, self._code[indices]) * scale).flatten(1)

    @torch.no_grad()
    def quantized(self) -> nn.Module:
        """Return bitsandbytes' linear with these codes and scales."""
        indices, _ = self._indices(self._scale())
        new = self._made[0]
        set_codes(new, self._places[indices])
        if self.bias is not None:
            new.bias = nn.Parameter(self.bias.data, requires_grad=False)
        return new

    def learned(self) -> tuple[nn.Parameter, ...]:
        return self.offsets, self.highest
