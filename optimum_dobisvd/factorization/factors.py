"""The two small types every factorizer returns."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Factors:
    """`W' = second @ first`.

    `second` is `m x k` (the outer factor, which keeps the bias), `first` is `k x n`.
    """

    second: Tensor
    first: Tensor

    def product(self) -> Tensor:
        """The dense `m x n` matrix the factors stand for."""
        return self.second @ self.first

    def balanced(self) -> Factors:
        """Same product, with column `i` of `second` and row `i` of `first` of equal norm.

        Undoing a whitening makes one side huge and the other tiny; fine-tuning and quantizing both want them equal.
        A rank whose product is zero becomes zero on both sides.
        """
        outer = torch.linalg.vector_norm(self.second, dim=0)
        inner = torch.linalg.vector_norm(self.first, dim=1)
        alive = (outer > 0) & (inner > 0)
        scale = torch.where(alive, (inner / outer.where(alive, 1)).sqrt(), 0)
        inverse = torch.where(alive, (outer / inner.where(alive, 1)).sqrt(), 0)
        return Factors(self.second * scale, self.first * inverse[:, None])

    def mixed(self) -> Factors:
        """Same product, with the ranks mixed by a rotation: `second Q`, `Q^T first`.

        Ranks differ in size by orders of magnitude, and the 4-bit forms give a scale to a run of neighbors, of which
        the largest then sets the step. After the rotation all are alike, and the outer factor's inputs are correlated,
        so that rounding one rank can be made up for by the next ones (GPTQ); in their own basis they are not. The
        rotation is random, and the same for every matrix of that rank.
        """
        generator = torch.Generator().manual_seed(len(self.first))
        noise = torch.randn(len(self.first), len(self.first), generator=generator, dtype=torch.float64)
        rotation = torch.linalg.qr(noise)[0].to(self.first)
        return Factors(self.second @ rotation, rotation.T @ self.first)


@dataclass(frozen=True)
class Decomposition:
    """A whole matrix written as a sum of rank-one terms, best first, so that every rank is a prefix.

    `left` is `m x p`, `right` is `p x n`; `singular_values` (`p`, descending) are those of the weight in the metric of
    the factorizer: what truncating at rank `k` costs there is the norm of `singular_values[k:]`.
    """

    left: Tensor
    right: Tensor
    singular_values: Tensor

    def truncate(self, rank: int) -> Factors:
        """The first `rank` terms. Where there are fewer (a rank-deficient metric) zeros fill the planned shape."""
        if rank < 1:
            raise ValueError(f"rank must be at least 1, got {rank}")
        return self.keep(range(rank))

    def keep(self, directions: Sequence[int]) -> Factors:
        """The terms of these numbers, counted from 0, ascending; zeros in place of those that there are not."""
        rank, there = len(directions), self.left.shape[1]
        if directions[-1] == rank - 1:  # the leading ones
            second, first = self.left[:, :rank], self.right[:rank]
        else:
            chosen = torch.tensor([number for number in directions if number < there], dtype=torch.long)
            chosen = chosen.to(self.left.device)
            second, first = self.left[:, chosen], self.right[chosen]
        missing = rank - second.shape[1]
        if missing > 0:
            second = torch.cat([second, second.new_zeros(second.shape[0], missing)], dim=1)
            first = torch.cat([first, first.new_zeros(missing, first.shape[1])], dim=0)
        return Factors(second, first)

    def tail(self, rank: int) -> float:
        """Error at a rank in the factorizer's own metric (SVD-LLM V2, Theorem 3.1): `sqrt(sum_{i>rank} s_i^2)`."""
        return float(torch.linalg.vector_norm(self.singular_values[rank:]))
