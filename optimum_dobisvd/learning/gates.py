"""Soft truncation: a real rank `k` as gates on singular values (Dobi-SVD, Algorithm 1)."""

from __future__ import annotations

import torch
from torch import Tensor

REACH = 4.0
"""A gate further than `REACH / beta` ranks from `k` is open or shut to within 0.04 % and has no slope to speak of."""


def gates(rank: Tensor, count: int, beta: float | Tensor) -> Tensor:
    """`t_i = tanh(beta (k - i + 1/2)) / 2 + 1/2` for `i = 1 .. count`; they sum to `k` away from the ends.

    Args:
        rank: `k`, a real number as a tensor; gradients flow to it.
        count: how many singular values there are.
        beta: sharpness, per rank. At large ones the gates are a step, and their slope vanishes between integers.
    """
    places = torch.arange(1, count + 1, dtype=rank.dtype, device=rank.device)
    return (beta * (rank - places + 0.5)).tanh() / 2 + 0.5


def slopes(rank: Tensor, count: int, beta: float | Tensor) -> Tensor:
    """`dt_i / dk` for `i = 1 .. count`; they sum to 1 away from the ends."""
    places = torch.arange(1, count + 1, dtype=rank.dtype, device=rank.device)
    return beta / 2 / (beta * (rank - places + 0.5)).cosh().square()


def reach(rank: float, count: int, beta: float) -> tuple[int, int]:
    """`(first, last)`: gates before `first` are open, those from `last` on are shut."""
    width = REACH / beta
    first = min(max(int(rank - width), 0), count - 1)
    return first, max(min(int(rank + width) + 1, count), first + 1)
