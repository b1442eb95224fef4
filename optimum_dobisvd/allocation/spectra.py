"""The importance scores that allocators read: singular values by matrix."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from ..model.target import Target

if TYPE_CHECKING:
    from torch import Tensor


def check_spectrum(target: Target, spectra: Mapping[str, Tensor], allocation: str) -> None:
    """Make sure that a matrix's spectrum is there and is one.

    Raises:
        ValueError: naming the matrix: missing, not of min(m, n) values, not finite, negative or not descending.
    """
    if target.name not in spectra:
        raise ValueError(
            f"{target.name}: no spectrum; allocation {allocation!r} needs one for every matrix it allocates"
        )
    spectrum = spectra[target.name]
    count = min(target.out_features, target.in_features)
    if tuple(spectrum.shape) != (count,):
        problem = f"has shape {tuple(spectrum.shape)}, expected ({count},); give every singular value, zeros included"
    elif not bool(spectrum.isfinite().all()):
        problem = "has values that are not finite; look for NaN or infinity in its weight and calibration statistics"
    elif bool((spectrum < 0).any()) or bool((spectrum[1:] > spectrum[:-1]).any()):
        problem = "is not a list of singular values, non-negative and descending; pass those of the whitened weight"
    else:
        return
    raise ValueError(f"{target.name}: its spectrum {problem}")
