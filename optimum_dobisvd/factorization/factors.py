"""The types every factorizer returns: two factors, and a decomposition of which every prefix is a pair of factors."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum

import torch
from torch import Tensor

LARGEST_FRACTION = 127 / 128
"""The largest value of an int8 integer `q` that stands for `q / 128`.

Columns are brought to this maximum, so that the scale of a row comes out as the value it was rounded up to before.
"""


class Gauge(Enum):
    """Which of the equal pairs `second Q`, `Q^-1 first` is stored: rounding and training like some better than others.

    `BALANCED`: column `i` of `second` and row `i` of `first` of equal norm. `ROTATED`: balanced, then mixed by a
    rotation. `EQUAL_COLUMNS`: columns of `second`, rows scaled to 1, with equal maxima; `EQUAL_LEADING_COLUMNS`: over
    the first `min(m, n)` rows alone.
    """

    BALANCED = "balanced"
    ROTATED = "rotated"
    EQUAL_COLUMNS = "equal columns"
    EQUAL_LEADING_COLUMNS = "equal leading columns"


@dataclass(frozen=True)
class Factors:
    """`W' = second @ first`.

    `second` is `m x k` (the outer factor, which keeps the bias), `first` is `k x n`.
    """

    second: Tensor
    first: Tensor

    def product(self) -> Tensor:
        """Return the dense `m x n` matrix the factors stand for."""
        return self.second @ self.first

    def in_gauge(self, gauge: Gauge, dtype: torch.dtype) -> Factors:
        """Return factors of the same product in a gauge; `dtype` is what they will be stored beside (see there)."""
        balanced = self.balanced()
        if gauge is Gauge.BALANCED:
            return balanced
        if gauge is Gauge.ROTATED:
            return balanced.rotated()
        leading = gauge is Gauge.EQUAL_LEADING_COLUMNS
        return balanced.with_equal_columns(dtype, min(len(self.second), self.first.shape[1]) if leading else None)

    def balanced(self) -> Factors:
        """Return factors with column `i` of `second` and row `i` of `first` of equal norm, same product.

        Undoing a whitening makes one side huge and the other tiny; fine-tuning and quantizing both want them equal.
        A rank whose product is zero becomes zero on both sides.
        """
        outer = torch.linalg.vector_norm(self.second, dim=0)
        inner = torch.linalg.vector_norm(self.first, dim=1)
        alive = (outer > 0) & (inner > 0)
        scale = torch.where(alive, (inner / outer.where(alive, 1)).sqrt(), 0)
        inverse = torch.where(alive, (outer / inner.where(alive, 1)).sqrt(), 0)
        return Factors(self.second * scale, self.first * inverse[:, None])

    def rotated(self) -> Factors:
        """Return `second Q`, `Q^T first` with a random rotation `Q`, the same for all factors of that rank.

        Ranks differ in size by orders of magnitude, and 4-bit encodings give a scale to a run of neighbors, of which
        the largest then sets the step. After the rotation all are alike, and the outer factor's inputs are correlated,
        so that rounding one rank can be made up for by the next ones (GPTQ); in their own basis they are not.
        """
        generator = torch.Generator().manual_seed(len(self.first))
        noise = torch.randn(len(self.first), len(self.first), generator=generator, dtype=torch.float64)
        rotation = torch.linalg.qr(noise)[0].to(self.first)
        return Factors(self.second @ rotation, rotation.T @ self.first)

    def with_equal_columns(self, dtype: torch.dtype, rows: int | None = None) -> Factors:
        """Return factors whose `second`, each row over its largest value, has columns of equal maxima.

        With one scale per row (integer encodings), all ranks then use the whole range of the integers. One scale per
        rank and one per output is what that amounts to, as in Dobi-SVD's Alg. 3, and the one per output besides.
        Scales of rows are stored in `dtype`, rounded up. Only the first `rows` rows of `second` count; None is all.
        """
        counted = self.second[:rows].double()
        largest = counted.abs().amax(1)
        scale = rounded_up(torch.where(largest > 0, largest, 1), dtype)
        columns = (counted / scale[:, None]).abs().amax(0) / LARGEST_FRACTION
        columns = torch.where(columns > 0, columns, 1)
        return Factors(self.second.double() / columns, self.first.double() * columns[:, None])


def rounded_up(scale: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the smallest values of `dtype` not below `scale` (float64), as float64.

    Never zero: a scale below the normal range becomes the smallest normal number (its values then use fewer bits).
    ValueError if a scale is not finite in that dtype.
    """
    # What float64 itself rounded must not push a scale that fits to the next value.
    least = scale.double() * (1 - 1e-14)
    nearest = least.clamp_min(torch.finfo(dtype).tiny).to(dtype)
    up = torch.nextafter(nearest, torch.full_like(nearest, float("inf")))
    found = torch.where(nearest.double() < least, up, nearest).double()
    if not bool(torch.isfinite(found).all()):
        raise ValueError(
            f"a factor does not fit into {dtype}: its scale overflows; load the model in bfloat16 or float32"
        )
    return found


@dataclass(frozen=True)
class Decomposition:
    """A matrix written as a sum of rank-one terms, best first, so that every rank is a prefix.

    `left` is `m x p`, `right` is `p x n`; `singular_values` (`p`, descending) are those of the weight in the metric of
    the factorizer: what truncating at rank `k` costs there is the norm of `singular_values[k:]`.
    """

    left: Tensor
    right: Tensor
    singular_values: Tensor

    def truncate(self, rank: int) -> Factors:
        """Return the first `rank` terms. Where there are fewer (a rank-deficient metric) zeros fill the shape."""
        if rank < 1:
            raise ValueError(f"rank must be at least 1, got {rank}")
        return self.keep(range(rank))

    def keep(self, directions: Sequence[int]) -> Factors:
        """Return the terms of these numbers, counted from 0, ascending; zeros in place of those that there are not."""
        rank, there = len(directions), self.left.shape[1]
        if directions[-1] == rank - 1:  # the leading ones
            second, first = self.left[:, :rank], self.right[:rank]
        else:
            found = [number for number in directions if number < there]
            chosen = torch.tensor(found, dtype=torch.long, device=self.left.device)
            second, first = self.left[:, chosen], self.right[chosen]
        missing = rank - second.shape[1]
        if missing > 0:
            second = torch.nn.functional.pad(second, (0, missing))
            first = torch.nn.functional.pad(first, (0, 0, 0, missing))
        return Factors(second, first)

    def truncation_loss(self, rank: int) -> float:
        """Return the error at a rank in the factorizer's metric: `sqrt(sum_{i>rank} s_i^2)` (SVD-LLM V2, Thm. 3.1)."""
        return float(torch.linalg.vector_norm(self.singular_values[rank:]))
