"""Closed-form factorizers: truncated SVDs of the weight in one metric or another (svd, asvd, svd_llm, ...).

All take the weight `W` (`m x n`, any float dtype) and return a `Decomposition` in float64.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .factors import Decomposition
from .whitening import Whitening


def whitened_svd(weight: Tensor, whitening: Whitening | None) -> Decomposition:
    """SVD of `W S`, with `S` undone on the right (SVD-LLM V2, Algorithm 2, with the `V` its listing drops).

    With `whitening=None` this is the plain SVD of the weight. Minimizes `||(W - W') S||_F` at every rank. Of inputs
    that are always zero, the singular values are zero, and the factors those of the plain SVD.
    """
    left, values, right = torch.linalg.svd(_whitened(weight, whitening), full_matrices=False)
    right = right if whitening is None else whitening.undo(right)
    # The singular value is split evenly so that neither factor carries the whole scale; `balanced` does the rest.
    root = values.sqrt()
    return Decomposition(left * root, root[:, None] * right, _priced(values, whitening))


def whitened_spectrum(weight: Tensor, whitening: Whitening | None) -> Tensor:
    """The singular values of `whitened_svd`, descending, without the vectors: a third of the time."""
    return _priced(torch.linalg.svdvals(_whitened(weight, whitening)), whitening)


def output_pca(weight: Tensor, gram: Tensor) -> Decomposition:
    """Optimal truncation of the stacked activations (Dobi-SVD's premise in closed form, no inverse of anything).

    `U` = eigenvectors of `W H W^T` (`m x m`), `W' = U_k U_k^T W`. With `m > n` the same eigenvectors come from
    the `n x n` problem `R H R^T`, `W = Q R`. Same minimizer of `||(W - W')X||_F` as SVD-LLM V2; outside the range of
    `H` the two differ. `gram` is `H`, `n x n`; where it is zero, the directions are those of the plain SVD.
    """
    zero = not bool(gram.any())
    outer, inner, energy = _output_energy(weight, _identity(gram) if zero else gram)
    values, vectors = torch.linalg.eigh(energy)
    values, vectors = values.flip(0).clamp_min(0), vectors.flip(1)
    right = vectors.T @ inner
    left = vectors if outer is None else outer @ vectors
    return Decomposition(left, right, torch.zeros_like(values) if zero else values.sqrt())


def output_spectrum(weight: Tensor, gram: Tensor) -> Tensor:
    """The singular values of `output_pca`, descending, without the vectors."""
    return torch.linalg.eigvalsh(_output_energy(weight, gram)[2]).flip(0).clamp_min(0).sqrt()


def _identity(like: Tensor) -> Tensor:
    return torch.eye(len(like), dtype=like.dtype, device=like.device)


def _whitened(weight: Tensor, whitening: Whitening | None) -> Tensor:
    weight = weight.double()
    return weight if whitening is None else whitening.apply(weight)


def _priced(values: Tensor, whitening: Whitening | None) -> Tensor:
    return torch.zeros_like(values) if whitening is not None and whitening.is_silent else values


def _output_energy(weight: Tensor, gram: Tensor) -> tuple[Tensor | None, Tensor, Tensor]:
    """`(Q, R, R H R^T)` for `m > n`, `(None, W, W H W^T)` otherwise: the smaller side."""
    weight, gram = weight.double(), gram.double()
    outer, inner = torch.linalg.qr(weight) if weight.shape[0] > weight.shape[1] else (None, weight)
    energy = inner @ gram @ inner.T
    return outer, inner, (energy + energy.T) / 2
