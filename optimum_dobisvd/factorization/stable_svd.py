"""A singular value decomposition whose gradient stays finite (Dobi-SVD, Algorithms 4 and 5)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

SERIES_TERMS = 10
"""K: terms of the geometric series that stands for `1 / (1 - q^2)` where two singular values are close."""

CLOSE = 1e-4
"""Relative distance below which two singular values count as close. Ten terms bound the gradient, they do not
approximate it (at a distance of 1 % they are 18 % of it), so the zone is narrow."""

VANISHING = 1e-10
"""gamma: what stands between two singular values that are both zero."""


def stable_svd(
    matrix: Tensor, rank: int | None = None, *, niter: int = 2, close: float = CLOSE
) -> tuple[Tensor, Tensor, Tensor]:
    """`matrix = U diag(S) V^T`, differentiable everywhere.

    `torch.linalg.svd` divides by `s_j^2 - s_i^2` in its backward pass and gives inf or NaN where singular values
    repeat or vanish. Here that quotient is bounded in the way of Dobi-SVD's Algorithm 5, so the gradient is exact
    where singular values are apart and finite where they are not.

    Args:
        matrix: `T x m`, or a batch of such, float32 or float64.
        rank: with it only the leading `rank` singular triplets are computed, by `torch.svd_lowrank`; the gradient is
            then that of a matrix of that rank, approximate if there is more to it. None: all of them, exactly.
        niter: power iterations of `torch.svd_lowrank`.
        close: relative distance below which two singular values count as close.

    Returns:
        `U` (`T x q`), `S` (`q`, descending), `V` (`m x q`), `q = min(rank, T, m)`.

    Raises:
        ValueError: a rank below 1, or a matrix of fewer than two dimensions.
    """
    if matrix.dim() < 2:
        raise ValueError(f"stable_svd takes a matrix or a batch of them, got the shape {tuple(matrix.shape)}")
    if rank is not None and rank < 1:
        raise ValueError(f"rank must be at least 1, got {rank}")
    return _StableSVD.apply(matrix, rank, niter, close)


class _StableSVD(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, matrix: Tensor, rank: int | None, niter: int, close: float) -> tuple[Tensor, Tensor, Tensor]:
        if rank is None or rank >= min(matrix.shape[-2:]):
            left, values, right_t = torch.linalg.svd(matrix, full_matrices=False)
            right = right_t.mT
        else:
            left, values, right = torch.svd_lowrank(matrix, q=rank, niter=niter)
        ctx.save_for_backward(left, values, right)
        ctx.close = close
        return left, values, right

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None, None]:
        left, values, right = ctx.saved_tensors
        of_left, of_values, of_right = gradients
        # In units of the largest value: squares of very small or large ones would leave the range of float32.
        unit = values.amax(-1, keepdim=True)
        unit = unit.where(unit > 0, 1)
        values = values / unit
        quotients = gap_quotients(values, ctx.close)
        left_t, right_t = left.mT, right.mT
        omega_left = _skew(left_t @ of_left) * quotients
        omega_right = _skew(right_t @ of_right) * quotients
        scale = values.unsqueeze(-2)
        core = (omega_left * scale + scale.mT * omega_right) / unit.unsqueeze(-1) + torch.diag_embed(of_values)
        inverse = (torch.where(values > _floor(values), 1 / values.where(values > 0, 1), 0) / unit).unsqueeze(-2)
        # What the vectors' gradients have outside the space of the vectors (Algorithm 5, lines 41 to 46).
        beyond_left = (of_left - left @ (left_t @ of_left)) * inverse
        beyond_right = (of_right - right @ (right_t @ of_right)) * inverse
        return (left @ core + beyond_left) @ right_t + left @ beyond_right.mT, None, None, None


def gap_quotients(values: Tensor, close: float = CLOSE) -> Tensor:
    """`F_ij`, in place of `1 / (s_j^2 - s_i^2)`, of `q` descending singular values, or a batch of such.

    Antisymmetric, zero on the diagonal, finite everywhere.

    With `b` the larger of the two, `q` the smaller over `b` and `s` the sign of `i - j`: `s gamma` where both vanish,
    `s (1 + q^2 + ... + q^(2K-2)) / b^2` where they are close (`s K / b^2` where they are equal), `s / (b^2 (1 - q^2))`
    elsewhere. The paper writes `1 / s_i^2` for the prefactor, which is wrong where `s_i` is the smaller one.
    """
    row, column = values.unsqueeze(-1), values.unsqueeze(-2)
    larger, smaller = torch.maximum(row, column), torch.minimum(row, column)
    floor = _floor(values).unsqueeze(-1)
    vanishing = larger <= floor
    safe = larger.where(~vanishing, 1)
    squared = (smaller.where(~vanishing, 0) / safe).square()
    series = torch.ones_like(squared)
    for _ in range(SERIES_TERMS - 1):
        series = 1 + squared * series
    near = squared > (1 - close) ** 2
    bounded = torch.where(near, series, 1 / (1 - squared.where(~near, 0)))
    size = torch.where(vanishing, VANISHING, bounded / safe.square())
    places = torch.arange(values.shape[-1], device=values.device)
    return size * torch.sign(places[:, None] - places)


def _floor(values: Tensor) -> Tensor:
    """Below this a singular value is rounding, `... x 1`."""
    return values.amax(-1, keepdim=True) * torch.finfo(values.dtype).eps


def _skew(matrix: Tensor) -> Tensor:
    return matrix - matrix.mT
