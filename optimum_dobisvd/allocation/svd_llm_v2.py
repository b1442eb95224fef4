"""SVD-LLM V2's heterogeneous ratios (its Algorithm 1): matrices that lose more are compressed less."""

from __future__ import annotations

import math
from collections.abc import Mapping
from fractions import Fraction
from typing import TYPE_CHECKING

from .budget import Budget, Ladder, proportional_shares, spend
from .plan import PlannedModule
from .spectra import check_spectrum

if TYPE_CHECKING:
    from torch import Tensor


def svd_llm_v2(budget: Budget, spectra: Mapping[str, Tensor] | None = None) -> dict[str, PlannedModule]:
    """Shares the bytes to remove among the matrices of one kind by how little each would lose (Alg. 1, SVD-LLM V2).

    Args:
        budget: what `open_budget` returned.
        spectra: for every matrix to allocate, its min(m, n) singular values in the whitened metric, descending: those
            of `W H^½` with `H = Σ x xᵀ`, the raw *sum* over the calibration tokens (see `wished_bytes`). An overridden
            matrix needs none.

    Returns:
        A planned module for every target, in order.

    Raises:
        ValueError: a spectrum is missing, not of min(m, n) values, not finite, negative or not descending.
    """
    return spend(budget, wished_bytes(budget, spectra or {}))


def wished_bytes(budget: Budget, spectra: Mapping[str, Tensor]) -> dict[str, int | Fraction]:
    """Bytes that Algorithm 1 wants each free matrix to keep, before they are rounded to ranks.

    Every kind (all `q_proj`, ...) keeps the same fraction of its bytes, as far as minimum ranks allow. Inside a kind
    of N matrices, with R the fraction to remove, matrix j loses the fraction `R_j = N·R·g_j / Σg` of its bytes, where
    `g = 1 / ln L` and L is its truncation loss at R: the larger the loss, the smaller g, the less is removed. For
    matrices of different sizes `N / Σg` becomes `Σ bytes / Σ (g · bytes)`, so that the kind's bytes hold. `R_j` is
    clipped so that no matrix keeps less than half of what its kind keeps on average (1 / ln L has a pole at 1: in a
    135M model it left the first o_proj, which loses little, with rank 1), and what that frees is shared in the same
    proportions.

    ln L depends on the scale of the data. As in the paper, L is a norm over all calibration tokens, neither divided by
    their number nor by the matrix's size (10⁶ to 10⁷ on real models); on spectra of averaged Grams, L would be √tokens
    smaller and the ratios would spread further. L is taken as e at least, where g reaches 1: below it ln would leave
    its useful range, and at 1 it is zero.

    Args:
        budget: what `open_budget` returned.
        spectra: as in `svd_llm_v2`.

    Returns:
        Bytes for every name in `budget.ladders`; they sum to `budget.free_bytes` exactly, unless all fit dense.

    Raises:
        ValueError: as in `svd_llm_v2`.
    """
    for ladder in budget.ladders.values():
        check_spectrum(ladder.target, spectra, "svd_llm_v2")
    kinds: dict[str, list[Ladder]] = {}
    for ladder in budget.ladders.values():
        kinds.setdefault(ladder.target.kind, []).append(ladder)
    dense = [sum(ladder.target.dense_bytes for ladder in ladders) for ladders in kinds.values()]
    smallest = [sum(ladder.bytes_at(0) for ladder in ladders) for ladders in kinds.values()]
    kept = proportional_shares(dense, smallest, dense, budget.free_bytes)
    wishes: dict[str, int | Fraction] = {}
    for ladders, kept_bytes in zip(kinds.values(), kept, strict=True):
        wishes |= _wishes_of_kind(ladders, kept_bytes, spectra)
    return wishes


def truncation_loss(spectrum: Tensor, rank: int) -> float:
    """`‖(W − W')X‖_F` of the best rank-k W': the norm of the singular values beyond the k-th (Theorem 3.1).

    Args:
        spectrum: min(m, n) singular values in the whitened metric, descending.
        rank: k, from 0 to min(m, n).
    """
    return float(spectrum[rank:].detach().cpu().double().norm())


def _wishes_of_kind(
    ladders: list[Ladder], kept_bytes: int | Fraction, spectra: Mapping[str, Tensor]
) -> dict[str, int | Fraction]:
    dense = [ladder.target.dense_bytes for ladder in ladders]
    keep = Fraction(kept_bytes) / sum(dense)
    weights = [
        _removal_weight(ladder, keep, spectra[ladder.target.name]) * ladder.target.dense_bytes for ladder in ladders
    ]
    least = [max(Fraction(ladder.bytes_at(0)), keep * ladder.target.dense_bytes / 2) for ladder in ladders]
    removable = [size - kept for size, kept in zip(dense, least, strict=True)]
    removed = proportional_shares(weights, [0] * len(ladders), removable, sum(dense) - kept_bytes)
    return {
        ladder.target.name: ladder.target.dense_bytes - share for ladder, share in zip(ladders, removed, strict=True)
    }


def _removal_weight(ladder: Ladder, keep: Fraction, spectrum: Tensor) -> Fraction:
    """g = 1 / ln L at the rank that keeping the fraction `keep` of this matrix gives."""
    level = max(0, ladder.level_within(keep * ladder.target.dense_bytes))
    rank = ladder.module_at(level).rank
    loss = truncation_loss(spectrum, len(spectrum) if rank is None else rank)
    return Fraction(1 / math.log(max(loss, math.e)))
