"""SVD-LLM V2's heterogeneous ratios (its Algorithm 1): matrices that lose more are compressed less."""

from __future__ import annotations

import math
from collections.abc import Mapping
from fractions import Fraction
from typing import TYPE_CHECKING

from .budget import Budget, proportional_shares, spend
from .global_allocation import QuantizationLosses
from .options import SizeOptions
from .plan import PlannedModule
from .spectra import check_spectrum

if TYPE_CHECKING:
    from torch import Tensor


def svd_llm_v2(
    budget: Budget, spectra: Mapping[str, Tensor] | None = None, losses: QuantizationLosses | None = None
) -> dict[str, PlannedModule]:
    """Share the bytes to remove among the matrices of one kind by how little each would lose (Alg. 1, SVD-LLM V2).

    `spectra` are in the whitened metric: those of `W H^½` with `H = Σ x xᵀ`, the raw *sum* over the calibration tokens
    (see `target_bytes`). Raises ValueError as `check_spectrum` does.
    """
    return spend(budget, target_bytes(budget, spectra or {}))


def target_bytes(budget: Budget, spectra: Mapping[str, Tensor]) -> dict[str, int | Fraction]:
    """Return the bytes that Algorithm 1 wants each free matrix to keep, before they are rounded to ranks.

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

    Returns bytes for every name in `budget.options`; they sum to `budget.free_bytes` exactly, unless all fit dense.
    Raises ValueError as `check_spectrum` does.
    """
    for each in budget.options.values():
        check_spectrum(each.target, spectra, "svd_llm_v2")
    kinds: dict[str, list[SizeOptions]] = {}
    for each in budget.options.values():
        kinds.setdefault(each.target.kind, []).append(each)
    dense = [sum(each.target.dense_bytes for each in members) for members in kinds.values()]
    smallest = [sum(each.bytes_at(0) for each in members) for members in kinds.values()]
    kept = proportional_shares(dense, smallest, dense, budget.free_bytes)
    targets: dict[str, int | Fraction] = {}
    for members, kept_bytes in zip(kinds.values(), kept, strict=True):
        targets |= _target_bytes_of_kind(members, kept_bytes, spectra)
    return targets


def truncation_loss(spectrum: Tensor, rank: int) -> float:
    """Return `‖(W − W')X‖_F` of the best rank-k W': the norm of the singular values beyond the k-th (Theorem 3.1).

    Args:
        spectrum: min(m, n) singular values in the whitened metric, descending.
        rank: k, from 0 to min(m, n).
    """
    return float(spectrum[rank:].detach().cpu().double().norm())


def _target_bytes_of_kind(
    members: list[SizeOptions], kept_bytes: int | Fraction, spectra: Mapping[str, Tensor]
) -> dict[str, int | Fraction]:
    dense = [each.target.dense_bytes for each in members]
    keep = Fraction(kept_bytes) / sum(dense)
    weights = [_removal_weight(each, keep, spectra[each.target.name]) * each.target.dense_bytes for each in members]
    least = [max(Fraction(each.bytes_at(0)), keep * each.target.dense_bytes / 2) for each in members]
    removable = [size - kept for size, kept in zip(dense, least, strict=True)]
    removed = proportional_shares(weights, [0] * len(members), removable, sum(dense) - kept_bytes)
    return {each.target.name: each.target.dense_bytes - share for each, share in zip(members, removed, strict=True)}


def _removal_weight(options: SizeOptions, keep: Fraction, spectrum: Tensor) -> Fraction:
    """g = 1 / ln L at the rank that keeping the fraction `keep` of this matrix gives."""
    option = max(0, options.option_within(keep * options.target.dense_bytes))
    rank = options.module_at(option).rank
    loss = truncation_loss(spectrum, len(spectrum) if rank is None else rank)
    return Fraction(1 / math.log(max(loss, math.e)))
