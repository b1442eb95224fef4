"""Dobi-SVD's remapped storage (Algorithm 3): a factor's first `min(m, n)` rows and columns in 8 bits, the rest in 16.

A rank-k matrix then takes `k max(m, n)` slots of 16 bits, and scales: one per row of each factor's 8-bit part, which
for `first` is Alg. 3's scale per rank. Which two values share a slot is nobody's business: they are stored as int8.
"""

from __future__ import annotations

from typing import ClassVar

from ..factorization.factors import Gauge
from .int8 import Int8


class Remap(Int8):
    """8 bits where a factor is no longer than the matrix's short side, the model's dtype beyond."""

    name = "remap"
    gauge = Gauge.EQUAL_LEADING_COLUMNS
    needs_gauge = True
    roundings: ClassVar[tuple[str, ...]] = ("nearest",)
    dense_encodings: tuple[str, ...] = ()
    sliceable = False

    def part(self, out_features: int, in_features: int, full_rank: int) -> tuple[int, int]:
        return min(out_features, full_rank), min(in_features, full_rank)
