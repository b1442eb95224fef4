"""Soft truncation: a real rank `k` as gates on singular values (Dobi-SVD, Algorithm 1)."""

from __future__ import annotations

import torch
from torch import Tensor

REACH = 4.0
"""How far gates are soft, in units of `1 / beta` ranks from `k`: beyond, they are 0 or 1 to within 0.04 %."""


def gates(rank: Tensor, count: int, beta: float | Tensor) -> Tensor:
    """Return the gates `t_i = tanh(beta (k - i + 1/2)) / 2 + 1/2`, `i = 1 .. count` (Dobi-SVD, Algorithm 1).

    They sum to `k` where `k` is far from both ends.

    Args:
        rank: `k`, a real number as a tensor; gradients flow to it.
        count: number of singular values.
        beta: sharpness, per rank. At a large one the gates are a step, whose slope vanishes at integers.
    """
    places = torch.arange(1, count + 1, dtype=rank.dtype, device=rank.device)
    return (beta * (rank - places + 0.5)).tanh() / 2 + 0.5


def slopes(rank: Tensor, count: int, beta: float | Tensor) -> Tensor:
    """Return `dt_i / dk`, `i = 1 .. count`; they sum to 1 where `k` is far from both ends. Arguments as of `gates`."""
    places = torch.arange(1, count + 1, dtype=rank.dtype, device=rank.device)
    return beta / 2 / (beta * (rank - places + 0.5)).cosh().square()


def reach(rank: float, count: int, beta: float) -> tuple[int, int]:
    """Return `(first, last)`: gates before place `first` are open (1), those from `last` on are shut (0)."""
    width = REACH / beta
    first = min(max(int(rank - width), 0), count - 1)
    return first, max(min(int(rank + width) + 1, count), first + 1)
