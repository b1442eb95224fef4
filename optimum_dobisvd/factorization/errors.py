"""How far a compressed weight is from the dense one, over the calibration tokens."""

from __future__ import annotations

import torch
from torch import Tensor


def output_error(weight: Tensor, stored: Tensor, gram: Tensor) -> tuple[float, float]:
    """`(||(W - W')X||_F, ||WX||_F)` from the Gram `H = X X^T` (`n x n`) alone: `||D X||^2 = tr(D H D^T)`.

    Computed from `W` and `W'` themselves, not from the singular values, so that it checks what will really be stored.
    """
    weight, gram = weight.double(), gram.double()
    difference = weight - stored.double()
    lost = torch.einsum("ij,jk,ik->", difference, gram, difference)
    total = torch.einsum("ij,jk,ik->", weight, gram, weight)
    return float(lost.clamp_min(0).sqrt()), float(total.clamp_min(0).sqrt())
