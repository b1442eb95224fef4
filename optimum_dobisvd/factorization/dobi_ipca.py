"""Dobi-SVD Algorithm 2: one basis for the outputs of all calibration samples, by incremental PCA.

Three things differ from the listing, each on purpose. The samples' bases are not mean-centred (singular vectors have
arbitrary signs, so their mean means nothing). The running basis carries its singular values: without them a sample seen
early weighs as much as all later ones together. Memory is one `m x k` basis whatever the number of samples.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .factors import Factors


def sample_basis(outputs: Tensor, rank: int) -> Tensor:
    """Top `rank` right singular vectors of one sample's output `A = x W^T` (`T x m`), as columns: `m x min(rank, T, m)`."""
    outputs = outputs.double()
    tokens, width = outputs.shape
    count = min(rank, tokens, width)
    if tokens >= width:
        return torch.linalg.eigh(outputs.T @ outputs)[1].flip(1)[:, :count]
    values, vectors = torch.linalg.eigh(outputs @ outputs.T)
    values, vectors = values.flip(0)[:count], vectors.flip(1)[:, :count]
    # A direction without energy has no right singular vector of its own: leave it out instead of dividing by zero.
    alive = values > values[0].clamp_min(0) * 1e-12
    return outputs.T @ (vectors[:, alive] / values[alive].sqrt())


class IncrementalBasis:
    """Running rank-`k` approximation of the stacked bases `[V_1, V_2, ...]`, maximising `sum_i ||V^T V_i||_F^2`."""

    def __init__(self, width: int, rank: int) -> None:
        if not 1 <= rank <= width:
            raise ValueError(f"rank must lie in 1..{width}, got {rank}")
        self._rank = rank
        self._width = width
        self._weighted: Tensor | None = None  # U diag(sigma), m x k

    def update(self, basis: Tensor) -> None:
        """Add one sample's orthonormal basis (`m x j`)."""
        stacked = basis if self._weighted is None else torch.cat([self._weighted, basis], dim=1)
        if stacked.shape[1] >= self._width:  # the m x m problem is the smaller one
            values, vectors = torch.linalg.eigh(stacked @ stacked.T)
            left, sigma = vectors.flip(1), values.flip(0).clamp_min(0).sqrt()
        else:
            left, sigma, _ = torch.linalg.svd(stacked, full_matrices=False)
        self._weighted = left[:, : self._rank] * sigma[: self._rank]

    def basis(self) -> Tensor:
        """The orthonormal basis found so far, `m x k`."""
        if self._weighted is None:
            raise ValueError("no calibration sample was seen")
        norms = torch.linalg.vector_norm(self._weighted, dim=0)
        alive = norms > norms.max() * 1e-12
        columns = self._weighted[:, alive] / norms[alive]
        missing = self._rank - columns.shape[1]
        return columns if missing == 0 else torch.cat([columns, columns.new_zeros(self._width, missing)], dim=1)


def project(weight: Tensor, basis: Tensor) -> Factors:
    """`W' = V V^T W`: outer factor `V` (`m x k`), inner factor `V^T W` (`k x n`)."""
    return Factors(basis, basis.T @ weight.double())
