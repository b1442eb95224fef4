"""What rounding costs the loss, for one matrix in every format: the other half of the importance scores of a mixture.

All of it in the metric of `kfac`, in nats per token, like the squares of its singular values.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from ..encodings.input_gram import InputGram
from ..factorization.factors import Decomposition, Factors
from ..structures.format import Format

_RANK_STEP = 2
"""From one rank at which the rounding of factors is measured to the next; in between it is interpolated."""
_LOWEST_RANK = 32


def quantization_losses(
    formats: Sequence[Format], weight: Tensor, found: Decomposition | None, gram: Tensor, root: Tensor
) -> dict[tuple[str, str], Tensor]:
    """Return what rounding costs by `Format.key`: one number, or one for every rank from 0 to `min(m, n)`.

    Args:
        formats: to be measured. One with a rank is up to that at which it is larger than the matrix whole in the same
            encoding, if that is among them.
        weight: `m x n`, float64.
        found: its decomposition; None where no format has a rank.
        gram: `H` of its inputs.
        root: `R` (`m x m`) with `R R^T` what the loss feels of its outputs.
    """
    inputs, root = InputGram(gram), root.float()
    losses = {
        format.key: torch.tensor(format.quantization_loss(weight.float(), inputs, root), dtype=torch.float64)
        for format in formats
        if not format.structure.has_rank
    }
    ranked = [format for format in formats if format.structure.has_rank]
    if found is None or not ranked:
        return losses
    # In float32, which is twice as fast and moves the losses by a thousandth.
    found = Decomposition(found.left.float(), found.right.float(), found.singular_values)
    points = [0]
    while points[-1] < min(weight.shape):
        points.append(min(min(weight.shape), max(_LOWEST_RANK, points[-1] * _RANK_STEP)))
    at_points = {format.key: [0.0] for format in ranked}
    whole = {format.encoding.name for format in formats if not format.structure.has_rank}
    for below, rank in pairwise(points):
        # Past break-even nobody asks: the whole matrix in the same encoding is smaller, and loses less.
        asked = [
            format
            for format in ranked
            if format.encoding.name not in whole
            or format.macs(weight.shape[0], weight.shape[1], below) < weight.numel()
        ]
        measured = _at_rank(asked, found.truncate(rank), inputs, root)
        for key, losses_of_ranks in at_points.items():
            losses_of_ranks.append(measured.get(key, losses_of_ranks[-1]))
    return losses | {key: _interpolated(points, values) for key, values in at_points.items()}


def _at_rank(
    formats: Sequence[Format], factors: Factors, inputs: InputGram, root: Tensor
) -> dict[tuple[str, str], float]:
    """The losses of factors by `Format.key`; formats that are written alike share all but the rounding."""
    alike: dict[Any, list[Format]] = {}
    for format in formats:
        gauge = format.encoding.gauge if format.structure.gauge_is_free else None
        alike.setdefault((format.structure, gauge), []).append(format)
    losses = {}
    for (structure, _), group in alike.items():
        written = structure.written(factors, group[0].encoding.gauge, torch.float32)
        weights = {name: tensor.float() if tensor.is_floating_point() else tensor for name, tensor in written.items()}
        loss = structure.quantization_loss(weights, inputs, root)
        for format in group:
            losses[format.key] = loss(format.rounding_errors(min(len(root), len(inputs.matrix))))
    return losses


def _interpolated(points: Sequence[int], values: Sequence[float]) -> Tensor:
    """The values at all whole numbers from the first point to the last, float64."""
    found = torch.empty(points[-1] + 1, dtype=torch.float64)
    for (low, below), (high, above) in pairwise(zip(points, values, strict=True)):
        found[low : high + 1] = torch.linspace(below, above, high - low + 1, dtype=torch.float64)
    return found
