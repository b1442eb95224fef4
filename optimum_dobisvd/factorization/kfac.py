"""Truncation in the metric of the loss: inputs weighed by what they are, outputs by how much the loss feels them.

With `H = sum x x^T` and `G = sum g g^T` (`g` the loss gradient at the output), the K-FAC approximation of the loss's
second-order increase is a quadratic form, `1/2 ||G^1/2 (W - W') H^1/2||_F^2 / tokens`.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .factors import Decomposition
from .truncated_svd import output_pca, output_spectrum

DAMPING = 0.01
"""Added to the diagonal of `G`, as a fraction of its mean: directions that the gradients missed still count."""


@dataclass(frozen=True)
class OutputRoot:
    """`root` is lower triangular, `m x m`, with `root root^T = G + damping`; zero if `G` is."""

    root: Tensor

    def apply(self, weight: Tensor) -> Tensor:
        """`root^T W`."""
        return self.root.T @ weight.to(self.root)

    def undo(self, left: Tensor) -> Tensor:
        """`root^-T L`."""
        return torch.linalg.solve_triangular(self.root.T, left, upper=True)

    @property
    def is_zero(self) -> bool:
        """Whether the loss does not feel the outputs at all."""
        return not bool(self.root.any())


def output_root(gram: Tensor, damping: float = DAMPING) -> OutputRoot:
    """Cholesky root of the damped gradient Gram `G` (`m x m`); zero if that is."""
    gram = gram.double()
    mean = gram.diagonal().mean()
    if not float(mean) > 0:
        return OutputRoot(torch.zeros_like(gram))
    damped = (gram + gram.T) / 2
    damped.diagonal().add_(damping * mean)
    return OutputRoot(torch.linalg.cholesky(damped))


def kfac(weight: Tensor, metric: tuple[Tensor, OutputRoot]) -> Decomposition:
    """Minimizes `||G^1/2 (W - W') H^1/2||_F` at every rank.

    `output_pca` of `root^T W` (`m x n`), with the root undone on the left: an eigendecomposition of the smaller side,
    and no root or inverse of `H`. `metric` is `H` (`n x n`), and the root of `G` (`m x m`). Where that is zero and all
    ranks cost the same nothing, the directions are those of `output_pca`.
    """
    gram, root = metric
    if root.is_zero:
        found = output_pca(weight, gram)
        return Decomposition(found.left, found.right, torch.zeros_like(found.singular_values))
    found = output_pca(root.apply(weight), gram)
    return Decomposition(root.undo(found.left), found.right, found.singular_values)


def kfac_spectrum(weight: Tensor, metric: tuple[Tensor, OutputRoot]) -> Tensor:
    """The singular values of `kfac`, descending, without the vectors."""
    gram, root = metric
    return output_spectrum(root.apply(weight), gram)
