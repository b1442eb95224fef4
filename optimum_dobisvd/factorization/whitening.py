"""Changes of basis of a linear's input: `W -> W S`, and back.

Truncating `W S` instead of `W` makes the SVD minimize `||(W - W') S||_F`; with `S S^T = X X^T` that is the error of
the layer's output over the calibration tokens.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

EIGENVALUE_FLOOR = 1e-12
"""Eigenvalues below this fraction of the largest count as zero (see `eigen_whitening`): a coarser floor breaks Theorem
3.1."""


@dataclass(frozen=True)
class Whitening:
    """`root` is `n x r` with `root root^T = H` on the range of `H`; `inverse` (`r x n`) undoes it there.

    A diagonal whitening stores both as vectors of length `n`. `is_silent`: the inputs are always zero, and the
    whitening is the identity.
    """

    root: Tensor
    inverse: Tensor
    is_silent: bool = False

    def apply(self, weight: Tensor) -> Tensor:
        """`W S`, `m x r`."""
        return weight * self.root if self.root.dim() == 1 else weight @ self.root

    def undo(self, right: Tensor) -> Tensor:
        """`V^T S^+`, `p x n`."""
        return right * self.inverse if self.inverse.dim() == 1 else right @ self.inverse


def channel_scaling(abs_mean: Tensor, alpha: float = 0.5) -> Whitening:
    """ASVD (Yuan et al. 2023): `S = diag(mean|x_j|^alpha)`, `n x n`. Channels that are always zero get no weight."""
    scale = abs_mean.double().clamp_min(0) ** alpha
    if not bool((scale > 0).any()):
        return silent_whitening(scale)
    return Whitening(scale, torch.where(scale > 0, 1 / scale.where(scale > 0, 1), 0))


def cholesky_whitening(gram: Tensor) -> Whitening:
    """SVD-LLM (V1): `S = chol(H)`, with the repair of its public code where `H` (`n x n`) is not positive definite.

    The repair adds `(-lambda_min + 1e-6) I`. It can still fail; V2 has no such weak point.
    """
    if not bool(gram.any()):
        return silent_whitening(gram.diagonal())
    gram = _symmetric(gram)
    identity = torch.eye(len(gram), dtype=gram.dtype, device=gram.device)
    root, failed = torch.linalg.cholesky_ex(gram)
    if int(failed):
        shift = -torch.linalg.eigvalsh(gram)[0] + 1e-6
        root, failed = torch.linalg.cholesky_ex(gram + shift * identity)
    if int(failed):
        raise ValueError(
            "the Gram matrix is singular and SVD-LLM V1's Cholesky repair was not enough (dead channels, or fewer "
            "calibration tokens than input features); use factorization='svd_llm_v2', which needs no Cholesky, or "
            "calibrate on more text"
        )
    return Whitening(root, torch.linalg.solve_triangular(root, identity, upper=False))


def eigen_whitening(gram: Tensor, floor: float = EIGENVALUE_FLOOR) -> Whitening:
    """SVD-LLM V2: `S` with `S S^T = H` from an eigendecomposition, and a generalized inverse instead of an inverse.

    The channels are first brought to one scale: `H = D C D` with `D = sqrt(diag H)`, `C = U C_s U^T`,
    `S = D U sqrt(C_s)`. Any such `S` has the same optimum, but eigenvalues of `H` itself are only known to about 1e-16
    of the largest, and one channel a thousand times louder than the others (massive activations) would drown these.

    Directions whose eigenvalue is below `floor` times the largest, and channels that are always zero, were never
    excited by the calibration text; they are left out of the basis, hence projected out of the compressed weight.
    `gram` is `H`, `n x n`; singular ones are welcome.
    """
    if not bool(gram.any()):
        return silent_whitening(gram.diagonal())
    gram = _symmetric(gram)
    scale = gram.diagonal().clamp_min(0).sqrt()
    inverse_scale = torch.where(scale > 0, 1 / scale.where(scale > 0, 1), 0)
    values, vectors = torch.linalg.eigh(gram * inverse_scale * inverse_scale[:, None])
    keep = values > floor * values[-1].clamp_min(0)
    root, vectors = values[keep].sqrt(), vectors[:, keep]
    return Whitening(scale[:, None] * vectors * root, (vectors / root).T * inverse_scale)


def silent_whitening(like: Tensor) -> Whitening:
    """Return that of inputs which are zero on every calibration token; `like` has their number."""
    ones = torch.ones_like(like, dtype=torch.float64)
    return Whitening(ones, ones, is_silent=True)


def _symmetric(gram: Tensor) -> Tensor:
    gram = gram.double()
    return (gram + gram.T) / 2
