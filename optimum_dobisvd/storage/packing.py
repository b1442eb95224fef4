"""From factors to the tensors of a storage and back, by the storage's name."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from .costs import DENSE_INT8, dense_storage_named
from .eight_bit import pack_dense_int8, pack_int8, pack_remapped, unpack_dense_int8, unpack_int8, unpack_remapped
from .inner_forms import inner_form_named


def pack(storage: str, second: Tensor, first: Tensor, dtype: torch.dtype) -> dict[str, Tensor]:
    """The tensors that factors become, by their names in the module.

    Args:
        storage: `plain`, `remap`, `int8`, or a form of another library, which quantizes plain factors in its turn.
        second: m x k, balanced.
        first: k x n.
        dtype: of the model.

    Raises:
        ValueError: an unknown storage, or a scale that overflows in that dtype.
    """
    packers = {"plain": _pack_plain, "remap": pack_remapped, "int8": pack_int8}
    if inner_form_named(storage) is not None:
        storage = "plain"
    if storage not in packers:
        raise ValueError(f"storage {storage!r} has no form on disk; those that have: {', '.join(packers)}")
    return packers[storage](second, first, dtype)


def unpack(storage: str, tensors: Mapping[str, Tensor], out_features: int, in_features: int) -> tuple[Tensor, Tensor]:
    """`(second, first)` as these tensors stand for them, in float32."""
    if storage == "remap":
        return unpack_remapped(tensors, out_features, in_features)
    if storage == "int8":
        return unpack_int8(tensors)
    return tensors["second.weight"].float(), tensors["first.weight"].float()


def _pack_plain(second: Tensor, first: Tensor, dtype: torch.dtype) -> dict[str, Tensor]:
    return {"first.weight": first.to(dtype), "second.weight": second.to(dtype)}


def pack_dense(storage: str, weight: Tensor, dtype: torch.dtype) -> tuple[dict[str, Tensor], Tensor]:
    """The tensors that a whole matrix becomes in a storage other than `dense`, and the matrix they stand for.

    What another library quantizes in its turn is not rounded yet.
    """
    if dense_storage_named(storage).form is not None:
        return {"whole.weight": weight.to(dtype)}, weight
    if storage != DENSE_INT8:
        raise ValueError(f"storage {storage!r} keeps the matrix as it is: there is nothing to pack")
    tensors = pack_dense_int8(weight, dtype)
    return tensors, unpack_dense_int8(tensors)
