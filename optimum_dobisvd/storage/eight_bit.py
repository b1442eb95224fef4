"""Matrices and factors in 8 bits: how they are rounded, and the tensors they become. Pure: tensors in, tensors out.

An int8 value `q` stands for the fraction `q / 128`, so no element type has to represent 1/127, and the scale of a
vector is its largest magnitude, of a size that 16-bit floats hold well. Two factors are

    A B = diag(row_scale) (Q_A / 128) diag(scale) (Q_B / 128)

One scale per rank serves both factors, as in Dobi-SVD's Alg. 3. The scale per output row is ours: a few output
channels of a language model are many times larger than the others, and with scales per rank alone these set the step
for all. It is one more value a row, nothing more to compute (kernels scale their outputs anyway), and takes most of
the rounding's cost away. Scales are rounded up to the model's dtype first and values against the rounded scale, so the
rounding of scales costs nothing.

This module is bundled with every checkpoint (see `integrations.saving`): it imports nothing but torch.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

UNIT = 128
"""What an int8 value is a fraction of."""
_LARGEST = 127


@dataclass(frozen=True)
class TensorSpec:
    """Shape of a stored tensor, and its dtype; None is the model's own dtype."""

    shape: tuple[int, ...]
    dtype: torch.dtype | None = None


def int8_tensors(out_features: int, in_features: int, rank: int) -> dict[str, TensorSpec]:
    """`first` (k x n) and `second` (m x k) in int8, `scale` (k) and `row_scale` (m)."""
    return {
        "first": TensorSpec((rank, in_features), torch.int8),
        "second": TensorSpec((out_features, rank), torch.int8),
        "scale": TensorSpec((rank,)),
        "row_scale": TensorSpec((out_features,)),
    }


def remap_tensors(out_features: int, in_features: int, rank: int) -> dict[str, TensorSpec]:
    """Alg. 3: `packed` has `k min(m, n)` slots of 16 bits, two 8-bit values each; `rest` has the 16-bit ones.

    Together `k max(m, n)` slots, where the model's dtype has 16 bits. `rest` are the rows of the longer factor beyond
    the first `min(m, n)`: `(m - n) x k` of `second`, or `k x (n - m)` of `first`; there is none in a square matrix.
    And `scale` (k), and `row_scale` (min(m, n)) of the 8-bit rows of `second`.
    """
    small, large = sorted((out_features, in_features))
    specs = {
        "packed": TensorSpec((small, rank), torch.int16),
        "scale": TensorSpec((rank,)),
        "row_scale": TensorSpec((small,)),
    }
    if large > small:
        rest = (large - small, rank) if out_features > in_features else (rank, large - small)
        specs["rest"] = TensorSpec(rest)
    return specs


def dense_int8_tensors(out_features: int, in_features: int) -> dict[str, TensorSpec]:
    """The whole matrix: `quantized` (m x n) in int8, and a `scale` per row (m)."""
    return {"quantized": TensorSpec((out_features, in_features), torch.int8), "scale": TensorSpec((out_features,))}


def pack_int8(second: Tensor, first: Tensor, dtype: torch.dtype) -> dict[str, Tensor]:
    """Both factors rounded to 8 bits, a scale per rank and one per row of `second`.

    Args:
        second: m x k.
        first: k x n.
        dtype: of the model, hence of the scales.
    """
    row_scale = _row_scale(second, dtype)
    outer, outer_scale = _round_rows((second / row_scale[:, None]).T, None)
    scale, inner = _round_inner(first, outer_scale, None, dtype)
    return {"first": inner, "second": outer.T.contiguous(), "scale": scale, "row_scale": row_scale.to(dtype)}


def unpack_int8(tensors: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
    """`(second, first)` in float32, the scale per rank on `first`."""
    first = tensors["first"].float() * (tensors["scale"].float()[:, None] / UNIT)
    return tensors["second"].float() * (tensors["row_scale"].float()[:, None] / UNIT), first


def pack_remapped(second: Tensor, first: Tensor, dtype: torch.dtype) -> dict[str, Tensor]:
    """The first min(m, n) rows of both factors to 8 bits, the rest kept, in units of its factor's per-rank scale.

    Which two values share a slot is ours: neighbors of one factor, so that the two factors lie in the slots as plain
    int8 matrices (`second` before `first`) and products can be computed from them where they lie.
    """
    small = min(len(second), first.shape[1])
    row_scale = _row_scale(second[:small], dtype)
    outer, outer_scale = _round_rows((second[:small] / row_scale[:, None]).T, None)
    scale, inner = _round_inner(first, outer_scale, small, dtype)
    slots = torch.cat([outer.T.reshape(-1), inner.reshape(-1)]).view(torch.int16)
    tensors = {"packed": slots.view(small, len(first)), "scale": scale, "row_scale": row_scale.to(dtype)}
    if len(second) > small:
        tensors["rest"] = (second[small:].double() / outer_scale).to(dtype)
    elif first.shape[1] > small:
        inner_scale = scale.double() / outer_scale
        tensors["rest"] = (first[:, small:].double() / inner_scale[:, None]).to(dtype)
    return tensors


def remapped_matrices(packed: Tensor) -> tuple[Tensor, Tensor]:
    """The two int8 matrices in the slots, without a copy: p x k of `second` and k x p of `first`, p = min(m, n)."""
    small, rank = packed.shape
    values = packed.view(torch.int8).view(-1)
    return values[: small * rank].view(small, rank), values[small * rank :].view(rank, small)


def unpack_remapped(tensors: Mapping[str, Tensor], out_features: int, in_features: int) -> tuple[Tensor, Tensor]:
    """`(second, first)` in float32, the scale per rank on `first`."""
    outer, inner = remapped_matrices(tensors["packed"])
    second, first = outer.float() * (tensors["row_scale"].float()[:, None] / UNIT), inner.float() / UNIT
    if out_features > in_features:
        second = torch.cat([second, tensors["rest"].float()])
    elif in_features > out_features:
        first = torch.cat([first, tensors["rest"].float()], dim=1)
    return second, first * tensors["scale"].float()[:, None]


def pack_dense_int8(weight: Tensor, dtype: torch.dtype) -> dict[str, Tensor]:
    """The whole matrix (m x n) rounded to 8 bits, a scale per row."""
    quantized, scale = _round_rows(weight, dtype)
    return {"quantized": quantized, "scale": scale.to(dtype)}


def unpack_dense_int8(tensors: Mapping[str, Tensor]) -> Tensor:
    """The matrix in float32."""
    return tensors["quantized"].float() * (tensors["scale"].float()[:, None] / UNIT)


def _row_scale(rows: Tensor, dtype: torch.dtype) -> Tensor:
    """The largest magnitude of every row, rounded up to `dtype` (as float64); 1 for a row of zeros."""
    largest = rows.double().abs().amax(1)
    return _rounded_up(torch.where(largest > 0, largest, 1), dtype)


def _round_rows(rows: Tensor, dtype: torch.dtype | None) -> tuple[Tensor, Tensor]:
    """int8 rows and their scales (float64), the scales representable in `dtype` if one is given."""
    rows = rows.double()
    scale = rows.abs().amax(1) * (UNIT / _LARGEST)
    scale = torch.where(scale > 0, scale, 1)
    if dtype is not None:
        scale = _rounded_up(scale, dtype)
    return _rounded(rows / scale[:, None]), scale


def _round_inner(first: Tensor, outer: Tensor, width: int | None, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """The common scale in `dtype`, and the first `width` columns of `first` against what it leaves for them."""
    rows = first[:, :width].double()
    largest = rows.abs().amax(1) * (UNIT / _LARGEST)
    scale = _rounded_up(torch.where(largest > 0, largest, 1) * outer, dtype)
    return scale.to(dtype), _rounded(rows * (outer / scale)[:, None])


def _rounded(fractions: Tensor) -> Tensor:
    return (fractions * UNIT).round().clamp(-_LARGEST, _LARGEST).to(torch.int8)


def _rounded_up(scale: Tensor, dtype: torch.dtype) -> Tensor:
    """The smallest values of `dtype` not below `scale`, as float64; never zero, a scale below the normal range becomes
    the smallest normal number (its values then use fewer bits).

    Raises:
        ValueError: a scale is not finite in that dtype.
    """
    limits = torch.finfo(dtype)
    nearest = scale.clamp_min(limits.tiny).to(dtype)
    up = torch.nextafter(nearest, torch.full_like(nearest, float("inf")))
    found = torch.where(nearest.double() < scale, up, nearest).double()
    if not bool(torch.isfinite(found).all()):
        raise ValueError(
            f"a factor does not fit into {dtype}: its scale overflows; load the model in bfloat16 or float32"
        )
    return found
