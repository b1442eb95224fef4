"""Dobi-SVD Algorithm 2: one basis for the outputs of all calibration samples, by incremental PCA.

Two things differ from the listing, each on purpose. The samples' bases are not mean-centered: singular vectors have
arbitrary signs, so their mean means nothing. The running basis carries its singular values: without them the last
sample weighs as much as all earlier ones together. Memory is one `m x k` basis whatever the number of samples.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

from .factors import Factors

_ENERGY_FLOOR = 1e-12
"""Squared singular values below this fraction of the largest are rounding."""


def sample_basis(outputs: Tensor, rank: int) -> Tensor:
    """Top right singular vectors of one sample's output `A = x W^T` (`T x m`), as columns, best first: `m x j`.

    `j` is `rank`, or the number of directions with energy where there are fewer: the rest of the singular vectors are
    arbitrary, and would pull the basis towards nothing.
    """
    outputs = outputs.double()
    tokens, width = outputs.shape
    wide = tokens < width
    values, vectors = torch.linalg.eigh(outputs @ outputs.T if wide else outputs.T @ outputs)
    values, vectors = values.flip(0)[:rank], vectors.flip(1)[:, :rank]
    alive = values > values[0].clamp_min(0) * _ENERGY_FLOOR
    values, vectors = values[alive], vectors[:, alive]
    return outputs.T @ (vectors / values.sqrt()) if wide else vectors


class IncrementalBasis:
    """Running rank-`k` approximation of the stacked bases `[V_1, V_2, ...]`, maximizing `sum_i ||V^T V_i||_F^2`."""

    def __init__(self, width: int, rank: int) -> None:
        if not 1 <= rank <= width:
            raise ValueError(f"rank must lie in 1..{width}, got {rank}")
        self._rank, self._width = rank, width
        self._weighted: Tensor | None = None  # U diag(sigma), m x k

    def update(self, basis: Tensor) -> None:
        """Add one sample's orthonormal basis (`m x j`); that of a sample without energy has no columns."""
        if basis.shape[1] == 0:
            return
        stacked = basis if self._weighted is None else torch.cat([self._weighted, basis], dim=1)
        if stacked.shape[1] >= self._width:  # the m x m problem is the smaller one
            values, vectors = torch.linalg.eigh(stacked @ stacked.T)
            left, sigma = vectors.flip(1), values.flip(0).clamp_min(0).sqrt()
        else:
            left, sigma, _ = torch.linalg.svd(stacked, full_matrices=False)
        self._weighted = left[:, : self._rank] * sigma[: self._rank]

    @property
    def is_empty(self) -> bool:
        """Whether every sample so far was zero."""
        return self._weighted is None

    def basis(self) -> Tensor:
        """The orthonormal basis found so far, `m x k`; columns beyond the directions that were seen are zero."""
        if self._weighted is None:
            raise ValueError("no calibration sample was seen, or the linear's outputs were zero on all of them")
        norms = torch.linalg.vector_norm(self._weighted, dim=0)
        alive = norms > norms.max() * 1e-12
        columns = self._weighted[:, alive] / norms[alive]
        return pad(columns, (0, self._rank - columns.shape[1]))


def project(weight: Tensor, basis: Tensor) -> Factors:
    """`W' = V V^T W`: outer factor `V` (`m x k`), inner factor `V^T W` (`k x n`), on the device of `V`."""
    return Factors(basis, basis.T @ weight.to(basis))
