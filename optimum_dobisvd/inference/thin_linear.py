"""Linears whose products of few rows go through `thin_product`, where that is measured to be faster."""

from __future__ import annotations

import copy
import logging
import math
import statistics
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..encodings.base import Encoding
from ..model.substitutions import Substitute
from .device_time import cold_copies, seconds_of
from .thin_product import MOST_ROWS, TILES, choices, thin_product, tile_key, unsupported_reason

logger = logging.getLogger(__name__)

_CLEARLY = 0.97
"""Of the time of the library's product what the kernel may take at most: two equal ones may differ by that."""
RATIOS: dict[tuple[Any, ...], float] = {}
"""Times of the kernel over those without it, by all that decides them. To override a measurement, set it here.

They belong to `TILES`, and like these are of one process."""


class ThinLinear(Substitute):
    """Stands in for a linear with the same tensors: up to 16 rows by the kernel, more by the linear itself.

    So does it compute whatever a gradient is asked of, and activations in another dtype.
    """

    weight: Tensor
    scale: Tensor | None
    bias: Tensor | None

    def __init__(self, linear: Any) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self._linear = (linear,)  # in a tuple: its tensors are here, under the same names
        for name, tensor in dict(linear.named_parameters(), bias=linear.bias).items():
            self.register_parameter(name, tensor)
        self._parameters.setdefault("scale", None)
        self.training = linear.training

    def forward(self, x: Tensor) -> Tensor:
        y = self._product(x, self.bias, None)
        return self._linear[0](x) if y is None else y

    def placed(self, x: Tensor, places: Tensor, bias: Tensor | None) -> Tensor | None:
        """Return the inputs and behind them the products at their places, with a bias; None where it must be done so.

        Args:
            x: `... x n`.
            places: `n + m`, where they go.
            bias: `n + m`, of the places.
        """
        return self._product(x, bias, places)

    def _product(self, x: Tensor, bias: Tensor | None, places: Tensor | None) -> Tensor | None:
        of_numbers = self.weight if self.scale is None else self.scale
        if x.numel() > MOST_ROWS * x.shape[-1] or x.dtype is not of_numbers.dtype:
            return None
        if torch.is_grad_enabled() and (x.requires_grad or any(each.requires_grad for each in self.parameters())):
            return None
        y = thin_product(x.reshape(-1, x.shape[-1]), self.weight, self.scale, bias, places)
        return y.view(*x.shape[:-1], y.shape[1])

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}"


@torch.inference_mode()
def faster_by_kernel(
    linear: Any, encoding: Encoding, rows: Sequence[int], places: Tensor | None = None
) -> ThinLinear | None:
    """Return what is to stand in for a linear; None where the kernel is not faster, or cannot compute it.

    Args:
        linear: with its values, on its device.
        encoding: its own.
        rows: of one product; over all that the kernel takes it must be faster.
        places: where its inputs and outputs go, if they go together.
    """
    few = [count for count in rows if count <= MOST_ROWS]
    if not few or not encoding.is_row_scaled(linear):
        return None
    dtype = next(each.dtype for each in linear.parameters() if each.is_floating_point())
    if unsupported_reason(linear.weight.device, dtype) is not None or not linear.weight.is_contiguous():
        return None
    ratios = [_ratio(linear, count, dtype, places) for count in few]
    if math.exp(statistics.fmean(map(math.log, ratios))) > _CLEARLY:
        return None
    with torch.inference_mode(False):
        return ThinLinear(linear)


def ratio_key(linear: Any, rows: int, placed: bool) -> tuple[Any, ...]:
    """Return by what `RATIOS` has the ratio of such a linear."""
    return (*tile_key(rows, linear.weight), rows, placed)


def _ratio(linear: Any, rows: int, dtype: torch.dtype, places: Tensor | None) -> float:
    key = ratio_key(linear, rows, places is not None)
    if key not in RATIOS:
        try:
            RATIOS[key] = _measured(linear, rows, dtype, places)
        except Exception as error:  # of compiling on the spot, for one: no C compiler, a GPU too old; or of memory
            logger.warning("the kernel for few rows failed and is not used: %s: %s", type(error).__name__, error)
            RATIOS[key] = math.inf
    return RATIOS[key]


def _measured(linear: Any, rows: int, dtype: torch.dtype, places: Tensor | None) -> float:
    """The time of the fastest tile, which is remembered, over that of the linear itself."""
    weight = linear.weight
    copies = [copy.deepcopy(linear) for _ in range(cold_copies(weight.nbytes, weight.device))]
    x = torch.randn(rows, linear.in_features, device=weight.device, dtype=dtype)
    sources = None if places is None else places.long().argsort()

    def alone(module: Any) -> Tensor:
        y = module(x)
        return y if sources is None else torch.cat([x, y], dim=-1).gather(-1, sources.expand(rows, -1))

    def by_kernel(module: Any) -> Tensor:
        return thin_product(x, module.weight, getattr(module, "scale", None), None, places)

    key = tile_key(rows, weight)
    times = {}
    for tile in [TILES[key]] if key in TILES else choices(rows):
        TILES[key] = tile
        times[tile] = seconds_of(by_kernel, copies)
    TILES[key] = min(times, key=times.__getitem__)
    return times[TILES[key]] / seconds_of(alone, copies)
